"""A client's connection: every request on it is read here, one after the other, and served by a `RequestCycle`.

Requests of operators, and WebSockets, are aiohttp's: once one comes, checked like any other and read whole, the rest of
the connection is. Its protocol then gets what this one gets, instead of the transport (`set_protocol`): so limits,
counts and deadlines stay in one place.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from typing import TYPE_CHECKING, Final, cast

from proxy.engine import http1
from proxy.errors import BodyTooLargeError, InvalidRequestError, SlowUploadError, envelope
from proxy.server.aiohttp_server import as_one_request
from proxy.server.auth.authorization import Kind
from proxy.server.connection_limits import counted_by
from proxy.server.connection_timers import IdleTimer, Late, WriteStall, missed
from proxy.server.flow_control import STEP, ReadFlow
from proxy.server.forward.cycle import RequestCycle
from proxy.server.half_closed import HalfClosed, may_wait
from proxy.server.http_answer import CONTINUE, JSON, whole_answer
from proxy.server.http_request import BadRequestError, HeadReader, RequestHead, too_large_together, usual_parts
from proxy.server.request_body import NOT_AS_SAID, RequestBody
from proxy.server.tls import names_in

if TYPE_CHECKING:
    from proxy.errors import RequestError
    from proxy.server.service import Service

_READ_AHEAD: Final = 64 << 10
"""How much of the next requests is read while one is served."""
_REQUESTS_A_TURN: Final = 16
"""Of those that came at once; then others are served."""
_RESET: Final = struct.pack("ii", 1, 0)
"""Lingering for 0 s makes a reset of a close (socket(7))."""


class _Reading(enum.Enum):
    """What comes next from the client."""

    HEAD = enum.auto()
    BODY = enum.auto()
    UNWANTED = enum.auto()
    """The rest of a body whose request was answered."""
    NOTHING = enum.auto()
    """A request is served; what comes has to wait."""


_HEAD: Final = _Reading.HEAD
_NOTHING: Final = _Reading.NOTHING
"""By these names for every request: Python 3.11 takes longer for a member of an enumeration than for a call."""


class ClientConnection(asyncio.Protocol):
    """One connection, from its first byte to its last."""

    __slots__ = (
        "_advancing", "_aiohttp", "_at", "_body", "_buffer", "_counted_by", "_ends", "_flow", "_half_closed",
        "_head_began", "_head_reader", "_idle", "_known", "_loop", "_reading", "_refused", "_stall",
        "cycle", "host", "peers", "service", "transport", "write_paused",
    )  # fmt: skip

    def __init__(self, service: Service, *, from_peer: bool = False) -> None:
        self.service = service
        self.transport: asyncio.Transport | None = None
        self.host: str | None = None
        """The client's address."""
        self.peers: frozenset[str] | None = frozenset() if from_peer else None
        """On the listener for other hosts: the names in the certificate that was shown."""
        self._loop = asyncio.get_running_loop()
        self._counted_by: str | None = None
        self._refused = False
        """There was no place for it."""
        self._ends = False
        """Nothing more is served on it."""
        self._buffer = b""
        self._at = 0
        """How much of the buffer is read."""
        self._advancing = False
        self._reading = _Reading.HEAD
        self._head_reader: HeadReader | None = None
        self._head_began: float | None = None
        self._known: RequestHead | None = None
        """The last head: clients send the same one again and again."""
        self._body: RequestBody | None = None
        self.cycle: RequestCycle | None = None
        """The request that it has now."""
        self._aiohttp: asyncio.Protocol | None = None
        self._half_closed: HalfClosed | None = None
        """The client sends no more."""
        self._idle: IdleTimer | None = None
        self.write_paused = False
        """The client takes less than there is for it."""
        self._stall: WriteStall | None = None

    # --- coming and going ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it in, or turn it away."""
        self.transport = cast("asyncio.Transport", transport)
        self._flow = ReadFlow(self.transport)
        service = self.service
        peer = transport.get_extra_info("peername")
        self.host = peer[0] if isinstance(peer, tuple) else None
        self._counted_by = counted_by(self.host)
        if self.peers is not None:
            self.peers = names_in(transport.get_extra_info("peercert"))
        service.came(self)
        reason = service.limits.enter(self._counted_by)
        if reason is not None:
            self._refused = True
            self._note(reason, f"a connection over server.limits.{reason}")
            self._end_with(503, "Too many connections; try again later.", "too_many_connections")
            return
        if (connected := transport.get_extra_info("socket")) is not None and self.host is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._idle = IdleTimer(service.limits.limits.idle_timeout, self._is_idle, self.close)

    def connection_lost(self, error: Exception | None) -> None:
        """Nobody is there any more for what is under way."""
        service = self.service
        transport, self.transport = self.transport, None
        service.went(self)
        if not self._refused:
            service.limits.leave(self._counted_by)
        service.limits.unwatch(self)
        if self._idle is not None:
            self._idle.stop()
        self._buffer = b""
        cycle, self.cycle = self.cycle, None
        if self._aiohttp is not None:
            self._aiohttp.connection_lost(error)
            if transport is not None:
                service.aiohttp.cycles.pop(transport, None)
        if cycle is not None:
            cycle.left()
            service.traffic.leave()

    def close(self) -> None:
        """End it, after what was written."""
        if self.transport is not None:
            self.transport.close()

    def end(self) -> None:
        """The server ends: end it, unless aiohttp's server does."""
        if self._aiohttp is None:
            self.close()

    def abort(self) -> None:
        """End it now."""
        if self.transport is not None:
            self.transport.abort()

    def break_off(self, *, with_reset: bool) -> None:
        """End it so that the client cannot take what it has for the whole answer.

        What was written still goes out, and a missing last chunk or bytes tell the rest; but HTTP/1.0 ends a body by
        closing, so there only a reset is a failure.
        """
        if self.cycle is not None:
            self.cycle = None
            self.service.traffic.leave()
        self._buffer, self._body, self._reading = b"", None, _Reading.NOTHING
        if with_reset and self.transport is not None:
            _reset(self.transport)
        else:
            self.close()

    def _is_idle(self) -> bool:
        return self.cycle is None and self._reading is _HEAD and self._head_began is None

    # --- what comes in ---

    def data_received(self, data: bytes) -> None:
        """Read it, as far as it is its turn."""
        if self._aiohttp is not None:
            self._aiohttp.data_received(data)
            return
        if self._refused:
            return
        self._buffer = self._buffer[self._at :] + data if self._buffer else data
        self._at = 0
        if len(data) >= STEP:
            self._flow.give_way()
        if not self._advancing:
            self._advance()

    def _advance(self) -> None:
        """Read what can be read now."""
        self._advancing = True
        try:
            for _ in range(_REQUESTS_A_TURN):
                if self._reading is _HEAD:
                    if not self._read_head():
                        break
                elif self._reading is _NOTHING:
                    break
                else:
                    self._read_body()
                if self._at >= len(self._buffer) or self._is_closed():
                    break
            else:
                self._loop.call_soon(self._go_on)
                return
        finally:
            self._advancing = False
        if self._at < len(self._buffer) or self._half_closed is not None or self._flow.is_held:
            self._settle()
        else:  # nearly always
            self._buffer, self._at = b"", 0

    def _go_on(self) -> None:
        if self._advancing or self._aiohttp is not None:
            return
        if self._buffer and not self._is_closed():
            self._advance()
        else:
            self._settle()

    def _is_closed(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def _settle(self) -> None:
        """Nothing more can be read for now."""
        if self._at >= len(self._buffer):
            self._buffer, self._at = b"", 0
        if self.transport is None:
            return
        if self._reading is _NOTHING and len(self._buffer) - self._at > _READ_AHEAD:
            self._flow.hold()
        elif self._flow.is_held:
            self._flow.release()
        if self._half_closed and self.cycle is None and self._aiohttp is None and not self._buffer:
            self.close()

    def _read_head(self) -> bool:
        """Read one and have its request served; whether more can be read then."""
        most = self.service.limits.most_head
        data, at, known = self._buffer, self._at, self._known
        if self._head_reader is None:
            if known is not None and (again := known.again(data, at)) is not None:
                self._serve(known, again[1], again[0])
                return True
            while data.startswith(b"\r\n", at):  # RFC 9112, 2.2
                at += 2
            self._at = at
            if at == len(data):
                return True
        parts = usual_parts(data, at, most + 4)
        try:
            if parts is None:
                self._read_part_of_head(data, at, most)
                return False
            key, begin, length = parts
            place = self.transport.get_extra_info("sockname") if self.transport is not None else None
            head = self._known = self.service.request_heads.read(place, key, self._head_reader, data[at:begin])
        except BadRequestError as error:
            self._note(error.reason, f"a malformed request ({error.status} {error.code}, {error.message})")
            self._end_with(error.status, error.message, error.code)
            return False
        if self._head_began is not None:
            self._head_began = None
            self.service.limits.unwatch(self)
        self._serve(head, head.length if length < 0 else length, begin)
        return True

    def _read_part_of_head(self, data: bytes, at: int, most: int) -> None:
        """What cannot become a head is refused before its end has come. Raises BadRequestError."""
        if len(data) - at > most:
            raise too_large_together()
        if self._head_reader is None:
            self._head_reader = HeadReader(self.service.limits.limits)
        self._head_reader.feed_part(data, at)
        if self._head_began is None:
            self._head_began = self._loop.time()
            self.service.limits.watch(self)

    def _serve(self, head: RequestHead, length: int, begin: int) -> None:
        self._head_reader = None
        data = self._buffer
        cycle = self.cycle = RequestCycle(self.service, self, head, length)
        self._reading = _NOTHING
        self.service.traffic.enter()
        end = begin + length
        if length >= 0 and end <= len(data):
            self._at = end
            if cycle.begin():
                cycle.body_came(data[begin:end])
            return
        self._at = begin
        self._body = RequestBody(length, self._loop.time())
        if cycle.begin():
            self._reading = _Reading.BODY
            self.service.limits.watch(self)
            if head.expects and begin == len(data):
                self.write(CONTINUE)

    @property
    def must_end(self) -> bool:
        """The client waits to be told to send a body that nobody will read."""
        cycle, body = self.cycle, self._body
        waits = cycle is not None and body is not None and cycle.head.expects and self._reading is _Reading.NOTHING
        return waits and self._at == len(self._buffer)

    def _read_body(self) -> None:
        body = self._body
        assert body is not None  # noqa: S101 - one is being read
        try:
            self._buffer, self._at = body.feed(self._buffer[self._at :]), 0
        except http1.ProtocolError:
            text = "a request whose body is not framed as its fields say"
            self._end_body(InvalidRequestError(NOT_AS_SAID), "malformed", text)
            return
        cycle = self.cycle
        if self._reading is _Reading.BODY and cycle is not None:
            if body.size > self.service.pool.settings.server.body_limit:
                limit = self.service.pool.settings.server.body_limit
                cycle.refuse(BodyTooLargeError(f"The body is over the limit of {limit} bytes."))
            elif body.done:
                self._body, self._reading = None, _Reading.NOTHING
                cycle.pieces_came(body.pieces(), body.size)
        elif body.done:
            self._body, self._reading = None, _Reading.HEAD
            if self._ends:
                self.close()
            if self._idle is not None:
                self._idle.since = self._loop.time()

    def _end_body(self, error: RequestError, reason: str, text: str) -> None:
        """Refuse a body within it; what still comes is no request."""
        cycle = self.cycle
        self._buffer, self._body = b"", None
        if cycle is None:  # answered already
            self.close()
            return
        self._note(reason, text)
        cycle.refuse(error, closes=True)

    # --- what goes out ---

    def write(self, data: bytes) -> None:
        """Send bytes, unless the client has left."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def finished(self, *, close: bool) -> None:
        """The request is answered; `close`: it was the last one."""
        body = self._body
        if body is not None and self.must_end:
            body = None
        self.cycle = None
        self.service.traffic.leave()
        if close:
            self._ends = True
        if body is not None:  # answered early
            self._reading = _Reading.UNWANTED
            body.drop(self._loop.time())
            self.service.limits.watch(self)
        elif self._ends:
            self._buffer, self._body, self._reading = b"", None, _NOTHING
            self.close()
            return
        else:
            self._body, self._reading = None, _HEAD
            if self._idle is not None:
                self._idle.since = self._loop.time()
        if (self._buffer or self._half_closed) and not self._advancing:
            self._go_on()

    def pause_writing(self) -> None:
        """The client takes less than there is for it: its engine has to wait."""
        self.write_paused = True
        if self.service.limits.limits.stall_timeout is not None and self.transport is not None:
            self._stall = WriteStall(self.transport, self._loop.time())
            self.service.limits.watch(self)
        if self._aiohttp is not None:
            self._aiohttp.pause_writing()
        elif self.cycle is not None:
            self.cycle.pause()

    def resume_writing(self) -> None:
        """It has caught up."""
        self.write_paused = False
        self._stall = None
        if self._aiohttp is not None:
            self._aiohttp.resume_writing()
        elif self.cycle is not None:
            self.cycle.resume()

    def hand_over(self, cycle: RequestCycle, body: bytes) -> None:
        """Have aiohttp's server answer a request, and whatever comes behind it."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        rest, self._buffer, self._at = self._buffer[self._at :], b"", 0
        protocol = self._aiohttp = self.service.aiohttp.protocol()
        self.service.aiohttp.cycles[transport] = cycle
        protocol.connection_made(transport)
        if self.write_paused:
            protocol.pause_writing()
        # Behind a request that is no WebSocket's nothing is served any more.
        protocol.data_received(as_one_request(cycle, body) + (rest if cycle.head.kind is Kind.CLIENT else b""))

    # --- a client that sends no more ---

    def eof_received(self) -> bool:
        """The client sends no more, or has left: FIN says both. Where it may wait for an answer, find out which."""
        if self._reading is not _NOTHING or self.cycle is None or not may_wait(self, self.cycle):
            return False
        if self._half_closed is None and self.transport is not None:
            self._half_closed = HalfClosed(self, self.transport)
        return True

    # --- time ---

    def look(self, now: float) -> None:
        """End what took too long."""
        limits = self.service.limits
        body = self._body if self._reading is not _NOTHING else None
        head_began, stall, wanted = self._head_began, self._stall, self._reading is _Reading.BODY
        if self.transport is None or (head_began is None and body is None and stall is None):
            limits.unwatch(self)
            return
        late = missed(limits.limits, now, head_began=head_began, body=body, wanted=wanted, stall=stall)
        if late is Late.HEAD:
            self._note("slow_headers", "The request's headers took too long.")
            self._end_with(408, "The request's headers took too long.", "request_timeout")
        elif late is Late.BODY:
            error = SlowUploadError("The request's body took too long.")
            self._end_body(error, "slow_body", "a request whose body came too slowly")
        elif late is Late.REST:
            self.close()
        elif late is Late.STALL:
            self._note("stalled", "a connection that takes nothing of its answer")
            limits.unwatch(self)
            self.abort()

    # --- refusing ---

    def _note(self, reason: str, text: str) -> None:
        """Count a refusal; `text` is warmpool's own and quotes nothing."""
        self.service.metrics.refused.labels(reason).inc()
        self.service.auth.refusals.note(self.host, reason, text)

    def _end_with(self, status: int, message: str, code: str) -> None:
        """Answer outside of any request, and close."""
        self._head_began, self._buffer, self._reading = None, b"", _Reading.NOTHING
        self.service.limits.unwatch(self)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        retry = {"Retry-After": "1"} if status == 503 else {}
        self.write(whole_answer(status, {**JSON, **retry}, envelope(message, type_=kind, code=code)))
        self.close()


def _reset(transport: asyncio.Transport) -> None:
    """End a connection so that its client sees a failure."""
    connected = transport.get_extra_info("socket")
    if connected is not None and connected.fileno() >= 0:  # -1: the client has left
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
