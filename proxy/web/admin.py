"""What the proxy says of itself: alive, ready, metrics, status."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from aiohttp import web

if TYPE_CHECKING:
    from proxy.metrics import Metrics
    from proxy.pool import Pool


class Admin:
    """`/health`, `/ready`, `/metrics` and `/admin/status`."""

    def __init__(self, pool: Pool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics

    async def health(self, _: web.Request) -> web.StreamResponse:
        """200 as long as the event loop turns."""
        return web.json_response({"status": "ok"})

    async def ready(self, _: web.Request) -> web.StreamResponse:
        """200 when requests are admitted, 503 while starting and draining."""
        ready = self._pool.ready
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def metrics(self, _: web.Request) -> web.StreamResponse:
        """Prometheus' text format."""
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": self._metrics.content_type})

    async def status(self, _: web.Request) -> web.StreamResponse:
        """Models, instances, leases, queues, the last wakes; the fields are in docs/api.md."""
        return web.Response(body=orjson.dumps(self._pool.status()), content_type="application/json")
