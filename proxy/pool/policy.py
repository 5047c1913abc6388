"""Who may run, who steps down, who waits: pure functions of a view and a clock reading.

`decide` looks at everything at once and returns what to do; the pool does it. Nothing here awaits, starts or changes
anything, so each rule is tested with a view and a number. All times are readings of one clock, in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proxy.pool import gpu_accounting
from proxy.pool.gpu_accounting import HOST
from proxy.pool.instance import AWAKE, DESCENDING, RESTING, State
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from proxy.pool.gpu_accounting import Bytes, GpuLoad
    from proxy.pool.instance import Instance

_WITH_ENGINE: Final = frozenset(
    {State.READY, State.RETIRING, State.FALLING_ASLEEP, State.SLEEPING, State.SUSPENDING, State.SUSPENDED}
)

_OF_USE: Final = frozenset({*RESTING, *DESCENDING, State.RETIRING, State.WAKING}) - {State.NEW}
"""The states in which an instance answers requests, or can be brought to do so."""

_MAY_GO: Final = frozenset({State.SLEEPING, State.SUSPENDED, State.CHECKPOINTED})
"""Beside the awake ones, those that hold host memory, with their processes or their image."""

RECYCLE_AFTER_S: Final = 10.0
"""How long an instance of `min_ready` that no other can stand in for is idle before it is gone for a restore."""

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
    tiers: frozenset[Tier]
    """What its runtime offers between ready and stopped."""
    timetable: Mapping[Tier, float]
    max_instances: int
    min_ready: int
    max_concurrency: int
    waiting: int = 0
    oldest_wait: float | None = None
    """When the one to be served next began to wait."""
    draining: bool = False
    """It is closed to new requests; nothing is kept ready that nobody waits for."""
    restock_at: float = -math.inf
    """When an engine may be started or cloned that nobody waits for; later than now after one that failed."""
    start_at: float = -math.inf
    """When an engine may be started whoever waits; likewise."""
    failing: frozenset[str] = frozenset()
    """The instances whose last wake failed down to its cold start: until `start_at` they are not woken."""
    has_shared_image: bool = False
    """A golden checkpoint exists, from which further instances can be cloned."""
    worn: frozenset[str] = frozenset()
    """Instances that have grown on the GPU and have an image to be replaced from."""
    wanted: Mapping[str, int] = field(default_factory=dict)
    """Instance → how many wait for it and no other, since it holds what they refer to."""


@dataclass(frozen=True, slots=True)
class View:
    """Everything a decision depends on, beside the time."""

    models: Sequence[ModelView]
    max_awake: int = 0
    """How many instances may be awake at once; 0 is no limit."""
    switch_after_s: float = 10.0
    gpus: GpuLoad = gpu_accounting.EMPTY


@dataclass(frozen=True, slots=True)
class Wake:
    """Bring an instance (None: a new one) of a model to ready, once the victims have stepped down."""

    model: str
    instance: Instance | None
    victims: tuple[StepDown, ...] = ()


@dataclass(frozen=True, slots=True)
class Clone:
    """Prepare a further instance from the model's golden checkpoint."""

    model: str


@dataclass(frozen=True, slots=True)
class StepDown:
    """Take an instance to a colder tier."""

    instance: Instance
    to: Tier
    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """Close a busy instance to new requests, so that it becomes idle."""

    instance: Instance
    reason: str = "another model waits for its place"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell those who wait for a model that there is not enough host memory for it."""

    model: str
    needed_bytes: int
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class Readmit:
    """Open a retiring instance again: nobody needs its place any more."""

    instance: Instance


Action = Wake | StepDown | Retire | Readmit | Clone | Refuse


@dataclass(slots=True)
class Plan:
    """What to do now, in this order, and when to decide again if nothing happens before."""

    actions: list[Action] = field(default_factory=list)
    deadline: float | None = None
    starved: bool = field(default=False, compare=False)
    """Somebody waits for whom there is no room yet."""

    def presses(self) -> bool:
        """Whether somebody needs a place that another holds."""
        return self.starved or any(isinstance(action, Wake) and action.victims for action in self.actions)

    def not_later_than(self, when: float) -> None:
        """Ask for another decision at `when`."""
        self.deadline = when if self.deadline is None else min(self.deadline, when)


def pick(instances: Iterable[Instance], max_concurrency: int, preferred: str | None = None) -> Instance | None:
    """The ready instance with room for one more request, that with the fewest; or None.

    Where there is a `preferred` one that holds its engine, it is that or none: it is worth waiting for.
    """
    held = holding(instances, preferred) if preferred is not None else None
    best = None
    for instance in instances if held is None else [held]:
        if instance.state is not State.READY or instance.leases >= max_concurrency:
            continue
        if best is None or instance.leases < best.leases:
            best = instance
    return best


def holding(instances: Iterable[Instance], wanted: str) -> Instance | None:
    """The instance of that id while it holds the engine it had, awake or not; one that is restored has another."""
    return next((i for i in instances if i.id == wanted and _holds_engine(i)), None)


def _holds_engine(instance: Instance) -> bool:
    if instance.state is State.WAKING:
        return instance.waking_from is not None and instance.waking_from < Tier.CHECKPOINTED
    return instance.state in _WITH_ENGINE


def best_tier(instances: Iterable[Instance]) -> Tier:
    """The tier a request for the model finds: that of its warmest instance.

    One that takes no new requests because it is about to step down counts as on the first tier below.
    """
    return min((Tier.SLEEPING if i.state is State.RETIRING else i.tier for i in instances), default=Tier.STOPPED)


def wakes_wanted(model: ModelView, now: float) -> int:
    """How many more instances of a model are needed for those who wait, and for `min_ready`.

    At least those that somebody waits for and for no other, which `candidates` has first.
    """
    # One on its way down is woken again as soon as it has arrived: sooner than another could be.
    coming = sum(i.state is State.WAKING or i.state in DESCENDING or _goes_down_now(i) for i in model.instances)
    up = sum(i.state is State.READY and not _recyclable(i, model, now) for i in model.instances)
    for_any = max(0, model.waiting - sum(model.wanted.values()))
    for_queue = math.ceil(for_any / model.max_concurrency) - coming
    for_minimum = _kept_ready(model) - coming - up if now >= model.restock_at else 0
    in_person = sum(i.id in model.wanted for i in _wakeable(model))
    return max(in_person, for_queue, for_minimum)


def _goes_down_now(instance: Instance) -> bool:
    return instance.ordered not in (None, Tier.STOPPED) and instance.state in RESTING and not instance.leases


def _kept_ready(model: ModelView) -> int:
    return 0 if model.draining else model.min_ready


def candidates(model: ModelView, now: float) -> list[Instance | None]:
    """What could be woken for a model, cheapest first; None stands for a new instance."""
    backs_off = now < model.start_at
    usable = [i for i in _wakeable(model) if not backs_off or i.id not in model.failing]
    resting = sorted(usable, key=lambda i: (i.id not in model.wanted, i.tier, i.id))
    return [*resting, *[None] * (0 if backs_off else _vacancies(model) - clones_wanted(model, now))]


def is_failing(model: ModelView, now: float) -> bool:
    """Whether no instance can serve, and none may be started because the last start failed."""
    return now < model.start_at and not any(i.state in _OF_USE and i.id not in model.failing for i in model.instances)


def _wakeable(model: ModelView) -> list[Instance]:
    return [i for i in model.instances if i.state in RESTING and i.state is not State.READY and i.ordered is None]


def _vacancies(model: ModelView) -> int:
    return max(0, model.max_instances - len(model.instances))


def clones_wanted(model: ModelView, now: float) -> int:
    """How many instances to prepare from the golden checkpoint: they cost no memory until they are woken."""
    return _vacancies(model) if model.has_shared_image and now >= model.restock_at else 0


def next_step(instance: Instance, model: ModelView, *, hurried: bool = False) -> tuple[Tier, float] | None:
    """The next tier down for an idle instance and when it is due; None when its timetable has no more.

    One that made room goes off the GPU at once, but not while others are `hurried`: beside a wake it would slow that.
    """
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
            behind = instance.evicted and tier is Tier.SUSPENDED and not hurried
            after_s = 0.0 if behind else model.timetable[tier]
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
    return tier is Tier.STOPPED or (tier in model.tiers and tier not in instance.barred)


def may_suspend(instance: Instance, model: ModelView, now: float) -> bool:
    """Whether one that sleeps can go off the GPU now."""
    to = Tier.SUSPENDED
    return (
        instance.state is State.SLEEPING
        and _possible(instance, to, model)
        and now >= instance.postponed.get(to, -math.inf)
    )


def _recyclable(instance: Instance, model: ModelView, now: float) -> bool:
    """Whether its processes should end, so that the next wake restores fresh ones."""
    to = Tier.CHECKPOINTED
    return (
        instance.id in model.worn
        and instance.tier < to
        and _possible(instance, to, model)
        and now >= instance.postponed.get(to, -math.inf)
    )


def ordered_step(instance: Instance, to: Tier, model: ModelView) -> Tier | None:
    """Where an order to go down to `to` takes an instance: there, or the next colder tier that it has.

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
                plan.actions.append(Retire(instance, "an order"))
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
    room = _Room(view)
    for ordered in plan.actions:
        if isinstance(ordered, StepDown):
            room.expect(_freed(view.gpus, ordered.instance, ordered.to))
    starved = False
    for model in sorted(view.models, key=lambda m: (m.oldest_wait is None, m.oldest_wait or 0.0)):
        if (_kept_ready(model) or model.has_shared_image) and now < model.restock_at:
            plan.not_later_than(model.restock_at)
        if model.waiting and now < model.start_at:
            plan.not_later_than(model.start_at)
        # One that has to step down for another is woken again when it has arrived.
        given_up = sum(i.state in _MAY_GO and i.ordered is None and id(i) in used for i in model.instances)
        free = [c for c in candidates(model, now) if c is None or id(c) not in used]
        for candidate in free[: max(0, wakes_wanted(model, now) - given_up)]:
            if candidate is not None and id(candidate) in used:
                break  # it has just made room for one that is warmer
            full = bool(view.max_awake) and awake >= view.max_awake
            extra = room.wanted(model, candidate)
            if not full and room.comes_free(extra):
                room.promise(extra)
                break
            choice = _choose(view, model, candidate, room.balance(extra), now, used, full=full)
            if not choice.enough and (choice.may_come or model.oldest_wait is None):
                starved = starved or model.oldest_wait is not None
                _ask_for_room(view, model, candidate, now, plan, used, choice.missing)
                break
            # What is missing of a GPU may be wrong, and costs this engine only; the OOM killer takes any.
            if HOST in choice.missing.keys() & extra.keys() and model.key not in view.gpus.guessed:
                plan.actions.append(Refuse(model.key, extra[HOST], choice.missing[HOST]))
                break
            used.update(id(victim.instance) for victim in choice.victims)
            room.take(extra, choice.freed)
            if not full:
                awake += 1
            plan.actions.append(Wake(model.key, candidate, choice.victims))
            if candidate is not None:
                used.add(id(candidate))
    for model in view.models:
        _relieve(model, now, plan, used)
    plan.starved = starved
    if HOST in view.gpus.capacity:
        _relieve_host(view, now, plan, used)
    _follow(view, plan, used)
    if not starved:
        retiring = [i for m in view.models for i in m.instances if i.state is State.RETIRING]
        plan.actions.extend(Readmit(i) for i in retiring if id(i) not in used)
    hurried = _hurried(view)
    for model in view.models:
        plan.actions.extend([Clone(model.key)] * clones_wanted(model, now))
        _reap(model, now, plan, used, hurried=hurried)
    return plan


def has_room(view: View, key: str) -> bool:
    """Whether one more engine of a model can be awake with nobody stepping down for it, or waiting longer."""
    awake = [i for m in view.models for i in m.instances if i.state in AWAKE]
    if any(m.waiting for m in view.models) or (view.max_awake and len(awake) >= view.max_awake):
        return False
    if not view.gpus.capacity.keys() - {HOST} and key not in view.gpus.needs:
        return True
    need = view.gpus.needs.get(key)
    return not awake if need is None else _Room(view).holds(need)


class _Room:
    """The GPU memory that is free while a plan is made: now, and when all that moves has arrived."""

    def __init__(self, view: View) -> None:
        self._load = view.gpus
        self._now = self._free(view.gpus.now)
        self._soon = self._free(view.gpus.after)

    def _free(self, charges: Mapping[str, Bytes]) -> dict[str, int]:
        free = dict(self._load.capacity)
        for charge in charges.values():
            for uuid, count in charge.items():
                free[uuid] = free.get(uuid, 0) - count
        return free

    def wanted(self, model: ModelView, candidate: Instance | None) -> dict[str, int]:
        """What a wake needs beyond what the candidate holds; nothing where that is not known."""
        held = (
            self._load.now.get(candidate.id, gpu_accounting.NOTHING)
            if candidate is not None
            else gpu_accounting.NOTHING
        )
        extra = gpu_accounting.beyond(self._load.needs.get(model.key, gpu_accounting.NOTHING), held)
        if candidate is not None and (unpacked := self._load.unpacks.get(candidate.id)):
            extra[HOST] = extra.get(HOST, 0) + unpacked
        return extra

    def short(self, extra: Bytes) -> dict[str, int]:
        """What somebody has to give up for it."""
        return gpu_accounting.beyond(extra, self._soon)

    def holds(self, extra: Bytes) -> bool:
        """Whether that much is free already."""
        return not gpu_accounting.beyond(extra, self._now)

    def balance(self, extra: Bytes) -> dict[str, int]:
        """What somebody has to give up for it; below 0 where more host memory is free."""
        balance = {place: count - self._soon.get(place, 0) for place, count in extra.items()}
        if HOST in self._load.capacity and HOST not in extra:
            balance[HOST] = min(0, -self._soon[HOST])  # what is short already is not for this one to make good
        return balance

    def comes_free(self, extra: Bytes) -> bool:
        """Whether nobody has to give up anything, but some are on their way down still."""
        return not self.short(extra) and bool(gpu_accounting.beyond(extra, self._now))

    def expect(self, freed: Bytes) -> None:
        """Count on what a step down that is about to begin frees."""
        self._soon = gpu_accounting.plus(self._soon, freed)

    def promise(self, extra: Bytes) -> None:
        """Keep what comes free for who waits for it."""
        for uuid, count in extra.items():
            self._soon[uuid] = self._soon.get(uuid, 0) - count

    def take(self, extra: Bytes, freed: Bytes) -> None:
        """Give somebody what is free and what others free for it."""
        for free in (self._now, self._soon):
            for uuid in extra.keys() | freed.keys():
                free[uuid] = free.get(uuid, 0) + freed.get(uuid, 0) - extra.get(uuid, 0)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Who steps down for a wake."""

    victims: tuple[StepDown, ...] = ()
    freed: Bytes = field(default_factory=dict)
    enough: bool = True
    missing: Bytes = field(default_factory=dict)
    """GPU memory that they do not free."""
    may_come: bool = False
    """There is not enough, but there may be once others are idle."""


@dataclass(frozen=True, slots=True)
class _Option:
    """An instance that may step down, and the tiers it may go to, warmest first; the last frees all it holds."""

    instance: Instance
    tiers: tuple[Tier, ...]
    recycle: bool

    def freed(self, load: GpuLoad, to: Tier) -> dict[str, int]:
        """What comes free when it steps down to a tier; nothing where that is not known."""
        return _freed(load, self.instance, to)


def _freed(load: GpuLoad, instance: Instance, to: Tier) -> dict[str, int]:
    left = load.held_on(to, instance)
    held = load.after.get(instance.id, gpu_accounting.NOTHING)
    if left is None:
        return {}
    freed = gpu_accounting.beyond(held, left)
    if HOST in load.capacity:
        freed[HOST] = held.get(HOST, 0) - left.get(HOST, 0)  # a colder tier may take more
    return freed


def _option(instance: Instance, model: ModelView, load: GpuLoad, now: float) -> _Option:
    if _recyclable(instance, model, now):
        return _Option(instance, (Tier.CHECKPOINTED,), recycle=True)
    tiers: list[Tier] = []
    for tier in STEPS:
        if tier > instance.tier and _possible(instance, tier, model) and now >= instance.postponed.get(tier, -math.inf):
            tiers.append(tier)
            shared = tier is Tier.ARCHIVED and model.has_shared_image  # which stays when an instance stops
            if shared or load.held_on(tier, instance) is gpu_accounting.NOTHING:
                break
    return _Option(instance, tuple(tiers), recycle=False)


def _choose(
    view: View, needy: ModelView, candidate: Instance | None, balance: Bytes, now: float, used: set[int], *, full: bool
) -> _Choice:
    """Who steps down so that nothing of `balance` is above 0, and one of those awake where no more may be (`full`)."""
    load = view.gpus
    awake, asleep = _idle(view, needy, candidate, now, used)
    if full and not awake:
        return _Choice(enough=False, may_come=True)
    chosen = [awake[0]] if full else []
    tiers = {id(o): o.tiers[-1] for o in chosen}

    def missing(options: Iterable[_Option]) -> dict[str, int]:
        left = dict(balance)
        for option in options:
            for place, count in option.freed(load, tiers[id(option)]).items():
                left[place] = left.get(place, 0) - count
        return {place: count for place, count in left.items() if count > 0}

    everyone = sorted([*awake, *asleep], key=lambda o: _dispensable(o.instance))
    for option in everyone:
        tiers.setdefault(id(option), option.tiers[-1])
        lacking = missing(chosen)
        freed_last = option.freed(load, option.tiers[-1])
        if option not in chosen and any(freed_last.get(place, 0) > 0 for place in lacking):
            chosen.append(option)
    lacking = missing(chosen)
    if not lacking:
        for option in chosen[1:] if full else list(chosen):
            if not missing(o for o in chosen if o is not option):
                chosen.remove(option)
    # Who was used last stays as warm as can be.
    for option in reversed(chosen):
        for tier in option.tiers:
            tiers[id(option)] = tier
            if missing(chosen) == lacking:
                break
    freed: Bytes = {}
    for option in chosen:
        freed = gpu_accounting.plus(freed, option.freed(load, tiers[id(option)]))
    victims = tuple(StepDown(o.instance, tiers[id(o)], "recycle" if o.recycle else "evict") for o in chosen)
    may_come = bool(lacking) and not gpu_accounting.beyond(lacking, _busy_bytes(view, needy, used))
    return _Choice(victims, freed, not lacking, lacking, may_come)


def _dispensable(instance: Instance) -> tuple[bool, float]:
    """Sorts the instances that would be missed least first."""
    return instance.state is not State.RETIRING, instance.idle_since or 0.0


def _idle(
    view: View, needy: ModelView, candidate: Instance | None, now: float, used: set[int]
) -> tuple[list[_Option], list[_Option]]:
    """The idle instances that may make room, longest idle first: awake ones of other models, and sleeping ones."""
    awake: list[_Option] = []
    asleep: list[_Option] = []
    for model in view.models:
        spare = _spare_for(needy, candidate, model)
        awake += [_option(i, model, view.gpus, now) for i in spare if i.leases == 0 and id(i) not in used]
        resting = _MAY_GO if HOST in view.gpus.capacity else {State.SLEEPING}
        sleeping = [i for i in _resting(model, used, resting) if i is not candidate]
        asleep += [_option(i, model, view.gpus, now) for i in sleeping]
    return sorted(awake, key=lambda o: _dispensable(o.instance)), asleep


def _resting(model: ModelView, used: set[int], states: Container[State]) -> list[Instance]:
    """The instances that may give up what they hold; an image that all share only while nobody wakes from it."""
    needed = model.has_shared_image and (model.waiting or any(id(i) in used for i in model.instances))
    return [
        i
        for i in model.instances
        if i.state in states
        and i.ordered is None
        and id(i) not in used
        and not (needed and i.state is State.CHECKPOINTED)
    ]


def _busy_bytes(view: View, needy: ModelView, used: set[int]) -> Bytes:
    """What those hold that cannot step down now, but may some day."""
    total: Bytes = {}
    for model in view.models:
        spare = {id(i) for i in _spare(model)}
        for instance in model.instances:
            busy = instance.leases > 0 and id(instance) in spare
            # One's own do not make room, but those who wait are served by them.
            own = model.key == needy.key and instance.state in (State.READY, State.RETIRING)
            if busy or instance.state is State.WAKING or (own and id(instance) not in used):
                total = gpu_accounting.plus(total, view.gpus.after.get(instance.id, gpu_accounting.NOTHING))
    return total


def _spare(model: ModelView, *, coming: int = 0) -> list[Instance]:
    """The ready instances above `min_ready`, those that would be missed least first; `coming`: as many more are up."""
    up = [i for i in model.instances if i.state in (State.READY, State.RETIRING)]
    up.sort(key=lambda i: (i.state is not State.RETIRING, i.leases, i.idle_since or math.inf))
    return up[: max(0, len(up) + coming - _kept_ready(model))]


def _spare_for(needy: ModelView, candidate: Instance | None, model: ModelView) -> list[Instance]:
    """The ready instances of a model that may make room for a candidate of another one.

    Those of its own model answer just as well, unless it is the candidate itself that is waited for.
    """
    if model.key != needy.key:
        return _spare(model)
    if candidate is None or candidate.id not in needy.wanted:
        return []
    return [i for i in _spare(model, coming=1) if i.id not in needy.wanted]


def _ask_for_room(
    view: View, needy: ModelView, candidate: Instance | None, now: float, plan: Plan, used: set[int], missing: Bytes
) -> None:
    """Close the least busy instance that may make room once `needy` has waited long enough.

    Where GPU memory is missing: as many as hold that much.
    """
    if needy.oldest_wait is None:
        return
    due = needy.oldest_wait + view.switch_after_s
    if now < due:
        plan.not_later_than(due)
        return
    others = [i for m in view.models for i in _spare_for(needy, candidate, m)]
    retiring = [i for i in others if i.state is State.RETIRING]
    busy = sorted((i for i in others if i not in retiring and id(i) not in used), key=lambda i: i.leases)
    if not missing:
        chosen = busy[:1] if not retiring else []
    else:
        chosen = []
        for instance in (*(i for i in retiring if i.leases), *busy):
            held = view.gpus.after.get(instance.id, gpu_accounting.NOTHING)
            if missing.keys() & held.keys():
                missing = gpu_accounting.beyond(missing, held)
                chosen += [instance] if instance in busy else []
    used.update(id(i) for i in chosen)
    plan.actions.extend(Retire(i) for i in chosen)


def _hurried(view: View) -> bool:
    """Whether a wake is under way that takes so little that it counts what goes on beside it."""
    waking = (i for m in view.models for i in m.instances if i.state is State.WAKING)
    return any(i.waking_from is not None and i.waking_from <= Tier.CHECKPOINTED for i in waking)


def _relieve(model: ModelView, now: float, plan: Plan, used: set[int]) -> None:
    """Replace worn instances that `min_ready` keeps: when another is up, or where none can be, when they are idle."""
    kept = _kept_ready(model)
    worn = [i for i in model.instances if id(i) not in used and i.ordered is None and _recyclable(i, model, now)]
    if not kept or not worn:
        return
    spare = sum(i.state is State.READY for i in model.instances) - kept
    going = [i for i in worn if i.state is State.RETIRING and spare >= 0]
    ready = sorted((i for i in worn if i.state is State.READY), key=lambda i: (i.leases, i.idle_since or 0.0))
    going += ready[: max(0, spare)]
    for instance in going:
        used.add(id(instance))
        if not instance.leases:
            plan.actions.append(StepDown(instance, Tier.CHECKPOINTED, "recycle"))
        elif instance.state is State.READY:
            plan.actions.append(Retire(instance, "it has grown, and is replaced"))
    if not going:
        _recycle_in_place([i for i in ready if not i.leases], model, now, plan, used)


def _relieve_host(view: View, now: float, plan: Plan, used: set[int]) -> None:
    """Where less host memory is free than is to be left, idle instances give some up, longest idle first."""
    short = view.gpus.host_short - _coming_free(view, plan)
    resting = [(i, m) for m in view.models for i in _resting(m, used, _MAY_GO)]
    spare = [(i, m) for m in view.models for i in _spare(m) if not i.leases]
    for instance, model in sorted([*resting, *spare], key=lambda pair: _dispensable(pair[0])):
        option = _option(instance, model, view.gpus, now)
        if short <= 0 or id(instance) in used or not option.tiers:
            continue
        freed = {tier: option.freed(view.gpus, tier).get(HOST, 0) for tier in option.tiers}
        to = next((tier for tier in option.tiers if freed[tier] >= short), max(freed, key=lambda tier: freed[tier]))
        if freed[to] > 0:
            plan.actions.append(StepDown(instance, to, "evict"))
            used.add(id(instance))
            short -= freed[to]


def _follow(view: View, plan: Plan, used: set[int]) -> None:
    """Where an image that all share goes to the archive, all instances that are nothing else go there."""
    going = {step.instance.model for step in _steps_down(plan) if step.to is Tier.ARCHIVED}
    for model in view.models if going else ():
        if model.key in going and model.has_shared_image:
            others = [i for i in _resting(model, set(), {State.CHECKPOINTED}) if id(i) not in used]
            plan.actions.extend(StepDown(i, Tier.ARCHIVED, "evict") for i in others)
            used.update(id(i) for i in others)


def _steps_down(plan: Plan) -> list[StepDown]:
    """All of a plan, those for a wake too."""
    return [s for a in plan.actions for s in ((a,) if isinstance(a, StepDown) else getattr(a, "victims", ()))]


def _coming_free(view: View, plan: Plan) -> int:
    """The host memory that those free who are on their way down, or are about to go."""
    load = view.gpus
    moving = sum(max(0, load.now[i].get(HOST, 0) - load.after[i].get(HOST, 0)) for i in load.now)
    return moving + sum(_freed(load, step.instance, step.to).get(HOST, 0) for step in _steps_down(plan))


def _recycle_in_place(idle: Sequence[Instance], model: ModelView, now: float, plan: Plan, used: set[int]) -> None:
    """Where nobody stands in for it, and nobody is about to, it is missed for as long as its restore takes."""
    moving = any(i.state is State.WAKING or i.state in DESCENDING for i in model.instances)
    planned = any(isinstance(a, Wake) and a.model == model.key for a in plan.actions)
    if not idle or moving or planned or model.waiting or now < model.restock_at:
        return
    due = (idle[0].idle_since or 0.0) + RECYCLE_AFTER_S
    if due <= now:
        plan.actions.append(StepDown(idle[0], Tier.CHECKPOINTED, "recycle"))
        used.add(id(idle[0]))
    else:
        plan.not_later_than(due)


def _reap(model: ModelView, now: float, plan: Plan, used: set[int], *, hurried: bool) -> None:
    if model.waiting:
        return
    keep = {id(i) for i in model.instances if i.state is State.READY} - {id(i) for i in _spare(model)}
    for instance in model.instances:
        step = None if id(instance) in keep | used else next_step(instance, model, hurried=hurried)
        if step is None:
            continue
        tier, due = step
        if due <= now and tier < Tier.CHECKPOINTED and _recyclable(instance, model, now):
            plan.actions.append(StepDown(instance, Tier.CHECKPOINTED, "recycle"))
        elif due <= now:
            plan.actions.append(StepDown(instance, tier, "evict" if instance.evicted else "idle"))
        else:
            plan.not_later_than(due)


class Costs:
    """What waking from each tier took, per model: an exponential average that follows changes within a few wakes."""

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
