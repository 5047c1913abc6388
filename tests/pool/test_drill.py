"""Idle checkpoints are restored once in a while and asked for their canary; one that fails is replaced."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from proxy.errors import Fault, RuntimeFailure
from proxy.pool.drill import keep_drilled
from tests.fakes import Rig, settle

SECONDS = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}
DEMO = {"demo": {"idle": SECONDS}}
DAY_S = 86400.0


async def rested(models: dict[str, Any] = DEMO, **options: Any) -> Rig:
    """One whose `demo` rests in its checkpoint, and whose drills have been looked at for the first time."""
    rig = Rig(models, **{"shares_images": True, **options})
    await rig.pool.open()
    async with await rig.pool.lease("demo"):
        pass
    for _ in range(3):
        await rig.pass_time(10)
    assert rig.states() == {"demo-1": "checkpointed"}
    await rig.pool.drill_due()
    return rig


async def drilled(rig: Rig) -> dict[str, float]:
    """What is counted after drills that are due."""
    await rig.pool.drill_due()
    await settle()
    return {
        result: rig.metrics.registry.get_sample_value(
            "warmpool_drills_total", {"model": "demo", "result": result}
        ) or 0.0
        for result in ("passed", "failed")
    }  # fmt: skip


async def later(rig: Rig, seconds: float = DAY_S) -> None:
    rig.clock.now += seconds
    await settle()


@pytest.mark.parametrize("shares", [True, False])
async def test_once_a_day_it_is_restored_asked_and_put_back(shares: bool) -> None:
    rig = await rested(shares_images=shares)
    await later(rig, DAY_S / 2)
    assert await drilled(rig) == {"passed": 0, "failed": 0}
    assert rig.runtime.calls["restore"] == 0
    await later(rig, DAY_S / 2)
    asked = rig.runtime.calls["canary"]
    uses = rig.pool._state.usage.count("demo")
    for day in (1, 2):
        assert await drilled(rig) == {"passed": day, "failed": 0}
        assert rig.states() == {"demo-1": "checkpointed"}
        assert rig.runtime.calls["restore"] == day
        assert rig.runtime.calls["canary"] == asked + day, "asked each time, not only after the first restore"
        assert await drilled(rig) == {"passed": day, "failed": 0}, "once"
        await later(rig)
    assert rig.runtime.calls["checkpoint"] == 1, "the image is the same"
    assert rig.pool._state.usage.count("demo") <= uses, "a drill is no use"
    await rig.pool.close()


async def test_one_that_answers_otherwise_is_set_aside_and_made_anew() -> None:
    rig = await rested()
    boot = rig.runtime.images.there["demo"].boot
    connect, answers = rig._connect, iter(["another answer", "canary", "canary"])

    def wrong_at_first(*arguments: Any) -> Any:
        engine = connect(*arguments)
        engine.answer = next(answers)  # type: ignore[attr-defined]
        return engine

    rig.pool._moves.connect = wrong_at_first
    for instance in rig.pool._state.models["demo"].instances.values():
        instance.client = None
    await later(rig)
    assert await drilled(rig) == {"passed": 0, "failed": 1}
    assert rig.states() == {"demo-1": "checkpointed"}
    assert rig.runtime.images.quarantined["demo"].boot == boot
    assert rig.runtime.images.there["demo"].boot != boot
    await later(rig)
    assert await drilled(rig) == {"passed": 1, "failed": 1}
    await rig.pool.close()


async def test_what_the_host_could_not_do_says_nothing_of_the_image() -> None:
    rig = await rested()
    rig.runtime.failures["restore"] = [RuntimeFailure("restore", "no memory")]
    await later(rig)
    assert await drilled(rig) == {"passed": 0, "failed": 1}
    assert rig.states() == {"demo-1": "checkpointed"}
    assert rig.runtime.images.quarantined == {}
    await rig.pool.close()


async def test_where_nothing_starts_requests_are_told_and_the_next_drill_tries_again() -> None:
    rig = await rested()
    rig.runtime.failures["restore"] = [RuntimeFailure("restore", "gone", fault=Fault.DAMAGE)]
    rig.runtime.failures["start"] = [RuntimeFailure("start", "no")]
    await later(rig)
    assert await drilled(rig) == {"passed": 0, "failed": 1}
    await later(rig)
    async with await rig.pool.lease("demo") as lease:
        assert lease.wake is not None
    await rig.pool.close()


async def test_nothing_is_tried_while_requests_run_or_wait() -> None:
    rig = await rested({"demo": {"idle": SECONDS}, "other": {"idle": SECONDS}})
    held = await rig.pool.lease("other")
    await later(rig)
    assert await drilled(rig) == {"passed": 0, "failed": 0}
    held.release()
    assert await drilled(rig) == {"passed": 1, "failed": 0}
    await rig.pool.close()


async def test_nobody_steps_down_for_it() -> None:
    rig = await rested({"demo": {"idle": SECONDS}, "other": {"idle": dict.fromkeys(SECONDS, "30d")}}, max_awake=1)
    async with await rig.pool.lease("other"):
        pass
    await later(rig)
    assert await drilled(rig) == {"passed": 0, "failed": 0}
    assert rig.states()["other-1"] == "ready"
    await rig.pool.close()


async def test_a_request_that_comes_meanwhile_is_served_and_keeps_the_engine() -> None:
    rig = await rested()
    await later(rig)
    gate = rig.runtime.gates["restore"] = asyncio.Event()
    drill = asyncio.create_task(rig.pool.drill_due())
    await settle()
    request = asyncio.create_task(rig.pool.lease("demo"))
    await settle()
    gate.set()
    lease = await request
    await drill
    assert rig.states() == {"demo-1": "ready"}
    lease.release()
    await settle()
    assert rig.states() == {"demo-1": "ready"}
    assert rig.runtime.calls["restore"] == 1
    await rig.pool.close()


@pytest.mark.parametrize(("times", "passed"), [(["02:00-03:00"], 0), (["11:00-13:00", "02:00-03:00"], 1)])
async def test_there_are_times_for_it(times: list[str], passed: int) -> None:
    noon = time.mktime((2026, 11, 29, 12, 0, 0, 0, 0, -1))
    rig = await rested(drill_times=times, unix_s=lambda: noon)
    await later(rig)
    assert (await drilled(rig))["passed"] == passed
    await rig.pool.close()


async def test_it_can_be_switched_off_and_is_looked_at_by_itself() -> None:
    off = await rested(drill="never")
    await later(off, 100 * DAY_S)
    assert await drilled(off) == {"passed": 0, "failed": 0}
    await off.pool.close()
    rig = await rested(drill="10ms")
    await later(rig)
    keeper = asyncio.create_task(keep_drilled(rig.pool))
    while rig.runtime.calls["restore"] == 0:
        await asyncio.sleep(0.001)
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
    await rig.pool.close()
