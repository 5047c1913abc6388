"""Who may run, who steps down, who waits: pure functions of a view and a clock reading.

`decide` returns what to do; the pool does it. Nothing here awaits, starts or changes anything, so each rule is tested
with a view and a number. It looks at what is due, at those who wait and at those in their way, in the order in which
the view has them, and so takes no longer where there are many others. All times are readings of one clock, in seconds.
"""

from __future__ import annotations

import itertools
from typing import Final

from proxy.pool.eviction import MAY_GO, Room, choose, follow, relieve, relieve_host
from proxy.pool.gpu_accounting import HOST
from proxy.pool.instance import RESTING, State
from proxy.pool.model_view import (
    InstanceView,
    ModelView,
    candidates,
    clones_wanted,
    commanded_step,
    next_step,
    recyclable,
    spare_of,
    wakes_wanted,
)  # fmt: skip
from proxy.pool.plan import Clone, Draft, Plan, Readmit, Refuse, Retire, StepDown, Unpause, Wake
from proxy.pool.turns import ask_for_room
from proxy.pool.view import View, freed_by
from proxy.tiers import Tier

_MOST_STARVED: Final = 16
"""Of those for whom there is no room, so many are looked at; it takes something to change before others would fit."""


def decide(view: View, now: float) -> Plan:
    """What to do now: operators' commands, wakes for those who wait (whose bound comes first is first), evictions
    for them, then steps due by the timetable.
    """
    draft = Draft()
    for model in view.commanded.values():
        _obey(model, draft)
    starved = _Wakes(view, now, draft).plan()
    for model in view.grown.values():
        relieve(model, now, draft)
    draft.plan.starved = starved
    if HOST in view.gpus.capacity:
        relieve_host(view, now, draft)
    follow(view, draft)
    if not starved:
        retiring = [i for instances in view.retiring.values() for i in instances]
        draft.plan.actions.extend(Readmit(i) for i in retiring if i.id not in draft.used)
    _step_down(view, now, draft)
    return draft.plan


class _Wakes:
    """The wakes of a draft, with who steps down for them."""

    def __init__(self, view: View, now: float, draft: Draft) -> None:
        self._view, self._now, self._draft = view, now, draft
        self._awake = view.awake
        self._coming_free = view.going
        """Places of those that are on their way down, and that nobody has been promised."""
        if view.rules.max_awake:
            self._coming_free = max(0, min(view.going, view.going + view.rules.max_awake - view.awake))
        self._restoring = view.restoring
        self._room = Room(view)
        for commanded in draft.plan.actions:
            if isinstance(commanded, StepDown):
                self._room.expect(freed_by(view.gpus, commanded.instance, commanded.to))
        self._starved = False
        self._looked_at = 0
        self._no_place = False
        """As many are awake as may be, and nobody can be asked to give a place up: the others need not be looked at."""

    def plan(self) -> bool:
        """Whether somebody waits for whom there is no room yet."""
        waiting = (entry[-1] for entry in self._view.needy)
        for model in itertools.chain(waiting, self._view.lacking.values()):
            self._serve(model)
            if self._no_place or self._looked_at >= _MOST_STARVED:
                break
        return self._starved

    def _serve(self, model: ModelView) -> None:
        now, used = self._now, self._draft.used
        wanted = wakes_wanted(model, now)
        if wanted <= 0:
            return
        # One that has to step down for another is woken again when it has arrived.
        given_up = sum(i.state in MAY_GO and i.commanded is None and i.id in used for i in model.instances)
        free = [c for c in candidates(model, now) if c is None or c.id not in used]
        for candidate in free[: max(0, wanted - given_up)]:
            if candidate is not None and candidate.id in used:
                break  # it has just made room for one that is warmer
            if not self._wake(model, candidate):
                self._looked_at += 1
                break

    def _wake(self, model: ModelView, candidate: InstanceView | None) -> bool:
        """Plan the wake of a candidate; False if that has to wait, and with it the colder ones."""
        view, draft, room = self._view, self._draft, self._room
        restores = candidate is None or candidate.tier >= Tier.CHECKPOINTED
        if restores and 0 < view.rules.max_restores <= self._restoring:
            return False  # the end of one that is under way is a reason to decide anew
        full = bool(view.rules.max_awake) and self._awake >= view.rules.max_awake
        extra = room.wanted(model, candidate)
        if full and self._coming_free > 0:
            self._coming_free -= 1
            self._starved = self._starved or model.since is not None
            return False
        if not full and room.comes_free(extra):
            room.promise(extra)
            draft.give(extra)
            return False
        choice = choose(view, model, candidate, room.balance(extra), self._now, draft, full=full)
        if not choice.enough and (choice.may_come or model.since is None):
            self._starved = self._starved or model.since is not None
            asked = ask_for_room(view, model, candidate, self._now, draft, choice.missing)
            self._no_place = full and not asked and model.since is not None
            return False
        # What is missing of a GPU may be wrong, and costs this engine only; the OOM killer takes any.
        if HOST in choice.missing.keys() & extra.keys() and model.key not in view.gpus.guessed:
            draft.plan.actions.append(Refuse(model.key, extra[HOST], choice.missing[HOST]))
            return False
        draft.used.update(victim.instance.id for victim in choice.victims)
        draft.give(extra)
        if candidate is not None and candidate.state is State.PAUSED:
            return self._unpause(candidate, extra, choice.victims, full=full)
        room.take(extra, choice.freed)
        if not full:
            self._awake += 1
        self._restoring += restores
        draft.plan.actions.append(Wake(model.key, candidate, choice.victims))
        if candidate is not None:
            draft.used.add(candidate.id)
        return True

    def _unpause(
        self, candidate: InstanceView, extra: dict[str, int], victims: tuple[StepDown, ...], *, full: bool
    ) -> bool:
        """Have a paused one go on, or first have its room made."""
        self._draft.used.add(candidate.id)
        if victims:
            self._draft.plan.actions.extend(victims)
            for victim in victims:
                self._room.expect(freed_by(self._view.gpus, victim.instance, victim.to))
            self._room.promise(extra)
            self._starved = True
            return False
        self._room.take(extra, {})
        self._awake += not full
        self._draft.plan.actions.append(Unpause(candidate))
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
    if view.waiting_models or (view.rules.max_awake and view.awake >= view.rules.max_awake):
        return False
    if not view.gpus.capacity.keys() - {HOST} and key not in view.gpus.needs:
        return True
    need = view.gpus.needs.get(key)
    return not view.awake if need is None else Room(view).holds(need)


def _step_down(view: View, now: float, draft: Draft) -> None:
    """What is due by the timetables, and when something is next; clones that may be prepared."""
    models: dict[int, ModelView] = {}
    indexes = (view.due,) if view.quick_wakes else (view.due, view.unhurried)
    for index in indexes:
        for entry in index.up_to(now):
            models.setdefault(id(entry[-1]), entry[-1])
    for model in models.values():
        draft.plan.actions.extend([Clone(model.key)] * clones_wanted(model, now))
        _reap(model, now, draft, view)
    for index in indexes:
        for entry in index.after(now):
            if entry[-2] is None or entry[-2].id not in draft.used:
                draft.plan.not_later_than(entry[0])
                break


def _reap(model: ModelView, now: float, draft: Draft, view: View) -> None:
    if model.waiting:
        return
    keep = {i.id for i in model.instances if i.state is State.READY} - {i.id for i in spare_of(model)}
    for instance in model.instances:
        step = None
        if instance.id not in keep and instance.id not in draft.used:
            step = next_step(instance, model, view.rules, hurried=view.quick_wakes > 0)
        if step is None:
            continue
        tier, due = step
        if due <= now and tier < Tier.CHECKPOINTED and recyclable(instance, model, now):
            draft.plan.actions.append(StepDown(instance, Tier.CHECKPOINTED, "recycle"))
        elif due <= now:
            draft.plan.actions.append(StepDown(instance, tier, "evict" if instance.evicted else "idle"))
        else:
            draft.plan.not_later_than(due)
