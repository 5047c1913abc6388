"""Restarts, kills, crashes at every step and reboots, with engines in real containers and real checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.podman_bench import podman, why_no_podman
from tests.podman_host import AWAKE, QUICK, Host
from tests.served import Proxy, ServiceManager
from tests.support import PATIENCE_S, files_in, get_json
from tests.systemd.test_restart import STREAMS, Clients, restart_in_the_middle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    made = ServiceManager(tmp_path)
    yield made
    made.close()


async def boot_ids(host: Host) -> list[str]:
    """Of the engines that run in this host's containers."""
    found = []
    for container in host.containers("status=running"):
        address = podman("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)
        found.append(str((await get_json(f"http://{address}:8000/debug/state"))["boot_id"]))
    return found


async def test_a_restart_in_the_middle_of_streams_and_a_queue_loses_nothing(host: Host, manager: Any) -> None:
    def start() -> Proxy:
        return host.start("--tokens-per-second", "40", manager=manager, idle=AWAKE, max_concurrency=STREAMS)

    proxy = await restart_in_the_middle(start, manager)
    assert "demo-1 adopted: ready" in proxy.log.read_text()
    assert len(await boot_ids(host)) == 1


async def test_kill_9_costs_those_in_flight_only_and_the_engine_is_adopted(host: Host, manager: ServiceManager) -> None:
    proxy = host.start("--load-seconds", "3", manager=manager, idle=AWAKE)
    await manager.until("READY")
    clients = Clients(manager.url)
    began = time.monotonic()
    text = await clients.ask()
    cold_s = time.monotonic() - began
    before = await boot_ids(host)
    await clients.session.close()
    proxy.process.kill()
    proxy.process.wait()
    clients = Clients(manager.url)
    late = [asyncio.create_task(clients.ask()) for _ in range(20)]
    manager.forget()
    proxy = host.start("--load-seconds", "3", manager=manager, idle=AWAKE)
    await manager.until("STATUS")
    began = time.monotonic()
    await manager.until("READY")
    adopted_s = time.monotonic() - began
    assert set(await asyncio.gather(*late)) == {text}
    await clients.session.close()
    assert await boot_ids(host) == before
    assert len(host.containers()) == 1
    assert "waking" not in proxy.log.read_text()[proxy.log_start :]
    assert adopted_s * 4 < cold_s


async def test_an_engine_that_loads_is_adopted_and_not_started_twice(host: Host, manager: ServiceManager) -> None:
    proxy = host.start("--load-seconds", "3", manager=manager, idle=AWAKE)
    clients = Clients(manager.url)
    lost = asyncio.create_task(clients.ask())
    while not host.containers("status=running"):
        await asyncio.sleep(0.02)
    proxy.process.kill()
    await asyncio.to_thread(proxy.process.wait, PATIENCE_S)
    await asyncio.gather(lost, return_exceptions=True)
    await clients.session.close()
    containers = host.containers("status=running")
    assert len(containers) == 1
    proxy = host.start("--load-seconds", "3", manager=manager, idle=AWAKE)
    clients = Clients(manager.url)
    await clients.ask()
    assert "demo-1 adopted: it is loading" in proxy.log.read_text()
    assert host.containers() == containers
    await clients.session.close()


STEPS_OF_A_CHECKPOINT = [
    "after:sleep", "after:begin", "during:dump", "after:dump", "after:collect", "before:manifest", "after:manifest",
    "after:commit",
]  # fmt: skip
STEPS_OF_A_CLONE = ["before:clone", "after:create", "after:clone"]
STEPS_OF_A_RESTORE = ["after:link", "during:restore", "after:restore", "before:wake_up", "after:wake_up"]
STEPS_OF_AN_ARCHIVE = ["after:pack#2", "after:export", "before:import", "after:import"]


async def crash(host: Host, point: str, **entry: Any) -> str | None:
    """Serve on what an earlier crash left until the point is reached; the last answer, if there was one."""
    proxy = host.start(crash=point, **entry)
    try:
        await proxy.listening()
    except AssertionError:
        assert proxy.process.returncode == -signal.SIGKILL, proxy.log.read_text()
        return None  # clones are made as soon as the pool is open
    assert not [p.name for p in files_in(host.images) if p.name.endswith(".partial")], point
    assert len(host.containers()) <= entry.get("max_instances", 1), point
    text = None
    async with asyncio.timeout(PATIENCE_S):
        while proxy.process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                _, text = await proxy.ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(proxy.process.wait, 1.5)
    assert proxy.process.returncode == -signal.SIGKILL, proxy.log.read_text()
    return text


AT_ONCE = {"sleeping": "50ms", "suspended": "100ms", "checkpointed": "150ms"}


@pytest.mark.timeout(300)  # twenty starts
async def test_crashes_at_every_step_leave_nothing_half_made_and_lose_no_checkpoint(host: Host) -> None:
    """One after the other on the same folders, as a host would have it that crashes again and again."""
    texts = {await crash(host, point, idle=AT_ONCE) for point in STEPS_OF_A_CHECKPOINT}
    assert len(texts - {None}) == 1
    golden = [(p.name, p.stat().st_mtime_ns) for p in files_in(host.images / "demo")]
    assert golden
    for point in STEPS_OF_A_CLONE:
        await crash(host, point, idle=AT_ONCE, max_instances=2)
    texts |= {await crash(host, point, idle=AT_ONCE, max_instances=2) for point in STEPS_OF_A_RESTORE}
    assert [(p.name, p.stat().st_mtime_ns) for p in files_in(host.images / "demo")] == golden
    proxy = await host.serve(idle=AT_ONCE, max_instances=2)
    tier, text = await proxy.ask()
    assert tier != "stopped"
    await proxy.until_all(2, "checkpointed")
    assert await proxy.ask() == ("checkpointed", text)
    assert texts - {None} == {text}


async def test_crashes_on_the_way_to_the_archive_and_back_lose_no_checkpoint(host: Host) -> None:
    idle = {**QUICK, "archived": "700ms"}
    # What comes back from the archive by itself after a start is half written as well, while nobody has crashed yet.
    quiet = {"prewarm": 0}
    texts = {await crash(host, point, idle=idle, pool=quiet) for point in STEPS_OF_AN_ARCHIVE}
    proxy = await host.serve(idle=idle)
    tier, text = await proxy.ask()
    assert tier in ("checkpointed", "archived")
    assert texts - {None} == {text}
    assert not list((host.folder / "archive").glob("*.partial"))


@pytest.mark.parametrize("copies", [True, False])
async def test_after_a_reboot_the_checkpoint_is_there_again_by_itself(host: Host, copies: bool) -> None:
    proxy = await host.serve(idle=QUICK, pool={"archive_copies": copies})
    _, text = await proxy.ask()
    await proxy.until("checkpointed")
    while copies and "a copy of its checkpoint is in the archive" not in proxy.log.read_text():
        await asyncio.sleep(0.05)
    proxy.process.kill()
    proxy.process.wait()
    for image in host.images.iterdir():  # what tmpfs held
        shutil.rmtree(image) if image.is_dir() else image.unlink()
    proxy = await host.serve(idle=QUICK, pool={"archive_copies": copies})
    await proxy.until("checkpointed")
    log = proxy.log.read_text()[proxy.log_start :]
    assert ("is back from the archive" in log, "waking from stopped" in log) == (copies, not copies)
    assert await proxy.ask() == ("checkpointed", text)
