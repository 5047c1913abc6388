"""Answers of engines in containers that stand still, and what becomes of them when warmpool is killed meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest

from tests.podman_bench import podman, why_no_podman
from tests.podman_host import AWAKE
from tests.served import ASK, Proxy
from tests.support import PATIENCE_S, get_json

if TYPE_CHECKING:
    from tests.podman_host import Host

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]

STREAM = {**ASK, "stream": True, "max_tokens": 300, "ignore_eos": True}


async def read(proxy: Proxy, begun: asyncio.Event) -> tuple[str, bool]:
    """The text of a stream, and whether it came to its end."""
    text, whole = "", False
    try:
        async with proxy.session.post("/v1/completions", json=STREAM) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: {"):
                    text += orjson.loads(line[6:])["choices"][0]["text"]
                    begun.set()
                whole = whole or line == b"data: [DONE]\n"
    except aiohttp.ClientError:
        return text, False
    return text, whole


async def command(proxy: Proxy, name: str) -> Any:
    async with proxy.session.post(f"/admin/models/demo/{name}", json={}) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def engine_of(host: Host) -> Any:
    """What the engine says of itself, asked around the proxy."""
    (name,) = host.containers("label=io.warmpool.instance=demo-1")
    address = podman("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)
    return await get_json(f"http://{address}:8000/debug/state")


async def test_a_paused_answer_goes_on_and_after_kill_9_the_next_warmpool_lets_the_engine_go_on(host: Host) -> None:
    options: dict[str, Any] = {"weights_copy": True, "idle": AWAKE}
    proxy = await host.serve("--tokens-per-second", "100", **options)
    text, whole = await read(proxy, asyncio.Event())
    assert whole
    begun = asyncio.Event()
    reading = asyncio.create_task(read(proxy, begun))
    await begun.wait()
    await command(proxy, "pause")
    assert not reading.done()
    await asyncio.sleep(0.5)
    await command(proxy, "unpause")
    assert await reading == (text, True)

    begun.clear()
    reading = asyncio.create_task(read(proxy, begun))
    await begun.wait()
    await command(proxy, "pause")
    before = await engine_of(host)
    proxy.process.kill()
    assert (await reading)[1] is False, "a truncated answer never looks complete"
    await proxy.session.close()
    await asyncio.to_thread(proxy.process.wait, PATIENCE_S)

    after = await host.serve("--tokens-per-second", "100", **options)
    await after.until("ready")
    now = await engine_of(host)
    assert now["boot_id"] == before["boot_id"]
    async with asyncio.timeout(PATIENCE_S):
        while (await engine_of(host))["running"]:
            await asyncio.sleep(0.05)
    assert (await engine_of(host))["aborted"] == before["aborted"] + 1
    assert await read(after, asyncio.Event()) == (text, True)
    begun.clear()
    reading = asyncio.create_task(read(after, begun))
    await begun.wait()
    await command(after, "pause")
    await command(after, "unpause")
    assert await reading == (text, True)
