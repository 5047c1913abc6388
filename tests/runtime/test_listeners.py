"""Whoever answers on an engine's port has to be the engine; logs of engines are bounded. Real processes, real CRIU."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import socketserver
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy.config.model import ModelSettings
from proxy.errors import PortTakenError
from proxy.runtime import port_owner
from proxy.runtime.log_size import cut
from proxy.runtime.ports import LOOPBACK
from proxy.telemetry.stages import Stages
from tests.runtime.test_runtimes import ProcessBench
from tests.runtime_contract import FACTS
from tests.support import ENGINE_PORTS, PATIENCE_S, why_no_criu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

needs_criu = pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[ProcessBench]:
    made = ProcessBench(tmp_path, ports=ENGINE_PORTS)
    await made.runtime.open()
    yield made
    for engine in [*made.runtime.engines.values()]:
        await engine.remove()
    await made.close()


class Impostor:
    """Takes the first engine's port that it learns of, answers everything with 200, and keeps what it is sent."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.port = 0
        self._stopping = threading.Event()
        self._server: socketserver.ThreadingTCPServer | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        first, _, last = ENGINE_PORTS.partition("-")
        wanted = range(int(first), int(last) + 1)
        while not self._stopping.wait(0.001):
            names = [line.rpartition(" ")[2] for line in Path("/proc/net/unix").read_text().splitlines()]
            for name in names:
                port = int(name.rpartition("/")[2]) if name.startswith("@warmpool/port/") else 0
                if port in wanted:
                    self._take(port)
                    return

    def _take(self, port: int) -> None:
        heard = self.heard

        class Answers(socketserver.BaseRequestHandler):
            def engine(self) -> None:
                while content := self.request.recv(65536):
                    heard.append(content)
                    self.request.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
                    )

        socketserver.ThreadingTCPServer.allow_reuse_address = True
        self._server = socketserver.ThreadingTCPServer((LOOPBACK, port), Answers)
        self._server.daemon_threads = True
        self.port = port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


@pytest.fixture
def impostor() -> Iterator[Impostor]:
    made = Impostor()
    yield made
    made.close()


@contextlib.contextmanager
def listener(port: int) -> Iterator[None]:
    """Another program that listens on a port of loopback."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK, port))
        sock.listen()
        yield


async def test_a_program_that_takes_an_engines_port_is_sent_nothing_and_the_engine_gets_another(
    front_of: Any, impostor: Impostor
) -> None:
    front = await front_of()
    answer, _ = await front.post("/v1/completions", {"model": "demo", "prompt": "a secret", "max_tokens": 1})
    assert answer.status == 200
    assert impostor.port, "it had its chance"
    assert not (await front.engine()).endswith(f":{impostor.port}")
    assert impostor.heard == []


async def test_a_listener_that_is_not_the_engines_is_told_from_it(bench: ProcessBench) -> None:
    sleeps = ModelSettings(process={"command": ["sh", "-c", "sleep 1000 # {port}"]})
    engine = await bench.runtime.start("demo-1", "demo", sleeps)
    assert await engine.listens() is False
    with listener(engine.port), pytest.raises(PortTakenError, match=f"port {engine.port} .* listened on by process"):
        await engine.listens()
    second = await bench.runtime.start("demo-2", "demo", bench.model)
    await bench.healthy(second)
    assert await second.listens() is True


async def test_an_engine_whose_child_listens_is_the_engine(bench: ProcessBench) -> None:
    script = (
        "import os, socket, time; s = socket.create_server(('127.0.0.1', {port}))\n"
        "if os.fork(): s.close()\nelse: os.setsid()\n"
        "time.sleep(1000)"
    )
    engine = await bench.runtime.start("demo-1", "demo", ModelSettings(process={"command": ["{python}", "-c", script]}))
    async with asyncio.timeout(PATIENCE_S):
        while not await engine.listens():
            await asyncio.sleep(0.02)


@needs_criu
@pytest.mark.criu
async def test_a_port_of_an_image_that_another_program_has_costs_neither_the_image_nor_the_wake(
    bench: ProcessBench,
) -> None:
    engine = await bench.runtime.start("demo-1", "demo", bench.model)
    await bench.healthy(engine)
    boot, port = await bench.boot_id(engine), engine.port
    await engine.checkpoint(FACTS, Stages())
    with listener(engine.port):
        with pytest.raises(PortTakenError, match=f"port {engine.port}"):
            await engine.restore(Stages())
        await engine.kill()
        elsewhere = await bench.runtime.start("demo-1", "demo", bench.model)
        assert elsewhere.port != port
        await bench.healthy(elsewhere)
        await elsewhere.kill()
    await elsewhere.restore(Stages())
    assert elsewhere.port == port
    await bench.healthy(elsewhere)
    assert await bench.boot_id(elsewhere) == boot
    assert await elsewhere.listens() is True


# --- logs ---


def test_a_log_over_its_limit_keeps_its_last_whole_lines(bench: ProcessBench) -> None:
    path = bench.claim.log_path("demo-1")
    path.write_bytes(b"".join(b"line %06d\n" % n for n in range(1000)))
    assert cut(path, 6000)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == b"line 000751\n"
    assert lines[-1] == b"line 000999\n"
    assert not cut(path, 6000)


async def test_an_engine_that_writes_without_end_keeps_its_log_small(bench: ProcessBench) -> None:
    bench.claim.log_size = 64 << 10
    chatty = ModelSettings(process={"command": ["{python}", "-c", "while True: print('x' * 100)  # {port}"]})
    await bench.runtime.start("demo-1", "demo", chatty)
    path = bench.claim.log_path("demo-1")
    most = 0
    async with asyncio.timeout(PATIENCE_S):
        while path.stat().st_size >= most:
            most = path.stat().st_size
            await asyncio.sleep(0.01)


@needs_criu
@pytest.mark.criu
async def test_a_log_that_was_cut_between_checkpoint_and_restore_does_not_keep_the_engine_from_coming_back(
    bench: ProcessBench,
) -> None:
    engine = await bench.runtime.start("demo-1", "demo", bench.model)
    await bench.healthy(engine)
    boot = await bench.boot_id(engine)
    path = bench.claim.log_path("demo-1")
    for size in (1 << 20, 64 << 10):
        with path.open("ab") as log:
            log.write(b"x" * 99 + b"\n" * size)
        await engine.checkpoint(FACTS, Stages())
        assert cut(path, 1000)
        await engine.restore(Stages())
        await bench.healthy(engine)
        assert await bench.boot_id(engine) == boot
        assert cut(path, 100) or path.stat().st_size <= 1000
        before = path.stat().st_size
        await bench.scribble(engine)
        assert path.stat().st_size >= before


def test_connections_are_passed_over_but_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux lists sockets that listen first; what lists them otherwise is read to its end now and then."""
    row = "{}: 0100007F:1F90 00000000:0000 {} 00000000:00000000 00:00000000 00000000 0 0 {} 1 0 100 0 0 10 0\n"
    listed = tmp_path / "tcp"
    listed.write_text("header\n" + row.format(0, "0A", 11) + row.format(1, "01", 12) + row.format(2, "0A", 13))
    monkeypatch.setattr(port_owner, "_REACHED", {listed: {"0100007F"}, tmp_path / "tcp6": {"0" * 32}})
    monkeypatch.setattr(port_owner, "_looked_at", {})
    now = 100.0
    monkeypatch.setattr("proxy.runtime.port_owner.time.monotonic", lambda: now)
    assert port_owner.listening(8080) == {"11", "13"}
    assert port_owner.listening(8080) == {"11"}
    now += 1.0
    assert port_owner.listening(8080) == {"11", "13"}
    assert port_owner.listening(8081) == set()
