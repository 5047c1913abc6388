"""What the proxy says of itself: metrics, status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from proxy import __version__
from proxy.server.admin import pieces

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from proxy.pool.memory_report import MemoryReport
    from proxy.pool.pool import Pool
    from proxy.telemetry.metrics import Metrics


class Admin:
    """`/metrics` and `/admin/status`."""

    def __init__(
        self, pool: Pool, metrics: Metrics, memory: MemoryReport, chat_refusal: Callable[[], str | None]
    ) -> None:
        self._pool = pool
        self._chat_refusal = chat_refusal
        self._metrics = metrics
        self._memory = memory

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Prometheus' text format, with what engines that are awake say of themselves."""
        await self._pool.scrape_engines()
        size, free = await self._memory.checkpoint_space()
        self._metrics.checkpoint_dir_size.set(size)
        self._metrics.checkpoint_dir_free.set(free)
        return await pieces.answer(request, await self._metrics.scrape(), {"Content-Type": self._metrics.content_type})

    async def status(self, request: web.Request) -> web.StreamResponse:
        """Models, instances, leases, queues, the last wakes, memory; the fields are in docs/api.md."""
        body = orjson.dumps(await self.read_status())
        return await pieces.answer(request, body, {"Content-Type": "application/json"})

    async def read_status(self) -> dict[str, Any]:
        """What `/admin/status` answers."""
        memory = await self._memory.read()
        if (host := self._pool.host_memory) is not None:
            memory["host"] = {"total_bytes": host.total_bytes, "available_bytes": host.available_bytes}
        return {
            "version": __version__,
            "chat_refusal": self._chat_refusal(),
            "log_dir": str(self._pool.settings.pool.state_dir.absolute() / "logs"),
            **await self._pool.status_in_turns(),
            "ttft": await self._metrics.ttft_summary(),
            "memory": memory,
        }
