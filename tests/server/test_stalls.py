"""Engines that stand still though `/health` answers, and those that only look so; real engines, both ways through."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from proxy.pool.instance import State
from proxy.pool.stall_detection import Reading, stands_still
from proxy.runtime.base import Vitals
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.front import Front

ASK: dict[str, Any] = {"model": "demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
SOON = {"stall_after": "2s", "wake_timeout": "2s"}
SOONER = {"stall_after": "1s", "wake_timeout": "1s"}


def reading(at: float, progress: Mapping[str, str], cpu_s: Mapping[int, float]) -> Reading:
    return Reading(at, progress, Vitals(cpu_s, stopped=False))


async def stalls_of(front: Front) -> float:
    return front.sample("warmpool_engine_stalls_total", model="demo")


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not what():
            await asyncio.sleep(0.02)


async def until_engine_runs(front: Front, count: int) -> None:
    """Return when there is an engine that works on so many requests."""
    instances = front.pool._state.models["demo"].instances
    await until(lambda: any(instance.state is State.READY for instance in instances.values()))
    async with asyncio.timeout(PATIENCE_S):
        while (await front.engine_state())["running"] != count:
            await asyncio.sleep(0.02)


async def until_looked_at(front: Front) -> None:
    """Return when the engine was looked at because it is silent, and was not given up."""
    await until(lambda: bool(front.pool._moves.stalls._next))


@pytest.mark.parametrize(
    ("after", "still"),
    [
        (reading(60.0, {"tokens": "5"}, {1: 3.0, 2: 7.0}), True),
        (reading(60.0, {"tokens": "5"}, {1: 3.5, 2: 7.5}), True),
        (reading(60.0, {"tokens": "6"}, {1: 3.0, 2: 7.0}), False),
        (reading(60.0, {"tokens": "5"}, {1: 3.0, 2: 9.0}), False),
        (reading(60.0, {"tokens": "5"}, {1: 3.0, 3: 0.0}), False),
        (reading(60.0, {}, {1: 3.0, 2: 7.0}), True),
    ],
    ids=["nothing", "health checks", "tokens", "CPU time", "another process", "no counters any more"],
)
def test_only_an_engine_that_counts_nothing_and_uses_no_cpu_stands_still(after: Reading, still: bool) -> None:
    assert stands_still(reading(0.0, {"tokens": "5"}, {1: 3.0, 2: 7.0}), after) is still


async def test_a_hung_engine_with_good_health_is_replaced_and_its_clients_get_an_error(front_of: Any) -> None:
    front: Front = await front_of(**SOON, max_concurrency=8)
    assert (await front.post("/v1/completions", ASK))[0].status == 200
    boot = (await front.engine_state())["boot_id"]
    streams = asyncio.create_task(
        front.post("/v1/completions", {**ASK, "stream": True, "max_tokens": 4000, "prompt": "x"})
    )
    await until_engine_runs(front, 1)
    async with asyncio.timeout(PATIENCE_S):
        response, _ = await front.post("/v1/completions", {**ASK, "vllm_xargs": {"fault": "hang_engine"}})
        assert response.status == 502
        with pytest.raises(aiohttp.ClientPayloadError):
            await streams
        assert (await front.post("/v1/completions", ASK))[0].status == 200
    assert (await front.engine_state())["boot_id"] != boot
    assert await stalls_of(front) == 1


async def test_a_long_answer_in_one_piece_is_no_stall(front_of: Any) -> None:
    front: Front = await front_of("--tokens-per-second", "5", **SOONER)
    answer = asyncio.create_task(front.post("/v1/completions", {**ASK, "max_tokens": 25}))
    await until_looked_at(front)
    assert not answer.done()
    assert (await answer)[0].status == 200
    assert (await stalls_of(front), (await front.engine_state())["loads"]) == (0, 1)


async def test_a_full_batch_is_no_stall(front_of: Any) -> None:
    front: Front = await front_of("--tokens-per-second", "5", "--max-num-seqs", "1", **SOONER)
    long = asyncio.create_task(front.post("/v1/completions", {**ASK, "max_tokens": 4000}))
    await until_engine_runs(front, 1)
    short = asyncio.create_task(front.post("/v1/completions", ASK))
    await until_looked_at(front)
    assert not long.done()
    assert not short.done()
    long.cancel()  # and so nobody waits for its end
    assert (await short)[0].status == 200
    assert (await stalls_of(front), (await front.engine_state())["loads"]) == (0, 1)


async def test_an_engine_that_somebody_stopped_is_replaced(front_of: Any) -> None:
    front: Front = await front_of("--processes", "2", **SOON)
    assert (await front.post("/v1/completions", ASK))[0].status == 200
    state = await front.engine_state()
    for pid in (state["pid"], *state["children"]):
        os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE_S):
        assert (await front.post("/v1/completions", ASK))[0].status == 502
        assert (await front.post("/v1/completions", ASK))[0].status == 200
    assert (await front.engine_state())["boot_id"] != state["boot_id"]
    assert await stalls_of(front) == 1


async def test_without_stall_after_nothing_is_looked_at(front_of: Any) -> None:
    front: Front = await front_of("--tokens-per-second", "5", stall_after="never", wake_timeout="1s")
    assert (await front.post("/v1/completions", {**ASK, "max_tokens": 10}))[0].status == 200
    assert front.pool._moves.stalls._looks == {} == front.pool._moves.stalls._next


async def test_an_engine_over_its_response_timeout_counts_as_broken(front_of: Any) -> None:
    front: Front = await front_of(response_timeout="1s")
    assert (await front.post("/v1/completions", ASK))[0].status == 200
    boot = (await front.engine_state())["boot_id"]
    response, _ = await front.post("/v1/completions", {**ASK, "vllm_xargs": {"fault": "hang"}})
    assert response.status == 502
    await until(lambda: front.pool.status()["models"]["demo"]["instances"] == [])
    assert (await front.post("/v1/completions", ASK))[0].status == 200
    assert (await front.engine_state())["boot_id"] != boot


async def test_one_silent_answer_does_not_end_those_that_go_on(front_of: Any) -> None:
    front: Front = await front_of("--tokens-per-second", "50", response_timeout="1s")
    stream = asyncio.create_task(front.post("/v1/completions", {**ASK, "stream": True, "max_tokens": 300}))
    await until(lambda: any(i["leases"] for i in front.pool.status()["models"]["demo"]["instances"]))
    response, _ = await front.post("/v1/completions", {**ASK, "vllm_xargs": {"fault": "hang"}})
    assert response.status == 502
    answer, text = await stream
    assert (answer.status, text.endswith(b"data: [DONE]\n\n")) == (200, True)
    assert (await front.engine_state())["loads"] == 1
