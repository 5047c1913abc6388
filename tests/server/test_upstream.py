"""Connections to an engine whose clients leave, on the event loop that warmpool runs on."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from proxy.engine.connection import Connection, ExchangeError, Upstream
from tests.fakes import Rig
from tests.served import Proxy
from tests.support import PATIENCE_S, engine_model

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    Run = Callable[[Coroutine[Any, Any, None]], None]

_TURNS = 8
"""More turns of the event loop than a connect to this machine takes."""
_RESET = struct.pack("ii", 1, 0)


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_a_connect_that_is_cancelled_at_any_moment_leaves_no_connection(run: Run) -> None:
    async def cancel_connects() -> None:
        async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(read, "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None)
        for turns, _ in itertools.product(range(_TURNS), range(20)):
            connecting = asyncio.create_task(upstream.connect())
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            (result,) = await asyncio.gather(connecting, return_exceptions=True)
            if not isinstance(result, BaseException):
                result.abort()
                await result.closed
        async with asyncio.timeout(PATIENCE_S):
            await upstream.disconnect()
        assert upstream.connections == 0
        server.close()

    run(cancel_connects())


async def _listening() -> tuple[asyncio.Server, Upstream]:
    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(read, "127.0.0.1", 0, backlog=1024)
    return server, Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None)


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_of_many_who_want_a_connection_at_once_most_get_one_that_came_free(run: Run) -> None:
    """And where none comes free, each gets one of its own."""

    async def ask(upstream: Upstream) -> None:
        connection = await upstream.connect()
        connection.finished(reusable=True)

    async def connect_often() -> None:
        server, upstream = await _listening()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(ask(upstream) for _ in range(500)))
            made = upstream.connections
            kept = await asyncio.gather(*(upstream.connect() for _ in range(200)))
            await upstream.disconnect()
        assert made < 250
        assert len({*kept}) == 200
        assert upstream.connections == 0
        server.close()

    run(connect_often())


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_those_who_want_a_connection_may_leave_at_any_moment(run: Run) -> None:
    """Those who stay get one, whoever had the turn or the connection that one who left was given."""

    async def connect_and_leave() -> None:
        server, upstream = await _listening()
        enough = True
        for turns, step in itertools.product(range(_TURNS), (2, 3, 7)):
            async with asyncio.timeout(PATIENCE_S):
                wanted = [asyncio.create_task(upstream.connect()) for _ in range(100)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for done in [task for task in wanted if task.done()][::2]:
                    done.result().finished(reusable=True)
                for task in wanted[::step]:
                    task.cancel()
                results = await asyncio.gather(*wanted, return_exceptions=True)
                got = [result for result in results if not isinstance(result, BaseException)]
                await upstream.disconnect()
                enough = enough and len(got) >= 100 - len(wanted[::step]) and upstream.connections == 0
        assert enough
        server.close()

    run(connect_and_leave())


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_nobody_waits_for_his_turn_to_connect_where_nobody_listens(run: Run) -> None:
    async def fail_to_connect() -> None:
        server, upstream = await _listening()
        server.close()
        await server.wait_closed()
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(*(upstream.connect() for _ in range(200)), return_exceptions=True)
        assert all(isinstance(result, ExchangeError) for result in results)
        assert upstream.connections == 0

    run(fail_to_connect())


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_a_disconnect_ends_the_wait_for_a_connection(run: Run) -> None:
    async def disconnect() -> None:
        server, upstream = await _listening()
        wanted = [asyncio.create_task(upstream.connect()) for _ in range(100)]
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await upstream.disconnect()
            results = await asyncio.gather(*wanted, return_exceptions=True)
        assert all(isinstance(result, ExchangeError) for result in results)
        assert upstream.connections == 0
        server.close()

    run(disconnect())


async def _reset_while_it_connects(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"model": "demo", "prompt": "Hello", "max_tokens": 5, "stream": true}'
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    )
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


async def test_clients_that_reset_while_their_requests_connect_harm_no_instance(tmp_path: Path) -> None:
    proxy = await Proxy(tmp_path, settings={"models": {"demo": engine_model(max_concurrency=512)}}).listening()
    try:
        await proxy.ask()
        port = int(proxy.url.rpartition(":")[2])
        for _ in range(10):
            await asyncio.gather(*(_reset_while_it_connects(port) for _ in range(96)))
        async with proxy.session.post("/admin/models/demo/suspend", json={"when_busy": "wait"}) as answer:
            assert answer.status == 200, await answer.text()
        assert (await proxy.ask())[0] == "suspended"
        proxy.process.send_signal(signal.SIGTERM)
        assert await proxy.ended() == 0
    finally:
        proxy.process.kill()


def test_a_request_may_end_just_before_the_pools_next_deadline() -> None:
    async def end_a_lease_before_the_deadline() -> None:
        rig = Rig({"demo": {"idle": {"sleeping": "60s"}}})
        await rig.pool.open()
        async with await rig.pool.lease("demo"):
            pass
        await rig.pass_time(0.0)
        lease = rig.pool.try_lease("demo")
        rig.clock.now += 59.9999
        # Its idle time begins anew, so the deadline that is set is the one from before.
        rig.pool.tick()
        assert lease is not None
        lease.release()
        await rig.pool.close()

    uvloop.run(end_a_lease_before_the_deadline())


class _Recorded(asyncio.Transport):
    """A transport that takes whatever is written, and says when it has enough."""

    def __init__(self) -> None:
        super().__init__({"socket": socket.socket()})
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


class _Nobody:
    """A receiver that gets nothing."""

    def received(self, data: bytes) -> None:
        raise AssertionError(data)

    def lost(self, error: Exception | None) -> None:
        raise AssertionError(error)

    failed = lost


async def test_a_large_body_is_written_in_steps_and_not_while_the_engine_takes_none() -> None:
    connection, transport = Connection(Upstream("http://127.0.0.1:1", None)), _Recorded()
    connection.connection_made(transport)
    body = bytes(range(256)) * (10 << 10)
    connection.begin(_Nobody(), b"head", body)
    assert len(b"".join(transport.writes)) < 1 << 20, "not all of it at once"
    connection.pause_writing()
    for _ in range(3):
        await asyncio.sleep(0)
    held = len(transport.writes)
    for _ in range(3):
        connection.resume_writing()
        connection.pause_writing()
    assert len(transport.writes) == held
    connection.resume_writing()
    for _ in range(20):
        await asyncio.sleep(0)
    assert b"".join(transport.writes) == b"head" + body
    connection.finished(reusable=True)
    assert not transport.aborted
    connection.connection_lost(None)
    transport.get_extra_info("socket").close()


async def test_a_connection_whose_request_was_not_sent_whole_serves_no_other() -> None:
    connection, transport = Connection(Upstream("http://127.0.0.1:1", None)), _Recorded()
    connection.connection_made(transport)
    connection.begin(_Nobody(), b"head", bytes(4 << 20))
    connection.finished(reusable=True)
    assert transport.aborted
    sent = len(transport.writes)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(transport.writes) == sent
    connection.connection_lost(None)
    transport.get_extra_info("socket").close()
