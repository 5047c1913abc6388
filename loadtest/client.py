"""The client under every load test: what a user would see, with an error of its own below a millisecond.

- **Open loop**: a request has a moment at which it is meant to be sent, whether earlier ones were answered or not, and
  every time is counted from that moment. A client that falls behind shows it as latency instead of leaving it out
  ("coordinated omission").
- **Arrival times are the kernel's** (SO_TIMESTAMPNS, socket(7)): a token is timed when it reached this host, not when
  this program came round to reading it.
- A connection per request, as a user who was not there before; plain HTTP.

Times are seconds from the intended moment, unless they say otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import re
import resource
import socket
import struct
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

import orjson

from loadtest.answer_parser import Answer, Events, WireError
from loadtest.precise_timer import PreciseTimer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

TIMESTAMPNS: Final = 35  # SO_TIMESTAMPNS and SCM_TIMESTAMPNS, asm-generic/socket.h
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(16)
_READ_BYTES: Final = 1 << 15
_SECOND_NS: Final = 1_000_000_000
_STAGE: Final = re.compile(r"([\w-]+);dur=([\d.]+)")
_FILES: Final = 32_768
_IN_A_ROW: Final = 32
"""Requests that are late are sent this many at a time, with a look at the sockets between."""


class TargetError(Exception):
    """An address that cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: resolved once, so that no name look-up is measured."""

    url: str
    family: int
    address: tuple[Any, ...]
    host: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, url: str, api_key: str | None = None) -> Self:
        """For ``http://HOST:PORT``. Raises TargetError."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise TargetError(f"{url}: the address of a proxy is http://HOST:PORT, without a path and without TLS")
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise TargetError(f"{url}: {error}") from error
        family, _, _, _, address = found[0]
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        return cls(url, family, address, parts.netloc, headers)


@dataclass(slots=True)
class Request:
    """One request: when, what, and what to remember of it."""

    due_s: float
    """From the begin of the run."""
    body: Any = None
    """Sent as JSON; None: a GET."""
    path: str = "/v1/completions"
    series: str = ""
    """What it is counted under."""
    tags: dict[str, Any] = field(default_factory=dict)
    """Goes into its outcome as it is."""
    keep_text: bool = False
    chunked: bool = False
    """The body is sent in chunks, without its length."""


@dataclass(slots=True)
class Outcome:
    """What became of a request."""

    series: str
    tags: dict[str, Any]
    due_ns: int
    """The intended moment, of `time.monotonic_ns`."""
    late_s: float = 0.0
    """How late this client began it."""
    connect_s: float | None = None
    headers_s: float | None = None
    ttft_s: float | None = None
    """The first event with content; of an answer that is no stream, its first byte."""
    end_s: float | None = None
    token_s: array[float] = field(default_factory=lambda: array("d"))
    """The moment of every token."""
    read_s: float | None = None
    """When this program saw the first token, as a client without the kernel's times would have it."""
    tokens: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    """The answer, where it was to be kept; the body of an error."""
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Answered in full."""
        return self.error is None

    @property
    def tier(self) -> str:
        """The tier it found; empty where the answer does not say."""
        return self.headers.get("x-warmpool-tier", "")

    @property
    def stages_s(self) -> dict[str, float]:
        """`server-timing`, in seconds."""
        return {n: float(v) / 1000 for n, v in _STAGE.findall(self.headers.get("server-timing", ""))}


class Client:
    """Sends requests to one target, any number at once.

    `timeout_s` is for a whole answer. Use it with `async with`.
    """

    def __init__(self, target: Target, *, timeout_s: float = 600.0) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.open: set[_Exchange] = set()

    async def __aenter__(self) -> Self:
        make_room_for_files()
        return self

    async def __aexit__(self, *_: object) -> None:
        for exchange in list(self.open):
            exchange.fail("given up")

    async def ask(self, request: Request) -> Outcome:
        """Send a request now, whatever its `due_s`, and wait for what becomes of it."""
        result: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def finish(outcome: Outcome) -> None:
            if not result.done():
                result.set_result(outcome)

        exchange = self._send(request, time.monotonic_ns(), finish)
        try:
            return await result
        finally:
            exchange.fail("given up")

    async def json(self, path: str) -> Any:
        """The answer to a GET, as JSON; None when there is no such answer."""
        outcome = await self.ask(Request(0.0, path=path, keep_text=True))
        return orjson.loads(outcome.text) if outcome.ok else None

    async def run(self, requests: Iterable[Request], done: Callable[[Outcome], None]) -> None:
        """Send every request at its moment, in order, and return when all were answered or failed.

        `done` is called with each outcome as it comes. The run begins now: `due_s` counts from here.
        """
        idle = asyncio.Event()

        sent = ended = 0

        def finish(outcome: Outcome) -> None:
            nonlocal ended
            ended += 1
            done(outcome)
            idle.set()

        with PreciseTimer() as timer, undisturbed():
            began_ns = time.monotonic_ns()
            in_a_row = 0
            for request in requests:
                due_ns = began_ns + round(request.due_s * _SECOND_NS)
                if due_ns > time.monotonic_ns():
                    await timer.until(due_ns)
                    in_a_row = 0
                elif (in_a_row := in_a_row + 1) % _IN_A_ROW == 0:
                    await asyncio.sleep(0)
                sent += 1
                self._send(request, due_ns, finish)
            while ended < sent:
                idle.clear()
                await idle.wait()

    def _send(self, request: Request, due_ns: int, finish: Callable[[Outcome], None]) -> _Exchange:
        exchange = _Exchange(self, request, due_ns, finish)
        self.open.add(exchange)
        exchange.begin()
        return exchange


def message(target: Target, request: Request) -> bytes:
    """The bytes of a request."""
    body = b"" if request.body is None else orjson.dumps(request.body)
    method = "GET" if request.body is None else "POST"
    lines = [
        f"{method} {request.path} HTTP/1.1",
        f"Host: {target.host}",
        "Connection: close",
        "Accept-Encoding: identity",
        *(f"{name}: {value}" for name, value in target.headers.items()),
    ]
    if request.body is not None:
        framing = "Transfer-Encoding: chunked" if request.chunked else f"Content-Length: {len(body)}"
        lines += ["Content-Type: application/json", framing]
        if request.chunked:
            half = len(body) // 2
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:])) + b"0\r\n\r\n"
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Exchange:
    """One request on its way, driven by the readiness of its socket."""

    __slots__ = (
        "_answer", "_body", "_client", "_due_ns", "_events", "_finish", "_keep_text", "_left", "_loop", "_request",
        "_socket", "_timer", "outcome",
    )  # fmt: skip

    def __init__(self, client: Client, request: Request, due_ns: int, finish: Callable[[Outcome], None]) -> None:
        self._client = client
        self._request = request
        self._keep_text = request.keep_text
        self._due_ns = due_ns
        self._finish = finish
        self._answer = Answer()
        self._events = Events(keep_text=request.keep_text)
        self._body: list[bytes] = []
        self._left = b""
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.outcome = Outcome(request.series, request.tags, due_ns)

    def begin(self) -> None:
        self.outcome.late_s = (time.monotonic_ns() - self._due_ns) / _SECOND_NS
        target = self._client.target
        try:
            self._socket = socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, TIMESTAMPNS, 1)
            status = self._socket.connect_ex(target.address)
        except OSError as error:
            self._loop.call_soon(self.fail, f"connect: {error.strerror}")
            return
        if status not in (0, errno.EINPROGRESS):
            self._loop.call_soon(self.fail, f"connect: {os.strerror(status)}")
            return
        self._timer = self._loop.call_later(self._client.timeout_s, self.fail, "no whole answer in time")
        self._left = message(target, self._request)
        # On this host a connection is made within the call, though the call does not say so.
        if not self._send():
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        assert self._socket is not None
        status = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            self.fail(f"connect: {os.strerror(status)}")
        elif self._send():
            self._loop.remove_writer(self._socket.fileno())

    def _send(self) -> bool:
        """Send what can be sent; whether nothing is left to do for it."""
        assert self._socket is not None
        try:
            sent = self._socket.send(self._left)
        except BlockingIOError:
            return False
        except OSError as error:
            self._loop.call_soon(self.fail, f"send: {error.strerror}")
            return True
        if self.outcome.connect_s is None:
            self.outcome.connect_s = (time.monotonic_ns() - self._due_ns) / _SECOND_NS
            self._loop.add_reader(self._socket.fileno(), self._readable)
        self._left = self._left[sent:]
        return not self._left

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data, waited_ns = receive(self._socket)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(f"read: {error.strerror}")
            return
        now_ns = time.monotonic_ns()
        at_s = (now_ns - waited_ns - self._due_ns) / _SECOND_NS
        try:
            self._take(data, at_s, (now_ns - self._due_ns) / _SECOND_NS)
        except WireError as error:
            self.fail(str(error))

    def _take(self, data: bytes, at_s: float, read_s: float) -> None:
        answer, outcome = self._answer, self.outcome
        body = answer.feed(data)
        if outcome.headers_s is None:
            if not answer.status:
                return
            outcome.headers_s = at_s
            outcome.status = answer.status
            outcome.headers = answer.headers
        if body:
            if answer.is_stream:
                came = self._events.feed(body)
                for _ in range(came):
                    outcome.token_s.append(at_s)
            else:
                came = 1
                if self._keep_text or answer.status >= 400:
                    self._body.append(body)
            if came and outcome.ttft_s is None and answer.status < 400:
                outcome.ttft_s = at_s
                outcome.read_s = read_s
        if answer.ended:
            outcome.end_s = at_s
            self._conclude()

    def _conclude(self) -> None:
        answer, events, outcome = self._answer, self._events, self.outcome
        outcome.tokens = events.tokens if events.usage is None else events.usage
        reason = None
        if answer.is_stream:
            outcome.text = "".join(events.text)
            if events.error is not None:
                reason = f"an error within the stream: {events.error}"
            elif not events.done:
                reason = "the stream ended without [DONE]"
        else:
            outcome.text = b"".join(self._body).decode("utf-8", "replace")
        if answer.status >= 400:
            reason = f"status {answer.status}"
        self._close(reason)

    def fail(self, reason: str) -> None:
        """End it, if it has not ended."""
        if self in self._client.open:
            self.outcome.tokens = self._events.tokens
            self._close(reason)

    def _close(self, reason: str | None) -> None:
        self._client.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
        self.outcome.error = reason
        self._finish(self.outcome)


def receive(connection: socket.socket) -> tuple[bytes, int]:
    """Read, and for how many nanoseconds the (last of the) data had been waiting; the socket has TIMESTAMPNS set."""
    data, ancillary, _, _ = connection.recvmsg(_READ_BYTES, _ANCILLARY_BYTES)
    for _, kind, stamp in ancillary:
        if kind == TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", stamp)
            return data, max(0, time.time_ns() - seconds * _SECOND_NS - nanoseconds)
    return data, 0


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Without Python's garbage collector, whose pauses are longer than what is measured, and before other programs.

    The latter (SCHED_RR, sched(7)) needs root, or CAP_SYS_NICE; without it, a busy host shows in how late requests are
    sent. Programs that are started meanwhile do not inherit it.
    """
    was_on, policy, parameter = gc.isenabled(), os.sched_getscheduler(0), os.sched_getparam(0)
    gc.collect()
    gc.freeze()
    gc.disable()
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, policy, parameter)
        gc.unfreeze()
        if was_on:
            gc.enable()


def make_room_for_files() -> None:
    """Allow this process as many open files as the system lets it have, and have the table of them made large now.

    The kernel grows it by doubling, when a file is opened, and in a process with threads waits 5 to 20 ms for that.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with socket.socket() as any_file:
        os.close(fcntl.fcntl(any_file, fcntl.F_DUPFD_CLOEXEC, min(most, _FILES) - 1))
