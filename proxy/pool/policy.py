"""Who may run, who steps down, who waits: pure functions of a view and a clock reading.

`decide` looks at everything at once and returns what to do; the pool does it. Nothing here awaits, starts or changes
anything, so each rule is tested with a view and a number. All times are readings of one clock, in seconds.
"""

from __future__ import annotations

import math
from typing import Final

from proxy.pool.eviction import MAY_GO, Room, ask_for_room, choose, follow, freed_by, relieve, relieve_host
from proxy.pool.gpu_accounting import HOST
from proxy.pool.instance import AWAKE, DESCENDING, RESTING, State
from proxy.pool.plan import Clone, Draft, Plan, Readmit, Refuse, Retire, StepDown, Wake
from proxy.pool.view import STEPS, InstanceView, ModelView, View, kept_ready, possible, recyclable, spare_of
from proxy.tiers import Tier

_OF_USE: Final = frozenset({*RESTING, *DESCENDING, State.RETIRING, State.WAKING}) - {State.NEW}
"""The states in which an instance answers requests, or can be brought to do so."""


def wakes_wanted(model: ModelView, now: float) -> int:
    """How many more instances of a model are needed for those who wait, and for `min_ready`.

    At least those that somebody waits for and for no other, which `candidates` has first.
    """
    # One on its way down is woken again as soon as it has arrived: sooner than another could be.
    coming = sum(i.state is State.WAKING or i.state in DESCENDING or _goes_down_now(i) for i in model.instances)
    up = sum(i.state is State.READY and not recyclable(i, model, now) for i in model.instances)
    for_any = max(0, model.waiting - sum(model.wanted.values()))
    for_queue = math.ceil(for_any / model.max_concurrency) - coming
    for_minimum = kept_ready(model) - coming - up if now >= model.restock_at else 0
    in_person = sum(i.id in model.wanted for i in _wakeable(model))
    return max(in_person, for_queue, for_minimum)


def _goes_down_now(instance: InstanceView) -> bool:
    return instance.commanded not in (None, Tier.STOPPED) and instance.state in RESTING and not instance.leases


def candidates(model: ModelView, now: float) -> list[InstanceView | None]:
    """What could be woken for a model, cheapest first; None stands for a new instance."""
    backs_off = now < model.start_at
    usable = [i for i in _wakeable(model) if not backs_off or i.id not in model.failing]
    resting = sorted(usable, key=lambda i: (i.id not in model.wanted, i.tier, i.id))
    return [*resting, *[None] * (0 if backs_off else _vacancies(model) - clones_wanted(model, now))]


def is_failing(model: ModelView, now: float) -> bool:
    """Whether no instance can serve, and none may be started because the last start failed."""
    return now < model.start_at and not any(i.state in _OF_USE and i.id not in model.failing for i in model.instances)


def _wakeable(model: ModelView) -> list[InstanceView]:
    return [i for i in model.instances if i.state in RESTING and i.state is not State.READY and i.commanded is None]


def _vacancies(model: ModelView) -> int:
    return max(0, model.max_instances - len(model.instances))


def clones_wanted(model: ModelView, now: float) -> int:
    """How many instances to prepare from the golden checkpoint: they cost no memory until they are woken."""
    return _vacancies(model) if model.has_shared_image and now >= model.restock_at else 0


def next_step(instance: InstanceView, model: ModelView, *, hurried: bool = False) -> tuple[Tier, float] | None:
    """The next tier down for an idle instance and when it is due; None when its timetable has no more.

    One that made room goes off the GPU at once, but not while others are `hurried`: beside a wake it would slow that.
    """
    here = RESTING.get(instance.state)
    if here is None or instance.leases or instance.idle_since is None:
        return None
    for tier in STEPS:
        if tier > here and tier in model.timetable and possible(instance, tier, model):
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


def may_suspend(instance: InstanceView, model: ModelView, now: float) -> bool:
    """Whether one that sleeps can go off the GPU now."""
    to = Tier.SUSPENDED
    return (
        instance.state is State.SLEEPING
        and possible(instance, to, model)
        and now >= instance.postponed.get(to, -math.inf)
    )


def commanded_step(instance: InstanceView, to: Tier, model: ModelView) -> Tier | None:
    """Where a command to go down to `to` takes an instance: there, or the next colder tier that it has.

    None when it has none: only a command to stop stops an engine.
    """
    if to is Tier.STOPPED:
        return to
    return next((t for t in STEPS if to <= t < Tier.ARCHIVED and possible(instance, t, model)), None)


def decide(view: View, now: float) -> Plan:
    """What to do now: operators' commands, wakes for those who wait (longest first), evictions for them, then steps due
    by the timetable.
    """
    draft = Draft()
    for model in view.models:
        _obey(model, draft)
    starved = _Wakes(view, now, draft).plan()
    for model in view.models:
        relieve(model, now, draft)
    draft.plan.starved = starved
    if HOST in view.gpus.capacity:
        relieve_host(view, now, draft)
    follow(view, draft)
    if not starved:
        retiring = [i for m in view.models for i in m.instances if i.state is State.RETIRING]
        draft.plan.actions.extend(Readmit(i) for i in retiring if i.id not in draft.used)
    hurried = _hurried(view)
    for model in view.models:
        draft.plan.actions.extend([Clone(model.key)] * clones_wanted(model, now))
        _reap(model, now, draft, hurried=hurried)
    return draft.plan


class _Wakes:
    """The wakes of a draft, with who steps down for them; who waited longest comes first."""

    def __init__(self, view: View, now: float, draft: Draft) -> None:
        self._view, self._now, self._draft = view, now, draft
        self._awake = sum(i.state in AWAKE for m in view.models for i in m.instances)
        self._room = Room(view)
        for commanded in draft.plan.actions:
            if isinstance(commanded, StepDown):
                self._room.expect(freed_by(view.gpus, commanded.instance, commanded.to))
        self._starved = False

    def plan(self) -> bool:
        """Whether somebody waits for whom there is no room yet."""
        for model in sorted(self._view.models, key=lambda m: (m.oldest_wait is None, m.oldest_wait or 0.0)):
            self._serve(model)
        return self._starved

    def _serve(self, model: ModelView) -> None:
        now, used = self._now, self._draft.used
        if (kept_ready(model) or model.has_shared_image) and now < model.restock_at:
            self._draft.plan.not_later_than(model.restock_at)
        if model.waiting and now < model.start_at:
            self._draft.plan.not_later_than(model.start_at)
        # One that has to step down for another is woken again when it has arrived.
        given_up = sum(i.state in MAY_GO and i.commanded is None and i.id in used for i in model.instances)
        free = [c for c in candidates(model, now) if c is None or c.id not in used]
        for candidate in free[: max(0, wakes_wanted(model, now) - given_up)]:
            if candidate is not None and candidate.id in used:
                break  # it has just made room for one that is warmer
            if not self._wake(model, candidate):
                break

    def _wake(self, model: ModelView, candidate: InstanceView | None) -> bool:
        """Plan the wake of a candidate; False if that has to wait, and with it the colder ones."""
        view, draft, room = self._view, self._draft, self._room
        full = bool(view.max_awake) and self._awake >= view.max_awake
        extra = room.wanted(model, candidate)
        if not full and room.comes_free(extra):
            room.promise(extra)
            return False
        choice = choose(view, model, candidate, room.balance(extra), self._now, draft, full=full)
        if not choice.enough and (choice.may_come or model.oldest_wait is None):
            self._starved = self._starved or model.oldest_wait is not None
            ask_for_room(view, model, candidate, self._now, draft, choice.missing)
            return False
        # What is missing of a GPU may be wrong, and costs this engine only; the OOM killer takes any.
        if HOST in choice.missing.keys() & extra.keys() and model.key not in view.gpus.guessed:
            draft.plan.actions.append(Refuse(model.key, extra[HOST], choice.missing[HOST]))
            return False
        draft.used.update(victim.instance.id for victim in choice.victims)
        room.take(extra, choice.freed)
        if not full:
            self._awake += 1
        draft.plan.actions.append(Wake(model.key, candidate, choice.victims))
        if candidate is not None:
            draft.used.add(candidate.id)
        return True


def _obey(model: ModelView, draft: Draft) -> None:
    """Take instances where an operator wants them; a busy one retires first, and goes after its last request."""
    for instance in model.instances:
        if instance.commanded is None or (instance.state not in RESTING and instance.state is not State.RETIRING):
            continue  # what is under way comes to its end first
        if instance.leases:
            if instance.state is State.READY:
                draft.plan.actions.append(Retire(instance, "a command"))
            draft.used.add(instance.id)
            continue
        to = commanded_step(instance, instance.commanded, model)
        if to is not None and to > instance.tier:
            draft.plan.actions.append(StepDown(instance, to, "command"))
            draft.used.add(instance.id)


def has_room(view: View, key: str) -> bool:
    """Whether one more engine of a model can be awake with nobody stepping down for it, or waiting longer."""
    awake = [i for m in view.models for i in m.instances if i.state in AWAKE]
    if any(m.waiting for m in view.models) or (view.max_awake and len(awake) >= view.max_awake):
        return False
    if not view.gpus.capacity.keys() - {HOST} and key not in view.gpus.needs:
        return True
    need = view.gpus.needs.get(key)
    return not awake if need is None else Room(view).holds(need)


def _hurried(view: View) -> bool:
    """Whether a wake is under way that takes so little that it counts what goes on beside it."""
    waking = (i for m in view.models for i in m.instances if i.state is State.WAKING)
    return any(i.waking_from is not None and i.waking_from <= Tier.CHECKPOINTED for i in waking)


def _reap(model: ModelView, now: float, draft: Draft, *, hurried: bool) -> None:
    if model.waiting:
        return
    keep = {i.id for i in model.instances if i.state is State.READY} - {i.id for i in spare_of(model)}
    for instance in model.instances:
        step = None if instance.id in keep | draft.used else next_step(instance, model, hurried=hurried)
        if step is None:
            continue
        tier, due = step
        if due <= now and tier < Tier.CHECKPOINTED and recyclable(instance, model, now):
            draft.plan.actions.append(StepDown(instance, Tier.CHECKPOINTED, "recycle"))
        elif due <= now:
            draft.plan.actions.append(StepDown(instance, tier, "evict" if instance.evicted else "idle"))
        else:
            draft.plan.not_later_than(due)
