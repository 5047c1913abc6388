"""How long the event loop lets its callbacks wait: by how much a timer is late.

One piece of work that takes long delays every stream. It is seen less the time until the timer would have been due.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_EVERY_S: Final = 0.05


class LoopStalls:
    """From `start` to `stop`, `observe` is called with the seconds that a timer was late, twenty times a second."""

    def __init__(self, observe: Callable[[float], object]) -> None:
        self._observe = observe
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running event loop."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(loop.time() + _EVERY_S, self._due, loop, loop.time() + _EVERY_S)

    def stop(self) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        self._observe(max(0.0, now - due))
        self._timer = loop.call_at(now + _EVERY_S, self._due, loop, now + _EVERY_S)
