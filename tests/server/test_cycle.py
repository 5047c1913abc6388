"""One request through, on raw bytes: whatever the engine answers, whatever shape the request has, however it comes."""

from __future__ import annotations

import asyncio
import gzip
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

from proxy.config.server import LimitSettings
from proxy.engine.http1 import ProtocolError
from proxy.server.auth import api_keys
from proxy.server.http_request import BadRequestError, HeadReader, RequestHead, RequestHeads, usual_parts
from tests.scripted import GOOD, QUESTION, Peer, Scripted, answer_of, post
from tests.server.test_fuzz import REQUESTS, mutated
from tests.support import PATIENCE_S, examples

if TYPE_CHECKING:
    from pathlib import Path

    from tests.front import Front

SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM = orjson.dumps({"model": "demo", "prompt": "Hello", "stream": True})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def awake(proxy: Scripted) -> None:
    """An instance is ready, and a connection to it is kept."""
    assert answer_of(await proxy.ask(post(QUESTION, "Connection: close"), GOOD))[0] == 200
    await proxy.idle()


# --- answers ---

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


EXPECTED: dict[str, tuple[int, bytes] | None] = {
    "sized": (200, b'{"text":"hi"}'), "sized, in pieces": (200, b'{"text":"hi"}'), "in title case": (200, b"{}"),
    "no body": (200, b""), "more than its length": (200, b'{"text":"hi"}'), "a reason of its own": (201, b"{}"),
    "no reason": (200, b"{}"), "what clients must not see": (200, b"{}"), "HTTP/1.0": (200, b"{}"),
    "connection: close": (200, b"{}"), "a stream": (200, b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"),
    "a stream in one piece": (200, b"data: 1\n\n"), "a stream without events": (200, b""),
    "odd chunks": (200, b"data: 1\n\n"), "until the end": (200, b"all of it"),
    "a client's error": (404, b'{"error": {}}'), "an error": (500, b'{"error": {}}'), "an error with a stack": None,
    "204": (204, b""), "304": (304, b""), "100 first": (200, b'{"text":"hi"}'), "odd bytes": (200, b"{}"),
    "two lengths": None, "garbage": None, "nothing": None, "half a head": None,
}  # fmt: skip
"""Status and body that the client gets; None: an error of warmpool's."""
BROKEN = {"half a body", "half a stream"}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("request_", ["plain", "closing", "with all sorts of fields", "two models", "a stream"])
async def test_the_client_gets_what_the_engine_answers(
    answer: str, request_: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log and the metrics say so."""
    caplog.set_level("INFO", "warmpool.request")
    async with Scripted(aliases=["alias"]) as proxy:
        await awake(proxy)
        request = REQUESTS_ALIKE[request_]
        if b"Connection: close" not in request:
            request = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
            request = request.replace(b"Connection: Keep-Alive\r\n", b"", 1)
        raw = await proxy.ask(request, *ANSWERS[answer])
        await proxy.idle()
        async with asyncio.timeout(PATIENCE_S):
            while not (lines := [m for m in caplog.messages if "request_id=r1 " in m and "method=POST" in m]):
                await asyncio.sleep(0.002)
        assert len(lines) == 1
        if answer in BROKEN:
            with pytest.raises(ProtocolError):
                answer_of(raw)
            assert "broken=" in lines[0]
            return
        status, fields, body, _ = answer_of(raw)
        expected = EXPECTED[answer]
        if expected is None:
            assert (status, orjson.loads(body)["error"]["code"]) in ((502, "upstream_failed"), (500, "engine_error"))
        else:
            assert (status, body) == expected
            assert (fields["x-warmpool-tier"], fields["x-warmpool-instance"]) == ("ready", "demo-1")
            assert fields["server-timing"] == "queue;dur=0.0"
            assert not {"set-cookie", "location", "x-hop"} & fields.keys()
        assert (fields["server"], fields["x-request-id"], fields["connection"]) == ("warmpool", "r1", "close")
        assert f"status={status} " in lines[0]
        assert proxy.metrics.registry.get_sample_value(
            "warmpool_requests_total", {"model": "demo", "status": str(status)}
        ) == (2 if status == 200 else 1)
        if request_ == "with all sorts of fields":
            head = proxy.peers[-1].requests[-1][0]
            for gone in (b"Authorization", b"Cookie", b"X-Forwarded-For", b"Connection"):
                assert gone not in head
            for there in (b"X-A: 1\r\n", b"X-B: 2\r\n", b"X-Empty: \r\n", b"traceparent: 00-1-2-01\r\n"):
                assert there in head


async def test_what_is_no_request_for_a_model_reaches_no_engine() -> None:
    async with Scripted() as proxy:
        for request, status in (("not JSON", 400), ("no such model", 404)):
            data = REQUESTS_ALIKE[request].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
            assert answer_of(await proxy.ask(data))[0] == status
        assert proxy.peers == []


# --- when the first token came ---

TOKENS = {
    "/v1/chat/completions": (
        [b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', b'{"choices":[]}'],
        [b'{"choices":[{"delta":{"content":"a"}}]}', b'{"choices":[{"delta":{"reasoning":"a"}}]}',
         b'{"choices":[{"delta":{"tool_calls": [{"index":0}]}}]}', b'{"choices":[{"delta":{"content":"\\""}}]}'],
    ),
    "/v1/completions": (
        [b'{"choices":[{"text":""}]}'],
        [b'{"choices":[{"text":"a"}]}', b'{"choices":[{"text": "\\n"}]}'],
    ),
    "/v1/messages": (
        [b'{"type":"message_start"}', b'{"type":"content_block_start","content_block":{"type":"text","text":""}}'],
        [b'{"type":"content_block_delta","index":0}'],
    ),
    "/v1/responses": (
        [b'{"type":"response.created","response":{"instructions":"x.delta"}}', b'{"type":"response.in_progress"}'],
        [b'{"type":"response.output_text.delta","delta":"a"}', b'{"type":"response.reasoning_text.delta"}'],
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", TOKENS)
async def test_the_first_token_of_a_stream_is_timed_and_not_its_first_byte(path: str) -> None:
    before, tokens = TOKENS[path]

    async def wait(_: Peer) -> None:
        await asyncio.sleep(0.1)

    async with Scripted() as proxy:
        await awake(proxy)
        sums = [0.0, 0.0]
        for number, token in enumerate(tokens, 1):
            event = b"data: " + token + b"\n\n"
            steps: list[Any] = [SSE, *(chunk(b"data: " + e + b"\n\n") for e in before), wait]
            # It may be cut anywhere.
            steps += [chunk(event[:-20]), chunk(event[-20:]), b"0\r\n\r\n"]
            await proxy.ask(post(STREAM, "Connection: close", path=path), *steps)
            await proxy.idle()
            found = []
            for name in ("warmpool_time_to_first_byte_seconds", "warmpool_ttft_seconds"):
                labels = {"model": "demo", "tier": "ready"}
                found.append(proxy.metrics.registry.get_sample_value(f"{name}_sum", labels) or 0.0)
                assert proxy.metrics.registry.get_sample_value(f"{name}_count", labels) == number
            assert found[1] - sums[1] > 0.1 > found[0] - sums[0]
            sums = found


async def test_what_is_no_stream_has_no_first_token() -> None:
    async with Scripted() as proxy:
        await awake(proxy)
        sample = proxy.metrics.registry.get_sample_value
        labels = {"model": "demo", "tier": "stopped"}
        assert sample("warmpool_time_to_first_byte_seconds_count", labels) == 1
        assert sample("warmpool_ttft_seconds_count", labels) is None


# --- both kinds on one connection ---

MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
STATUS = b"GET /admin/status HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("pipelined", [False, True])
async def test_an_operators_request_is_the_last_of_its_connection(*, pipelined: bool) -> None:
    async with Scripted() as proxy:
        await awake(proxy)
        reader, writer = await proxy.connection()
        requests = [post(), MODELS, STATUS, post(), MODELS]
        async with asyncio.timeout(PATIENCE_S):
            if pipelined:
                writer.write(b"".join(requests))
                raw = await reader.read()
            else:
                raw = b""
                for request in requests[:2]:
                    writer.write(request)
                    head = await reader.readuntil(b"\r\n\r\n")
                    raw += head + await reader.readexactly(_length(head))
                writer.write(requests[2])
                raw += await reader.read()
        writer.close()
        assert raw.count(b"HTTP/1.1 200 OK") == 3, "and nothing behind it is served"
        assert raw.count(b"x-warmpool-instance") == 1
        last = raw[raw.rindex(b"HTTP/1.1 200") :]
        status, fields, body, _ = answer_of(last)
        assert (status, fields["connection"], fields["server"]) == (200, "close", "warmpool")
        assert orjson.loads(body)["models"]["demo"]


def _length(head: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    assert found is not None
    return int(found[1])


async def test_aiohttps_server_has_no_engines_route() -> None:
    async with Scripted() as proxy:
        paths = {resource.canonical for resource in proxy.service.aiohttp.application.router.resources()}
        assert {path for path in paths if not path.startswith(("/admin", "/metrics"))} == {"/v1/realtime"}


async def test_an_operators_body_may_come_in_any_shape(front_of: Any) -> None:
    front: Front = await front_of()
    body = b'{"wait": false}'
    zipped = gzip.compress(body)
    for fields, data in (
        (f"Content-Length: {len(body)}", body),
        ("Transfer-Encoding: chunked", chunk(body[:4]) + chunk(body[4:]) + b"0\r\n\r\n"),
        (f"Expect: 100-continue\r\nContent-Length: {len(body)}", body),
        (f"Content-Encoding: gzip\r\nContent-Length: {len(zipped)}", zipped),
    ):
        head = f"POST /admin/undrain HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{fields}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        async with asyncio.timeout(PATIENCE_S):
            writer.write(head.encode())
            if "Expect" in fields:
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(data)
            raw = await reader.read()
        writer.close()
        status, got, answer, _ = answer_of(raw)
        assert (status, orjson.loads(answer)["done"], got["connection"]) == (200, True, "close")


# --- heads ---


def read_by_aiohttp(data: bytes) -> list[Any]:
    """The requests that aiohttp's parser and the guard find in some bytes."""

    class Protocol:
        _reading_paused = False

        def pause_reading(self) -> None: ...

        def resume_reading(self, **_: Any) -> None: ...

    protocol: Any = Protocol()
    parser = HttpRequestParser(
        protocol, asyncio.get_running_loop(), 1 << 16, max_headers=500, max_line_size=1 << 16, max_field_size=1 << 16,
        auto_decompress=False,
    )  # fmt: skip
    try:
        messages, _, tail = parser.feed_data(data)
    except HttpProcessingError:
        return []
    return [*messages, *([tail] if tail else [])]


def test_what_is_taken_is_read_as_aiohttp_reads_it() -> None:
    """Requests of the fuzz corpus and good ones, mutated: one that is taken has one reading."""
    good = [*REQUESTS_ALIKE.values(), post(), post(QUESTION, "X-A: 1"), post().lower()]
    limits = LimitSettings()
    taken = 0

    async def once(chance: random.Random) -> None:
        nonlocal taken
        data = mutated(chance, good * 4 + REQUESTS)
        parts = usual_parts(data, 0, limits.head)
        if parts is None:
            return
        _, begin, length = parts
        reader = HeadReader(limits)
        try:
            reader.feed_part(data[: begin - 7], 0)
            head = reader.head(data[:begin])
        except BadRequestError:
            return
        if length < 0:
            length = head.length
        if not 0 <= length == len(data) - begin:
            return
        taken += 1
        assert head.length == length
        messages = read_by_aiohttp(data)
        assert len(messages) == 1, data
        message, payload = messages[0]
        assert (message.method, message.path) == (head.method, head.target)
        assert message.should_close == head.closes
        assert not message.chunked
        assert payload.is_eof()
        assert await payload.read() == data[begin:]
        assert [(n, v) for n, v in message.raw_headers] == [(n, v) for n, v in head.fields]

    async def all_of_them(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            await once(chance)

    @settings(max_examples=examples(50))
    @given(st.integers(0, 1 << 32))
    def always(seed: int) -> None:
        asyncio.run(all_of_them(seed))

    always()
    assert taken > 100


def test_a_head_is_remembered_by_all_but_its_length() -> None:
    def key(data: bytes) -> bytes:
        parts = usual_parts(data, 0, 4096)
        assert parts is not None
        return parts[0]

    assert key(post(b"{}")) == key(post(b'{"a": 1}')) == key(post(b"{}").replace(b"{}", b""))
    without = post(b"").replace(b"Content-Length: 0\r\n", b"")
    for other in (without, post(b"", "Content-Length: 0"), post(b"", "X-A: 1"), post(b"").replace(b": 0", b": 00")):
        assert key(other) != key(post(b""))


def test_heads_are_read_once_for_all_connections_that_came_to_the_same_address() -> None:
    heads = RequestHeads(LimitSettings())

    def read(whole: bytes, place: object = ("127.0.0.1", 80)) -> RequestHead:
        parts = usual_parts(whole, 0, 1 << 16)
        assert parts is not None
        return heads.read(place, parts[0], None, whole[: parts[1]])

    first = read(post(b"{}"))
    assert read(post(b'{"a": 1}')) is first
    assert read(post(b"{}"), ("127.0.0.2", 80)) is not first
    assert read(post(b"{}", "Authorization: Bearer other")) is not first
    large = post(b"{}", "X-A: " + "a" * 5000)
    assert read(large) is not read(large), "none that takes much memory is kept"
    for number in range(1000):
        read(post(b"{}", f"X-Request-Id: {number}"))
    assert len(heads._known) < 300
    with pytest.raises(BadRequestError):
        read(post(b"{}", "Host: second"))
    with pytest.raises(BadRequestError):
        read(post(b"{}", "Host: second"))


async def test_a_body_that_comes_behind_its_head_is_waited_for() -> None:
    async with Scripted() as proxy:
        await awake(proxy)
        head, body = post(QUESTION, "X-Request-Id: r1").split(b"\r\n\r\n")
        reader, writer = await proxy.connection()
        for _ in range(3):
            for piece in (head + b"\r\n\r\n", body[:9], body[9:]):
                writer.write(piece)
                await asyncio.sleep(0.01)
            async with asyncio.timeout(PATIENCE_S):
                assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_body_that_lets_others_wait_has_its_time_from_its_beginning(front_of: Any) -> None:
    front: Front = await front_of(server={"limits": {"upload_timeout": "300ms"}})
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(post(QUESTION)[:-1])
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()
    assert front.sample("warmpool_refused_total", reason="slow_body") == 1


async def test_requests_that_come_at_once_are_answered_in_their_order() -> None:
    """Some at once, then one, again and again on one connection."""
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
                await ask(1)
        writer.close()


async def _echo(peer: Peer) -> None:
    found = re.search(rb"x-request-id: (\w+)", peer.requests[-1][0], re.IGNORECASE)
    assert found is not None
    await asyncio.sleep(0.003)
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(found[1]), found[1]))


async def test_much_that_comes_behind_a_request_is_not_read_before_its_turn() -> None:
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
            for _ in range(40):
                writer.write(large)
            await asyncio.sleep(0.2)
            assert writer.transport.get_write_buffer_size() > 1 << 20, "held back"
            release.set()
            for _ in range(41):
                await reader.readuntil(b"}")
        writer.close()


# --- what it is part of ---


async def test_a_request_is_waited_for_when_the_server_stops_and_is_the_last_of_its_connection() -> None:
    async with Scripted() as proxy:
        await awake(proxy)
        release = asyncio.Event()
        traffic = proxy.service.traffic

        async def wait(peer: Peer) -> None:
            await release.wait()
            await peer.send(GOOD)

        proxy.script = [wait]
        request = asyncio.create_task(proxy.ask(post()))
        async with asyncio.timeout(PATIENCE_S):
            while not proxy.pool.status()["leases"]:
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


async def test_an_idle_connection_has_its_time_and_one_at_work_has_more(front_of: Any) -> None:
    front: Front = await front_of("--ttft", "1", server={"limits": {"idle_timeout": "400ms"}})
    await front.post("/v1/completions", {"model": "demo", "prompt": "wake"})
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


async def test_a_key_counts_the_same_however_its_request_comes(tmp_path: Path, front_of: Any) -> None:
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
    for in_pieces in (False, True):
        front: Front = await front_of(server={"keys_file": str(file)})
        now = time.monotonic()
        front.auth._clock = lambda now=now: now  # type: ignore[misc]
        await _asked(front, in_pieces, post(asked, f"Authorization: Bearer {made['free'][1]}"))
        answers: list[Any] = []
        for name in ("free", "limited", "limited", "elsewhere", "single", "limited", "limited", "limited"):
            for stream in (False, True):
                body = asked if not stream else asked[:-1] + b',"stream":true}'
                head = await _asked(front, in_pieces, post(body, f"Authorization: Bearer {made[name][1]}"))
                answers.append((name, stream, head))
        head = await _asked(front, in_pieces, post(asked, "Authorization: Bearer wrong"))
        assert head.startswith(b"HTTP/1.1 401")
        head = await _asked(front, in_pieces, post(asked, f"x-api-key: {made['free'][1]}"))
        assert head.startswith(b"HTTP/1.1 200")
        found.append(answers)
    assert found[0] == found[1]
    statuses = [head[9:12] for name, _, head in found[0] if name == "limited"]
    assert statuses == [b"200"] * 4 + [b"429"] * 6
    assert {head[9:12] for name, _, head in found[0] if name == "elsewhere"} == {b"403"}


async def _asked(front: Front, in_pieces: bool, request: bytes) -> bytes:
    """The head of an answer, without what differs each time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    for piece in (request[:40], request[40:-9], request[-9:]) if in_pieces else (request,):
        writer.write(piece)
        await asyncio.sleep(0.003)
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
    head = re.sub(rb"\r\ndate: [^\r]+", b"\r\ndate: D", head, flags=re.IGNORECASE)
    head = re.sub(rb"=\d+\.\d", b"=T", head)
    return re.sub(rb"content-length: \d+", b"content-length: N", head, flags=re.IGNORECASE)


async def test_what_finds_its_instance_ready_is_served_without_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Scripted() as proxy:
        await awake(proxy)
        spawned = []
        spawn = proxy.service.spawn

        def noted(work: Any, name: str) -> Any:
            spawned.append(name)
            return spawn(work, name)

        monkeypatch.setattr(proxy.service, "spawn", noted)
        for request in (post(QUESTION, "Connection: close"), post(STREAM, "Connection: close")):
            assert answer_of(await proxy.ask(request, SSE + chunk(b"data: 1\n\n") + b"0\r\n\r\n"))[0] == 200
        assert spawned == []
        await proxy.upstream.disconnect()
        assert answer_of(await proxy.ask(post(QUESTION, "Connection: close"), GOOD))[0] == 200
        assert spawned == ["request"]


async def test_many_requests_at_once_let_others_have_their_turn() -> None:
    async with Scripted() as proxy:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        raw = await proxy.ask(MODELS * 500 + MODELS.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        task.cancel()
        assert raw.count(b"HTTP/1.1 200 OK") == 501
        assert turns > 30
