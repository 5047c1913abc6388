"""One request through: address it, lease an instance, pass the bytes on both ways.

What the engine answers reaches the client byte for byte. A client that leaves cancels the handler, which closes the
connection to the engine and ends the lease. Once headers are out, a failure of the engine breaks the connection: a
truncated answer must never look complete.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from proxy.errors import RequestError, UpstreamError
from proxy.metrics import UNKNOWN_MODEL
from proxy.web import routes
from proxy.web.addressing import Addressing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from proxy.metrics import Metrics
    from proxy.pool import Lease, Pool
    from proxy.web.addressing import Address

log = logging.getLogger("warmpool.request")

# RFC 9110, 7.6.1, and what belongs to one connection or one hop by nature.
_HOP_BY_HOP: Final = frozenset(
    "connection keep-alive proxy-connection proxy-authenticate te trailer transfer-encoding upgrade".split()
)
# Credentials are for this proxy. The body was decoded while it was read, and its length may change.
_NOT_TO_ENGINE: Final = _HOP_BY_HOP | {
    "authorization", "proxy-authorization", "cookie", "x-api-key",
    "host", "content-length", "content-encoding", "expect",
}  # fmt: skip
_NOT_TO_CLIENT: Final = _HOP_BY_HOP | {"server", "date", "set-cookie"}

_ATTEMPTS: Final = 2
"""A completion has no side effects: an engine that broke before it answered is replaced once."""


class Relay:
    """Forwards requests to engines."""

    def __init__(self, pool: Pool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._addressing = Addressing(lambda: pool.settings)

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """The engine's answer to a request, on the same path. Raises RequestError as long as no header was sent."""
        began = time.perf_counter()
        exchange = _Exchange(request, began)
        try:
            match = routes.find(request.method, request.rel_url.raw_path, request.rel_url.raw_query_string)
            body = await request.read()
            address = self._addressing.find(match, request.headers.get("Content-Type", ""), body)
            exchange.model = address.model
            return await self._exchange(exchange, address)
        except RequestError as error:
            exchange.status = error.status
            raise
        finally:
            self._account(exchange)

    async def _exchange(self, exchange: _Exchange, address: Address) -> web.StreamResponse:
        for attempt in range(1, _ATTEMPTS + 1):
            async with await self._pool.lease(self._pool.served_name(exchange.model)) as lease:
                exchange.lease = exchange.lease or lease
                try:
                    upstream = await lease.client.request(
                        exchange.request.method,
                        address.target,
                        headers=_passed_on(exchange.request.headers, _NOT_TO_ENGINE),
                        body=address.body,
                    )
                except (aiohttp.ClientError, TimeoutError) as error:
                    log.warning("%s: %s before an answer: %s", lease.instance_id, type(error).__name__, error)
                    await lease.suspect()
                    if attempt < _ATTEMPTS and not isinstance(error, TimeoutError):
                        continue
                    raise UpstreamError(f"The engine of model {exchange.model!r} failed before it answered.") from error
                try:
                    return await self._answer(exchange, lease, upstream)
                finally:
                    # Released when it was read to its end, else closed, which tells the engine to stop.
                    upstream.close() if not upstream.content.is_eof() else upstream.release()
        raise AssertionError("unreachable")

    async def _answer(self, exchange: _Exchange, lease: Lease, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        """Pass status, headers and every byte on as they come."""
        headers = _passed_on(upstream.headers, _NOT_TO_CLIENT)
        headers.update(_facts(exchange, lease))
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
        await response.prepare(exchange.request)
        exchange.status = upstream.status
        try:
            async for chunk in upstream.content.iter_any():
                if exchange.first_byte_s is None:
                    exchange.first_byte_s = time.perf_counter() - exchange.began
                exchange.bytes += len(chunk)
                await response.write(chunk)
        except (aiohttp.ClientError, TimeoutError) as error:
            exchange.broken = str(error) or type(error).__name__
            _break(exchange.request)
            await lease.suspect()
            return response
        await response.write_eof()
        return response

    def _account(self, exchange: _Exchange) -> None:
        model = exchange.model or UNKNOWN_MODEL
        # nginx's 499: the client left before an answer.
        status = exchange.status or 499
        self._metrics.requests.labels(model, str(status)).inc()
        found = exchange.lease.found.label if exchange.lease is not None else None
        if found is not None and exchange.first_byte_s is not None and status < 400:
            self._metrics.ttft.labels(model, found).observe(exchange.first_byte_s)
        fields: dict[str, Any] = {
            "method": exchange.request.method,
            "path": exchange.request.path,
            "model": model,
            "status": status,
            "tier": found,
            "instance": exchange.lease.instance_id if exchange.lease is not None else None,
            "first_byte_ms": _ms(exchange.first_byte_s),
            "total_ms": _ms(time.perf_counter() - exchange.began),
            "bytes": exchange.bytes,
            "broken": exchange.broken,
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        log.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)


class _Exchange:
    """What is noted of one request for its log line and its metrics."""

    __slots__ = ("began", "broken", "bytes", "first_byte_s", "lease", "model", "request", "status")

    def __init__(self, request: web.Request, began: float) -> None:
        self.request = request
        self.began = began
        self.model = ""
        self.lease: Lease | None = None
        self.status = 0
        self.first_byte_s: float | None = None
        self.bytes = 0
        self.broken: str | None = None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def _passed_on(headers: Any, left_out: Iterable[str]) -> CIMultiDict[str]:
    """The headers without `left_out` and without those that `Connection` names."""
    named = {token.strip().lower() for value in headers.getall("Connection", ()) for token in value.split(",")}
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in left_out and name.lower() not in named
    )


def _facts(exchange: _Exchange, lease: Lease) -> dict[str, str]:
    """`x-warmpool-*` and `server-timing` (W3C Server Timing, milliseconds)."""
    timing = [f"queue;dur={lease.queue_s * 1000:.1f}"]
    if lease.wake is not None:
        timing.append(f"wake;dur={lease.wake.seconds * 1000:.1f}")
        timing += [f"{name};dur={value * 1000:.1f}" for name, value in lease.wake.stages.items()]
    first = exchange.lease or lease
    return {
        "Server": "warmpool",
        "x-warmpool-tier": first.found.label,
        "x-warmpool-instance": lease.instance_id,
        "server-timing": ", ".join(timing),
    }


def _break(request: web.Request) -> None:
    """End the connection so that the client cannot take what it has for the whole answer."""
    transport = request.transport
    if transport is None:
        return
    if request.version >= aiohttp.HttpVersion11:
        transport.close()  # what was written still goes out; the missing last chunk or bytes tell the rest
        return
    # HTTP/1.0 ends a body by closing, so only a reset is a failure; lingering for 0 s makes one (socket(7)).
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
