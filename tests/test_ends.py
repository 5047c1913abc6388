"""warmpool always ends, and nothing that it depends on takes an instance with it for good."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from proxy.runtime import processes
from tests.served import Proxy
from tests.support import PATIENCE_S, engine_model, processes_with

if TYPE_CHECKING:
    from pathlib import Path


def _reapers(proxy: Proxy) -> list[int]:
    """The orphan reapers of a warmpool."""
    return sorted({*processes.tree(proxy.process.pid)} & {*processes_with("proxy.runtime.guard")})


async def _another_reaper(proxy: Proxy, before: list[int]) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        while not (now := _reapers(proxy)) or now == before:
            await asyncio.sleep(0.02)
    return now


async def test_an_orphan_reaper_that_is_killed_is_replaced_and_harms_no_instance(tmp_path: Path) -> None:
    proxy = await Proxy(tmp_path, settings={"models": {"demo": engine_model()}}).listening()
    try:
        await proxy.ask()
        first = _reapers(proxy)
        assert len(first) == 1
        os.kill(first[0], signal.SIGKILL)
        # At once, with nobody at the other end of the pipe.
        async with proxy.session.post("/admin/models/demo/stop", json={}) as answer:
            assert answer.status == 200, await answer.text()
        assert await proxy.instance() is None
        assert (await proxy.ask())[0] == "stopped"
        second = await _another_reaper(proxy, first)
        os.kill(second[0], signal.SIGKILL)
        # The one after it knows of an engine that it was not told of.
        await _another_reaper(proxy, second)
        proxy.process.kill()
        assert await proxy.ended() == -signal.SIGKILL, "and nothing is left"
    finally:
        proxy.process.kill()
