"""The requests in flight, and what happens to their connections once the server is stopping."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Traffic:
    """Counts requests, those that aiohttp's server never sees too."""

    def __init__(self) -> None:
        self._open = 0
        self.stopping = False
        """An answer is the last one of its connection."""
        self._quiet, self._busy = asyncio.Event(), asyncio.Event()

    def attach(self, application: web.Application) -> None:
        """Count the requests of an application that is not started yet."""
        application.middlewares.insert(0, self._count)
        application.on_response_prepare.append(self._close_when_stopping)

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

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.enter()
        try:
            return await handler(request)
        finally:
            self.leave()

    async def _close_when_stopping(self, _: web.Request, response: web.StreamResponse) -> None:
        if self.stopping:
            response.force_close()
            response.headers["Connection"] = "close"

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
