"""What one connection may take: time for its headers and its body, time to read, and a place among the others.

aiohttp's server limits the length of a line, the number of headers, and how long it keeps an idle connection. What
it lacks is here, in a subclass of its protocol: a bound for the headers together, for how long they and a body take
to come, for clients that read nothing, for connections by number and by address, refusal of what other servers may
read otherwise (RFC 9112, 11.2), and errors of the parser in an envelope instead of a text with the parser's insides.

Deadlines are kept in one set and looked at every now and then, since a timer for every request would cost more than
the whole check.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion10, HttpVersion11
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from proxy.config.values import is_loopback
from proxy.errors import SlowUploadError, envelope
from proxy.server.forward.response import date
from proxy.server.request_body import CONTINUE
from proxy.server.safe_logging import stack_of
from proxy.telemetry.refusals import Refusals, network_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.streams import StreamReader

    from proxy.config.server import LimitSettings
    from proxy.config.settings import Settings
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.limits")

_LINGER_S: Final = 5.0
"""How long the rest of a refused body is read, so that the client sees the answer before the connection ends."""
_FILES_KEPT: Final = 256
"""Open files that are not for clients: engines, pipes, images."""
_LOOKS_S: Final = (0.1, 0.05, 0.1, 0.2, 0.5, 1.0)
"""When to look whether a client is still there that sends no more; then every second."""
_TCP_CLOSE: Final = 7
"""`tcpi_state` of a connection that was reset (linux/tcp_states.h)."""
_VERSIONS: Final = (HttpVersion11, HttpVersion10)


class Doors:
    """All connections of a server: how many there are, and which of them owe something by when."""

    def __init__(self, limits: LimitSettings, metrics: Metrics, refusals: Refusals | None = None) -> None:
        self.limits = limits
        self.metrics = metrics
        self.refusals = refusals or Refusals()
        self.most = limits.connections
        self.open = 0
        self._by_address: Counter[str] = Counter()
        self._owing: set[GuardedProtocol] = set()
        self._timer: asyncio.TimerHandle | None = None
        times = (limits.head_timeout, limits.upload_timeout, limits.stall_timeout or limits.head_timeout)
        self.every_s = min(1.0, *(t / 4 for t in times))

    def fit_to_host(self, engine_connections: int) -> None:
        """No more connections than there can be open files; raises the soft limit of files as far as it may.

        `engine_connections`: how many there may be towards engines at the same time.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.limits.connections + engine_connections + _FILES_KEPT
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft != resource.RLIM_INFINITY and soft < wanted:
            self.most = max(soft // 4, soft - _FILES_KEPT - engine_connections)
            log.warning(
                "only %d connections at once instead of %d: the limit of open files is %d (ulimit -n, LimitNOFILE=)",
                self.most, self.limits.connections, soft,
            )  # fmt: skip

    def enter(self, address: str | None) -> str | None:
        """Count a connection in; the reason if there is no place for it."""
        if self.open >= self.most:
            return "connections"
        per_address = self.limits.connections_per_address
        if address is not None and per_address and self._by_address[address] >= per_address:
            return "connections_per_address"
        self.open += 1
        if address is not None:
            self._by_address[address] += 1
        return None

    def leave(self, address: str | None) -> None:
        """Count a connection out."""
        self.open -= 1
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def owes(self, connection: GuardedProtocol) -> None:
        """Look at a connection's deadline from now on, until it `has_paid`."""
        self._owing.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.every_s, self._look)

    def has_paid(self, connection: GuardedProtocol) -> None:
        """It owes nothing any more."""
        self._owing.discard(connection)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for connection in list(self._owing):
            connection.look(now)
        if self._owing:
            self._timer = asyncio.get_running_loop().call_later(self.every_s, self._look)


class GuardedProtocol(RequestHandler):
    """A connection of a client."""

    __slots__ = (
        "_address", "_asked", "_body", "_body_began", "_doors", "_half_closed", "_head_began", "_head_bytes", "_host",
        "_refused", "_stalled_at", "_unsent",
    )  # fmt: skip

    def __init__(self, doors: Doors, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._doors = doors
        self._host: str | None = None
        """The client's address."""
        self._address: str | None = None
        """What its connections are counted by."""
        self._refused = False
        self._head_began: float | None = None
        self._head_bytes = 0
        self._body: StreamReader | None = None
        self._body_began = 0.0
        self._stalled_at: float | None = None
        self._unsent = 0
        self._half_closed = False
        """The client sends no more."""
        self._asked = False
        """Something was sent to it since, to see whether it is there."""

    # --- coming and going ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it in, or turn it away."""
        peer = transport.get_extra_info("peername")
        self._host = peer[0] if isinstance(peer, tuple) else None
        self._address = _counted(self._host)
        reason = self._doors.enter(self._address)
        if reason is not None:
            self._refused = True
            self._note(reason, f"a connection over server.limits.{reason}")
        super().connection_made(transport)
        if reason is not None:
            self._end_with(503, "Too many connections; try again later.", "too_many_connections")

    def connection_lost(self, exc: BaseException | None) -> None:
        """Count it out."""
        if not self._refused:
            self._doors.leave(self._address)
        self._refused = True  # once
        self._doors.has_paid(self)
        super().connection_lost(exc)

    # --- what comes in ---

    def data_received(self, data: bytes) -> None:
        """Parse, and note what is still missing."""
        if self._refused or self._upgraded:
            super().data_received(data)
            return
        before, before_body = self._request_count, self._body
        in_body = before_body is not None
        super().data_received(data)
        if self._request_count != before:
            self._check_new(self._request_count - before)
            if before_body is not None and not before_body.is_eof():
                self._end_broken(before_body)
        if self._body is not None and self._body.is_eof():
            self._body = None
        # The rest of a body may come before its handler has begun; it is no head. What comes while a request is
        # answered belongs to the next one, which has not begun yet.
        elsewhere = in_body or self._body is not None or self._messages or self._current_request is not None
        if not elsewhere and data.strip():
            self._in_head(len(data))
        if self._head_began is None and self._body is None and self._stalled_at is None:
            self._doors.has_paid(self)

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's: True keeps the connection open
        """The client sends no more, or has left: FIN says both. Before its answer has begun, find out which.

        Within an answer it has left: nothing can be sent there that would tell, and its engine may work for long.
        """
        transport = self.transport
        if transport is None or self._upgraded or self._host is None or not self._is_owed_an_answer():
            return False
        if self._has_begun_to_answer() and not self._half_closed:
            return False
        if transport.get_extra_info("sslcontext") is not None:  # TLS ends as a whole
            return False
        if not self._half_closed:
            self._half_closed = True
            self._loop.call_later(_LOOKS_S[0], self._look_for_client, 0)
        return True

    def _is_owed_an_answer(self) -> bool:
        """Whether a request has come whole that is not answered yet."""
        if self._body is not None and not self._body.is_eof():
            return False
        return self._request_count > 0 and (self._waiter is None or self._waiter.done())

    def _has_begun_to_answer(self) -> bool:
        """Whether something of the answer under way is out."""
        return self._current_request is not None and self._current_request.writer.output_size > 0

    def _may_be_asked(self) -> bool:
        """Whether an interim answer may be sent: one is under way, of which nothing is out, in HTTP/1.1."""
        request = self._current_request
        return request is not None and request.version == HttpVersion11 and not self._has_begun_to_answer()

    def _look_for_client(self, looks: int) -> None:
        """A host whose program has closed the connection answers what is sent with a reset, which ends it here too.

        What can be sent before an answer is an interim one, which every client reads over (RFC 9110, 15.2).
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            transport.abort()
            return
        if not self._is_owed_an_answer():
            self.force_close()
            return
        if not self._asked and self._may_be_asked():
            self._asked = True
            transport.write(CONTINUE)
        looks = min(looks + 1, len(_LOOKS_S) - 1)
        self._loop.call_later(_LOOKS_S[looks], self._look_for_client, looks)

    def _check_new(self, count: int) -> None:
        """Headers are complete: of one request, or of several that were sent at once."""
        self._head_began, self._head_bytes = None, 0
        for index in range(-min(count, len(self._messages)), 0):
            message, payload = self._messages[index]
            if isinstance(message, _ErrInfo):
                continue
            if (problem := _problem_with(message)) is not None:
                error = BadHttpMessage(problem)
                self._messages[index] = (_ErrInfo(status=400, exc=error, message=problem), EMPTY_PAYLOAD)
            elif hdrs.EXPECT in message.headers:
                self._messages[index] = (_unexpecting(message), payload)
        message, payload = self._messages[-1]
        if not isinstance(message, _ErrInfo) and not payload.is_eof():
            self._body = payload
            self._body_began = self._loop.time()
            self._doors.owes(self)

    def _end_broken(self, body: StreamReader) -> None:
        """A body broke off: a message came before its end, which is the parser's error. Who reads it is told."""
        if self._current_request is None and len(self._messages) < 2:  # answered already
            return
        self._body = None
        self._note("malformed", "a request whose body is not framed as its fields say")
        body.set_exception(web.RequestPayloadError("not framed as its fields say"))
        body.feed_eof()
        self._close = True  # what still comes is no request

    def _in_head(self, size: int) -> None:
        """Part of a request's headers, or an empty line before them."""
        if self._head_began is None:
            self._head_began = self._loop.time()
            self._doors.owes(self)
        self._head_bytes += size
        if self._head_bytes > self._doors.limits.head:
            self._refuse("head", 431, "The request's headers are too large together.", "headers_too_large")

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the end of an answer. What came behind an upgrade that was declined is parsed here, so checked here."""
        before = self._request_count
        finished = await super().finish_response(request, resp, start_time)
        if self._half_closed and not self._messages:
            self._close = True  # after this one nothing comes
        if self._request_count != before and self._messages:
            self._check_new(self._request_count - before)
        return finished

    # --- what goes out ---

    def pause_writing(self) -> None:
        """The client takes less than there is for it."""
        super().pause_writing()
        if self._doors.limits.stall_timeout is not None and self.transport is not None:
            self._stalled_at = self._loop.time()
            self._unsent = self.transport.get_write_buffer_size()
            self._doors.owes(self)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._stalled_at = None

    # --- time ---

    def look(self, now: float) -> None:
        """End what took too long."""
        limits = self._doors.limits
        if self.transport is None:
            self._doors.has_paid(self)
        elif self._head_began is not None:
            if now - self._head_began > limits.head_timeout:
                self._refuse("slow_headers", 408, "The request's headers took too long.", "request_timeout")
        elif self._body is not None:
            self._look_at_body(self._body, now)
        elif self._stalled_at is not None:
            self._look_at_reader(self.transport, now)
        else:
            self._doors.has_paid(self)

    def _look_at_body(self, body: StreamReader, now: float) -> None:
        limits = self._doors.limits
        if self._reading_paused or self._buffer_paused:
            self._body_began += self._doors.every_s  # the delay is ours
        elif now - self._body_began > limits.upload_timeout + body.total_bytes / limits.upload_rate:
            self._body = None
            self._note("slow_body", "a request whose body came too slowly")
            if self._current_request is None:  # answered already
                self.force_close()
                return
            body.set_exception(SlowUploadError("The request's body took too long."))
            body.feed_eof()  # nothing more to wait for, also when the answer is out
            self._close = True  # what still comes is no request

    def _look_at_reader(self, transport: asyncio.Transport, now: float) -> None:
        limit_s = self._doors.limits.stall_timeout
        unsent = transport.get_write_buffer_size()
        if unsent < self._unsent or limit_s is None:
            self._unsent, self._stalled_at = unsent, now
        elif now - (self._stalled_at or now) > limit_s:
            self._note("stalled", "a connection that takes nothing of its answer")
            self._doors.has_paid(self)
            transport.abort()
        else:
            self._unsent = max(unsent, self._unsent)

    # --- refusing ---

    def _note(self, reason: str, text: str) -> None:
        """Count a refusal; `text` is warmpool's own and quotes nothing."""
        self._doors.metrics.refused.labels(reason).inc()
        self._doors.refusals.note(self._host, reason, text)

    def _refuse(self, reason: str, status: int, message: str, code: str) -> None:
        self._note(reason, message)
        self._end_with(status, message, code)

    def _end_with(self, status: int, message: str, code: str) -> None:
        """Answer outside of any request, and close."""
        self._head_began = self._body = None
        self._doors.has_paid(self)
        transport = self.transport
        if transport is not None and not transport.is_closing() and self._current_request is None:
            transport.write(_raw(status, message, code))
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's text, which quotes the request
    ) -> web.StreamResponse:
        """The parser's error as an envelope. What it saw is neither logged nor sent back."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        if status >= 500:
            log.error("a request failed: %s", stack_of(exc) if exc is not None else "no exception")
            text, code = "Internal error; the server's log says more.", "internal_error"
        else:
            status, text, code = _meaning(exc, self.max_line_size, self.max_field_size)
            self._note("malformed", f"a malformed request ({status} {code}, {type(exc).__name__})")
        return _Refusal(status, _raw(status, text, code))


class _Refusal(web.StreamResponse):
    """The answer to what aiohttp makes a request of HTTP/1.0 of, since it could not be parsed."""

    def __init__(self, status: int, data: bytes) -> None:
        super().__init__(status=status)
        self._data = data

    @property
    def keep_alive(self) -> bool | None:
        """The connection ends."""
        return False

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write it."""
        if request.transport is not None and not request.transport.is_closing():
            request.transport.write(self._data)

    async def write_eof(self, data: bytes = b"") -> None:
        """Everything was written."""


class _GuardedServer(web.Server):
    """aiohttp's server with connections of ours."""

    def __init__(self, doors: Doors, connection: Callable[..., GuardedProtocol], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._doors = doors
        self._connection = connection

    def __call__(self) -> RequestHandler:
        return self._connection(self._doors, self, loop=self._loop, **self._kwargs)


CONNECTION: web.AppKey[Callable[..., GuardedProtocol]] = web.AppKey("connection")
"""What an application has its connections made by, if not by `GuardedProtocol`."""
REFUSALS: web.AppKey[Refusals] = web.AppKey("refusals", Refusals)
"""Where an application has refusals counted for its log."""


class GuardedRunner(web.AppRunner):
    """`web.AppRunner` with the limits of the settings."""

    __slots__ = ("_doors", "_engine_connections")

    def __init__(self, app: web.Application, settings: Settings, metrics: Metrics, **options: Any) -> None:
        limits = settings.server.limits
        super().__init__(
            app,
            access_log=None,
            auto_decompress=False,  # it has no bound for the whole, and knows other codings from host to host
            handler_cancellation=True,
            keepalive_timeout=limits.idle_timeout,
            lingering_time=_LINGER_S,
            max_line_size=limits.url,
            max_field_size=limits.header,
            max_headers=limits.headers,
            **options,
        )
        self._doors = Doors(limits, metrics, app.get(REFUSALS))
        self._engine_connections = sum(m.max_instances * m.max_concurrency for m in settings.models.values())

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        self._doors.fit_to_host(self._engine_connections)
        return _GuardedServer(
            self._doors,
            self.app.get(CONNECTION, GuardedProtocol),
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,
        )


def _unexpecting(message: Any) -> Any:
    """Without `Expect`, which aiohttp would answer at once; see `proxy.server.request_body`. Raw headers keep it."""
    headers = message.headers.copy()
    del headers[hdrs.EXPECT]
    return message._replace(headers=headers)


def _counted(host: str | None) -> str | None:
    """What connections are counted by; None: not counted."""
    return None if host is None or is_loopback(host) else network_of(host)


def _problem_with(message: Any) -> str | None:
    """What this parser lets pass and another server might read otherwise."""
    if message.version not in _VERSIONS:
        return "Only HTTP/1.1 and HTTP/1.0."
    if message.method == hdrs.METH_CONNECT:
        return "This is no tunnel."
    if not message.path.startswith("/") and not (message.path == "*" and message.method == hdrs.METH_OPTIONS):
        return "The request target must be a path."
    if "#" in message.path:
        return "The request target has a fragment."
    if hdrs.TRANSFER_ENCODING in message.headers:
        codings = message.headers.getall(hdrs.TRANSFER_ENCODING)
        if len(codings) != 1 or codings[0].lower() != "chunked":
            return "The only transfer coding is chunked."
        if message.version != HttpVersion11 or hdrs.CONTENT_LENGTH in message.headers:
            return "Transfer-Encoding is for HTTP/1.1, and without Content-Length."
    if message.headers.get(hdrs.EXPECT, "100-continue").lower() != "100-continue":
        return "The only expectation is 100-continue."
    return None


def _meaning(exc: BaseException | None, url_limit: int, header_limit: int) -> tuple[int, str, str]:
    """Status, message and code for an error of the parser."""
    if isinstance(exc, LineTooLong):
        if exc.args[1] == url_limit != header_limit:
            return 414, f"The request's URL is longer than {url_limit} bytes.", "url_too_long"
        return 431, f"A header of the request is longer than {header_limit} bytes.", "headers_too_large"
    text = getattr(exc, "message", "")
    if text.startswith("Too many headers"):
        return 431, "The request has too many headers.", "headers_too_large"
    # The first words say what is wrong; the rest is the request itself.
    reason = text.partition("\n")[0].partition(":")[0].strip() if isinstance(exc, BadHttpMessage) else ""
    return 400, f"This is no valid HTTP request{f': {reason}' if reason.isascii() and reason else ''}.", "bad_http"


def _body(status: int, message: str, code: str) -> bytes:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return envelope(message, type_=kind, code=code)


def _raw(status: int, message: str, code: str) -> bytes:
    body = _body(status, message, code)
    retry = "Retry-After: 1\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nServer: warmpool\r\nDate: {date().decode('ascii')}\r\n"
        f"Content-Type: application/json\r\n{retry}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
