"""A whole proxy in the test's own process, with real engines behind it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from proxy.checkpoint.store import CheckpointStore
from proxy.config.settings import Settings
from proxy.host import facts
from proxy.pool.pool import Pool
from proxy.runtime.state_dir import Claim
from proxy.server import app, listeners
from proxy.server.auth.authorization import Auth
from proxy.server.tls import Tls
from proxy.telemetry.metrics import Metrics
from tests.forked import ForkingRuntime
from tests.support import ENGINE_PORTS, PATIENCE_S, engine_model, get_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path


class Front:
    """A proxy on a port, with a session to talk to it."""

    def __init__(
        self,
        folder: Path,
        models: dict[str, Any],
        *,
        tracing: dict[str, Any] | None = None,
        pool: dict[str, Any] | None = None,
        **server: Any,
    ) -> None:
        settings = Settings(
            tracing=tracing or {},
            models=models,
            server={"port": 0, "body_limit": "1MiB", "hosts": ["a", "proxy", "x"], **server},
            runtime={"process": {"ports": ENGINE_PORTS}},
            pool={"state_dir": str(folder / "state"), "checkpoint_dir": str(folder / "images"), **(pool or {})},
        )
        self.metrics = Metrics()
        runtime = ForkingRuntime(
            settings.runtime.process,
            claim=Claim(settings.pool.state_dir),
            store=CheckpointStore(settings.pool.checkpoint_dir, 0),
        )
        self.pool = Pool(settings, {"process": runtime}, self.metrics, memory=facts.memory)
        self.settings = settings
        self.auth = Auth(settings, self.metrics)
        self.tls = Tls(settings.server.tls) if settings.server.tls.certificate is not None else None
        self.service = app.build(self.pool, settings, self.metrics, self.auth)
        self.url = ""

    async def open(self) -> None:
        await self.service.open()
        server, context = self.settings.server, self.tls.context if self.tls is not None else None
        sockets = listeners.tcp_sockets(server)
        if server.admin.socket is not None:
            sockets.append(listeners.admin_socket(server.admin))
        sites = [listeners.site(self.service, sock, server, context) for sock in sockets]
        for site in sites:
            await site.start()
        self.url = sites[0].name
        self.port = int(self.url.rpartition(":")[2])
        self.session = aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(PATIENCE_S))
        await self.pool.open()

    async def close(self) -> None:
        await self.session.close()
        await self.pool.close()
        await self.service.close(2.0)

    async def post(self, path: str, body: Any, **options: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        data = io.BytesIO(body if isinstance(body, bytes) else orjson.dumps(body))
        async with self.session.post(path, data=data, **options) as response:
            return response, await response.read()

    async def engine(self) -> str:
        """The address of the engine of the first model, which must be ready."""
        handle = next(iter(self.pool._state.models["demo"].instances.values())).engine
        assert handle is not None
        return handle.base_url

    async def engine_state(self) -> Any:
        return await get_json(f"{await self.engine()}/debug/state")

    async def release(self) -> None:
        """Let streams with the fault `hold_mid_stream` go on."""
        async with self.session.post(f"{await self.engine()}/debug/release") as response:
            assert response.status == 204

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


async def fronts_of_test(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Front]]]:
    """For a fixture: makes fronts with a model `demo`; engines start when they are first needed."""
    fronts: list[Front] = []

    async def make(*options: str, server: dict[str, Any] | None = None, **entry: Any) -> Front:
        front = Front(tmp_path / str(len(fronts)), {"demo": engine_model(*options, **entry)}, **(server or {}))
        fronts.append(front)
        await front.open()
        return front

    yield make
    for front in fronts:
        await front.close()
        assert front.pool.status()["leases"] == 0
