"""Ordinary requests below aiohttp's server: the same answers as above it, byte for byte, and nothing else differs."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.engine.http1 import ProtocolError
from proxy.server import app
from proxy.server.auth import api_keys
from proxy.server.connection_limits import _problem_with
from proxy.server.front import Passage, parts_of, shape_of
from tests.scripted import GOOD, QUESTION, Peer, Scripted, answer_of, post
from tests.server.test_fuzz import REQUESTS, mutated
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from pathlib import Path

    from tests.front import Front

ABOVE = "x-warmpool-max-wait: 60"
"""A field that nobody gets to see, and that only aiohttp's side knows what to do with."""
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM = orjson.dumps({"model": "demo", "prompt": "Hello", "stream": True})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.fixture
def below(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each request that was begun below aiohttp's server, and for each that was handed on."""
    seen: list[str] = []
    begin, hand = Passage.begin, Passage._hand

    def begun(self: Passage) -> None:
        seen.append("begun")
        begin(self)

    def handed(self: Passage, exchange: Any) -> None:
        seen.append("handed")
        hand(self, exchange)

    monkeypatch.setattr(Passage, "begin", begun)
    monkeypatch.setattr(Passage, "_hand", handed)
    return seen


def plain(raw: bytes) -> bytes:
    """Without what differs from one moment to the next."""
    raw = re.sub(rb"\r\ndate: [^\r]+", b"\r\ndate: D", raw, flags=re.IGNORECASE)
    return re.sub(rb"=\d+\.\d", b"=T", raw)


async def awake(proxy: Scripted) -> None:
    """An instance is ready, and a connection to it is kept."""
    assert answer_of(await proxy.ask(post(QUESTION, "Connection: close"), GOOD))[0] == 200
    await proxy.idle()


# --- the same answers ---

ANSWERS: dict[str, list[Any]] = {
    "sized": [GOOD],
    "sized, in pieces": [GOOD[:30], GOOD[30:-5], GOOD[-5:]],
    "in title case": [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"],
    "no body": [b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-a: 1\r\n\r\n"],
    "more than its length": [GOOD + b"more"],
    "a reason of its own": [b"HTTP/1.1 201 Made Well\r\nx-a: 1\r\nX-B: 2\r\ncontent-length: 2\r\n\r\n{}"],
    "no reason": [b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\n{}"],
    "what clients must not see": [
        b"HTTP/1.1 200 OK\r\nserver: x\r\nset-cookie: a=b\r\nlocation: http://e/\r\nconnection: x-hop\r\n",
        b"x-hop: 1\r\nx-warmpool-tier: no\r\nx-request-id: other\r\ncontent-length: 2\r\ndate: x\r\n\r\n{}",
    ],
    "HTTP/1.0": [b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}"],
    "connection: close": [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"],
    "a stream": [SSE, chunk(b"data: 1\n\n"), chunk(b"data: 2\n\n") + chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"],
    "a stream in one piece": [SSE + chunk(b"data: 1\n\n") + b"0\r\n\r\n"],
    "a stream without events": [SSE, b"0\r\n\r\n"],
    "odd chunks": [SSE, b"9;x=1\r\nda", b"ta: 1\n\n\r", b"\n0\r\nX-Sum: 1\r\nSet-Cookie: a\r\n\r\n"],
    "until the end": [b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nall of it", Peer.close],
    "a client's error": [b"HTTP/1.1 404 Not Found\r\ncontent-length: 13\r\n\r\n{\"error\": {}}"],
    "an error": [b"HTTP/1.1 500 Oops\r\ncontent-length: 13\r\n\r\n{\"error\": {}}"],
    "an error with a stack": [
        b"HTTP/1.1 500 Oops\r\ncontent-length: 34\r\n\r\nTraceback (most recent call last)\n"
    ],
    "204": [b"HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n"],
    "304": [b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n"],
    "100 first": [b"HTTP/1.1 100 Continue\r\n\r\n", GOOD],
    "odd bytes": [b"HTTP/1.1 200 \xff\xfe\r\nx-odd: \xe4\xff\r\ncontent-length: 2\r\n\r\n{}"],
    "two lengths": [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nContent-Length: 3\r\n\r\n{}x"],
    "garbage": [b"garbage\r\n\r\n"],
    "nothing": [Peer.close],
    "half a head": [GOOD[:30], Peer.reset],
    "half a body": [GOOD[:-5], Peer.close],
    "half a stream": [SSE + chunk(b"data: 1\n\n"), b"9\r\nda", Peer.reset],
}  # fmt: skip
REQUESTS_ALIKE = {
    "plain": post(QUESTION, "X-Request-Id: r1"),
    "closing": post(QUESTION, "X-Request-Id: r1", "Connection: close"),
    "with all sorts of fields": post(
        QUESTION, "x-request-id: r1", "Authorization: Bearer none", "Cookie: a=b", "User-Agent: x y", "X-A:1",
        "X-B:  2 ", "X-Empty:", "X-Forwarded-For: 10.0.0.1", "Connection: Keep-Alive", "Accept: */*",
        "traceparent: 00-1-2-01", "Content-Type: application/json; charset=utf-8",
    ),
    "a model to be filled in": post(b'{"model": "alias", "prompt": "x"}', "X-Request-Id: r1"),
    "two models": post(b'{"model": "other", "model": "demo", "prompt": "x"}', "X-Request-Id: r1"),
    "a stream": post(STREAM, "X-Request-Id: r1", path="/v1/chat/completions"),
    "not JSON": post(b"{", "X-Request-Id: r1"),
    "no such model": post(b'{"model": "other"}', "X-Request-Id: r1"),
}  # fmt: skip


async def spoken(proxy: Scripted, request: bytes, script: list[Any]) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """All bytes of the answer, and what reached the engine for it."""
    before = [len(peer.requests) for peer in proxy.peers]
    proxy.script = script
    reader, writer = await proxy.connection()
    raw = b""
    try:
        writer.write(request)
        async with asyncio.timeout(PATIENCE_S):
            while not _whole(raw) and (data := await reader.read(1 << 16)):
                raw += data
    except ConnectionError:
        raw += b"(reset)"
    finally:
        writer.close()
    await proxy.idle()
    before += [0] * (len(proxy.peers) - len(before))
    return plain(raw), [r for peer, n in zip(proxy.peers, before, strict=True) for r in peer.requests[n:]]


def _whole(raw: bytes) -> bool:
    try:
        _, fields, _, _ = answer_of(raw)
    except (ProtocolError, AssertionError, ValueError):
        return False
    return "content-length" in fields or "transfer-encoding" in fields or raw.startswith(b"HTTP/1.1 204")


# What a request looks like matters to a few answers only.
PAIRS = [
    (request, answer)
    for answer in ANSWERS
    for request in REQUESTS_ALIKE
    if request in ("plain", "closing") or answer in ("sized", "a stream", "an error", "nothing")
]


@pytest.mark.parametrize(("request_", "answer"), PAIRS, ids=map("; ".join, PAIRS))
async def test_both_ways_give_the_same(
    request_: str, answer: str, below: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """To the client, to the engine, to the log and to the metrics."""
    caplog.set_level("INFO", "warmpool.request")
    data = REQUESTS_ALIKE[request_]
    found = []
    for path in ("below", "above"):
        request = data if path == "below" else data.replace(b"\r\n\r\n", b"\r\n%b\r\n\r\n" % ABOVE.encode(), 1)
        async with Scripted(aliases=["alias"]) as proxy:
            await awake(proxy)
            below.clear()
            caplog.clear()
            heard = await spoken(proxy, request, ANSWERS[answer])
            async with asyncio.timeout(PATIENCE_S):
                while not (lines := [re.sub(r"_ms=[\d.]+", "_ms=T", m) for m in caplog.messages if "=r1 " in m]):
                    await asyncio.sleep(0.002)
            samples = {
                (s.name, *sorted(s.labels.items())): s.value
                for family in proxy.metrics.registry.collect()
                for s in family.samples
                if s.name in ("warmpool_requests_total", "warmpool_ttft_seconds_count", "warmpool_running_requests")
            }
            found.append((heard, lines, samples))
            assert bool(below) == (path == "below" and request_ not in ("not JSON", "no such model"))
    engine = [[(re.sub(rb"127[^\r]+", b"E", head), body) for head, body in f[0][1]] for f in found]
    assert found[0][0][0] == found[1][0][0]
    assert engine[0] == engine[1]
    assert found[0][1:] == found[1][1:]


# --- what is ordinary ---


def read_by_aiohttp(data: bytes) -> list[Any]:
    """The requests that aiohttp's parser and authentication find in some bytes."""

    class Protocol:
        _reading_paused = False

        def pause_reading(self) -> None: ...

        def resume_reading(self, **_: Any) -> None: ...

    parser = HttpRequestParser(Protocol(), asyncio.get_running_loop(), 1 << 16, max_headers=500)  # type: ignore[arg-type]
    try:
        messages, _, tail = parser.feed_data(data)
    except HttpProcessingError:
        return []
    return [*messages, *([tail] if tail else [])]


def test_what_is_taken_is_read_as_aiohttp_reads_it() -> None:
    """Requests of the fuzz corpus and good ones, mutated: one that is taken has one reading."""
    good = [*REQUESTS_ALIKE.values(), post(), post(QUESTION, "X-A: 1"), post().lower()]
    taken = 0

    async def once(chance: random.Random) -> None:
        nonlocal taken
        data = mutated(chance, good * 4 + REQUESTS)
        parts = parts_of(data, 4096)
        if parts is None or (shape := shape_of(parts[0])) is None or parts[1] + parts[2] != len(data):
            return
        taken += 1
        messages = read_by_aiohttp(data)
        assert len(messages) == 1, data
        message, payload = messages[0]
        assert _problem_with(message) is None
        assert (message.method, message.path) == ("POST", shape.match.target)
        assert message.should_close == shape.closes
        assert (message.upgrade, message.chunked, message.compression) == (False, False, None)
        assert payload.is_eof()
        assert await payload.read() == data[parts[1] :]
        assert len(message.headers.getall("Host")) == 1
        assert message.headers.getall("Content-Length") == [str(parts[2])]
        sent = [line.split(b": ", 1) for line in shape.fields.split(b"\r\n")[:-1]]
        assert [tuple(field) for field in sent] == [
            field for field in message.raw_headers if field[0].lower() in {name.lower() for name, _ in sent}
        ]

    async def all_of_them(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            await once(chance)

    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, 1 << 32))
    def always(seed: int) -> None:
        asyncio.run(all_of_them(seed))

    always()
    assert taken > 100


@pytest.mark.parametrize(
    "field",
    [
        "Transfer-Encoding: chunked", "Expect: 100-continue", "Upgrade: h2c", "Origin: http://localhost", ABOVE,
        "Content-Encoding: gzip", "Connection: keep-alive, x-hop", "Content-Length: 3", "content-length: 3", "Host: b",
        "Sec-WebSocket-Key: x", "TE: trailers", "X-A: 1\r\nx-a: 2", "X-A: \x01", "X-A: 1\n", "X-A : 1",
        "X-A: 1\r\n folded", "X-Odd: \xe4",
    ],
)  # fmt: skip
def test_what_has_to_be_looked_at_closely_is_not_ordinary(field: str) -> None:
    data = post(QUESTION, field)
    parts = parts_of(data, 4096)
    assert parts is None or shape_of(parts[0]) is None
    parts = parts_of(post(), 4096)
    assert parts is not None
    assert shape_of(parts[0]) is not None


async def test_a_body_that_comes_behind_its_head_is_waited_for(below: list[str]) -> None:
    async with Scripted() as proxy:
        await awake(proxy)
        below.clear()
        head, body = post(QUESTION, "X-Request-Id: r1").split(b"\r\n\r\n")
        reader, writer = await proxy.connection()
        for _ in range(3):
            for piece in (head + b"\r\n\r\n", body[:9], body[9:]):
                writer.write(piece)
                await asyncio.sleep(0.01)
            async with asyncio.timeout(PATIENCE_S):
                assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.close()
        assert below == ["begun"] * 3


async def test_a_body_that_lets_others_wait_has_its_time_from_its_beginning(front_of: Any, below: list[str]) -> None:
    front: Front = await front_of(server={"limits": {"upload_timeout": "300ms"}})
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(post(QUESTION)[:-1])
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()
    assert front.sample("warmpool_refused_total", reason="slow_body") == 1
    assert below == []


async def test_requests_that_come_at_once_are_answered_in_their_order(below: list[str]) -> None:
    """Some at once, then one by one until one of them went the short way, again and again on one connection."""
    async with Scripted() as proxy:
        await awake(proxy)
        proxy.script = [_echo]
        reader, writer = await proxy.connection()
        names = (f"r{n}" for n in itertools.count())
        chance = random.Random(7)

        async def ask(count: int) -> None:
            asked = list(itertools.islice(names, count))
            for name in asked:
                writer.write(post(QUESTION, f"X-Request-Id: {name}"))
                await asyncio.sleep(chance.choice((0, 0, 0.001)))
            for name in asked:
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"x-request-id: %b\r\n" % name.encode() in head.lower()
                assert await reader.readexactly(len(name)) == name.encode()

        async with asyncio.timeout(PATIENCE_S):
            for _ in range(8):
                await ask(chance.randint(2, 6))
                below.clear()
                while not below:  # aiohttp may still be at the end of the last one
                    await ask(1)
        writer.close()


async def _echo(peer: Peer) -> None:
    found = re.search(rb"x-request-id: (\w+)", peer.requests[-1][0], re.IGNORECASE)
    assert found is not None
    await asyncio.sleep(0.003)
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(found[1]), found[1]))


async def test_much_that_comes_behind_a_request_is_not_read_before_its_turn(below: list[str]) -> None:
    async with Scripted() as proxy:
        await awake(proxy)
        release = asyncio.Event()

        async def wait(peer: Peer) -> None:
            await release.wait()
            await peer.send(GOOD)

        proxy.script = [wait]
        reader, writer = await proxy.connection()
        large = post(orjson.dumps({"model": "demo", "prompt": "x" * 500_000}))
        writer.write(post())
        async with asyncio.timeout(PATIENCE_S):
            while len(proxy.peers[-1].requests) < 2:
                await asyncio.sleep(0.002)
            assert below[-1] == "begun"
            for _ in range(40):
                writer.write(large)
            await asyncio.sleep(0.2)
            assert writer.transport.get_write_buffer_size() > 1 << 20, "held back"
            release.set()
            for _ in range(41):
                await reader.readuntil(b"}")
        writer.close()


# --- what it is part of ---


async def test_a_request_is_waited_for_when_the_server_stops_and_is_the_last_of_its_connection(
    below: list[str],
) -> None:
    async with Scripted() as proxy:
        await awake(proxy)
        release = asyncio.Event()
        traffic = proxy.runner.app[app.TRAFFIC]

        async def wait(peer: Peer) -> None:
            await release.wait()
            await peer.send(GOOD)

        proxy.script = [wait]
        below.clear()
        request = asyncio.create_task(proxy.ask(post()))
        async with asyncio.timeout(PATIENCE_S):
            while not below:
                await asyncio.sleep(0.002)
            traffic.stop()
            ended = asyncio.create_task(traffic.ended(0.01))
            await asyncio.sleep(0.1)
            assert not ended.done()
            release.set()
            status, fields, body, _ = answer_of(await request)
            await ended
        assert (status, fields["connection"], body) == (200, "close", b'{"text":"hi"}')
        proxy.script = [GOOD]
        assert answer_of(await proxy.ask(post()))[1]["connection"] == "close"
        assert below == ["begun"], "then it is for aiohttp"


async def test_an_idle_connection_has_its_time_and_one_at_work_has_more(front_of: Any, below: list[str]) -> None:
    front: Front = await front_of("--ttft", "1", server={"limits": {"idle_timeout": "400ms"}})
    await front.post("/v1/completions", {"model": "demo", "prompt": "wake"})
    below.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(2):
            writer.write(post())
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        began = loop.time()
        await reader.read()
    assert loop.time() - began > 0.3
    writer.close()
    assert below == ["begun"] * 2


async def test_a_key_counts_the_same_both_ways(tmp_path: Path, front_of: Any, below: list[str]) -> None:
    """What it may do, what is left of its limits, the tokens that an answer cost, and its name in the log."""
    file = tmp_path / "keys.toml"
    limits: dict[str, dict[str, Any]] = {
        "free": {}, "limited": {"requests_per_minute": 4, "tokens_per_minute": 10_000},
        "elsewhere": {"models": []}, "single": {"concurrency": 1},
    }  # fmt: skip
    made = {name: api_keys.generate(name, **more) for name, more in limits.items()}
    with api_keys.changing(file) as entries:
        entries.update({id_: entry for id_, _, entry in made.values()})
    asked = orjson.dumps({"model": "demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0})
    found: list[list[Any]] = []
    for number, path in enumerate(("below", "above")):
        front: Front = await front_of(server={"keys_file": str(file)})
        now = time.monotonic()
        front.auth._clock = lambda now=now: now  # type: ignore[misc]
        await _asked(front, post(asked, f"Authorization: Bearer {made['free'][1]}"))
        below.clear()
        more = () if path == "below" else (ABOVE,)
        answers: list[Any] = []
        for name in ("free", "limited", "limited", "elsewhere", "single", "limited", "limited", "limited"):
            for stream in (False, True):
                body = asked if not stream else asked[:-1] + b',"stream":true}'
                head = await _asked(front, post(body, f"Authorization: Bearer {made[name][1]}", *more))
                answers.append((name, stream, head))
        head = await _asked(front, post(asked, "Authorization: Bearer wrong", *more))
        assert head.startswith(b"HTTP/1.1 401")
        head = await _asked(front, post(asked, f"x-api-key: {made['free'][1]}", *more))
        assert head.startswith(b"HTTP/1.1 200")
        found.append(answers)
        assert len(below) == (0 if number else 9)
    assert found[0] == found[1]


async def _asked(front: Front, request: bytes) -> bytes:
    """The head of an answer, without what differs each time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(request)
    async with asyncio.timeout(PATIENCE_S):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"chunked" in head:
            await reader.readuntil(b"0\r\n\r\n")
        elif found := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
            await reader.readexactly(int(found[1]))
    writer.close()
    while front.pool.status()["leases"]:
        await asyncio.sleep(0.002)
    head = re.sub(rb"x-request-id: \w+", b"x-request-id: R", head, flags=re.IGNORECASE)
    return re.sub(rb"content-length: \d+", b"content-length: N", plain(head), flags=re.IGNORECASE)


async def test_nothing_is_taken_that_has_to_wait_or_to_be_watched(front_of: Any, below: list[str]) -> None:
    front: Front = await front_of(server={"heartbeat": "5s"})
    ask = {"model": "demo", "prompt": "Hello", "max_tokens": 8}
    response, _ = await front.post("/v1/completions", ask)  # wakes it
    assert response.status == 200
    assert below == []
    await front.post("/v1/completions", {**ask, "stream": True})
    assert below == []
    async with asyncio.timeout(PATIENCE_S):
        while not below:  # one that comes while aiohttp still ends the last one is aiohttp's
            await front.post("/v1/completions", ask)
    assert below == ["begun"]
    front.pool.drain("demo")
    response, _ = await front.post("/v1/completions", ask)
    assert response.status == 503
    front.pool.undrain("demo")
    await front.post("/v1/responses", {"model": "demo", "input": "Hello"})
    assert below == ["begun"]
