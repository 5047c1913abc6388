"""A proxy in front of an engine that sends exactly the bytes a test gives it, whatever they are."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

import orjson

from proxy.config.settings import Settings
from proxy.engine.connection import Upstream
from proxy.engine.http1 import ProtocolError
from proxy.pool.pool import Pool
from proxy.server import app, listeners
from proxy.telemetry.metrics import Metrics
from tests.fakes import FakeEngine, FakeRuntime
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient
    from proxy.runtime.base import EngineProcess

    Step = bytes | Callable[["Peer"], Awaitable[None]]

QUESTION = orjson.dumps({"model": "demo", "prompt": "Hello", "max_tokens": 8})
GOOD = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{"text":"hi"}'


def post(body: bytes = QUESTION, *fields: str, version: str = "1.1", path: str = "/v1/completions") -> bytes:
    """A request as a client sends it."""
    lines = [f"POST {path} HTTP/{version}", "Host: proxy", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass
class Peer:
    """One connection from the proxy, as the engine has it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Head and body of each request that came."""

    async def send(self, data: bytes) -> None:
        """Give it to the kernel; returns when the buffer is below its limit."""
        self.writer.write(data)
        await self.writer.drain()

    async def close(self) -> None:
        """End in order."""
        self.writer.close()

    async def reset(self) -> None:
        """End with a reset."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def request(self) -> tuple[bytes, bytes] | None:
        """The next request, or None at the end."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await self.reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self.requests.append((head, body))
        return head, body


class Scripted:
    """The proxy and its engine. `script` is what the engine does with each request once it has read it.

    `unread_script`, if set, is done instead as soon as a connection is there.
    """

    def __init__(self, *, silence_s: float | None = None, server: dict[str, Any] | None = None, **model: Any) -> None:
        self.settings = Settings(
            server={"port": 0, "hosts": ["a", "b", "proxy"], **(server or {})},
            models={
                "demo": {
                    "process": {"command": ["true", "{port}"]},
                    "warmup": {"requests": 0},
                    "canary": "never",
                    "idle": {"sleeping": "never", "suspended": "never", "checkpointed": "never"},
                    **model,
                }
            },
        )
        self.silence_s = silence_s
        self.script: Sequence[Step] = [GOOD]
        self.unread_script: Sequence[Step] | None = None
        self.peers: list[Peer] = []
        self.received = b""
        self.metrics = Metrics()
        self.upstreams: list[Upstream] = []
        self.runtime = FakeRuntime()
        self.pool = Pool(self.settings, {"process": self.runtime}, self.metrics, connect=self._connect)
        self.service = app.build(self.pool, self.settings, self.metrics)

    def _connect(self, process: EngineProcess, _: str, __: ModelSettings) -> EngineClient:
        engine = _Engine(self.runtime, process)
        engine.upstream = Upstream(f"http://127.0.0.1:{self.engine_port}", self.silence_s)
        self.upstreams.append(engine.upstream)
        return cast("EngineClient", engine)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.engine_port = self._server.sockets[0].getsockname()[1]
        await self.service.open()
        sites = [
            listeners.site(self.service, sock, self.settings.server, None)
            for sock in listeners.tcp_sockets(self.settings.server)
        ]
        for site in sites:
            await site.start()
        self.port = int(sites[0].name.rpartition(":")[2])
        await self.pool.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()
        await self.service.close(2.0)
        assert self.pool.status()["leases"] == 0
        assert [u.connections for u in self.upstreams] == [0] * len(self.upstreams)
        self._server.close()
        for peer in self.peers:
            peer.writer.close()

    @property
    def upstream(self) -> Upstream:
        """The connections to the engine that runs."""
        return self.upstreams[-1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = Peer(reader, writer)
        self.peers.append(peer)
        try:
            while self.unread_script is not None or await peer.request() is not None:
                for step in self.unread_script or self.script:
                    if isinstance(step, bytes):
                        await peer.send(step)
                        await asyncio.sleep(0)
                    else:
                        await step(peer)
                if self.unread_script is not None or writer.is_closing():
                    return
        except (ConnectionError, asyncio.CancelledError):
            pass  # the proxy left, or the test is over

    async def connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One to the proxy."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)

    async def ask(self, request: bytes, *script: Step) -> bytes:
        """All bytes of the answer to a request on a connection of its own, which the proxy closes after it.

        Raises ConnectionResetError where the proxy resets.
        """
        if script:
            self.script = script
        reader, writer = await self.connection()
        self.received = b""
        try:
            writer.write(request)
            async with asyncio.timeout(PATIENCE_S):
                while data := await reader.read(1 << 16):
                    self.received += data
            return self.received
        finally:
            writer.close()

    async def arrived(self, _: Peer) -> None:
        """A step: wait until the one who asked has got something."""
        while not self.received:
            await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """Return when no request is under way in the proxy."""
        async with asyncio.timeout(PATIENCE_S):
            while self.pool.status()["leases"]:
                await asyncio.sleep(0.005)


class _Engine(FakeEngine):
    upstream: Upstream

    async def disconnect(self) -> None:
        await self.upstream.disconnect()


def answer_of(raw: bytes) -> tuple[int, dict[str, str], bytes, list[tuple[str, str]]]:
    """Status, header fields (names in lower case), body and trailers of one whole answer.

    An own small reader, so that what the proxy wrote is not judged by what it reads with. Raises ProtocolError.
    """
    head, separator, rest = raw.partition(b"\r\n\r\n")
    if not separator:
        raise ProtocolError("no head")
    first, *lines = head.decode("latin-1").split("\r\n")
    fields: dict[str, str] = {}
    for line in lines:
        name, value = line.split(": ", 1)
        assert name.lower() not in fields, f"{name} twice"
        fields[name.lower()] = value
    status = int(first.split(" ")[1])
    trailers: list[tuple[str, str]] = []
    if fields.get("transfer-encoding") == "chunked":
        body = b""
        while True:
            size_line, separator, rest = rest.partition(b"\r\n")
            if not separator:
                raise ProtocolError("the body ends before its end")
            size = int(size_line, 16)
            if size == 0:
                break
            if len(rest) < size + 2:
                raise ProtocolError("the body ends within a chunk")
            assert rest[size : size + 2] == b"\r\n"
            body, rest = body + rest[:size], rest[size + 2 :]
        *trailer_lines, last = rest.split(b"\r\n")[:-1]
        assert (last, rest[-2:]) == (b"", b"\r\n"), "something after the end"
        for trailer in trailer_lines:
            name, value = trailer.decode("latin-1").split(": ", 1)
            trailers.append((name, value))
    else:
        body = rest
        if "content-length" in fields and len(body) < int(fields["content-length"]) and status not in {204, 304}:
            raise ProtocolError("the body ends before its length")
    return status, fields, body, trailers
