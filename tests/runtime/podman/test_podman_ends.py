"""A podman service that stands still takes no request, no instance and not the end of warmpool with it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.podman_bench import why_no_podman
from tests.podman_host import AWAKE, Host
from tests.served import ASK
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


_MOVING = {"waking", "falling_asleep", "suspending", "checkpointing", "cloning", "archiving", "broken", "stopping"}


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A podman service that is not warmpool's, and its socket."""
    path = tmp_path / "podman.sock"
    process = subprocess.Popen(["podman", "system", "service", "--time", "0", f"unix://{path}"])
    async with asyncio.timeout(PATIENCE_S):
        while not path.exists():
            await asyncio.sleep(0.02)
    yield path, process
    process.send_signal(signal.SIGCONT)
    process.terminate()
    process.wait()


async def test_a_service_that_stands_still_harms_for_no_longer_than_the_time_limits(
    host: Host, service: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    path, process = service
    proxy = await host.serve(
        idle={**AWAKE, "suspended": "200ms"}, wake_timeout="3s", start_timeout="30s",
        server={"drain_timeout": "1s"}, runtime={"socket": str(path), "timeout": "2s"},
    )  # fmt: skip
    await proxy.ask()
    await proxy.until("suspended")
    process.send_signal(signal.SIGSTOP)
    async with proxy.session.post("/v1/completions", json=ASK) as answer:
        assert answer.status == 503, await answer.text()
        assert "Retry-After" in answer.headers
    process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(PATIENCE_S):
        while _MOVING & {*(await proxy.states()).values()}:
            await asyncio.sleep(0.05)
        async with proxy.session.post("/admin/models/demo/wake", json={}) as answer:
            assert answer.status == 200, await answer.text()
        await proxy.ask()
    process.send_signal(signal.SIGSTOP)
    proxy.process.terminate()
    assert await asyncio.to_thread(proxy.process.wait, PATIENCE_S) in (0, 1)
    assert "Traceback" not in proxy.log.read_text()
