"""Who had the GPU, for how long."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.pool.gpu_time import GpuTime
from proxy.pool.instance import Event, Instance, State
from tests.fakes import Clock

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = st.one_of(
    st.tuples(st.just("begin"), st.sampled_from([None, "ann", "bob"])),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("hold"), st.booleans()),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("take"), st.none()),
)


@given(
    st.lists(st.tuples(st.floats(0, 1000, allow_nan=False), STEPS), max_size=60),
    st.integers(1, 4),
)
def test_the_parts_are_the_whole_and_each_is_fair(steps: Sequence[tuple[float, tuple[str, object]]], gpus: int) -> None:
    clock = Clock()
    time = GpuTime(gpus, clock)
    running: list[str | None] = []
    holds = False
    held = 0.0
    expected: dict[str | None, float] = {}
    got: dict[str | None, float] = {}
    idle, idle_expected = 0.0, 0.0

    def take() -> float:
        taken = time.take()
        got[None] = got.get(None, 0.0) + taken.unnamed_s
        for key, seconds in taken.by_key.items():
            assert seconds > 0
            got[key] = got.get(key, 0.0) + seconds
        return taken.idle_s

    for passed, (what, value) in steps:
        clock.now += passed
        if holds:
            held += passed * gpus
            for key in running:
                expected[key] = expected.get(key, 0.0) + passed * gpus / len(running)
            idle_expected += 0.0 if running else passed * gpus
        if what == "begin":
            time.begin()
            if value is not None:
                time.charge(str(value))
            running.append(None if value is None else str(value))
        elif what == "end" and running:
            time.end(running.pop(int(str(value)) % len(running)))
        elif what == "hold":
            holds = bool(value)
            time.hold(holds=holds)
        elif what == "clear":
            time.clear()
            running.clear()
        elif what == "take":
            idle += take()
    idle += take()
    assert math.isclose(sum(got.values()) + idle, held, rel_tol=1e-9, abs_tol=1e-6), "all of the held time, no more"
    assert math.isclose(idle, idle_expected, rel_tol=1e-9, abs_tol=1e-6)
    for key in expected.keys() | got.keys():
        assert math.isclose(got.get(key, 0.0), expected.get(key, 0.0), rel_tol=1e-9, abs_tol=1e-6), key
    assert time.take() == (0.0, 0.0, {}), "nothing is taken twice"


def test_it_counts_from_the_wake_until_it_has_left_the_gpu() -> None:
    clock = Clock()
    instance = Instance("demo-1", "demo", gpu_time=GpuTime(1, clock))

    def idle_after(event: Event) -> float:
        instance.apply(event)
        clock.now += 10
        return instance.gpu_time.take().idle_s

    assert idle_after(Event.WAKE) == 10
    assert idle_after(Event.AT_READY) == 10
    assert idle_after(Event.SLEEP) == 10, "it falls asleep"
    assert idle_after(Event.AT_SLEEPING) == 0
    assert idle_after(Event.CHECKPOINT) == 0, "one that slept has it no more"
    assert idle_after(Event.AT_CHECKPOINTED) == 0
    assert idle_after(Event.WAKE) == 10


def test_requests_that_stand_still_get_nothing_and_those_of_a_broken_engine_what_they_had() -> None:
    clock = Clock()
    instance = Instance("demo-1", "demo", gpu_time=GpuTime(1, clock))
    instance.adopt(State.READY, clock())
    instance.begin_lease()
    instance.gpu_time.charge("ann")
    clock.now += 3
    for event in (Event.PAUSE, Event.AT_PAUSED):
        instance.apply(event)
    clock.now += 100
    instance.apply(Event.UNPAUSE)
    instance.apply(Event.AT_READY)
    clock.now += 2
    instance.apply(Event.BROKE)
    clock.now += 50
    assert instance.gpu_time.take() == (0.0, 0.0, {"ann": 5.0})


def test_what_is_left_of_an_instance_that_is_gone_can_be_taken_once() -> None:
    instance = Instance("demo-1", "demo")
    assert not instance.gpu_time.ended
    for event in (Event.STOP, Event.WENT):
        instance.apply(event)
    assert instance.gpu_time.ended


def test_a_request_costs_little() -> None:
    """Counted, not timed: what one begins and ends does not grow with those that run."""
    clock_calls = 0

    def clock() -> float:
        nonlocal clock_calls
        clock_calls += 1
        return 0.0

    time = GpuTime(1, clock)
    for _ in range(1000):
        time.begin()
    before = clock_calls
    time.begin()
    time.end()
    assert clock_calls == before, "nobody is told from another"
    time.charge("a")
    before = clock_calls
    time.begin()
    time.end()
    assert clock_calls - before == 2
    assert pytest.approx(0.0) == time.take().unnamed_s
