"""Who makes room: for a wake, for the host, and for an engine that replaces one that has grown.

Pure functions of a view, as `policy`, which calls them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proxy.pool import gpu_accounting
from proxy.pool.gpu_accounting import HOST
from proxy.pool.instance import DESCENDING, State
from proxy.pool.plan import Plan, Retire, StepDown, Wake
from proxy.pool.view import STEPS, kept_ready, possible, recyclable, spare_of
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from proxy.pool.gpu_accounting import Bytes, GpuLoad
    from proxy.pool.plan import Draft
    from proxy.pool.view import InstanceView, ModelView, View

MAY_GO: Final = frozenset({State.SLEEPING, State.SUSPENDED, State.CHECKPOINTED})
"""Beside the awake ones, those that hold host memory, with their processes or their image."""

RECYCLE_AFTER_S: Final = 10.0
"""How long an instance of `min_ready` that no other can stand in for is idle before it is gone for a restore."""


class Room:
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

    def wanted(self, model: ModelView, candidate: InstanceView | None) -> dict[str, int]:
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
class Choice:
    """Who steps down for a wake."""

    victims: tuple[StepDown, ...] = ()
    freed: Bytes = field(default_factory=dict)
    enough: bool = True
    missing: Bytes = field(default_factory=dict)
    """GPU memory that they do not free."""
    may_come: bool = False
    """There is not enough, but there may be once others are idle."""


@dataclass(frozen=True, slots=True)
class Option:
    """An instance that may step down, and the tiers it may go to, warmest first; the last frees all it holds."""

    instance: InstanceView
    tiers: tuple[Tier, ...]
    recycle: bool

    def freed(self, load: GpuLoad, to: Tier) -> dict[str, int]:
        """What comes free when it steps down to a tier; nothing where that is not known."""
        return freed_by(load, self.instance, to)


def freed_by(load: GpuLoad, instance: InstanceView, to: Tier) -> dict[str, int]:
    left = load.held_on(to, instance)
    held = load.after.get(instance.id, gpu_accounting.NOTHING)
    if left is None:
        return {}
    freed = gpu_accounting.beyond(held, left)
    if HOST in load.capacity:
        freed[HOST] = held.get(HOST, 0) - left.get(HOST, 0)  # a colder tier may take more
    return freed


def _option(instance: InstanceView, model: ModelView, load: GpuLoad, now: float) -> Option:
    if recyclable(instance, model, now):
        return Option(instance, (Tier.CHECKPOINTED,), recycle=True)
    tiers: list[Tier] = []
    for tier in STEPS:
        if tier > instance.tier and possible(instance, tier, model) and now >= instance.postponed.get(tier, -math.inf):
            tiers.append(tier)
            shared = tier is Tier.ARCHIVED and model.has_shared_image  # which stays when an instance stops
            if shared or load.held_on(tier, instance) is gpu_accounting.NOTHING:
                break
    return Option(instance, tuple(tiers), recycle=False)


def choose(
    view: View,
    needy: ModelView,
    candidate: InstanceView | None,
    balance: Bytes,
    now: float,
    draft: Draft,
    *,
    full: bool,
) -> Choice:
    """Who steps down so that nothing of `balance` is above 0, and one of those awake where no more may be (`full`)."""
    load = view.gpus
    awake, asleep = _idle(view, needy, candidate, now, draft)
    if full and not awake:
        return Choice(enough=False, may_come=True)
    chosen = [awake[0]] if full else []
    tiers = {o.instance.id: o.tiers[-1] for o in chosen}

    def missing(options: Iterable[Option]) -> dict[str, int]:
        left = dict(balance)
        for option in options:
            for place, count in option.freed(load, tiers[option.instance.id]).items():
                left[place] = left.get(place, 0) - count
        return {place: count for place, count in left.items() if count > 0}

    everyone = sorted([*awake, *asleep], key=lambda o: _dispensable(o.instance))
    for option in everyone:
        tiers.setdefault(option.instance.id, option.tiers[-1])
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
            tiers[option.instance.id] = tier
            if missing(chosen) == lacking:
                break
    freed: Bytes = {}
    for option in chosen:
        freed = gpu_accounting.plus(freed, option.freed(load, tiers[option.instance.id]))
    victims = tuple(StepDown(o.instance, tiers[o.instance.id], "recycle" if o.recycle else "evict") for o in chosen)
    may_come = bool(lacking) and not gpu_accounting.beyond(lacking, _busy_bytes(view, needy, draft))
    return Choice(victims, freed, not lacking, lacking, may_come)


def _dispensable(instance: InstanceView) -> tuple[bool, float]:
    """Sorts the instances that would be missed least first."""
    return instance.state is not State.RETIRING, instance.idle_since or 0.0


def _idle(
    view: View, needy: ModelView, candidate: InstanceView | None, now: float, draft: Draft
) -> tuple[list[Option], list[Option]]:
    """The idle instances that may make room, longest idle first: awake ones of other models, and sleeping ones."""
    awake: list[Option] = []
    asleep: list[Option] = []
    for model in view.models:
        spare = _spare_for(needy, candidate, model)
        awake += [_option(i, model, view.gpus, now) for i in spare if i.leases == 0 and i.id not in draft.used]
        resting = MAY_GO if HOST in view.gpus.capacity else {State.SLEEPING}
        sleeping = [i for i in _resting(model, draft.used, resting) if i is not candidate]
        asleep += [_option(i, model, view.gpus, now) for i in sleeping]
    return sorted(awake, key=lambda o: _dispensable(o.instance)), asleep


def _resting(model: ModelView, used: Container[str], states: Container[State]) -> list[InstanceView]:
    """The instances that may give up what they hold; an image that all share only while nobody wakes from it."""
    needed = model.has_shared_image and (model.waiting or any(i.id in used for i in model.instances))
    return [
        i
        for i in model.instances
        if i.state in states
        and i.commanded is None
        and i.id not in used
        and not (needed and i.state is State.CHECKPOINTED)
    ]


def _busy_bytes(view: View, needy: ModelView, draft: Draft) -> Bytes:
    """What those hold that cannot step down now, but may some day."""
    total: Bytes = {}
    for model in view.models:
        spare = {i.id for i in spare_of(model)}
        for instance in model.instances:
            busy = instance.leases > 0 and instance.id in spare
            # One's own do not make room, but those who wait are served by them.
            own = model.key == needy.key and instance.state in (State.READY, State.RETIRING)
            if busy or instance.state is State.WAKING or (own and instance.id not in draft.used):
                total = gpu_accounting.plus(total, view.gpus.after.get(instance.id, gpu_accounting.NOTHING))
    return total


def _spare_for(needy: ModelView, candidate: InstanceView | None, model: ModelView) -> list[InstanceView]:
    """The ready instances of a model that may make room for a candidate of another one.

    Those of its own model answer just as well, unless it is the candidate itself that is waited for.
    """
    if model.key != needy.key:
        return spare_of(model)
    if candidate is None or candidate.id not in needy.wanted:
        return []
    return [i for i in spare_of(model, coming=1) if i.id not in needy.wanted]


def ask_for_room(
    view: View, needy: ModelView, candidate: InstanceView | None, now: float, draft: Draft, missing: Bytes
) -> None:
    """Retire the least busy instance that may make room once `needy` has waited long enough.

    Where GPU memory is missing: as many as hold that much.
    """
    if needy.oldest_wait is None:
        return
    due = needy.oldest_wait + view.switch_after_s
    if now < due:
        draft.plan.not_later_than(due)
        return
    others = [i for m in view.models for i in _spare_for(needy, candidate, m)]
    retiring = [i for i in others if i.state is State.RETIRING]
    busy = sorted((i for i in others if i not in retiring and i.id not in draft.used), key=lambda i: i.leases)
    if not missing:
        chosen = busy[:1] if not retiring else []
    else:
        chosen = []
        for instance in (*(i for i in retiring if i.leases), *busy):
            held = view.gpus.after.get(instance.id, gpu_accounting.NOTHING)
            if missing.keys() & held.keys():
                missing = gpu_accounting.beyond(missing, held)
                chosen += [instance] if instance in busy else []
    draft.used.update(i.id for i in chosen)
    draft.plan.actions.extend(Retire(i) for i in chosen)


def relieve(model: ModelView, now: float, draft: Draft) -> None:
    """Replace grown instances that `min_ready` keeps: when another is up, or where none can be, when they are idle."""
    kept = kept_ready(model)
    grown = [i for i in model.instances if i.id not in draft.used and i.commanded is None and recyclable(i, model, now)]
    if not kept or not grown:
        return
    spare = sum(i.state is State.READY for i in model.instances) - kept
    going = [i for i in grown if i.state is State.RETIRING and spare >= 0]
    ready = sorted((i for i in grown if i.state is State.READY), key=lambda i: (i.leases, i.idle_since or 0.0))
    going += ready[: max(0, spare)]
    for instance in going:
        draft.used.add(instance.id)
        if not instance.leases:
            draft.plan.actions.append(StepDown(instance, Tier.CHECKPOINTED, "recycle"))
        elif instance.state is State.READY:
            draft.plan.actions.append(Retire(instance, "it has grown, and is replaced"))
    if not going:
        _recycle_in_place([i for i in ready if not i.leases], model, now, draft)


def relieve_host(view: View, now: float, draft: Draft) -> None:
    """Where less host memory is free than is to be left, idle instances give some up, longest idle first."""
    short = view.gpus.host_short - _coming_free(view, draft.plan)
    resting = [(i, m) for m in view.models for i in _resting(m, draft.used, MAY_GO)]
    spare = [(i, m) for m in view.models for i in spare_of(m) if not i.leases]
    for instance, model in sorted([*resting, *spare], key=lambda pair: _dispensable(pair[0])):
        option = _option(instance, model, view.gpus, now)
        if short <= 0 or instance.id in draft.used or not option.tiers:
            continue
        freed = {tier: option.freed(view.gpus, tier).get(HOST, 0) for tier in option.tiers}
        to = next((tier for tier in option.tiers if freed[tier] >= short), max(freed, key=lambda tier: freed[tier]))
        if freed[to] > 0:
            draft.plan.actions.append(StepDown(instance, to, "evict"))
            draft.used.add(instance.id)
            short -= freed[to]


def follow(view: View, draft: Draft) -> None:
    """Where an image that all share goes to the archive, all instances that are nothing else go there."""
    going = {step.instance.model for step in _steps_down(draft.plan) if step.to is Tier.ARCHIVED}
    for model in view.models if going else ():
        if model.key in going and model.has_shared_image:
            others = [i for i in _resting(model, frozenset(), {State.CHECKPOINTED}) if i.id not in draft.used]
            draft.plan.actions.extend(StepDown(i, Tier.ARCHIVED, "evict") for i in others)
            draft.used.update(i.id for i in others)


def _steps_down(plan: Plan) -> list[StepDown]:
    """All of a plan, those for a wake too."""
    return [s for a in plan.actions for s in ((a,) if isinstance(a, StepDown) else getattr(a, "victims", ()))]


def _coming_free(view: View, plan: Plan) -> int:
    """The host memory that those free who are on their way down, or are about to go."""
    load = view.gpus
    moving = sum(max(0, load.now[i].get(HOST, 0) - load.after[i].get(HOST, 0)) for i in load.now)
    return moving + sum(freed_by(load, step.instance, step.to).get(HOST, 0) for step in _steps_down(plan))


def _recycle_in_place(idle: Sequence[InstanceView], model: ModelView, now: float, draft: Draft) -> None:
    """Where nobody stands in for it, and nobody is about to, it is missed for as long as its restore takes."""
    moving = any(i.state is State.WAKING or i.state in DESCENDING for i in model.instances)
    planned = any(isinstance(a, Wake) and a.model == model.key for a in draft.plan.actions)
    if not idle or moving or planned or model.waiting or now < model.restock_at:
        return
    due = (idle[0].idle_since or 0.0) + RECYCLE_AFTER_S
    if due <= now:
        draft.plan.actions.append(StepDown(idle[0], Tier.CHECKPOINTED, "recycle"))
        draft.used.add(idle[0].id)
    else:
        draft.plan.not_later_than(due)
