"""What a pool leaves for the next one, and what it makes of what it finds; on fakes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.errors import DrainingError, EngineError
from tests.fakes import Rig, settle

SECONDS = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}
MODEL = {"demo": {"idle": SECONDS}}


async def use(rig: Rig) -> None:
    async with await rig.pool.lease("demo"):
        pass


async def heir_of(rig: Rig, models: dict[str, Any] | None = None) -> Rig:
    """A pool that finds what `rig` left."""
    heir = Rig(models or MODEL, shares_images=True)
    heir.runtime.leaves = True
    heir.runtime.inherit(rig.runtime, keep=True)
    await heir.pool.open()
    await settle()
    return heir


async def loading_rig(**models: Any) -> tuple[Rig, asyncio.Task[None]]:
    """One whose engine loads, and the request that waits for it."""
    rig = Rig(models or MODEL, shares_images=True)
    rig.runtime.leaves = True
    rig.runtime.gates["health"] = asyncio.Event()
    await rig.pool.open()
    request = asyncio.create_task(use(rig))
    await settle()
    rig.runtime.processes["demo-1"].listens = False
    return rig, request


async def test_stopping_serves_what_comes_and_begins_nothing_that_nobody_waits_for() -> None:
    rig = Rig({"demo": {"idle": SECONDS}, "other": {"idle": SECONDS, "min_ready": 1}}, shares_images=True)
    rig.runtime.gates["start"] = asyncio.Event()
    await rig.pool.open()
    rig.runtime.gates["start"].set()
    await rig.until(other_1="ready")
    rig.runtime.kill("other-1")
    rig.pool.begin_stop()
    assert not rig.pool.ready
    await use(rig)
    await rig.pass_time(100)
    assert rig.states() == {"demo-1": "ready"}
    await rig.pool.settled()
    await rig.pool.close()
    with pytest.raises(DrainingError):
        await rig.pool.lease("demo")


async def test_a_checkpoint_under_way_is_finished_before_the_end() -> None:
    rig = Rig(MODEL, shares_images=True)
    await rig.pool.open()
    await use(rig)
    rig.runtime.gates["checkpoint"] = asyncio.Event()
    for _ in range(3):
        await rig.pass_time(10)
    assert rig.states() == {"demo-1": "checkpointing"}
    rig.pool.begin_stop()
    settled = asyncio.create_task(rig.pool.settled())
    await settle()
    assert not settled.done()
    rig.runtime.gates["checkpoint"].set()
    await settled
    assert rig.states() == {"demo-1": "checkpointed"}
    await rig.pool.close()


async def test_a_restored_engine_is_asked_whether_it_can_sleep() -> None:
    rigs = [Rig(MODEL, shares_images=True) for _ in range(2)]
    for rig in rigs:
        connect = rig._connect

        def without_sleep(*arguments: Any, connect: Any = connect) -> Any:
            engine = connect(*arguments)
            engine.sleeps = False
            return engine

        rig.pool._moves.connect = without_sleep
    first, heir = rigs
    await first.pool.open()
    await use(first)
    for _ in range(3):
        await first.pass_time(10)
    assert first.states() == {"demo-1": "checkpointed"}
    await first.pool.close()
    heir.runtime.inherit(first.runtime, keep=True)
    await heir.pool.open()
    await use(heir)
    await heir.pass_time(10)
    assert heir.states() == {"demo-1": "ready"}
    await heir.pass_time(10)
    assert heir.states() == {"demo-1": "suspended"}
    assert heir.runtime.calls["sleep"] == 0


async def test_an_engine_that_loads_is_left_to_load_and_the_next_pool_waits_for_it() -> None:
    rig, request = await loading_rig()
    rig.pool.begin_stop()
    await rig.pool.settled()
    await rig.pool.close()
    with pytest.raises(DrainingError):
        await request
    assert set(rig.runtime.processes) == {"demo-1"}
    rig.runtime.processes["demo-1"].started_unix_s -= 40
    heir = await heir_of(rig)
    assert heir.states() == {"demo-1": "waking"}
    assert heir.pool.estimate_s("demo") == pytest.approx(100 - 40, abs=10)
    requests = [asyncio.create_task(use(heir)) for _ in range(3)]
    await settle()
    heir.runtime.processes["demo-1"].listens = True
    await asyncio.gather(*requests)
    assert heir.runtime.calls["start"] == 0
    assert heir.runtime.calls["warmup"] == 1, "what comes after loading is not left out"
    await heir.pool.close()


async def test_one_that_loads_and_does_not_come_up_is_started_again() -> None:
    rig, request = await loading_rig()
    await rig.pool.close()
    await asyncio.gather(request, return_exceptions=True)
    heir = await heir_of(rig)
    heir.runtime.kill("demo-1")
    await use(heir)
    assert heir.runtime.calls["start"] == 1
    await heir.pool.close()


@pytest.mark.parametrize("case", ["too long ago", "it listens"])
async def test_one_that_does_not_serve_for_another_reason_is_ended(case: str) -> None:
    rig, request = await loading_rig()
    await rig.pool.close()
    await asyncio.gather(request, return_exceptions=True)
    process = rig.runtime.processes["demo-1"]
    if case == "it listens":
        process.listens, process.healthy = True, False
    else:
        process.started_unix_s -= 1000.0
    heir = await heir_of(rig)
    assert heir.states() == {}
    assert heir.runtime.processes == {}
    await heir.pool.close()


# --- engines that were restored ---


async def restored_rig(models: dict[str, Any] | None = None) -> Rig:
    """One whose pool ended when its instance had been restored and was about to be asked for its canary."""
    rig = Rig(models or MODEL, shares_images=True)
    rig.runtime.leaves = True
    await rig.pool.open()
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    assert rig.states() == {"demo-1": "checkpointed"}
    await use(rig)
    await rig.pool.close()
    return rig


async def test_a_restored_engine_that_is_adopted_is_asked_for_its_canary_before_it_serves() -> None:
    heir = Rig(MODEL, shares_images=True)
    heir.runtime.leaves = True
    heir.runtime.inherit((await restored_rig()).runtime, keep=True)
    heir.runtime.gates["canary"] = asyncio.Event()
    await heir.pool.open()
    request = asyncio.create_task(use(heir))
    await settle()
    assert (heir.states(), request.done()) == ({"demo-1": "waking"}, False)
    heir.runtime.gates["canary"].set()
    await request
    calls = heir.runtime.calls
    assert (calls["canary"], calls["restore"], calls["start"]) == (1, 0, 0)
    assert heir.pool.estimate_s("demo") == 0
    await heir.pool.close()


async def test_one_that_misses_it_is_restored_anew() -> None:
    rig = await restored_rig()
    rig.runtime.processes["demo-1"].boot = 99
    heir = Rig(MODEL, shares_images=True)
    heir.runtime.inherit(rig.runtime, keep=True)
    heir.runtime.failures["canary"] = [EngineError("canary", "something else")]
    await heir.pool.open()
    await use(heir)
    assert heir.runtime.processes["demo-1"].boot == 1
    assert (heir.runtime.calls["restore"], heir.runtime.calls["start"], heir.runtime.calls["canary"]) == (1, 0, 2)
    await heir.pool.close()


async def test_one_that_sleeps_is_asked_when_it_wakes() -> None:
    rig = await restored_rig()
    rig.runtime.processes["demo-1"].sleep_level = 2
    heir = await heir_of(rig)
    assert (heir.states(), heir.runtime.calls["canary"]) == ({"demo-1": "sleeping"}, 0)
    for _ in range(2):
        await use(heir)
        await heir.pass_time(10)
    assert heir.runtime.calls["canary"] == 1, "and once is enough"
    await heir.pool.close()


@pytest.mark.parametrize("case", ["never", "started"])
async def test_one_that_owes_no_canary_serves_at_once(case: str) -> None:
    models = {"demo": {"idle": SECONDS, "canary": "never" if case == "never" else "first"}}
    rig = await restored_rig(models)
    rig.runtime.processes["demo-1"].restored = case == "never"
    heir = await heir_of(rig, models)
    assert (heir.states(), heir.runtime.calls["canary"]) == ({"demo-1": "ready"}, 0)
    await heir.pool.close()
