"""When a busy instance gives its place up: at the end of its turn, or sooner where somebody's bound would be broken.

The pool is a polling system with switch costs: one server, many queues. Three ways to serve them can be chosen.
`turns`: a busy instance runs for a turn before it is paused (or closed, where it cannot be); whose bound comes first is
next. `fifo`: it is closed as soon as somebody waits. `lru`: never.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from proxy.pool import gpu_accounting
from proxy.pool.instance import State
from proxy.pool.model_view import bring_back_s, spare_of
from proxy.pool.plan import Pause, Retire
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.pool.gpu_accounting import Bytes
    from proxy.pool.model_view import InstanceView, ModelView, Rules
    from proxy.pool.plan import Draft
    from proxy.pool.view import View

_WORTH: Final = 0.2
"""A turn is at least this part of what it costs to have another run and to come back."""
_STREAMS: Final = 25
"""So many running requests double a turn: a batch serves them at little more than the price of one."""
_MOST_OF_WAIT: Final = 0.25
"""A turn is no longer than this part of the time that somebody may wait."""
_WHILE_ASKED: Final = 0.5
"""For this part of that time a turn goes on while its own model has requests without a token: it is there already."""
_PATIENCE: Final = 0.1
"""For this part of that time one whose turn is over reads the prompts that it has."""
_AT_ONCE: Final = 8
"""So many streams without a token keep an engine busy: it reads prompts a few thousand tokens at a time."""
_BEHIND: Final = 1 / 3
_LONG: Final = 4


def most_unanswered(view: View, key: str) -> float:
    """How many streams without a token an instance may have at once, so that its next one goes to it.

    While others wait for a place, a prompt that the engine could not read before its turn ends waits here instead:
    here the shorter ones come first, and its bound is known.
    """
    return _AT_ONCE if view.rules.policy == "turns" and view.others_starve(key) else math.inf


def behind_s(size: float, usual: float, max_wait_s: float) -> float:
    """How much later than it came a request counts among others of its model, for its length.

    Up to a third of the bound, which one has that is four times as long as usual: so that many short ones do not wait
    for a few long ones, which are served in time all the same.
    """
    if usual <= 0 or max_wait_s == math.inf:
        return 0.0
    return _BEHIND * max_wait_s * min(1.0, size / usual / _LONG)


def turn_s(
    rules: Rules, instance: InstanceView, model: ModelView, needy: ModelView, candidate: InstanceView | None
) -> float:
    """How long an instance runs at least while others wait.

    It grows with what it costs to switch, and with the requests that it runs: so the share of time that goes to
    switches falls as the load rises, and no load that the engines could serve makes the queues grow for ever.
    """
    is_started = candidate is not None and candidate.tier < Tier.STOPPED  # a start from nothing does not come again
    switch_s = model.pause_s + model.unpause_s + (bring_back_s(candidate, needy) if is_started else 0.0)
    return max(rules.quantum_s, _WORTH * switch_s) * (1 + instance.leases / _STREAMS)


def turn_ends(
    rules: Rules, instance: InstanceView, model: ModelView, needy: ModelView, candidate: InstanceView | None
) -> float:
    """When a busy instance is to give its place up to a model that waits."""
    since = needy.since
    if since is None or rules.policy == "lru":
        return math.inf
    if rules.policy == "fifo":
        return since
    begun = instance.turn_since if instance.turn_since is not None else -math.inf
    least = begun + rules.quantum_s
    if instance.can_pause:
        own_s = min(turn_s(rules, instance, model, needy, candidate), needy.max_wait_s * _MOST_OF_WAIT)
        asked = instance.unanswered or (model.waiting and instance.state is State.READY)
        return max(least, begun + own_s, begun + needy.max_wait_s * _WHILE_ASKED if asked else -math.inf)
    slack_s = needy.max_wait_s - bring_back_s(candidate, needy)
    bound = since + slack_s if slack_s > 0 else math.inf  # else it is broken anyway, as by a cold start
    return max(least, min(bound, since + rules.switch_after_s))


def ask_for_room(
    view: View, needy: ModelView, candidate: InstanceView | None, now: float, draft: Draft, missing: Bytes
) -> bool:
    """Pause or close the busy instance whose turn ends first, once it has ended.

    Where GPU memory is missing: as many as hold that much. Returns whether any does.
    """
    if needy.since is None:
        return False
    busy = [
        (turn_ends(view.rules, i, m, needy, candidate), i.leases, i)
        for i, m in _busy(view, needy, candidate)
        if i.id not in draft.used
    ]
    busy.sort(key=lambda entry: entry[:2])
    closed = [i for _, _, i in busy if i.state is State.RETIRING and not i.can_pause]
    chosen: list[InstanceView] = []
    if not missing and closed:
        return False
    if missing:
        for instance in closed:
            missing = gpu_accounting.beyond(missing, view.gpus.after.get(instance.id, gpu_accounting.NOTHING))
        if not missing:
            return False
    for due, _, instance in busy:
        held = view.gpus.after.get(instance.id, gpu_accounting.NOTHING)
        if instance in closed or (missing and not missing.keys() & held.keys()):
            continue
        if due > now:
            if due < math.inf:
                draft.plan.not_later_than(due)
            break
        if _reads_on(view.rules, instance, due + needy.max_wait_s * _PATIENCE, now, draft):
            break
        chosen.append(instance)
        missing = gpu_accounting.beyond(missing, held)
        if not missing:
            break
    draft.used.update(i.id for i in chosen)
    pauses = view.rules.policy == "turns"
    draft.plan.actions.extend(
        Pause(i) if pauses and i.can_pause else Retire(i) for i in chosen if pauses or i.state is not State.RETIRING
    )
    return bool(chosen)


def _reads_on(rules: Rules, instance: InstanceView, until: float, now: float, draft: Draft) -> bool:
    """Whether one whose turn is over is closed first, and paused when it has read the prompts that it has."""
    if rules.policy != "turns" or not instance.can_pause or not instance.unanswered or now >= until:
        return False
    draft.used.add(instance.id)
    draft.plan.not_later_than(until)
    if instance.state is not State.RETIRING:
        draft.plan.actions.append(Retire(instance))
    return True


def _busy(view: View, needy: ModelView, candidate: InstanceView | None) -> Iterator[tuple[InstanceView, ModelView]]:
    """The busy instances that may make room for a candidate.

    Those of its own model answer just as well, unless it is the candidate itself that is waited for.
    """
    for entry in view.busy:
        if entry[-1].key != needy.key:
            yield entry[-2], entry[-1]
    if candidate is not None and candidate.id in needy.wanted:
        for instance in spare_of(needy, coming=1):
            if instance.leases and instance.id not in needy.wanted:
                yield instance, needy
