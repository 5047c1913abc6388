"""Waiting for a moment, to some ten microseconds.

An event loop waits in whole milliseconds (epoll's time-out), which is as much as a load test may be wrong altogether.
The kernel's timerfd has no such grain, and a loop can wait for it as for any other file.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from typing import Final, Self

_NS: Final = 1_000_000_000
_ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME, timerfd_create(2); Python has these calls from 3.13 on


class _TimeSpec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("it_interval", _TimeSpec), ("it_value", _TimeSpec))


_libc = ctypes.CDLL(None, use_errno=True)


class PreciseTimer:
    """Wakes one coroutine at moments of `time.monotonic_ns`. Close it, or use it with `with`."""

    def __init__(self) -> None:
        self._fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._loop.add_reader(self._fd, self._fire)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the timer."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    async def until(self, moment_ns: int) -> None:
        """Return at `moment_ns`, or at once when that is past."""
        if moment_ns <= time.monotonic_ns():
            return
        spec = _TimerSpec(it_value=_TimeSpec(moment_ns // _NS, moment_ns % _NS))
        self._waiter = self._loop.create_future()
        if _libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        await self._waiter

    def _fire(self) -> None:
        os.read(self._fd, 8)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
