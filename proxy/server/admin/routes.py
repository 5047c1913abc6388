"""Everything below `/admin/`, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.server.admin.commands import CommandHandlers
from proxy.server.admin.engine_logs import EngineLogHandlers
from proxy.server.admin.events import Events
from proxy.server.admin.fleet import FleetHandlers
from proxy.server.admin.page import page, to_page
from proxy.server.admin.requests import RequestHandlers
from proxy.server.admin.usage import UsageHandlers

if TYPE_CHECKING:
    from aiohttp import web

    from proxy.fleet.fleet import Fleet
    from proxy.pool.pool import Pool
    from proxy.server.admin.status import Admin
    from proxy.server.auth.authorization import Auth
    from proxy.server.key_usage.recorder import KeyUsage
    from proxy.server.request_history import RequestHistory


def attach_requests(app: web.Application, history: RequestHistory, usage: KeyUsage, auth: Auth) -> None:
    """Add the routes to the requests of a service, which has this application, and to what was used by them."""
    app.router.add_get("/admin/usage", UsageHandlers(usage, auth).show)
    requests = RequestHandlers(history)
    app.router.add_get("/admin/requests", requests.show)
    app.router.add_post("/admin/requests/{id:.+}/cancel", requests.cancel)


def attach(app: web.Application, pool: Pool, admin: Admin, fleet: Fleet | None = None) -> None:
    """Add the routes, and what ends with the application."""
    handlers = CommandHandlers(pool)
    events = Events(admin.read_status, pool.listen, over=lambda: pool.stopping)
    app.router.add_get("/admin", to_page)
    app.router.add_get("/admin/", page)
    app.router.add_get("/admin/status", admin.status)
    app.router.add_get("/admin/events", events.stream)
    app.router.add_get("/admin/fleet", FleetHandlers(fleet).show)
    app.router.add_get("/admin/models/{model:.+}/logs", EngineLogHandlers(pool).show)
    app.router.add_post("/admin/models/{model:.+}/{command}", handlers.for_model)
    app.router.add_post("/admin/drain", handlers.drain)
    app.router.add_post("/admin/undrain", handlers.undrain)
    app.on_shutdown.extend((events.close, handlers.close))
