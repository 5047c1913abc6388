"""Who makes room: for a wake, for the host, and for an engine that replaces one that has grown.

Pure functions of a view, as `policy`, which calls them.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proxy.pool import gpu_accounting
from proxy.pool.gpu_accounting import HOST
from proxy.pool.instance import DESCENDING, State
from proxy.pool.model_view import STEPS, dispensable, kept_ready, possible, recyclable, spare_of
from proxy.pool.plan import Plan, Retire, StepDown, Wake
from proxy.pool.view import BUSY, IDLE, NOW, SOON, freed_by, merged
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from proxy.pool.gpu_accounting import Bytes, GpuLoad
    from proxy.pool.model_view import InstanceView, ModelView
    from proxy.pool.plan import Draft
    from proxy.pool.view import View

MAY_GO: Final = frozenset({State.SLEEPING, State.SUSPENDED, State.CHECKPOINTED})
"""Beside the awake ones, those that hold host memory, with their processes or their image."""

RECYCLE_AFTER_S: Final = 10.0
"""How long an instance of `min_ready` that no other can stand in for is idle before it is gone for a restore."""


class Room:
    """The GPU memory that is free while a plan is made: now, and when all that moves has arrived."""

    def __init__(self, view: View) -> None:
        self._load = view.gpus
        self._now = self._free(view.sums[NOW])
        self._soon = self._free(view.sums[SOON])

    def _free(self, held: Mapping[str, int]) -> dict[str, int]:
        free = dict(self._load.capacity)
        for uuid, count in held.items():
            free[uuid] = free.get(uuid, 0) - count
        return free

    def wanted(self, model: ModelView, candidate: InstanceView | None) -> dict[str, int]:
        """What a wake needs beyond what the candidate holds; nothing where that is not known."""
        held = (
            self._load.now.get(candidate.id, gpu_accounting.NOTHING)
            if candidate is not None
            else gpu_accounting.NOTHING
        )
        free = {uuid: min(count, self._soon.get(uuid, 0)) for uuid, count in self._now.items()}
        extra = gpu_accounting.beyond(self._load.need_of(model.key, candidate, free), held)
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
    awake = next((_option(i, m, load, now) for i, m in _awake(view, needy, candidate, draft)), None) if full else None
    if full and awake is None:
        return Choice(enough=False, may_come=True)
    chosen = [awake] if awake is not None else []
    tiers = {o.instance.id: o.tiers[-1] for o in chosen}
    lacking = _lacking(balance, chosen, tiers, load)
    in_person = candidate is not None and candidate.id in needy.wanted
    beyond = gpu_accounting.NOTHING if in_person else gpu_accounting.beyond(lacking, view.sums[IDLE])
    if beyond and not gpu_accounting.beyond(beyond, _busy_bytes(view, needy, draft)):
        # All the idle ones together do not hold that much; nobody goes in vain.
        return Choice(enough=False, missing=beyond, may_come=True)
    for instance, model in _idle(view, needy, candidate, draft) if lacking else ():
        if awake is not None and instance is awake.instance:
            continue
        option = _option(instance, model, load, now)
        freed_last = option.freed(load, option.tiers[-1])
        if any(freed_last.get(place, 0) > 0 for place in lacking):
            chosen.append(option)
            tiers[instance.id] = option.tiers[-1]
            lacking = _lacking(balance, chosen, tiers, load)
            if not lacking:
                break
    if not lacking:
        for option in chosen[1:] if full else list(chosen):
            if not _lacking(balance, [o for o in chosen if o is not option], tiers, load):
                chosen.remove(option)
    # Who was used last stays as warm as can be.
    for option in reversed(chosen):
        for tier in option.tiers:
            tiers[option.instance.id] = tier
            if _lacking(balance, chosen, tiers, load) == lacking:
                break
    freed: Bytes = {}
    for option in chosen:
        freed = gpu_accounting.plus(freed, option.freed(load, tiers[option.instance.id]))
    victims = tuple(StepDown(o.instance, tiers[o.instance.id], "recycle" if o.recycle else "evict") for o in chosen)
    may_come = bool(lacking) and not gpu_accounting.beyond(lacking, _busy_bytes(view, needy, draft))
    return Choice(victims, freed, not lacking, lacking, may_come)


def _lacking(balance: Bytes, chosen: Iterable[Option], tiers: Mapping[str, Tier], load: GpuLoad) -> dict[str, int]:
    """What is still missing when these have stepped down."""
    left = dict(balance)
    for option in chosen:
        for place, count in option.freed(load, tiers[option.instance.id]).items():
            left[place] = left.get(place, 0) - count
    return {place: count for place, count in left.items() if count > 0}


def _awake(
    view: View, needy: ModelView, candidate: InstanceView | None, draft: Draft
) -> Iterator[tuple[InstanceView, ModelView]]:
    """The idle ready instances that may make room, those that would be missed least first.

    Those of its own model answer just as well, unless it is the candidate itself that is waited for.
    """
    own: list[tuple[InstanceView, ModelView]] = []
    if candidate is not None and candidate.id in needy.wanted:
        up = [i for i in spare_of(needy, coming=1) if i.id not in needy.wanted and not i.leases]
        own = [(i, needy) for i in up]
    others = ((i, m) for i, m in merged(view.spare) if m.key != needy.key)
    for instance, model in _in_order(others, own) if own else others:
        if instance.id not in draft.used:
            yield instance, model


def _idle(
    view: View, needy: ModelView, candidate: InstanceView | None, draft: Draft
) -> Iterator[tuple[InstanceView, ModelView]]:
    """The idle instances that may make room, likewise: awake ones, and those that sleep."""
    indexes = (view.sleeping, view.colder) if HOST in view.gpus.capacity else (view.sleeping,)
    resting = ((i, m) for i, m in merged(*indexes) if i is not candidate and _may_go(i, m, draft.used))
    return _in_order(_awake(view, needy, candidate, draft), resting)


def _in_order(*sources: Iterable[tuple[InstanceView, ModelView]]) -> Iterator[tuple[InstanceView, ModelView]]:
    return heapq.merge(*sources, key=lambda pair: dispensable(*pair))


def _may_go(instance: InstanceView, model: ModelView, used: Container[str]) -> bool:
    """Whether one that rests may give up what it holds; an image that all share only while nobody wakes from it."""
    if instance.id in used or instance.state not in MAY_GO or instance.commanded is not None:
        return False
    needed = model.has_shared_image and (model.waiting or any(i.id in used for i in model.instances))
    return not (needed and instance.state is State.CHECKPOINTED)


def _busy_bytes(view: View, needy: ModelView, draft: Draft) -> Bytes:
    """What those hold that cannot step down now, but may some day."""
    total: Bytes = gpu_accounting.plus(view.sums[BUSY], draft.given)
    spare = {i.id for i in spare_of(needy)}
    for instance in needy.instances:
        # One's own do not make room, but those who wait are served by them.
        own = instance.state in (State.READY, State.RETIRING) and instance.id not in draft.used
        if own and not (instance.leases and instance.id in spare):
            total = gpu_accounting.plus(total, view.gpus.after.get(instance.id, gpu_accounting.NOTHING))
    return total


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
    resting = (pair for pair in merged(view.sleeping, view.colder) if _may_go(*pair, draft.used))
    for instance, model in _in_order(merged(view.spare), resting) if short > 0 else ():
        if short <= 0:
            break
        option = _option(instance, model, view.gpus, now)
        if instance.id in draft.used or not option.tiers:
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
    for model in (m for key in going for m in view.called(key)):
        if model.has_shared_image:
            others = [
                i for i in model.instances
                if i.state is State.CHECKPOINTED and i.commanded is None and i.id not in draft.used
            ]  # fmt: skip
            draft.plan.actions.extend(StepDown(i, Tier.ARCHIVED, "evict") for i in others)
            draft.used.update(i.id for i in others)


def _steps_down(plan: Plan) -> list[StepDown]:
    """All of a plan, those for a wake too."""
    return [s for a in plan.actions for s in ((a,) if isinstance(a, StepDown) else getattr(a, "victims", ()))]


def _coming_free(view: View, plan: Plan) -> int:
    """The host memory that those free who are on their way down, or are about to go."""
    stepping = sum(freed_by(view.gpus, s.instance, s.to).get(HOST, 0) for s in _steps_down(plan))
    return view.host_moving + stepping


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
