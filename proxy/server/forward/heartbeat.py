"""When a client that waits for a stream is sent a comment: a line that begins with a colon (HTML standard, 9.2.5).

A comment ends with one newline: an empty line behind it would be an event to clients that do not go by the standard.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

COMMENT: Final = b": waiting for the model\n"
PAUSED: Final = b": paused while another model runs\n"
ON_HOLD: Final = b": paused by an operator\n"
HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the comments back
)
_EVENT_ENDS: Final = (b"\n\n", b"\n\r\n")
"""Not two CRs: a LF that follows the second belongs to it."""


class Heartbeat:
    """Calls `beat` whenever nothing was fed for `every_s`, until `stop`."""

    def __init__(self, every_s: float, beat: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._every_s = every_s
        self._beat = beat
        self._fed_at = self._loop.time()
        self._tail = b"\n\n"
        """The last bytes that were fed; before the first an event may begin."""
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(every_s, self._look)

    @property
    def between_events(self) -> bool:
        """Whether a comment would not be within an event."""
        return self._tail.endswith(_EVENT_ENDS)

    def feed(self, data: bytes) -> None:
        """Bytes of the stream, without the framing of the transfer."""
        self._fed_at = self._loop.time()
        self._tail = data[-3:] if len(data) > 2 else (self._tail + data)[-3:]

    def stop(self) -> None:
        """No more of it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now = self._loop.time()
        left_s = self._fed_at + self._every_s - now
        if left_s > 0.001:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        self._fed_at = now
        self._timer = self._loop.call_later(self._every_s, self._look)
        self._beat()
