"""What an engine answers, on its way to the client: byte for byte, in the call in which it came.

Once a byte is out, a failure of the engine breaks the connection: a truncated answer must never look complete.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.engine import http1
from proxy.engine.connection import ExchangeError
from proxy.errors import EngineFailedError, UpstreamError, sse_error
from proxy.fleet.peers import PeerLease
from proxy.server.forward.fields import NOT_TO_CLIENT, answer_fields, is_event_stream, server_timing
from proxy.server.forward.heartbeat import COMMENT, HEADERS, ON_HOLD, PAUSED, Heartbeat
from proxy.server.forward.watchers import watchers_of
from proxy.server.http_answer import date
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from proxy.engine.connection import Connection
    from proxy.server.forward.cycle import RequestCycle

log = logging.getLogger("warmpool.request")

_REPLIES: Final = 256
"""Different heads of answers that are remembered."""
_INSTANCES: Final = 64
"""So many instances' are remembered with each."""
_ERROR_BYTES: Final = 64 << 10
_INFORMATIONAL: Final = 8
"""Answers 1xx that may come before the final one."""
_STACK: Final = (b"Traceback (most recent call last)", b'File \\"/', b'File "/')
"""What a Python stack looks like, in JSON or as text."""
_READY: Final = Tier.READY
_INSTANCE: Final = b"\r\nx-warmpool-instance: "
_NO_QUEUE: Final = b"\r\nserver-timing: queue;dur=0.0\r\nserver: warmpool\r\nx-request-id: "
_USAGE: Final = b'"usage"'
_USAGE_BYTES: Final = 400
_USAGE_AT_END: Final = 1024
_LOOKED_AT: Final = 4096
"""Of its beginning and its end, by those who want to know more of it."""
_EVENT: Final = b"data: {"
_ZERO: Final = ord("0")
_REFUSED: Final = 409
_HOST: Final = b"x-warmpool-host"
_OFFER: Final = b"x-warmpool-offer"
_TOLD: Final = frozenset({b"x-warmpool-tier", b"x-warmpool-instance", b"server-timing", _HOST, _OFFER})


class _Head:
    """What the head of an engine's answer says; shared by answers that differ in nothing but their length."""

    __slots__ = (
        "_ready", "before", "behind", "bodiless", "fields", "head", "is_plain", "is_stream", "keeps_alive", "length",
        "status", "status_line", "told",
    )  # fmt: skip

    def __init__(self, parsed: http1.Head) -> None:
        self.status = parsed.status
        self.keeps_alive = parsed.keeps_alive
        self.length = parsed.length
        self.bodiless = http1.bodiless("GET", parsed.status)
        self.status_line = b" %d %b\r\n" % (parsed.status, parsed.reason)
        self.fields = answer_fields(parsed.fields)
        if parsed.status == 304:  # says what a 200 would have
            self.fields += [field for field in parsed.fields if field[0].lower() == b"content-length"]
        self.is_stream = parsed.status == 200 and is_event_stream(parsed.fields)
        self.is_plain = parsed.status < 500 and parsed.status != _REFUSED and not self.is_stream
        """Nobody here has to look at what follows, unless the request asks for it."""
        self.told = {name.lower(): value for name, value in parsed.fields if name.lower() in _TOLD}
        """What another host says of its answer."""
        self.head = self.without(frozenset())
        self._ready: dict[str, bytes] = {}
        """Instance → how an answer of it begins, where nobody waited."""
        self.before = self.behind = b""
        """The head as it came, on either side of its length; nothing where that is not said in the usual way."""

    def ready(self, instance_id: str) -> bytes:
        """The beginning of an answer in HTTP/1.1 of an instance that was ready, up to the request's id."""
        found = self._ready.get(instance_id)
        if found is None:
            if len(self._ready) >= _INSTANCES:
                self._ready.clear()
            found = self._ready[instance_id] = b"".join(
                (b"HTTP/1.1", self.head, b"ready", _INSTANCE, instance_id.encode(), _NO_QUEUE)
            )
        return found

    def without(self, names: frozenset[bytes]) -> bytes:
        """The beginning of the answer's head, behind the version."""
        kept = [b"%b: %b\r\n" % field for field in self.fields if field[0].lower() not in names]
        return b"".join((self.status_line, *kept, b"x-warmpool-tier: "))


class AnswerHeads:
    """Reads the heads of engines' answers; those that come again and again once."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Head] = {}
        self._last: _Head | None = None

    def again(self, data: bytes) -> tuple[_Head, int, int] | None:
        """The head that `data` begins with, its length, and where the body begins, if it is nearly the last one.

        That is one which differs in the number of its length only.
        """
        head = self._last
        if head is None or not data.startswith(head.before):
            return None
        at = len(head.before)
        stop = data.find(b"\r\n", at, at + 20)
        length = http1.LENGTHS.get(data[at:stop])
        if length is None or not data.startswith(head.behind, stop):
            return None
        return head, length, stop + len(head.behind)

    def read(self, data: bytes, end: int) -> tuple[_Head, int]:
        """What a head says whose last line ends at `end`, and its length as in `http1.Head`. Raises ProtocolError."""
        at = data.find(b"\r\ncontent-length: ", 0, end)
        if at < 0:
            at = data.find(b"\r\nContent-Length: ", 0, end)
        if at >= 0:
            stop = data.find(b"\r\n", at + 18)
            digits = data[at + 18 : stop]
            if digits.isdigit() and len(digits) <= 18 and (digits[0] != _ZERO or len(digits) == 1):
                key = data[:at] + data[stop:end]
                found = self._known.get(key) or self._learn(key, data[: end + 4])
                if found.status >= 200 and not found.bodiless and _HOST not in found.told:
                    found.before, found.behind = data[: at + 18], data[stop : end + 4]
                    self._last = found
                return found, 0 if found.bodiless else int(digits)
        key = data[: end + 4]
        found = self._known.get(key) or self._learn(key, key)
        return found, found.length

    def _learn(self, key: bytes, head: bytes) -> _Head:
        found = _Head(http1.parse_head(head, "POST"))
        if len(self._known) >= _REPLIES:
            self._known.clear()
        # Of a 304 the length is passed on as a field; another host's answers differ in their timing.
        if found.status != 304 and _HOST not in found.told:
            self._known[key] = found
        return found


class EngineAnswer:
    """The answer to one request, of one engine or of the next; a `proxy.engine.connection.Receiver`."""

    __slots__ = (
        "_before", "_body", "_client", "_cycle", "_early", "_flows", "_framed", "_head", "_held", "_last", "_length",
        "_opening", "_skipped", "_stream", "_transport", "_unframed", "_unsent", "_watchers", "begun", "events",
        "first_byte_at", "first_token_at", "heartbeat", "status", "upstream",
    )  # fmt: skip

    def __init__(self, cycle: RequestCycle) -> None:
        self._cycle = cycle
        self._client = cycle.connection
        self._transport: Any = cycle.connection.transport
        self.upstream: Connection | None = None
        self.status = 0
        self.begun = False
        """A byte of it is out, or will be."""
        self.first_byte_at: float | None = None
        self.first_token_at: float | None = None
        self.heartbeat: Heartbeat | None = None
        self._early = b""
        self._skipped = 0
        self._head: _Head | None = None
        self._body: http1.Body | None = None
        self._length = 0
        self._framed = False
        self._unsent = b""
        """The head, until something goes with it."""
        self._held: bytearray | None = None
        """An engine's error, which is looked at before it goes on."""
        self._stream = False
        """Comments are out: what comes goes into their stream."""
        self._watchers: Sequence[Callable[[bytes], object]] = ()
        self._unframed: http1.ChunkedBody | None = None
        self._flows = False
        """The first bytes of the body are out, and nobody looks at the rest."""
        self._opening = self._before = self._last = b""
        """The first piece of the body, and the last two."""
        self.events = 0
        """Of a stream, as far as they are JSON: nearly one for each token."""

    @property
    def size(self) -> int:
        """Bytes of the engine's body."""
        if self._body is not None:
            return self._body.payload_bytes
        return self._length if self.begun and not self._stream else 0

    @property
    def beginning(self) -> bytes:
        """What of it came first."""
        return (self._opening or self._last)[:_LOOKED_AT]

    @property
    def ending(self) -> bytes:
        """What of it came last."""
        return (self._before[-_LOOKED_AT:] + self._last[-_LOOKED_AT:])[-_LOOKED_AT:]

    @property
    def usage(self) -> bytes:
        """What it says of tokens, at its beginning or its end; nothing else of it."""
        if not self._before and not self._opening:  # it came in one piece
            at = self._last.rfind(_USAGE, -_USAGE_AT_END)
            return self._last[at : at + _USAGE_BYTES] if at >= 0 else b""
        return _usage_of(self._opening if self._opening is not self._last else b"", self._before, self._last)

    def expect_from(self, upstream: Connection) -> None:
        """Another engine is asked, or the first one after comments."""
        self.upstream = upstream
        self._early, self._skipped, self._held, self._body = b"", 0, None, None

    # --- before the engine's answer ---

    def keep_alive(self, every_s: float) -> None:
        """Send comments until the stream has begun, and in its silences."""
        self.heartbeat = Heartbeat(every_s, self._beat)

    def _beat(self) -> None:
        if self._client.write_paused:
            return
        if not self.begun:
            self.begun = self._stream = True
            self._framed = self._cycle.head.http11
            self._unsent = self._head_of_comments()
        elif self._body is not None:
            assert self.heartbeat is not None  # noqa: S101 - whose beat this is
            if not self._body.between or not self.heartbeat.between_events:
                return
        comment = self._comment()
        self._write_with_head(http1.chunk(comment) if self._framed else comment)

    def _comment(self) -> bytes:
        lease = self._cycle.lease
        if lease is None or not lease.paused:
            return COMMENT
        return ON_HOLD if lease.on_hold else PAUSED

    def _head_of_comments(self) -> bytes:
        cycle = self._cycle
        fields = [*HEADERS, (b"x-warmpool-tier", cycle.tier_found())]
        begin = b" 200 OK\r\n%bserver: warmpool\r\nx-request-id: " % b"".join([b"%b: %b\r\n" % f for f in fields])
        framed = self._framed
        return self._completed((begin,), cycle.own_fields(), length=http1.UNTIL_CLOSE, framed=framed, ends=framed)

    def end_with(self, error: bytes) -> None:
        """End a stream of comments with an error envelope, as an event."""
        self._stop_heartbeat()
        event = sse_error(error)
        self._write(http1.chunk(event) + http1.LAST_CHUNK if self._framed else event)

    def _stop_heartbeat(self) -> None:
        heartbeat, self.heartbeat = self.heartbeat, None
        if heartbeat is not None:
            heartbeat.stop()

    # --- from the engine ---

    def received(self, data: bytes) -> None:
        """Bytes of the answer."""
        body = self._body
        if body is None:
            if self._early:
                data = self._early + data
            if (again := self._cycle.service.answer_heads.again(data)) is not None:
                head, length, begin = again
                self._begin(head, length, data[begin:])
            else:
                self._read_head(data)
            return
        try:
            out = body.feed(data)
        except http1.ProtocolError as error:
            self._not_http(error)
            return
        if out and self._flows:
            self._before, self._last = self._last, out
            self.events += out.count(_EVENT)
            self._write(out)
        elif out or self._unsent or body.done:
            self._take(out)
        if body.done:
            self._end()
        elif self._client.write_paused and self.upstream is not None:
            self.upstream.pause()

    def _read_head(self, data: bytes) -> None:
        try:
            while True:
                end = data.find(b"\r\n\r\n", 0, http1.HEAD_LIMIT)
                if end < 0:
                    if len(data) >= http1.HEAD_LIMIT:
                        raise http1.ProtocolError(f"no end of the header within {http1.HEAD_LIMIT} bytes")
                    self._early = data
                    return
                head, length = self._cycle.service.answer_heads.read(data, end)
                data = data[end + 4 :] if head.status < 200 else data
                if head.status >= 200:
                    break
                self._skipped += 1
                if head.status == 101 or self._skipped > _INFORMATIONAL:
                    raise http1.ProtocolError(f"an answer {head.status} that nobody asked for")
        except http1.ProtocolError as error:
            self._not_http(error)
            return
        self._early = b""
        self._begin(head, length, data[end + 4 :])

    def _begin(self, head: _Head, length: int, data: bytes) -> None:
        self._head, self._length, self.status = head, length, head.status
        cycle = self._cycle
        if head.told and _OFFER not in head.told and isinstance(cycle.lease, PeerLease):
            cycle.lease.answered(head.told)
        whole = len(data) == length > 0
        if whole and head.is_plain and cycle.admission is None and not cycle.head.makes_response and not self.begun:
            # Nearly every answer.
            if self.heartbeat is not None:
                self._stop_heartbeat()
            self.begun = True
            self.first_byte_at = time.perf_counter()
            self._last = data
            if not self._transport.is_closing():
                self._transport.write(self._head_for(head, length, framed=False) + data)
            upstream, self.upstream = self.upstream, None
            if upstream is not None:
                upstream.finished(reusable=head.keeps_alive)
            cycle.answered()
            return
        self._begin_body(head, length, data)

    def _begin_body(self, head: _Head, length: int, data: bytes) -> None:
        cycle = self._cycle
        if head.status == _REFUSED and cycle.lease is not None and cycle.lease.is_remote and _OFFER in head.told:
            self._give_back(reusable=len(data) == length)
            cycle.turned_away(head.told[_OFFER])
            return
        if self._stream and not head.is_stream:
            self._stop_heartbeat()
            self._held, self._framed = bytearray(), False
            framed = False
        elif self._stream:
            framed = self._framed
        else:
            framed = self._framed = length < 0 and cycle.head.http11
            if not head.is_stream or length >= 0:
                self._stop_heartbeat()
            if head.status >= 500:
                self._held = bytearray()
        kind = http1.SizedBody if length >= 0 else http1.ChunkedBody if length == http1.CHUNKED else http1.EndlessBody
        self._body = body = kind(length, framed=framed, drop_trailer=NOT_TO_CLIENT)
        if self._held is None:
            self._watch(head)
            if not self.begun:
                self._unsent = self._head_for(head, length, framed=framed)
        if begin := body.begin():
            self._take(begin)
        self.received(data)

    def _head_for(self, head: _Head, length: int, *, framed: bool) -> bytes:
        """The head of the answer to the client."""
        cycle = self._cycle
        lease, first = cycle.lease, cycle.first_lease
        assert lease is not None and first is not None  # noqa: S101, PT018 - its engine answers
        own = cycle.own_fields()
        waited = lease.wake is not None or lease.queue_s or first.found is not _READY or lease.is_remote
        closes = cycle.closes or cycle.service.traffic.stopping
        if length > 0 and cycle.head.http11 and not (framed or closes or waited or own):  # nearly every answer
            return b"%b%b\r\ndate: %b\r\ncontent-length: %d\r\n\r\n" % (
                head.ready(lease.instance_id), cycle.request_id.encode("ascii"), date(), length,
            )  # fmt: skip
        start = head.head if not own else head.without(frozenset(name.lower() for name, _ in own))
        if not waited:
            begin = start, b"ready", _INSTANCE, lease.instance_id.encode(), _NO_QUEUE
        else:
            begin = (
                start, first.found.label.encode("ascii"), _INSTANCE, lease.instance_id.encode(),
                b"\r\nserver-timing: %b\r\nserver: warmpool\r\nx-request-id: " % server_timing(lease),
            )  # fmt: skip
        ends = head.bodiless or framed or length >= 0
        length = http1.UNTIL_CLOSE if head.bodiless else length
        return self._completed(begin, own, length=length, framed=framed, ends=ends)

    def _completed(
        self, begin: tuple[bytes, ...], own: Sequence[tuple[bytes, bytes]], *, length: int, framed: bool, ends: bool
    ) -> bytes:
        """The head of an answer whose status and fields `begin` with, behind the version, up to the request's id.

        `length` of its body is said where it is 0 or more; `ends`: the body has an end but that of the connection.
        """
        cycle = self._cycle
        http11 = cycle.head.http11
        cycle.closes = closes = cycle.closes or not ends or cycle.service.traffic.stopping
        framing = b""
        if framed:
            framing = b"\r\ntransfer-encoding: chunked"
        elif length >= 0:
            framing = b"\r\ncontent-length: %d" % length
        if closes is http11:  # each version has its default
            framing += b"\r\nconnection: close" if http11 else b"\r\nconnection: keep-alive"
        return b"".join((
            b"HTTP/1.1" if http11 else b"HTTP/1.0", *begin, cycle.request_id.encode("ascii"),
            b"".join([b"\r\n%b: %b" % field for field in own]) if own else b"",
            b"\r\ndate: ", date(), framing, b"\r\n\r\n",
        ))  # fmt: skip

    def _watch(self, head: _Head) -> None:
        """Who wants to see the answer."""
        self._watchers = [*self._watchers, *watchers_of(self._cycle, self._token_came if head.is_stream else None)]
        if self._watchers and self._framed:
            self._unframed = http1.ChunkedBody(http1.CHUNKED, framed=False)

    def _token_came(self) -> None:
        self.first_token_at = time.perf_counter()
        if self._cycle.lease is not None:
            self._cycle.lease.token_came()

    def _take(self, out: bytes) -> None:
        """A piece of the body that is not only to be written."""
        if self._held is not None:
            self._hold(out)
            return
        if out:
            if self.first_byte_at is None:
                self.first_byte_at, self._opening = time.perf_counter(), out
            self._before, self._last = self._last, out
            self.events += out.count(_EVENT)
            if self._watchers:
                payload = self._unframed.feed(out) if self._unframed is not None else out
                self._watchers = [watch for watch in self._watchers if watch(payload) is not True]
            self._flows = not self._watchers
        self._write_with_head(out)

    def _hold(self, out: bytes) -> None:
        held = self._held
        assert held is not None and self._body is not None  # noqa: S101, PT018 - it is held
        held += out
        if self._body.done or len(held) > _ERROR_BYTES:
            if self._stream:
                self._end_with_error(bytes(held))
            else:
                self._let_through(bytes(held))

    def _let_through(self, held: bytes) -> None:
        """An engine's error, unless it shows the engine's address or a stack."""
        self._held = None
        head, body, cycle = self._head, self._body, self._cycle
        assert head is not None and body is not None  # noqa: S101, PT018 - it has begun
        text = http1.ChunkedBody(http1.CHUNKED, framed=False).feed(held) if self._framed else held
        lease = cycle.lease
        assert lease is not None  # noqa: S101 - its engine answers
        if any(sign in text for sign in (lease.client.upstream.authority, *_STACK)):
            log.error("%s answered %d with its address or a stack in it, kept back", lease.instance_id, head.status)
            self._give_back(reusable=body.done and not body.excess)
            self._unsent = b""
            cycle.refuse(EngineFailedError("The engine failed; its log says more."))
            return
        self._watch(head)
        self._unsent = self._head_for(head, self._length, framed=self._framed)
        self._take(held)

    def _end_with_error(self, held: bytes) -> None:
        """What an engine answered instead of a stream, as an event of the stream that was begun."""
        body, cycle = self._body, self._cycle
        assert body is not None  # noqa: S101 - it has begun
        error = held if body.done and _is_envelope(held) else None
        self._give_back(reusable=body.done and not body.excess)
        if error is None:
            failed = UpstreamError(f"The engine answered {self.status} instead of a stream.")
            error = failed.body(anthropic=cycle.speaks_anthropic)
        self._framed = cycle.head.http11
        self.end_with(error)
        cycle.answered()

    def _write_with_head(self, out: bytes) -> None:
        if self._unsent:
            self.begun = True
            out, self._unsent = self._unsent + out, b""
        if out:
            self._write(out)

    def _write(self, data: bytes) -> None:
        # Between a reset and the word of it the transport is closed, and uvloop's raises.
        if not self._transport.is_closing():
            self._transport.write(data)

    # --- its end ---

    def _give_back(self, *, reusable: bool) -> None:
        connection, self.upstream = self.upstream, None
        if connection is not None:
            connection.finished(reusable=reusable and self._head is not None and self._head.keeps_alive)

    def _end(self) -> None:
        """The whole answer has come."""
        body = self._body
        if self._held is not None or body is None or self._cycle.done:
            return
        self._give_back(reusable=not body.excess)
        self._stop_heartbeat()
        self._cycle.answered()

    def _not_http(self, error: http1.ProtocolError) -> None:
        self._give_back(reusable=False)
        self._failed(ExchangeError(f"not HTTP: {error}"))

    def lost(self, error: Exception | None) -> None:
        """The engine's connection has ended."""
        self.upstream = None
        if self._body is None:
            self._failed(ExchangeError(f"the connection ended before an answer{f': {error}' if error else ''}"))
        elif error is not None:
            self._failed(ExchangeError(f"the connection broke: {error}"))
        else:
            try:
                out = self._body.close()
            except http1.ProtocolError as problem:
                self._failed(ExchangeError(str(problem)))
                return
            self._take(out)
            self._end()

    def failed(self, error: ExchangeError) -> None:
        """The engine's connection was ended from here."""
        self.upstream = None
        self._failed(error)

    def _failed(self, error: ExchangeError) -> None:
        if self._stream and self._held is not None:
            self._end_with_error(b"")
        elif self._body is not None and self.begun:
            self._stop_heartbeat()
            self._cycle.broke_off(str(error))
        else:
            self._unsent = b""
            self._cycle.engine_failed(error)

    def drop(self) -> None:
        """Nobody is there for it any more."""
        self._stop_heartbeat()
        self._give_back(reusable=False)


def _usage_of(opening: bytes, before: bytes, last: bytes) -> bytes:
    first, end = opening.find(_USAGE), before[-_USAGE_AT_END:] + last[-_USAGE_AT_END:]
    at = end.rfind(_USAGE)
    said = opening[first : first + _USAGE_BYTES] if first >= 0 else b""
    return said + end[at : at + _USAGE_BYTES] if at >= 0 else said


def _is_envelope(body: bytes) -> bool:
    try:
        return isinstance(orjson.loads(body)["error"], dict)
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return False
