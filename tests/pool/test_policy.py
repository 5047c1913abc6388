"""The policy's rules, one by one, without a clock or a process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.pool.costs import TYPICAL_S, Costs
from proxy.pool.gpu_accounting import EMPTY, HOST, GpuLoad
from proxy.pool.instance import AWAKE, RESTING, WITH_ENGINE, Instance, State, best_tier, pick
from proxy.pool.model_view import STEPS, InstanceView, ModelView
from proxy.pool.plan import Plan, Readmit, Refuse, Retire, StepDown, Wake
from proxy.pool.policy import decide
from proxy.pool.view import View
from proxy.tiers import Tier
from tests.support import examples

TIERS = frozenset({Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED})
TIMETABLE = {Tier.SLEEPING: 30.0, Tier.SUSPENDED: 120.0, Tier.CHECKPOINTED: 600.0}


def instance(
    state: State, *, key: str = "a", number: int = 1, leases: int = 0, idle_since: float | None = None
) -> InstanceView:
    idle_since = None if leases else (0.0 if idle_since is None else idle_since)
    return InstanceView(f"{key}-{number}", key, state, leases, idle_since, postponed={})


def live(state: State, *, number: int = 1, leases: int = 0) -> Instance:
    one = Instance(f"a-{number}", "a")
    one.state, one.leases = state, leases
    return one


def model(*instances: InstanceView, key: str = "a", **more: Any) -> ModelView:
    defaults: dict[str, Any] = {
        "tiers": TIERS,
        "timetable": TIMETABLE,
        "max_instances": max(1, len(instances)),
        "min_ready": 0,
        "max_concurrency": 4,
    }
    return ModelView(key=key, instances=instances, **{**defaults, **more})


def plan(*models: ModelView, now: float = 0.0, **view: Any) -> Plan:
    return decide(View(models, **view), now)


# --- choosing ---


def test_the_least_busy_ready_instance_is_picked() -> None:
    busy, free = live(State.READY, leases=3), live(State.READY, number=2, leases=1)
    assert pick([busy, free, live(State.SLEEPING, number=3)], 4) is free
    assert pick([busy, free], 1) is None
    assert pick([], 4) is None


def test_one_that_holds_its_engine_is_preferred_to_any_that_is_ready() -> None:
    ready = live(State.READY)
    for state in (State.SLEEPING, State.SUSPENDED, State.FALLING_ASLEEP, State.SUSPENDING, State.RETIRING):
        assert pick([ready, live(state, number=2)], 4, "a-2") is None, "it is waited for"
    for state in (State.CHECKPOINTED, State.CHECKPOINTING, State.ARCHIVED, State.BROKEN):
        assert pick([ready, live(state, number=2)], 4, "a-2") is ready
    busy = live(State.READY, number=2, leases=3)
    assert pick([ready, busy], 4, "a-2") is busy
    assert pick([ready, busy], 3, "a-2") is None
    waking = live(State.WAKING, number=2)
    for origin, picked in ((Tier.SUSPENDED, None), (Tier.CHECKPOINTED, ready), (Tier.STOPPED, ready)):
        waking.waking_from = origin
        assert pick([ready, waking], 4, "a-2") is picked


def test_the_warmest_instance_is_what_a_request_finds() -> None:
    assert best_tier([live(State.CHECKPOINTED), live(State.SUSPENDED)]) is Tier.SUSPENDED
    assert best_tier([]) is Tier.STOPPED
    assert best_tier([live(State.RETIRING, leases=1)]) is Tier.SLEEPING, "it takes no new ones"
    assert best_tier([live(State.RETIRING, leases=1), live(State.READY)]) is Tier.READY


# --- waking ---


def test_nobody_waits_nothing_wakes() -> None:
    assert plan(model(), model(instance(State.CHECKPOINTED, key="b"), key="b", timetable={})) == Plan()


def test_one_who_waits_wakes_a_new_instance() -> None:
    assert plan(model(waiting=1, oldest_wait=0.0)).actions == [Wake("a", None)]


@pytest.mark.parametrize("waiting", [1, 4, 200])
def test_all_who_wait_share_one_wake_when_there_may_be_one_instance(waiting: int) -> None:
    assert plan(model(waiting=waiting, oldest_wait=0.0)).actions == [Wake("a", None)]
    assert plan(model(instance(State.WAKING), waiting=waiting, oldest_wait=0.0)).actions == []


def test_as_many_wake_as_the_queue_needs() -> None:
    wanted = plan(model(waiting=9, oldest_wait=0.0, max_instances=8)).actions
    assert wanted == [Wake("a", None)] * 3
    coming = model(instance(State.WAKING), instance(State.CHECKPOINTING, number=2), waiting=9, max_instances=8)
    assert len(plan(coming).actions) == 1


def test_the_cheapest_instance_wakes_first() -> None:
    colder = instance(State.CHECKPOINTED)
    warmer = instance(State.SLEEPING, number=2)
    assert plan(model(colder, warmer, waiting=1, oldest_wait=0.0)).actions[0] == Wake("a", warmer)
    both = plan(model(colder, warmer, waiting=9, oldest_wait=0.0, max_instances=3)).actions
    assert both == [Wake("a", warmer), Wake("a", colder), Wake("a", None)]


def test_the_instance_that_is_waited_for_wakes_though_another_is_ready_and_another_warmer() -> None:
    ready, asleep, wanted = (
        instance(State.READY),
        instance(State.SLEEPING, number=2),
        instance(State.SUSPENDED, number=3),
    )
    waited_for = model(ready, asleep, wanted, waiting=1, oldest_wait=0.0, wanted={"a-3": 1})
    assert plan(waited_for).actions == [Wake("a", wanted)]
    more = model(ready, asleep, wanted, waiting=6, oldest_wait=0.0, wanted={"a-3": 1})
    assert plan(more).actions == [Wake("a", wanted), Wake("a", asleep)]
    others = model(instance(State.READY, leases=4), instance(State.READY, number=2), waiting=1, wanted={"a-1": 1})
    assert plan(others).actions == [], "it answers others, and is waited for"


def test_the_instance_that_is_waited_for_gets_the_place_of_another_of_its_model() -> None:
    ready, wanted = instance(State.READY), instance(State.SUSPENDED, number=2)
    queue: dict[str, Any] = {"waiting": 1, "oldest_wait": 0.0, "min_ready": 1}
    swap = [Wake("a", wanted, (StepDown(ready, Tier.SLEEPING, "evict"),))]
    load = gpus(ready, needs={"a": 60}, asleep={"a": 2})
    for limit in ({"max_awake": 1}, {"gpus": load}):
        assert plan(model(ready, wanted, **queue, wanted={"a-2": 1}), **limit).actions == swap
        assert plan(model(ready, wanted, **queue), **limit).actions == [], "any other answers as well"
    busy = instance(State.READY, leases=1)
    waited_for = model(busy, wanted, **queue, wanted={"a-2": 1})
    assert plan(waited_for, max_awake=1) == Plan([], 10.0)
    assert plan(waited_for, max_awake=1, now=10.0).actions == [Retire(busy)]


def test_min_ready_wakes_without_a_request_and_keeps_awake() -> None:
    assert plan(model(min_ready=2, max_instances=2)).actions == [Wake("a", None)] * 2
    idle = instance(State.READY), instance(State.READY, number=2)
    assert plan(model(*idle, min_ready=1), now=1e6).actions == [StepDown(idle[0], Tier.SLEEPING, "idle")]


def test_min_ready_rests_after_a_failed_start_but_a_request_does_not() -> None:
    resting = plan(model(min_ready=1, restock_at=50.0), now=10.0)
    assert (resting.actions, resting.deadline) == ([], 50.0)
    assert plan(model(min_ready=1, restock_at=50.0), now=50.0).actions == [Wake("a", None)]
    assert plan(model(min_ready=1, restock_at=50.0, waiting=1, oldest_wait=9.0), now=10.0).actions == [Wake("a", None)]


# --- the idle timetable ---


@pytest.mark.parametrize(
    ("state", "idle_s", "to"),
    [
        (State.READY, 29.9, None),
        (State.READY, 30.0, Tier.SLEEPING),
        (State.READY, 1e6, Tier.SLEEPING),  # one tier at a time, however late
        (State.SLEEPING, 119.0, None),
        (State.SLEEPING, 120.0, Tier.SUSPENDED),
        (State.SUSPENDED, 600.0, Tier.CHECKPOINTED),
        (State.CHECKPOINTED, 1e9, None),
    ],
)
def test_an_idle_instance_steps_down_on_time(state: State, idle_s: float, to: Tier | None) -> None:
    one = instance(state)
    assert plan(model(one), now=idle_s).actions == ([] if to is None else [StepDown(one, to, "idle")])


def test_the_next_deadline_is_the_soonest_of_all() -> None:
    soon = model(instance(State.SLEEPING, key="b", idle_since=-100.0), key="b")
    assert plan(model(instance(State.READY)), soon).deadline == 20.0
    assert plan(model(instance(State.CHECKPOINTED))).deadline is None


def test_tiers_that_are_missing_never_or_barred_are_left_out() -> None:
    one = instance(State.READY)
    assert plan(model(one, tiers=frozenset({Tier.SUSPENDED})), now=120.0).actions[0] == StepDown(
        one, Tier.SUSPENDED, "idle"
    )
    assert plan(model(one, timetable={}), now=1e9) == Plan()
    one.barred.update({Tier.SLEEPING, Tier.SUSPENDED})
    assert plan(model(one), now=600.0).actions[0] == StepDown(one, Tier.CHECKPOINTED, "idle")


def test_stopped_is_always_possible_where_it_is_asked_for() -> None:
    one = instance(State.CHECKPOINTED)
    assert plan(model(one, timetable={Tier.STOPPED: 5.0}, tiers=frozenset()), now=5.0).actions == [
        StepDown(one, Tier.STOPPED, "idle")
    ]


def test_a_leased_instance_never_steps_down() -> None:
    assert plan(model(instance(State.READY, leases=1)), now=1e9) == Plan()


def test_nothing_steps_down_while_requests_for_the_model_wait() -> None:
    one = instance(State.READY)
    assert not [a for a in plan(model(one, waiting=1, oldest_wait=0.0), now=1e9).actions if isinstance(a, StepDown)]


# --- making room ---


def test_an_idle_instance_of_another_model_makes_room() -> None:
    longest = instance(State.READY, key="b", idle_since=1.0)
    idle = instance(State.READY, key="c", idle_since=2.0)
    needy = model(waiting=1, oldest_wait=3.0)
    actions = plan(needy, model(idle, key="c"), model(longest, key="b"), now=3.0, max_awake=2).actions
    assert actions == [Wake("a", None, (StepDown(longest, Tier.SLEEPING, "evict"),))]


@pytest.mark.parametrize(
    ("waking_from", "at_once"),
    [(Tier.SLEEPING, False), (Tier.SUSPENDED, False), (Tier.CHECKPOINTED, False), (Tier.STOPPED, True)],
)
def test_one_that_made_room_goes_off_the_gpu_behind_a_quick_wake_and_beside_a_cold_start(
    waking_from: Tier, at_once: bool
) -> None:
    made_room, coming = instance(State.SLEEPING), instance(State.WAKING, key="b")
    made_room.evicted, coming.waking_from = True, waking_from
    both = model(made_room), model(coming, key="b")
    off = [StepDown(made_room, Tier.SUSPENDED, "evict")]
    assert plan(*both, now=1.0).actions == (off if at_once else [])
    assert plan(*both, now=120.0).actions == off, "its own timetable counts all the same"
    coming.state, coming.waking_from = State.READY, None
    assert plan(*both, now=1.0).actions == off


def test_with_room_left_nobody_is_evicted() -> None:
    idle = model(instance(State.READY, key="b"), key="b")
    assert plan(model(waiting=1, oldest_wait=0.0), idle, max_awake=2).actions == [Wake("a", None)]


def test_one_victim_makes_room_for_one() -> None:
    idle = instance(State.READY, key="c")
    first = model(waiting=1, oldest_wait=1.0)
    second = model(key="b", waiting=1, oldest_wait=0.0)
    actions = plan(first, second, model(idle, key="c"), max_awake=1).actions
    assert actions == [Wake("b", None, (StepDown(idle, Tier.SLEEPING, "evict"),))]


def test_a_model_does_not_evict_itself_nor_below_min_ready() -> None:
    own = instance(State.READY, leases=4)
    assert plan(model(own, waiting=1, oldest_wait=0.0, max_instances=2), max_awake=1).actions == []
    kept = model(instance(State.READY, key="b"), key="b", min_ready=1)
    assert plan(model(waiting=1, oldest_wait=0.0), kept, max_awake=1, now=100.0).actions == []


def test_a_busy_instance_is_retired_only_after_a_while() -> None:
    busy = instance(State.READY, key="b", leases=2)
    busier = instance(State.READY, key="c", leases=3)
    models = model(waiting=1, oldest_wait=5.0), model(busier, key="c"), model(busy, key="b")
    early = plan(*models, now=6.0, max_awake=2, switch_after_s=10.0)
    assert (early.actions, early.deadline) == ([], 15.0)
    assert plan(*models, now=15.0, max_awake=2, switch_after_s=10.0).actions == [Retire(busy)]
    busy.state = State.RETIRING
    assert plan(*models, now=16.0, max_awake=2, switch_after_s=10.0).actions == []


def test_a_retired_instance_steps_down_when_its_last_request_ends_and_is_readmitted_when_nobody_waits() -> None:
    retired = instance(State.RETIRING, key="b")
    waiting = model(waiting=1, oldest_wait=0.0)
    assert plan(waiting, model(retired, key="b"), max_awake=1).actions == [
        Wake("a", None, (StepDown(retired, Tier.SLEEPING, "evict"),))
    ]
    assert plan(model(), model(retired, key="b"), max_awake=1).actions == [Readmit(retired)]


# --- GPU memory ---

GPU = "GPU-1"


def gpus(
    *instances: InstanceView,
    needs: dict[str, int],
    asleep: dict[str, int] | None = None,
    capacity: int = 80,
    **more: Any,
) -> GpuLoad:
    """What these hold by their states, in GiB of one GPU."""
    sleeps = asleep or {}
    now: dict[str, dict[str, int]] = {}
    after: dict[str, dict[str, int]] = {}
    for one in instances:
        need, sleeping = needs.get(one.model, 0), sleeps.get(one.model, 0)
        awake = one.state in AWAKE or one.state is State.STOPPING
        now[one.id] = {GPU: need if awake else sleeping if one.state is State.SLEEPING else 0}
        leaves = one.state in (State.SUSPENDING, State.CHECKPOINTING, State.STOPPING)
        after[one.id] = {GPU: 0 if leaves else sleeping if one.state is State.FALLING_ASLEEP else now[one.id][GPU]}
    known = {key: {GPU: count} for key, count in needs.items() if count}
    return GpuLoad({GPU: capacity}, now, after, known, {key: {GPU: n} for key, n in sleeps.items()}, **more)


def needy(key: str = "a", *instances: InstanceView, since: float = 3.0, **more: Any) -> ModelView:
    return model(*instances, key=key, waiting=1, oldest_wait=since, **more)


def test_what_fits_evicts_nobody() -> None:
    idle = instance(State.READY, key="b")
    load = gpus(idle, needs={"a": 40, "b": 40})
    assert plan(needy(), model(idle, key="b"), gpus=load).actions == [Wake("a", None)]


def test_the_other_falls_asleep_where_that_is_enough_and_is_suspended_where_not() -> None:
    idle = instance(State.READY, key="b")
    models = needy(), model(idle, key="b")
    enough = gpus(idle, needs={"a": 60, "b": 60}, asleep={"b": 2})
    assert plan(*models, gpus=enough).actions == [Wake("a", None, (StepDown(idle, Tier.SLEEPING, "evict"),))]
    too_much = gpus(idle, needs={"a": 79, "b": 60}, asleep={"b": 2})
    assert plan(*models, gpus=too_much).actions == [Wake("a", None, (StepDown(idle, Tier.SUSPENDED, "evict"),))]
    unknown = gpus(idle, needs={"a": 60, "b": 60})
    assert plan(*models, gpus=unknown).actions == [Wake("a", None, (StepDown(idle, Tier.SUSPENDED, "evict"),))]


def test_where_suspended_engines_stay_on_the_gpu_a_colder_tier_is_taken() -> None:
    idle = instance(State.READY, key="b")
    load = gpus(idle, needs={"a": 79, "b": 60}, asleep={"b": 2}, suspending_frees=False)
    (wake,) = plan(needy(), model(idle, key="b"), gpus=load).actions
    assert wake == Wake("a", None, (StepDown(idle, Tier.CHECKPOINTED, "evict"),))


def test_tiers_that_are_barred_or_postponed_are_passed_over() -> None:
    idle = instance(State.READY, key="b")
    idle.barred.add(Tier.SUSPENDED)
    idle.postponed[Tier.CHECKPOINTED] = 50.0
    load = gpus(idle, needs={"a": 79, "b": 60}, asleep={"b": 2})
    (wake,) = plan(needy(), model(idle, key="b"), now=3.0, gpus=load).actions
    assert wake == Wake("a", None, (StepDown(idle, Tier.STOPPED, "evict"),))


def test_the_longest_idle_goes_first_and_as_many_as_are_needed() -> None:
    longest, later, last = (instance(State.READY, key=k, idle_since=t) for k, t in (("b", 0.0), ("c", 1.0), ("d", 2.0)))
    others = [model(i, key=i.model) for i in (last, longest, later)]
    needs = {"a": 50, "b": 20, "c": 30, "d": 30}
    (wake,) = plan(needy(), *others, gpus=gpus(longest, later, last, needs=needs)).actions
    assert isinstance(wake, Wake)
    assert [v.instance for v in wake.victims] == [longest, later]
    (wake,) = plan(needy(), *others, gpus=gpus(longest, later, last, needs={**needs, "a": 30, "c": 10})).actions
    assert isinstance(wake, Wake)
    assert [v.instance for v in wake.victims] == [longest]


def test_one_that_turns_out_not_to_be_needed_is_spared_and_the_latest_stays_warmest() -> None:
    small, large = instance(State.READY, key="b", idle_since=0.0), instance(State.READY, key="c", idle_since=1.0)
    others = model(small, key="b"), model(large, key="c")
    load = gpus(small, large, needs={"a": 70, "b": 5, "c": 70}, asleep={"b": 1, "c": 2})
    (wake,) = plan(needy(), *others, gpus=load).actions
    assert wake == Wake("a", None, (StepDown(large, Tier.SLEEPING, "evict"),))
    load = gpus(small, large, needs={"a": 78, "b": 5, "c": 70}, asleep={"b": 1, "c": 2})
    (wake,) = plan(needy(), *others, gpus=load).actions
    both = StepDown(small, Tier.SUSPENDED, "evict"), StepDown(large, Tier.SLEEPING, "evict")
    assert wake == Wake("a", None, both)


def test_sleeping_ones_make_room_those_of_the_same_model_too_but_not_the_one_that_wakes() -> None:
    first, second = instance(State.SLEEPING), instance(State.SLEEPING, number=2, idle_since=9.0)
    other = instance(State.SLEEPING, key="b", idle_since=1.0)
    load = gpus(first, second, other, needs={"a": 77, "b": 10}, asleep={"a": 2, "b": 2})
    (wake,) = plan(needy("a", first, second), model(other, key="b"), now=9.0, gpus=load).actions
    assert wake == Wake("a", first, (StepDown(other, Tier.SUSPENDED, "evict"),))
    load = gpus(first, second, other, needs={"a": 80, "b": 10}, asleep={"a": 2, "b": 2})
    (wake,) = plan(needy("a", first, second), model(other, key="b"), now=9.0, gpus=load).actions
    both = StepDown(other, Tier.SUSPENDED, "evict"), StepDown(second, Tier.SUSPENDED, "evict")
    assert wake == Wake("a", first, both)


def test_one_that_made_room_for_another_of_its_model_is_not_woken_with_it() -> None:
    first, second = instance(State.SLEEPING), instance(State.SLEEPING, number=2)
    load = gpus(first, second, needs={"a": 79}, asleep={"a": 2})
    crowd = model(first, second, waiting=8, oldest_wait=0.0)
    assert plan(crowd, gpus=load).actions == [Wake("a", first, (StepDown(second, Tier.SUSPENDED, "evict"),))]


def test_a_sleeping_one_needs_only_what_it_does_not_hold_yet() -> None:
    own, idle = instance(State.SLEEPING), instance(State.READY, key="b")
    load = gpus(own, idle, needs={"a": 40, "b": 40}, asleep={"a": 5})
    assert plan(needy("a", own), model(idle, key="b"), gpus=load).actions == [Wake("a", own)]


def test_one_that_is_wanted_itself_and_was_taken_is_woken_when_it_has_arrived() -> None:
    asleep = instance(State.SLEEPING, key="b")
    load = gpus(asleep, needs={"a": 79, "b": 60}, asleep={"b": 2})
    both = needy("a", since=1.0), needy("b", asleep, since=2.0, max_instances=2)
    assert plan(*both, gpus=load).actions == [Wake("a", None, (StepDown(asleep, Tier.SUSPENDED, "evict"),))]


def test_memory_that_is_on_its_way_is_waited_for_and_kept_for_who_waits() -> None:
    leaving = instance(State.SUSPENDING, key="b")
    idle = instance(State.READY, key="c")
    load = gpus(leaving, idle, needs={"a": 50, "b": 50, "c": 20, "d": 20})
    others = model(leaving, key="b"), model(idle, key="c")
    assert plan(needy(since=1.0), *others, gpus=load).actions == []
    actions = plan(needy(since=1.0), *others, needy("d", since=2.0), gpus=load).actions
    assert actions == [Wake("d", None, (StepDown(idle, Tier.SUSPENDED, "evict"),))], "not of what comes free for a"


def test_a_busy_one_is_asked_for_its_place_only_after_a_while_and_never_cut() -> None:
    busy = instance(State.READY, key="b", leases=2)
    load = gpus(busy, needs={"a": 60, "b": 60}, asleep={"b": 2})
    models = needy(since=5.0), model(busy, key="b")
    early = plan(*models, now=6.0, gpus=load)
    assert (early.actions, early.deadline) == ([], 15.0)
    assert plan(*models, now=15.0, gpus=load).actions == [Retire(busy)]
    busy.state = State.RETIRING
    assert plan(*models, now=16.0, gpus=load).actions == []
    busy.leases, busy.idle_since = 0, 16.0
    assert plan(*models, now=16.0, gpus=load).actions == [Wake("a", None, (StepDown(busy, Tier.SLEEPING, "evict"),))]


def test_one_that_an_operator_sends_down_is_waited_for() -> None:
    commanded = instance(State.READY, key="b", leases=1)
    commanded.commanded = Tier.SUSPENDED
    load = gpus(commanded, needs={"a": 60, "b": 60}, asleep={"b": 2})
    models = needy(since=0.0), model(commanded, key="b")
    assert plan(*models, now=20.0, gpus=load).actions == [Retire(commanded, "a command")]
    commanded.state = State.RETIRING
    assert plan(*models, now=20.0, gpus=load).actions == []
    commanded.leases, commanded.idle_since = 0, 20.0
    assert plan(*models, now=20.0, gpus=load).actions == [StepDown(commanded, Tier.SUSPENDED, "command")]


def test_as_many_busy_ones_are_asked_as_hold_what_is_missing() -> None:
    two = [instance(State.READY, key=k, leases=n) for k, n in (("b", 1), ("c", 2), ("d", 3))]
    load = gpus(*two, needs={"a": 50, "b": 26, "c": 26, "d": 26})
    models = needy(since=0.0), *(model(i, key=i.model) for i in two)
    assert plan(*models, now=10.0, gpus=load).actions == [Retire(two[0]), Retire(two[1])]
    two[0].state = State.RETIRING
    assert plan(*models, now=11.0, gpus=load).actions == [Retire(two[1])]


def test_what_would_never_fit_is_tried_with_all_the_room_there_is_once_somebody_waits() -> None:
    idle = instance(State.READY, key="b")
    load = gpus(idle, needs={"a": 90, "b": 20})
    (wake,) = plan(needy(), model(idle, key="b"), gpus=load).actions
    assert wake == Wake("a", None, (StepDown(idle, Tier.SUSPENDED, "evict"),))
    assert plan(model(min_ready=1), model(idle, key="b"), gpus=load).actions == []


def test_min_ready_is_not_evicted_for_memory() -> None:
    kept = instance(State.READY, key="b")
    load = gpus(kept, needs={"a": 60, "b": 60})
    assert plan(needy(), model(kept, key="b", min_ready=1), gpus=load).actions == [Wake("a", None)], "it may fit yet"


def test_a_further_instance_waits_while_those_of_its_model_are_what_fills_the_gpu() -> None:
    own = instance(State.READY, leases=4)
    load = gpus(own, needs={"a": 60})
    assert plan(needy("a", own, max_instances=2), now=100.0, gpus=load).actions == []


def test_a_need_that_is_not_known_evicts_nobody() -> None:
    idle = instance(State.READY, key="b")
    load = gpus(idle, needs={"b": 80})
    assert plan(needy(), model(idle, key="b"), gpus=load).actions == [Wake("a", None)]


def test_max_awake_and_memory_are_both_kept() -> None:
    idle, asleep = instance(State.READY, key="b"), instance(State.SLEEPING, key="c", idle_since=-1.0)
    models = needy(), model(idle, key="b"), model(asleep, key="c")
    load = gpus(idle, asleep, needs={"a": 20, "b": 20, "c": 20}, asleep={"b": 2, "c": 2})
    one = StepDown(idle, Tier.SLEEPING, "evict")
    assert plan(*models, max_awake=1, gpus=load).actions == [Wake("a", None, (one,))]
    load = gpus(idle, asleep, needs={"a": 77, "b": 20, "c": 20}, asleep={"b": 2, "c": 2})
    (wake,) = plan(*models, max_awake=1, gpus=load).actions
    assert wake == Wake("a", None, (StepDown(idle, Tier.SUSPENDED, "evict"),))


def test_only_the_gpus_that_are_short_count() -> None:
    here, there = instance(State.READY, key="b"), instance(State.READY, key="c", idle_since=-5.0)
    load = GpuLoad(
        {"x": 80, "y": 80},
        {"b-1": {"x": 60}, "c-1": {"y": 60}},
        {"b-1": {"x": 60}, "c-1": {"y": 60}},
        {"a": {"x": 60}},
        {},
    )
    (wake,) = plan(needy(), model(here, key="b"), model(there, key="c"), gpus=load).actions
    assert wake == Wake("a", None, (StepDown(here, Tier.SUSPENDED, "evict"),))


@pytest.mark.parametrize("state", [State.READY, State.SLEEPING])
def test_a_grown_instance_is_replaced_from_its_checkpoint_instead(state: State) -> None:
    grown = instance(state, key="b")
    other = model(grown, key="b", grown=frozenset({"b-1"}))
    assert plan(other, now=1.0).actions == []
    assert plan(other, now=120.0).actions == [StepDown(grown, Tier.CHECKPOINTED, "recycle")]
    load = gpus(grown, needs={"a": 79, "b": 60}, asleep={"b": 2})
    assert plan(needy(), other, gpus=load).actions == [
        Wake("a", None, (StepDown(grown, Tier.CHECKPOINTED, "recycle"),))
    ]
    grown.postponed[Tier.CHECKPOINTED] = 1000.0
    (step,) = plan(other, now=120.0).actions
    assert isinstance(step, StepDown)
    assert step.reason == "idle"


# --- all rules together ---

STATES = st.sampled_from([s for s in State if s is not State.GONE])


@st.composite
def views(draw: st.DrawFn) -> View:
    models = []
    for key in "abc"[: draw(st.integers(1, 3))]:
        count = draw(st.integers(0, 3))
        instances = []
        for number in range(1, count + 1):
            state = draw(STATES)
            leases = draw(st.integers(0, 4)) if state in (State.READY, State.RETIRING) else 0
            one = instance(state, key=key, number=number, leases=leases, idle_since=draw(st.floats(0, 1000)))
            one.barred = draw(st.sets(st.sampled_from(sorted(TIERS))))
            instances.append(one)
        waiting = draw(st.integers(0, 10))
        models.append(
            model(
                *instances,
                key=key,
                max_instances=draw(st.integers(max(1, count), 4)),
                min_ready=draw(st.integers(0, 1)),
                waiting=waiting,
                oldest_wait=draw(st.floats(0, 1000)) if waiting else None,
                grown=frozenset(i.id for i in instances if draw(st.integers(0, 3)) == 0),
                wanted={
                    i.id: 1 for i in instances if waiting and i.state in WITH_ENGINE and draw(st.integers(0, 3)) == 0
                },
            )
        )
    everyone = [i for m in models for i in m.instances]
    needs = {m.key: draw(st.integers(0, 90)) for m in models}
    asleep = {m.key: draw(st.integers(1, 10)) for m in models if draw(st.booleans())}
    load = gpus(*everyone, needs=needs, asleep=asleep, capacity=draw(st.integers(1, 100)))
    load = load if draw(st.booleans()) else EMPTY
    return View(models, draw(st.integers(0, 4)), 10.0, draw(with_host(models, load)) if draw(st.booleans()) else load)


def host(*instances: InstanceView, free: int, left: dict[tuple[str, Tier], int], short: int = 0) -> GpuLoad:
    """Host memory alone, as `MemoryAccounting` makes it: `left` where it is not 0; `a` needs 60."""
    return GpuLoad(
        {HOST: free}, {i.id: {HOST: 0} for i in instances}, {i.id: {HOST: 0} for i in instances}, {"a": {HOST: 60}},
        host_left={(i.id, tier): left.get((i.id, tier), 0) for i in instances for tier in STEPS}, host_short=short,
    )  # fmt: skip


ARCHIVES: dict[str, Any] = {"tiers": TIERS | {Tier.ARCHIVED}, "has_shared_image": True, "key": "b"}


def test_a_shared_image_goes_to_the_archive_with_all_who_are_nothing_else() -> None:
    one, two = (instance(State.CHECKPOINTED, key="b", number=n) for n in (1, 2))
    load = host(one, two, free=40, left={("b-1", Tier.ARCHIVED): -30})
    there = model(one, two, **ARCHIVES)
    first = StepDown(one, Tier.ARCHIVED, "evict")
    made = plan(needy(), there, gpus=load)
    assert made.actions == [Wake("a", None, (first,)), StepDown(two, Tier.ARCHIVED, "evict")]
    made = plan(there, gpus=replace(load, host_short=10))
    assert made.actions == [first, StepDown(two, Tier.ARCHIVED, "evict")]


def test_a_shared_image_stays_while_somebody_is_to_be_woken_from_it() -> None:
    one, two = (instance(State.CHECKPOINTED, key="b", number=n) for n in (1, 2))
    load = host(one, two, free=40, left={("b-1", Tier.ARCHIVED): -30}, short=10)
    there = model(one, two, waiting=1, oldest_wait=4.0, **ARCHIVES)
    assert [a for a in plan(needy(), there, gpus=load).actions if isinstance(a, StepDown)] == []


def test_a_wake_from_the_archive_makes_room_for_its_image_too() -> None:
    archived, idle = instance(State.ARCHIVED), instance(State.CHECKPOINTED, key="b")
    load = host(archived, idle, free=70, left={("b-1", Tier.STOPPED): -30})
    models = needy("a", archived), model(idle, key="b")
    assert plan(*models, gpus=load).actions == [Wake("a", archived)]
    made = plan(*models, gpus=replace(load, unpacks={"a-1": 20}))
    assert made.actions == [Wake("a", archived, (StepDown(idle, Tier.STOPPED, "evict"),))]


@st.composite
def with_host(draw: st.DrawFn, models: list[ModelView], load: GpuLoad) -> GpuLoad:
    """The same with some host memory, as `MemoryAccounting` adds it."""
    everyone = [i for m in models for i in m.instances]
    held = {i.id: draw(st.integers(0, 50)) for i in everyone}
    needs = {m.key: draw(st.integers(1, 90)) for m in models if draw(st.booleans())}
    left = st.integers(-20, 60)
    return replace(
        load,
        capacity={**load.capacity, HOST: draw(st.integers(0, 200))},
        now={i.id: {**load.now.get(i.id, {}), HOST: held[i.id]} for i in everyone},
        after={i.id: {**load.after.get(i.id, {}), HOST: draw(st.integers(0, held[i.id]))} for i in everyone},
        needs={
            m.key: {**load.needs.get(m.key, {}), **({HOST: needs[m.key]} if m.key in needs else {})} for m in models
        },
        host_left={(i.id, tier): draw(left) for i in everyone for tier in STEPS},
        host_short=draw(st.integers(-50, 50)),
        guessed=frozenset(m.key for m in models if draw(st.integers(0, 3)) == 0),
        unpacks={i.id: draw(st.integers(1, 40)) for i in everyone if i.state is State.ARCHIVED},
    )


def assert_host_memory_is_respected(view: View, made: Plan) -> None:
    """Nothing is woken that is known not to fit; who is refused is not woken too, and sends nobody down."""
    load = view.gpus
    refused = {a.model for a in made.actions if isinstance(a, Refuse)}
    assert not refused & load.guessed
    for key in refused:
        assert HOST in load.needs[key] or load.unpacks
    free = load.capacity[HOST] - sum(held[HOST] for held in load.after.values())
    for action in made.actions:
        if not isinstance(action, Wake):
            continue
        held = load.now[action.instance.id][HOST] if action.instance is not None else 0
        extra = max(0, load.needs.get(action.model, {}).get(HOST, 0) - held)
        extra += load.unpacks.get(action.instance.id, 0) if action.instance is not None else 0
        for victim in action.victims:
            free += load.after[victim.instance.id][HOST] - load.host_left[victim.instance.id, victim.to]
        free -= extra
        assert free >= 0 or not extra or action.model in load.guessed or made.actions.index(action) > 0


def assert_memory_is_respected(view: View, made: Plan) -> None:
    """What is woken fits, or everybody who was idle has made room for it."""
    load = view.gpus
    free = load.capacity.get(GPU, 0) - sum(held.get(GPU, 0) for held in load.after.values())
    wakes = [a for a in made.actions if isinstance(a, Wake) and a.model in load.needs]
    if not wakes or free < 0:
        return
    everyone = [a for a in made.actions if isinstance(a, Wake)]
    touched = {id(v.instance) for w in everyone for v in w.victims} | {id(w.instance) for w in everyone}
    for wake in wakes:
        held = load.now[wake.instance.id].get(GPU, 0) if wake.instance is not None else 0
        free -= max(0, load.needs[wake.model][GPU] - held)
        for victim in wake.victims:
            left = load.held_on(victim.to, victim.instance)
            if left is not None:
                free += load.after[victim.instance.id].get(GPU, 0) - left.get(GPU, 0)
    asleep = [i for m in view.models for i in m.instances if i.state is State.SLEEPING and id(i) not in touched]
    assert free >= 0 or not any(load.after[i.id].get(GPU) for i in asleep)


@settings(max_examples=examples(150))
@given(views(), st.floats(0, 2000))
def test_every_plan_can_be_carried_out(view: View, now: float) -> None:
    made = decide(view, now)
    touched: list[InstanceView] = []
    awake = sum(i.state in AWAKE for m in view.models for i in m.instances)
    limit = max(view.rules.max_awake, awake) if view.rules.max_awake else math.inf
    new: dict[str, int] = {m.key: 0 for m in view.models}
    for action in made.actions:
        match action:
            case Wake(key, woken, victims):
                if woken is None:
                    new[key] += 1
                else:
                    assert woken.state in RESTING
                    assert woken.state is not State.READY
                    touched.append(woken)
                awake += 1
                for victim in victims:
                    assert victim.instance.leases == 0
                    touched.append(victim.instance)
                    awake -= victim.instance.state in AWAKE
                assert awake <= limit
            case StepDown(one, to, _):
                assert one.leases == 0
                assert to > one.tier
                assert to not in one.barred
                touched.append(one)
            case Retire(one, _) | Readmit(one):
                touched.append(one)
    assert len({id(i) for i in touched}) == len(touched), "one instance, one action"
    for m in view.models:
        assert len(m.instances) + new[m.key] <= m.max_instances
    assert made.deadline is None or made.deadline > now
    if HOST in view.gpus.capacity:
        assert_host_memory_is_respected(view, made)
    else:
        assert_memory_is_respected(view, made)
    assert decide(view, now) == made, "deciding changes nothing"


# --- growth, where `min_ready` keeps instances ---

KEPT: dict[str, Any] = {"min_ready": 1, "timetable": {}}


def grown(*numbers: int) -> dict[str, Any]:
    return {**KEPT, "grown": frozenset(f"a-{n}" for n in numbers)}


def test_the_only_instance_is_recycled_when_it_is_idle_for_a_while() -> None:
    one = instance(State.READY, idle_since=5.0)
    assert plan(model(one, **grown()), now=1000.0) == Plan()
    assert plan(model(one, **grown(1)), now=14.0) == Plan([], 15.0)
    assert plan(model(one, **grown(1)), now=15.0).actions == [StepDown(one, Tier.CHECKPOINTED, "recycle")]
    assert plan(model(one, **grown(1), waiting=1, oldest_wait=15.0), now=15.0).actions == []
    assert plan(model(instance(State.READY, leases=1), **grown(1)), now=15.0) == Plan()
    assert plan(model(one, **grown(1), restock_at=20.0), now=15.0) == Plan([], 20.0), "restores fail"
    one.postponed[Tier.CHECKPOINTED] = 100.0
    assert plan(model(one, **grown(1)), now=15.0) == Plan()


def test_with_more_instances_another_comes_up_first() -> None:
    old, other = instance(State.READY, leases=1), instance(State.CHECKPOINTED, number=2)
    assert plan(model(old, other, **grown(1))).actions == [Wake("a", other)]
    assert plan(model(old, max_instances=2, **grown(1))).actions == [Wake("a", None)]
    other.state = State.WAKING
    assert plan(model(instance(State.READY), other, **grown(1)), now=100.0).actions == []
    other.state = State.READY
    assert plan(model(old, other, **grown(1))).actions == [Retire(old, "it has grown, and is replaced")]
    old.state = State.RETIRING
    assert plan(model(old, other, **grown(1))).actions == [], "it is not readmitted"
    old.leases, old.idle_since = 0, 0.0
    assert plan(model(old, other, **grown(1))).actions == [StepDown(old, Tier.CHECKPOINTED, "recycle")]
    other.state = State.CHECKPOINTED
    assert plan(model(old, other, **grown(1))).actions == [Wake("a", other), Readmit(old)], "who stood in for it broke"


def test_where_there_is_no_room_for_another_it_is_recycled_in_place() -> None:
    old, other = instance(State.READY), instance(State.CHECKPOINTED, number=2)
    kept = model(old, other, **grown(1))
    load = gpus(old, other, needs={"a": 60})
    assert plan(kept, gpus=load) == Plan([], 10.0)
    assert plan(kept, gpus=load, now=10.0).actions == [StepDown(old, Tier.CHECKPOINTED, "recycle")]
    assert plan(kept, max_awake=1, now=10.0).actions == [StepDown(old, Tier.CHECKPOINTED, "recycle")]


def test_of_several_grown_instances_one_goes_at_a_time() -> None:
    both = instance(State.READY, idle_since=1.0), instance(State.READY, number=2, idle_since=0.0)
    kept = {**grown(1, 2), "min_ready": 2}
    assert plan(model(*both, **kept), now=20.0).actions == [StepDown(both[1], Tier.CHECKPOINTED, "recycle")]
    both[1].state = State.CHECKPOINTING
    assert plan(model(*both, **kept), now=20.0).actions == []
    both[1].state = State.READY
    fresh = instance(State.READY, number=3)
    assert plan(model(*both, fresh, **kept), now=20.0).actions == [StepDown(both[1], Tier.CHECKPOINTED, "recycle")]


# --- costs ---


def test_costs_begin_typical_and_follow_measurements() -> None:
    costs = Costs()
    assert costs.estimate_s("a", Tier.CHECKPOINTED) == TYPICAL_S[Tier.CHECKPOINTED]
    costs.record("a", Tier.CHECKPOINTED, 1.0)
    assert costs.estimate_s("a", Tier.CHECKPOINTED) == 1.0
    for _ in range(20):
        costs.record("a", Tier.CHECKPOINTED, 3.0)
    assert math.isclose(costs.estimate_s("a", Tier.CHECKPOINTED), 3.0, rel_tol=0.01)
    assert costs.estimate_s("b", Tier.CHECKPOINTED) == TYPICAL_S[Tier.CHECKPOINTED]


def counted(view: View) -> dict[str, Any]:
    """All that a view keeps count of."""
    sums = {name: {place: count for place, count in total.items() if count} for name, total in view.sums.items()}
    orders = [view.needy, view.due, view.spare, view.sleeping, view.colder, view.busy]
    tables = [len(view.lacking), len(view.commanded), len(view.grown), len(view.retiring)]
    counts = (view.waiting_models, view.awake, view.going, view.quick_wakes, view.host_moving)
    return {"sums": sums, "orders": [len(o) for o in orders], "tables": tables, "counts": counts}


@given(views())
def test_what_a_model_adds_to_a_view_goes_with_it(view: View) -> None:
    before = counted(view)
    for number, one in enumerate(view.models):
        view.put(number, one)
    assert counted(view) == before, "each is there once"
    for number in range(len(view.models)):
        view.drop(number)
    assert counted(view) == counted(View())
