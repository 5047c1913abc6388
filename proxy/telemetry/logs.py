"""Log lines on standard error: for people, as JSON objects, or for systemd's journal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from typing import IO, Final

from pythonjsonlogger.json import JsonFormatter

FORMATS: Final = ("text", "json", "journal")
_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)
"""sd-daemon(3)"""


class TextFormatter(logging.Formatter):
    """The time of day to the second, which is put into words once a second."""

    _second = 0
    _words = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Of the record, by `datefmt`."""
        second = int(record.created)
        if second != self._second:
            self._second, self._words = second, super().formatTime(record, datefmt)
        return self._words


class JournalFormatter(logging.Formatter):
    """A priority in front of every line, which journald takes off and files; the time it has itself."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, and a stack if there is one."""
        priority = next((p for level, p in _PRIORITIES if record.levelno >= level), 7)
        lines = super().format(record).splitlines() or [""]
        return "\n".join(f"<{priority}>{line}" for line in lines)


class Lines(logging.StreamHandler[IO[str]]):
    """Writes to a stream; what is told of each request together, once in each turn of the event loop.

    A record of the logging module and a call of the kernel for each would cost more than the rest of a short request.
    """

    def __init__(self, stream: IO[str], formatter: logging.Formatter) -> None:
        super().__init__(stream)
        self.setFormatter(formatter)
        self._waiting: list[str] = []
        self._like = logging.makeLogRecord({"levelno": logging.INFO, "levelname": "INFO"})
        self._second = 0
        self._before = ""
        self.plain = type(formatter) is not JsonFormatter
        """A line is a message and something before it."""

    def add(self, message: str) -> None:
        """A line at level INFO, as `emit` would write it. For messages of one line, where the format is `plain`."""
        second = int(time.time())
        if second != self._second:
            self._like.created = self._second = second
            self._before = self.format(self._like)
        self._waiting.append(f"{self._before}{message}{self.terminator}")
        if len(self._waiting) == 1:
            try:
                asyncio.get_running_loop().call_soon(self._turn_ended)
            except RuntimeError:  # no loop, nobody to wait for
                self._turn_ended()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, after what came before it."""
        self._write_waiting()
        super().emit(record)

    def flush(self) -> None:
        """Leave nothing behind."""
        self._write_waiting()
        super().flush()

    def _turn_ended(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a log that is gone stops nobody
            self.flush()

    def _write_waiting(self) -> None:
        if self._waiting:
            lines, self._waiting = self._waiting, []
            self.stream.write("".join(lines))


def lines_of_requests() -> Lines | None:
    """Where a line of a request can be written without a record: the only handler there is, and of this module."""
    handlers = logging.root.handlers
    if len(handlers) == 1 and isinstance(only := handlers[0], Lines) and only.plain:
        return only
    return None


def to_stderr(format_: str, level: str) -> None:
    """Log there; `format_` is one of `FORMATS`, or "auto"."""
    if format_ == "auto":
        format_ = "journal" if _is_journal(sys.stderr) else "text"
    # What no format shows is not looked up for every line (Python's logging HOWTO, Optimization).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=level.upper(), handlers=[Lines(sys.stderr, _formatter(format_))])


def _is_journal(stream: IO[str]) -> bool:
    """Whether the stream is the one that systemd connected to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _formatter(format_: str) -> logging.Formatter:
    if format_ == "json":
        return JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
    if format_ == "journal":
        return JournalFormatter("%(message)s")
    return TextFormatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
