"""The pool on fakes: leases, single-flight wakes, the ladder, failures, cancellation, drain."""

from __future__ import annotations

import asyncio
import errno
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import (
    DrainingError,
    EngineError,
    Fault,
    ModelNotFoundError,
    NoCapacityError,
    PortTakenError,
    QueueFullError,
    RuntimeFailure,
    WakeFailedError,
)
from proxy.tiers import Tier
from tests.fakes import Rig, ended, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from proxy.pool.lease import Lease

SECONDS = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}


@pytest.fixture
async def rig_of() -> AsyncIterator[Callable[..., Coroutine[Any, Any, Rig]]]:
    """Makes opened rigs; at the end closes them and counts what is left."""
    rigs: list[Rig] = []

    async def make(models: dict[str, dict[str, Any]] | None = None, **pool: Any) -> Rig:
        rig = Rig(models or {"demo": {"idle": SECONDS}}, **pool)
        rigs.append(rig)
        await rig.pool.open()
        return rig

    yield make
    await ended(rigs)


@pytest.fixture
async def rig(rig_of: Callable[..., Coroutine[Any, Any, Rig]]) -> Rig:
    """One model, `demo`, that steps down after 10, 20 and 30 s."""
    return await rig_of()


async def use(rig: Rig, model: str = "demo") -> Lease:
    """A request that comes and is answered at once; its ended lease."""
    async with await rig.pool.lease(model) as lease:
        return lease


async def down_to(rig: Rig, tier: Tier) -> None:
    """Bring demo-1 up, then down to a tier by idleness."""
    await use(rig)
    for _ in range(tier):
        await rig.pass_time(10)
    assert rig.states() == {"demo-1": tier.label}


# --- the way up and down ---


async def test_a_stopped_model_is_started_and_the_lease_says_so(rig: Rig) -> None:
    lease = await use(rig)
    assert (lease.found, lease.instance_id, lease.model) == (Tier.STOPPED, "demo-1", "demo")
    assert lease.wake is not None
    assert list(lease.wake.stages) == ["start", "load", "warmup", "canary"]
    again = await use(rig)
    assert (again.found, again.wake, again.queue_s) == (Tier.READY, None, 0.0)
    assert rig.runtime.calls["start"] == 1


async def test_an_idle_instance_takes_every_tier_and_comes_back_from_each(rig: Rig) -> None:
    for tier in (Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED):
        await down_to(rig, tier)
        lease = await use(rig)
        assert lease.found is tier
        assert lease.wake is not None
        assert lease.wake.reached_from is tier
    assert rig.runtime.calls["start"] == 1
    assert rig.runtime.calls["restore"] == 1


async def test_state_survives_the_checkpoint_and_the_image_is_kept(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    boot = rig.runtime.images.there["demo-1"].boot
    for _ in range(3):
        await use(rig)
        assert rig.runtime.processes["demo-1"].boot == boot
        await rig.pass_time(10)
        await rig.pass_time(10)
        await rig.pass_time(10)
        assert rig.states() == {"demo-1": "checkpointed"}
    assert rig.runtime.calls["checkpoint"] == 1, "an instance with an image is dropped, not written again"


async def test_connections_are_closed_before_a_checkpoint_and_after_suspending(rig: Rig) -> None:
    await use(rig)
    engine = rig.engines["demo-1"]
    await rig.pass_time(10)
    assert engine.connected
    await rig.pass_time(10)
    assert not engine.connected


async def test_the_canary_is_asked_once_per_image_by_default(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    await use(rig)
    asked = rig.runtime.calls["canary"]
    await down_to(rig, Tier.CHECKPOINTED)
    await use(rig)
    assert rig.runtime.calls["canary"] == asked == 2


async def test_an_engine_without_sleep_mode_skips_that_tier(rig_of: Any) -> None:
    rig: Rig = await rig_of()
    connect = rig._connect

    def without_sleep(*arguments: Any) -> Any:
        engine = connect(*arguments)
        engine.sleeps = False  # type: ignore[attr-defined]
        return engine

    rig.pool._moves.connect = without_sleep
    await use(rig)
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "ready"}
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "suspended"}
    assert rig.runtime.calls["sleep"] == 0


async def test_min_ready_is_there_before_any_request_and_is_replaced(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": SECONDS, "min_ready": 1}})
    await rig.until(demo_1="ready")
    await rig.pass_time(10_000)
    assert rig.states() == {"demo-1": "ready"}
    rig.runtime.kill("demo-1")
    await rig.until(demo_1="gone")
    await rig.until(demo_1="ready")
    assert rig.runtime.calls["start"] == 2


async def test_min_ready_rests_between_starts_that_fail(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": SECONDS}})
    await rig.pool.close()
    rig = Rig({"demo": {"idle": SECONDS, "min_ready": 1}})
    rig.runtime.failures["start"] = [RuntimeFailure("start", "no")] * 3
    await rig.pool.open()
    await settle()
    assert rig.runtime.calls["start"] == 1
    await rig.pass_time(1)
    await rig.pass_time(1)
    assert rig.runtime.calls["start"] == 2
    with pytest.raises(WakeFailedError):
        await rig.pool.lease("demo")
    assert rig.runtime.calls["start"] == 2, "a request is told, and starts nothing sooner"
    rig.runtime.failures.clear()
    await rig.pass_time(60)
    assert rig.states() == {"demo-1": "ready"}
    await rig.pool.close()


# --- single flight ---


async def test_200_requests_to_a_stopped_model_cause_one_start(rig: Rig) -> None:
    leases = await asyncio.gather(*(use(rig) for _ in range(200)))
    assert rig.runtime.calls["start"] == 1
    assert {lease.found for lease in leases} == {Tier.STOPPED}
    assert {lease.instance_id for lease in leases} == {"demo-1"}


async def test_half_of_them_cancelled_leave_nothing_behind(rig: Rig) -> None:
    gate = rig.runtime.gates["health"] = asyncio.Event()
    requests = [asyncio.create_task(use(rig)) for _ in range(200)]
    await settle()
    assert rig.pool.status()["models"]["demo"]["queue"] == 200
    for request in requests[::2]:
        request.cancel()
    gate.set()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert sum(isinstance(r, asyncio.CancelledError) for r in results) == 100
    assert rig.runtime.calls["start"] == 1
    status = rig.pool.status()
    assert (status["leases"], status["models"]["demo"]["queue"]) == (0, 0)
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "sleeping"}, "nothing keeps it from stepping down"


async def test_all_of_them_cancelled_do_not_cancel_the_wake(rig: Rig) -> None:
    gate = rig.runtime.gates["health"] = asyncio.Event()
    requests = [asyncio.create_task(use(rig)) for _ in range(5)]
    await settle()
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    gate.set()
    await rig.until(demo_1="ready")


async def test_one_cancelled_in_the_moment_of_its_grant_hands_it_on(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"max_concurrency": 1}})
    first = await rig.pool.lease("demo")
    second, third = (asyncio.create_task(rig.pool.lease("demo")) for _ in range(2))
    await settle()
    first.release()  # grants to the second, which has not run yet
    second.cancel()
    with suppress(asyncio.CancelledError):
        await second
    (await third).release()
    assert rig.pool.status()["leases"] == 0


async def test_leases_are_granted_in_order_within_the_concurrency(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"max_concurrency": 2}})
    held = [await rig.pool.lease("demo") for _ in range(2)]
    order: list[int] = []

    async def wait(number: int) -> None:
        async with await rig.pool.lease("demo"):
            order.append(number)

    waiting = [asyncio.create_task(wait(n)) for n in range(5)]
    await settle()
    assert order == []
    for lease in held:
        lease.release()
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2, 3, 4]


async def granted_in_order(rig: Rig, *waits: tuple[str, int, float]) -> list[str]:
    """Who is served in which order behind one busy engine; `waits`: name, priority, seconds since the one before."""
    held = await rig.pool.lease("demo")
    order: list[str] = []

    async def wait(name: str, priority: int) -> None:
        async with await rig.pool.lease("demo", priority=priority):
            order.append(name)

    tasks = []
    for name, priority, later_s in waits:
        rig.clock.now += later_s
        tasks.append(asyncio.create_task(wait(name, priority)))
        await settle()
    held.release()
    await asyncio.gather(*tasks)
    return order


async def test_a_higher_priority_is_served_first_and_equals_in_order(rig_of: Any) -> None:
    rig = await rig_of({"demo": {"idle": SECONDS, "max_concurrency": 1}}, priority_head_start="60s")
    waits = [("a", 0, 0), ("low", -1, 1), ("b", 0, 1), ("high", 1, 1), ("c", 0, 1), ("high2", 1, 0)]
    assert await granted_in_order(rig, *waits) == ["high", "high2", "a", "b", "c", "low"]


async def test_one_that_waited_long_enough_is_not_overtaken(rig_of: Any) -> None:
    rig = await rig_of(
        {"demo": {"idle": SECONDS, "max_concurrency": 1, "queue_timeout": "1d"}}, priority_head_start="60s"
    )
    waits = [("low", -1, 0), ("early", 1, 119), ("late", 1, 2), ("middle", 0, 0)]
    assert await granted_in_order(rig, *waits) == ["early", "low", "late", "middle"]


async def test_one_that_leaves_the_middle_of_the_queue_is_passed_over(rig_of: Any) -> None:
    rig = await rig_of({"demo": {"idle": SECONDS, "max_concurrency": 1}})
    held = await rig.pool.lease("demo")
    low, high = (asyncio.create_task(rig.pool.lease("demo", priority=p)) for p in (-1, 1))
    await settle()
    high.cancel()
    await settle()
    held.release()
    (await low).release()
    assert rig.pool.status()["models"]["demo"]["queue"] == 0


async def test_more_waiting_wakes_more_instances(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"max_concurrency": 2, "max_instances": 3}})
    leases = await asyncio.gather(*(rig.pool.lease("demo") for _ in range(5)))
    assert {lease.instance_id for lease in leases} == {"demo-1", "demo-2", "demo-3"}
    for lease in leases:
        lease.release()


async def test_a_request_that_comes_during_a_step_down_waits_for_it_and_wakes(rig: Rig) -> None:
    await down_to(rig, Tier.SUSPENDED)
    gate = rig.runtime.gates["checkpoint"] = asyncio.Event()
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "checkpointing"}
    request = asyncio.create_task(use(rig))
    await settle()
    gate.set()
    lease = await request
    assert lease.found is Tier.CHECKPOINTED
    assert rig.runtime.calls["start"] == 1


# --- waiting has limits ---


async def test_a_full_queue_refuses_and_says_when_to_come_back(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"max_queue": 2}})
    rig.runtime.gates["health"] = asyncio.Event()
    waiting = [asyncio.create_task(use(rig)) for _ in range(2)]
    await settle()
    with pytest.raises(QueueFullError) as refused:
        await rig.pool.lease("demo")
    assert refused.value.retry_after_s == 100.0, "typical, as long as nothing was measured"
    rig.runtime.gates["health"].set()
    await asyncio.gather(*waiting)


async def test_the_queue_over_all_models_is_bounded(rig_of: Any) -> None:
    rig: Rig = await rig_of({"a": {}, "b": {}}, max_queue=2)
    rig.runtime.gates["health"] = asyncio.Event()
    waiting = [asyncio.create_task(use(rig, name)) for name in ("a", "b")]
    await settle()
    with pytest.raises(QueueFullError):
        await rig.pool.lease("a")
    rig.runtime.gates["health"].set()
    await asyncio.gather(*waiting)


async def test_a_request_waits_no_longer_than_queue_timeout_and_the_wake_goes_on(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"queue_timeout": "1ms"}})
    gate = rig.runtime.gates["health"] = asyncio.Event()
    with pytest.raises(NoCapacityError, match="became free"):
        await rig.pool.lease("demo")
    assert rig.pool.status()["models"]["demo"]["queue"] == 0
    gate.set()
    await rig.until(demo_1="ready")


async def test_a_wake_takes_no_longer_than_its_own_limit(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"start_timeout": "1ms", "queue_timeout": "1h"}})
    rig.runtime.gates["health"] = asyncio.Event()
    with pytest.raises(WakeFailedError, match=r"stopped: no result within start_timeout \(0\.001 s\)"):
        await rig.pool.lease("demo")
    await rig.until(demo_1="gone")


async def test_an_unknown_model_is_refused_and_an_alias_is_not(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"name": "org/Demo", "aliases": ["gpt-4"]}})
    with pytest.raises(ModelNotFoundError):
        await rig.pool.lease("demo")
    assert (await use(rig, "gpt-4")).instance_id == (await use(rig, "org/Demo")).instance_id == "demo-1"


# --- failures ---


async def test_a_failed_start_fails_those_who_wait_and_the_next_request_tries_again(rig: Rig) -> None:
    rig.runtime.failures["start"] = [RuntimeFailure("start", "no program 'x'")]
    results = await asyncio.gather(*(use(rig) for _ in range(20)), return_exceptions=True)
    assert {type(r) for r in results} == {WakeFailedError}
    assert "no program 'x'" in str(results[0])
    assert rig.runtime.calls["start"] == 1
    rig.runtime.failures.clear()
    await rig.pass_time(1)
    assert (await use(rig)).instance_id == "demo-1"
    assert rig.runtime.calls["start"] == 2


async def test_an_engine_that_ends_while_it_loads_fails_the_wake_at_once(rig: Rig) -> None:
    rig.runtime.gates["health"] = asyncio.Event()
    request = asyncio.create_task(use(rig))
    await settle()
    rig.runtime.kill("demo-1")
    with pytest.raises(WakeFailedError, match="the engine ended: signal 9"):
        await request
    rig.runtime.gates.clear()
    await rig.pass_time(1)
    await use(rig)


async def test_a_failed_tier_falls_through_to_the_next(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    await use(rig)
    await rig.pass_time(10)
    await rig.pass_time(10)
    rig.runtime.failures = {
        "resume": [RuntimeFailure("resume", "no")],
        "restore": [RuntimeFailure("restore", "no")],
    }
    lease = await use(rig)
    assert (lease.found, lease.wake and lease.wake.reached_from) == (Tier.SUSPENDED, Tier.STOPPED)
    assert rig.runtime.calls["start"] == 2


async def test_an_image_is_tried_twice_then_removed(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    rig.runtime.failures["restore"] = [RuntimeFailure("restore", "no", fault=Fault.IMAGE)] * 2
    await use(rig)
    assert rig.runtime.images.there, "one failure may have been chance"
    await down_to(rig, Tier.CHECKPOINTED)
    await use(rig)
    assert not rig.runtime.images.there
    rig.runtime.failures.clear()
    await down_to(rig, Tier.CHECKPOINTED)
    assert rig.runtime.calls["checkpoint"] == 2
    assert (await use(rig)).found is Tier.CHECKPOINTED


async def test_a_restored_engine_that_answers_differently_does_not_serve(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    engine = rig.engines["demo-1"]
    engine.answer = "something else"
    rig.runtime.failures["start"] = [RuntimeFailure("start", "no")]
    with pytest.raises(WakeFailedError, match="answers differently"):
        await use(rig)
    rig.runtime.failures.clear()
    await rig.pass_time(1)
    await use(rig)


async def test_an_unexpected_error_leaves_no_instance_between_two_tiers(rig: Rig) -> None:
    rig.runtime.failures["start"] = [OSError(5, "disk")]
    with pytest.raises(WakeFailedError, match="disk"):
        await use(rig)
    rig.runtime.failures.clear()
    await rig.pass_time(1)
    await use(rig)
    rig.runtime.failures["sleep"] = [ValueError("bug")]
    await rig.pass_time(10)
    assert rig.states() == {}
    rig.runtime.failures.clear()
    await use(rig)


@pytest.mark.parametrize("tier", [Tier.READY, Tier.SLEEPING, Tier.SUSPENDED])
async def test_an_engine_that_ends_by_itself_is_cleared_away(rig: Rig, tier: Tier) -> None:
    await down_to(rig, tier)
    rig.runtime.kill("demo-1")
    await rig.until(demo_1="gone")
    assert (await use(rig)).found is Tier.STOPPED


async def test_an_engine_with_an_image_that_ends_is_restored(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    await use(rig)
    rig.runtime.kill("demo-1")
    await rig.until(demo_1="checkpointed")
    assert (await use(rig)).found is Tier.CHECKPOINTED
    assert rig.runtime.calls["start"] == 1


async def test_a_lease_of_a_dead_engine_does_not_count_for_the_next_one(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    old = await rig.pool.lease("demo")
    rig.runtime.kill("demo-1")
    await rig.until(demo_1="checkpointed")
    new = await rig.pool.lease("demo")
    assert new.generation > old.generation
    old.release()
    assert rig.pool.status()["models"]["demo"]["instances"][0]["leases"] == 1
    new.release()
    new.release()
    assert rig.pool.status()["leases"] == 0


async def test_a_suspected_engine_that_does_not_answer_is_replaced(rig: Rig) -> None:
    async with await rig.pool.lease("demo") as lease:
        await lease.suspect()
        assert rig.states() == {"demo-1": "ready"}, "it answers"
        rig.runtime.processes["demo-1"].healthy = False
        await lease.suspect()
    await rig.until(demo_1="gone")
    await use(rig)
    assert rig.runtime.calls["start"] == 2


async def test_a_step_down_that_failed_without_harm_leaves_the_instance_there(rig: Rig) -> None:
    await down_to(rig, Tier.SUSPENDED)
    full = RuntimeFailure("checkpoint", "tmpfs is full", alive=True)
    rig.runtime.failures["checkpoint"] = [full, full]
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "suspended"}
    await rig.pass_time(59)
    assert rig.runtime.calls["checkpoint"] == 1, "not tried again at once"
    await rig.pass_time(1)
    assert rig.runtime.calls["checkpoint"] == 2
    await rig.pass_time(299)
    assert (rig.runtime.calls["checkpoint"], rig.states()) == (2, {"demo-1": "suspended"})
    await rig.pass_time(1)
    assert rig.states() == {"demo-1": "checkpointed"}


async def test_an_engine_that_ends_after_a_failed_step_down_is_noticed(rig: Rig) -> None:
    await down_to(rig, Tier.SUSPENDED)
    rig.runtime.failures["checkpoint"] = [RuntimeFailure("checkpoint", "tmpfs is full", alive=True)]
    await rig.pass_time(10)
    rig.runtime.kill("demo-1")
    await rig.until(demo_1="gone")


async def test_a_step_down_that_failed_with_harm_starts_anew(rig: Rig) -> None:
    await down_to(rig, Tier.SUSPENDED)
    rig.runtime.failures["checkpoint"] = [RuntimeFailure("checkpoint", "broken", alive=False)]
    await rig.pass_time(10)
    assert rig.states() == {}
    assert (await use(rig)).found is Tier.STOPPED


async def test_an_engine_that_refuses_to_sleep_stays_ready_if_it_is_awake(rig: Rig) -> None:
    await use(rig)
    rig.runtime.failures["sleep"] = [EngineError("sleep", "500")]
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "ready"}
    assert (await use(rig)).found is Tier.READY


async def test_a_removal_that_fails_is_tried_again_and_not_forgotten(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.pool.stepping_down._REMOVE_RETRY_S", (0.0,))
    await use(rig)
    rig.runtime.failures["remove"] = [RuntimeFailure("remove", "stuck")] * 3
    rig.runtime.kill("demo-1")
    await settle()
    assert rig.runtime.calls["remove"] >= 2
    rig.runtime.failures.clear()
    await rig.until(demo_1="gone")


# --- room for others ---


async def test_models_take_turns_when_one_may_be_awake(rig_of: Any) -> None:
    rig: Rig = await rig_of({"a": {}, "b": {}}, max_awake=1)
    await use(rig, "a")
    rig.runtime.gates["suspend"] = asyncio.Event()
    lease = await use(rig, "b")
    assert lease.wake is not None
    assert "evict" in lease.wake.stages
    assert rig.runtime.calls["sleep"] == 1
    rig.runtime.gates.pop("suspend").set()
    await settle()
    assert rig.states() == {"a-1": "suspended", "b-1": "ready"}, "its GPU memory went behind the other's wake"
    lease = await use(rig, "a")
    assert lease.found is Tier.SUSPENDED
    await settle()
    assert rig.states() == {"a-1": "ready", "b-1": "suspended"}
    text = (await rig.metrics.scrape()).decode()
    assert 'warmpool_step_downs_total{model="a",reason="evict",tier="suspended"} 1.0' in text


async def test_a_busy_model_gives_way_after_switch_after(rig_of: Any) -> None:
    rig: Rig = await rig_of({"a": {}, "b": {}}, max_awake=1)
    held = await rig.pool.lease("a")
    other = asyncio.create_task(use(rig, "b"))
    await settle()
    await rig.pass_time(9)
    assert rig.states() == {"a-1": "ready"}
    await rig.pass_time(1)
    assert rig.states() == {"a-1": "retiring"}
    late = asyncio.create_task(use(rig, "a"))
    await settle()
    assert not late.done(), "retiring"
    held.release()
    await other
    await late
    await settle()
    assert rig.states() == {"a-1": "ready", "b-1": "suspended"}


async def test_a_retiring_instance_is_readmitted_when_the_other_gives_up(rig_of: Any) -> None:
    rig: Rig = await rig_of({"a": {}, "b": {}}, max_awake=1)
    held = await rig.pool.lease("a")
    other = asyncio.create_task(use(rig, "b"))
    await settle()
    await rig.pass_time(10)
    assert rig.states() == {"a-1": "retiring"}
    other.cancel()
    with suppress(asyncio.CancelledError):
        await other
    await rig.pass_time(0)
    assert rig.states() == {"a-1": "ready"}
    held.release()


# --- one golden checkpoint for several instances ---

SHARED = {"demo": {"idle": {**SECONDS, "archived": "40s", "stopped": "50s"}, "max_instances": 3}}


async def test_with_the_first_checkpoint_clones_are_prepared_and_cost_nothing(rig_of: Any) -> None:
    rig: Rig = await rig_of(SHARED, shares_images=True)
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    assert rig.states() == dict.fromkeys(("demo-1", "demo-2", "demo-3"), "checkpointed")
    assert rig.runtime.processes == {}
    assert (rig.runtime.calls["start"], rig.runtime.calls["clone"]) == (1, 2)


async def golden(rig_of: Any) -> Rig:
    """Three instances, checkpointed, of one image."""
    rig: Rig = await rig_of(SHARED, shares_images=True)
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    await rig.until(demo_1="checkpointed", demo_2="checkpointed", demo_3="checkpointed")
    return rig


async def test_several_requests_restore_several_instances_of_one_image(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {**SHARED["demo"], "max_concurrency": 1}}, shares_images=True)
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    await settle()
    leases = await asyncio.gather(*(rig.pool.lease("demo") for _ in range(3)))
    assert {lease.instance_id for lease in leases} == {"demo-1", "demo-2", "demo-3"}
    assert {lease.found for lease in leases} == {Tier.CHECKPOINTED}
    assert (rig.runtime.calls["start"], rig.runtime.calls["restore"]) == (1, 3)
    assert {p.boot for p in rig.runtime.processes.values()} == {1}
    for lease in leases:
        lease.release()


async def test_stepping_down_again_writes_no_second_image(rig_of: Any) -> None:
    rig = await golden(rig_of)
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    await rig.until(demo_1="checkpointed")
    assert (rig.runtime.calls["checkpoint"], rig.runtime.processes) == (1, {})


async def test_an_image_that_fails_twice_is_set_aside_with_all_that_came_from_it(rig_of: Any) -> None:
    rig = await golden(rig_of)
    for attempt in (1, 2):
        rig.runtime.failures["restore"] = [RuntimeFailure("restore", "no", fault=Fault.IMAGE)]
        lease = await use(rig)
        assert lease.wake is not None
        assert lease.wake.reached_from is Tier.STOPPED
        if attempt == 1:
            for _ in range(3):
                await rig.pass_time(10)
    await settle()
    assert rig.states() == {"demo-1": "ready"}
    assert (rig.runtime.images.there, list(rig.runtime.images.quarantined)) == ({}, ["demo"])
    text = (await rig.metrics.scrape()).decode()
    assert 'warmpool_quarantined_checkpoints_total{model="demo"} 1.0' in text
    assert 'warmpool_wake_failures_total{model="demo",tier="checkpointed"} 2.0' in text


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOENT, "No such file or directory"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
        PortTakenError("restore", 8000, "another program"),
        RuntimeFailure("restore", "podman's service cannot be reached"),
        EngineError("health", "GET /health: ConnectionRefusedError"),
        TimeoutError(),
        KeyError("pid"),
    ],
    ids=["ENOENT", "ENOSPC", "EMFILE", "port", "podman", "connection", "time", "bug"],
)
async def test_no_fault_of_the_host_is_held_against_an_image(rig_of: Any, failure: Exception) -> None:
    rig = await golden(rig_of)
    for _ in range(5):
        rig.runtime.failures["restore"] = [failure]
        lease = await use(rig)
        assert lease.wake is not None
        assert lease.wake.reached_from is Tier.STOPPED
        for _ in range(3):
            await rig.pass_time(10)
        await settle()
    assert (list(rig.runtime.images.there), list(rig.runtime.images.quarantined)) == (["demo"], [])
    assert rig.runtime.calls["checkpoint"] == 1
    assert rig.runtime.calls["verify_image"] == 5, "whether it is damaged is looked up"
    assert (await use(rig)).found is Tier.CHECKPOINTED


async def damage_leads_to_a_new_image(rig: Rig) -> None:
    await settle()
    assert (list(rig.runtime.images.there), list(rig.runtime.images.quarantined)) == ([], ["demo"])
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    await settle()
    assert (list(rig.runtime.images.there), rig.runtime.calls["checkpoint"]) == (["demo"], 2)
    assert (await use(rig)).found is Tier.CHECKPOINTED


def damaged(operation: str) -> RuntimeFailure:
    return RuntimeFailure(operation, "pages-1.img: 5 bytes", alive=True, fault=Fault.DAMAGE)


async def test_a_damaged_image_that_is_restored_from_is_set_aside_at_once(rig_of: Any) -> None:
    rig = await golden(rig_of)
    rig.runtime.failures["restore"] = [damaged("restore")]
    await use(rig)
    await damage_leads_to_a_new_image(rig)


async def test_damage_that_is_found_after_a_failed_restore_sets_the_image_aside(rig_of: Any) -> None:
    rig = await golden(rig_of)
    rig.runtime.failures |= {"restore": [OSError(errno.ENOENT, "no")], "verify_image": [damaged("verify")]}
    await use(rig)
    await damage_leads_to_a_new_image(rig)


async def test_an_engine_whose_image_is_damaged_writes_a_new_one_when_it_steps_down(rig_of: Any) -> None:
    rig = await golden(rig_of)
    await use(rig)
    rig.runtime.failures["look_at_image"] = [damaged("verify")]
    for _ in range(3):
        await rig.pass_time(10)
    await settle()
    assert rig.runtime.calls["checkpoint"] == 2
    rig.runtime.failures["start"] = [RuntimeFailure("start", "not to be needed")]
    assert (await use(rig)).found is Tier.CHECKPOINTED


async def test_damage_that_a_clone_finds_sets_the_image_aside(rig_of: Any) -> None:
    rig: Rig = await rig_of(SHARED, shares_images=True)
    rig.runtime.failures["clone"] = [damaged("clone")]
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    await damage_leads_to_a_new_image(rig)


async def test_damage_that_is_found_on_the_way_to_the_archive_sets_the_image_aside(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": {**SECONDS, "archived": "40s"}}}, shares_images=True)
    await down_to(rig, Tier.CHECKPOINTED)
    rig.runtime.failures["archive_image"] = [damaged("archive")]
    await rig.pass_time(10)
    await damage_leads_to_a_new_image(rig)


async def test_a_damaged_image_of_which_there_is_a_copy_is_restored_from_that(rig_of: Any) -> None:
    rig = await golden(rig_of)
    rig.runtime.images.archive_copies.add("demo")
    rig.runtime.failures["restore"] = [damaged("restore")]
    lease = await use(rig)
    assert lease.wake is not None
    assert lease.wake.reached_from is Tier.ARCHIVED
    assert (rig.runtime.calls["start"], rig.runtime.calls["unarchive_image"]) == (1, 1)
    assert (list(rig.runtime.images.there), list(rig.runtime.images.quarantined)) == (["demo"], ["demo"])
    for _ in range(3):
        await rig.pass_time(10)
    assert (await use(rig)).found is Tier.CHECKPOINTED
    assert rig.runtime.calls["checkpoint"] == 1


@pytest.mark.parametrize("copy", ["good", "damaged"])
async def test_a_copy_takes_the_place_of_an_image_that_turns_out_to_be_damaged_later(rig_of: Any, copy: str) -> None:
    rig = await golden(rig_of)
    rig.runtime.images.archive_copies.add("demo")
    rig.runtime.failures |= {"restore": [OSError(errno.ENOENT, "no")], "verify_image": [damaged("verify")]}
    rig.runtime.failures["unarchive_image"] = [damaged("unarchive")] if copy == "damaged" else []
    lease = await use(rig)
    assert lease.wake is not None
    assert lease.wake.reached_from is Tier.STOPPED
    await settle()
    for _ in range(3):
        await rig.pass_time(10)
    await settle()
    assert rig.runtime.calls["unarchive_image"] == 1
    assert rig.runtime.calls["checkpoint"] == (1 if copy == "good" else 2)
    assert (await use(rig)).found is Tier.CHECKPOINTED


async def test_an_image_that_does_not_come_up_has_no_copy_that_would(rig_of: Any) -> None:
    rig = await golden(rig_of)
    rig.runtime.images.archive_copies.add("demo")
    for _ in range(2):
        rig.runtime.failures["restore"] = [RuntimeFailure("restore", "no", fault=Fault.IMAGE)]
        await use(rig)
        for _ in range(3):
            await rig.pass_time(10)
    await settle()
    assert (rig.runtime.calls["unarchive_image"], rig.runtime.images.archive_copies) == (0, set())


async def test_a_missed_canary_counts_as_a_failed_restore(rig_of: Any) -> None:
    rig = await golden(rig_of)
    rig.engines["demo-1"].answer = "other"
    lease = await use(rig)
    assert lease.wake is not None
    assert lease.wake.reached_from is Tier.STOPPED
    assert rig.runtime.images.there


@pytest.mark.parametrize(("canary", "asked"), [("first", 2), ("always", 4), ("never", 0)])
async def test_the_canary_is_asked_as_often_as_told(rig_of: Any, canary: str, asked: int) -> None:
    rig: Rig = await rig_of({"demo": {"idle": SECONDS, "canary": canary}}, shares_images=True)
    await use(rig)
    for _ in range(3):
        for _ in range(3):
            await rig.pass_time(10)
        await use(rig)
    assert rig.runtime.calls["restore"] == 3
    assert rig.runtime.calls["canary"] == asked


async def test_the_image_is_archived_once_nobody_needs_it_and_comes_back_for_a_request(rig_of: Any) -> None:
    rig = await golden(rig_of)
    held = await rig.pool.lease("demo")
    await rig.pass_time(15)
    assert rig.states()["demo-2"] == "checkpointed", "another instance uses the image"
    held.release()
    for _ in range(4):
        await rig.pass_time(10)
    await settle()
    assert rig.states() == dict.fromkeys(("demo-1", "demo-2", "demo-3"), "archived")
    assert rig.runtime.images.there["demo"].archived
    assert rig.runtime.calls["archive_image"] == 1
    lease = await use(rig)
    assert lease.found is Tier.ARCHIVED
    assert lease.wake is not None
    assert "unarchive" in lease.wake.stages
    assert lease.wake.reached_from is Tier.ARCHIVED
    assert not rig.runtime.images.there["demo"].archived


@pytest.mark.parametrize(
    "failure", [RuntimeFailure("archive", "no space", alive=True), TimeoutError(), OSError(5, "Input/output error")]
)
async def test_a_step_to_the_archive_that_fails_is_no_end_of_an_engine(rig_of: Any, failure: Exception) -> None:
    rig: Rig = await rig_of({"demo": {"idle": {**SECONDS, "archived": "40s"}}})
    await down_to(rig, Tier.CHECKPOINTED)
    rig.runtime.failures["archive_image"] = [failure]
    await rig.pass_time(10)
    assert rig.runtime.calls["archive_image"] == 1
    assert rig.states() == {"demo-1": "checkpointed"}
    assert rig.metrics.registry.get_sample_value("warmpool_engine_exits_total", {"model": "demo"}) == 0
    assert rig.runtime.calls["kill"] == 0, "nothing ran"
    assert (await use(rig)).found is Tier.CHECKPOINTED


async def test_a_request_that_finds_an_instance_just_broken_is_told_where_it_is_restored_from(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    await use(rig)
    rig.runtime.gates["kill"] = asyncio.Event()
    rig.runtime.kill("demo-1")
    await settle()
    assert rig.states() == {"demo-1": "broken"}
    assert rig.pool.tier("demo") is Tier.CHECKPOINTED
    asked = asyncio.create_task(use(rig))
    await settle()
    rig.runtime.gates.pop("kill").set()
    lease = await asked
    assert lease.wake is not None
    assert (lease.found, lease.wake.reached_from) == (Tier.CHECKPOINTED, Tier.CHECKPOINTED)


async def test_the_last_tier_frees_the_image_and_prepares_no_clones(rig_of: Any) -> None:
    rig = await golden(rig_of)
    for _ in range(5):
        await rig.pass_time(10)
    await settle()
    assert (rig.states(), rig.runtime.images.there, rig.runtime.engines) == ({}, {}, {})
    assert (await use(rig)).found is Tier.STOPPED


async def test_a_clone_that_cannot_be_made_is_tried_again_later(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {**SHARED["demo"], "max_instances": 2}}, shares_images=True)
    rig.runtime.failures["clone"] = [RuntimeFailure("clone", "no")]
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    await settle()
    assert rig.states() == {"demo-1": "checkpointed"}
    await rig.pass_time(1)
    await settle()
    assert rig.states() == {"demo-1": "checkpointed", "demo-2": "checkpointed"}


async def test_without_keep_the_image_goes_with_the_restore_and_is_written_anew(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": SECONDS, "keep": False}}, shares_images=True)
    for _ in range(2):
        await use(rig)
        assert rig.runtime.images.there == {}
        for _ in range(3):
            await rig.pass_time(10)
        assert list(rig.runtime.images.there) == ["demo"]
    assert rig.runtime.calls["checkpoint"] == 2


async def test_engines_that_a_predecessor_left_running_serve_on(rig_of: Any) -> None:
    old: Rig = await rig_of({"demo": {"idle": SECONDS}}, shares_images=True)
    old.runtime.leaves = True
    await use(old)
    await old.pool.close()
    assert old.runtime.processes, "left running"
    rig = Rig({"demo": {"idle": SECONDS}}, shares_images=True)
    rig.runtime.inherit(old.runtime, keep=True)
    old.runtime.processes = {}
    await rig.pool.open()
    assert rig.states() == {"demo-1": "ready"}
    assert (await use(rig)).found is Tier.READY
    assert rig.runtime.calls["start"] == 0
    await rig.pool.close()


async def test_one_that_was_left_asleep_is_woken_and_one_that_does_not_serve_is_ended(rig_of: Any) -> None:
    old: Rig = await rig_of({"a": {"idle": SECONDS}, "b": {"idle": SECONDS}}, shares_images=True)
    old.runtime.leaves = True
    await asyncio.gather(use(old, "a"), use(old, "b"))
    await old.pass_time(10)
    await old.pool.close()
    rig = Rig({"a": {"idle": SECONDS}, "b": {"idle": SECONDS}}, shares_images=True)
    rig.runtime.inherit(old.runtime, keep=True)
    old.runtime.processes = {}
    rig.runtime.processes["b-1"].sleep_level = 0
    rig.runtime.processes["b-1"].healthy = False
    await rig.pool.open()
    await rig.until(b_1="gone")
    assert rig.states() == {"a-1": "sleeping"}
    assert (await use(rig, "a")).found is Tier.SLEEPING
    await rig.pool.close()


# --- adoption, drain, close ---


async def test_checkpoints_of_a_predecessor_are_adopted(rig_of: Any) -> None:
    old: Rig = await rig_of()
    await down_to(old, Tier.CHECKPOINTED)
    await old.pool.close()
    assert old.runtime.images.there, "closing keeps images"
    rig = Rig({"demo": {"idle": SECONDS}})
    rig.runtime.inherit(old.runtime, keep=True)
    rig.runtime.engine("demo-2", "demo").port = 2
    rig.runtime.images.there["demo-2"] = rig.runtime.images.there["demo-1"]
    await rig.pool.open()
    assert rig.states() == {"demo-1": "checkpointed"}
    assert rig.runtime.calls["remove"] == 1, "one more than max_instances"
    lease = await use(rig)
    assert (lease.found, rig.runtime.calls["start"]) == (Tier.CHECKPOINTED, 0)
    await rig.pool.close()


async def test_draining_admits_nothing_and_waits_for_what_runs_or_waits(rig: Rig) -> None:
    held = await rig.pool.lease("demo")
    rig.pool.drain()
    assert not rig.pool.ready
    with pytest.raises(DrainingError):
        await rig.pool.lease("demo")
    drained = asyncio.create_task(rig.pool.until_unused())
    await settle()
    assert not drained.done()
    held.release()
    await drained


async def test_closing_fails_those_who_wait_and_leaves_no_process(rig: Rig) -> None:
    rig.runtime.gates["health"] = asyncio.Event()
    requests = [asyncio.create_task(use(rig)) for _ in range(3)]
    await settle()
    assert rig.runtime.processes
    await rig.pool.close()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert {type(r) for r in results} == {DrainingError}
    assert rig.runtime.processes == {}


@pytest.mark.parametrize("operation", ["start", "health", "warmup", "canary", "sleep", "suspend", "checkpoint"])
async def test_closing_in_any_step_leaves_nothing(rig: Rig, operation: str) -> None:
    rig.runtime.gates[operation] = asyncio.Event()
    request = asyncio.create_task(use(rig))
    await settle()
    for _ in range(3):
        await rig.pass_time(10)
    await rig.pool.close()
    await asyncio.gather(request, return_exceptions=True)
    assert rig.runtime.calls[operation]
    assert rig.runtime.processes == {}
    assert rig.states() == {}


@pytest.mark.parametrize("operation", ["resume", "restore", "wake_up", "kill"])
async def test_closing_during_a_wake_leaves_nothing(rig: Rig, operation: str) -> None:
    await down_to(rig, Tier.SUSPENDED if operation == "resume" else Tier.CHECKPOINTED)
    if operation == "kill":
        rig.runtime.failures["restore"] = [RuntimeFailure("restore", "no")]
    gate = rig.runtime.gates[operation] = asyncio.Event()
    request = asyncio.create_task(use(rig))
    await settle()
    assert rig.runtime.calls[operation]
    closing = asyncio.create_task(rig.pool.close())
    await settle()
    gate.set()
    await closing
    await asyncio.gather(request, return_exceptions=True)
    assert rig.runtime.processes == {}


async def test_metrics_say_what_happened(rig: Rig) -> None:
    await down_to(rig, Tier.CHECKPOINTED)
    rig.runtime.failures["restore"] = [RuntimeFailure("restore", "no")]
    await use(rig)
    text = (await rig.metrics.scrape()).decode()
    for line in (
        'warmpool_instances{model="demo",state="ready"} 1.0',
        'warmpool_wake_failures_total{model="demo",tier="checkpointed"} 1.0',
        'warmpool_step_downs_total{model="demo",reason="idle",tier="checkpointed"} 1.0',
        'warmpool_wake_seconds_count{model="demo",stage="total",tier="checkpointed"} 1.0',
        'warmpool_running_requests{model="demo"} 0.0',
        'warmpool_queue_depth{model="demo"} 0.0',
    ):
        assert line in text
