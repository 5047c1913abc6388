"""What the parts of the pool share: its models, its accounts of memory, its phase, and those who listen."""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import time
from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import ModelNotFoundError
from proxy.pool.command import Command
from proxy.pool.costs import Costs
from proxy.pool.gpu_accounting import GpuAccounting
from proxy.pool.gpu_time import GpuTime
from proxy.pool.image import Image
from proxy.pool.instance import Instance, State
from proxy.pool.live_view import LiveView
from proxy.pool.memory_accounting import MemoryAccounting
from proxy.pool.model import Model, stop_grace_s, tier_found
from proxy.pool.model_view import Rules
from proxy.pool.removal_retry import RemovalRetries
from proxy.runtime.bounded import Bounded
from proxy.telemetry.overdue import Overdue
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from proxy.config.model import ModelSettings
    from proxy.config.settings import Settings
    from proxy.pool.model_view import InstanceView
    from proxy.pool.usage import Usage
    from proxy.pool.view import View
    from proxy.pool.wake_progress import WakeProgress
    from proxy.runtime.base import Runtime
    from proxy.runtime.ladder_probes import LadderProbes
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.pool")

_WAKES_KEPT = 50
_USES_S: Final = 1.0
"""How long requests may wait to be counted as uses of their model."""


class Phase(enum.IntEnum):
    """The life of a pool; it only goes on, never back."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    STOPPING = enum.auto()
    """Requests that come all the same are served; nothing is begun that no request waits for."""
    CLOSED = enum.auto()


SERVING_PHASES: Final = frozenset({Phase.SERVING, Phase.STOPPING})
"""The phases in which requests are served."""


class PoolState:
    """Passive: nothing here decides or awaits."""

    def __init__(
        self,
        settings: Settings,
        runtimes: Mapping[str, Runtime],
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        unix_s: Callable[[], float] = time.time,
        usage: Usage,
        probes: LadderProbes,
    ) -> None:
        self.settings = settings
        """The configuration in force."""
        self.metrics = metrics
        self.clock = clock
        self.unix_s = unix_s
        self._evictable_by: Settings | None = None
        """The configuration by which is known which models may make room."""
        self._timed: list[str] = []
        """Those of them for which it depends on the time of the day."""
        self.usage = usage
        self.probes = probes
        self.overdue = Overdue(metrics)
        self.written_off = RemovalRetries(metrics)
        self.all_runtimes: Mapping[str, Runtime] = {
            name: Bounded(runtime, self.overdue, stop_grace_s(settings, name)) for name, runtime in runtimes.items()
        }
        self.runtimes = {m.runtime: self.all_runtimes[m.runtime] for m in settings.models.values()}
        """Those that are open."""
        self.gpu_accounting = GpuAccounting(settings.pool.gpu_creep)
        self.memory_accounting = MemoryAccounting()
        self.costs = Costs()
        self.leaving: list[Model] = []
        """Models that the configuration has no more, or with other engines, until their last instance is gone."""
        self.coming: dict[str, Model] = {}
        """By key: models whose engine is made ready to take over from an outdated one."""
        self.queued: Counter[Model] = Counter()
        """How many wait for each model that somebody waits for."""
        self.live_view = LiveView(self.gpu_accounting, self.memory_accounting, self._is_there)
        self.gpu_accounting.on_news = self.memory_accounting.on_news = self.note_change
        self.models: dict[str, Model] = {}
        self.models = {key: self.new_model(key, model) for key, model in settings.models.items()}
        self.lost: set[str] = set()
        """Models whose checkpoint could not be used at the start, as after an upgrade."""
        self.phase = Phase.STARTING
        self.draining = False
        """An operator drained it: it takes no new requests."""
        self.open_leases = 0
        self.uses: dict[str, int] = {}
        """By model: requests that were let in and not counted yet, by `usage` and as demand (`count_uses`)."""
        self._counts_uses: asyncio.TimerHandle | None = None
        self.waiting = 0
        """Those in a queue, and those who have just left one."""
        self.wakes: deque[dict[str, Any]] = deque(maxlen=_WAKES_KEPT)
        self.wakes_under_way: dict[str, WakeProgress] = {}
        """By the instance's id."""
        self.listeners: set[Callable[[], None]] = set()
        self.gpu_times: list[tuple[str, GpuTime]] = []
        """Of every instance, with its model's key; of one that is gone until it was read."""
        self.configure_accounts()

    def note_use(self, key: str) -> None:
        """One more request for a model: many within a second are counted together."""
        if self._counts_uses is None:
            self._counts_uses = asyncio.get_running_loop().call_later(_USES_S, self.count_uses)
        self.uses[key] = self.uses.get(key, 0) + 1

    def count_uses(self) -> None:
        """Count those that were not yet."""
        if self._counts_uses is not None:
            self._counts_uses.cancel()
            self._counts_uses = None
        uses, self.uses = self.uses, {}
        for key, count in uses.items():
            self.usage.note(key, count)
            if (model := self.models.get(key)) is not None:
                model.demand.note(self.clock(), count)

    @property
    def rules(self) -> Rules:
        """What the configuration says of who runs when."""
        pool = self.settings.pool
        return Rules(pool.policy, pool.max_awake, pool.quantum, pool.switch_after, pool.lru_ttl, pool.max_restores)

    @property
    def ready(self) -> bool:
        """Whether new clients are welcome."""
        return self.phase is Phase.SERVING and not self.draining

    @property
    def stopping(self) -> bool:
        """Whether the server is about to end."""
        return self.phase >= Phase.STOPPING

    def advance(self, phase: Phase) -> None:
        """Go on to a later phase."""
        self.phase = max(self.phase, phase)

    def new_model(self, key: str, settings: ModelSettings, *, coming: bool = False) -> Model:
        """A model with no instance yet."""
        runtime = self.runtimes[settings.runtime]
        name = self.settings.served_name(key)
        model = Model(
            key, settings, name, runtime, self.gpu_accounting, self.memory_accounting,
            probes=self.probes, costs=self.costs, coming=coming,
        )  # fmt: skip
        self.observe(model)
        return model

    def observe(self, model: Model) -> None:
        """Learn of what changes in a model; again where it was given another queue or image."""
        changed = partial(self.live_view.changed.setdefault, model)
        model.observed_by(changed)
        model.image.observed_by(changed)
        model.queue.on_count = partial(self._queue_changed, model)
        self.queued.pop(model, None)
        self._queue_changed(model, len(model.queue))

    def _queue_changed(self, model: Model, more: int) -> None:
        self.queued[model] += more
        if self.queued[model] <= 0:
            del self.queued[model]
        self.live_view.changed.setdefault(model)

    def note_change(self, key: str) -> None:
        """Something is known of a model that was not."""
        self.live_view.changed |= dict.fromkeys(self.called(key))

    def called(self, key: str) -> list[Model]:
        """The models of a key: the one that is served, the one that takes over from it, those that leave."""
        found = [table[key] for table in (self.models, self.coming) if key in table]
        return [*found, *(model for model in self.leaving if model.key == key)]

    def _is_there(self, model: Model) -> bool:
        return any(model is other for other in self.called(model.key))

    def everyone(self) -> list[Model]:
        """All models, those that come and go among them."""
        return [*self.models.values(), *self.coming.values(), *self.leaving]

    def home(self, instance: Instance) -> Model:
        """The model that an instance belongs to; of that name there may be two."""
        return next(m for m in self.called(instance.model) if m.instances.get(instance.id) is instance)

    def find(self, seen: InstanceView) -> tuple[Model, Instance]:
        """The instance that a plan means, and its model."""
        return next((m, i) for m in self.called(seen.model) if (i := m.instances.get(seen.id)) is not None)

    def new_instance(self, model: Model, instance_id: str) -> Instance:
        """Another instance of a model."""
        gpu_time = GpuTime(model.settings.gpus_an_engine, self.clock)
        self.gpu_times.append((model.key, gpu_time))
        image = model.image if model.runtime.shares_images else None
        instance = Instance(instance_id, model.key, image, gpu_time)
        changed = partial(self.live_view.changed.setdefault, model)
        instance.observed_by(changed)
        instance.image.observed_by(changed)
        model.instances[instance_id] = instance
        model.note_change()
        return instance

    def free_id(self, model: Model) -> str:
        """An id that no instance of the model has, nor one that was written off."""
        taken = {instance_id for m in self.called(model.key) for instance_id in m.instances} | {*model.instances}
        ids = (f"{model.key}-{n}" for n in itertools.count(1))
        return next(i for i in ids if i not in taken and i not in self.written_off)

    def resolve(self, name: str) -> str:
        """The key of the model that clients call `name`. Raises ModelNotFoundError."""
        return self.settings.key_of(name)

    def note_time_of_day(self) -> float | None:
        """Note which models' instances may make room now; how many seconds later that may change, if it may."""
        at = time.localtime(self.unix_s())
        if self.settings is not self._evictable_by:
            self._evictable_by = self.settings
            self._timed = [key for key, model in self.settings.models.items() if not isinstance(model.evictable, bool)]
            changed = [*self.models]
        else:
            changed = self._timed
        for key in changed:
            evictable = self.settings.models[key].evictable_at(at.tm_hour * 60 + at.tm_min)
            if self.models[key].evictable != evictable:
                self.models[key].evictable = evictable
        return max(1.0, 60.0 - at.tm_sec) if self._timed else None

    def view(self) -> View:
        """What the policy decides by, as of now."""
        return self.live_view.refreshed(self.rules)

    def estimate_s(self, key: str) -> float:
        """How long a request for the model would wait for a wake, from measured ones, in seconds."""
        model = self.models[key]
        tier = tier_found(model.instances.values())
        whole_s = self.costs.estimate_s(key, tier)
        waking = [s.wake_began for s in model.instances.values() if s.state is State.WAKING and s.tier is tier]
        return max(0.0, whole_s - (self.clock() - min(waking))) if waking else whole_s

    def send_away(self, model: Model) -> None:
        """Have the instances of a model that was replaced or removed go, each after its last request."""
        model.fail_waiters(ModelNotFoundError(model.served_name))
        model.leaving = True
        # The image of that name may be another engine's soon: nothing here may touch it.
        model.image = Image()
        self.observe(model)
        self.leaving.append(model)
        for instance in model.instances.values():
            if model.runtime.shares_images:
                instance.use_image(model.image)
            instance.give(Command(instance.id, instance.tier, Tier.STOPPED))
        self.forget_if_gone(model)

    def forget_if_gone(self, model: Model) -> None:
        """Drop a model that leaves when its last instance is gone."""
        if model.leaving and not model.instances:
            self.leaving.remove(model)
            model.note_change()
            if model.key not in self.models:
                self.metrics.forget(model.key)

    def configure_accounts(self) -> None:
        """Tell the accounts what the configuration says of memory."""
        for key, model in self.settings.models.items():
            self.gpu_accounting.configure(key, model.gpu_memory, model.gpus, bound=model.names_its_gpus)
            self.memory_accounting.configure(key, model.host_memory)
        self.memory_accounting.reserve_bytes = int(self.settings.pool.memory_reserve)

    async def open_runtime(self, runtime: Runtime) -> None:
        """Open a runtime. Raises HostError when it cannot work here."""
        await runtime.open()
        for tier, reason in runtime.tiers().missing.items():
            log.warning("no tier %s with runtime %s: %s", tier.label, runtime.name, reason)

    def give_up_commands(self) -> None:
        """The server shuts down: no command comes true any more."""
        for model in self.everyone():
            for instance in model.instances.values():
                instance.end_command("the server is shutting down")

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after whatever `status` says may have changed; the result ends that."""
        self.listeners.add(callback)
        return lambda: self.listeners.discard(callback)

    def tell(self) -> None:
        """Call those who listen."""
        for callback in [*self.listeners]:
            callback()
