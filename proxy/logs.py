"""Log lines on standard error: for people, as JSON objects, or for systemd's journal."""

from __future__ import annotations

import logging
import os
import sys
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


def to_stderr(format_: str, level: str) -> None:
    """Log there; `format_` is one of `FORMATS`, or "auto"."""
    handler = logging.StreamHandler(sys.stderr)
    if format_ == "auto":
        format_ = "journal" if _is_journal(sys.stderr) else "text"
    handler.setFormatter(_formatter(format_))
    # What no format shows is not looked up for every line (Python's logging HOWTO, Optimization).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=level.upper(), handlers=[handler])


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
