"""One request through: address it, lease an instance, pass the bytes on both ways.

What the engine answers reaches the client byte for byte. A client that leaves cancels the handler, which closes the
connection to the engine and ends the lease. Once headers are out, a failure of the engine breaks the connection: a
truncated answer must never look complete.
"""

from __future__ import annotations

import logging
import re
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson
from aiohttp import web
from multidict import CIMultiDict

from proxy.config import parse_duration
from proxy.errors import InvalidRequestError, RequestError, UpstreamError, sse_error
from proxy.metrics import UNKNOWN_MODEL
from proxy.web import routes
from proxy.web.addressing import Addressing
from proxy.web.heartbeat import Heartbeat
from proxy.web.request_id import HEADER as REQUEST_ID
from proxy.web.request_id import request_id
from proxy.web.response_ids import ResponseIds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from proxy.metrics import Metrics
    from proxy.pool import Lease, Pool
    from proxy.web.addressing import Address
    from proxy.web.response_ids import Reader

log = logging.getLogger("warmpool.request")

# RFC 9110, 7.6.1, and what belongs to one connection or one hop by nature.
_HOP_BY_HOP: Final = frozenset(
    "connection keep-alive proxy-connection proxy-authenticate te trailer transfer-encoding upgrade".split()
)
# Credentials are for this proxy. The body was decoded while it was read, and its length may change.
_NOT_TO_ENGINE: Final = _HOP_BY_HOP | {
    "authorization", "proxy-authorization", "cookie", "x-api-key",
    "host", "content-length", "content-encoding", "expect", "x-warmpool-max-wait",
}  # fmt: skip
_NOT_TO_CLIENT: Final = _HOP_BY_HOP | {"server", "date", "set-cookie", "x-request-id"}

_NUMBER: Final = re.compile(r"\d+(\.\d+)?")
_ERROR_BYTES: Final = 64 << 10

_ATTEMPTS: Final = 2
"""A completion has no side effects: an engine that broke before it answered is replaced once."""


class Relay:
    """Forwards requests to engines."""

    def __init__(self, pool: Pool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._response_ids = ResponseIds()
        self._addressing = Addressing(lambda: pool.settings, self._response_ids.made_by)

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """The engine's answer to a request, on the same path. Raises RequestError as long as no header was sent."""
        began = time.perf_counter()
        exchange = _Exchange(request, began)
        try:
            match = routes.find(request.method, request.rel_url.raw_path, request.rel_url.raw_query_string)
            body = await request.read()
            address = self._addressing.find(match, request.headers.get("Content-Type", ""), body)
            exchange.model = address.model
            exchange.max_wait_s = _max_wait_s(request)
            exchange.makes_response = match.route.path == "/v1/responses"
            return await self._kept_alive(exchange, address)
        except RequestError as error:
            exchange.status = error.status
            raise
        finally:
            self._account(exchange)

    async def _kept_alive(self, exchange: _Exchange, address: Address) -> web.StreamResponse:
        """The answer; to a client that waits for a stream heartbeats before it, where they are switched on."""
        every_s = self._pool.settings.server.heartbeat if address.streams else None
        async with Heartbeat(exchange.request, every_s, lambda: self._found(address.model)) as exchange.heartbeat:
            try:
                return await self._exchange(exchange, address)
            except RequestError as error:
                begun = await exchange.heartbeat.stop()
                if begun is None:
                    raise
                exchange.status = error.status
                return await _end_with(begun, error.body())

    def _found(self, model: str) -> dict[str, str]:
        return {"x-warmpool-tier": self._pool.tiers()[model].label}

    async def _exchange(self, exchange: _Exchange, address: Address) -> web.StreamResponse:
        for attempt in range(1, _ATTEMPTS + 1):
            name = self._pool.served_name(exchange.model)
            async with await self._pool.lease(
                name, max_wait_s=exchange.max_wait_s, preferred=address.instance
            ) as lease:
                exchange.lease = exchange.lease or lease
                try:
                    upstream = await lease.client.request(
                        exchange.request.method,
                        address.target,
                        headers=_to_engine(exchange.request),
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
        begun = await exchange.heartbeat.stop() if exchange.heartbeat is not None else None
        if begun is not None and not _is_stream(upstream):
            exchange.status = upstream.status
            return await _end_with(begun, await _error_of(upstream))
        response = begun
        if response is None:
            headers = _passed_on(upstream.headers, _NOT_TO_CLIENT)
            headers.update(_facts(exchange, lease))
            response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
            await response.prepare(exchange.request)
        exchange.status = upstream.status
        ids = self._id_reader(exchange, lease)
        try:
            async for chunk in upstream.content.iter_any():
                if ids is not None:
                    ids.feed(chunk)
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

    def _id_reader(self, exchange: _Exchange, lease: Lease) -> Reader | None:
        if not exchange.makes_response:
            return None
        return self._response_ids.reader(self._pool.served_name(exchange.model), lease.instance_id)

    def _account(self, exchange: _Exchange) -> None:
        model = exchange.model or UNKNOWN_MODEL
        # nginx's 499: the client left before an answer.
        status = exchange.status or 499
        self._metrics.requests.labels(model, str(status)).inc()
        found = exchange.lease.found.label if exchange.lease is not None else None
        if found is not None and exchange.first_byte_s is not None and status < 400:
            self._metrics.ttft.labels(model, found).observe(exchange.first_byte_s)
        fields: dict[str, Any] = {
            "request_id": request_id(exchange.request),
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

    __slots__ = (
        "began", "broken", "bytes", "first_byte_s", "heartbeat", "lease", "makes_response", "max_wait_s", "model",
        "request", "status",
    )  # fmt: skip

    def __init__(self, request: web.Request, began: float) -> None:
        self.request = request
        self.began = began
        self.model = ""
        self.lease: Lease | None = None
        self.status = 0
        self.first_byte_s: float | None = None
        self.bytes = 0
        self.broken: str | None = None
        self.max_wait_s: float | None = None
        self.heartbeat: Heartbeat | None = None
        self.makes_response = False


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def _max_wait_s(request: web.Request) -> float | None:
    """`x-warmpool-max-wait`: seconds, or a duration as in the configuration."""
    text = request.headers.get("x-warmpool-max-wait")
    if text is None:
        return None
    try:
        return float(text) if _NUMBER.fullmatch(text) else parse_duration(text)
    except ValueError:
        raise InvalidRequestError('x-warmpool-max-wait is seconds ("2.5") or a duration ("500ms", "1m30s").') from None


def _is_stream(upstream: aiohttp.ClientResponse) -> bool:
    return upstream.status == 200 and upstream.content_type == "text/event-stream"


async def _error_of(upstream: aiohttp.ClientResponse) -> bytes:
    """What an engine answered instead of a stream, as an error envelope."""
    try:
        body = await upstream.content.read(_ERROR_BYTES)
        if isinstance(orjson.loads(body)["error"], dict):
            return body
    except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError, TypeError, KeyError):
        pass
    return UpstreamError(f"The engine answered {upstream.status} instead of a stream.").body()


async def _end_with(response: web.StreamResponse, error: bytes) -> web.StreamResponse:
    """End a stream that was begun for heartbeats with an error."""
    await response.write(sse_error(error))
    await response.write_eof()
    return response


def _to_engine(request: web.Request) -> CIMultiDict[str]:
    headers = _passed_on(request.headers, _NOT_TO_ENGINE)
    headers[REQUEST_ID] = request_id(request)
    return headers


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
