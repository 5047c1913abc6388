"""What all connections of a server share, and their end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from proxy.server.connection import ClientConnection
from proxy.server.connection_limits import ConnectionLimits
from proxy.server.forward.answer import AnswerHeads
from proxy.server.http_request import RequestHeads
from proxy.server.inflight import Traffic
from proxy.server.key_usage.files import UsageFiles
from proxy.server.key_usage.recorder import KeyUsage
from proxy.server.request_history import RequestHistory
from proxy.telemetry.loop_stalls import LoopStalls

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    from proxy.config.settings import Settings
    from proxy.fleet.fleet import Fleet
    from proxy.pool.pool import Pool
    from proxy.server.aiohttp_server import AiohttpServer
    from proxy.server.auth.authorization import Auth
    from proxy.server.auth.cors import Cors
    from proxy.server.forward.affinity import ResponseIds
    from proxy.server.forward.hops import Hops
    from proxy.server.forward.model_resolver import Addressing
    from proxy.server.forward.scanner import Scanner
    from proxy.server.forward.tracing import Tracing
    from proxy.server.listeners import Site
    from proxy.server.own_routes import OwnRoutes
    from proxy.telemetry.metrics import Metrics


class Service:
    """The HTTP service: `connection` makes what serves a connection that was accepted."""

    def __init__(
        self,
        pool: Pool,
        settings: Settings,
        metrics: Metrics,
        *,
        auth: Auth,
        own_routes: OwnRoutes,
        addressing: Addressing,
        scanner: Scanner,
        response_ids: ResponseIds,
        aiohttp: AiohttpServer,
        cors: Cors | None,
        traces: Tracing | None,
        fleet: Fleet | None = None,
        hops: Hops | None = None,
        usage_folder: Path | None = None,
    ) -> None:
        self.pool = pool
        self.metrics = metrics
        self.auth = auth
        self.own_routes = own_routes
        self.addressing = addressing
        self.response_ids = response_ids
        self.aiohttp = aiohttp
        self.cors = cors
        self.traces = traces
        self.fleet = fleet
        """The other hosts; None where this one stands alone."""
        self.hops = hops
        """Leases in all of them; likewise."""
        self.request_heads = RequestHeads(settings.server.limits)
        self.answer_heads = AnswerHeads()
        self.limits = ConnectionLimits(settings.server.limits)
        self.traffic = Traffic()
        self.connections: set[ClientConnection] = set()
        self.history = RequestHistory(self.connections, metrics)
        files = UsageFiles(usage_folder) if usage_folder is not None else None
        self.usage = KeyUsage(metrics, self.history.uncounted, pool.take_gpu_time, files, settings.server.usage_days)
        self._none_left = asyncio.Event()
        self.sites: list[Site] = []
        """Where connections are accepted."""
        self._scanner = scanner
        self._stalls = LoopStalls(metrics.loop_stalls.observe)
        self._tasks: set[asyncio.Task[None]] = set()
        self._engine_connections = sum(m.max_instances * m.max_concurrency for m in settings.models.values())

    def connection(self) -> ClientConnection:
        """What serves a connection that was accepted."""
        return ClientConnection(self)

    def peer_connection(self) -> ClientConnection:
        """The same for one of another host's."""
        return ClientConnection(self, from_peer=True)

    def came(self, connection: ClientConnection) -> None:
        """It is open."""
        self.connections.add(connection)
        self._none_left.clear()

    def went(self, connection: ClientConnection) -> None:
        """It is closed."""
        self.connections.discard(connection)
        if not self.connections:
            self._none_left.set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Do something that has to wait; at most until the service is closed."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def open(self) -> None:
        """Make everything ready for connections."""
        self.limits.fit_to_host(self._engine_connections)
        await self.aiohttp.open()
        await self.usage.open()
        self._stalls.start()
        if self.fleet is not None:
            self.fleet.open()

    async def close(self, limit_s: float) -> None:
        """Accept no more, and end every connection; what was written goes out within `limit_s`."""
        for site in self.sites:
            site.stop()
        if self.fleet is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s / 2):
                    await self.fleet.close()
        try:
            async with asyncio.timeout(limit_s):
                for connection in [*self.connections]:
                    connection.end()
                await self.aiohttp.close()
                if self.fleet is not None:
                    await self.fleet.close_peers()
                if self.connections:
                    await self._none_left.wait()
        except TimeoutError:
            for connection in [*self.connections]:
                connection.abort()
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.usage.close()
        self.limits.close()
        self._stalls.stop()
        self._scanner.close()
        self.auth.refusals.sum_up()
        if self.traces is not None:
            await self.traces.close()
