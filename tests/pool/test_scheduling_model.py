"""Whatever comes - requests, clients that leave, engines that break, costs that change -, nothing is lost or starves.

Long: SCHEDULING_EXAMPLES=1000 (`make test-model`). hypothesis prints the steps that fail, and how to repeat them.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loadtest.simulate_engine import Speed
from loadtest.simulate_pool import Ask, Ladder, Served, SimulatedPool
from proxy.pool.instance import State
from proxy.pool.model_view import Rules
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.instance import Instance

SPEED: Final = Speed(step_s=0.01, stream_s=0.001, prompt_tokens_per_s=20_000, chunk_tokens=1000, streams=8)
DOWN_S: Final = {Tier.SLEEPING: 0.1, Tier.SUSPENDED: 0.4, Tier.CHECKPOINTED: 0.5, Tier.STOPPED: 0.2}
UP: Final = (State.READY, State.RETIRING, State.PAUSING, State.UNPAUSING, State.FALLING_ASLEEP)
"""Holding a place; none here goes from ready to a colder tier than asleep where places are what is limited."""
RUNNING: Final = (State.READY, State.RETIRING, State.PAUSING, State.PAUSED, State.UNPAUSING, State.WAKING)
MOST_TOKENS: Final = 400
QUANTUM_S: Final = 0.5


class WatchedPool(SimulatedPool):
    """One that notes how long engines had run when they were paused."""

    shortest_turn_s = math.inf

    def _pause(self, model: Served, id_: str) -> None:
        begun = model.engines[id_].instance.turn_since
        assert begun is not None
        self.shortest_turn_s = min(self.shortest_turn_s, self.now - begun)
        super()._pause(model, id_)


class Scheduling(RuleBasedStateMachine):
    """Random events, each after a random time."""

    pool: WatchedPool

    @initialize(
        models=st.integers(2, 5),
        places=st.integers(0, 2),
        fits=st.integers(1, 3),
        pauses=st.lists(st.booleans(), min_size=5, max_size=5),
        wake_s=st.floats(0.1, 3.0),
        max_waits=st.lists(st.sampled_from([5.0, 30.0, 60.0]), min_size=5, max_size=5),
    )
    def begin(
        self, models: int, places: int, fits: int, pauses: list[bool], wake_s: float, max_waits: list[float]
    ) -> None:
        """So many places, or a GPU on which so many engines fit beside others that sleep."""
        self.asked: list[tuple[str, Ask]] = []
        self.places = places
        self.gpu_bytes = 0 if places else 100 * fits + 10 * models
        served = []
        for number in range(models):
            wakes = {Tier.SLEEPING: 0.1, Tier.SUSPENDED: 0.3, Tier.CHECKPOINTED: wake_s, Tier.STOPPED: 20.0}
            ladder = Ladder(wakes, DOWN_S, 0.2 if pauses[number] else None, 0.3)
            timetable = {Tier.SLEEPING: 5.0, Tier.SUSPENDED: 20.0, Tier.CHECKPOINTED: 60.0}
            model = Served(f"m{number}", SPEED, ladder, timetable, max_waits[number], math.inf)
            model.ready_bytes, model.asleep_bytes = 100, 10
            served.append(model)
        rules = Rules(max_awake=places, quantum_s=QUANTUM_S, switch_after_s=2.0)
        self.pool = WatchedPool(served, rules, self.gpu_bytes)

    def key(self, number: int) -> str:
        return f"m{number % len(self.pool.models)}"

    def instances(self) -> list[tuple[str, Instance, float]]:
        return [(m.key, e.instance, e.begins_at) for m in self.pool.models.values() for e in m.engines.values()]

    @rule(
        number=st.integers(0, 4),
        count=st.integers(1, 12),
        prompt=st.integers(1, 4000),
        tokens=st.integers(1, MOST_TOKENS),
        gap_s=st.floats(0.0, 1.0),
    )
    def requests_come(self, number: int, count: int, prompt: int, tokens: int, gap_s: float) -> None:
        asks = [(self.key(number), Ask(self.pool.now + n * gap_s, prompt, tokens)) for n in range(count)]
        self.asked += asks
        self.pool.run(asks, self.pool.now + count * gap_s)

    @rule(seconds=st.floats(0.01, 40.0))
    def some_time_passes(self, seconds: float) -> None:
        self.time_passes(seconds)

    def time_passes(self, seconds: float) -> None:
        self.pool.run([], self.pool.now + seconds)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 1000))
    def a_client_leaves(self, which: int) -> None:
        self.pool.leave(*self.asked[which % len(self.asked)])

    @rule(which=st.integers(0, 20))
    def an_engine_breaks(self, which: int) -> None:
        running = [(key, instance.id) for key, instance, _ in self.instances() if instance.state in RUNNING]
        if running:
            self.pool.break_engine(*running[which % len(running)])

    @rule(number=st.integers(0, 4), factor=st.floats(0.2, 5.0))
    def costs_change(self, number: int, factor: float) -> None:
        model = self.pool.models[self.key(number)]
        wakes = {tier: min(30.0, seconds * factor) for tier, seconds in model.ladder.wake_s.items()}
        model.ladder = replace(model.ladder, wake_s=wakes, unpause_s=min(3.0, model.ladder.unpause_s * factor))

    @invariant()
    def budgets_are_kept(self) -> None:
        if self.gpu_bytes:
            assert self.pool.held_bytes() <= self.gpu_bytes
        else:
            waking = [i for _, i, begins in self.instances() if i.state is State.WAKING and self.pool.now >= begins]
            up = [i for _, i, _ in self.instances() if i.state in UP]
            assert len(up) + len(waking) <= self.places, (up, waking)

    @invariant()
    def nobody_is_lost(self) -> None:
        for model in self.pool.models.values():
            tally = model.tally
            under_way = len(model.queue) + sum(e.instance.leases for e in model.engines.values())
            assert tally.asked == tally.ended + tally.left + tally.broken + under_way
            for engine in model.engines.values():
                assert len(engine.running) == engine.instance.leases == len(engine.batch)

    @invariant()
    def no_turn_is_shorter_than_the_quantum(self) -> None:
        assert self.pool.shortest_turn_s >= QUANTUM_S - 1e-6

    def teardown(self) -> None:
        """Nobody starves and no stream is forgotten: when no more come, all that were asked for end."""
        if not hasattr(self, "pool"):
            return
        for _ in range(100):
            self.time_passes(30.0)
            if self.pool.is_quiet:
                return
        raise AssertionError(f"not served within 50 minutes: {[i for _, i, _ in self.instances()]}")


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(
    max_examples=int(os.environ.get("SCHEDULING_EXAMPLES", "60")),
    stateful_step_count=int(os.environ.get("SCHEDULING_STEPS", "20")),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
