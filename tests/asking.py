"""Requests straight to an engine, on warmpool's own connections to it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from proxy.engine.connection import ExchangeError

if TYPE_CHECKING:
    from proxy.engine.connection import Upstream


class Answer:
    """What comes of one; a `proxy.engine.connection.Receiver`."""

    def __init__(self) -> None:
        self.data = b""
        self.came = asyncio.Event()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def received(self, data: bytes) -> None:
        self.data += data
        self.came.set()

    def lost(self, error: Exception | None) -> None:
        self.failed(ExchangeError(f"the connection ended: {error}"))

    def failed(self, error: ExchangeError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


async def ask(upstream: Upstream, method: str, target: str, body: bytes = b"") -> Answer:
    """Send a request. Raises ExchangeError."""
    connection = upstream.kept() or await upstream.connect()
    answer = Answer()
    line = f"{method} {target} HTTP/1.1\r\n".encode()
    connection.begin(answer, line + upstream.own_fields + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return answer
