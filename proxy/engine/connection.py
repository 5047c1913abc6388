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

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("warmpool.upstream")

# uvicorn, vLLM's server, drops idle connections after 5 s: let go of them first.
_KEPT_S: Final = 3.0
_PEER_KEPT_S: Final = 30.0
"""Of other hosts, with whom it takes a handshake to begin again."""
_LOSS: Final = (
    (socket.SO_KEEPALIVE, socket.SOL_SOCKET, 1),
    (socket.TCP_KEEPIDLE, socket.IPPROTO_TCP, 2),
    (socket.TCP_KEEPINTVL, socket.IPPROTO_TCP, 1),
    (socket.TCP_KEEPCNT, socket.IPPROTO_TCP, 3),
    (socket.TCP_USER_TIMEOUT, socket.IPPROTO_TCP, 5000),
)
"""A host that has gone without a word ends its connections in five seconds: its silence alone may be a long wait."""
_CONNECT_S: Final = 5.0
_PEER_CONNECT_S: Final = 3.0
_LOOK_S: Final = 1.0
_LOOKS: Final = 8
"""An engine's silence is noticed by looking this often in the time that it may take."""
_CLOSE_S: Final = 5.0
"""How long `disconnect` waits for transports that were aborted, which takes a turn or two of the event loop."""
_STEP: Final = 256 << 10
"""How much of a large body is written in one turn of the event loop: what the kernel takes at once holds it up."""
_DISCONNECTED: Final = "the engine was disconnected"
_AT_ONCE: Final = 32
"""So many connections are made at the same time; those who want one more wait until one is made, or comes free."""


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

    def __init__(
        self,
        base_url: str,
        silence_s: float | None,
        api_key: str | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        tls_name: str | None = None,
    ) -> None:
        """`tls`: it is another host, reached over a network, whose certificate has `tls_name`."""
        self.tls = tls
        self._tls_name = tls_name
        self.kept_s = _KEPT_S if tls is None else _PEER_KEPT_S
        self._silence_s = silence_s
        self._key_field = b"" if api_key is None else b"Authorization: Bearer %b\r\n" % api_key.encode("ascii")
        self._look_s = _LOOK_S if silence_s is None else min(_LOOK_S, silence_s / _LOOKS)
        self._idle: dict[Connection, None] = {}
        """The last one given back comes last."""
        self._open: set[Connection] = set()
        self._connecting: set[asyncio.Timeout] = set()
        self._wanting: dict[asyncio.Future[Connection | None], None] = {}
        """Those who wait for a connection that comes free, or for their turn to make one (None), in order."""
        self._timer: asyncio.TimerHandle | None = None
        self.silent_s = 0.0
        """For how long no exchange has brought a byte, though at least one is under way; at most a second behind."""
        self._stands_still = False
        """Nobody expects a byte: the engine's requests are paused."""
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

    async def connect(self) -> Connection:
        """A connection, for the caller to begin with at once: a new one, or one that came free first.

        Where many are wanted at once, as behind a wake, most of those that are made first are free again before the
        others could be made, which costs more than all the rest of a short request. Raises ExchangeError.
        """
        while len(self._connecting) >= _AT_ONCE:
            found = await self._turn()
            if found is None:
                break
            if found.is_usable:
                return found
        return await self._connect()

    async def _turn(self) -> Connection | None:
        wanted: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._wanting[wanted] = None
        try:
            return await wanted
        except asyncio.CancelledError:
            self._wanting.pop(wanted, None)
            if wanted.done() and not wanted.cancelled() and wanted.exception() is None:  # in the same moment
                found = wanted.result()
                if found is None:
                    self._give(None)
                elif found.is_usable:
                    self.returned(found)
            raise

    def _give(self, connection: Connection | None) -> bool:
        """Give the next one who wants a connection this one, or the turn to make one; whether there was anybody."""
        while self._wanting:
            wanted = next(iter(self._wanting))
            del self._wanting[wanted]
            if not wanted.done():
                wanted.set_result(connection)
                return True
        return False

    def _refuse_all(self, error: ExchangeError) -> None:
        """What was found out by one who tried to connect counts for those who wait to try."""
        wanting, self._wanting = self._wanting, {}
        for wanted in wanting:
            if not wanted.done():
                wanted.set_exception(type(error)(*error.args))

    async def _connect(self) -> Connection:
        try:
            connection = await self._connected()
        except ExchangeError as error:
            self._refuse_all(error)
            raise
        finally:
            self._give(None)
        return connection

    async def _connected(self) -> Connection:
        # Its own scope, so that disconnect() can end it.
        limit_s = _CONNECT_S if self.tls is None else _PEER_CONNECT_S
        scope = asyncio.timeout(limit_s)
        generation = self.generation
        connection, connected = Connection(self), False
        try:
            async with scope:
                self._connecting.add(scope)
                await asyncio.get_running_loop().create_connection(
                    lambda: connection, self._host, self._port, ssl=self.tls, server_hostname=self._tls_name
                )
        except TimeoutError as error:
            if generation != self.generation:
                raise ExchangeError(_DISCONNECTED) from None
            raise SilenceError(f"no connection to the engine within {limit_s:g} s") from error
        except OSError as error:  # ssl's errors are among them
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
        self._stands_still = False
        self._refuse_all(ExchangeError(_DISCONNECTED))
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

    def stand_still(self) -> None:
        """The engine's requests are paused: until `go_on` its silence is none."""
        self._stands_still = True
        self.silent_s = 0.0

    def go_on(self) -> None:
        """They are not any more; from now on silence counts again."""
        self._stands_still = False
        for connection in self._open:
            connection.excuse()

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
        if not (self._wanting and self._give(connection)):
            self._idle[connection] = None

    def _look(self) -> None:
        """End exchanges whose engine has been silent for too long, and connections that nobody needed."""
        self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look) if self._open else None
        awaited = any(connection.awaited for connection in self._open)
        spoke = sum(connection.has_spoken() for connection in self._open) > 0
        silent = awaited and not spoke and not self._stands_still
        self.silent_s = self.silent_s + self._look_s if silent else 0.0
        most_s = None if self._stands_still else self._silence_s
        for connection in [*self._open]:
            connection.looked_at(self._look_s, most_s)


def _notice_loss(connected: socket.socket) -> None:
    for option, level, value in _LOSS:
        connected.setsockopt(level, option, value)


class Connection(asyncio.Protocol):
    """One connection, with who has it."""

    __slots__ = (
        "_generation", "_heard", "_quiet_s", "_reading", "_receiver", "_rest", "_sending", "_spoke", "_transport",
        "_upstream", "closed", "keep",
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
        self._rest: memoryview | None = None
        """Of a large body, what is still to be written."""
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
        connected = transport.get_extra_info("socket")
        if self._upstream.tls is None:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        else:
            _notice_loss(connected)
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
        if self._rest is not None:
            asyncio.get_running_loop().call_soon(self._write_rest, self._rest)

    def _write_rest(self, rest: memoryview) -> None:
        """Write a step of it, unless that was done already."""
        if rest is not self._rest or self._sending or self._transport.is_closing():
            return
        self._rest = rest[_STEP:] if len(rest) > _STEP else None
        self._transport.write(rest[:_STEP])
        if self._rest is not None and not self._sending:
            asyncio.get_running_loop().call_soon(self._write_rest, self._rest)

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
        self._heard = True
        self._transport.write(message)
        if body:
            self._rest = memoryview(body)
            self._write_rest(self._rest)

    def finished(self, *, reusable: bool) -> None:
        """The exchange is over; everything belonging to it has come, or it was given up."""
        self._receiver = None
        if not self._reading:
            self.resume()
        # An answer that came before its request was sent leaves a rest that would be read as the next request.
        sent = self._rest is None and not self._sending
        if reusable and self.keep and sent and not self._transport.is_closing():
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
        self.keep, self._rest = False, None
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

    @property
    def is_usable(self) -> bool:
        """Whether it may serve an exchange."""
        return self.keep and not self._transport.is_closing()

    def has_spoken(self) -> bool:
        """Whether bytes came since this was asked last."""
        spoke, self._spoke = self._spoke, False
        return spoke

    def excuse(self) -> None:
        """Its silence up to now does not count."""
        self._heard = True

    def looked_at(self, since_s: float, silence_s: float | None) -> None:
        """Called every `since_s`."""
        if self._heard or not self._reading:
            self._heard, self._quiet_s = False, 0.0
            return
        self._quiet_s += since_s
        if self._receiver is None:
            if self._quiet_s >= self._upstream.kept_s:
                self.abort()
        elif silence_s is not None and self._quiet_s >= silence_s:
            self.fail(SilenceError(f"the engine was silent for {silence_s:g} s"))
