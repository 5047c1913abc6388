"""A container that somebody paused by hand, with a request waiting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.podman_bench import podman, tmpfs_folder, why_no_podman
from tests.podman_host import AWAKE, host_of_test
from tests.served import ASK
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from tests.podman_host import Host

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]

images = pytest.fixture(tmpfs_folder)
host = pytest.fixture(host_of_test)


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
