"""Routes, and the middleware that turns errors into envelopes."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from proxy.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    MethodNotAllowedError,
    RequestError,
    RouteNotFoundError,
    SlowUploadError,
)
from proxy.pool.memory_report import MemoryReport
from proxy.server.admin.routes import attach
from proxy.server.admin.status import Admin
from proxy.server.auth.cors import Cors
from proxy.server.auth.middleware import ADMIN, PASSED, Auth
from proxy.server.connection_limits import CONNECTION, REFUSALS
from proxy.server.forward import tracing
from proxy.server.forward.affinity import ResponseIds
from proxy.server.forward.model_resolver import Addressing
from proxy.server.forward.relay import Relay
from proxy.server.forward.routes import ROUTES, pattern, speaks_anthropic
from proxy.server.forward.scanner import Scanner
from proxy.server.forward.websocket import Realtime
from proxy.server.front import Front
from proxy.server.inflight import Traffic
from proxy.server.models import Local
from proxy.server.request_body import waits_with_body
from proxy.server.request_id import name_request, request_id
from proxy.server.safe_logging import method_of, path_of, silence_aiohttp, stack_of
from proxy.telemetry.loop_stalls import LoopStalls
from proxy.telemetry.metrics import UNKNOWN_MODEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from proxy.config.settings import Settings
    from proxy.pool.pool import Pool
    from proxy.telemetry.metrics import Metrics

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("warmpool")

TRAFFIC: web.AppKey[Traffic] = web.AppKey("traffic", Traffic)
"""The requests in flight."""


def build(pool: Pool, settings: Settings, metrics: Metrics, auth: Auth | None = None) -> web.Application:
    """The application; the pool is opened and closed by whoever runs it.

    `auth` decides who may do what; one is made from the settings where none is given. Raises ConfigError then,
    and HostError where a part that the settings ask for is not installed.
    """
    auth = auth or Auth(settings, metrics)

    @web.middleware
    async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            answer = error
        except web.HTTPRequestEntityTooLarge:
            answer = BodyTooLargeError(f"The body is over the limit of {settings.server.body_limit} bytes.")
        except web.HTTPNotFound:
            answer = RouteNotFoundError(f"There is no route {request.method} {request.path}.")
        except web.HTTPMethodNotAllowed as error:
            answer = MethodNotAllowedError(request.path, error.allowed_methods)
        except web.HTTPException as error:
            answer = InvalidRequestError(error.reason)
        except web.RequestPayloadError:
            answer = InvalidRequestError("The body is not what its Content-Encoding or Transfer-Encoding says.")
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets an answer
            log.error(
                "%s %s failed (%s): %s", method_of(request), path_of(request), request_id(request), stack_of(error)
            )
            answer = RequestError("Internal error; the server's log says more.")
        if request.match_info.handler != relay.forward or PASSED not in request:
            metrics.requests.labels(UNKNOWN_MODEL, str(answer.status)).inc()
        operator = ADMIN.match(path_of(request)) is not None
        response = web.Response(
            body=answer.body(for_operator=operator, anthropic=speaks_anthropic(request.path)),
            status=answer.status,
            headers=answer.headers(),
            content_type="application/json",
        )
        if isinstance(answer, SlowUploadError) or waits_with_body(request):
            response.force_close()
        return response

    traces = tracing.start(settings.tracing)
    response_ids = ResponseIds()
    scanner = Scanner()
    addressing = Addressing(lambda: pool.settings, response_ids.made_by, scanner)
    silence_aiohttp()
    relay = Relay(pool, metrics, addressing, response_ids, traces, auth.refusals)
    realtime = Realtime(pool, metrics, addressing)
    admin = Admin(pool, metrics, MemoryReport(settings.pool))
    local = Local(pool)
    cors = Cors(settings.server.cors) if settings.server.cors.origins else None
    app = web.Application(
        middlewares=[errors, *([cors.middleware] if cors is not None else []), auth.middleware],
        client_max_size=settings.server.body_limit,
    )
    for route in ROUTES:
        app.router.add_route(route.method, pattern(route), realtime.relay if route.websocket else relay.forward)
    for path, handler in (
        ("/v1/models", local.models),
        ("/v1/models/{id:.+}", local.model),
        ("/version", local.version),
        ("/ping", local.ping),
        ("/health", admin.health),
        ("/ready", admin.ready),
        ("/metrics", admin.metrics),
    ):
        app.router.add_get(path, handler)
    attach(app, pool, admin)
    app.router.add_post("/ping", local.ping)
    if traces is not None:
        app.on_cleanup.append(traces.close)
    app.on_response_prepare.append(_name_server)
    app.on_response_prepare.append(name_request)
    if settings.server.keys_file is not None:
        app.on_response_prepare.append(auth.add_headers)
    if cors is not None:
        app.on_response_prepare.append(cors.add_headers)
    traffic = app[TRAFFIC] = Traffic()
    traffic.attach(app)
    app[REFUSALS] = auth.refusals
    app.on_cleanup.append(_sum_up)

    async def end_scanner(_: web.Application) -> None:
        scanner.close()

    app.on_cleanup.append(end_scanner)
    app.cleanup_ctx.append(partial(_watch_loop, metrics))
    off = traces is not None or cors is not None
    app[CONNECTION] = Front(pool, metrics, addressing, auth, traffic, off=off).connection
    return app


async def _watch_loop(metrics: Metrics, _: web.Application) -> AsyncIterator[None]:
    stalls = LoopStalls(metrics.loop_stalls.observe)
    stalls.start()
    yield
    stalls.stop()


async def _sum_up(application: web.Application) -> None:
    application[REFUSALS].sum_up()


async def _name_server(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "warmpool"
