"""Busy instances whose requests stand still while another model runs, on the fake runtime."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.errors import CommandFailedError, ConflictError, EngineError, NoRoomError
from proxy.pool import pausing
from proxy.tiers import Tier
from tests.fakes import Rig, settle

ENTRY: dict[str, Any] = {"weights_copy": True, "idle": {"sleeping": "10s"}}


async def rig_with(*names: str, **pool: Any) -> Rig:
    rig = Rig(dict.fromkeys(names or ("demo",), ENTRY), **{"quantum": "1s", **pool})
    rig.runtime.can_pause = True
    await rig.pool.open()
    return rig


def stands_still(rig: Rig, instance_id: str) -> bool:
    return rig.runtime.processes[instance_id].paused


async def two_that_take_turns() -> tuple[Rig, Any, asyncio.Task[Any]]:
    """`a` with a request that goes on, and somebody who waits for `b`; one may be awake."""
    rig = await rig_with("a", "b", max_awake=1)
    (await rig.pool.lease("b")).release()
    running = await rig.pool.lease("a")
    waiting = asyncio.create_task(rig.pool.lease("b"))
    await settle()
    return rig, running, waiting


async def test_a_busy_instance_stands_still_for_another_model_and_goes_on() -> None:
    rig, running, waiting = await two_that_take_turns()
    assert not waiting.done()
    await rig.pass_time(1.2)
    other = await asyncio.wait_for(waiting, 5)
    assert rig.states() == {"a-1": "paused", "b-1": "ready"}
    assert stands_still(rig, "a-1")
    other.release()
    await rig.pass_time(1)
    assert rig.states()["a-1"] == "ready"
    assert not stands_still(rig, "a-1")
    assert rig.pool.status()["leases"] == 1
    running.release()
    assert rig.metrics.registry.get_sample_value("warmpool_pauses_total", {"model": "a"}) == 1
    assert rig.metrics.registry.get_sample_value("warmpool_unpause_seconds_count", {"model": "a"}) == 1
    await rig.pool.close()


async def test_while_another_model_waits_streams_go_to_the_engine_as_it_answers_the_short_ones_first() -> None:
    rig, running, waiting = await two_that_take_turns()
    sizes = [9000, *range(100, 1000, 100), 50]
    tasks = [asyncio.create_task(rig.pool.lease("a", streams=True, size=size)) for size in sizes]
    await settle()
    assert [task.done() for task in tasks] == [True] * 8 + [False] * 3, "it has enough to read"
    tasks[0].result().token_came()
    await settle()
    assert tasks[10].done(), "the shortest"
    for task in tasks[1:8]:
        task.result().token_came()
    await settle()
    assert all(task.done() for task in tasks)
    for lease in (running, *(task.result() for task in tasks)):
        lease.release()
    (await asyncio.wait_for(waiting, 5)).release()
    await rig.pool.close()


async def test_one_whose_turn_is_over_reads_its_prompts_before_it_stands_still() -> None:
    rig, running, waiting = await two_that_take_turns()
    lease = await rig.pool.lease("a", streams=True)
    await rig.pass_time(40)
    assert rig.states()["a-1"] == "paused", "though the engine gave it no token"
    (await waiting).release()
    await rig.pass_time(1)
    assert rig.states()["a-1"] == "ready"
    again = asyncio.create_task(rig.pool.lease("b"))
    await rig.pass_time(31)
    assert rig.states()["a-1"] == "retiring"
    lease.token_came()
    await rig.until(a_1="paused")
    (await again).release()
    await rig.pass_time(1)
    lease.release()
    running.release()
    await rig.pool.close()


async def test_an_engine_without_the_capability_is_never_paused() -> None:
    rig = Rig(dict.fromkeys("ab", ENTRY), max_awake=1, quantum="1s")
    await rig.pool.open()
    running = await rig.pool.lease("a")
    waiting = asyncio.create_task(rig.pool.lease("b"))
    await rig.pass_time(2)
    assert rig.states()["a-1"] == "ready"
    await rig.pass_time(10)
    assert rig.states()["a-1"] == "retiring"
    assert rig.runtime.calls["pause"] == 0
    running.release()
    (await waiting).release()
    await rig.pool.close()


async def test_without_a_copy_of_its_weights_none_is_paused() -> None:
    rig = Rig({"demo": ENTRY})
    rig.runtime.can_pause = True
    rig.runtime.failures["save_weights"] = [EngineError("save_weights", "no space")]
    await rig.pool.open()
    lease = await rig.pool.lease("demo")
    with pytest.raises(ConflictError, match="cannot be paused"):
        await rig.pool.pause("demo")
    lease.release()
    await rig.pool.close()


async def test_a_pause_that_fails_leaves_the_engine_running_and_is_not_tried_again() -> None:
    rig, running, waiting = await two_that_take_turns()
    rig.runtime.failures["pause"] = [EngineError("pause", "no memory")]
    await rig.pass_time(1.2)
    assert rig.states()["a-1"] == "ready"
    assert not stands_still(rig, "a-1")
    await rig.pass_time(3)
    assert rig.runtime.calls["pause"] == 1
    assert rig.pool.status()["leases"] == 1
    running.release()
    (await waiting).release()
    await rig.pool.close()


async def test_a_pause_without_host_memory_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pausing, "_AGAIN_S", 0.01)
    rig, running, waiting = await two_that_take_turns()
    rig.runtime.failures["pause"] = [NoRoomError("pause", "MemoryError: 900 MiB are to be kept")]
    await rig.pass_time(1.2)
    async with asyncio.timeout(10):
        while rig.runtime.calls["pause"] < 2:
            await rig.pass_time(1.2)
    (await asyncio.wait_for(waiting, 5)).release()
    running.release()
    await rig.pool.close()


async def test_an_engine_that_does_not_go_on_breaks_and_is_replaced() -> None:
    rig, running, waiting = await two_that_take_turns()
    await rig.pass_time(1.2)
    other = await waiting
    rig.runtime.failures["unpause"] = [EngineError("unpause", "an illegal memory access")]
    other.release()
    await rig.pass_time(1)
    assert rig.states().get("a-1", "gone") in ("gone", "broken", "stopping", "new")
    running.release()  # its generation is over
    assert rig.pool.status()["leases"] == 0
    (await rig.pool.lease("a")).release()
    assert rig.states()["a-1"] == "ready"
    await rig.pool.close()


async def test_an_engine_that_ends_while_it_stands_still_is_replaced() -> None:
    rig, running, waiting = await two_that_take_turns()
    await rig.pass_time(1.2)
    rig.runtime.kill("a-1")
    await settle()
    assert rig.states().get("a-1") != "paused"
    running.release()
    (await waiting).release()
    await rig.pool.close()


async def test_one_whose_clients_have_all_left_goes_on_when_there_is_room_and_steps_down() -> None:
    rig, running, waiting = await two_that_take_turns()
    await rig.pass_time(1.2)
    other = await waiting
    running.release()
    await settle()
    assert rig.states()["a-1"] == "paused"
    other.release()
    await rig.pass_time(0.5)
    await rig.pass_time(11)
    await rig.pass_time(11)
    await rig.pass_time(11)
    assert rig.states()["a-1"] in ("ready", "sleeping")
    assert not stands_still(rig, "a-1")
    await rig.pool.close()


async def test_an_operator_pauses_and_unpauses() -> None:
    rig = await rig_with()
    lease = await rig.pool.lease("demo")
    paused = await rig.pool.pause("demo")
    assert [i.id for i in paused] == ["demo-1"]
    assert rig.states() == {"demo-1": "paused"}
    status = rig.pool.status()["models"]["demo"]["instances"][0]
    assert status["on_hold"]
    assert status["can_pause"]
    assert status["paused_s"] is not None
    await rig.pass_time(100)
    assert rig.states() == {"demo-1": "paused"}, "it goes on when the operator says so"
    waiting = asyncio.create_task(rig.pool.lease("demo"))
    await settle()
    assert not waiting.done(), "new requests wait"
    await rig.pool.unpause("demo")
    (await waiting).release()
    lease.release()
    await rig.pool.close()


async def test_an_operator_is_told_why_nothing_can_be_paused() -> None:
    rig = await rig_with()
    with pytest.raises(ConflictError, match="No request runs"):
        await rig.pool.pause("demo")
    lease = await rig.pool.lease("demo")
    rig.runtime.failures["pause"] = [EngineError("pause", "no memory")]
    with pytest.raises(CommandFailedError, match="could not be paused"):
        await rig.pool.pause("demo")
    assert rig.states() == {"demo-1": "ready"}
    with pytest.raises(ConflictError, match="cannot be paused"):
        await rig.pool.pause("demo")
    lease.release()
    await rig.pool.close()


async def test_a_command_to_go_down_has_a_paused_one_go_on_first() -> None:
    rig = await rig_with()
    lease = await rig.pool.lease("demo")
    await rig.pool.pause("demo")
    with pytest.raises(ConflictError, match="answering 1"):
        rig.pool.step_down("demo", Tier.STOPPED)
    (command,) = rig.pool.step_down("demo", Tier.STOPPED, wait=True)
    await settle()
    assert rig.states() == {"demo-1": "retiring"}
    lease.release()
    await settle()
    assert not command.open
    assert rig.states() == {}
    await rig.pool.close()


async def test_a_paused_one_can_be_stopped_by_force() -> None:
    rig = await rig_with()
    lease = await rig.pool.lease("demo")
    await rig.pool.pause("demo")
    rig.pool.force_stop("demo")
    await settle()
    assert rig.states() == {}
    lease.release()
    await rig.pool.close()


async def test_a_server_that_stops_lets_go_on_what_an_operator_paused() -> None:
    rig = await rig_with()
    lease = await rig.pool.lease("demo")
    await rig.pool.pause("demo")
    rig.pool.begin_stop()
    await settle()
    assert rig.states() == {"demo-1": "ready"}
    lease.release()
    await rig.pool.close()


@pytest.mark.parametrize("when", ["paused", "pausing"])
async def test_the_next_warmpool_lets_a_paused_engine_go_on(when: str) -> None:
    before = await rig_with()
    before.runtime.leaves = True
    await before.pool.lease("demo")
    if when == "pausing":
        before.runtime.gates["pause"] = asyncio.Event()
        asyncio.get_running_loop().create_task(before.pool.pause("demo", wait=False))
        await settle()
    else:
        await before.pool.pause("demo")
    assert before.states() == {"demo-1": when}
    await before.pool.close()
    rig = Rig({"demo": ENTRY})
    rig.runtime.can_pause, rig.runtime.copies = True, before.runtime.copies
    rig.runtime.inherit(before.runtime, keep=True)
    await rig.pool.open()
    await rig.until(demo_1="ready")
    assert not stands_still(rig, "demo-1")
    assert rig.pool.status()["leases"] == 0
    await rig.pool.close()


async def test_it_gives_back_what_it_keeps_for_pauses_before_it_sleeps() -> None:
    rig = await rig_with()
    (await rig.pool.lease("demo")).release()
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "sleeping"}
    assert rig.runtime.calls["end_pauses"] == 1
    await rig.pool.close()


async def test_a_reload_that_replaces_the_model_waits_for_what_stands_still() -> None:
    rig = await rig_with()
    lease = await rig.pool.lease("demo")
    await rig.pool.pause("demo")
    wanted = rig.settings.model_copy(deep=True)
    wanted.models["demo"] = Rig({"demo": {**ENTRY, "process": {"command": ["another", "{port}"]}}}).settings.models[
        "demo"
    ]
    await rig.pool.reconfigure(wanted)
    await settle()
    leaving = rig.pool.status()["leaving"]
    assert [i["state"] for i in leaving] == ["retiring"]
    lease.release()
    await settle()
    assert rig.pool.status()["leaving"] == []
    await rig.pool.close()


async def test_a_lease_is_not_given_on_what_stands_still() -> None:
    rig = await rig_with()
    lease = await rig.pool.lease("demo")
    await rig.pool.pause("demo")
    assert rig.pool.try_lease("demo") is None
    lease.release()
    await rig.pool.close()


async def test_a_hundred_pauses_lose_nothing() -> None:
    rig, running, waiting = await two_that_take_turns()
    await rig.pass_time(1.2)
    other = await waiting
    for _ in range(100):
        other.release()
        await rig.pass_time(0.1)
        assert rig.states()["a-1"] == "ready"
        waiting = asyncio.create_task(rig.pool.lease("b"))
        await settle()
        await rig.pass_time(1.5)
        other = await asyncio.wait_for(waiting, 5)
        assert rig.states()["a-1"] == "paused"
    other.release()
    running.release()
    assert rig.pool.status()["leases"] == 0
    await rig.pool.close()
