"""Whose turn it is: when a busy model makes room, who is next, and who makes room among those that are idle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from proxy.pool.demand import FADES_S, Demand
from proxy.pool.gpu_accounting import GpuLoad
from proxy.pool.instance import State
from proxy.pool.model_view import InstanceView, ModelView, PolicyName, Rules
from proxy.pool.plan import Pause, Plan, Readmit, Retire, StepDown, Unpause, Wake
from proxy.pool.policy import decide
from proxy.pool.turns import behind_s, most_unanswered, turn_s
from proxy.pool.view import View
from proxy.tiers import Tier

TIERS = frozenset({Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED})


def instance(key: str, state: State = State.READY, *, leases: int = 0, **more: Any) -> InstanceView:
    defaults: dict[str, Any] = {"idle_since": None if leases else 0.0, "turn_since": 0.0, "can_pause": True}
    return InstanceView(f"{key}-1", key, state, leases, **{**defaults, **more})


def model(one: InstanceView, **more: Any) -> ModelView:
    defaults: dict[str, Any] = {"max_wait_s": 60.0, "pause_s": 0.5, "unpause_s": 0.5}
    return ModelView(one.model, [one], TIERS, {}, 1, 0, 256, **{**defaults, **more})


def waiting(key: str, since: float, state: State = State.CHECKPOINTED, **more: Any) -> ModelView:
    return model(instance(key, state), waiting=1, oldest_wait=since, **more)


def plan(*models: ModelView, now: float, policy: PolicyName = "turns", places: int = 1) -> Plan:
    return decide(View(models, rules=Rules(policy, places, quantum_s=1.0, switch_after_s=10.0)), now)


def test_a_busy_model_runs_for_its_quantum_and_is_paused() -> None:
    busy = instance("a", leases=1)
    models = model(busy), waiting("b", 0.2)
    early = plan(*models, now=0.5)
    assert not early.actions
    assert early.deadline == pytest.approx(1.04)
    assert plan(*models, now=1.1).actions == [Pause(busy)]


def test_a_turn_grows_with_requests_and_with_what_the_switch_takes() -> None:
    many = instance("a", leases=25)
    assert plan(model(many), waiting("b", 0.2), now=0.5).deadline == pytest.approx(2.0)
    dear = waiting("b", 0.2, wake_s={Tier.CHECKPOINTED: 9.0})
    assert plan(model(many), dear, now=0.5).deadline == pytest.approx(4.0)
    crowd = instance("a", leases=2500)
    assert plan(model(crowd), waiting("b", 0.2), now=0.5).deadline == pytest.approx(15.0), "a quarter of max_wait"


def test_a_start_from_nothing_makes_no_turn_long_for_it_does_not_come_again() -> None:
    rules, busy, wake_s = Rules("turns"), instance("a", leases=1), {Tier.CHECKPOINTED: 9.0, Tier.STOPPED: 100.0}
    needy = waiting("b", 0.2, wake_s=wake_s)
    assert turn_s(rules, busy, model(busy), needy, None) == pytest.approx(0.52)
    assert turn_s(rules, busy, model(busy), needy, instance("b", State.NEW)) == pytest.approx(0.52)
    assert turn_s(rules, busy, model(busy), needy, needy.instances[0]) == pytest.approx(2.08)


def test_a_turn_goes_on_for_streams_without_a_token_then_it_is_closed_and_reads_what_it_has() -> None:
    busy = instance("a", leases=2, unanswered=1)
    needy = waiting("b", 0.2)
    assert plan(model(busy), needy, now=29.0).actions == []
    assert plan(model(busy), needy, now=30.0) == Plan([Retire(busy)], 36.0)
    retired = instance("a", State.RETIRING, leases=2, unanswered=1)
    assert plan(model(retired), needy, now=31.0) == Plan([], 36.0)
    assert plan(model(retired), needy, now=36.0).actions == [Pause(retired)], "but not for ever"
    answered = instance("a", State.RETIRING, leases=2)
    assert plan(model(answered), needy, now=31.0).actions == [Pause(answered)]


def test_a_turn_goes_on_while_its_own_model_is_waited_for() -> None:
    busy = instance("a", leases=1)
    asked = model(busy, waiting=3, oldest_wait=0.5)
    assert plan(asked, waiting("b", 0.2), now=29.0).actions == []
    assert plan(asked, waiting("b", 0.2), now=30.0).actions == [Pause(busy)]


def test_no_more_prompts_go_to_an_engine_than_it_can_read_while_others_starve() -> None:
    busy, other = model(instance("a", leases=1)), instance("b")
    starving, served = waiting("b", 0.2), model(other, waiting=1, oldest_wait=0.2)
    rules = Rules("turns", 1)
    assert most_unanswered(View([busy, starving], rules=rules), "a") == 8
    assert most_unanswered(View([busy, starving], rules=rules), "b") == math.inf
    assert most_unanswered(View([busy, served], rules=rules), "a") == math.inf, "it is up already"
    assert most_unanswered(View([busy, starving], rules=Rules("fifo", 1)), "a") == math.inf


def test_those_who_are_held_back_for_a_moment_need_no_further_instance() -> None:
    held_back, full = instance("a", leases=20, unanswered=8), instance("a", leases=256, unanswered=8)
    found = [
        plan(replace(waiting("a", 0.0), instances=[one], max_instances=2), now=1.0, places=0).actions
        for one in (held_back, full)
    ]
    assert found == [[], [Wake("a", None)]]


def test_a_long_request_counts_as_having_come_later_by_a_third_of_the_bound_at_most() -> None:
    assert behind_s(100, 100, 60.0) == pytest.approx(5.0)
    assert behind_s(400, 100, 60.0) == behind_s(1e9, 100, 60.0) == pytest.approx(20.0)
    assert behind_s(100, 0, 60.0) == behind_s(100, 100, math.inf) == 0.0


def test_one_that_cannot_be_paused_retires_after_switch_after_or_before_a_bound_is_broken() -> None:
    busy = instance("a", leases=1, can_pause=False)
    assert plan(model(busy), waiting("b", 3.0), now=9.0) == Plan([], 13.0)
    assert plan(model(busy), waiting("b", 3.0), now=13.0).actions == [Retire(busy)]
    soon = waiting("b", 3.0, max_wait_s=5.0, wake_s={Tier.CHECKPOINTED: 2.0})
    assert plan(model(busy), soon, now=5.0) == Plan([], 6.0)
    assert plan(model(busy), soon, now=6.0).actions == [Retire(busy)]
    hopeless = waiting("b", 3.0, max_wait_s=5.0, wake_s={Tier.CHECKPOINTED: 100.0})
    assert plan(model(busy), hopeless, now=9.0) == Plan([], 13.0), "no haste where the bound cannot be kept"


def test_when_it_has_paused_the_other_wakes_and_then_it_goes_on() -> None:
    paused = instance("a", State.PAUSED, leases=2, paused_since=1.5)
    needy = waiting("b", 0.2)
    (wake, *_) = plan(model(paused), needy, now=1.6).actions
    assert wake == Wake("b", needy.instances[0])
    alone = plan(model(paused), model(instance("b", State.CHECKPOINTED)), now=2.0)
    assert alone.actions == [Unpause(paused)]


def test_a_place_that_is_about_to_come_free_is_waited_for() -> None:
    going = model(instance("a", State.PAUSING, leases=2))
    other = model(instance("c", leases=1))
    assert plan(going, other, waiting("b", 0.0), now=50.0, places=2).actions == []


def test_an_idle_model_makes_room_for_a_paused_one_and_that_goes_on_when_it_has_gone() -> None:
    paused = instance("a", State.PAUSED, leases=2, paused_since=1.5)
    idle = instance("b")
    assert plan(model(paused), model(idle), now=2.0).actions == [StepDown(idle, Tier.SLEEPING, "evict")]
    assert plan(model(paused), model(instance("b", State.FALLING_ASLEEP)), now=2.0).actions == []
    assert plan(model(paused), model(instance("b", State.SLEEPING)), now=2.0).actions == [Unpause(paused)]


def test_whose_bound_comes_first_is_next() -> None:
    free = model(instance("x", State.SLEEPING))
    first, later = waiting("a", 1.0), waiting("b", 2.0)
    assert [a.model for a in plan(free, later, first, now=3.0).actions if isinstance(a, Wake)] == ["a"]
    urgent = waiting("b", 2.0, max_wait_s=10.0)
    assert [a.model for a in plan(free, urgent, first, now=3.0).actions if isinstance(a, Wake)] == ["b"]
    preferred = waiting("b", 2.0, head_start_s=60.0)
    assert [a.model for a in plan(free, preferred, first, now=3.0).actions if isinstance(a, Wake)] == ["b"]


def test_many_who_wait_come_before_one_by_half_the_bound_at_most() -> None:
    free = model(instance("x", State.SLEEPING))
    one, many = waiting("a", 1.0), model(instance("b", State.CHECKPOINTED), waiting=1000, oldest_wait=20.0)
    assert [a.model for a in plan(free, one, many, now=21.0).actions if isinstance(a, Wake)] == ["b"]
    later = model(instance("b", State.CHECKPOINTED), waiting=1000, oldest_wait=31.0)
    assert [a.model for a in plan(free, one, later, now=32.0).actions if isinstance(a, Wake)] == ["a"]


def test_the_idle_one_that_would_be_missed_least_makes_room() -> None:
    often, seldom = Demand(), Demand()
    for number in range(50):
        often.note(number)
    seldom.note(49.0)
    needy = waiting("c", 60.0)
    popular = model(instance("a", idle_since=49.0), worth_s=often.worth_s(0.5))
    rare = model(instance("b", idle_since=52.0), worth_s=seldom.worth_s(0.5))
    (wake,) = plan(popular, rare, needy, now=60.0, places=2).actions
    assert isinstance(wake, Wake)
    assert [victim.instance.id for victim in wake.victims] == ["b-1"], "though it was used later"
    dear = model(instance("b", idle_since=52.0), worth_s=seldom.worth_s(5000.0))
    (wake,) = plan(popular, dear, needy, now=60.0, places=2).actions
    assert isinstance(wake, Wake)
    assert [victim.instance.id for victim in wake.victims] == ["a-1"], "the other takes long to bring back"


def test_demand_fades() -> None:
    demand = Demand()
    for _ in range(10):
        demand.note(100.0)
    assert demand.count(100.0) == 10
    assert demand.count(100.0 + FADES_S) == pytest.approx(10 / math.e)
    assert demand.worth_s(1.0) > Demand().worth_s(1.0)


def test_no_more_are_restored_at_once_than_may_be_who_sleeps_need_not_wait() -> None:
    rules = Rules("turns", max_restores=2)
    under_way = model(instance("a", State.WAKING, waking_from=Tier.STOPPED), waiting=1, oldest_wait=0.0)
    second, third, asleep = waiting("c", 2.0), waiting("b", 1.0), waiting("d", 3.0, State.SUSPENDED)
    actions = decide(View([under_way, second, third, asleep], rules=rules), 4.0).actions
    assert [a.model for a in actions if isinstance(a, Wake)] == ["b", "d"]
    none = decide(View([under_way, second, third, asleep], rules=replace(rules, max_restores=1)), 4.0).actions
    assert [a.model for a in none if isinstance(a, Wake)] == ["d"]
    every = decide(View([under_way, second, third, asleep], rules=replace(rules, max_restores=0)), 4.0).actions
    assert [a.model for a in every if isinstance(a, Wake)] == ["b", "c", "d"]


def test_a_pinned_model_keeps_its_place() -> None:
    for one in (instance("a"), instance("a", leases=3)):
        assert plan(model(one, evictable=False), waiting("b", 0.0), now=1000.0).actions == []


def test_fifo_retires_the_running_one_at_once_and_never_pauses() -> None:
    busy = instance("a", leases=1)
    assert plan(model(busy), waiting("b", 0.2), now=0.2, policy="fifo").actions == [Retire(busy)]
    retired = instance("a", State.RETIRING, leases=1)
    assert plan(model(retired), waiting("b", 0.2), now=9.0, policy="fifo").actions == []
    assert plan(model(retired), model(instance("b")), now=9.0, places=2).actions == [Readmit(retired)]


def test_lru_never_asks_a_busy_one_and_keeps_an_idle_one_for_its_time_to_live() -> None:
    busy = model(instance("a", leases=1))
    assert plan(busy, waiting("b", 0.0), now=1e6, policy="lru") == Plan()
    idle = instance("a")
    kept = ModelView("a", [idle], TIERS, {Tier.SLEEPING: 5.0}, 1, 0, 256)
    assert plan(kept, now=299.0, policy="lru").actions == []
    assert plan(kept, now=300.0, policy="lru").actions == [StepDown(idle, Tier.SLEEPING, "idle")]
    assert plan(kept, now=5.0).actions == [StepDown(idle, Tier.SLEEPING, "idle")]


def test_what_a_paused_one_holds_is_waited_for_and_not_taken_for_never() -> None:
    paused = instance("a", State.PAUSED, leases=1, paused_since=1.5)
    needy = waiting("b", 0.2)
    held = {"a-1": {"gpu": 90}, "b-1": {}}
    load = GpuLoad({"gpu": 100}, held, held, {"a": {"gpu": 90}, "b": {"gpu": 90}}, {})
    view = View([model(paused), needy], rules=Rules("turns", 0, quantum_s=1.0), gpus=load)
    assert decide(view, 2.0).actions == [Unpause(paused)]


def test_what_one_is_given_in_a_plan_is_not_free_for_the_next() -> None:
    load = GpuLoad({"gpu": 130}, {}, {}, {"a": {"gpu": 100}, "b": {"gpu": 100}}, {})
    first, second = waiting("a", 0.0), waiting("b", 1.0)
    view = View([first, second], rules=Rules("turns", 0, quantum_s=1.0), gpus=load)
    assert decide(view, 2.0).actions == [Wake("a", first.instances[0])]
