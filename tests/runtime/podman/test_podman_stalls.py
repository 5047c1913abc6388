"""Containers whose engine somebody paused, or that does not start; what host memory they hold."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.podman_bench import podman, why_no_podman
from tests.podman_host import AWAKE
from tests.served import ASK
from tests.support import PATIENCE_S, get_json

if TYPE_CHECKING:
    from tests.podman_host import Host

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


async def test_an_engine_that_somebody_paused_is_replaced(host: Host) -> None:
    proxy = await host.serve(idle=AWAKE, stall_after="2s", wake_timeout="10s")
    await proxy.ask()
    (container,) = host.containers("status=running")
    podman("pause", container)
    async with asyncio.timeout(PATIENCE_S):
        async with proxy.session.post("/v1/completions", json=ASK) as response:
            assert response.status == 502
        await proxy.ask()
    assert "demo-1 stands still and is replaced: its processes were stopped" in proxy.log.read_text()
    assert container not in host.containers()


async def test_the_last_lines_of_one_that_does_not_start_are_in_the_status(host: Host) -> None:
    proxy = await host.serve("--fail-start", idle=AWAKE)
    async with proxy.session.post("/v1/completions", json=ASK) as response:
        assert response.status == 503
        assert "told to fail" not in await response.text()
    model = (await get_json(f"{proxy.url}/admin/status"))["models"]["demo"]
    assert any(line.endswith("cannot load: told to fail") for line in model["last_failure"]["log_lines"])
    assert not any(" stdout F " in line for line in model["last_failure"]["log_lines"])
    assert model["backs_off_s"] > 0


async def test_the_host_memory_of_containers_is_seen(host: Host) -> None:
    proxy = await host.serve("--memory", "64MiB", idle=AWAKE)
    await proxy.ask()
    async with asyncio.timeout(PATIENCE_S):
        while (instance := await proxy.instance())["host_bytes"] < 64 << 20:
            await asyncio.sleep(0.1)
    assert instance["state"] == "ready"
