"""An event loop in which waiting takes no time: its clock jumps to the next timer when nothing else is to be done."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selectors import SelectorKey


class StuckError(Exception):
    """No task can go on, and no timer will ever fire."""


class _Selector(selectors.SelectSelector):
    """Moves the clock on instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise StuckError
            self.now += max(0.0, timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`errors`: what callbacks and tasks raised that nobody has looked at."""

    def __init__(self) -> None:
        self._waits = _Selector()
        super().__init__(self._waits)
        self.errors: list[str] = []
        self.set_exception_handler(lambda _, context: self.errors.append(f"{context}"))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._waits.now
