"""The requests in flight, and what happens to their connections once the server is stopping."""

from __future__ import annotations

import asyncio


class Traffic:
    """Counts requests."""

    def __init__(self) -> None:
        self._open = 0
        self.stopping = False
        """An answer is the last one of its connection."""
        self._quiet, self._busy = asyncio.Event(), asyncio.Event()

    def enter(self) -> None:
        """A request began."""
        self._open += 1
        if self.stopping:
            self._note()

    def leave(self) -> None:
        """One has ended."""
        self._open -= 1
        if self.stopping:
            self._note()

    def _note(self) -> None:
        now, before = (self._busy, self._quiet) if self._open else (self._quiet, self._busy)
        now.set()
        before.clear()

    def stop(self) -> None:
        """From now on an answer is the last one of its connection."""
        self.stopping = True
        self._note()

    async def ended(self, linger_s: float) -> None:
        """Return when no request has been in flight for a while; after `stop`."""
        while True:
            await self._quiet.wait()
            try:
                async with asyncio.timeout(linger_s):
                    await self._busy.wait()
            except TimeoutError:
                return
