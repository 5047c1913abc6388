"""What a request for a model could count on here, if it came now: for the other hosts of a fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from proxy.pool.instance import RESTING, State
from proxy.pool.model import tier_found
from proxy.pool.model_view import is_failing
from proxy.pool.state import Phase
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState

_SERVE_S: Final = 2.0
"""How long a request has its place in an engine, where its answer is not known to be short or long."""
_AWAKE: Final = frozenset({State.READY, State.WAKING, State.UNPAUSING, State.RETIRING})


class Offered(NamedTuple):
    """Times in seconds."""

    tier: Tier
    """The tier that it would find."""
    wait_s: float
    """For how long it would wait: others before it, a wake, making room."""
    room: int
    """How many such requests there is room for."""
    queue: int
    """How many wait already."""
    hurt_s: float
    """What it takes to bring back who makes room for it."""


def offered(state: PoolState, key: str) -> Offered | None:
    """What is offered for the model of a key; None where nothing is: it drains, or cannot be started for now."""
    model = state.models.get(key)
    if model is None or model.draining or state.draining or state.phase is not Phase.SERVING:
        return None
    if model.last_failure is not None and is_failing(model.view(), state.clock()):
        return None
    queue, each = len(model.queue), model.settings.max_concurrency
    ready = [i for i in model.instances.values() if i.state is State.READY and i.command is None]
    room = sum(max(0, each - i.leases) for i in ready) - queue
    if room > 0:
        return Offered(Tier.READY, 0.0, room, queue, 0.0)
    behind_s = (queue + 1) * _SERVE_S / (each * max(1, len(ready)))
    if ready and len(model.instances) >= model.settings.max_instances:
        return Offered(Tier.READY, behind_s, 0, queue, 0.0)
    wake_s, tier = state.estimate_s(key), tier_found(model.instances.values())
    if ready:  # another instance could be had
        wake_s, tier = min((state.costs.estimate_s(key, t), t) for t in _others(model))
    if any(i.state in (State.WAKING, State.UNPAUSING) for i in model.instances.values()):
        return Offered(tier, wake_s + queue // each * _SERVE_S, max(0, each - queue), queue, 0.0)
    wait_s, hurt_s = _making_room(state, model)
    if ready and behind_s <= wake_s + wait_s:
        return Offered(Tier.READY, behind_s, 0, queue, 0.0)
    return Offered(tier, wake_s + wait_s + queue // each * _SERVE_S, max(0, each - queue), queue, hurt_s)


def _others(model: Model) -> list[Tier]:
    """The tiers of its instances that rest, and of one that would be started."""
    resting = [i.tier for i in model.instances.values() if i.state in RESTING and i.state is not State.READY]
    return resting or [Tier.STOPPED]


def _making_room(state: PoolState, model: Model) -> tuple[float, float]:
    """How long it takes until another instance may be awake, and what those lose that step down for it."""
    most = state.rules.max_awake
    awake = [i for m in state.everyone() for i in m.instances.values() if i.state in _AWAKE]
    if not most or len(awake) < most:
        return 0.0, 0.0
    idle = [i for i in awake if i.state is State.READY and not i.leases and i.model != model.key]
    if not idle:
        return min(_SERVE_S, model.settings.queue_timeout), 0.0
    last = min(idle, key=lambda i: i.idle_since or 0.0)
    return 0.0, state.costs.estimate_s(last.model, Tier.SLEEPING)
