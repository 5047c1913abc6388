"""A client made of bare sockets and epoll: many connections for little work.

It knows just enough of HTTP to send a prepared request and to see where an answer begins and ends. Times are seconds.
"""

from __future__ import annotations

import random
import select
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loadtest.proxy_upstream import EVENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MARK = EVENT[:6]


def request(path: str, body: bytes, host: str = "127.0.0.1") -> bytes:
    """A POST with a JSON body."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAuthorization: Bearer none\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


class Wires:
    """Connections to one address, watched by one epoll."""

    def __init__(self, port: int, count: int) -> None:
        self._epoll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        for _ in range(count):
            wire = socket.create_connection(("127.0.0.1", port), timeout=30)
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.setblocking(False)
            self.sockets[wire.fileno()] = wire
            self._epoll.register(wire.fileno(), select.EPOLLIN)

    def readable(self, timeout_s: float) -> Iterator[tuple[int, bytes]]:
        """What has come, by file descriptor; b"" is an end."""
        for number, _ in self._epoll.poll(max(0.0, timeout_s)):
            try:
                data = self.sockets[number].recv(1 << 18)
            except BlockingIOError:
                continue
            except ConnectionError:
                data = b""
            yield number, data

    def drop(self, number: int) -> None:
        """Close one."""
        self._epoll.unregister(number)
        self.sockets.pop(number).close()

    def close(self) -> None:
        """Close all."""
        for number in [*self.sockets]:
            self.drop(number)
        self._epoll.close()


def whole(answer: bytes) -> bool:
    """Whether an answer has come to its end, with a length or chunked."""
    head_end = answer.find(b"\r\n\r\n")
    if head_end < 0:
        return False
    head = answer[:head_end].lower()
    at = head.find(b"content-length:")
    if at < 0:
        return answer.endswith(b"0\r\n\r\n")
    return len(answer) - head_end - 4 >= int(head[at + 15 :].split(b"\r\n", 1)[0])


@dataclass(slots=True)
class Paced:
    """Latencies of an open loop, each from the moment its request was due."""

    latencies_s: list[float] = field(default_factory=list)
    failed: int = 0


def paced(port: int, message: bytes, *, connections: int, rate: float, seconds: float) -> Paced:
    """Send requests at random moments, `rate` a second on average, over `connections` kept ones.

    A request that finds every connection busy waits for one, and its wait counts.
    """
    chance = random.Random(7)
    wires = Wires(port, connections)
    idle = [*wires.sockets]
    due: list[float] = []
    busy: dict[int, float] = {}
    partial: dict[int, bytes] = {}
    result = Paced()
    now = began = time.perf_counter()
    next_at = began + chance.expovariate(rate)
    while busy or due or next_at < began + seconds:
        now = time.perf_counter()
        while next_at <= now and next_at < began + seconds:
            due.append(next_at)
            next_at += chance.expovariate(rate)
        while due and idle:
            number = idle.pop()
            busy[number] = due.pop(0)
            partial[number] = b""
            wires.sockets[number].send(message)
        if now > began + seconds + 30:
            result.failed += len(busy) + len(due)
            break
        wait_s = next_at - now if next_at < began + seconds else 0.05
        for number, data in wires.readable(wait_s):
            if not data:
                result.failed += number in busy
                busy.pop(number, None)
                wires.drop(number)
                idle = [n for n in idle if n != number]
                continue
            partial[number] += data
            if number in busy and whole(partial[number]):
                result.latencies_s.append(time.perf_counter() - busy.pop(number))
                result.failed += not partial[number].startswith(b"HTTP/1.1 200")
                idle.append(number)
        if not wires.sockets:
            break
    wires.close()
    return result


@dataclass(slots=True)
class Streamed:
    """What came of many streams in a window of time."""

    first_byte_s: list[float]
    events: int
    seconds: float
    ended: int
    """Streams that ended within the window, which none should."""


def streams(
    port: int, message: bytes, *, count: int, settle_s: float, window_s: float, at: Callable[[str], None]
) -> Streamed:
    """Open `count` streams, let them run, and count the events that come within a window.

    `at` is called at its begin and at its end ("begin", "end").
    """
    wires = Wires(port, count)
    sent: dict[int, float] = {}
    first: dict[int, float] = {}
    ended = events = 0
    for number, wire in wires.sockets.items():
        sent[number] = time.perf_counter()
        wire.send(message)
        for ready, data in wires.readable(0):
            first.setdefault(ready, time.perf_counter() - sent[ready])
            ended += not data
    begin = time.perf_counter() + settle_s
    end = begin + window_s
    counting = False
    while (now := time.perf_counter()) < end:
        if not counting and now >= begin:
            counting = True
            begin, end, events = now, now + window_s, 0
            at("begin")
        for number, data in wires.readable(min(0.01, end - now)):
            if not data:
                ended += 1
                wires.drop(number)
                continue
            if number not in first:
                first[number] = time.perf_counter() - sent[number]
            events += data.count(_MARK)
    at("end")
    seconds = time.perf_counter() - begin
    wires.close()
    return Streamed([*first.values()], events, seconds, ended)


def first_tokens(port: int, message: bytes, *, count: int) -> list[float]:
    """Time to the first token of `count` streams, one after the other, each on the same kept connection."""
    times = []
    wire = socket.create_connection(("127.0.0.1", port), timeout=30)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(count):
        began = time.perf_counter()
        wire.sendall(message)
        received = b""
        first = None
        while not received.endswith(b"\r\n0\r\n\r\n"):
            data = wire.recv(1 << 16)
            if not data:
                raise ConnectionError("the stream broke")
            received += data
            if first is None and _MARK in received:
                first = time.perf_counter() - began
        assert first is not None
        times.append(first)
    wire.close()
    return times


@dataclass(slots=True)
class Waited:
    """Requests that waited together for one wake."""

    sent: int
    answered: int
    refused: int
    first_s: float
    last_s: float
    """From the release to the first and to the last answer."""


def waiting(
    port: int, message: bytes, *, count: int, settled: Callable[[], None], release: Callable[[], None]
) -> Waited:
    """Open `count` connections with one request each; `settled` is called when all are out, then `release`."""
    wires = Wires(port, count)
    for wire in wires.sockets.values():
        wire.send(message)
    settled()
    release()
    began = time.perf_counter()
    partial = dict.fromkeys(wires.sockets, b"")
    answered = refused = 0
    first_s = last_s = 0.0
    while wires.sockets and time.perf_counter() - began < 120:
        for number, data in wires.readable(1.0):
            partial[number] += data
            if data and not whole(partial[number]):
                continue
            if partial[number].startswith(b"HTTP/1.1 200") and whole(partial[number]):
                answered += 1
                last_s = time.perf_counter() - began
                first_s = first_s or last_s
            else:
                refused += 1
            wires.drop(number)
    wires.close()
    return Waited(count, answered, refused, first_s, last_s)
