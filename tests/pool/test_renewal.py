"""Engines that are outdated serve until others can take over, which are made ready beside them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import RuntimeFailure
from proxy.pool.renewal_schedule import keep_current
from proxy.pool.usage import Usage
from proxy.runtime.base import Footprint, Outdated
from proxy.tiers import Tier
from tests.fakes import Rig, settle
from tests.pool.test_reload import OTHER_ENGINE, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECONDS = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}
DEMO = {"demo": {"idle": SECONDS}}
MOVED = Outdated("the container image x is another one now")


async def rig_with(models: dict[str, Any] = DEMO, **options: Any) -> Rig:
    rig = Rig(models, **{"shares_images": True, **options})
    await rig.pool.open()
    return rig


async def use(rig: Rig, model: str = "demo") -> Any:
    async with await rig.pool.lease(model) as lease:
        return lease


async def checkpointed(rig: Rig) -> int:
    """Have a golden checkpoint and nothing that runs; the boot of its engine."""
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    assert rig.states() == {"demo-1": "checkpointed"}
    return rig.runtime.images.there["demo"].boot


async def outdate(rig: Rig, change: Outdated = MOVED) -> None:
    rig.runtime.changes["demo"] = change
    await rig.pool.look_for_changes()


async def renewing_until(step: str) -> tuple[Rig, asyncio.Task[bool]]:
    """A rig with an outdated golden checkpoint, and its renewal, which waits at a step of the new engine."""
    rig = await rig_with()
    await checkpointed(rig)
    rig.runtime.gates[step] = asyncio.Event()
    await outdate(rig)
    work = asyncio.create_task(rig.pool.renew("demo"))
    await settle()
    return rig, work


@contextlib.asynccontextmanager
async def kept_current(rig: Rig) -> AsyncIterator[None]:
    task = asyncio.create_task(keep_current(rig.pool, Usage(), look_every_s=3600.0))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until_switched(rig: Rig) -> None:
    """Return when the old engines are gone."""
    async with asyncio.timeout(5):
        while set(rig.states()) != {"demo-2"} or rig.pool.status()["leaving"]:
            await asyncio.sleep(0)


def outdated_status(rig: Rig) -> Any:
    return rig.pool.status()["models"]["demo"]["outdated"]


async def test_a_model_is_switched_to_an_engine_that_has_proven_good_and_no_request_waits_for_it() -> None:
    rig = await rig_with()
    old = await checkpointed(rig)
    rig.runtime.gates["health"] = asyncio.Event()
    await outdate(rig)
    async with kept_current(rig):
        await settle()
        assert outdated_status(rig) == {"reason": MOVED.reason, "renewal": "demo-2 is being made ready"}
        assert [i["state"] for i in rig.pool.status()["coming"]] == ["waking"]
        assert rig.states() == {"demo-1": "checkpointed"}
        rig.runtime.changes.clear()
        rig.runtime.gates["health"].set()
        await until_switched(rig)
    assert rig.runtime.calls["restore"] == 1, "it was proven"
    assert rig.runtime.calls["canary"] >= 2
    assert set(rig.runtime.images.there) == {"demo"}
    assert rig.runtime.images.there["demo"].boot != old
    assert outdated_status(rig) is None
    lease = await use(rig)
    assert (lease.instance_id, lease.found) == ("demo-2", Tier.READY)
    for _ in range(3):
        await rig.pass_time(10)
    assert (await use(rig)).found is Tier.CHECKPOINTED
    await rig.pool.close()


async def test_the_old_engine_serves_meanwhile_and_goes_after_its_last_request() -> None:
    rig = await rig_with()
    await checkpointed(rig)
    gate = rig.runtime.gates["checkpoint"] = asyncio.Event()
    await outdate(rig)
    async with kept_current(rig):
        await settle()
        held = await rig.pool.lease("demo")
        assert (held.instance_id, held.found) == ("demo-1", Tier.CHECKPOINTED)
        gate.set()
        await rig.until(demo_2="ready")
        assert {i["id"]: i["state"] for i in rig.pool.status()["leaving"]} == {"demo-1": "retiring"}
        assert (await use(rig)).instance_id == "demo-2"
        assert "demo-1" in rig.runtime.processes
        held.release()
        await until_switched(rig)
    assert set(rig.runtime.processes) == {"demo-2"}
    await rig.pool.close()


async def test_where_images_are_instances_own_the_old_one_goes_with_its_instance() -> None:
    rig = await rig_with(shares_images=False)
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    assert set(rig.runtime.images.there) == {"demo-1"}
    await outdate(rig)
    async with kept_current(rig):
        await until_switched(rig)
    assert set(rig.runtime.images.there) == {"demo-2"}
    await rig.pool.close()


@pytest.mark.parametrize("operation", ["start", "checkpoint", "restore"])
async def test_one_that_fails_leaves_everything_as_it_was(operation: str) -> None:
    rig = await rig_with()
    old = await checkpointed(rig)
    rig.runtime.failures[operation] = [RuntimeFailure(operation, "no luck")]
    await outdate(rig)
    assert not await rig.pool.renew("demo")
    await settle()
    assert rig.states() == {"demo-1": "checkpointed"}
    assert {o: i.boot for o, i in rig.runtime.images.there.items()} == {"demo": old}
    assert rig.runtime.processes == {}
    assert rig.pool.status()["leaving"] == rig.pool.status()["coming"] == []
    assert outdated_status(rig)["renewal"] == f"failed: {operation}: no luck"
    assert (await use(rig)).found is Tier.CHECKPOINTED
    await rig.pool.close()


async def test_one_that_answers_otherwise_after_its_restore_does_not_take_over() -> None:
    rig = await rig_with()
    await checkpointed(rig)
    connect = rig.pool._moves.connect

    def forgetful(process: Any, *arguments: Any) -> Any:
        engine = connect(process, *arguments)
        real = rig.runtime.engine(process.instance_id, process.key)
        restore = real.restore

        async def changed(*arguments: Any) -> None:
            engine.answer = "another"  # type: ignore[attr-defined]
            await restore(*arguments)

        real.restore = changed  # type: ignore[method-assign, assignment]
        return engine

    rig.pool._moves.connect = forgetful
    await outdate(rig)
    assert not await rig.pool.renew("demo")
    assert "answers differently" in outdated_status(rig)["renewal"]
    await rig.pool.close()


async def test_a_request_that_needs_its_place_gets_it() -> None:
    rig = await rig_with({**DEMO, "other": {"idle": SECONDS}}, max_awake=1)
    await checkpointed(rig)
    gate = rig.runtime.gates["health"] = asyncio.Event()
    await outdate(rig)
    assert await rig.pool.room_beside("demo")
    work = asyncio.create_task(rig.pool.renew("demo"))
    await settle()
    request = asyncio.create_task(use(rig, "other"))
    await settle()
    assert rig.states() == {"demo-1": "checkpointed", "other-1": "waking"}
    gate.set()
    assert (await request).found is Tier.STOPPED
    assert not await work
    await settle()
    assert set(rig.runtime.processes) == {"other-1"}
    assert outdated_status(rig)["renewal"] == "a request needed its place"
    await rig.pool.close()


async def test_nothing_is_begun_beside_as_many_engines_as_may_be_awake() -> None:
    rig = await rig_with(max_awake=1)
    await use(rig)
    await outdate(rig)
    async with kept_current(rig):
        await settle()
        assert rig.states() == {"demo-1": "ready"}
        assert "waits for room" in outdated_status(rig)["renewal"]
    await rig.pass_time(10)
    assert await rig.pool.room_beside("demo"), "it sleeps now"
    await rig.pool.close()


async def test_gpu_memory_is_a_budget() -> None:
    rig = await rig_with(takes={"demo": (60 << 30, 2 << 30)})
    await use(rig)
    rig.pool._moves.gpus.due.set()
    await settle()
    await outdate(rig)
    assert not await rig.pool.room_beside("demo")
    await rig.pool.close()


async def test_host_memory_is_a_budget() -> None:
    rig = await rig_with()
    await checkpointed(rig)
    await outdate(rig)
    rig.runtime.images.footprints["demo"] = Footprint(engine=1 << 60, image=1, free=1 << 60)
    assert not await rig.pool.room_beside("demo")
    rig.runtime.images.footprints["demo"] = Footprint(engine=1, image=1, free=1 << 60)
    assert await rig.pool.room_beside("demo")
    await rig.pool.close()


async def test_where_two_images_do_not_fit_the_new_engine_takes_over_warm_and_writes_its_own_later() -> None:
    rig = await rig_with()
    old = await checkpointed(rig)
    rig.runtime.images.footprints["demo"] = Footprint(engine=1, image=2, free=1)
    await outdate(rig)
    assert await rig.pool.renew("demo")
    rig.runtime.changes.clear()
    assert (await use(rig)).found is Tier.READY
    for _ in range(3):
        await rig.pass_time(10)
    assert rig.states() == {"demo-2": "checkpointed"}
    assert rig.runtime.images.there["demo"].boot != old
    await rig.pool.close()


async def test_what_is_undone_is_not_renewed() -> None:
    rig, work = await renewing_until("health")
    old = rig.runtime.images.there["demo"].boot
    rig.runtime.changes.clear()
    await rig.pool.look_for_changes()
    assert not await work
    await settle()
    assert outdated_status(rig) is None
    assert rig.states() == {"demo-1": "checkpointed"}
    assert rig.runtime.images.there["demo"].boot == old
    await rig.pool.close()


async def test_an_image_that_must_not_be_restored_is_not_and_is_made_anew_all_the_same() -> None:
    rig = await rig_with()
    await checkpointed(rig)
    await outdate(rig, Outdated("its weights are others now", usable=False))
    await settle()
    assert rig.states() == {}
    rig.runtime.changes.clear()  # it was set aside
    await rig.pool.look_for_changes()
    assert outdated_status(rig)["reason"] == "its weights are others now"
    async with kept_current(rig):
        await rig.until(demo_1="ready")
    assert outdated_status(rig) is None
    assert (await use(rig)).found is Tier.READY
    await rig.pool.close()


async def test_an_engine_that_would_load_other_weights_at_its_wake_is_not_woken() -> None:
    rig = await rig_with({"demo": {"idle": {**SECONDS, "suspended": "never", "checkpointed": "1h"}}})
    await use(rig)
    await outdate(rig, Outdated("its weights are others now", usable=False))
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "ready"}, "it does not drop them any more"
    await rig.pool.close()
    rig = await rig_with({"demo": {"idle": {**SECONDS, "suspended": "never", "checkpointed": "1h"}}})
    await use(rig)
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "sleeping"}
    assert rig.runtime.processes["demo-1"].sleep_level == 2
    await outdate(rig, Outdated("its weights are others now", usable=False))
    await settle()
    assert rig.runtime.processes == {}
    await rig.pool.close()


async def test_those_who_wait_are_served_by_the_new_engine() -> None:
    rig = await rig_with({"demo": {"idle": SECONDS, "max_concurrency": 1}})
    await use(rig)
    await outdate(rig)
    gate = rig.runtime.gates["restore"] = asyncio.Event()
    work = asyncio.create_task(rig.pool.renew("demo"))
    await settle()
    held = await rig.pool.lease("demo")
    assert held.instance_id == "demo-1"
    waiting = asyncio.create_task(use(rig))
    await settle()
    gate.set()
    assert await work
    assert (await waiting).instance_id == "demo-2"
    held.release()
    await until_switched(rig)
    await rig.pool.close()


async def test_another_configuration_ends_what_was_made_for_the_old_one() -> None:
    rig, work = await renewing_until("health")
    await rig.pool.reconfigure(settings({"demo": {"idle": SECONDS, **OTHER_ENGINE}}))
    assert not await work
    await settle()
    assert rig.runtime.processes == {}
    assert rig.pool.status()["coming"] == []
    await rig.pool.close()


async def test_a_model_that_an_operator_stops_is_not_brought_back_by_its_renewal() -> None:
    rig, work = await renewing_until("health")
    rig.pool.step_down("demo", Tier.STOPPED, discard=True)
    assert not await work
    await settle()
    assert rig.states() == {}
    assert rig.runtime.processes == {}
    assert rig.runtime.images.there == {}
    await rig.pool.close()


async def test_stopping_ends_it_at_once_and_leaves_nothing() -> None:
    rig = await rig_with()
    old = await checkpointed(rig)
    rig.runtime.leaves = True
    rig.runtime.gates["canary"] = asyncio.Event()
    await outdate(rig)
    work = asyncio.create_task(rig.pool.renew("demo"))
    await settle()
    rig.pool.begin_stop()
    async with asyncio.timeout(5):
        await rig.pool.settled()
    assert not await work
    await rig.pool.close()
    assert rig.runtime.processes == {}
    assert {o: i.boot for o, i in rig.runtime.images.there.items()} == {"demo": old}


async def test_one_that_ends_by_itself_does_not_take_over() -> None:
    rig, work = await renewing_until("warmup")
    rig.runtime.kill("demo-2")
    assert not await work
    assert "the engine ended" in outdated_status(rig)["renewal"]
    await settle()
    assert rig.states() == {"demo-1": "checkpointed"}
    await rig.pool.close()


async def test_a_runtime_that_cannot_say_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    rig = await rig_with()
    await checkpointed(rig)
    rig.runtime.failures["outdated"] = [RuntimeFailure("compare", "podman is away", alive=True)]
    await rig.pool.look_for_changes()
    assert "podman is away" in caplog.text
    assert rig.states() == {"demo-1": "checkpointed"}
    await rig.pool.close()
