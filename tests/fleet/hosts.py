"""Whole hosts of a fleet in the test's own process; their engines say which of them they belong to."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self, cast

import aiohttp
import orjson

from proxy.config.settings import Settings
from proxy.engine.connection import Upstream
from proxy.fleet.fleet import Fleet
from proxy.pool.pool import Pool
from proxy.server import app, listeners
from proxy.server.tls import Tls
from proxy.telemetry.metrics import Metrics
from tests.fakes import FakeEngine, FakeRuntime
from tests.fleet import certificates
from tests.fleet.memory_bus import Exchange, MemoryBus
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient
    from proxy.runtime.base import EngineProcess

MODEL: dict[str, Any] = {
    "process": {"command": ["true", "{port}"]},
    "warmup": {"requests": 0},
    "canary": "never",
    "idle": {"sleeping": "never", "suspended": "never", "checkpointed": "never"},
}


class Host:
    """One of them. `events` of a stream are held back until `go_on` is set."""

    def __init__(self, hosts: Hosts, name: str, models: dict[str, Any], **server: Any) -> None:
        certificate, key = certificates.certificate(hosts.folder, name)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.name = name
        self.settings = Settings(
            server={"port": 0, **server},
            models={key: {**MODEL, **model} for key, model in models.items()},
            fleet={
                "host": name, "url": f"https://127.0.0.1:{port}", "listen": "127.0.0.1", "certificate": certificate,
                "key": key, "ca": hosts.folder / "ca.pem", "nats": {"servers": ["nats://127.0.0.1:1"]},
            },
        )  # fmt: skip
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.left = 0
        """Connections to the engine that ended within an answer."""
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.breaks = False
        """The engine ends the connection instead of answering."""
        self.metrics = Metrics()
        self.runtime = FakeRuntime()
        self.pool = Pool(self.settings, {"process": self.runtime}, self.metrics, connect=self._connect)
        self.bus = MemoryBus(hosts.exchange)
        self.fleet = Fleet(self.settings.fleet, self.pool, self.metrics, bus=self.bus)
        self.service = app.build(self.pool, self.settings, self.metrics, fleet=self.fleet)
        self._writers: set[asyncio.StreamWriter] = set()

    def _connect(self, process: EngineProcess, _: str, __: ModelSettings) -> EngineClient:
        engine = _Engine(self.runtime, process)
        engine.upstream = Upstream(f"http://127.0.0.1:{self._engine_port}", None)
        return cast("EngineClient", engine)

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self._engine_port = self._server.sockets[0].getsockname()[1]
        await self.service.open()
        sites = [
            listeners.site(self.service, sock, self.settings.server, None)
            for sock in listeners.tcp_sockets(self.settings.server)
        ]
        tls = Tls(self.settings.fleet.tls)
        self.peers_site = listeners.peers_site(
            self.service, self.settings.fleet, self.settings.server.limits, tls.context
        )
        for site in [*sites, self.peers_site]:
            await site.start()
        self.url = sites[0].name
        self.session = aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(PATIENCE_S))
        await self.pool.open()

    async def close(self) -> None:
        await self.session.close()
        await self.pool.close()
        await self.service.close(2.0)
        assert self.pool.status()["leases"] == 0
        self._server.close()
        for writer in [*self._writers]:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                (length,) = [
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                ]
                body = await reader.readexactly(length)
                self.heads.append(head)
                self.bodies.append(body)
                if self.breaks:
                    break
                await self._answer(writer, body)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        asked = orjson.loads(body)
        if not asked.get("stream"):
            said = orjson.dumps({"id": f"r-{self.name}-{len(self.bodies)}", "host": self.name, "model": asked["model"]})
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(said) + said
            )
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            for n in range(int(asked.get("events", 4))):
                event = b'data: {"host": "%b", "n": %d, "pad": "%b"}\n\n' % (
                    self.name.encode(),
                    n,
                    b"x" * int(asked.get("pad", 0)),
                )
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
                if writer.is_closing():
                    raise ConnectionResetError
                await self.go_on.wait()
            writer.write(b"0\r\n\r\n")
        except ConnectionError:
            self.left += 1
            raise

    async def ask(
        self, model: str = "m", headers: dict[str, str] | None = None, **more: Any
    ) -> tuple[Any, aiohttp.ClientResponse]:
        """The answer to a request that comes in here."""
        body = {"model": model, "prompt": "Hello", **more}
        async with self.session.post("/v1/completions", json=body, headers=headers) as response:
            return await response.json(), response

    def forwarded(self, host: str, outcome: str) -> float | None:
        """How many requests went to a host, by what became of them."""
        labels = {"host": host, "outcome": outcome}
        return self.metrics.registry.get_sample_value("warmpool_forwarded_requests_total", labels)

    def offers(self, model: str, of: Host) -> list[Any] | None:
        """What is known here of another host's offer."""
        found = self.fleet.table.offers_of(of.name).get(model)
        return list(found.offer) if found is not None else None


class _Engine(FakeEngine):
    upstream: Upstream

    async def disconnect(self) -> None:
        await self.upstream.disconnect()


class Hosts:
    """A fleet; `async with` it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "authority"
        certificates.authority(self.folder)
        self.exchange = Exchange()
        self._stack = AsyncExitStack()
        self.all: list[Host] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def host(self, name: str, models: dict[str, Any] | None = None, **server: Any) -> Host:
        """Another one, which is open."""
        made = Host(self, name, {"m": {}} if models is None else models, **server)
        await made.open()
        self._stack.push_async_callback(made.close)
        self.all.append(made)
        return made

    async def acquainted(self) -> None:
        """Return when each knows what every other offers."""
        for one in self.all:
            for other in self.all:
                if one is not other:
                    await until(lambda one=one, other=other: _knows(one, other))  # type: ignore[misc]


def _knows(one: Host, other: Host) -> bool:
    if other.name not in one.fleet.table.hosts:
        return False
    return all(one.offers(other.settings.served_name(key), other) is not None for key in other.settings.models)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.01)
