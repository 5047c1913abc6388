"""A container's network and log: the bridge's address, names in a clone, whose the port is. Real podman and CRIU."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loadtest.image import python
from proxy.config.model import ModelSettings
from proxy.errors import PortTakenError
from proxy.telemetry.stages import Stages
from tests.podman_bench import (
    PodmanBench,
    engine_table,
    model_of,
    podman,
    why_no_podman,
)
from tests.runtime_contract import FACTS
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.runtime.base import EngineProcess

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


async def ready(bench: PodmanBench, number: int = 1) -> EngineProcess:
    engine = await bench.runtime.start(f"demo-{number}", "demo", bench.model)
    await bench.healthy(engine)
    return engine


def inside(bench: PodmanBench, engine: EngineProcess, script: str) -> str:
    """What Python code prints in the engine's container."""
    return podman("exec", bench.container(engine), str(python()), "-c", script)


@pytest.fixture
async def network() -> AsyncIterator[str]:
    """A network of the user's own, whose bridge is made for the first container."""
    name = "warmpool-test-mac"
    podman("network", "create", name)
    yield name
    podman("network", "rm", "--force", name)


async def test_a_network_that_podman_does_not_know_has_no_bridge_to_hold(bench: PodmanBench) -> None:
    # podman 5 lists `host` among the networks of a container on the host's, and knows no network of that name.
    await bench.runtime.host.hold_bridges(["host"])


async def test_the_address_of_the_bridge_stays_while_containers_come_and_go(bench: PodmanBench, network: str) -> None:
    bench.model = model_of(network=network)
    await ready(bench)
    device = Path("/sys/class/net") / podman("network", "inspect", "--format", "{{.NetworkInterface}}", network)
    assert (device / "addr_assign_type").read_text().strip() == "3", "the kernel leaves it alone"
    address = (device / "address").read_text()
    for number in (2, 3, 4):
        other = await ready(bench, number)
        assert (device / "address").read_text() == address
        await other.remove()
        assert (device / "address").read_text() == address


async def test_a_clone_finds_the_address_of_its_own_hostname(bench: PodmanBench) -> None:
    golden = await ready(bench)
    await golden.checkpoint(FACTS, Stages())
    await golden.restore(Stages())
    clone = await bench.runtime.clone("demo-2", "demo", bench.model)
    await clone.restore(Stages())
    for engine in (golden, clone):
        await bench.healthy(engine)
        asked = inside(bench, engine, "import socket; print(socket.gethostbyname(socket.gethostname()))")
        assert asked == engine.host


async def test_a_port_on_the_hosts_network_that_another_program_has_costs_neither_the_image_nor_the_wake(
    bench: PodmanBench,
) -> None:
    bench.model = model_of(network="host")
    engine = await ready(bench)
    boot, port = await bench.boot_id(engine), engine.port
    assert await engine.listens() is True
    await engine.checkpoint(FACTS, Stages())
    with socket.socket() as another:
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        another.bind((engine.host, engine.port))
        another.listen()
        with pytest.raises(PortTakenError, match=f"port {engine.port} .*process"):
            await engine.restore(Stages())
        await engine.kill()
        elsewhere = await ready(bench)
        assert elsewhere.port != port
        await elsewhere.kill()
    await elsewhere.restore(Stages())
    assert elsewhere.port == port
    await bench.healthy(elsewhere)
    assert await bench.boot_id(elsewhere) == boot


async def test_on_the_hosts_network_another_programs_listener_is_not_the_engine(bench: PodmanBench) -> None:
    table = engine_table(network="host")
    sleeps = ModelSettings(
        podman={**table, "entrypoint": [str(python()), "-c"], "command": ["import time; time.sleep(1000)\n# {port}"]}
    )
    engine = await bench.runtime.start("demo-1", "demo", sleeps)
    assert await engine.listens() is False
    with socket.create_server((engine.host, engine.port)), pytest.raises(PortTakenError):
        await engine.listens()
    await engine.kill()


async def test_the_log_of_a_container_that_writes_without_end_stays_small(bench: PodmanBench) -> None:
    bench.claim.log_size = 64 << 10
    table = engine_table()
    script = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\nwhile True: print('x' * 1000)\n# {port}"
    chatty = ModelSettings(podman={**table, "entrypoint": [str(python()), "-c"], "command": [script]})
    await bench.runtime.start("demo-1", "demo", chatty)
    path, most = bench.claim.log_path("demo-1"), 0
    async with asyncio.timeout(PATIENCE_S):
        while path.stat().st_size >= most:
            most = path.stat().st_size
            await asyncio.sleep(0.001)
    assert most < 1 << 20
