"""What the policy sees: the pool as values, copied in one moment."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proxy.pool import gpu_accounting
from proxy.pool.instance import TIER_OF, State
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.pool.gpu_accounting import GpuLoad
    from proxy.pool.instance import Instance

STEPS: Final = (Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED, Tier.ARCHIVED, Tier.STOPPED)


@dataclass(slots=True, eq=False)
class InstanceView:
    """One instance as it was; what each field means says `Instance`. Not frozen, for one is made of each every time."""

    id: str
    model: str
    state: State
    leases: int = 0
    idle_since: float | None = None
    waking_from: Tier | None = None
    commanded: Tier | None = None
    evicted: bool = False
    barred: set[Tier] = field(default_factory=set)
    postponed: dict[Tier, float] = field(default_factory=dict)

    @property
    def tier(self) -> Tier:
        """The tier a request would find."""
        if self.state is State.WAKING:
            return Tier.STOPPED if self.waking_from is None else self.waking_from
        return TIER_OF[self.state]


def view_of(instance: Instance) -> InstanceView:
    """An instance as it is now."""
    return InstanceView(
        instance.id,
        instance.model,
        instance.state,
        instance.leases,
        instance.idle_since,
        instance.waking_from,
        instance.commanded,
        instance.evicted,
        set(instance.barred),
        dict(instance.postponed),
    )


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as the policy sees it."""

    key: str
    instances: Sequence[InstanceView]
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
    """It takes no new requests; nothing is kept ready that nobody waits for."""
    restock_at: float = -math.inf
    """When an engine may be started or cloned that nobody waits for; later than now after one that failed."""
    start_at: float = -math.inf
    """When an engine may be started whoever waits; likewise."""
    failing: frozenset[str] = frozenset()
    """The instances whose last wake failed down to its cold start: until `start_at` they are not woken."""
    has_shared_image: bool = False
    """A golden checkpoint exists, from which further instances can be cloned."""
    grown: frozenset[str] = frozenset()
    """Instances that have grown on the GPU and have an image to be replaced from."""
    wanted: Mapping[str, int] = field(default_factory=dict)
    """InstanceView → how many wait for it and no other, since it holds what they refer to."""


@dataclass(frozen=True, slots=True)
class View:
    """Everything a decision depends on, beside the time."""

    models: Sequence[ModelView]
    max_awake: int = 0
    """How many instances may be awake at once; 0 is no limit."""
    switch_after_s: float = 10.0
    gpus: GpuLoad = gpu_accounting.EMPTY


def kept_ready(model: ModelView) -> int:
    return 0 if model.draining else model.min_ready


def possible(instance: InstanceView, tier: Tier, model: ModelView) -> bool:
    if tier is Tier.ARCHIVED and instance.state is not State.CHECKPOINTED:
        return False  # only an image can be archived
    return tier is Tier.STOPPED or (tier in model.tiers and tier not in instance.barred)


def recyclable(instance: InstanceView, model: ModelView, now: float) -> bool:
    """Whether its processes should end, so that the next wake restores fresh ones."""
    to = Tier.CHECKPOINTED
    return (
        instance.id in model.grown
        and instance.tier < to
        and possible(instance, to, model)
        and now >= instance.postponed.get(to, -math.inf)
    )


def spare_of(model: ModelView, *, coming: int = 0) -> list[InstanceView]:
    """The ready instances above `min_ready`, those that would be missed least first; `coming`: as many more are up."""
    up = [i for i in model.instances if i.state in (State.READY, State.RETIRING)]
    up.sort(key=lambda i: (i.state is not State.RETIRING, i.leases, i.idle_since or math.inf))
    return up[: max(0, len(up) + coming - kept_ready(model))]
