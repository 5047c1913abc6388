"""Malformed requests and malformed answers: no crash, no 500, nothing smuggled, nothing leaked.

Corpus and mutations, for FUZZ_SECONDS (3) each, and FUZZ_CONNECTIONS (2000) to a `warmpool serve` of its own;
`make fuzz` runs longer. FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

import psutil
import pytest

from proxy.server.forward.routes import ROUTES
from tests.scripted import GOOD, QUESTION, Peer, Scripted, answer_of, post
from tests.served import Proxy
from tests.server.test_safe_logging import KEY, PROBES, PROMPT
from tests.support import PATIENCE_S, engine_model, get_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECONDS: Final = float(os.environ.get("FUZZ_SECONDS", "3"))
SEED: Final = int(os.environ.get("FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
CONNECTIONS: Final = int(os.environ.get("FUZZ_CONNECTIONS", "2000"))
TOGETHER: Final = 16
CONNECTIONS_TOGETHER: Final = 128

_HOST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
_LENGTH = b"Content-Length: %d\r\n" % len(QUESTION)
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_STOLEN = b"POST /sleep HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
_BODY = b"%x\r\n%b\r\n0\r\n\r\n" % (len(QUESTION), QUESTION)

REQUESTS: Final = [
    post(),
    post(QUESTION, "Connection: close"),
    post(QUESTION, version="1.0"),
    post(QUESTION, "Expect: 100-continue"),
    post(QUESTION, "Expect: 100\xfccontinue").replace(b"\xc3\xbc", b"\xfc"),
    post(QUESTION, "Accept-Encoding: gzip", "Cookie: a=b", "Connection: keep-alive, X-Hop", "X-Hop: 1"),
    post() + post(),
    post(QUESTION, "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAA"),
    b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /v1/responses/abc HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET http://a/sleep HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    _HOST + _CHUNKED + b"\r\n" + _BODY,
    # Smuggling: two ways to read where the request ends.
    _HOST + _LENGTH + _CHUNKED + b"\r\n" + _BODY + _STOLEN,
    _HOST + _CHUNKED + _LENGTH + b"\r\n0\r\n\r\n" + _STOLEN,
    _HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + _BODY + _STOLEN,
    _HOST + b"Transfer-Encoding: xchunked\r\n" + _LENGTH + b"\r\n" + QUESTION + _STOLEN,
    _HOST + b"Transfer-Encoding : chunked\r\n" + _LENGTH + b"\r\n" + _BODY + _STOLEN,
    _HOST + b"Transfer-Encoding:\x0bchunked\r\n" + _LENGTH + b"\r\n" + _BODY + _STOLEN,
    _HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + _BODY + _STOLEN,
    _HOST + b"X: y\nTransfer-Encoding: chunked\r\n" + _LENGTH + b"\r\n" + _BODY + _STOLEN,
    _HOST + b"X: y\rTransfer-Encoding: chunked\r\n" + _LENGTH + b"\r\n" + _BODY + _STOLEN,
    _HOST + b"X: y\r\n folded: chunked\r\n" + _LENGTH + b"\r\n" + QUESTION,
    _HOST + _LENGTH + b"Content-Length: 0\r\n\r\n" + QUESTION + _STOLEN,
    _HOST + b"Content-Length: 0\r\n" + _LENGTH + b"\r\n" + QUESTION + _STOLEN,
    _HOST + b"Content-Length: +%d\r\n\r\n" % len(QUESTION) + QUESTION,
    _HOST + b"Content-Length: %d, %d\r\n\r\n" % (len(QUESTION), len(QUESTION)) + QUESTION,
    _HOST + b"Content-Length: 99999999999999999999\r\n\r\n" + QUESTION,
    _HOST + b"Content-Length: -1\r\n\r\n" + QUESTION,
    _HOST + b"Content-Length: 0x2\r\n\r\n{}" + _STOLEN,
    _HOST + _CHUNKED + b"\r\n-1\r\n" + QUESTION,
    _HOST + _CHUNKED + b"\r\n%x;a=b\r\n%b\r\n0\r\nX: 1\r\n\r\n" % (len(QUESTION), QUESTION) + _STOLEN,
    _HOST + _CHUNKED + b"\r\n%x\n%b\n0\n\n" % (len(QUESTION), QUESTION) + _STOLEN,
    _HOST + _CHUNKED + b"\r\n0%x\r\n%b\r\n0\r\n\r\n" % (len(QUESTION), QUESTION),
    _HOST + _CHUNKED + b"\r\n1000000000000000f\r\n" + QUESTION,
    _HOST + _CHUNKED + b"\r\n%x\r\n%bxx0\r\n\r\n" % (len(QUESTION), QUESTION) + _STOLEN,
    b"POST /v1/completions HTTP/1.1\r\n" + _LENGTH + b"\r\n" + QUESTION,
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + _LENGTH + b"\r\n" + QUESTION,
    b"POST /v1/completions HTTP/1.1\nHost: a\n" + b"Content-Length: %d\n\n" % len(QUESTION) + QUESTION,
    b"POST  /v1/completions HTTP/1.1\r\nHost: a\r\n" + _LENGTH + b"\r\n" + QUESTION,
    b"POST /v1/completions\x00 HTTP/1.1\r\nHost: a\r\n" + _LENGTH + b"\r\n" + QUESTION,
    b"POST /v1/completions HTTP/1.9\r\nHost: a\r\n" + _LENGTH + b"\r\n" + QUESTION,
    b"POST /v1/completions?x=%0d%0aX:1 HTTP/1.1\r\nHost: a\r\n" + _LENGTH + b"\r\n" + QUESTION,
    _HOST + b"X: " + b"y" * 9000 + b"\r\n" + _LENGTH + b"\r\n" + QUESTION,
    _HOST + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + _LENGTH + b"\r\n" + QUESTION,
    post(b'{"model": "demo", "model": "other"}'),
    post(b'{"model": ' + b"[" * 2000 + b"]" * 2000 + b"}"),
    post(b"\xff\xfe"),
    post(b"--b\r\nContent-Disposition: form-data; name=model\r\n\r\ndemo\r\n--b--\r\n",
         "Content-Type: multipart/form-data; boundary=b", path="/v1/audio/transcriptions"),
    post(QUESTION, "Content-Encoding: gzip"),
    post(QUESTION, "Content-Encoding: br, gzip"),
    post(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 30, "Content-Encoding: gzip"),
]  # fmt: skip

_EVENT = b"data: {}\n\n"
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ANSWERS: Final = [
    GOOD,
    GOOD + GOOD,
    _STREAM + b"a\r\n%b\r\n" % _EVENT * 3 + b"0\r\n\r\n",
    _STREAM + b"a;x=1\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n" % _EVENT,
    _STREAM + b"ffffffffffffff\r\n" + _EVENT,
    _STREAM + b"a\r\n%b\r\n" % _EVENT,
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nabcde",
    b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD,
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}x",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx: a\r\n b\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx: a\rset-cookie: b\r\n\r\n{}",
    b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}",
    b"HTTP/1.1 999 Odd\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 \xff\xfe\r\ncontent-length: 2\r\nx: \xff\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    b"",
    b"\x00" * 100,
]
TOKENS: Final = [
    b"\r\n", b"\n", b"\r", b"\x00", b" ", b"\t", b":", b";", b",", b"0", b"-1", b"ffffffff", b"\xff", b"%0d%0a",
    b"chunked", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"HTTP/1.1",
    b"HTTP/0.9", b"\r\n\r\n", b"0\r\n\r\n", b"Expect: 100-continue\r\n", b"Host: b\r\n", b'"model"', b"{", b"[[[[",
]  # fmt: skip


def mutated(chance: random.Random, corpus: list[bytes]) -> bytes:
    """One of the corpus, changed in up to six places."""
    data = bytearray(chance.choice(corpus))
    for _ in range(chance.choice((0, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : at + chance.randrange(1, 20)]
            case 2:
                data[at:at] = chance.choice(TOKENS)
            case 3:
                data[at:at] = data[at : at + chance.randrange(1, 60)]
            case 4:
                other = chance.choice(corpus)
                data[at:] = other[chance.randrange(len(other) + 1) :]
            case _:
                del data[at:]
    return bytes(data)


def pieces(chance: random.Random, data: bytes) -> list[bytes]:
    """The same in up to four packets."""
    places = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(4)))
    return [part for a, b in zip([0, *places], [*places, len(data)], strict=True) if (part := data[a:b])]


class Watch(logging.Handler):
    """Collects what is logged as an error: an exception that nobody had thought of."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(self.format(record))


async def until_quiet(proxy: Scripted) -> None:
    """Return when nothing of any request is left: no lease, no connection to the engine beside idle ones, no client."""
    await proxy.idle()
    await proxy.upstream.disconnect()
    async with asyncio.timeout(PATIENCE_S):
        while proxy.service.connections:
            await asyncio.sleep(0.01)


async def fuzz(proxy: Scripted, once: Callable[[random.Random], Any]) -> int:
    """Do it for a while, several at a time; how often."""
    watch = Watch()
    logging.getLogger().addHandler(watch)
    count = 0
    try:
        assert answer_of(await proxy.ask(post(QUESTION, "Connection: close"), GOOD))[0] == 200
        files = len(psutil.Process().open_files()) + len(psutil.Process().net_connections())
        loop = asyncio.get_running_loop()
        end = loop.time() + SECONDS

        async def worker(number: int) -> None:
            nonlocal count
            chance = random.Random(f"{SEED} {number}")
            while loop.time() < end:
                await once(chance)
                count += 1

        await asyncio.gather(*map(worker, range(TOGETHER)))
        await until_quiet(proxy)
        proxy.script = [GOOD]
        assert answer_of(await proxy.ask(post(QUESTION, "Connection: close")))[0] == 200
        await until_quiet(proxy)
        for peer in proxy.peers:
            peer.writer.close()
        gc.collect()
        assert watch.seen == [], f"FUZZ_SEED={SEED}"
        async with asyncio.timeout(PATIENCE_S):
            while len(psutil.Process().open_files()) + len(psutil.Process().net_connections()) > files + 2:
                await asyncio.sleep(0.02)
    finally:
        logging.getLogger().removeHandler(watch)
    return count


_PATH = re.compile(rb"[A-Z]+ ([!-~]+) HTTP/1\.1\r\n")
_KNOWN: Final = {route.path.encode() for route in ROUTES if "{id}" not in route.path}


@pytest.mark.timeout(60 + 3 * SECONDS)
async def test_requests() -> None:
    """Whatever comes, the engine sees whole requests for known routes, and nobody sees a 500."""
    async with Scripted() as proxy:

        async def once(chance: random.Random) -> None:
            request = mutated(chance, REQUESTS)
            reader, writer = await proxy.connection()
            answer = b""
            try:
                for piece in pieces(chance, request):
                    writer.write(piece)
                    await asyncio.sleep(0)
                while True:
                    # Many wait for a rest that will never come.
                    data = await asyncio.wait_for(reader.read(1 << 16), 0.1)
                    if not data:
                        break
                    answer += data
            except (TimeoutError, ConnectionError):
                pass
            finally:
                writer.transport.abort()
            statuses = {int(s) for s in re.findall(rb"HTTP/1\.[01] (\d+)", answer)}
            assert all(s < 500 for s in statuses), f"FUZZ_SEED={SEED}: {statuses} after {request!r}"

        assert await fuzz(proxy, once) > 20
        for head, body in [request for peer in proxy.peers for request in peer.requests]:
            target = _PATH.match(head)
            assert target is not None, head
            path = target[1].split(b"?")[0]
            assert path in _KNOWN or path.startswith(b"/v1/responses/"), head
            fields = [line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2]]
            names = [name.lower() for name, _ in fields]
            assert names.count(b"content-length") == 1, head
            assert b"transfer-encoding" not in names, head
            assert b"cookie" not in names, head
            assert int(dict(zip(names, [v for _, v in fields], strict=True))[b"content-length"]) == len(body)


@pytest.mark.timeout(60 + 3 * SECONDS)
async def test_answers() -> None:
    """Whatever an engine sends, the client gets one answer or a break, never the bytes of another one."""
    async with Scripted(silence_s=0.3) as proxy:

        async def once(chance: random.Random) -> None:
            answer = mutated(chance, ANSWERS)
            script = pieces(chance, answer)
            end = chance.choice((None, Peer.close, Peer.reset))

            async def play(peer: Peer) -> None:
                for piece in script:
                    await peer.send(piece)
                    await asyncio.sleep(0)
                if end is not None:
                    await end(peer)

            version = chance.choice(("1.1", "1.1", "1.0"))
            reader, writer = await proxy.connection()
            # Each has its own script: the engine finds it by the request's id.
            name = f"{chance.randrange(1 << 60):x}"
            scripts[name] = play
            raw = b""
            try:
                writer.write(post(QUESTION, f"X-Request-Id: {name}", "Connection: close", version=version))
                async with asyncio.timeout(PATIENCE_S):
                    while data := await reader.read(1 << 16):
                        raw += data
            except ConnectionError:
                return
            finally:
                writer.close()
                del scripts[name]
            assert raw.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), f"FUZZ_SEED={SEED}: {answer!r} became {raw!r}"
            assert name.encode() in raw.split(b"\r\n\r\n")[0], f"FUZZ_SEED={SEED}: {answer!r} became {raw!r}"
            assert b"Internal error" not in raw

        scripts: dict[str, Any] = {}

        async def by_id(peer: Peer) -> None:
            found = re.search(rb"\r\nx-request-id: ([0-9a-f]+)\r\n", peer.requests[-1][0], re.IGNORECASE)
            play = scripts.get(found[1].decode()) if found is not None else None
            if play is None:
                await peer.send(GOOD)
            else:
                await play(peer)

        async def fuzzed(chance: random.Random) -> None:
            proxy.script = [by_id]
            await once(chance)

        assert await fuzz(proxy, fuzzed) > 20


_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d+)")
_NETWORK: Final = 1000
"""Clients' addresses, all on loopback: more than the log tells apart."""


class Client(asyncio.Protocol):
    """One connection: sends its pieces, one in each turn of the loop, and takes what comes until it leaves."""

    def __init__(self, script: list[bytes], *, waits: bool) -> None:
        self._script = script
        self._waits = waits
        self.answer = b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._next()

    def _next(self) -> None:
        loop = asyncio.get_running_loop()
        if self._transport.is_closing():
            return
        if self._script:
            self._transport.write(self._script.pop(0))
            loop.call_soon(self._next)
        elif self._waits:
            # Many wait for a rest that will never come.
            loop.call_later(0.1, self._transport.abort)
        else:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self.answer += data

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Health:
    """Asks `/health` again and again, on connections and in a thread of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.asked = 0
        self.failed: list[str] = []
        self.longest_s = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(0.1):
            began = time.monotonic()
            answer = b""
            try:
                with socket.create_connection(("127.0.0.1", self._port), PATIENCE_S) as connection:
                    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    answer = connection.recv(1 << 16)
            except OSError as error:
                answer = repr(error).encode()
            self.asked += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            if not answer.startswith(b"HTTP/1.1 200"):
                self.failed.append(answer.decode("latin-1"))


@pytest.mark.timeout(120 + CONNECTIONS / 50)
async def test_connections(tmp_path: Path) -> None:
    """So many malformed connections to a real server: no 500, no stack, nothing stuck, a log with an end."""
    settings: dict[str, Any] = {
        "server": {"hosts": ["a", "b", "proxy"]},
        "models": {"demo": engine_model(idle={"sleeping": "never"})},
    }
    proxy = await Proxy(tmp_path / "it", settings=settings).listening()
    try:
        await proxy.ask()
        port = int(proxy.url.rpartition(":")[2])
        began = time.monotonic()
        with Health(port) as health:
            statuses = await _flood(port)
        took_s = time.monotonic() - began
        async with asyncio.timeout(PATIENCE_S):
            while (await get_json(f"{proxy.url}/admin/status"))["leases"]:
                await asyncio.sleep(0.02)
        assert (await proxy.ask())[0] == "ready", "nothing is stuck"
        memory = psutil.Process(proxy.process.pid).memory_info().rss
    finally:
        proxy.process.send_signal(signal.SIGTERM)
        await proxy.ended()
    log = proxy.log.read_text()
    seen = (
        f"FUZZ_SEED={SEED}: {CONNECTIONS} connections in {took_s:.0f} s; statuses {dict(sorted(statuses.items()))}; "
        f"log {len(log)} bytes, {log.count(chr(10))} lines; /health asked {health.asked} times, at most "
        f"{health.longest_s * 1000:.0f} ms; {memory >> 20} MiB"
    )
    print(seen)  # noqa: T201 - the figures, with `pytest -s`
    assert health.failed == [], seen
    assert all(status < 500 for status in statuses), seen
    assert [line for line in log.splitlines() if "Traceback" in line or " ERROR " in line] == [], seen
    told = re.sub(r"request_id=\S+", "", log)  # a client's own, where it sent one
    assert not [secret for secret in (KEY, PROMPT) if secret in told], seen
    served = sum(count for status, count in statuses.items() if status < 400)
    assert log.count("\n") < 4 * served + 200 + _NETWORK * (1 + took_s / 60), seen


async def _flood(port: int) -> Counter[int]:
    """The statuses of all answers."""
    statuses: Counter[int] = Counter()
    corpus = [*REQUESTS, *PROBES.values()]
    left = CONNECTIONS
    loop = asyncio.get_running_loop()

    async def worker(number: int) -> None:
        nonlocal left
        chance = random.Random(f"{SEED} {number}")
        while left > 0:
            left -= 1
            data = mutated(chance, corpus)
            address = f"127.0.{chance.randrange(4)}.{1 + chance.randrange(_NETWORK // 4)}"
            make = partial(Client, pieces(chance, data), waits=chance.random() < 0.8)
            _, client = await loop.create_connection(make, "127.0.0.1", port, local_addr=(address, 0))
            await client.ended
            found = {int(status) for status in _STATUS.findall(client.answer)}
            assert all(status < 500 for status in found), f"FUZZ_SEED={SEED}: {found} after {data!r}"
            statuses.update(found)

    await asyncio.gather(*map(worker, range(CONNECTIONS_TOGETHER)))
    return statuses
