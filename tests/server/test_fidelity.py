"""Byte for byte: an engine that sends exact bytes, a proxy, and a client that reads exact bytes."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
from typing import TYPE_CHECKING, Any

import orjson
import psutil
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.engine.connection import ExchangeError, Upstream
from proxy.engine.http1 import ProtocolError
from tests.asking import ask
from tests.scripted import GOOD, QUESTION, Peer, Scripted, answer_of, post
from tests.support import PATIENCE_S, examples

if TYPE_CHECKING:
    from collections.abc import Callable

SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
CLOSE = ("Connection: close",)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def error_code(body: bytes) -> str:
    return str(orjson.loads(body)["error"]["code"])


async def steady(proxy: Scripted) -> None:
    """The next request is answered as if nothing had been, and nothing is left of what was."""
    await proxy.idle()
    status, _, body, _ = answer_of(await proxy.ask(post(QUESTION, *CLOSE), GOOD))
    assert (status, body) == (200, b'{"text":"hi"}')
    await proxy.idle()
    assert proxy.upstream.connections <= 1


# --- whatever is sent arrives ---

_BODY = st.one_of(
    st.binary(max_size=3000),
    st.lists(st.text(max_size=60), max_size=20).map(
        lambda texts: b"".join(b"data: " + orjson.dumps({"text": t}) + b"\n\n" for t in texts) + b"data: [DONE]\n\n"
    ),
    st.recursive(st.text(max_size=20) | st.integers(-9, 9), lambda v: st.lists(v, max_size=4)).map(orjson.dumps),
    st.integers(1, 400_000).map(lambda n: b"0123456789abcdef" * (n // 16 + 1)),
)
_FRAMINGS = st.sampled_from(["chunked", "chunked", "length", "close"])
_CUTS = st.lists(st.integers(0, 1 << 20), max_size=12)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in at})
    return [part for a, b in zip([0, *places], [*places, len(data)], strict=True) if (part := data[a:b])]


def test_bodies_arrive_as_they_were_sent_however_they_are_cut() -> None:
    """Random bodies, framings, chunks, cuts between packets, compression, trailers; several on one connection."""

    async def once(
        proxy: Scripted, body: bytes, framing: str, chunks: list[int], cuts: list[int], zipped: bool, trailer: bool
    ) -> None:
        sent = gzip.compress(body, 1) if zipped else body
        fields = b"content-type: application/json\r\nx-odd: \xe4\xff\r\n"
        fields += b"content-encoding: gzip\r\n" if zipped else b""
        if framing == "chunked":
            tail = b"0\r\n" + (b"X-Sum: 7\r\nset-cookie: a=b\r\n" if trailer else b"") + b"\r\n"
            raw = b"transfer-encoding: chunked\r\n\r\n" + b"".join(map(chunk, cut(sent, chunks))) + tail
        elif framing == "length":
            raw = b"content-length: %d\r\n\r\n" % len(sent) + sent
        else:
            raw = b"\r\n" + sent
        raw = b"HTTP/1.1 200 Fine\r\n" + fields + raw
        script: list[Any] = cut(raw, cuts) + ([Peer.close] if framing == "close" else [])
        status, got, received, trailers = answer_of(await proxy.ask(post(QUESTION, *CLOSE), *script))
        assert (status, received) == (200, sent)
        assert got["x-odd"] == "\xe4\xff"
        assert got.get("content-encoding") == ("gzip" if zipped else None)
        assert got.get("content-length") == (str(len(sent)) if framing == "length" else None)
        assert trailers == ([("X-Sum", "7")] if framing == "chunked" and trailer else [])

    with asyncio.Runner() as runner:
        proxy = runner.run(Scripted().__aenter__())

        @settings(max_examples=examples(60))
        @given(
            _BODY,
            _FRAMINGS,
            _CUTS,
            _CUTS,
            st.booleans(),
            st.booleans(),
        )
        def always(body: bytes, framing: str, chunks: list[int], cuts: list[int], zipped: bool, trailer: bool) -> None:
            runner.run(once(proxy, body, framing, chunks, cuts, zipped, trailer))

        always()
        runner.run(steady(proxy))
        runner.run(proxy.__aexit__())


async def test_an_old_client_gets_the_payload_and_an_end() -> None:
    async with Scripted() as proxy:
        raw = await proxy.ask(
            post(version="1.0"), SSE + b"\r\n", chunk(b"one"), chunk(b"two") + b"0\r\nX-Sum: 1\r\n\r\n"
        )
        status, fields, body, _ = answer_of(raw)
        assert raw.startswith(b"HTTP/1.0 200 OK\r\n")
        assert (status, body) == (200, b"onetwo")
        assert "transfer-encoding" not in fields
        raw = await proxy.ask(post(QUESTION, "Connection: close", version="1.0"), GOOD)
        assert answer_of(raw)[2] == b'{"text":"hi"}'
        await steady(proxy)


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_answers_without_a_body(status: bytes) -> None:
    async with Scripted() as proxy:
        script = b"HTTP/1.1 " + status + b"\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\r\n"
        raw = await proxy.ask(post(QUESTION, *CLOSE), script)
        code, fields, body, _ = answer_of(raw)
        assert (code, body, fields["x-a"]) == (int(status[:3]), b"", "1")
        assert not {"transfer-encoding", "content-length"} & set(fields)
        await steady(proxy)


async def test_continue_is_said_to_the_client_and_not_taken_for_the_answer_of_the_engine() -> None:
    async with Scripted() as proxy:
        proxy.script = [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n", GOOD]
        reader, writer = await proxy.connection()
        head, body = post(QUESTION, "Expect: 100-continue", *CLOSE).split(b"\r\n\r\n", 1)
        writer.write(head + b"\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert answer_of(await reader.read())[2] == b'{"text":"hi"}'
        writer.close()
        assert b"expect" not in proxy.peers[0].requests[0][0].lower()
        await steady(proxy)


async def test_connections_are_kept_on_both_sides() -> None:
    async with Scripted() as proxy:
        proxy.script = [GOOD]
        reader, writer = await proxy.connection()
        for _ in range(5):
            writer.write(post())
            async with asyncio.timeout(PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(13) == b'{"text":"hi"}'
            assert b"connection:" not in head.lower()
        writer.close()
        assert [len(p.requests) for p in proxy.peers] == [5]
        # Two requests at once are answered in turn.
        raw = await proxy.ask(post() + post(QUESTION, *CLOSE))
        assert raw.count(b'{"text":"hi"}') == 2


# --- engines that do not keep to the rules ---


async def test_an_error_that_comes_before_the_request_was_read() -> None:
    async with Scripted() as proxy:
        await proxy.ask(post(QUESTION, *CLOSE), GOOD)
        await proxy.upstream.disconnect()
        early = b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"

        async def look(peer: Peer) -> None:
            await peer.reader.readexactly(10)

        proxy.unread_script = [look, early, _until_read]
        large = orjson.dumps({"model": "demo", "prompt": "x" * 900_000})
        status, _, body, _ = answer_of(await proxy.ask(post(large, *CLOSE)))
        assert (status, body) == (413, b"{}")
        proxy.unread_script = None
        await steady(proxy)


async def _until_read(peer: Peer) -> None:
    """Take what comes, so that the close is in order."""
    while await peer.reader.read(1 << 16):
        pass


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nA: 1\r\n folded\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
    ],
)
async def test_an_engine_that_breaks_before_the_first_byte_is_asked_once_more(answer: bytes) -> None:
    async with Scripted() as proxy:
        calls = 0

        async def broken_at_first(peer: Peer) -> None:
            nonlocal calls
            calls += 1
            await peer.send(GOOD if calls == 2 else answer)
            if calls != 2:
                await peer.close()

        # A head alone may have gone out before the end shows; then the client sees a break instead.
        raw = await proxy.ask(post(QUESTION, *CLOSE), broken_at_first)
        try:
            assert answer_of(raw)[::2] == (200, b'{"text":"hi"}')
        except ProtocolError:
            assert answer.startswith(raw[:12])
        calls = 10
        raw = await proxy.ask(post(QUESTION, *CLOSE), broken_at_first)
        try:
            status, _, body, _ = answer_of(raw)
            assert (status, error_code(body)) == (502, "upstream_failed")
        except ProtocolError:
            assert answer.startswith(raw[:12])
        await steady(proxy)


@pytest.mark.parametrize("end", [Peer.close, Peer.reset], ids=["in order", "by a reset"])
@pytest.mark.parametrize(
    "pieces",
    [
        [SSE + b"\r\n" + chunk(b"data: 1\n\n")],
        [SSE + b"\r\n" + chunk(b"data: 1\n\n"), b"9\r\ndata"],
        [SSE + b"\r\n" + chunk(b"data: 1\n\n"), b"0\r\n"],
        [SSE + b"\r\n" + chunk(b"data: 1\n\n"), b"0\r\nX-Sum: 1\r\n"],
        [SSE + b"\r\n" + chunk(b"data: 1\n\n"), b"zz\r\n"],
        [SSE + b"\r\n" + chunk(b"data: 1\n\n"), b"3\r\nlonger\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345"],
    ],
)
async def test_an_engine_that_dies_within_an_answer_breaks_it(pieces: list[bytes], end: Callable[[Peer], Any]) -> None:
    async with Scripted() as proxy:
        script: list[Any] = [pieces[0], proxy.arrived, *pieces[1:], end]
        raw = await proxy.ask(post(QUESTION, *CLOSE), *script)
        with pytest.raises(ProtocolError):
            answer_of(raw)
        with pytest.raises((ConnectionResetError, ProtocolError)):
            answer_of(await proxy.ask(post(QUESTION, version="1.0")))
            raise AssertionError("an old client took it for the whole")
        await steady(proxy)


async def test_what_comes_after_an_answer_is_nobodys() -> None:
    async with Scripted() as proxy:
        for extra in (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nstolen", b"x"):
            raw = await proxy.ask(post(QUESTION, *CLOSE), GOOD + extra)
            assert answer_of(raw)[2] == b'{"text":"hi"}'
            await steady(proxy)

        async def later(peer: Peer) -> None:
            await proxy.idle()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nstolen")

        assert answer_of(await proxy.ask(post(QUESTION, *CLOSE), GOOD, later))[2] == b'{"text":"hi"}'
        async with asyncio.timeout(PATIENCE_S):
            while proxy.upstream.connections:
                await asyncio.sleep(0.005)
        await steady(proxy)


async def test_an_engine_that_falls_silent_is_given_up() -> None:
    async with Scripted(silence_s=0.2) as proxy:

        async def silence(peer: Peer) -> None:
            await peer.reader.read()

        status, _, body, _ = answer_of(await proxy.ask(post(QUESTION, *CLOSE), silence))
        assert (status, error_code(body)) == (502, "upstream_failed")
        with pytest.raises(ProtocolError):
            answer_of(await proxy.ask(post(QUESTION, *CLOSE), SSE + b"\r\n" + chunk(b"1"), silence))
        await steady(proxy)


# --- clients that read slowly, or leave ---


async def test_a_client_that_does_not_read_holds_the_engine_back_and_not_the_memory() -> None:
    most = 64 << 20
    async with Scripted() as proxy:
        sent = 0
        piece = chunk(b"x" * (64 << 10))

        async def flood(peer: Peer) -> None:
            nonlocal sent
            await peer.send(SSE + b"\r\n")
            while sent < most:
                await peer.send(piece)
                sent += len(piece)
            await peer.send(b"0\r\n\r\n")

        proxy.script = [flood]
        before = psutil.Process().memory_info().rss
        # The limit of the reader is where the client itself stops taking bytes from the kernel.
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1 << 10)
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        writer.write(post(QUESTION, *CLOSE))
        stood = 0
        async with asyncio.timeout(PATIENCE_S):
            while stood < 20:  # nothing moves any more
                last = sent
                await asyncio.sleep(0.02)
                stood = stood + 1 if sent == last and sent else 0
        assert sent < most / 2, "the engine was held back"
        assert psutil.Process().memory_info().rss - before < most / 2
        async with asyncio.timeout(PATIENCE_S):
            received = b""
            size = 0
            while data := await reader.read(1 << 20):
                received = (received + data)[-8:]
                size += len(data)
        writer.close()
        assert size > most
        assert received.endswith(b"\r\n0\r\n\r\n")
        await steady(proxy)


async def test_a_client_that_leaves_ends_its_exchange_wherever_it_is() -> None:
    async with Scripted() as proxy:
        gone = asyncio.Event()

        async def until_gone(peer: Peer) -> None:
            await peer.reader.read()
            gone.set()

        async def flood(peer: Peer) -> None:
            while True:
                await peer.send(chunk(b"x" * (64 << 10)))

        scripts: list[list[Any]] = [[until_gone], [SSE + b"\r\n" + chunk(b"1"), until_gone], [SSE + b"\r\n", flood]]
        for script in scripts:
            gone.clear()
            proxy.script = script
            reader, writer = await proxy.connection()
            writer.write(post())
            async with asyncio.timeout(PATIENCE_S):
                if len(script) > 1:
                    await reader.readuntil(b"\r\n\r\n")
                else:
                    while not (proxy.peers and proxy.peers[-1].requests):
                        await asyncio.sleep(0.005)
                writer.close()
                if until_gone in script:
                    await gone.wait()
                while proxy.upstream.connections:
                    await asyncio.sleep(0.005)
            await steady(proxy)
            await proxy.upstream.disconnect()


def test_clients_that_reset_while_bytes_come_for_them_leave_nothing_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the loop that the server has: its transports raise when they are written to after a reset."""

    async def stream(peer: Peer) -> None:
        await peer.send(SSE + b"\r\n")
        for number in range(60):
            if peer.writer.transport.is_closing():
                raise ConnectionError
            await peer.send(chunk(b"x" * 64))
            if number % 5 == 0:
                await asyncio.sleep(0)
        await peer.send(b"0\r\n\r\n")

    async def reset(proxy: Scripted) -> None:
        reader, writer = await proxy.connection()
        writer.write(post())
        await reader.read(100)
        await Peer(reader, writer).reset()

    async def many() -> None:
        async with Scripted() as proxy:
            assert answer_of(await proxy.ask(post(QUESTION, *CLOSE), GOOD))[0] == 200
            proxy.script = [stream]
            for _ in range(30):
                await asyncio.gather(*(reset(proxy) for _ in range(10)))
            await proxy.idle()

    uvloop.run(many())
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_an_old_client_that_leaves_within_an_answer_leaves_nothing_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Its answers end with the connection, so one that is broken off is reset; here nothing is left to reset."""

    async def many() -> None:
        async with Scripted() as proxy:
            assert answer_of(await proxy.ask(post(QUESTION, *CLOSE), GOOD))[0] == 200
            gone = asyncio.Event()

            async def until_gone(peer: Peer) -> None:
                await peer.send(SSE + b"\r\n" + chunk(b"1"))
                await peer.reader.read()
                gone.set()

            proxy.script = [until_gone]
            for _ in range(20):
                gone.clear()
                reader, writer = await proxy.connection()
                writer.write(post(version="1.0"))
                async with asyncio.timeout(PATIENCE_S):
                    await reader.readuntil(b"\r\n\r\n")
                    await Peer(reader, writer).reset()
                    await gone.wait()
            await proxy.idle()

    uvloop.run(many())
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


# --- before a checkpoint ---


async def test_disconnecting_leaves_no_connection_whatever_state_it_is_in() -> None:
    async with Scripted() as proxy:

        async def hang(peer: Peer) -> None:
            await peer.reader.read()

        proxy.script = [SSE + b"\r\n" + chunk(b"1"), hang]
        clients = [await proxy.connection() for _ in range(5)]
        async with asyncio.timeout(PATIENCE_S):
            for _, writer in clients:
                writer.write(post())
            for reader, _ in clients:
                await reader.readuntil(chunk(b"1"))
        answer = await ask(proxy.upstream, "GET", "/")  # of which nobody takes the end
        await answer.came.wait()
        connecting = asyncio.create_task(ask(proxy.upstream, "GET", "/"))
        await asyncio.sleep(0)
        await proxy.upstream.disconnect()
        assert proxy.upstream.connections == 0
        with pytest.raises(ExchangeError):
            await connecting
        with pytest.raises(ExchangeError, match="disconnected"):
            await answer.ended
        async with asyncio.timeout(PATIENCE_S):
            for reader, writer in clients:
                assert await reader.read() == b"", "broken, not ended"
                writer.close()
        assert proxy.upstream.connections == 0
        await steady(proxy)


async def test_an_engine_that_moved_is_asked_at_its_new_address() -> None:
    async with Scripted() as proxy, Scripted() as other:
        await proxy.ask(post(QUESTION, *CLOSE), GOOD)
        other.script = [GOOD.replace(b"hi", b"HI")]
        assert proxy.upstream.connections == 1
        proxy.upstream.move(f"http://127.0.0.1:{other.engine_port}")
        assert answer_of(await proxy.ask(post(QUESTION, *CLOSE)))[2] == b'{"text":"HI"}'
        assert other.peers[0].requests[0][0].split(b"\r\n")[1] == b"Host: 127.0.0.1:%d" % other.engine_port


async def test_an_engine_that_cannot_be_reached() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        upstream = Upstream(f"http://127.0.0.1:{taken.getsockname()[1]}", None)
        with pytest.raises(ExchangeError, match="cannot connect"):
            await upstream.connect()
        assert upstream.connections == 0
