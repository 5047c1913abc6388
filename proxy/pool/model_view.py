"""One model and its instances as values, and what can be said of them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from proxy.pool.instance import DESCENDING, RESTING, TIER_OF, State
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.pool.instance import Instance

STEPS: Final = (Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED, Tier.ARCHIVED, Tier.STOPPED)
STANDING_STILL: Final = frozenset({State.PAUSING, State.PAUSED, State.UNPAUSING})
"""The states in which requests are held that get nothing."""
_OF_USE: Final = frozenset({*RESTING, *DESCENDING, *STANDING_STILL, State.RETIRING, State.WAKING}) - {State.NEW}
"""The states in which an instance answers requests, or can be brought to do so."""

_AHEAD: Final = 1 / 6
_MOST_AHEAD: Final = 0.5

PolicyName: TypeAlias = Literal["turns", "fifo", "lru"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says of who runs when; times in seconds."""

    policy: PolicyName = "turns"
    max_awake: int = 0
    """How many instances may be awake at once; 0 is no limit."""
    quantum_s: float = 0.5
    """How long an instance with one request runs at least when others need its place."""
    switch_after_s: float = 10.0
    """How long a request waits before an instance that cannot pause is closed for it."""
    ttl_s: float = 300.0
    """With the policy `lru`: how long an idle instance stays ready."""
    max_restores: int = 0
    """How many may be started, or restored from images, at once; 0 is no limit."""


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
    turn_since: float | None = None
    """When it was brought up last: its turn began."""
    unanswered: int = 0
    """Of its requests, streams that have got no token yet."""
    can_pause: bool = False
    """Its requests can stand still while another model runs."""
    paused_since: float | None = None
    on_hold: bool = False
    """An operator had it paused, and it stays so until he says otherwise."""
    keep_until: float = -math.inf
    unwanted: bool = False

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
        instance.turn_since,
        unanswered=instance.unanswered,
        can_pause=instance.can_pause,
        paused_since=instance.paused_since,
        on_hold=instance.on_hold,
        keep_until=instance.keep_until,
        unwanted=instance.unwanted,
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
    head_start_s: float = 0.0
    """How much earlier than it came the one to be served next counts, for its priority."""
    max_wait_s: float = math.inf
    """How long a request for it should wait at most for its turn."""
    evictable: bool = True
    """An instance that is up may step down, or be paused, for another model."""
    wake_s: Mapping[Tier, float] = field(default_factory=dict)
    """What a wake from each tier takes, as measured."""
    pause_s: float = 0.0
    unpause_s: float = 0.0
    """What it takes to pause one of its instances, and to have it go on, as measured."""
    worth_s: float = 0.0
    """How much later its instances count as last used, for how often they are, and what bringing them back takes."""

    @property
    def paused(self) -> list[InstanceView]:
        """The instances whose requests stand still and may go on, the one that has for longest first."""
        paused = [i for i in self.instances if i.state is State.PAUSED and not i.on_hold]
        return sorted(paused, key=lambda i: i.paused_since or 0.0) if len(paused) > 1 else paused

    @property
    def since(self) -> float | None:
        """Since when somebody waits for it, in a queue or paused; None when nobody does."""
        begun = [] if self.oldest_wait is None else [self.oldest_wait]
        begun += [i.paused_since or 0.0 for i in self.paused if i.leases]
        return min(begun, default=None)

    @property
    def latest(self) -> float:
        """When it should be served at the latest: who comes first here is served first.

        Many who wait bring it forward, by half the bound at most: one switch is for all of them.
        """
        at = (self.since or 0.0) - self.head_start_s
        if self.max_wait_s == math.inf:
            return at
        return at + self.max_wait_s * (1 - min(_MOST_AHEAD, _AHEAD * math.log1p(self.waiting)))

    @property
    def is_up(self) -> bool:
        """Whether an instance takes requests."""
        return any(i.state is State.READY for i in self.instances)


def kept_ready(model: ModelView) -> int:
    return 0 if model.draining else model.min_ready


def vacancies(model: ModelView) -> int:
    """How many instances there may be more."""
    return max(0, model.max_instances - len(model.instances))


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
    if len(up) > 1:
        up.sort(key=lambda i: (i.state is not State.RETIRING, i.leases, i.idle_since or math.inf))
    return up[: max(0, len(up) + coming - kept_ready(model))]


def dispensable(instance: InstanceView, model: ModelView) -> tuple[bool, float]:
    """Sorts the instances that would be missed least first: not soon needed, and cheap to bring back."""
    return instance.state is not State.RETIRING, (instance.idle_since or 0.0) + model.worth_s


def wakes_wanted(model: ModelView, now: float) -> int:
    """How many more instances of a model are needed for those who wait, and for `min_ready`.

    At least those that somebody waits for and for no other, which `candidates` has first, and those that are paused.
    """
    # One on its way down is woken again as soon as it has arrived: sooner than another could be.
    coming = sum(
        i.state in (State.WAKING, State.UNPAUSING, State.PAUSING) or i.state in DESCENDING or _goes_down_now(i)
        for i in model.instances
    )
    up = sum(i.state is State.READY and not recyclable(i, model, now) for i in model.instances)
    # Those with streams that have got no token yet may have room, but take no more for a moment.
    held_back = sum(
        model.max_concurrency - i.leases for i in model.instances if i.state is State.READY and i.unanswered
    )
    for_any = max(0, model.waiting - sum(model.wanted.values()) - held_back)
    for_queue = math.ceil(for_any / model.max_concurrency) - coming
    for_minimum = kept_ready(model) - coming - up if now >= model.restock_at else 0
    in_person = sum(i.id in model.wanted for i in _wakeable(model))
    return max(in_person, for_queue, for_minimum, len(model.paused))


def _goes_down_now(instance: InstanceView) -> bool:
    return instance.commanded not in (None, Tier.STOPPED) and instance.state in RESTING and not instance.leases


def candidates(model: ModelView, now: float) -> list[InstanceView | None]:
    """What could be brought up for a model: paused ones, then others, cheapest first; None stands for a new one."""
    backs_off = now < model.start_at
    usable = [i for i in _wakeable(model) if not backs_off or i.id not in model.failing]
    resting = sorted(usable, key=lambda i: (i.id not in model.wanted, i.tier, i.id)) if len(usable) > 1 else usable
    return [*model.paused, *resting, *[None] * (0 if backs_off else vacancies(model) - clones_wanted(model, now))]


def is_failing(model: ModelView, now: float) -> bool:
    """Whether no instance can serve, and none may be started because the last start failed."""
    return now < model.start_at and not any(i.state in _OF_USE and i.id not in model.failing for i in model.instances)


def _wakeable(model: ModelView) -> list[InstanceView]:
    return [i for i in model.instances if i.state in RESTING and i.state is not State.READY and i.commanded is None]


def clones_wanted(model: ModelView, now: float) -> int:
    """How many instances to prepare from the golden checkpoint: they cost no memory until they are woken."""
    return vacancies(model) if model.has_shared_image and now >= model.restock_at else 0


def next_step(
    instance: InstanceView, model: ModelView, rules: Rules, *, hurried: bool = False
) -> tuple[Tier, float] | None:
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
            behind = (instance.evicted or instance.unwanted) and tier is Tier.SUSPENDED and not hurried
            at_once = behind or (instance.unwanted and here is Tier.READY)
            after_s = 0.0 if at_once else model.timetable[tier]
            if rules.policy == "lru" and not at_once:
                after_s = rules.ttl_s if here is Tier.READY else max(after_s, rules.ttl_s)
            kept = instance.keep_until if here is Tier.READY else -math.inf
            return tier, max(since + after_s, kept, instance.postponed.get(tier, -math.inf))
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


def bring_back_s(instance: InstanceView | None, model: ModelView) -> float:
    """What it takes to have an instance serve: to wake it, to unpause it, or to start a new one."""
    if instance is not None and instance.state is State.PAUSED:
        return model.unpause_s
    tier = Tier.STOPPED if instance is None else instance.tier
    return model.wake_s.get(tier, 0.0)
