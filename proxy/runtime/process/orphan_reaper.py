"""Keeps a process running that ends the engines when warmpool is gone (`end_orphans.py`), and tells it of them.

It is started again whenever it ends. Telling it never fails and never waits: engines are worth more than their reaper.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from typing import Final

from proxy.host import processes

log = logging.getLogger("warmpool.runtime")

_RESTART_S: Final = 1.0
_END_S: Final = 5.0


class OrphanReaper:
    """The process and the pipe to it."""

    def __init__(self) -> None:
        self._mark = ""
        self._sessions: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        self._keeper: asyncio.Task[None] | None = None

    def open(self, mark: str) -> None:
        """Start it, for engines whose mark begins with `mark`. Raises OSError."""
        self._mark = mark
        self._start()
        self._keeper = asyncio.create_task(self._keep(), name="orphan reaper")

    async def close(self) -> None:
        """Have it end what is left of the engines, and end itself; after 5 s it is left to do so alone."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        self._let_go()
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await processes.wait_gone(self._process.pid)
            self._process.poll()
            self._process = None

    def note(self, *, gone: int | None, runs: int | None) -> None:
        """The leader of an engine's session that is gone, and of one that runs now."""
        said = b""
        if gone is not None:
            self._sessions.discard(gone)
            said += b"-%d\n" % gone
        if runs is not None:
            self._sessions.add(runs)
            said += b"+%d\n" % runs
        self._say(said)

    def _start(self) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(writing, False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "proxy.runtime.process.end_orphans", self._mark],
                stdin=reading, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        self._pipe = writing
        self._say(b"".join(b"+%d\n" % pid for pid in sorted(self._sessions)))

    def _say(self, lines: bytes) -> None:
        if self._pipe is None or not lines:
            return
        try:
            if os.write(self._pipe, lines) == len(lines):
                return
        except OSError:
            pass
        # It is gone, or stands still and its pipe is full: another one is told everything anew.
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)

    def _let_go(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            os.close(pipe)

    async def _keep(self) -> None:
        while True:
            began = time.monotonic()
            if self._process is not None:
                how = await processes.wait_gone(self._process.pid)
                self._process.poll()
                self._process = None
                self._let_go()
                log.error("the orphan reaper ended (%s): it is started again", how)
            await asyncio.sleep(max(0.0, began + _RESTART_S - time.monotonic()))
            try:
                self._start()
            except OSError as error:
                log.error("the orphan reaper cannot be started, next try in %g s: %s", _RESTART_S, error)
