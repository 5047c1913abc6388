"""One request through: address it, lease an instance, pass the bytes on both ways.

What the engine answers reaches the client byte for byte. A client that leaves cancels the handler, which closes the
connection to the engine and ends the lease. Once headers are out, a failure of the engine breaks the connection: a
truncated answer must never look complete.
"""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.config.values import parse_duration
from proxy.engine import http1
from proxy.engine.connection import ExchangeError, SilenceError
from proxy.errors import (
    EngineFailedError,
    InvalidRequestError,
    RequestError,
    UpstreamError,
    sse_error,
)
from proxy.server.auth.browser_origin import contained
from proxy.server.auth.caller import caller_of
from proxy.server.forward import routes
from proxy.server.forward.handed import take_begun
from proxy.server.forward.heartbeat import Heartbeat
from proxy.server.forward.response import Answer, is_event_stream, unbuffered
from proxy.server.forward.tracing import CONTEXT_FIELDS
from proxy.server.request_body import body_of
from proxy.server.request_id import HEADER as REQUEST_ID
from proxy.server.request_id import request_id
from proxy.server.safe_logging import method_of, path_of
from proxy.telemetry.logs import lines_of_requests
from proxy.telemetry.metrics import UNKNOWN_MODEL
from proxy.telemetry.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

    from proxy.engine.connection import Exchange, Sink
    from proxy.pool.lease import Lease
    from proxy.pool.pool import Pool
    from proxy.server.auth.caller import Feed
    from proxy.server.forward.affinity import Reader, ResponseIds
    from proxy.server.forward.model_resolver import Address, Addressing
    from proxy.server.forward.tracing import Trace, Tracing
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.request")

# RFC 9110, 7.6.1, and what belongs to one connection or one hop by nature.
_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate te trailer transfer-encoding upgrade".split()
)
# Credentials are for this proxy. The body was decoded while it was read, and its length may change.
NOT_TO_ENGINE: Final = _HOP_BY_HOP | {
    b"authorization", b"proxy-authorization", b"cookie", b"x-api-key", b"api-key",
    b"host", b"content-length", b"content-encoding", b"expect", b"x-warmpool-max-wait", b"x-request-id",
    # What another proxy said of the client is not proven, and no engine's business; nor is the page it came from.
    b"forwarded", b"via", b"x-real-ip", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto",
    b"x-forwarded-port", b"x-forwarded-server", b"x-forwarded-prefix", b"x-forwarded-by", b"origin", b"referer",
    # SageMaker's would name another adapter than the one that was checked, or a session.
    b"x-amzn-sagemaker-adapter-identifier", b"x-amzn-sagemaker-adapter-alias", b"x-amzn-sagemaker-session-id",
    b"x-amzn-sagemaker-new-session-id", b"x-amzn-sagemaker-closed-session-id",
    b"access-control-request-method", b"access-control-request-headers",
}  # fmt: skip
# Whether a page may read an answer is this proxy's to say, and `Location` would show the engine's address.
NOT_TO_CLIENT: Final = _HOP_BY_HOP | {
    b"server", b"date", b"set-cookie", b"content-length", b"x-request-id", b"location", b"alt-svc",
    b"strict-transport-security", b"access-control-allow-origin", b"access-control-allow-credentials",
    b"access-control-allow-methods", b"access-control-allow-headers", b"access-control-expose-headers",
    b"access-control-max-age", b"x-warmpool-tier", b"x-warmpool-instance", b"server-timing",
}  # fmt: skip

_NUMBER: Final = re.compile(r"\d+(\.\d+)?")
_ERROR_BYTES: Final = 64 << 10
_STACK: Final = (b"Traceback (most recent call last)", b'File \\"/', b'File "/')
"""What a Python stack looks like, in JSON or as text."""
_REQUEST_ID: Final = REQUEST_ID.encode("ascii")

_ATTEMPTS: Final = 2
"""A completion has no side effects: an engine that broke before it answered is replaced once."""


class Relay:
    """Forwards requests to engines."""

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        addressing: Addressing,
        response_ids: ResponseIds,
        traces: Tracing | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._traces = traces
        self._refusals = refusals or Refusals()
        self._response_ids = response_ids
        self._addressing = addressing

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """The engine's answer to a request, on the same path. Raises RequestError as long as no header was sent."""
        began = time.perf_counter()
        exchange = _Exchange(request, began)
        try:
            match = routes.find(request.method, request.rel_url.raw_path, request.rel_url.raw_query_string)
            if self._traces is not None:
                exchange.trace = self._traces.request(request.method, match.route.path, request.headers)
            body = await body_of(request, self._pool.settings.server.body_limit)
            address = await self._addressing.found(match, request.headers.get("Content-Type", ""), body)
            exchange.model = address.model
            if exchange.caller is not None:
                exchange.caller.check_model(exchange.model)
                exchange.caller.expect(address.asked)
            address.asked = None
            exchange.max_wait_s = max_wait_s(request)
            exchange.makes_response = match.route.path == "/v1/responses"
            return await self._kept_alive(exchange, address)
        except RequestError as error:
            exchange.status, exchange.refused_as = error.status, error.code
            raise
        except ConnectionError:  # the client's
            raise
        except Exception:  # the client is told 500
            exchange.status = exchange.status or 500
            raise
        finally:
            self._account(exchange)

    async def _kept_alive(self, exchange: _Exchange, address: Address) -> web.StreamResponse:
        """The answer; to a client that waits for a stream heartbeats before it, where they are switched on."""
        every_s = self._pool.settings.server.heartbeat if address.streams else None
        if every_s is None:
            return await self._exchange(exchange, address)
        async with Heartbeat(exchange.request, every_s, lambda: self._found(address.model)) as exchange.heartbeat:
            try:
                return await self._exchange(exchange, address)
            except RequestError as error:
                begun = await exchange.heartbeat.stop()
                if begun is None:
                    raise
                exchange.status = error.status
                anthropic = routes.speaks_anthropic(exchange.request.path)
                return await _end_with(begun, error.body(anthropic=anthropic))

    def _found(self, model: str) -> dict[str, str]:
        return {"x-warmpool-tier": self._pool.tier(model).label}

    async def _exchange(self, exchange: _Exchange, address: Address) -> web.StreamResponse:
        for attempt in range(1, _ATTEMPTS + 1):
            name = self._pool.served_name(exchange.model)
            priority = exchange.caller.priority if exchange.caller is not None else 0
            begun = take_begun(exchange.request)
            if begun is not None:
                exchange.began = begun.began
            async with (
                begun.lease
                if begun is not None
                else await self._pool.lease(
                    name, priority=priority, max_wait_s=exchange.max_wait_s, preferred=address.instance
                )
            ) as lease:
                exchange.lease = exchange.lease or lease
                upstream = begun.upstream if begun is not None else None
                try:
                    if upstream is not None:
                        await upstream.answered()
                    else:
                        upstream = await lease.client.upstream.exchange(
                            exchange.request.method, address.target, _to_engine(exchange, lease), address.body
                        )
                    return await self._answer(exchange, lease, upstream)
                except ExchangeError as error:
                    log.warning("%s: before an answer: %s", lease.instance_id, error)
                    await lease.suspect()
                    if attempt < _ATTEMPTS and not isinstance(error, SilenceError):
                        continue
                    raise UpstreamError(f"The engine of model {exchange.model!r} failed before it answered.") from error
                finally:
                    # Kept when its answer was there to its end, else closed, which tells the engine to stop.
                    if upstream is not None:
                        upstream.close()
        raise AssertionError("unreachable")

    async def _answer(self, exchange: _Exchange, lease: Lease, upstream: Exchange) -> web.StreamResponse:
        """Pass status, headers and every byte on as they come. Raises ExchangeError as long as none was sent."""
        head = upstream.head
        begun = await exchange.heartbeat.stop() if exchange.heartbeat is not None else None
        if begun is not None and not _is_stream(head):
            exchange.status = head.status
            anthropic = routes.speaks_anthropic(exchange.request.path)
            return await _end_with(begun, await _error_of(upstream, anthropic=anthropic))
        answer = exchange.answer = begun or Answer(exchange.request)
        framed = answer.framed(http1.CHUNKED if begun is not None else head.length)
        first, done = upstream.start(framed=framed, drop_trailer=NOT_TO_CLIENT)
        exchange.upstream = upstream
        if head.status >= 500 and begun is None:
            first, done = await _looked_through(lease, upstream, first, done=done, framed=framed)
        beating = exchange.heartbeat is not None and _is_stream(head) and (begun is not None or head.length < 0)
        sink = self._sink(exchange, lease, answer, framed=framed, beating=beating)
        if begun is None:
            fields = _to_client(head, exchange.request)
            fields += _facts(exchange, lease)
            await answer.begin(head.status, head.reason, fields, head.length)
        exchange.status = head.status
        if exchange.heartbeat is not None and beating:
            exchange.heartbeat.go_on(answer, upstream)
        try:
            if first:
                sink(first)
            else:
                answer.flush()
            if not done:
                await answer.drain()
                await upstream.pass_on(sink, answer.drain)
        except ExchangeError as error:
            exchange.broken = str(error)
            answer.break_off()
            await lease.suspect()
        except BaseException:
            answer.break_off()
            raise
        return answer

    def _sink(self, exchange: _Exchange, lease: Lease, answer: Answer, *, framed: bool, beating: bool) -> Sink:
        """Where the bytes of the answer's body go."""
        sink: Sink = answer.write_now
        if exchange.makes_response:
            ids = self._response_ids.reader(self._pool.served_name(exchange.model), lease.instance_id)
            sink = watched(sink, ids, framed=framed)
        if exchange.heartbeat is not None and beating:
            sink = watched(sink, exchange.heartbeat, framed=framed)
        if exchange.caller is not None and exchange.caller.meter is not None:
            sink = watched(sink, exchange.caller.meter, framed=framed)
        return sink

    def _account(self, exchange: _Exchange) -> None:
        model = exchange.model or UNKNOWN_MODEL
        # nginx's 499: the client left before an answer.
        status = exchange.status or 499
        found = exchange.lease.found.label if exchange.lease is not None else None
        self._metrics.count_request(model, status)
        if found is not None and exchange.first_byte_s is not None and status < 400:
            self._metrics.observe_ttft(model, found, exchange.first_byte_s)
        if exchange.trace is None and (not log.isEnabledFor(logging.INFO) or self._is_summed_up(exchange, status)):
            return
        fields = told(
            request_id=request_id(exchange.request),
            method=method_of(exchange.request),
            path=path_of(exchange.request),
            key=exchange.caller.name if exchange.caller is not None else None,
            model=model,
            status=status,
            tier=found,
            instance=exchange.lease.instance_id if exchange.lease is not None else None,
            first_byte_s=exchange.first_byte_s,
            total_s=time.perf_counter() - exchange.began,
            size=exchange.bytes,
            broken=exchange.broken,
        )
        if exchange.trace is not None:
            exchange.trace.end(fields)
        tell(fields)

    def _is_summed_up(self, exchange: _Exchange, status: int) -> bool:
        """Whether the log says so already of this address: refused, or left, without an instance, by who has no key."""
        if exchange.lease is not None or exchange.caller is not None or not 400 <= status < 500:
            return False
        reason = exchange.refused_as if status != 499 else "left"
        return not self._refusals.first(exchange.request.remote, reason or str(status))


def told(
    *,
    request_id: str,
    method: str,
    path: str,
    key: str | None,
    model: str,
    status: int,
    tier: str | None,
    instance: str | None,
    first_byte_s: float | None,
    total_s: float,
    size: int,
    broken: str | None,
) -> dict[str, Any]:
    """What the log says of a request."""
    fields = {
        "request_id": request_id,
        "method": method,
        "path": path,
        "key": key,
        "model": model,
        "status": status,
        "tier": tier,
        "instance": instance,
        "first_byte_ms": _ms(first_byte_s),
        "total_ms": _ms(total_s),
        "bytes": size,
        "broken": broken,
    }
    return {name: value for name, value in fields.items() if value is not None}


def told_in_short(
    *,
    request_id: str,
    path: str,
    key: str | None,
    model: str,
    status: int,
    instance: str,
    first_byte_s: float | None,
    total_s: float,
    size: int,
    broken: str | None,
) -> str:
    """The message that `tell` makes of `told` for a POST that found its instance ready, for a third of the time."""
    whose = f" key={key}" if key is not None else ""
    first = f" first_byte_ms={first_byte_s * 1000:.1f}" if first_byte_s is not None else ""
    end = f" broken={broken}" if broken is not None else ""
    return (
        f"request_id={request_id} method=POST path={path}{whose} model={model} status={status} tier=ready "
        f"instance={instance}{first} total_ms={total_s * 1000:.1f} bytes={size}{end}"
    )


def message_of(fields: dict[str, Any]) -> str:
    """What was told, for people."""
    return " ".join([f"{name}={value}" for name, value in fields.items()])


def tell(fields: dict[str, Any]) -> None:
    """Write the line."""
    message = message_of(fields)
    lines = lines_of_requests()
    if lines is not None:
        lines.add(message)
    else:
        log.info(message, extra=fields)


class _Exchange:
    """What is noted of one request for its log line and its metrics."""

    __slots__ = (
        "answer", "began", "broken", "caller", "heartbeat", "lease", "makes_response", "max_wait_s", "model",
        "refused_as", "request", "status", "trace", "upstream",
    )  # fmt: skip

    def __init__(self, request: web.Request, began: float) -> None:
        self.request = request
        self.caller = caller_of(request)
        self.began = began
        self.model = ""
        self.lease: Lease | None = None
        self.status = 0
        self.refused_as: str | None = None
        self.answer: Answer | None = None
        self.upstream: Exchange | None = None
        self.broken: str | None = None
        self.max_wait_s: float | None = None
        self.heartbeat: Heartbeat | None = None
        self.makes_response = False
        self.trace: Trace | None = None

    @property
    def first_byte_s(self) -> float | None:
        """From the request's arrival to the first byte of the engine's body."""
        at = self.answer.first_byte_at if self.answer is not None else None
        return None if at is None else at - self.began

    @property
    def bytes(self) -> int:
        """Of the engine's body."""
        return self.upstream.payload_bytes if self.upstream is not None else 0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def max_wait_s(request: web.Request) -> float | None:
    """`x-warmpool-max-wait`: seconds, or a duration as in the configuration."""
    text = request.headers.get("x-warmpool-max-wait")
    if text is None:
        return None
    try:
        return float(text) if _NUMBER.fullmatch(text) else parse_duration(text)
    except ValueError:
        raise InvalidRequestError('x-warmpool-max-wait is seconds ("2.5") or a duration ("500ms", "1m30s").') from None


async def _looked_through(
    lease: Lease, upstream: Exchange, first: bytes, *, done: bool, framed: bool
) -> tuple[bytes, bool]:
    """What has come of an engine's error, all of it if it is small, and whether it is all.

    Raises EngineFailedError where it shows the engine's address or a stack, ExchangeError.
    """
    held = bytearray(first)

    def hold(data: bytes) -> bool:
        held.extend(data)
        return len(held) > _ERROR_BYTES

    async def enough() -> None:
        raise _EnoughError

    if not done and len(held) <= _ERROR_BYTES:
        try:
            await upstream.pass_on(hold, enough)
            done = True
        except _EnoughError:
            pass
    text = bytes(held)
    if framed:
        text = http1.ChunkedBody(http1.CHUNKED, framed=False).feed(text)
    authority = lease.client.upstream.authority
    if any(sign in text for sign in (authority, *_STACK)):
        log.error(
            "%s answered %d with its address or a stack in it, kept back", lease.instance_id, upstream.head.status
        )
        raise EngineFailedError("The engine failed; its log says more.")
    return bytes(held), done


class _EnoughError(Exception):
    pass


def _is_stream(head: http1.Head) -> bool:
    return head.status == 200 and is_event_stream(head.fields)


async def _error_of(upstream: Exchange, *, anthropic: bool) -> bytes:
    """What an engine answered instead of a stream, as an error envelope."""
    try:
        body = await upstream.read(_ERROR_BYTES)
        if isinstance(orjson.loads(body)["error"], dict):
            return body
    except (ExchangeError, orjson.JSONDecodeError, TypeError, KeyError):
        pass
    error = UpstreamError(f"The engine answered {upstream.head.status} instead of a stream.")
    return error.body(anthropic=anthropic)


async def _end_with(answer: Answer, error: bytes) -> web.StreamResponse:
    """End a stream that was begun for heartbeats with an error."""
    await answer.send(sse_error(error))
    answer.end()
    return answer


def watched(sink: Sink, reader: Reader | Feed, *, framed: bool) -> Sink:
    """The sink, with a reader of what goes there."""
    unframed = http1.ChunkedBody(http1.CHUNKED, framed=False) if framed else None

    def watched(data: bytes) -> bool:
        reader.feed(unframed.feed(data) if unframed is not None else data)
        return sink(data)

    return watched


def _to_engine(exchange: _Exchange, lease: Lease) -> list[tuple[bytes, bytes]]:
    request, trace = exchange.request, exchange.trace
    left_out = NOT_TO_ENGINE if trace is None else NOT_TO_ENGINE | CONTEXT_FIELDS
    fields = passed_on(request.raw_headers, left_out)
    fields.append((_REQUEST_ID, request_id(request).encode("ascii")))
    if trace is not None:
        fields += trace.asks(lease)
    return fields


def _to_client(head: http1.Head, request: web.Request) -> list[tuple[bytes, bytes]]:
    fields = answer_fields(head.fields)
    if request.method == "HEAD" or head.status == 304:  # says what a GET would have
        fields += [field for field in head.fields if field[0].lower() == b"content-length"]
    return fields


def passed_on(fields: Sequence[tuple[bytes, bytes]], left_out: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """The header fields without `left_out` and without those that `Connection` names."""
    if named := http1.connection_options(fields):
        left_out |= named
    return [field for field in fields if field[0].lower() not in left_out]


def answer_fields(fields: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """What goes on to the client of an engine's header fields."""
    return unbuffered(contained(passed_on(fields, NOT_TO_CLIENT)))


def _facts(exchange: _Exchange, lease: Lease) -> list[tuple[bytes, bytes]]:
    """`x-warmpool-*` and `server-timing` (W3C Server Timing, milliseconds)."""
    timing = [f"queue;dur={lease.queue_s * 1000:.1f}"]
    if lease.wake is not None:
        timing.append(f"wake;dur={lease.wake.seconds * 1000:.1f}")
        timing += [f"{name};dur={value * 1000:.1f}" for name, value in lease.wake.stages.items()]
    first = exchange.lease or lease
    return [
        (b"x-warmpool-tier", first.found.label.encode("ascii")),
        (b"x-warmpool-instance", lease.instance_id.encode()),
        (b"server-timing", ", ".join(timing).encode("ascii")),
    ]
