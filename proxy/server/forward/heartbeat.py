"""Comments for a client that waits for a stream: lines that begin with a colon (HTML standard, server-sent events)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, Self

from proxy.engine import http1
from proxy.server.forward.response import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from aiohttp import web

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
        self._answer: Answer | None = None
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

    async def stop(self) -> Answer | None:
        """Send no more, and return what was begun: the rest of the answer belongs into it. None: nothing was sent."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.shield(self._task)
        return self._answer

    async def _beat(self, every_s: float) -> None:
        with contextlib.suppress(ConnectionError):  # the client left, which cancels its handler too
            while not await self._stopped_within(every_s):
                if self._answer is None:
                    answer = Answer(self._request)
                    answer.headers.update({**HEADERS, **self._headers()})
                    await answer.begin(200, b"OK", [], http1.CHUNKED)
                    self._answer = answer
                await self._answer.send(COMMENT)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False
