"""Comments for a client that waits for a stream: lines that begin with a colon (HTML standard, server-sent events)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, Self

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

COMMENT: Final = b": waiting for the model\n\n"
HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the comments back
}


class Heartbeat:
    """While it is entered and not stopped, the client is sent a comment every `every_s` (None: nothing).

    The headers go out with the first comment; `headers` gives those to add.
    """

    def __init__(self, request: web.Request, every_s: float | None, headers: Callable[[], Mapping[str, str]]) -> None:
        self._request = request
        self._every_s = every_s
        self._headers = headers
        self._stopping = asyncio.Event()
        self._response: web.StreamResponse | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._every_s is not None:
            self._task = asyncio.create_task(self._beat(self._every_s), name="heartbeat")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def stop(self) -> web.StreamResponse | None:
        """Send no more, and return what was begun: the rest of the answer belongs into it. None: nothing was sent."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.shield(self._task)
        return self._response

    async def _beat(self, every_s: float) -> None:
        with contextlib.suppress(ConnectionError):  # the client left, which cancels its handler too
            while not await self._stopped_within(every_s):
                if self._response is None:
                    response = web.StreamResponse(headers={**HEADERS, **self._headers()})
                    await response.prepare(self._request)
                    self._response = response
                await self._response.write(COMMENT)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False
