"""aiohttp's server behind the connections: for operators' requests and WebSockets, which are checked before.

It gets each request whole and plain (one length, no coding, `Connection: close`), as the last of its connection.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from aiohttp import web

from proxy.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    MethodNotAllowedError,
    RequestError,
    RouteNotFoundError,
)
from proxy.server import request_id
from proxy.server.auth.authorization import Kind
from proxy.server.auth.caller import CALLER
from proxy.server.auth.peer_caller import FROM_PEER
from proxy.server.forward.routes import spelled_as
from proxy.server.safe_logging import method_of, stack_of
from proxy.telemetry.metrics import UNKNOWN_MODEL

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from proxy.config.settings import Settings
    from proxy.server.forward.cycle import RequestCycle
    from proxy.telemetry.metrics import Metrics

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("warmpool")

_SHUTDOWN_S: Final = 1.0
"""How long what is served here may go on when it is closed."""
_SAID_ANEW: Final = frozenset(
    b"content-length transfer-encoding content-encoding expect x-request-id keep-alive".split()
)


class AiohttpServer:
    """An application, and the protocols that serve it."""

    def __init__(self, application: web.Application, settings: Settings, metrics: Metrics) -> None:
        """`application` has its routes, and no middlewares yet."""
        limits = settings.server.limits
        self.application = application
        self._metrics = metrics
        self.cycles: dict[asyncio.BaseTransport, RequestCycle] = {}
        """The request of each connection that is served here."""
        application.middlewares.append(self._errors)
        application.on_response_prepare.append(self._mark)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            auto_decompress=False,
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_S,
            # A little more than what was let in, since fields are added.
            max_line_size=limits.url + 256,
            max_field_size=limits.header + 256,
            max_headers=limits.headers + 8,
        )

    async def open(self) -> None:
        """Start the application."""
        await self._runner.setup()

    async def close(self) -> None:
        """End it, and what it serves."""
        await self._runner.cleanup()

    def protocol(self) -> asyncio.Protocol:
        """What serves another connection."""
        server = self._runner.server
        assert server is not None  # noqa: S101 - it is open
        return server()

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        cycle = self.cycles.get(request.transport) if request.transport is not None else None
        if cycle is not None and cycle.caller is not None:
            request[CALLER] = cycle.caller
        if cycle is not None:
            request[FROM_PEER] = cycle.connection.peers is not None
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else "(unknown path)"
        try:
            if not spelled_as(resource, request.raw_path):
                raise RouteNotFoundError(f"There is no route {request.method} {request.raw_path}.")
            return await handler(request)
        except RequestError as error:
            answer = error
        except web.HTTPRequestEntityTooLarge:
            answer = BodyTooLargeError("The body is too large.")
        except web.HTTPNotFound:
            answer = RouteNotFoundError(f"There is no route {request.method} {request.path}.")
        except web.HTTPMethodNotAllowed as error:
            answer = MethodNotAllowedError(request.path, error.allowed_methods)
        except web.HTTPException as error:
            answer = InvalidRequestError(error.reason)
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets an answer
            log.error("%s %s failed (%s): %s", method_of(request.method), path, request_id.of(request), stack_of(error))
            answer = RequestError("Internal error; the server's log says more.")
        self._metrics.count_request(UNKNOWN_MODEL, answer.status)
        operator = cycle is None or cycle.head.kind is not Kind.CLIENT
        return web.Response(
            body=answer.body(for_operator=operator),
            status=answer.status,
            headers=answer.headers(),
            content_type="application/json",
        )

    async def _mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """What every answer has."""
        response.headers["Server"] = "warmpool"
        response.headers[request_id.HEADER] = request_id.of(request)
        if response.status != 101:
            response.force_close()
            response.headers["Connection"] = "close"


def as_one_request(cycle: RequestCycle, body: bytes) -> bytes:
    """A request as aiohttp's server gets it."""
    head = cycle.head
    upgrades = head.kind is Kind.CLIENT
    left_out = _SAID_ANEW if upgrades else _SAID_ANEW | {b"connection", b"upgrade"}
    fields = [field for field in head.fields if field[0].lower() not in left_out]
    fields.append((b"X-Request-Id", cycle.request_id.encode("ascii")))
    if body or head.method not in ("GET", "HEAD"):
        fields.append((b"Content-Length", b"%d" % len(body)))
    if not upgrades:
        fields.append((b"Connection", b"close"))
    line = f"{head.method} {head.target} HTTP/1.{int(head.http11)}\r\n".encode("ascii")
    return b"".join((line, *[b"%b: %b\r\n" % field for field in fields], b"\r\n", body))
