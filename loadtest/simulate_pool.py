"""A pool in virtual time: the policy and the table of states are warmpool's own, engines and their moves are figures.

What a move takes comes from measurements (`Ladder`), what a request takes from `simulate_engine`. Whatever would have
the pool decide anew has this one decide too: somebody who waits, a request that ends, a move that is done, a deadline.
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loadtest.simulate_engine import Batch, Speed
from proxy.gpu.nvml import GpuMemory
from proxy.pool.demand import Demand
from proxy.pool.gpu_accounting import GpuAccounting, GpuLoad
from proxy.pool.instance import Event, Instance, State, WakeRecord, pick
from proxy.pool.model_view import ModelView, Rules, view_of
from proxy.pool.plan import Pause, Readmit, Retire, StepDown, Unpause, Wake
from proxy.pool.policy import decide
from proxy.pool.turns import behind_s, most_unanswered
from proxy.pool.view import View
from proxy.pool.wait_queue import WaitQueue
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from proxy.pool.plan import Action


@dataclass(frozen=True, slots=True)
class Ladder:
    """What moves of an engine take, in seconds, as measured."""

    wake_s: Mapping[Tier, float]
    down_s: Mapping[Tier, float]
    pause_s: float | None = None
    """None: its engines cannot pause."""
    unpause_s: float = 0.0


@dataclass(slots=True, eq=False)
class Ask:
    """One request."""

    at: float
    prompt_tokens: int
    tokens: int
    head_start_s: float = 0.0
    """How much earlier than it came it counts."""
    granted: float = math.inf
    first_token: float = math.inf


@dataclass(slots=True, eq=False)
class _Engine:
    """An instance with what it runs."""

    instance: Instance
    batch: Batch
    event: int = 0
    """Its latest event; those before it are void."""
    stopped_at: float = 0.0
    """Since when its requests stand still."""
    begins_at: float = 0.0
    """When the wake under way takes its place: those that made room for it are gone."""
    running: dict[Ask, None] = field(default_factory=dict)
    """In the order in which they came."""


@dataclass(slots=True)
class Tally:
    """What became of the requests of one model; times in seconds."""

    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    """Arrival to first token."""
    above_s: array[float] = field(default_factory=lambda: array("d"))
    """The same beyond what an engine of its own would have taken."""
    warm: int = 0
    """Requests that found an instance ready and had it at once."""
    asked: int = 0
    refused: int = 0
    left: int = 0
    """Their clients went before the end."""
    broken: int = 0
    """Their engine ended before the end."""
    ended: int = 0
    longest_wait_s: float = 0.0
    tokens: int = 0


@dataclass(slots=True, eq=False)
class Served:
    """A model of the simulation."""

    key: str
    speed: Speed
    ladder: Ladder
    timetable: Mapping[Tier, float]
    max_wait_s: float
    queue_timeout_s: float
    engines: dict[str, _Engine] = field(default_factory=dict)
    queue: WaitQueue[Ask] = field(default_factory=WaitQueue)
    late: deque[Ask] = field(default_factory=deque)
    """The queue in the order in which they came; some have left it since."""
    tally: Tally = field(default_factory=Tally)
    demand: Demand = field(default_factory=Demand)
    max_instances: int = 1
    is_watched: bool = False
    """An event is to come that refuses whoever waits for too long."""
    ready_bytes: int = 1
    """What an engine of it holds of the GPU."""
    asleep_bytes: int = 1

    def view(self, *, weighs: bool) -> ModelView:
        """What the policy sees of it; `weighs`: with what it is worth to keep its engine warm."""
        ladder, first = self.ladder, self.queue.first()
        instances = [view_of(e.instance) for e in self.engines.values()]
        tier = min((i.tier for i in instances), default=Tier.STOPPED)
        colder = max(tier, Tier.SUSPENDED)
        return ModelView(
            key=self.key,
            instances=instances,
            tiers=_TIERS,
            timetable=self.timetable,
            max_instances=self.max_instances,
            min_ready=0,
            max_concurrency=self.speed.streams,
            waiting=len(self.queue),
            oldest_wait=first.at if first is not None else None,
            head_start_s=first.head_start_s if first is not None else 0.0,
            max_wait_s=self.max_wait_s,
            wake_s=ladder.wake_s,
            pause_s=ladder.pause_s or 0.0,
            unpause_s=ladder.unpause_s,
            worth_s=self.demand.worth_s(ladder.wake_s[colder]) if weighs else 0.0,
        )


GPU: Final = "gpu"
_TIERS = frozenset({Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED})


class SimulatedPool:
    """Models, their engines, and the events that are to come."""

    def __init__(self, models: Iterable[Served], rules: Rules, gpu_bytes: int = 0, *, cold: bool = False) -> None:
        """`gpu_bytes`: the memory of the one GPU there is; 0 keeps no account of it.

        `cold`: no engine was ever started; otherwise each has a checkpoint.
        """
        self.now = 0.0
        self.models = {model.key: model for model in models}
        self.view = View(rules=rules)
        self._rules = rules
        self._accounting = GpuAccounting(0)
        if gpu_bytes:
            self._accounting.gpus = (GpuMemory(0, GPU, GPU, gpu_bytes, 0),)
            self.view.use(rules, GpuLoad(self._accounting.capacity(), {}, {}, {}, {}))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._deadline = math.inf
        self._deciding = False
        self.switches = 0
        """Engines that were brought up, or went on, in another's place."""
        self.wakes = 0
        self.pauses = 0
        self.gaps_s: array[float] = array("d")
        """How long each running answer stood still each time."""
        self.decisions = 0
        self._working: set[_Engine] = set()
        self._dirty: dict[Served, None] = {}
        for model in self.models.values():
            self._accounting.learn(
                model.key, {"ready": {GPU: model.ready_bytes}, "sleeping": {GPU: model.asleep_bytes}}
            )
            if not cold:
                self._made(model, f"{model.key}-1").instance.adopt(State.CHECKPOINTED, 0.0)
            self._changed(model)

    def _made(self, model: Served, id_: str) -> _Engine:
        engine = model.engines[id_] = _Engine(Instance(id_, model.key), Batch(model.speed))
        engine.instance.can_pause = model.ladder.pause_s is not None
        return engine

    # --- time ---

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._serial), what))

    def run(self, asks: Iterable[tuple[str, Ask]], until_s: float = math.inf) -> None:
        """Have requests come in the order of their time, and go on until all of them are served or refused."""
        coming = iter(asks)
        upcoming = next(coming, None)
        while True:
            when = self._events[0][0] if self._events else math.inf
            if upcoming is not None and upcoming[1].at <= when:
                self.now = upcoming[1].at
                self._arrive(self.models[upcoming[0]], upcoming[1])
                upcoming = next(coming, None)
                continue
            if when > until_s:
                self.now = until_s
                return
            if when == math.inf or (upcoming is None and until_s == math.inf and self.is_quiet):
                return
            self.now, _, what = heapq.heappop(self._events)
            what()

    @property
    def is_quiet(self) -> bool:
        """Whether nobody waits or runs."""
        return not any(m.queue or any(e.instance.leases for e in m.engines.values()) for m in self.models.values())

    # --- requests ---

    def _arrive(self, model: Served, ask: Ask) -> None:
        model.tally.asked += 1
        model.demand.note(self.now)
        if not model.queue and self._grant(model, ask):
            model.tally.warm += 1
            self._changed(model)
            return
        if self._rules.policy == "turns":
            model.demand.note_size(ask.prompt_tokens)
            ask.head_start_s = -behind_s(ask.prompt_tokens, model.demand.usual_size, model.max_wait_s)
        model.queue.add(ask, ask.at - ask.head_start_s)
        model.late.append(ask)
        self._watch_queue(model)
        self._changed(model)
        self._decide()

    def _grant(self, model: Served, ask: Ask) -> bool:
        instance = pick(
            (e.instance for e in model.engines.values()),
            model.speed.streams,
            most_unanswered=most_unanswered(self.view, model.key),
        )
        if instance is None:
            return False
        instance.begin_lease()
        instance.await_token()
        ask.granted = self.now
        engine = model.engines[instance.id]
        engine.batch.advance(self.now)
        engine.batch.add(ask, self.now)
        engine.running[ask] = None
        self._await_engine(model, engine)
        return True

    def _watch_queue(self, model: Served) -> None:
        while model.late and model.late[0] not in model.queue:
            model.late.popleft()
        if model.late and not model.is_watched and model.queue_timeout_s < math.inf:
            model.is_watched = True
            self._at(model.late[0].at + model.queue_timeout_s, lambda: self._refuse_late(model))

    def _refuse_late(self, model: Served) -> None:
        refused = model.is_watched = False
        while model.late and model.late[0].at + model.queue_timeout_s <= self.now + 1e-9:
            ask = model.late.popleft()
            if ask not in model.queue:
                continue
            model.queue.discard(ask)
            tally = model.tally
            tally.refused += 1
            tally.ttft_s.append(model.queue_timeout_s)
            tally.above_s.append(model.queue_timeout_s)
            tally.longest_wait_s = max(tally.longest_wait_s, self.now - ask.at)
            refused = True
        self._watch_queue(model)
        if refused:
            self._changed(model)
            self._decide()

    def _dispatch(self, model: Served) -> None:
        while (ask := model.queue.first()) is not None and self._grant(model, ask):
            model.queue.discard(ask)

    def leave(self, key: str, ask: Ask) -> None:
        """A client goes before its answer ends; nothing happens where it has had that."""
        model = self.models[key]
        engine = next((e for e in model.engines.values() if ask in e.running), None)
        if ask in model.queue:
            model.queue.discard(ask)
        elif engine is not None:
            self._end_running(engine, ask)
            self._await_engine(model, engine)
        else:
            return
        model.tally.left += 1
        self._dispatch(model)
        self._changed(model)
        self._decide()

    def _end_running(self, engine: _Engine, ask: Ask) -> None:
        engine.batch.leave(ask, self.now)
        del engine.running[ask]
        if ask.first_token == math.inf:
            engine.instance.token_came()
        engine.instance.end_lease(self.now, self.now)

    def break_engine(self, key: str, id_: str) -> None:
        """An engine ends by itself, with all that it runs; its image is still good. It must be one that runs."""
        model = self.models[key]
        engine = model.engines[id_]
        engine.instance.apply(Event.BROKE)
        engine.batch.clear(self.now)
        model.tally.broken += len(engine.running)
        engine.running.clear()
        self._await_engine(model, engine)

        def cleared_away() -> None:
            engine.instance.rest(Tier.CHECKPOINTED, self.now)
            self._accounting.arrived(engine.instance, Tier.CHECKPOINTED)
            self._changed(model)
            self._decide()

        self._at(self.now + model.ladder.down_s[Tier.CHECKPOINTED], cleared_away)
        self._changed(model)
        self._decide()

    # --- engines ---

    def _await_engine(self, model: Served, engine: _Engine) -> None:
        """Wait for its next event, and see to the others where it has begun to work beside them, or has stopped."""
        works = engine.batch.works
        if works != (engine in self._working):
            (self._working.add if works else self._working.discard)(engine)
            for other in self._working:
                other.batch.beside(len(self._working) - 1, self.now)
                if other is not engine:
                    self._expect(self.models[other.instance.model], other)
        self._expect(model, engine)

    def _expect(self, model: Served, engine: _Engine) -> None:
        engine.event += 1
        number, when = engine.event, engine.batch.next_s()
        if when < math.inf:
            self._at(when, lambda: self._engine_event(model, engine, number))

    def _engine_event(self, model: Served, engine: _Engine, number: int) -> None:
        if engine.event != number:
            return
        first, ended = engine.batch.happened(self.now)
        tally = model.tally
        for ask in first:
            engine.instance.token_came()
            ask.first_token = self.now
            ttft_s = self.now - ask.at
            tally.ttft_s.append(ttft_s)
            tally.above_s.append(max(0.0, ttft_s - model.speed.alone_s(ask.prompt_tokens)))
            tally.longest_wait_s = max(tally.longest_wait_s, ttft_s)
        instance = engine.instance
        for ask in ended:
            tally.tokens += ask.tokens
            tally.ended += 1
            del engine.running[ask]
            instance.end_lease(self.now, self.now)
        answered = bool(first) and not instance.unanswered
        if (first or ended) and instance.state is State.READY:
            self._dispatch(model)
        if first or ended:
            self._changed(model)
        if answered or (ended and (model.queue or not instance.leases)):
            self._decide()
        self._await_engine(model, engine)

    # --- decisions ---

    def _changed(self, model: Served) -> None:
        """It is looked at again at the next decision."""
        self._dirty[model] = None

    def _refresh(self) -> None:
        """Bring the view up to date."""
        weighs = self._rules.policy == "turns"
        for model in self._dirty:
            if self._accounting.gpus:
                self._count(model)
            self.view.put(model.key, model.view(weighs=weighs))
        self._dirty.clear()

    def _count(self, model: Served) -> None:
        """Bring what the policy knows of the GPU's memory up to date."""
        load = self.view.gpus
        mine = self._accounting.load([e.instance for e in model.engines.values()], (model.key,))
        gone = [id_ for id_ in load.now if id_.startswith(f"{model.key}-") and id_ not in mine.now]
        now, after = {**load.now, **mine.now}, {**load.after, **mine.after}
        for id_ in gone:
            del now[id_], after[id_]
        needs, asleep = {**load.needs, **mine.needs}, {**load.asleep, **mine.asleep}
        self.view.gpus = GpuLoad(load.capacity, now, after, needs, asleep)

    def held_bytes(self) -> int:
        """What all engines hold of the GPU; one that is woken, from when those have gone that make room for it."""
        return sum(
            self._accounting.charge(e.instance).get(GPU, 0)
            for m in self.models.values()
            for e in m.engines.values()
            if e.instance.state is not State.WAKING or self.now >= e.begins_at
        )

    def _decide(self) -> None:
        """Decide anew, and begin what was decided."""
        self.decisions += 1
        self._refresh()
        plan = decide(self.view, self.now)
        for action in plan.actions:
            self._begin(action)
        if plan.deadline is not None and plan.deadline < self._deadline:
            self._deadline = plan.deadline
            self._at(plan.deadline, self._due)

    def _due(self) -> None:
        self._deadline = math.inf
        self._decide()

    def _begin(self, action: Action) -> None:
        match action:
            case Wake(key, seen, victims):
                self._wake(self.models[key], seen.id if seen is not None else None, victims)
            case StepDown(seen):
                self._step_down(action)
            case Retire(seen):
                self._apply(seen.model, seen.id, Event.RETIRE)
            case Readmit(seen):
                self._apply(seen.model, seen.id, Event.READMIT)
                model = self.models[seen.model]
                self._dispatch(model)
                self._changed(model)
            case Pause(seen):
                self._pause(self.models[seen.model], seen.id)
            case Unpause(seen):
                self._unpause(self.models[seen.model], seen.id)
            case _:
                # Each model has one instance, and only places and GPU memory are scarce: no clones, no refusals.
                raise TypeError(f"not an action of a simulation: {action}")

    def _apply(self, key: str, id_: str, event: Event) -> None:
        model = self.models[key]
        model.engines[id_].instance.apply(event)
        self._changed(model)

    def _wake(self, model: Served, id_: str | None, victims: tuple[StepDown, ...]) -> None:
        until_s = max((self._step_down(victim) for victim in victims), default=0.0)
        if id_ is None:
            id_ = next(f"{model.key}-{n}" for n in itertools.count(1) if f"{model.key}-{n}" not in model.engines)
            self._made(model, id_)
        instance = model.engines[id_].instance
        found = Tier.STOPPED if instance.state is State.NEW else instance.tier
        began = self.now
        instance.begin_wake(found, began)
        model.engines[id_].begins_at = began + until_s
        generation = instance.generation
        self.wakes += 1
        self.switches += bool(victims)

        def woken() -> None:
            if instance.generation != generation or instance.state is not State.WAKING:
                return  # it broke
            instance.woken(WakeRecord(found, found, self.now, self.now, self.now - began, {}))
            self._accounting.woke(instance)
            self._dispatch(model)
            self._changed(model)
            self._decide()

        self._at(self.now + until_s + model.ladder.wake_s[found], woken)
        self._changed(model)

    def _step_down(self, action: StepDown) -> float:
        """Begin it; how long it takes."""
        model = self.models[action.instance.model]
        instance = model.engines[action.instance.id].instance
        instance.begin_step_down(action.to, evicted=action.reason == "evict")
        takes_s = model.ladder.down_s[action.to]

        generation = instance.generation

        def arrived() -> None:
            if instance.generation != generation:
                return  # it broke
            if action.to is Tier.STOPPED:
                instance.apply(Event.WENT)
                del model.engines[instance.id]
            else:
                instance.rest(action.to, self.now)
                self._accounting.arrived(instance, action.to)
            self._changed(model)
            self._decide()

        self._at(self.now + takes_s, arrived)
        self._changed(model)
        return takes_s

    def _pause(self, model: Served, id_: str) -> None:
        engine = model.engines[id_]
        engine.instance.begin_pause()
        engine.batch.stand_still(self.now, still=True)
        self._await_engine(model, engine)
        engine.stopped_at = self.now
        self.pauses += 1
        assert model.ladder.pause_s is not None

        generation = engine.instance.generation

        def paused() -> None:
            if engine.instance.generation != generation:
                return  # it broke
            engine.instance.paused(self.now)
            self._accounting.paused(engine.instance)
            self._accounting.paused(engine.instance)
            self._changed(model)
            self._decide()

        self._at(self.now + model.ladder.pause_s, paused)
        self._changed(model)

    def _unpause(self, model: Served, id_: str) -> None:
        engine = model.engines[id_]
        engine.instance.begin_unpause()
        self.switches += 1

        generation = engine.instance.generation

        def runs_on() -> None:
            if engine.instance.generation != generation:
                return  # it broke
            engine.instance.runs_on(self.now)
            self._accounting.runs_on(engine.instance)
            engine.batch.stand_still(self.now, still=False)
            self.gaps_s.extend([self.now - engine.stopped_at] * engine.instance.leases)
            self._await_engine(model, engine)
            self._dispatch(model)
            self._changed(model)
            self._decide()

        self._at(self.now + model.ladder.unpause_s, runs_on)
        self._changed(model)
