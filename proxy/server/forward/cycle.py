"""One request through: who asks, for which model, a lease, an engine, and its answer back.

Nothing here awaits where nothing has to: what finds its instance ready and its body whole goes from the client's
connection to the engine's in one call. What has to wait, for a wake, in a queue, for a large body, to connect, waits in
one task. A client that leaves ends all of it at once. Until a byte of an answer is out, an error is an answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from proxy.engine.connection import ExchangeError, SilenceError
from proxy.errors import RequestCancelledError, RequestError, UpstreamError
from proxy.server import request_id
from proxy.server.auth.authorization import Kind
from proxy.server.forward import access_log, fallback, leasing, near, preparation, routes
from proxy.server.forward.answer import EngineAnswer
from proxy.server.forward.scanner import LARGE
from proxy.server.http_answer import JSON, fields_of, whole_answer
from proxy.server.request_body import decoded, joined
from proxy.server.safe_logging import method_of, stack_of
from proxy.telemetry.metrics import UNKNOWN_MODEL

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from proxy.engine.connection import Connection, Upstream
    from proxy.fleet.peers import Hop
    from proxy.pool.lease import Lease
    from proxy.server.auth.authorization import Admission
    from proxy.server.auth.caller import Caller
    from proxy.server.connection import ClientConnection
    from proxy.server.forward.model_resolver import Address
    from proxy.server.forward.tracing import Trace
    from proxy.server.http_request import Headers, RequestHead
    from proxy.server.service import Service

log = logging.getLogger("warmpool")
requests_log = logging.getLogger("warmpool.request")

_ATTEMPTS: Final = 2
"""A completion has no side effects: an engine that broke before it answered is replaced once."""
_COPIED_BYTES: Final = 256 << 10
"""A body up to this size goes in one piece with its head."""


class RequestCycle:
    """A request, from its head to the last byte of its answer."""

    __slots__ = (
        "_address", "_attempts", "_stands_in", "_status", "_task", "admission", "answer", "began", "broken", "caller",
        "closes", "connection", "counts", "done", "first_lease", "head", "hop", "lease", "length", "model",
        "refused_as", "request_id", "service", "trace", "waited_s",
    )  # fmt: skip

    def __init__(self, service: Service, connection: ClientConnection, head: RequestHead, length: int) -> None:
        """`length` of its body, or `http1.CHUNKED`."""
        self.began = time.perf_counter()
        self.service = service
        self.connection = connection
        self.head = head
        self.length = length
        self.request_id = ""
        self.caller: Caller | None = None
        self.admission: Admission | None = None
        self.lease: Lease | None = None
        self.first_lease: Lease | None = None
        self.hop: Hop | None = None
        """Its way through the fleet, where it has one."""
        self.answer: EngineAnswer | None = None
        self.closes = head.closes
        """The connection ends with the answer."""
        self.done = False
        self.counts = False
        """It was let in: it has a line in the log, and is counted by its model."""
        self.model = UNKNOWN_MODEL
        """The key of its model, once it was found."""
        self._address: Address | None = None
        self.waited_s = 0.0
        """For an instance, where it had to."""
        self._stands_in = False
        """Another model than the one that was asked for answers."""
        self._attempts = 0
        self._status = 0
        self.refused_as: str | None = None
        self.broken: str | None = None
        self._task: asyncio.Task[None] | None = None
        self.trace: Trace | None = None

    # --- for those who look at any request ---

    @property
    def method(self) -> str:
        """GET, POST, …"""
        return self.head.method

    @property
    def headers(self) -> Headers:
        """The client's."""
        return self.head.headers

    @property
    def transport(self) -> asyncio.BaseTransport | None:
        """The client's connection."""
        return self.connection.transport

    @property
    def speaks_anthropic(self) -> bool:
        """Its client expects errors in Anthropic's envelope."""
        return routes.speaks_anthropic(self.head.path)

    @property
    def group(self) -> str:
        """That of its route."""
        return self.head.match.route.group if self.head.match is not None else ""

    @property
    def has_begun_to_answer(self) -> bool:
        """Whether something of its answer is out."""
        return self.answer is not None and self.answer.begun

    @property
    def is_listed(self) -> bool:
        """Whether operators see it: it was let in, and has not ended."""
        return self.counts and not self.done

    @property
    def is_uploading(self) -> bool:
        """Whether its body is still to come."""
        return self._address is None

    def served_name(self) -> str:
        """What engines call its model. Raises ModelNotFoundError where that was removed meanwhile."""
        assert self._address is not None  # noqa: S101 - it was read
        if self._address.elsewhere:
            return self._address.model
        return self.service.pool.served_name(self._address.model)

    def tier_found(self) -> bytes:
        """What it would find now, for an answer that begins before there is an engine."""
        assert self._address is not None  # noqa: S101 - it was read
        if self._address.elsewhere:
            return b"elsewhere"
        return self.service.pool.tier(self._address.model).label.encode("ascii")

    # --- its head, and its body ---

    def begin(self) -> bool:
        """Whether its body is wanted now; if not, it was answered."""
        head, service = self.head, self.service
        try:
            self.request_id = head.request_id or request_id.new()
            # Of most requests nothing has to be found out: their heads are known, and anybody may ask.
            if (
                head.match is None
                or not head.asks_nobody
                or service.auth.keys is not None
                or self.length > service.pool.settings.server.body_limit
            ) and (found := preparation.answered_at_once(self, service)) is not None:
                self._answer(*found)
                return False
            if head.match is not None:
                self.counts = True
                if service.traces is not None:
                    self.trace = service.traces.request(head.method, head.match.route.path, head.headers)
            return True
        except RequestError as error:
            self.refuse(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets an answer
            self._fail(error)
        return False

    def pieces_came(self, pieces: list[bytes], size: int) -> None:
        """All of its body is there, in pieces of this size together."""
        if size > LARGE:
            self._spawn(self._read_slowly(pieces))
        else:
            self.body_came(b"".join(pieces))

    def body_came(self, body: bytes) -> None:
        """All of its body is there."""
        head, service = self.head, self.service
        try:
            if len(body) > LARGE or (head.coding is not None and body):
                self._spawn(self._read_slowly([body]))
            elif head.match is None:
                self.connection.hand_over(self, body)
            else:
                self._addressed(service.addressing.find(head.match, head.content_type, body))
        except RequestError as error:
            self.refuse(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets an answer
            self._fail(error)

    async def _read_slowly(self, pieces: list[bytes]) -> None:
        """Read a body that would let others wait."""
        head, service = self.head, self.service
        body = await joined(pieces)
        del pieces
        if head.coding is not None:
            body = await decoded(body, head.coding, service.pool.settings.server.body_limit)
        if head.match is None:
            self.connection.hand_over(self, body)
            return
        address = await service.addressing.found(head.match, head.content_type, body)
        del body
        self._task = None  # what follows may wait in another one
        self._addressed(address)

    # --- an engine for it ---

    def _addressed(self, address: Address) -> None:
        self._address = address
        self.model = address.model
        if self.caller is not None:
            self.caller.check_model(address.model)
            self.caller.expect(address.asked)
        pool, settings = self.service.pool, address.settings
        if settings is not None and settings.max_instances > 1:
            address.near = near.key_of(self.head.session, address.asked, address.body)
        address.asked = None
        if address.streams and self.answer is None and (every_s := pool.settings.server.heartbeat) is not None:
            self.answer = EngineAnswer(self)
            self.answer.keep_alive(every_s)
        at_once = address.instance is None and settings is not None
        lease = pool.try_lease(address.model, address.near) if at_once else None
        if lease is None:
            may_fall_back = settings is not None and settings.fallback is not None and not self._stands_in
            if may_fall_back and self.service.hops is not None:
                may_fall_back = not self.service.hops.has_ready(self)
            self._spawn(self._wait_or_fall_back() if may_fall_back else self._wait_for_engine())
            return
        self._hold(lease)
        upstream = lease.client.upstream
        connection = upstream.kept()
        if connection is None:
            self._spawn(self._connect(upstream))
        else:
            self._ask(upstream, connection)

    def _hold(self, lease: Lease) -> None:
        self.lease = lease
        lease.keep_s = self.head.keep_s
        if self.caller is not None:
            lease.charge(self.caller.name)
        if self.first_lease is None:
            self.first_lease = lease
        if self._address is not None and self._address.streams:
            lease.await_token()

    async def _wait_or_fall_back(self) -> None:
        assert self._address is not None  # noqa: S101 - it was read
        found = await fallback.instead(self.service, self.head, self._address, self.caller, self._wait_for_engine)
        if found is not None:
            self._stands_in = True
            self._task = None  # what follows may wait in another one
            self._addressed(found)

    async def _wait_for_engine(self) -> None:
        address, hops = self._address, self.service.hops
        assert address is not None  # noqa: S101 - it was read
        lease = await (leasing.lease_here(self, address) if hops is None else hops.lease(self, address))
        self.waited_s = time.perf_counter() - self.began
        self._hold(lease)
        await self._connect(lease.client.upstream)

    async def _connect(self, upstream: Upstream) -> None:
        try:
            connection = upstream.kept() or await upstream.connect()
        except ExchangeError as error:
            await self._ask_again(error)
            return
        self._task = None  # from here on the engine's connection says what happens
        self._ask(upstream, connection)

    def _ask(self, upstream: Upstream, connection: Connection) -> None:
        head, address, answer = self.head, self._address, self.answer
        assert address is not None  # noqa: S101 - it was read
        if answer is None:
            answer = self.answer = EngineAnswer(self)
            answer.upstream = connection
        else:
            answer.expect_from(connection)
        body, size, traced = address.body, len(address.body), b""
        if self.hop is not None and self.lease is not None and self.lease.is_remote and self.service.hops is not None:
            traced = self.service.hops.marks(self)
        if self.trace is not None and self.lease is not None:
            traced += b"".join([b"\r\n%b: %b" % field for field in self.trace.asks(self.lease)])
        apart = size > _COPIED_BYTES
        message = b"%b%b%b%b%b\r\nContent-Length: %d\r\n\r\n%b" % (
            head.request_line, upstream.own_fields, head.engine_fields, self.request_id.encode("ascii"), traced, size,
            b"" if apart else body,
        )  # fmt: skip
        try:
            connection.begin(answer, message, body if apart else b"")
        except ExchangeError as error:
            answer.drop()
            self.engine_failed(error)

    def engine_failed(self, error: ExchangeError) -> None:
        """An engine broke before it answered."""
        if not self.done:
            self._spawn(self._ask_again(error))

    async def _ask_again(self, error: ExchangeError) -> None:
        lease = self.lease
        assert lease is not None and self._address is not None  # noqa: S101, PT018 - its engine failed
        requests_log.warning("%s: before an answer: %s", lease.instance_id, error)
        await lease.suspect()
        self.lease = None
        lease.release()
        tries_on = self.service.hops is not None and self.service.hops.tries_on(self, lease)
        self._attempts += not tries_on
        if self._attempts >= _ATTEMPTS or (isinstance(error, SilenceError) and not tries_on):
            raise UpstreamError(f"The engine of model {self._address.model!r} failed before it answered.") from error
        await self._wait_for_engine()

    def turned_away(self, offer: bytes) -> None:
        """Another host did not take it; what it offers now."""
        lease, self.lease, self.first_lease = self.lease, None, None
        if not self.done and lease is not None and self.service.hops is not None:
            self.service.hops.turned_away(self, lease, offer)
            self._spawn(self._wait_for_engine())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self.service.spawn(self._carried_out(work), "request")

    async def _carried_out(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except RequestError as error:
            self.refuse(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets an answer
            self._fail(error)

    # --- its answer ---

    def own_fields(self) -> Sequence[tuple[bytes, bytes]]:
        """What every answer to it has, and counts more than an engine's field of the same name."""
        own: Sequence[tuple[bytes, bytes]] = self.head.cors
        if self.service.hops is not None:
            own = [*self.service.hops.fields(self), *own]
        if self._stands_in:
            own = [*own, (fallback.FIELD, self.model.encode("ascii"))]
        if self.caller is not None and (limits := self.service.auth.limits(self.caller)):
            return [*fields_of(limits), *own]
        return own

    def refuse(self, error: RequestError, *, closes: bool = False) -> None:
        """Answer with an error; as an event where a stream has begun."""
        if self.done:
            return
        self.refused_as, self._status = error.code, error.status
        if not self.counts or self.caller is not None:
            self.service.auth.note(self.connection.host, error, f"{method_of(self.method)} {self.head.path_for_log}")
        if not self.counts:
            self.service.metrics.count_request(UNKNOWN_MODEL, error.status)
        operator = self.head.kind is Kind.ADMIN
        body = error.body(for_operator=operator, anthropic=self.speaks_anthropic)
        if self.answer is not None and self.answer.begun:
            self.answer.end_with(body)
            self.answered()
        else:
            self.closes = self.closes or closes
            self._answer(error.status, {**JSON, **error.headers()}, body)

    def _fail(self, error: Exception) -> None:
        log.error(
            "%s %s failed (%s): %s",
            method_of(self.method), self.head.path_for_log, self.request_id, stack_of(error),
        )  # fmt: skip
        self.refuse(RequestError("Internal error; the server's log says more."))

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Answer with what is made here."""
        self._status = self._status or status
        self.closes = self.closes or self.service.traffic.stopping or self.connection.must_end
        own = [(b"X-Request-Id", self.request_id.encode("ascii")), *self.own_fields()]
        self.connection.write(
            whole_answer(
                status, headers, body, more=own, http11=self.head.http11, closes=self.closes,
                head_only=self.method == "HEAD",
            )
        )  # fmt: skip
        self.answered()

    def answered(self) -> None:
        """The whole answer is out."""
        self._end()
        self.connection.finished(close=self.closes)

    def broke_off(self, reason: str) -> None:
        """The engine broke within its answer: the client must not take what it has for the whole."""
        self.broken = reason
        lease, self.lease = self.lease, None
        if lease is not None:
            self.service.spawn(_give_up(lease), "suspect")
        self._end()
        self.connection.break_off(with_reset=not self.head.http11)

    def cancel(self) -> None:
        """An operator ends it."""
        if not self.has_begun_to_answer:
            self.refuse(RequestCancelledError("An operator has ended this request."))
        elif not self.done:
            self.broken = "cancelled by an operator"
            self._end()
            self.connection.break_off(with_reset=not self.head.http11)

    def left(self) -> None:
        """The client has left."""
        if not self.done:
            self._end(left=True)

    def pause(self) -> None:
        """The client takes less than there is for it: its engine has to wait."""
        if self.answer is not None and self.answer.upstream is not None:
            self.answer.upstream.pause()

    def resume(self) -> None:
        """It has caught up."""
        if self.answer is not None and self.answer.upstream is not None:
            self.answer.upstream.resume()

    # --- its end ---

    def _end(self, *, left: bool = False) -> None:
        """Let go of everything, once, and count it."""
        self.done = True
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        answer = self.answer
        if answer is not None and (answer.upstream is not None or answer.heartbeat is not None):
            answer.drop()
        first = self.first_lease
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()
        status = self._status or (answer.status if answer is not None and answer.begun else 0)
        if self.admission is not None:
            self.admission.end(0 if left and not self.has_begun_to_answer else status)
        if self.counts:
            access_log.account(self, first, status or 499)  # nginx's: the client left before an answer
        self.answer = None  # each has the other: so that neither has to wait for the garbage collector


async def _give_up(lease: Lease) -> None:
    """Have the pool look at an engine that broke off."""
    try:
        await lease.suspect()
    finally:
        lease.release()
