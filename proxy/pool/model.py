"""A model with all that the pool keeps for it, and the small questions about models and their instances."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from proxy.errors import EngineError, Fault, PortTakenError, RuntimeFailure, WakeFailedError
from proxy.pool import wake_failure
from proxy.pool.costs import Costs
from proxy.pool.demand import Demand
from proxy.pool.image import Image, Place
from proxy.pool.instance import State, best_tier, holding
from proxy.pool.model_view import ModelView, view_of
from proxy.pool.observed import Observed
from proxy.pool.wait_queue import WaitQueue
from proxy.runtime.base import Tiers
from proxy.runtime.ladder_probes import LadderProbes
from proxy.telemetry.overdue import GIVE_UP_S
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping

    from proxy.config.model import ModelSettings
    from proxy.config.settings import Settings
    from proxy.engine.client import EngineClient
    from proxy.pool.gpu_accounting import GpuAccounting
    from proxy.pool.instance import Instance
    from proxy.pool.memory_accounting import MemoryAccounting
    from proxy.pool.wait_queue import Waiter
    from proxy.pool.wake_failure import WakeFailure
    from proxy.runtime.base import EngineProcess, ImageFacts, Outdated, Runtime

log = logging.getLogger("warmpool.pool")

T = TypeVar("T")

_COUNTED = 32
_LEFT_RUNNING = frozenset(
    {
        State.READY,
        State.RETIRING,
        State.PAUSING,
        State.PAUSED,
        State.UNPAUSING,
        State.SLEEPING,
        State.SUSPENDED,
    }
)


@dataclass(slots=True, eq=False)
class Model(Observed):
    """A model with everything the pool keeps for it."""

    key: str
    settings: ModelSettings
    served_name: str
    runtime: Runtime
    gpu_accounting: GpuAccounting
    memory_accounting: MemoryAccounting
    probes: LadderProbes = field(default_factory=LadderProbes)
    costs: Costs = field(default_factory=Costs)
    demand: Demand = field(default_factory=Demand)
    instances: dict[str, Instance] = field(default_factory=dict)
    image: Image = field(default_factory=Image)
    """The golden checkpoint, where the runtime shares images."""
    queue: WaitQueue[Waiter] = field(default_factory=WaitQueue)
    """Ranked by when they came, less the head start of their priority; later for their length."""
    wanted: Counter[str] = field(default_factory=Counter)
    """Instance → how many of those who wait would have it rather than another."""
    failed_wakes: int = 0
    """In a row."""
    restock_at: float = -math.inf
    start_at: float = -math.inf
    """When an engine may be started again, whoever waits; later than now after a start that failed."""
    failing: set[str] = field(default_factory=set)
    """The instances whose last wake failed down to its cold start."""
    last_failure: WakeFailure | None = None
    reseed_gap: str | None = None
    """Why its engines repeat random numbers after a restore, if they do."""
    max_model_len: int | None = None
    """How many tokens a prompt with its answer may have, as an engine of it said; kept with its checkpoint."""
    draining: bool = False
    """An operator drained it: it takes no new requests."""
    discarding: bool = False
    """Its golden checkpoint goes with its last instance."""
    leaving: bool = False
    """The configuration has it no more, or with other engines: its instances go after their last request."""
    evictable: bool = True
    """Its instances may make room for other models now."""
    coming: bool = False
    """Its one instance is made ready to take over from a model of the same key; nobody else may touch it."""
    outdated: Outdated | None = None
    """What has changed since its engines were started; they serve until others can take over."""
    renewal: str = ""
    """What becomes of those others, for people."""
    on_change: Callable[[], object] | None = None

    def tiers(self) -> Tiers:
        """Those that its runtime offers, without those that its engines were seen not to come back from."""
        tiers, missing = self.runtime.tiers(), self.probes.missing(self.key)
        if not missing:
            return tiers
        return Tiers(tiers.offered - missing.keys(), {**missing, **tiers.missing})

    def learn(self, details: Mapping[str, Any]) -> None:
        """Take over what is known of its engines with a checkpoint."""
        self.max_model_len = details.get("max_model_len") or self.max_model_len

    @property
    def timetable(self) -> Mapping[Tier, float]:
        return self.settings.idle.timetable()

    @property
    def max_wait_s(self) -> float:
        """How long a request for it should wait at most for its turn."""
        return min(self.settings.max_wait, self.settings.queue_timeout)

    def view(self) -> ModelView:
        first = self.queue.first()
        # Some may have been cancelled in this moment; among many they make no difference.
        many = len(self.queue) > _COUNTED
        from_tier = max(Tier.SUSPENDED, best_tier(self.instances.values()))
        waiting = len(self.queue) if many else sum(not w.granted.done() for w in self.queue)
        return ModelView(
            key=self.key,
            instances=[view_of(i) for i in self.instances.values()],
            tiers=self.tiers().offered,
            timetable={} if self.coming else self.timetable,
            max_instances=0 if self.leaving or self.coming else self.settings.max_instances,
            min_ready=0 if self.leaving or self.coming else self.settings.min_ready,
            max_concurrency=self.settings.max_concurrency,
            waiting=waiting,
            oldest_wait=first.since if waiting and first is not None else None,
            draining=self.draining,
            restock_at=self.restock_at,
            start_at=self.start_at,
            failing=frozenset(self.failing),
            has_shared_image=self.runtime.shares_images and self.image.present and not self.discarding,
            grown=frozenset(i for i, s in self.instances.items() if s.renewable and self.gpu_accounting.grown(s)),
            wanted={i: n for i, n in self.wanted.items() if n and holding(self.instances.values(), i)},
            head_start_s=first.head_start_s if first is not None else 0.0,
            max_wait_s=self.max_wait_s,
            evictable=self.evictable,
            wake_s=self.costs.by_tier(self.key),
            pause_s=self.costs.pause_s(self.key),
            unpause_s=self.costs.unpause_s(self.key),
            worth_s=self.demand.worth_s(self.costs.estimate_s(self.key, from_tier)),
        )

    def fail_waiters(self, error: Exception) -> None:
        """Tell everybody who waits for it that there is none."""
        for waiter in self.queue:
            if not waiter.granted.done():
                waiter.granted.set_exception(error)
        self.queue.clear()

    def wake_failed(self, failure: WakeFailure, now: float) -> WakeFailedError:
        """What those who ask for it are told after a wake that failed, until it is tried again."""
        left_s = max(1.0, self.start_at - now)
        message = f"{failure.message_for_clients(self.served_name)}. It is tried again in {math.ceil(left_s)} s."
        return WakeFailedError(message, retry_after_s=left_s, detail="; ".join(failure.reasons))

    def back_off(self, now: float) -> None:
        """Start nothing for a while that nobody waits for; longer after each failure in a row."""
        self.failed_wakes += 1
        self.restock_at = now + wake_failure.delay_s(self.failed_wakes)

    def end_back_off(self) -> None:
        """The next start is as good as the first one."""
        self.failed_wakes = 0
        self.restock_at = self.start_at = -math.inf
        self.failing.clear()


def tiers_from(found: Tier, instance: Instance) -> list[Tier]:
    """The tiers to try, warmest first."""
    tiers = [] if found is Tier.STOPPED else [found]
    if found < Tier.CHECKPOINTED and instance.image.present:
        tiers.append(Tier.ARCHIVED if instance.image.archived else Tier.CHECKPOINTED)
    return [*tiers, Tier.STOPPED]


def tier_found(instances: Iterable[Instance]) -> Tier:
    """The tier that a request finds: that of the warmest instance. A broken one goes on from its image."""
    instances = [*instances]
    broken = [s.image for s in instances if s.state is State.BROKEN and s.image.present]
    images = (Tier.ARCHIVED if image.archived else Tier.CHECKPOINTED for image in broken)
    return min((best_tier(s for s in instances), *images))


def image_of(facts: ImageFacts) -> Image:
    place = Place.ARCHIVE if facts.archived else Place.TMPFS
    return Image(place, sleep_level=facts.sleep_level, canary=facts.canary)


def note_unexpected(instance: Instance, error: Exception) -> None:
    """An error that no layer below promises is a bug: its stack belongs into the log."""
    if not isinstance(error, EngineError | RuntimeFailure | TimeoutError):
        log.error("%s: unexpected %r", instance.id, error, exc_info=error)


def limit_s(model: ModelSettings, tier: Tier) -> float:
    return model.start_timeout if tier is Tier.STOPPED else model.wake_timeout


def too_slow(model: ModelSettings, tier: Tier) -> str:
    """The reason of a wake that took longer than it may, by the name of its setting."""
    setting = "start_timeout" if tier is Tier.STOPPED else "wake_timeout"
    return f"no result within {setting} ({limit_s(model, tier):g} s)"


def stop_grace_s(settings: Settings, runtime: str) -> float:
    """How long an engine of a runtime may take to end by itself."""
    return settings.runtime.podman.stop_grace if runtime == "podman" else settings.runtime.process.stop_grace


def is_left(model: Model, instance: Instance) -> bool:
    """Whether the engine goes on without us, for the next warmpool to adopt."""
    if model.coming:
        return False
    fit = instance.state in _LEFT_RUNNING or (instance.state is State.WAKING and instance.loading)
    return fit and instance.engine is not None and model.runtime.leaves


def engine_of(instance: Instance) -> EngineProcess:
    assert instance.engine is not None  # noqa: S101 - an instance that was started has one
    return instance.engine


def client_of(instance: Instance) -> EngineClient:
    assert instance.client is not None  # noqa: S101 - made with the engine
    return instance.client


_KILLED: Final = ("signal 9", "exit status 137", "out of memory")
"""How the end of an engine is told that others ended."""


async def unless_it_ends(watcher: asyncio.Task[str] | None, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or RuntimeFailure at once when the engine ends before, which its watcher learns."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task, *([watcher] if watcher is not None else [])], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        assert watcher is not None  # noqa: S101 - else the task would be done
        how = watcher.result()
        # Only others kill: the kernel for want of memory, or somebody by hand.
        killed = any(word in how for word in _KILLED)
        fault = Fault.HOST if killed else Fault.IMAGE
        raise RuntimeFailure("start", f"the engine ended: {how}", fault=fault)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(_let_go)  # it may end later than anybody waits for it
            await asyncio.wait([task], timeout=GIVE_UP_S)


def _let_go(task: asyncio.Future[Any]) -> None:
    """Nobody is interested in how it ended."""
    if not task.cancelled():
        task.exception()


async def until_it_listens(engine: EngineProcess, watcher: asyncio.Task[str] | None, interval_s: float) -> None:
    """Return when the engine itself listens on its port; nothing is sent there before.

    Raises PortTakenError where another program does, also if that is why the engine has ended.
    """

    async def listens() -> None:
        while not await engine.listens():
            await asyncio.sleep(interval_s)

    try:
        await unless_it_ends(watcher, listens())
    except PortTakenError:
        raise
    except RuntimeFailure:
        await engine.listens()
        raise
