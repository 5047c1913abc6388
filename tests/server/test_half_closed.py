"""A client that sends no more (shutdown(SHUT_WR)) gets its answer; one that has left is noticed all the same."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import orjson
import pytest

from tests.scripted import GOOD, QUESTION, Peer, Scripted, answer_of, post
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.scripted import Step

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def half_closed(proxy: Scripted, request: bytes) -> bytes:
    """Everything that comes when nothing more is sent."""
    reader, writer = await proxy.connection()
    writer.write(request)
    writer.write_eof()
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    return answer


def after(seconds: float) -> Callable[[Peer], Awaitable[None]]:
    async def step(_: Peer) -> None:
        await asyncio.sleep(seconds)

    return step


@pytest.mark.parametrize("wait_s", [0.0, 0.4])
async def test_it_gets_its_answer(wait_s: float) -> None:
    async with Scripted() as proxy:
        scripts: list[list[Step]] = [
            [after(wait_s), GOOD], [after(wait_s), SSE, b"3\r\na\n\n\r\n", after(wait_s), b"0\r\n\r\n"],
        ]  # fmt: skip
        for script in scripts:
            proxy.script = script
            answer = await half_closed(proxy, post(QUESTION))
            assert answer_of(answer.removeprefix(CONTINUE))[0] == 200
            proxy.script = [GOOD]
            answers = await half_closed(proxy, post(QUESTION) * 3)
            assert answers.count(b"HTTP/1.1 200 OK") == 3, "sent one behind the other"
            assert b"HTTP/1.1 404" in await half_closed(proxy, b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n")


async def test_half_a_request_is_none() -> None:
    async with Scripted() as proxy:
        assert await half_closed(proxy, post(QUESTION)[:-3]) == b""
        assert await half_closed(proxy, post(QUESTION)[:20]) == b""
        assert await half_closed(proxy, b"") == b""


async def test_a_client_of_http_1_0_gets_nothing_in_between() -> None:
    async with Scripted() as proxy:
        proxy.script = [after(0.4), GOOD]
        assert (await half_closed(proxy, post(QUESTION, version="1.0"))).startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize("phase", ["before an answer", "within a stream"])
async def test_one_that_has_left_ends_its_request(phase: str) -> None:
    """It closes its socket, which looks the same until something is sent."""
    gone = asyncio.Event()

    async def until_gone(peer: Peer) -> None:
        await peer.reader.read()
        gone.set()

    async with Scripted() as proxy:
        await proxy.ask(post(QUESTION, "Connection: close"))
        streams = post(orjson.dumps({"model": "demo", "prompt": "x", "stream": True}))
        proxy.script = [*([SSE, b"3\r\na\n\n\r\n"] if phase == "within a stream" else []), until_gone]
        client = socket.create_connection(("127.0.0.1", proxy.port))
        client.sendall(streams)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            while not proxy.pool.status()["leases"]:
                await asyncio.sleep(0.002)
            if phase == "within a stream":
                client.setblocking(False)
                while b"a\n\n" not in await loop.sock_recv(client, 1 << 16):
                    pass
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset
            client.close()
            await gone.wait()
        await proxy.idle()
