"""What a connection looks at by the clock, the deadlines of its requests among it."""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.config.server import LimitSettings
    from proxy.server.request_body import RequestBody

_LINGER_S: Final = 5.0
"""How long the rest of a refused body is read, so that the client sees the answer before the connection ends."""


class IdleTimer:
    """Calls `end` once a connection was idle for `limit_s`; one timer, however many requests come in between."""

    __slots__ = ("_end", "_is_idle", "_limit_s", "_loop", "_timer", "since")

    def __init__(self, limit_s: float, is_idle: Callable[[], bool], end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._is_idle = is_idle
        self._end = end
        self.since = self._loop.time()
        """Since when it is idle, if it is, by the event loop's clock: for whoever serves requests to say."""
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(limit_s, self._look)

    def stop(self) -> None:
        """No more of it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        left_s = self.since + self._limit_s - self._loop.time() if self._is_idle() else self._limit_s
        if left_s > 0.001:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._timer = None
            self._end()


class WriteStall:
    """A client that has taken nothing of what is there for it since `began`."""

    __slots__ = ("_since", "_transport", "_unsent")

    def __init__(self, transport: asyncio.Transport, now: float) -> None:
        self._transport = transport
        self._since = now
        self._unsent = transport.get_write_buffer_size()

    def lasts_longer(self, limit_s: float, now: float) -> bool:
        """Whether it has taken nothing for so long."""
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._unsent, self._since = unsent, now
            return False
        self._unsent = unsent
        return now - self._since > limit_s


class Late(enum.Enum):
    """What a client takes too long for."""

    HEAD = enum.auto()
    BODY = enum.auto()
    REST = enum.auto()
    """Of a body whose request was answered."""
    STALL = enum.auto()
    """Taking its answer."""


def missed(
    limits: LimitSettings,
    now: float,
    *,
    head_began: float | None,
    body: RequestBody | None,
    wanted: bool,
    stall: WriteStall | None,
) -> Late | None:
    """The deadline that has passed, if one has. `wanted`: the body's request is not answered yet."""
    if head_began is not None:
        return Late.HEAD if now - head_began > limits.head_timeout else None
    if body is not None and wanted:
        allowed_s = limits.upload_timeout + body.size / limits.upload_rate
        return Late.BODY if now - body.began > allowed_s else None
    if body is not None:
        return Late.REST if now - body.began > _LINGER_S else None
    if stall is not None and limits.stall_timeout is not None and stall.lasts_longer(limits.stall_timeout, now):
        return Late.STALL
    return None
