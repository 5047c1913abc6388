"""Puts the HTTP service together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from proxy.fleet.fleet import Fleet
from proxy.pool.memory_report import MemoryReport
from proxy.server.admin.routes import attach, attach_requests
from proxy.server.admin.status import Admin
from proxy.server.aiohttp_server import AiohttpServer
from proxy.server.auth.authorization import Auth
from proxy.server.auth.cors import Cors
from proxy.server.forward import tracing
from proxy.server.forward.affinity import ResponseIds
from proxy.server.forward.hops import Hops
from proxy.server.forward.model_resolver import Addressing
from proxy.server.forward.routes import ROUTES
from proxy.server.forward.scanner import Scanner
from proxy.server.forward.websocket import Realtime
from proxy.server.own_routes import OwnRoutes
from proxy.server.safe_logging import silence_aiohttp
from proxy.server.service import Service

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.config.settings import Settings
    from proxy.pool.pool import Pool
    from proxy.telemetry.metrics import Metrics


def build(
    pool: Pool,
    settings: Settings,
    metrics: Metrics,
    auth: Auth | None = None,
    *,
    fleet: Fleet | None = None,
    usage_folder: Path | None = None,
) -> Service:
    """The service; the pool is opened and closed by whoever runs it.

    `auth` decides who may do what; one is made from the settings where none is given, as is `fleet`. What keys use is
    kept in `usage_folder`, of warmpool's own, if there is one. Raises
    ConfigError then, and HostError where a part that the settings ask for is not installed.
    """
    silence_aiohttp()
    if fleet is None and settings.fleet.host is not None:
        fleet = Fleet(settings.fleet, pool, metrics)
    traces = tracing.start(settings.tracing)
    response_ids = ResponseIds()
    scanner = Scanner()
    elsewhere = fleet.name_of if fleet is not None else lambda _: None
    addressing = Addressing(lambda: pool.settings, response_ids.made_by, scanner, elsewhere)
    realtime = Realtime(pool, metrics, addressing, fleet)
    auth = auth or Auth(settings, metrics)
    if fleet is not None and auth.keys is not None:
        fleet.share_limits(auth)
    admin = Admin(pool, metrics, MemoryReport(settings.pool), auth.chat_refusal)
    application = web.Application(client_max_size=settings.server.body_limit)
    for route in ROUTES:
        if route.websocket:
            application.router.add_route(route.method, route.path, realtime.relay)
    application.router.add_get("/metrics", admin.metrics)
    attach(application, pool, admin, fleet)
    service = Service(
        pool,
        settings,
        metrics,
        auth=auth,
        own_routes=OwnRoutes(pool, fleet),
        addressing=addressing,
        scanner=scanner,
        response_ids=response_ids,
        aiohttp=AiohttpServer(application, settings, metrics),
        cors=Cors(settings.server.cors) if settings.server.cors.origins else None,
        traces=traces,
        fleet=fleet,
        hops=Hops(fleet) if fleet is not None else None,
        usage_folder=usage_folder,
    )
    service.auth.keep_budgets(service.usage)
    attach_requests(application, service.history, service.usage, service.auth)
    return service
