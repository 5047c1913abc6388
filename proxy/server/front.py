"""Ordinary requests, served below aiohttp's server: from one connection's bytes to the other's, without a task.

What is ordinary: a whole POST with a JSON body on a connection where nothing else is under way, in a shape that can be
read in one way only, for a model that has an instance ready with room. Everything else goes to aiohttp's server as the
bytes that came, and so does a request that turns out not to be ordinary before anything of an answer is out: what is
under way for it goes along (`proxy.server.forward.handed`). This is a shorter way to the same answer, and the only
thing that may differ is what it costs; `tests/server/test_front.py` compares the two byte for byte.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import TYPE_CHECKING, Any, Final

from proxy.engine import http1
from proxy.engine.connection import Exchange, ExchangeError
from proxy.errors import RequestError
from proxy.server import request_id
from proxy.server.auth.caller import KEY_FIELDS, keys_shown
from proxy.server.auth.middleware import refuse_expired
from proxy.server.connection_limits import GuardedProtocol
from proxy.server.forward import routes
from proxy.server.forward.handed import Begun, Handed
from proxy.server.forward.relay import (
    NOT_TO_CLIENT,
    NOT_TO_ENGINE,
    answer_fields,
    passed_on,
    tell,
    told,
    told_in_short,
    watched,
)
from proxy.server.forward.response import date
from proxy.telemetry.logs import lines_of_requests

if TYPE_CHECKING:
    from aiohttp import web

    from proxy.engine.connection import Connection, Sink, Upstream
    from proxy.pool.lease import Lease
    from proxy.pool.pool import Pool
    from proxy.server.auth.middleware import Admission, Auth, Known
    from proxy.server.forward.model_resolver import Address, Addressing
    from proxy.server.inflight import Traffic
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.request")

_READ_AT_ONCE: Final = 32 << 10
"""A larger body is read as it comes, by aiohttp."""
_HEAD_LIMIT: Final = 4 << 10
_BEHIND: Final = 64 << 10
"""How much of the next requests is read while one is served."""
_HOLDS: Final = 3
"""A request that comes in more pieces is aiohttp's."""
_REPLIES: Final = 256
"""Different heads of answers that are remembered."""

_LINE: Final = re.compile(rb"POST (/[0-9A-Za-z/_.-]*) HTTP/1\.1\r\n")
_FIELD: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*((?:[!-~](?:[\t -~]*[!-~])?)?)[ \t]*\r\n")
_HOST: Final = re.compile(rb"[0-9A-Za-z_.:\[\]-]+")
_ZERO: Final = ord("0")
_UNUSUAL: Final = frozenset(
    b"content-length transfer-encoding content-encoding expect upgrade http2-settings te trailer keep-alive "
    b"proxy-connection origin x-warmpool-max-wait".split()
)
"""What aiohttp's server, authentication or the relay have to see to. (Every `sec-` too.)"""
_KEY_FIELDS: Final = tuple(name.encode("ascii") for name in KEY_FIELDS)
_BODILESS: Final = frozenset({204, 304})
_OWN: Final = b"\r\nserver-timing: queue;dur=0.0\r\nserver: warmpool\r\nx-request-id: "


class Shape:
    """What the head of a request says, its length left out."""

    __slots__ = (
        "closes",
        "fields",
        "host",
        "keys",
        "known",
        "known_of",
        "line",
        "match",
        "request_id",
    )

    def __init__(
        self,
        match: routes.Match,
        fields: bytes,
        keys: tuple[str, ...],
        request_id: str | None,
        *,
        host: str,
        closes: bool,
    ) -> None:
        self.match = match
        self.host = host
        self.closes = closes
        """It is the last request of its connection."""
        self.line = b"POST %b HTTP/1.1\r\n" % match.target.encode("ascii")
        self.fields = fields
        """Those for the engine, and the beginning of the request's id."""
        self.keys = keys
        """The API keys that it shows."""
        self.request_id = request_id
        self.known: Known | None = None
        """Whose key it is, as long as `known_of` are the keys in force."""
        self.known_of: object = None


def parts_of(data: bytes, most: int) -> tuple[bytes, int, int] | None:
    """The head of a request without the field `Content-Length` and the empty line, where its body begins, its length.

    None where the head has no end within `most` bytes, or no such field in its usual spelling. Of the rest nothing is
    said: `shape_of` has to find it good.
    """
    end = data.find(b"\r\n\r\n", 0, most)
    if end < 0:
        return None
    at = data.find(b"\r\nContent-Length: ", 0, end)
    if at < 0:
        at = data.find(b"\r\ncontent-length: ", 0, end)
        if at < 0:
            return None
    stop = data.find(b"\r\n", at + 18)
    digits = data[at + 18 : stop]
    if not digits.isdigit() or len(digits) > 9 or (digits[0] == _ZERO and len(digits) > 1):
        return None
    return data[:at] + data[stop : end + 2], end + 4, int(digits)


def shape_of(head: bytes) -> Shape | None:
    """Of a head without its `Content-Length` and its last line; None where it is nothing ordinary."""
    line = _LINE.match(head)
    if line is None:
        return None
    try:
        match = routes.find("POST", line[1].decode("ascii"))
    except RequestError:
        return None
    if match.route.model_in is not routes.ModelIn.JSON or match.route.path == "/v1/responses":
        return None
    at, found, fields = line.end(), dict[bytes, bytes](), list[tuple[bytes, bytes]]()
    while at < len(head):
        field = _FIELD.match(head, at)
        if field is None:
            return None
        at = field.end()
        name, value = field.groups()
        lower = name.lower()
        if lower in _UNUSUAL or lower in found or lower.startswith(b"sec-"):
            return None
        found[lower] = value
        fields.append((name, value))
    if not _HOST.fullmatch(found.get(b"host", b"")):
        return None
    option = found.get(b"connection", b"keep-alive").lower()
    if option not in (b"keep-alive", b"close"):
        return None
    return Shape(
        match,
        b"".join(b"%b: %b\r\n" % field for field in passed_on(fields, NOT_TO_ENGINE)) + b"X-Request-Id: ",
        _keys_in(found),
        _request_id_in(found),
        host=found[b"host"].decode("ascii"),
        closes=option == b"close",
    )


def _keys_in(found: dict[bytes, bytes]) -> tuple[str, ...]:
    """As authentication finds them."""
    bearer = [found[b"authorization"].decode("ascii")] if b"authorization" in found else []
    others = [found[name].decode("ascii") for name in _KEY_FIELDS if name in found]
    return keys_shown(bearer, others)


def _request_id_in(found: dict[bytes, bytes]) -> str | None:
    given = found.get(b"x-request-id", b"").decode("ascii")
    return given if request_id.usable(given) else None


class _Reply:
    """What the head of an engine's answer says."""

    __slots__ = ("fields", "first_line", "framing", "head", "keeps_alive", "length", "sized", "status")

    def __init__(self, head: http1.Head) -> None:
        self.status = head.status
        self.keeps_alive = head.keeps_alive
        self.length = head.length
        """Of the answer that it was read from; others that differ in nothing else share it."""
        self.sized = head.length >= 0
        self.framing = b"\r\ncontent-length: " if self.sized else b"\r\ntransfer-encoding: chunked"
        self.first_line = b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)
        self.fields = answer_fields(head.fields)
        self.head = self.head_without(frozenset())

    def head_without(self, names: frozenset[bytes]) -> bytes:
        """The beginning of the answer's head."""
        kept = [b"%b: %b\r\n" % field for field in self.fields if field[0].lower() not in names]
        return b"".join((self.first_line, *kept, b"x-warmpool-tier: ready\r\nx-warmpool-instance: "))


class Front:
    """What the connections of one server share. `off`: nothing is ordinary here."""

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        addressing: Addressing,
        auth: Auth,
        traffic: Traffic,
        *,
        off: bool = False,
    ) -> None:
        self.pool = pool
        self.metrics = metrics
        self.traffic = traffic
        self._addressing = addressing
        self._auth = auth
        self._off = off
        self._settings: object = None
        self._most = 0
        self._head_most = 0
        self._heartbeat = False
        self._sized: dict[bytes, _Reply] = {}
        self._chunked: dict[bytes, _Reply] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def connection(self, *args: Any, **options: Any) -> FrontProtocol:
        """What serves a connection that was accepted."""
        return FrontProtocol(self, *args, **options)

    def _reconfigure(self) -> None:
        server = self.pool.settings.server
        limits = server.limits
        self._settings = self.pool.settings
        self._most = 0 if self._off else min(_READ_AT_ONCE, server.body_limit)
        self._head_most = min(_HEAD_LIMIT, limits.head, limits.header, limits.url)
        self._fields_most = limits.headers
        self._heartbeat = server.heartbeat is not None

    def looked_at(self, connection: FrontProtocol, data: bytes) -> bool | None:
        """Serve the request that came on an idle connection: whether it is served; None: more of it has to come."""
        if self.pool.settings is not self._settings:
            self._reconfigure()
        parts = parts_of(data, self._head_most)
        if parts is None:
            return False
        head, begin, length = parts
        missing = begin + length - len(data)
        if length > self._most or missing < 0:
            return False
        shape = connection.shape
        if head != connection.shape_head:
            shape = shape_of(head) if head.count(b"\n") <= self._fields_most else None
            if shape is not None and not self._auth.pages.knows(connection.transport, shape.host):
                shape = None  # aiohttp's side says so to the client
            connection.shape, connection.shape_head = shape, head
        if shape is None:
            return False
        if missing:
            return None
        return self._served(connection, shape, data, data[begin:])

    def _served(self, connection: FrontProtocol, shape: Shape, data: bytes, body: bytes) -> bool:
        if self.traffic.stopping:
            return False
        began = time.perf_counter()
        admission = None
        try:
            known = self._known(shape) if self._auth.keys is not None else None
            address = self._addressing.find_json(shape.match, body)
            if address.streams and self._heartbeat:
                return False
            if known is not None:
                admission = self._auth.admit(known)
                admission.holder.check_model(address.model)
                admission.holder.expect(address.asked)
        except RequestError:  # aiohttp's side says so to the client
            if admission is not None:
                admission.undo()
            return False
        address.asked = None
        lease = self.pool.try_lease(address.model)
        if lease is None:
            if admission is not None:
                admission.undo()
            return False
        passage = connection.passage = Passage(self, connection, shape, data, lease, address, admission, began)
        passage.begin()
        return True

    def _known(self, shape: Shape) -> Known:
        keys = self._auth.keys
        if shape.known is None or shape.known_of is not keys:
            shape.known, shape.known_of = self._auth.identify(shape.keys), keys
        refuse_expired(shape.known.entry)
        return shape.known

    def reply(self, data: bytes, end: int) -> tuple[_Reply | None, int]:
        """What the head of an answer says, which ends at `end`, and its length; None where it is nothing ordinary.

        Raises ProtocolError.
        """
        at = data.find(b"\r\ncontent-length: ", 0, end)
        if at < 0:
            at = data.find(b"\r\nContent-Length: ", 0, end)
        if at < 0:
            return self._reply_without_usual_length(data[: end + 4])
        stop = data.find(b"\r\n", at + 18)
        digits = data[at + 18 : stop]
        if not digits.isdigit() or len(digits) > 18 or (digits[0] == _ZERO and len(digits) > 1):
            return None, 0
        head = data[:at] + data[stop:end]
        reply = self._sized.get(head)
        if reply is None:
            reply = self._learnt(head, self._sized, data[: end + 4])
        return reply, int(digits)

    def _reply_without_usual_length(self, head: bytes) -> tuple[_Reply | None, int]:
        """In chunks, or with a length that is spelled as no server does it by itself (`CONTENT-LENGTH:30`)."""
        reply = self._chunked.get(head)
        if reply is None:
            reply = self._learnt(head, self._chunked, head)
        return reply, reply.length if reply is not None else 0

    def _learnt(self, key: bytes, known: dict[bytes, _Reply], head: bytes) -> _Reply | None:
        parsed = http1.parse_head(head, "POST")
        if parsed.status >= 500 or parsed.status < 200 or parsed.status in _BODILESS:
            return None
        if parsed.length == http1.UNTIL_CLOSE:
            return None
        if len(known) >= _REPLIES:
            known.clear()
        reply = known[key] = _Reply(parsed)
        return reply

    def spawn(self, work: Any, name: str) -> None:
        """Do something that has to wait."""
        task = asyncio.ensure_future(work)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Passage:
    """One request through, and its answer; a `proxy.engine.connection.Receiver`."""

    __slots__ = (
        "_address", "_admission", "_began", "_body", "_broken", "_closing", "_data", "_early", "_first_byte_at",
        "_flows", "_front", "_lease", "_protocol", "_reply", "_request_id", "_shape", "_size", "_transport", "_unsent",
        "_watch", "upstream",
    )  # fmt: skip

    def __init__(
        self,
        front: Front,
        protocol: FrontProtocol,
        shape: Shape,
        data: bytes,
        lease: Lease,
        address: Address,
        admission: Admission | None,
        began: float,
    ) -> None:
        self._front = front
        self._protocol = protocol
        self._transport: Any = protocol.transport
        self._shape = shape
        self._data = data
        """The request as it came, until its answer has begun."""
        self._lease = lease
        self._address = address
        self._admission = admission
        self._began = began
        self._request_id = shape.request_id or request_id.new()
        self.upstream: Connection | None = None
        self._early = b""
        self._reply: _Reply | None = None
        self._body: http1.Body | None = None
        self._size = 0
        self._first_byte_at: float | None = None
        self._broken: str | None = None
        self._closing = False
        self._unsent = b""
        """The head, until something goes with it."""
        self._watch: Sink | None = None
        self._flows = False
        """The first bytes of the body are out, and nobody looks at the rest."""

    @property
    def is_unanswered(self) -> bool:
        """Nothing of its answer is out."""
        return self._reply is None

    def begin(self) -> None:
        """Ask the engine."""
        self._front.traffic.enter()
        upstream = self._lease.client.upstream
        kept = upstream.kept()
        if kept is None:
            self._front.spawn(self._connect(upstream), "connect")
        else:
            self._ask(upstream, kept)

    async def _connect(self, upstream: Upstream) -> None:
        try:
            connection = await upstream.connect()
        except ExchangeError as error:
            if self._protocol.passage is self:
                self._hand_over(error)
            return
        if self._protocol.passage is self:
            self._ask(upstream, connection)
        else:
            connection.finished(reusable=True)  # the client has left

    def _ask(self, upstream: Upstream, connection: Connection) -> None:
        shape, body = self._shape, self._address.body
        message = b"".join((
            shape.line, upstream.own_fields, shape.fields, self._request_id.encode("ascii"),
            b"\r\nContent-Length: %d\r\n\r\n" % len(body), body,
        ))  # fmt: skip
        self.upstream = connection
        try:
            connection.begin(self, message)
        except ExchangeError as error:
            connection.finished(reusable=False)
            self._hand_over(error)

    # --- from the engine ---

    def received(self, data: bytes) -> None:
        """Bytes of the answer."""
        body = self._body
        if body is None:
            self._begin_answer(self._early + data if self._early else data)
            return
        try:
            out = body.feed(data)
        except http1.ProtocolError as error:
            self._drop_upstream()
            if self._unsent:
                self._send(b"")
            self._break(f"not HTTP: {error}")
            return
        if out and self._flows:
            self._write(out)
        elif out or self._unsent:
            self._send(out)
        if body.done:
            self._end(reusable=not body.excess)
        elif self._protocol._paused and self.upstream is not None:
            self.upstream.pause()

    def _begin_answer(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n", 0, http1.HEAD_LIMIT)
        if end < 0 and len(data) < http1.HEAD_LIMIT:
            self._early = data
            return
        try:
            reply, length = self._front.reply(data, end) if end >= 0 else (None, 0)
        except http1.ProtocolError:
            reply = None
        if reply is None:
            self._hand_over(None, data)
            return
        self._early = self._data = b""
        self._reply = reply
        head = self._head(reply, length)
        there = len(data) - end - 4
        if there == length and self._admission is None and length > 0:  # nearly every answer
            self._size = length
            self._first_byte_at = time.perf_counter()
            self._write(head + data[end + 4 :])
            self._end(reusable=True)
            return
        self._begin_body(reply, length, head, data[end + 4 :])

    def _head(self, reply: _Reply, length: int) -> bytes:
        """The head of the answer to the client."""
        own, beginning = b"", reply.head
        admission = self._admission
        if admission is not None and (limits := admission.limits()):
            own = b"".join(b"\r\n%b: %b" % (name.encode(), value.encode()) for name, value in limits.items())
            beginning = reply.head_without(frozenset(name.encode() for name in limits))
        self._closing = self._shape.closes or self._front.traffic.stopping
        return b"".join((
            beginning, self._lease.instance_id.encode(), _OWN, self._request_id.encode("ascii"), own, b"\r\ndate: ",
            date(), reply.framing, b"%d" % length if reply.sized else b"",
            b"\r\nconnection: close\r\n\r\n" if self._closing else b"\r\n\r\n",
        ))  # fmt: skip

    def _begin_body(self, reply: _Reply, length: int, head: bytes, data: bytes) -> None:
        """What does not come in one piece, or is counted."""
        kind = http1.SizedBody if reply.sized else http1.ChunkedBody
        self._body = kind(length, framed=not reply.sized, drop_trailer=NOT_TO_CLIENT)
        if self._admission is not None and self._admission.holder.meter is not None:
            self._watch = watched(_nothing_more, self._admission.holder.meter, framed=not reply.sized)
        self._unsent = head
        self.received(data)

    def _send(self, out: bytes) -> None:
        if out:
            if self._first_byte_at is None:
                self._first_byte_at = time.perf_counter()
            if self._watch is not None:
                self._watch(out)
            else:
                self._flows = True
        if self._unsent:
            out, self._unsent = self._unsent + out, b""
        self._write(out)

    def _write(self, data: bytes) -> None:
        # Between a reset and the word of it the transport is closed, and uvloop's raises.
        if not self._transport.is_closing():
            self._transport.write(data)

    def lost(self, error: Exception | None) -> None:
        """The engine's connection has ended."""
        connection, self.upstream = self.upstream, None
        if self._body is not None:
            if error is None:
                try:
                    self._body.close()
                except http1.ProtocolError as problem:
                    self._break(str(problem))
            else:
                self._break(f"the connection broke: {error}")
            return
        assert connection is not None  # noqa: S101 - it was this one's
        exchange = Exchange("POST", connection)
        if self._early:
            exchange.received(self._early)
        exchange.lost(error)
        self._hand(exchange)

    def failed(self, error: ExchangeError) -> None:
        """The engine's connection was ended from here."""
        if self._body is not None:
            self.upstream = None
            self._break(str(error))
        else:
            self._hand_over(error)

    # --- its end ---

    def _drop_upstream(self) -> None:
        connection, self.upstream = self.upstream, None
        if connection is not None:
            connection.finished(reusable=False)

    def _end(self, *, reusable: bool) -> None:
        """The whole answer is out."""
        connection, self.upstream = self.upstream, None
        reply = self._reply
        if connection is not None and reply is not None:
            connection.finished(reusable=reusable and reply.keeps_alive)
        self._lease.release()
        self._account()
        self._protocol.served(close=self._closing)

    def _break(self, reason: str) -> None:
        """The engine broke off: the client must not take what it has for the whole."""
        self._broken = reason
        self._account()
        self._front.spawn(self._suspect(), "suspect")
        self._protocol.served(close=True)

    async def _suspect(self) -> None:
        try:
            await self._lease.suspect()
        finally:
            self._lease.release()

    def left(self) -> None:
        """The client has left."""
        self._drop_upstream()
        self._lease.release()
        self._account()
        self._front.traffic.leave()

    def _hand_over(self, error: ExchangeError | None, data: bytes = b"") -> None:
        """Go on above aiohttp's server, with what came of an answer, or with what went wrong before."""
        connection, self.upstream = self.upstream, None
        exchange = Exchange("POST", connection)
        if error is not None:
            exchange.failed(error)
        elif connection is not None:
            connection.hand_to(exchange)
            exchange.received(data)
        self._hand(exchange)

    def _hand(self, exchange: Exchange) -> None:
        if self._protocol.transport is None:  # closed from here, and not told of it yet
            exchange.close()
            self._protocol.passage = None
            self.left()
            return
        self._front.traffic.leave()
        begun = Begun(self._lease, exchange, self._began)
        self._protocol.hand_on(Handed(self._request_id, begun, self._admission), self._data)

    def _account(self) -> None:
        reply = self._reply
        status = reply.status if reply is not None else 499
        first_byte_s = self._first_byte_at - self._began if self._first_byte_at is not None else None
        metrics = self._front.metrics
        metrics.count_request(self._address.model, status)
        if first_byte_s is not None and status < 400:
            metrics.observe_ttft(self._address.model, "ready", first_byte_s)
        admission = self._admission
        if admission is not None:
            admission.end(status if reply is not None else 0)
        if log.isEnabledFor(logging.INFO):
            self._tell(status, first_byte_s)

    def _tell(self, status: int, first_byte_s: float | None) -> None:
        facts: dict[str, Any] = {
            "request_id": self._request_id,
            "path": self._shape.match.target,
            "key": self._admission.holder.name if self._admission is not None else None,
            "model": self._address.model,
            "status": status,
            "instance": self._lease.instance_id,
            "first_byte_s": first_byte_s,
            "total_s": time.perf_counter() - self._began,
            "size": self._body.payload_bytes if self._body is not None else self._size,
            "broken": self._broken,
        }
        lines = lines_of_requests()
        if lines is not None:
            lines.add(told_in_short(**facts))
        else:
            tell(told(method="POST", tier="ready", **facts))


def _nothing_more(_: bytes) -> bool:
    return False


class FrontProtocol(GuardedProtocol):
    """A connection of a client, served by `Front` as long as what comes is ordinary."""

    __slots__ = ("_behind", "_front", "_held", "_held_since", "_holds", "handed", "passage", "shape", "shape_head")

    def __init__(self, front: Front, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._front = front
        self.passage: Passage | None = None
        """What is under way here."""
        self.handed: Handed | None = None
        """What is under way of the request that aiohttp has."""
        self.shape_head = b""
        self.shape: Shape | None = None
        """That of the last head: clients send the same one again and again."""
        self._held = b""
        """A request whose body is still to come."""
        self._held_since: float | None = None
        self._holds = 0
        self._behind = b""
        """What came while another request was served."""

    def connection_lost(self, exc: BaseException | None) -> None:
        """Nobody is there any more for what is under way."""
        passage, self.passage = self.passage, None
        if passage is not None:
            passage.left()
        self._held = self._behind = b""
        super().connection_lost(exc)
        self._let_go()

    def _let_go(self) -> None:
        handed, self.handed = self.handed, None
        if handed is not None:
            handed.close()

    def data_received(self, data: bytes) -> None:
        """Serve it, or have aiohttp's server see to it."""
        if self.passage is not None:
            self._behind += data
            if len(self._behind) > _BEHIND and self.transport is not None:
                self.transport.pause_reading()
            return
        if self._held:
            data, self._held = self._held + data, b""
        # aiohttp's side waits for the next request, and has not seen a part of it.
        elif (
            (waiter := self._waiter) is None
            or waiter.done()
            or self._head_began is not None
            or self._body is not None
            or self.transport is None
        ):
            super().data_received(data)
            return
        served = self._front.looked_at(self, data)
        if served:
            if self._held_since is not None:
                self._held_since, self._holds = None, 0
                self._doors.has_paid(self)
        elif served is None and self._holds < _HOLDS:
            self._holds += 1
            self._held = data
            if self._held_since is None:
                self._held_since = self._loop.time()
                self._doors.owes(self)
        else:
            self._pass_up(data)

    def _pass_up(self, data: bytes) -> None:
        """To aiohttp's server, which has seen nothing of this request."""
        since, self._held_since = self._held_since, None
        self._holds = 0
        super().data_received(data)
        if since is not None and self._body is not None:
            self._body_began = since

    def look(self, now: float) -> None:
        """A body that lets others wait is aiohttp's."""
        if self._held:
            data, self._held = self._held, b""
            self._pass_up(data)
        super().look(now)

    def hand_on(self, handed: Handed, data: bytes) -> None:
        """The request under way is nothing ordinary after all."""
        self.passage = None
        self.handed = handed
        data += self._take_behind()
        super().data_received(data)

    def served(self, *, close: bool) -> None:
        """The request under way is answered; `close`: it was the last one."""
        self.passage = None
        self._front.traffic.leave()
        if close or (self._half_closed and not self._behind):
            self.force_close()
            return
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        if self._behind:
            self.data_received(self._take_behind())
            if self._half_closed and not self._is_owed_an_answer():
                self.force_close()

    def _is_owed_an_answer(self) -> bool:
        return self.passage is not None or super()._is_owed_an_answer()

    def _has_begun_to_answer(self) -> bool:
        return not self.passage.is_unanswered if self.passage is not None else super()._has_begun_to_answer()

    def _may_be_asked(self) -> bool:
        return self.passage.is_unanswered if self.passage is not None else super()._may_be_asked()

    def _take_behind(self) -> bytes:
        data, self._behind = self._behind, b""
        if len(data) > _BEHIND and self.transport is not None:
            self.transport.resume_reading()
        return data

    def _process_keepalive(self) -> None:
        """Not while a request is served that aiohttp knows nothing of."""
        if self.passage is not None:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the end of an answer; what was handed on with its request is over."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._let_go()

    def pause_writing(self) -> None:
        """The client takes less than there is for it: its engine has to wait."""
        super().pause_writing()
        if self.passage is not None and self.passage.upstream is not None:
            self.passage.upstream.pause()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self.passage is not None and self.passage.upstream is not None:
            self.passage.upstream.resume()
