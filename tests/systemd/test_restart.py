"""Restarts: what the service manager hands over and hears, and that no request is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from proxy.systemd import notify
from tests.served import ASK, Proxy, ServiceManager
from tests.support import PATIENCE_S, PYTHON, ROOT, engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}
STREAMS = QUEUED = 50
LATE = 20
STREAM = {**ASK, "stream": True, "max_tokens": 160, "ignore_eos": True}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    made = ServiceManager(tmp_path)
    yield made
    made.close()


@pytest.fixture
async def serve(tmp_path: Path, manager: ServiceManager) -> AsyncIterator[Callable[..., Proxy]]:
    """Starts one proxy after the other on the manager's socket."""
    proxies: list[Proxy] = []

    def serve_(*engine: str, server: dict[str, Any] | None = None, **entry: Any) -> Proxy:
        model = engine_model(*engine, **{"idle": AWAKE, **entry})
        settings = {"models": {"demo": model}, "server": server or {}}
        proxies.append(Proxy(tmp_path / "warmpool", settings=settings, manager=manager))
        return proxies[-1]

    yield serve_
    for proxy in proxies:
        if proxy.process.poll() is None:
            proxy.process.kill()
        await asyncio.to_thread(proxy.process.wait)


class Clients:
    """Requests on connections of their own, and what became of them."""

    def __init__(self, url: str) -> None:
        self.session = aiohttp.ClientSession(
            url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(PATIENCE_S)
        )
        self.begun = 0

    async def ask(self) -> str:
        async with self.session.post("/v1/completions", json=ASK) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return str(answer["choices"][0]["text"])

    async def stream(self) -> bool:
        """Whether a stream came to its end."""
        async with self.session.post("/v1/completions", json=STREAM) as response:
            received = await response.content.readany()
            self.begun += 1
            return (received + await response.read()).endswith(b"data: [DONE]\n\n")


async def restart_in_the_middle(start: Callable[[], Proxy], manager: ServiceManager) -> Proxy:
    """`systemctl restart` with streams running, requests queued and others arriving; the new proxy.

    The model must take as many requests at once as there are streams.
    """
    before = start()
    await manager.until("READY")
    clients = Clients(manager.url)
    text = await clients.ask()
    streams = [asyncio.create_task(clients.stream()) for _ in range(STREAMS)]
    while clients.begun < STREAMS:
        await asyncio.sleep(0.01)
    queued = [asyncio.create_task(clients.ask()) for _ in range(QUEUED)]
    async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
        while True:
            async with session.get(f"{manager.url}/admin/status") as response:
                if (await response.json())["models"]["demo"]["queue"] == QUEUED:
                    break
            await asyncio.sleep(0.01)
    before.process.terminate()
    await manager.until("STOPPING")
    late = [asyncio.create_task(clients.ask()) for _ in range(LATE)]
    assert await asyncio.to_thread(before.process.wait, PATIENCE_S) == 0
    assert all(await asyncio.gather(*streams))
    assert set(await asyncio.gather(*queued)) == {text}
    assert not any(task.done() for task in late), "they wait in the socket"
    manager.forget()
    after = start()
    await manager.until("READY")
    assert set(await asyncio.gather(*late)) == {text}
    await clients.session.close()
    return after


async def test_a_restart_in_the_middle_of_streams_and_a_queue_loses_nothing(serve: Any, manager: Any) -> None:
    await restart_in_the_middle(lambda: serve("--tokens-per-second", "40", max_concurrency=STREAMS), manager)


async def test_clients_wait_in_the_socket_while_the_pool_opens(serve: Any, manager: ServiceManager) -> None:
    clients = Clients(manager.url)
    early = asyncio.create_task(clients.ask())
    serve()
    await early
    await manager.until("READY")
    await clients.session.close()


async def test_kept_connections_are_answered_once_more_and_then_closed(serve: Any, manager: ServiceManager) -> None:
    proxy = serve("--tokens-per-second", "40")
    await manager.until("READY")
    async with aiohttp.ClientSession(manager.url, timeout=aiohttp.ClientTimeout(PATIENCE_S)) as session:
        for connection in ("kept", "streaming"):
            async with session.post("/v1/completions", json=ASK) as response:
                assert (response.status, "Connection" in response.headers) == (200, False), connection
        stream = await session.post("/v1/completions", json=STREAM)
        async with session.get("/ready") as response:
            assert response.status == 200
        proxy.process.terminate()
        await manager.until("STOPPING")
        async with session.get("/ready") as response:
            assert (response.status, response.headers["Connection"]) == (503, "close")
        assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.to_thread(proxy.process.wait, PATIENCE_S) == 0


async def test_one_that_waits_beyond_the_time_out_is_told_when_to_come_back(
    serve: Any, manager: ServiceManager
) -> None:
    proxy = serve("--hang-start", server={"drain_timeout": "1s"})
    await manager.until("READY")
    async with aiohttp.ClientSession(manager.url, timeout=aiohttp.ClientTimeout(PATIENCE_S)) as session:

        async def ask() -> tuple[int, str]:
            async with session.post("/v1/completions", json=ASK) as response:
                return response.status, response.headers["Retry-After"]

        waiting = asyncio.create_task(ask())
        while "waking from stopped" not in proxy.log.read_text():
            await asyncio.sleep(0.01)
        proxy.process.terminate()
        status, retry_after = await waiting
        assert status == 503
        assert int(retry_after) >= 1
    assert await asyncio.to_thread(proxy.process.wait, PATIENCE_S) == 0


async def test_the_manager_hears_of_every_step_and_the_watchdog_is_fed(serve: Any, tmp_path: Path) -> None:
    manager = ServiceManager(tmp_path / "..", watchdog_s=0.4)
    try:
        proxy = Proxy(tmp_path / "w", settings={"models": {"demo": engine_model()}}, manager=manager)
        assert await manager.until("READY") == "1"
        assert [m["STATUS"] for m in manager.said if "STATUS" in m] == [
            "adopting what an earlier process left", "serving 1 models",
        ]  # fmt: skip
        await manager.until("WATCHDOG", 3)
        os.kill(proxy.process.pid, signal.SIGSTOP)
        os.kill(proxy.process.pid, signal.SIGCONT)
        proxy.process.terminate()
        assert int(await manager.until("EXTEND_TIMEOUT_USEC")) > 30e6
        assert await asyncio.to_thread(proxy.process.wait, PATIENCE_S) == 0
    finally:
        manager.close()
        (tmp_path / ".." / "notify").unlink()


@pytest.mark.parametrize(("kind", "said"), [("file", "is no socket"), ("unix", "is no listening TCP socket")])
def test_a_descriptor_that_is_no_listening_socket_is_refused(tmp_path: Path, kind: str, said: str) -> None:
    opened = {"file": "open('/dev/null')", "unix": "__import__('socket').socket(__import__('socket').AF_UNIX)"}[kind]
    code = (
        f"import os; x = {opened}; os.dup2(x.fileno(), 3)\n"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
        "from proxy.systemd import notify\nnotify.from_environment()"
    )
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said in done.stderr.splitlines()[-1]


def test_what_is_meant_for_another_process_is_left_alone_and_not_inherited() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "1000000", "HOME": "/"}
    assert notify.from_environment(environ) == notify.Manager()
    assert environ == {"HOME": "/"}


def test_a_manager_that_is_gone_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notify.Manager(address=str(tmp_path / "nobody")).ready("serving")
    assert "cannot be reached" in caplog.text
