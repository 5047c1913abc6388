"""Answers that stand still while another model runs, and go on: real engines, from a client's side."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import psutil
import pytest

from proxy.server.forward.heartbeat import COMMENT, ON_HOLD, PAUSED
from tests.front import Front
from tests.support import PATIENCE_S, engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

ASK: dict[str, Any] = {"model": "demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG = {**ASK, "max_tokens": 400, "stream": True}
AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}
SLOW = ("--tokens-per-second", "200")


@pytest.fixture
async def pausing(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Front]]]:
    """Makes a front with the models `demo` and `other`, whose engines can pause."""
    fronts: list[Front] = []

    async def make(
        *options: str, pool: dict[str, Any] | None = None, server: dict[str, Any] | None = None, **entry: Any
    ) -> Front:
        models = {
            key: engine_model(*SLOW, *options, idle=AWAKE, weights_copy=True, **entry) for key in ("demo", "other")
        }
        front = Front(tmp_path / "w", models, pool=pool, **(server or {}))
        fronts.append(front)
        await front.open()
        return front

    yield make
    for front in fronts:
        await front.close()
        assert front.pool.status()["leases"] == 0


class Stream:
    """A long answer on its way."""

    def __init__(self, front: Front, **more: Any) -> None:
        self.raw, self.whole = b"", False
        self.texts: list[str] = []
        self.error: aiohttp.ClientError | None = None
        self.task = asyncio.create_task(self._run(front, {**LONG, **more}))

    async def _run(self, front: Front, body: dict[str, Any]) -> None:
        try:
            async with front.session.post("/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
                async for line in response.content:
                    self.raw += line
                    if line.startswith(b"data: {"):
                        self.texts.append(orjson.loads(line[6:])["choices"][0]["text"])
                    self.whole = self.whole or line == b"data: [DONE]\n"
        except aiohttp.ClientError as error:
            self.error = error

    async def tokens(self, count: int) -> None:
        """Return when there are so many."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.texts) < count:
                assert not self.task.done(), self.error or self.raw
                await asyncio.sleep(0.005)

    async def text(self) -> str:
        """All of it, once it has come to its end."""
        await self.task
        assert self.whole, (self.error, self.raw[-200:])
        return "".join(self.texts)


async def command(front: Front, name: str, **body: Any) -> tuple[int, Any]:
    async with front.session.post(f"/admin/models/demo/{name}", json=body) as response:
        return response.status, await response.json()


def state(front: Front, model: str = "demo") -> str:
    return str(front.pool.status()["models"][model]["instances"][0]["state"])


async def stands_still(stream: Stream, seconds: float = 0.4) -> bool:
    before = len(stream.texts)
    await asyncio.sleep(seconds)
    return len(stream.texts) == before


async def test_two_models_take_turns_on_one_place_and_every_answer_is_whole(pausing: Any) -> None:
    front: Front = await pausing(pool={"max_awake": 1, "quantum": "300ms"}, server={"heartbeat": "100ms"})
    undisturbed = await Stream(front).text()
    await front.post("/v1/completions", {**ASK, "model": "other"})
    await front.post("/v1/completions", ASK)
    streams = [Stream(front) for _ in range(3)]
    for stream in streams:
        await stream.tokens(5)
    answers = []
    for _ in range(2):
        response, body = await front.post("/v1/completions", {**ASK, "model": "other", "max_tokens": 60})
        assert response.status == 200, body
        assert not any(stream.task.done() for stream in streams), "it did not wait for the long answers"
        answers.append(orjson.loads(body)["choices"][0]["text"])
        await streams[0].tokens(len(streams[0].texts) + 5)
    assert len({*answers}) == 1
    assert {await stream.text() for stream in streams} == {undisturbed}
    assert front.sample("warmpool_pauses_total", model="demo") >= 2
    assert front.sample("warmpool_paused_seconds_count", model="demo") >= 2
    assert PAUSED in streams[0].raw
    assert ON_HOLD not in streams[0].raw


async def test_a_stream_that_an_operator_pauses_hears_that_it_is_alive_and_goes_on(pausing: Any) -> None:
    front: Front = await pausing(server={"heartbeat": "100ms"}, response_timeout="700ms")
    undisturbed = await Stream(front).text()
    stream = Stream(front)
    await stream.tokens(20)
    status, answer = await command(front, "pause")
    assert (status, answer["done"], answer["instances"]) == (200, True, [{"id": "demo-1", "state": "paused"}])
    assert await stands_still(stream, 1.5), "longer than an engine may be silent otherwise"
    assert stream.raw.count(ON_HOLD) >= 5
    assert COMMENT not in stream.raw
    assert state(front) == "paused"
    status, answer = await command(front, "unpause")
    assert (status, answer["instances"]) == (200, [{"id": "demo-1", "state": "ready"}])
    assert await stream.text() == undisturbed
    assert front.sample("warmpool_engine_stalls_total", model="demo") == 0


async def test_a_stall_check_does_not_take_a_paused_engine_for_one_that_hangs(pausing: Any) -> None:
    front: Front = await pausing(stall_after="500ms", wake_timeout="500ms")
    stream = Stream(front)
    await stream.tokens(20)
    await command(front, "pause")
    await asyncio.sleep(2.5)
    assert state(front) == "paused"
    await command(front, "unpause")
    await stream.text()
    assert front.sample("warmpool_engine_stalls_total", model="demo") == 0


async def test_new_requests_wait_for_a_paused_model(pausing: Any) -> None:
    front: Front = await pausing()
    stream = Stream(front)
    await stream.tokens(5)
    await command(front, "pause")
    waiting = asyncio.create_task(front.post("/v1/completions", ASK))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    assert front.pool.status()["models"]["demo"]["queue"] == 1
    await command(front, "unpause")
    assert (await waiting)[0].status == 200
    await stream.text()


async def test_clients_that_leave_while_it_stands_still_are_aborted_and_the_others_go_on(pausing: Any) -> None:
    front: Front = await pausing()
    undisturbed = await Stream(front).text()
    stays, leaves = Stream(front), Stream(front)
    await stays.tokens(5)
    await leaves.tokens(5)
    await command(front, "pause")
    leaves.task.cancel()
    await asyncio.wait([leaves.task])
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["leases"] != 1:
            await asyncio.sleep(0.02)
    await command(front, "unpause")
    assert await stays.text() == undisturbed
    engine = await front.engine_state()
    assert (engine["aborted"], engine["running"]) == (1, 0)


async def test_when_all_have_left_it_goes_on_and_serves(pausing: Any) -> None:
    front: Front = await pausing()
    leaves = Stream(front)
    await leaves.tokens(5)
    await command(front, "pause")
    leaves.task.cancel()
    await asyncio.wait([leaves.task])
    await command(front, "unpause")
    assert (await front.post("/v1/completions", ASK))[0].status == 200


async def test_an_engine_that_is_killed_while_it_stands_still_breaks_its_streams(pausing: Any) -> None:
    front: Front = await pausing()
    stream = Stream(front)
    await stream.tokens(5)
    boot = await front.engine_state()
    await command(front, "pause")
    os.kill(boot["pid"], signal.SIGKILL)
    await stream.task
    assert isinstance(stream.error, aiohttp.ClientPayloadError), "a truncated answer never looks complete"
    assert not stream.whole
    assert (await front.post("/v1/completions", ASK))[0].status == 200
    assert (await front.engine_state())["boot_id"] != boot["boot_id"]


async def test_an_engine_that_does_not_go_on_breaks_its_streams_and_is_replaced(pausing: Any) -> None:
    front: Front = await pausing()
    stream = Stream(front)
    await stream.tokens(5)
    boot = await front.engine_state()
    await command(front, "pause")
    async with front.session.post(f"{await front.engine()}/debug/fault", json={"kind": "fail_resume"}) as response:
        assert response.status == 200
    status, answer = await command(front, "unpause")
    assert status == 500
    assert "did not go on" in answer["error"]["message"]
    await stream.task
    assert isinstance(stream.error, aiohttp.ClientPayloadError)
    assert not stream.whole
    assert (await front.post("/v1/completions", ASK))[0].status == 200
    assert (await front.engine_state())["boot_id"] != boot["boot_id"]


async def test_a_copy_of_the_weights_that_is_lost_meanwhile_is_no_end(pausing: Any, tmp_path: Path) -> None:
    front: Front = await pausing()
    undisturbed = await Stream(front).text()
    stream = Stream(front)
    await stream.tokens(5)
    await command(front, "pause")
    for file in (tmp_path / "w" / "images" / "demo-1.weights").iterdir():
        file.unlink()
    assert (await command(front, "unpause"))[0] == 200
    assert await stream.text() == undisturbed
    assert (await command(front, "pause"))[0] == 409


async def test_an_engine_without_the_capability_says_so(front_of: Any) -> None:
    front: Front = await front_of(*SLOW, idle=AWAKE)
    stream = Stream(front)
    await stream.tokens(5)
    status, answer = await command(front, "pause")
    assert status == 409
    assert "demo-1 cannot be paused" in answer["error"]["message"]
    await stream.text()
    assert (await command(front, "unpause"))[1]["instances"] == []


async def test_a_hundred_pauses_and_one_answer_with_memory_flat(pausing: Any) -> None:
    front: Front = await pausing("--tokens-per-second", "40")  # it is to outlast them on a busy machine
    undisturbed = await Stream(front, max_tokens=600).text()
    engine = psutil.Process((await front.engine_state())["pid"])
    stream = Stream(front, max_tokens=600)
    await stream.tokens(3)
    held = []
    for _ in range(100):
        status, answer = await command(front, "pause")
        assert status == 200, answer
        assert (await command(front, "unpause"))[0] == 200
        held.append(engine.memory_info().rss)
    assert not stream.task.done()
    assert await stream.text() == undisturbed
    assert front.sample("warmpool_pauses_total", model="demo") == 100
    assert held[-1] - held[9] < 4 << 20
