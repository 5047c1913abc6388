"""The transition table: every legal event, and every illegal one."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

from proxy.errors import IllegalTransitionError
from proxy.pool import admission
from proxy.pool.instance import ARRIVAL, AWAKE, DESCENT, RESTING, TRANSITIONS, Event, Instance, State
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

EVERYTHING = list(itertools.product(State, Event))


def at(state: State) -> Instance:
    instance = Instance("demo-1", "demo")
    instance.state = state
    return instance


@pytest.mark.parametrize(("state", "event"), [pair for pair in EVERYTHING if pair not in TRANSITIONS])
def test_an_illegal_event_raises_and_changes_nothing(state: State, event: Event) -> None:
    instance = at(state)
    before = instance.generation
    with pytest.raises(IllegalTransitionError, match=event.value):
        instance.apply(event)
    assert (instance.state, instance.generation) == (state, before)


@pytest.mark.parametrize(("state", "event"), sorted(TRANSITIONS, key=str))
def test_a_legal_event_leads_where_the_table_says(state: State, event: Event) -> None:
    instance = at(state)
    assert instance.apply(event) is TRANSITIONS[state, event]
    assert instance.state is TRANSITIONS[state, event]


def test_the_table_as_a_whole() -> None:
    reachable, frontier = {State.NEW}, [State.NEW]
    while frontier:
        here = frontier.pop()
        for (state, _), target in TRANSITIONS.items():
            if state is here and target not in reachable:
                reachable.add(target)
                frontier.append(target)
    assert reachable == set(State)
    assert not [pair for pair in TRANSITIONS if pair[0] is State.GONE]
    for state in set(State) - {State.GONE}:
        assert any(s is state for s, _ in TRANSITIONS), f"no way out of {state}"


def test_every_tier_has_a_way_down_and_an_arrival() -> None:
    for tier, event in DESCENT.items():
        assert any(e is event for _, e in TRANSITIONS), tier
    for tier, event in ARRIVAL.items():
        assert {RESTING[target] for (_, e), target in TRANSITIONS.items() if e is event} == {tier}


@pytest.mark.parametrize("event", [Event.SLEEP, Event.SUSPEND, Event.CHECKPOINT])
def test_a_leased_instance_cannot_step_down(event: Event) -> None:
    instance = at(State.READY)
    instance.begin_lease()
    with pytest.raises(IllegalTransitionError, match="1 leases"):
        instance.apply(event)
    assert instance.state.value == "ready"
    instance.end_lease(5.0, 0.0)
    instance.apply(event)


def test_wakes_and_breaks_begin_a_generation() -> None:
    instance = at(State.NEW)
    for event, generation in ((Event.WAKE, 1), (Event.AT_READY, 1), (Event.BROKE, 2), (Event.AT_CHECKPOINTED, 2)):
        instance.apply(event)
        assert instance.generation == generation


def test_a_break_ends_all_leases() -> None:
    instance = at(State.READY)
    instance.begin_lease()
    instance.apply(Event.BROKE)
    assert instance.leases == 0


@pytest.mark.parametrize("state", sorted(set(State) - {State.READY}, key=str))
def test_only_a_ready_instance_is_leased(state: State) -> None:
    instance = at(state)
    with pytest.raises(IllegalTransitionError, match="lease"):
        instance.begin_lease()
    assert instance.leases == 0


def test_idleness_begins_with_the_end_of_the_last_lease() -> None:
    instance = at(State.READY)
    instance.begin_lease()
    instance.begin_lease()
    idle_since = []
    for now in (10.0, 11.0):
        instance.end_lease(now, 0.0)
        idle_since.append(instance.idle_since)
    assert idle_since == [None, 11.0]
    with pytest.raises(IllegalTransitionError, match="twice"):
        instance.end_lease(12.0, 0.0)


def test_what_a_request_finds() -> None:
    for state, tier in RESTING.items():
        assert at(state).tier is tier
    waking = at(State.WAKING)
    waking.waking_from = Tier.CHECKPOINTED
    assert waking.tier is Tier.CHECKPOINTED
    assert all(at(state).tier is not Tier.STOPPED for state in AWAKE - {State.WAKING})


def test_stages_add_up_in_order_even_when_one_fails() -> None:
    stages = Stages()
    with stages.measure("outer"):
        with pytest.raises(ValueError, match="x"), stages.measure("inner"):
            raise ValueError("x")
        with stages.measure("inner"):
            pass
    assert list(stages.seconds) == ["outer", "inner"]
    assert stages.seconds["outer"] >= stages.seconds["inner"] > 0
    assert stages.total_s() == sum(stages.seconds.values())


# --- who stores to an instance ---


def stores_from_outside(source: str) -> list[str]:
    """Assignments to what belongs to an instance, by anybody but itself."""
    stored = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    of_an_instance = {*Instance.__slots__} - {"image"}  # which a model has too
    from_outside = {ast.unparse(n) for n in stored if n.attr in of_an_instance and ast.unparse(n.value) != "self"}
    return sorted(from_outside | {name for n in stored if (name := ast.unparse(n)) == "instance.image"})


def test_nobody_stores_to_an_instance_but_its_own_methods() -> None:
    assert stores_from_outside("i.task, self.handle = 1, 2\nx.leases += 1\ninstance.image = 1") == [
        "i.task", "instance.image", "x.leases",
    ]  # fmt: skip
    files = Path(admission.__file__).parent.glob("*.py")
    assert {path.name: found for path in files if (found := stores_from_outside(path.read_text()))} == {}
