"""Who may run, who steps down, who waits: pure functions of a view and a clock reading.

`decide` looks at everything at once and returns what to do; the pool does it. Nothing here awaits, starts or changes
anything, so each rule is tested with a view and a number. All times are readings of one clock, in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proxy.instance import AWAKE, DESCENDING, RESTING, State, Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from proxy.instance import Instance

STEPS: Final = (Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED, Tier.ARCHIVED, Tier.STOPPED)

TYPICAL_S: Final[Mapping[Tier, float]] = {
    Tier.READY: 0.0,
    Tier.SLEEPING: 0.1,
    Tier.SUSPENDED: 0.5,
    Tier.CHECKPOINTED: 2.5,
    Tier.ARCHIVED: 10.0,
    Tier.STOPPED: 100.0,
}
"""What a wake costs before it was measured here: 1.5B parameters on an H100, see docs/architecture.md."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as the policy sees it."""

    key: str
    instances: Sequence[Instance]
    rungs: frozenset[Tier]
    """What its runtime offers between ready and stopped."""
    timetable: Mapping[Tier, float]
    max_instances: int
    min_ready: int
    max_concurrency: int
    waiting: int = 0
    oldest_wait: float | None = None
    """When the first of those who wait began to."""
    draining: bool = False
    """It is closed to new requests; nothing is kept ready that nobody waits for."""
    restock_at: float = -math.inf
    """When an engine may be started or cloned that nobody waits for; later than now after one that failed."""
    has_shared_image: bool = False
    """A golden checkpoint exists, from which further instances can be cloned."""


@dataclass(frozen=True, slots=True)
class View:
    """Everything a decision depends on, beside the time."""

    models: Sequence[ModelView]
    max_awake: int = 0
    """How many instances may be awake at once; 0 is no limit."""
    switch_after_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Wake:
    """Bring an instance (None: a new one) of a model to ready, once the victim has stepped down."""

    model: str
    instance: Instance | None
    victim: StepDown | None = None


@dataclass(frozen=True, slots=True)
class Clone:
    """Prepare a further instance from the model's golden checkpoint."""

    model: str


@dataclass(frozen=True, slots=True)
class StepDown:
    """Take an instance to a colder rung."""

    instance: Instance
    to: Tier
    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """Close a busy instance to new requests, so that it becomes idle."""

    instance: Instance


@dataclass(frozen=True, slots=True)
class Readmit:
    """Open a retiring instance again: nobody needs its place any more."""

    instance: Instance


Action = Wake | StepDown | Retire | Readmit | Clone


@dataclass(slots=True)
class Plan:
    """What to do now, in this order, and when to decide again if nothing happens before."""

    actions: list[Action] = field(default_factory=list)
    deadline: float | None = None

    def not_later_than(self, when: float) -> None:
        """Ask for another decision at `when`."""
        self.deadline = when if self.deadline is None else min(self.deadline, when)


def pick(instances: Iterable[Instance], max_concurrency: int, preferred: str | None = None) -> Instance | None:
    """The ready instance with room for one more request: the preferred one, else that with the fewest; or None."""
    ready = [i for i in instances if i.state is State.READY and i.leases < max_concurrency]
    return min(ready, key=lambda i: (i.id != preferred, i.leases), default=None)


def best_tier(instances: Iterable[Instance]) -> Tier:
    """The rung a request for the model finds: that of its warmest instance."""
    return min((i.tier for i in instances), default=Tier.STOPPED)


def wakes_wanted(model: ModelView, now: float) -> int:
    """How many more instances of a model are needed for those who wait, and for `min_ready`."""
    # One on its way down is woken again as soon as it has arrived: sooner than another could be.
    coming = sum(i.state is State.WAKING or i.state in DESCENDING or _goes_down_now(i) for i in model.instances)
    up = sum(i.state is State.READY for i in model.instances)
    for_queue = math.ceil(model.waiting / model.max_concurrency) - coming
    for_minimum = _kept_ready(model) - coming - up if now >= model.restock_at else 0
    return max(0, for_queue, for_minimum)


def _goes_down_now(instance: Instance) -> bool:
    return instance.ordered not in (None, Tier.STOPPED) and instance.state in RESTING and not instance.leases


def _kept_ready(model: ModelView) -> int:
    return 0 if model.draining else model.min_ready


def candidates(model: ModelView, now: float) -> list[Instance | None]:
    """What could be woken for a model, cheapest first; None stands for a new instance."""
    resting = [i for i in model.instances if i.state in RESTING and i.state is not State.READY and i.ordered is None]
    found: list[Instance | None] = [*sorted(resting, key=lambda i: (i.tier, i.id))]
    return found + [None] * (_vacancies(model) - clones_wanted(model, now))


def _vacancies(model: ModelView) -> int:
    return max(0, model.max_instances - len(model.instances))


def clones_wanted(model: ModelView, now: float) -> int:
    """How many instances to prepare from the golden checkpoint: they cost no memory until they are woken."""
    return _vacancies(model) if model.has_shared_image and now >= model.restock_at else 0


def next_step(instance: Instance, model: ModelView) -> tuple[Tier, float] | None:
    """The next rung down for an idle instance and when it is due; None when its timetable has no more."""
    here = RESTING.get(instance.state)
    if here is None or instance.leases or instance.idle_since is None:
        return None
    for tier in STEPS:
        if tier > here and tier in model.timetable and _possible(instance, tier, model):
            # What ends the golden checkpoint waits for the last instance that comes from it.
            shared = tier >= Tier.ARCHIVED and model.has_shared_image
            since = _shared_image_idle_since(model) if shared else instance.idle_since
            if since is None:
                return None
            after_s = 0.0 if instance.evicted and tier is Tier.SUSPENDED else model.timetable[tier]
            return tier, max(since + after_s, instance.postponed.get(tier, -math.inf))
    return None


def _shared_image_idle_since(model: ModelView) -> float | None:
    """Since when no instance of a model has needed the golden checkpoint; None while one is above it."""
    if any(i.state not in (State.CHECKPOINTED, State.ARCHIVED) for i in model.instances):
        return None
    return max((i.idle_since for i in model.instances if i.idle_since is not None), default=None)


def _possible(instance: Instance, tier: Tier, model: ModelView) -> bool:
    if tier is Tier.ARCHIVED and instance.state is not State.CHECKPOINTED:
        return False  # only an image can be archived
    return tier is Tier.STOPPED or (tier in model.rungs and tier not in instance.barred)


def _first_rung_below(instance: Instance, model: ModelView, now: float) -> Tier:
    possible = (t for t in STEPS if t > instance.tier and _possible(instance, t, model))
    return next(t for t in possible if now >= instance.postponed.get(t, -math.inf))


def ordered_step(instance: Instance, to: Tier, model: ModelView) -> Tier | None:
    """Where an order to go down to `to` takes an instance: there, or the next colder rung that it has.

    None when it has none: only an order to stop stops an engine.
    """
    if to is Tier.STOPPED:
        return to
    return next((t for t in STEPS if to <= t < Tier.ARCHIVED and _possible(instance, t, model)), None)


def _obey(model: ModelView, plan: Plan, used: set[int]) -> None:
    """Take instances where an operator wants them; a busy one is closed first, and goes after its last request."""
    for instance in model.instances:
        if instance.ordered is None or (instance.state not in RESTING and instance.state is not State.RETIRING):
            continue  # what is under way comes to its end first
        if instance.leases:
            if instance.state is State.READY:
                plan.actions.append(Retire(instance))
            used.add(id(instance))
            continue
        to = ordered_step(instance, instance.ordered, model)
        if to is not None and to > instance.tier:
            plan.actions.append(StepDown(instance, to, "order"))
            used.add(id(instance))


def decide(view: View, now: float) -> Plan:
    """What to do now: what operators ordered, wakes for those who wait (longest first), evictions for them, then steps
    due by the timetable.
    """
    plan = Plan()
    used: set[int] = set()
    for model in view.models:
        _obey(model, plan, used)
    awake = sum(i.state in AWAKE for m in view.models for i in m.instances)
    starved = False
    for model in sorted(view.models, key=lambda m: (m.oldest_wait is None, m.oldest_wait or 0.0)):
        if (_kept_ready(model) or model.has_shared_image) and now < model.restock_at:
            plan.not_later_than(model.restock_at)
        for candidate in candidates(model, now)[: wakes_wanted(model, now)]:
            victim: StepDown | None = None
            if view.max_awake and awake >= view.max_awake:
                victim = _victim(view, model, now, used)
                if victim is None:
                    starved = starved or model.oldest_wait is not None
                    _ask_for_room(view, model, now, plan, used)
                    break
                used.add(id(victim.instance))
            else:
                awake += 1
            plan.actions.append(Wake(model.key, candidate, victim))
            if candidate is not None:
                used.add(id(candidate))
    if not starved:
        retiring = [i for m in view.models for i in m.instances if i.state is State.RETIRING]
        plan.actions.extend(Readmit(i) for i in retiring if id(i) not in used)
    for model in view.models:
        plan.actions.extend([Clone(model.key)] * clones_wanted(model, now))
        _reap(model, now, plan, used)
    return plan


def _victim(view: View, needy: ModelView, now: float, used: set[int]) -> StepDown | None:
    """The idle instance of another model that has been idle longest, if it may step down."""
    idle = [
        (i.state is not State.RETIRING, i.idle_since or 0.0, i, m)
        for m in view.models
        if m.key != needy.key
        for i in _spare(m)
        if i.leases == 0 and id(i) not in used
    ]
    if not idle:
        return None
    _, _, instance, model = min(idle, key=lambda entry: entry[:2])
    return StepDown(instance, _first_rung_below(instance, model, now), "evict")


def _spare(model: ModelView) -> list[Instance]:
    """The ready instances above `min_ready`, those that would be missed least first."""
    up = [i for i in model.instances if i.state in (State.READY, State.RETIRING)]
    up.sort(key=lambda i: (i.state is not State.RETIRING, i.leases, i.idle_since or math.inf))
    return up[: max(0, len(up) - _kept_ready(model))]


def _ask_for_room(view: View, needy: ModelView, now: float, plan: Plan, used: set[int]) -> None:
    """Close the least busy instance of another model once `needy` has waited long enough."""
    if needy.oldest_wait is None:
        return
    due = needy.oldest_wait + view.switch_after_s
    if now < due:
        plan.not_later_than(due)
        return
    others = [i for m in view.models if m.key != needy.key for i in _spare(m)]
    if any(i.state is State.RETIRING for i in others):
        return
    busy = [i for i in others if id(i) not in used]
    if busy:
        chosen = min(busy, key=lambda i: i.leases)
        used.add(id(chosen))
        plan.actions.append(Retire(chosen))


def _reap(model: ModelView, now: float, plan: Plan, used: set[int]) -> None:
    if model.waiting:
        return
    keep = {id(i) for i in model.instances if i.state is State.READY} - {id(i) for i in _spare(model)}
    for instance in model.instances:
        step = None if id(instance) in keep | used else next_step(instance, model)
        if step is None:
            continue
        tier, due = step
        if due <= now:
            plan.actions.append(StepDown(instance, tier, "evict" if instance.evicted else "idle"))
        else:
            plan.not_later_than(due)


class Costs:
    """What waking from each rung took, per model: an exponential average that follows changes within a few wakes."""

    _WEIGHT: Final = 0.3

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, Tier], float] = {}

    def record(self, model: str, tier: Tier, seconds: float) -> None:
        """Take a measured wake into account."""
        old = self._seconds.get((model, tier))
        self._seconds[model, tier] = seconds if old is None else old + self._WEIGHT * (seconds - old)

    def estimate_s(self, model: str, tier: Tier) -> float:
        """The expected time to wake from `tier`, in seconds; a typical one before any was measured."""
        return self._seconds.get((model, tier), TYPICAL_S[tier])
