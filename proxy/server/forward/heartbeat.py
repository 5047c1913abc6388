"""Comments for a client that waits for a stream: lines that begin with a colon (HTML standard, server-sent events).

A comment ends with one newline: an empty line behind it would be an event to clients that do not go by the standard.
"""

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

    from proxy.engine.connection import Exchange

COMMENT: Final = b": waiting for the model\n"
HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the comments back
}
_EVENT_ENDS: Final = (b"\n\n", b"\n\r\n")
"""Not two CRs: a LF that follows the second belongs to it."""


class Heartbeat:
    """While it is entered, a client that is sent nothing for `every_s` (None: as long as it likes) is sent a comment.

    Until `stop` the headers go out with the first comment; `headers` gives those to add. `go_on` has the silences of
    the engine's stream filled, between its events; the stream's bytes are then fed to this, as to a reader of them.
    """

    def __init__(self, request: web.Request, every_s: float | None, headers: Callable[[], Mapping[str, str]]) -> None:
        self._request = request
        self._every_s = every_s
        self._headers = headers
        self._stopping = asyncio.Event()
        self._answer: Answer | None = None
        self._task: asyncio.Task[None] | None = None
        self._now = asyncio.get_running_loop().time
        self._fed_at = 0.0
        self._tail = b"\n\n"
        """The last bytes that were fed; before the first an event may begin."""

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

    def go_on(self, answer: Answer, upstream: Exchange) -> None:
        """Fill the silences of a stream that has begun; after `stop`."""
        if self._every_s is not None:
            self._task = asyncio.create_task(self._fill(self._every_s, answer, upstream), name="heartbeat")

    def feed(self, data: bytes) -> None:
        """Bytes of the stream, without the framing of the transfer."""
        self._fed_at = self._now()
        self._tail = data[-3:] if len(data) > 2 else (self._tail + data)[-3:]

    async def _beat(self, every_s: float) -> None:
        with contextlib.suppress(ConnectionError):  # the client left, which cancels its handler too
            while not await self._stopped_within(every_s):
                if self._answer is None:
                    answer = Answer(self._request)
                    answer.headers.update({**HEADERS, **self._headers()})
                    await answer.begin(200, b"OK", [], http1.CHUNKED)
                    self._answer = answer
                await self._answer.send(COMMENT)

    async def _fill(self, every_s: float, answer: Answer, upstream: Exchange) -> None:
        self._fed_at = self._now()
        while True:
            if (left_s := self._fed_at + every_s - self._now()) > 0:
                await asyncio.sleep(left_s)
                continue
            if upstream.between_chunks and self._tail.endswith(_EVENT_ENDS):
                answer.comment(COMMENT)
            self._fed_at = self._now()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False
