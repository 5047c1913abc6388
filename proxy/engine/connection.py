"""Connections to one engine, and the exchanges on them: bytes go from transport to transport.

An HTTP client of its own, because a stream's event costs no more here than a call of `data_received` and a write. It
keeps few promises, all of them needed: answers are read strictly, an exchange ends its connection unless everything
was as it should be, reading stops while the other side is slow, and `disconnect` leaves no connection open.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Final, Protocol, cast
from urllib.parse import urlsplit

from proxy.engine import http1

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Sink = Callable[[bytes], bool]
    """Takes bytes of the answer; True says that it has enough for now."""

log = logging.getLogger("warmpool.upstream")

# uvicorn, vLLM's server, drops idle connections after 5 s: let go of them first.
_KEPT_S: Final = 3.0
_CONNECT_S: Final = 5.0
_LOOK_S: Final = 1.0
_LOOKS: Final = 8
"""An engine's silence is noticed by looking this often in the time that it may take."""
_EARLY_BYTES: Final = 256 << 10
"""How much of a body is taken in before anybody asked for it."""
_COPIED_BYTES: Final = 256 << 10
"""A body up to this size goes in one piece with its head."""
_INFORMATIONAL: Final = 8
"""Answers 1xx that may come before the final one."""
_CLOSE_S: Final = 5.0
"""How long `disconnect` waits for transports that were aborted, which takes a turn or two of the event loop."""
_DISCONNECTED: Final = "the engine was disconnected"


class ExchangeError(Exception):
    """The engine could not be reached, or broke off, or broke the protocol; says which."""


class SilenceError(ExchangeError):
    """The engine said nothing for as long as it may take."""


class Receiver(Protocol):
    """Who has a connection and gets what comes on it; called by the connection only."""

    def received(self, data: bytes, /) -> None:
        """Bytes came."""

    def lost(self, error: Exception | None, /) -> None:
        """The connection is closed, and no more the receiver's; `error` when it was not in order."""

    def failed(self, error: ExchangeError, /) -> None:
        """The connection was ended, and is no more the receiver's."""


class Upstream:
    """The connections to the engine at `base_url` ("http://host:port").

    `silence_s`: how long an exchange may go without a byte; None is for ever. `api_key`: the engine's own, shown to it
    with every request.
    """

    def __init__(self, base_url: str, silence_s: float | None, api_key: str | None = None) -> None:
        self._silence_s = silence_s
        self._key_field = b"" if api_key is None else b"Authorization: Bearer %b\r\n" % api_key.encode("ascii")
        self._look_s = _LOOK_S if silence_s is None else min(_LOOK_S, silence_s / _LOOKS)
        self._idle: dict[Connection, None] = {}
        """The last one given back comes last."""
        self._open: set[Connection] = set()
        self._connecting: set[asyncio.Timeout] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.silent_s = 0.0
        """For how long no exchange has brought a byte, though at least one is under way; at most a second behind."""
        self.generation = 0
        """Counts disconnects: a connection of an older one has no right to be."""
        self._point_at(base_url)

    def _point_at(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self.base_url = base_url
        self._host, self._port = parts.hostname or "", parts.port or 80
        self.authority = parts.netloc.encode("ascii")
        self.own_fields = b"Host: %b\r\n%b" % (self.authority, self._key_field)

    def move(self, base_url: str) -> None:
        """The engine is at another address from now on; what is open to the old one ends after its exchange."""
        if base_url == self.base_url:
            return
        self._point_at(base_url)
        for connection in self._open:
            connection.keep = False
        for connection in [*self._idle]:
            connection.abort()

    @property
    def connections(self) -> int:
        """How many are open, idle ones among them."""
        return len(self._open)

    def kept(self) -> Connection | None:
        """A connection that is open and idle, if there is one; it is the caller's now, who begins with it at once."""
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.keep:
                return connection
        return None

    async def exchange(
        self, method: str, target: str, fields: Sequence[tuple[bytes, bytes]], body: bytes | None
    ) -> Exchange:
        """Send a request; the exchange once the head of its answer is there.

        `Host`, `Content-Length` and the engine's key are set here, every other field as given. Raises ExchangeError;
        the exchange is closed then. Cancelling closes it too.
        """
        connection = self.kept() or await self.connect()
        exchange = Exchange(method, connection)
        head = [f"{method} {target} HTTP/1.1\r\n".encode("ascii"), self.own_fields]
        head += [b"%b: %b\r\n" % field for field in fields]
        if body is not None:
            head.append(b"Content-Length: %d\r\n" % len(body))
        head.append(b"\r\n")
        message = b"".join(head)
        try:
            if body is not None and len(body) > _COPIED_BYTES:
                connection.begin(exchange, message, body)
            else:
                connection.begin(exchange, message + body if body else message)
            await exchange.answered()
        except BaseException:
            exchange.close()
            raise
        return exchange

    async def connect(self) -> Connection:
        """A new connection, for the caller to begin with. Raises ExchangeError."""
        # Its own scope, so that disconnect() can end it.
        scope = asyncio.timeout(_CONNECT_S)
        generation = self.generation
        connection, connected = Connection(self), False
        try:
            async with scope:
                self._connecting.add(scope)
                await asyncio.get_running_loop().create_connection(lambda: connection, self._host, self._port)
        except TimeoutError as error:
            if generation != self.generation:
                raise ExchangeError(_DISCONNECTED) from None
            raise SilenceError(f"no connection to the engine within {_CONNECT_S:g} s") from error
        except OSError as error:
            raise ExchangeError(f"cannot connect: {error.strerror or error}") from error
        else:
            connected = True
        finally:
            self._connecting.discard(scope)
            if not connected:
                # uvloop closes the transport of a connect that is cancelled, and never calls connection_lost.
                connection.connection_lost(None)
        return connection

    async def disconnect(self) -> None:
        """Close every connection; exchanges under way fail. Returns when none is left, in any case after 5 s."""
        self.generation += 1
        for scope in [*self._connecting]:
            scope.reschedule(0)
        closing = [*self._open]
        self.give_up(ExchangeError(_DISCONNECTED))
        if closing:
            await asyncio.wait([connection.closed for connection in closing], timeout=_CLOSE_S)
        if overdue := [connection for connection in closing if not connection.closed.done()]:
            log.error("%s: %d connections did not close in %g s", self.base_url, len(overdue), _CLOSE_S)
            for connection in overdue:
                connection.connection_lost(None)
        if self._timer is not None and not self._open:
            self._timer.cancel()
            self._timer = None

    def give_up(self, error: ExchangeError) -> None:
        """End every exchange under way with an error, and every connection."""
        self.silent_s = 0.0
        for connection in [*self._open]:
            connection.fail(error)

    # --- what connections tell ---

    def opened(self, connection: Connection) -> None:
        """A connection is made."""
        self._open.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def lost(self, connection: Connection) -> None:
        """A connection is closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def returned(self, connection: Connection) -> None:
        """A connection may serve again."""
        self._idle[connection] = None

    def _look(self) -> None:
        """End exchanges whose engine has been silent for too long, and connections that nobody needed."""
        self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look) if self._open else None
        awaited = any(connection.awaited for connection in self._open)
        spoke = sum(connection.has_spoken() for connection in self._open) > 0
        self.silent_s = self.silent_s + self._look_s if awaited and not spoke else 0.0
        for connection in [*self._open]:
            connection.looked_at(self._look_s, self._silence_s)


class Connection(asyncio.Protocol):
    """One connection, with who has it."""

    __slots__ = (
        "_generation", "_heard", "_quiet_s", "_reading", "_receiver", "_sending", "_spoke", "_transport", "_upstream",
        "closed", "keep",
    )  # fmt: skip

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._generation = upstream.generation
        self._transport: asyncio.Transport
        self._receiver: Receiver | None = None
        self._heard = False
        self._spoke = False
        self._quiet_s = 0.0
        self._reading = True
        self._sending = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.keep = True
        """It may serve another exchange after this one."""

    # --- from the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self.closed.done():  # given up in the moment in which it was made
            self._transport.abort()
            return
        # Acknowledge an answer's pieces two by two; one by one would cost a tenth of passing an event on. Not for good
        # (tcp(7)), and a connection that has served before does so by itself.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        self._upstream.opened(self)
        if self._generation != self._upstream.generation:
            self.abort()

    def data_received(self, data: bytes) -> None:
        self._heard = self._spoke = True
        receiver = self._receiver
        if receiver is None:
            self.abort()  # nobody asked
        else:
            receiver.received(data)

    def pause_writing(self) -> None:
        self._sending = True

    def resume_writing(self) -> None:
        self._sending = False

    def connection_lost(self, error: Exception | None) -> None:
        if self.closed.done():
            return
        self._upstream.lost(self)
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.lost(error)
        self.closed.set_result(None)

    # --- from the receiver and the upstream ---

    def begin(self, receiver: Receiver, message: bytes, body: bytes = b"") -> None:
        """Send a request, whose answer is the receiver's; `body`: one too large to copy it. Raises ExchangeError."""
        if self._transport.is_closing():
            raise ExchangeError("the connection ended")
        self._receiver = receiver
        self._heard, self._quiet_s = True, 0.0
        self._transport.write(message)
        if body:
            self._transport.write(body)

    def hand_to(self, receiver: Receiver) -> None:
        """Another one has it from now on."""
        self._receiver = receiver

    def finished(self, *, reusable: bool) -> None:
        """The exchange is over; everything belonging to it has come, or it was given up."""
        self._receiver = None
        if not self._reading:
            self.resume()
        self._quiet_s = 0.0
        # An answer that came before its request was sent leaves a rest that would be read as the next request.
        if reusable and self.keep and not self._sending and not self._transport.is_closing():
            self._upstream.returned(self)
        else:
            self.abort()

    def fail(self, error: ExchangeError) -> None:
        """End it, and the exchange with this error."""
        receiver, self._receiver = self._receiver, None
        self.abort()
        if receiver is not None:
            receiver.failed(error)

    def abort(self) -> None:
        """Close it now."""
        self.keep = False
        self._transport.abort()

    def pause(self) -> None:
        """Stop reading, which in the end stops the engine from writing."""
        if self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        """Go on reading."""
        if not self._reading:
            self._reading = True
            self._heard = True
            if not self._transport.is_closing():
                self._transport.resume_reading()

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for bytes of the engine's, and would take them."""
        return self._receiver is not None and self._reading

    def has_spoken(self) -> bool:
        """Whether bytes came since this was asked last."""
        spoke, self._spoke = self._spoke, False
        return spoke

    def looked_at(self, since_s: float, silence_s: float | None) -> None:
        """Called every `since_s`."""
        if self._heard or not self._reading:
            self._heard, self._quiet_s = False, 0.0
            return
        self._quiet_s += since_s
        if self._receiver is None:
            if self._quiet_s >= _KEPT_S:
                self.abort()
        elif silence_s is not None and self._quiet_s >= silence_s:
            self.fail(SilenceError(f"the engine was silent for {silence_s:g} s"))


class Exchange:
    """One request and its answer. Whoever has it calls `close` in the end, whatever happened."""

    __slots__ = (
        "_body", "_connection", "_early", "_ended", "_head", "_method", "_sink", "_skipped", "_waiter", "failure",
    )  # fmt: skip

    def __init__(self, method: str, connection: Connection | None) -> None:
        """`connection`: None where it is lost already; `lost` or `failed` says so next."""
        self._method = method
        self._connection = connection
        """None as soon as it is no longer this exchange's."""
        self._early = b""
        """What came before anybody asked for it."""
        self._ended = False
        """The connection ended in order while nobody asked for the body."""
        self._waiter: asyncio.Future[None] | None = None
        self._head: http1.Head | None = None
        self._body: http1.Body | None = None
        self._sink: Sink | None = None
        self._skipped = 0
        self.failure: ExchangeError | None = None

    # --- for the one who asked ---

    @property
    def head(self) -> http1.Head:
        """Status and header fields; there as soon as `Upstream.exchange` has returned."""
        assert self._head is not None  # noqa: S101
        return self._head

    @property
    def payload_bytes(self) -> int:
        """How much of the body has come."""
        return self._body.payload_bytes if self._body is not None else 0

    @property
    def between_chunks(self) -> bool:
        """Whether a chunk of somebody else may go behind what was given on of the body."""
        return self._body is not None and self._body.between

    def start(self, *, framed: bool, drop_trailer: frozenset[bytes] = frozenset()) -> tuple[bytes, bool]:
        """What of the body is there already, and whether it is all of it.

        `framed`: the body is given on in the chunked coding. Raises ExchangeError when there is none and never will be.
        """
        self._body = http1.body_of(self.head, framed=framed, drop_trailer=drop_trailer)
        first = self._body.begin() + self._caught_up(self._body)
        if self.failure is not None and not first:
            raise self.failure
        return first, self._body.done

    async def pass_on(self, sink: Sink, drain: Callable[[], Awaitable[None]]) -> None:
        """Give what comes to `sink` until the end of the body.

        When the sink has enough, nothing is read from the engine until `drain` returns. Raises ExchangeError.
        """
        body = self._body
        assert body is not None  # noqa: S101 - start() comes first
        self._sink = sink
        out = self._caught_up(body)
        enough = bool(out) and sink(out)
        while not body.done:
            if self.failure is not None:
                raise self.failure
            if enough and self._connection is not None:
                self._connection.pause()
                await drain()
            elif self._connection is not None:
                self._connection.resume()
                await self._wait()
            else:
                raise ExchangeError("the exchange was closed")
            # What wakes this up is an end, a failure, or a sink that has enough; to drain when it has not does no harm.
            enough = not enough

    async def read(self, most: int) -> bytes:
        """The whole body, when it is not longer than `most` bytes. Raises ExchangeError."""
        first, _ = self.start(framed=False)
        pieces = [first]

        def take(data: bytes) -> bool:
            pieces.append(data)
            if self.payload_bytes > most:
                self._let_go(reusable=False)
                self.failed(ExchangeError(f"an answer of more than {most} bytes"))
            return False

        async def drain() -> None:
            return

        await self.pass_on(take, drain)
        return b"".join(pieces)

    def close(self) -> None:
        """End the exchange; its connection with it, unless the answer was there in full."""
        self._sink = None
        self._let_go(reusable=False)

    # --- inside ---

    async def answered(self) -> None:
        """Return when the head is there. Raises ExchangeError."""
        if self._head is None and self.failure is None:
            await self._wait()
        if self.failure is not None:
            raise self.failure

    async def _wait(self) -> None:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _let_go(self, *, reusable: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.finished(reusable=reusable)

    def _caught_up(self, body: http1.Body) -> bytes:
        """What is to be given on of what came while nobody asked."""
        early, self._early = self._early, b""
        out = self._fed(body, early) if early or body.done else b""
        if self._ended and not body.done and self.failure is None:
            out += self._closed(body)
        return out

    def _fed(self, body: http1.Body, data: bytes) -> bytes:
        try:
            out = body.feed(data) if data else b""
        except http1.ProtocolError as error:
            self._broke(error)
            return b""
        if body.done:
            self._let_go(reusable=self.head.keeps_alive and not body.excess)
        return out

    def _closed(self, body: http1.Body) -> bytes:
        try:
            return body.close()
        except http1.ProtocolError as error:
            self.failed(ExchangeError(str(error)))
            return b""

    def _broke(self, error: http1.ProtocolError) -> None:
        self._let_go(reusable=False)
        self.failed(ExchangeError(f"not HTTP: {error}"))

    # --- from the connection ---

    def received(self, data: bytes) -> None:
        """Bytes came."""
        sink, body = self._sink, self._body
        if sink is not None and body is not None:
            try:
                out = body.feed(data)
            except http1.ProtocolError as error:
                self._broke(error)
                return
            enough = bool(out) and sink(out)
            if body.done:
                self._let_go(reusable=self.head.keeps_alive and not body.excess)
                self._wake()
            elif enough and self._connection is not None:
                self._connection.pause()
                self._wake()
            return
        self._early = self._early + data if self._early else data
        if self._head is None:
            try:
                self._read_head()
            except http1.ProtocolError as error:
                self._broke(error)
        if len(self._early) > _EARLY_BYTES and self._connection is not None:
            self._connection.pause()

    def _read_head(self) -> None:
        while (end := http1.head_end(self._early)) > 0:
            head = http1.parse_head(self._early[:end], self._method)
            self._early = self._early[end:]
            if head.status >= 200:
                self._head = head
                self._wake()
                return
            self._skipped += 1
            if head.status == 101 or self._skipped > _INFORMATIONAL:
                raise http1.ProtocolError(f"an answer {head.status} that nobody asked for")

    def lost(self, error: Exception | None) -> None:
        """The connection is closed; `error` when it was not in order."""
        self._connection = None
        if self._head is None:
            self.failed(ExchangeError(f"the connection ended before an answer{f': {error}' if error else ''}"))
        elif error is not None:
            self.failed(ExchangeError(f"the connection broke: {error}"))
        elif self._body is None or self._sink is None:
            self._ended = True
        else:
            if out := self._closed(self._body):
                self._sink(out)
            self._wake()

    def failed(self, error: ExchangeError) -> None:
        """It ends with an error."""
        self._connection = None
        self.failure = self.failure or error
        self._wake()
