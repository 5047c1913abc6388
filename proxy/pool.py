"""The one owner of instances: leases, single-flight wakes, stepping down, adoption, drain.

`Pool.tick` is the only place where something is decided: it hands ready instances to those who wait, asks the policy
for a plan, moves every instance concerned along its table and only then starts the tasks that do the work. It never
awaits. Whatever may change the answer - a new waiter, a lease that ends, a task that is done, a deadline - calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from proxy import gpu_ledger, policy, reload, weights
from proxy.engine import EngineClient
from proxy.errors import (
    ConflictError,
    DrainingError,
    EngineError,
    InstanceNotFoundError,
    MaxWaitError,
    ModelNotFoundError,
    NoCapacityError,
    OrderFailedError,
    QueueFullError,
    RuntimeFailure,
    WakeFailedError,
)
from proxy.gpu_ledger import GpuLedger
from proxy.instance import ARRIVAL, DESCENDING, DESCENT, RESTING, Event, Instance, Stages, State, Tier, WakeRecord
from proxy.line import Line
from proxy.runtime.base import ImageFacts
from proxy.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from types import TracebackType

    from proxy.config import ModelSettings, Settings
    from proxy.gpu import GpuMemory, Gpus
    from proxy.gpu_ledger import Bytes
    from proxy.metrics import Metrics
    from proxy.reload import Changes
    from proxy.runtime.base import Found, Handle, Runtime

log = logging.getLogger("warmpool.pool")

T = TypeVar("T")

MAX_IMAGE_FAILURES = 2
"""An image that failed to restore this often in a row is set aside."""
_COUNTED = 256
_MOMENT_S = 0.05
_ADOPT_S = 5.0
"""How long an engine that runs already may take to say that it serves."""
_DEEPEST_SLEEP = 2
_REMOVE_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_STEP_RETRY_S = (60.0, 300.0, 1800.0)
"""Between two tries to step down to a rung that could not be had without harm, as for want of space."""
_WAKES_KEPT = 50
_WEIGH_EVERY_S = 5.0
"""How often GPU memory is looked at when nothing moves: other programs come and go, engines grow."""
_LEFT_RUNNING = frozenset({State.READY, State.RETIRING, State.SLEEPING, State.SUSPENDED})
_RESTOCK_RETRY_S = (1.0, 5.0, 15.0, 60.0)
"""Between two starts for `min_ready` that failed; a request is always a new try."""


@dataclass(slots=True)
class _Image:
    """What the pool knows of an image; one for all instances of a model where the runtime shares them."""

    present: bool = False
    archived: bool = False
    """It is in the archive, and has to be brought back to tmpfs first."""
    failures: int = 0
    """Restores that failed, in a row."""
    sleep_level: int = 0
    canary: str | None = None
    canary_checked: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever writes it or moves it."""
    copying: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever writes the copy of the weights."""


class Order:
    """An operator's order to an instance to go down to a rung."""

    __slots__ = ("_ended", "found", "instance_id", "to")

    def __init__(self, instance_id: str, found: Tier, to: Tier) -> None:
        self.instance_id = instance_id
        self.found = found
        """Where the instance was when the order came."""
        self.to = to
        self._ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    @property
    def open(self) -> bool:
        """Whether it has still to come true."""
        return not self._ended.done()

    def end(self, failure: str | None = None) -> None:
        """It came true, or could not."""
        if self.open:
            self._ended.set_result(failure)

    async def carried_out(self) -> None:
        """Return when the instance is there. Raises OrderFailedError; cancelling does not take the order back."""
        failure = await asyncio.shield(self._ended)
        if failure is not None:
            raise OrderFailedError(f"{self.instance_id} did not get to {self.to.label}: {failure}")


@dataclass(slots=True)
class _Slot:
    """An instance with what the pool holds of it."""

    # "good": there is a copy of the weights that fits this engine; "lost": there was one.

    instance: Instance
    image: _Image
    handle: Handle | None = None
    client: EngineClient | None = None
    task: asyncio.Task[None] | None = None
    """The one move under way."""
    watcher: asyncio.Task[str] | None = None
    """Ends when the engine does."""
    canary: str | None = None
    """What the running engine answers."""
    warmup: list[dict[str, float]] = field(default_factory=list)
    weights_copy: Literal["none", "good", "lost"] = "none"
    failed_steps: int = 0
    """Steps down that failed without harm, in a row."""
    discards_image: bool = False
    """Removing it deletes the image that it shares."""
    loading: bool = False
    """Started from nothing and not healthy yet: another warmpool could go on from here."""
    order: Order | None = None
    """What an operator wants of it and has not come true yet."""
    wake_began: float = 0.0

    @property
    def renewable(self) -> bool:
        """Whether its processes can be had again from an image."""
        return self.image.present and not self.image.archived


@dataclass(slots=True, eq=False)
class _Waiter:
    granted: asyncio.Future[Lease]
    since: float
    found: Tier
    preferred: str | None


@dataclass(frozen=True, slots=True)
class _Evictions:
    """What a wake waits for, and what it expects of it."""

    tasks: Mapping[str, asyncio.Task[None]]
    """The victims' ids, and their way down."""
    needed: Bytes
    """GPU memory that has to be free afterwards."""
    expected: Mapping[str, Bytes]
    """Instance → what it should hold by then."""


_NO_EVICTIONS = _Evictions({}, {}, {})


@dataclass(slots=True)
class _Model:
    """A model with everything the pool keeps for it."""

    key: str
    settings: ModelSettings
    served_name: str
    runtime: Runtime
    ledger: GpuLedger
    slots: dict[str, _Slot] = field(default_factory=dict)
    image: _Image = field(default_factory=_Image)
    """The golden checkpoint, where the runtime shares images."""
    queue: Line[_Waiter] = field(default_factory=Line)
    """In classes of priority; ranked by when they came, less the head start of their class."""
    failed_wakes: int = 0
    """In a row."""
    restock_at: float = -math.inf
    draining: bool = False
    """Closed to new requests by an operator."""
    discarding: bool = False
    """Its golden checkpoint goes with its last instance."""
    leaving: bool = False
    """The configuration has it no more, or with other engines: its instances go after their last request."""

    @property
    def timetable(self) -> Mapping[Tier, float]:
        return self.settings.idle.timetable()

    def instances(self) -> list[Instance]:
        return [slot.instance for slot in self.slots.values()]

    def view(self) -> policy.ModelView:
        first = self.queue.first()
        # Some may have been cancelled in this moment; among many they make no difference.
        many = len(self.queue) > _COUNTED
        waiting = len(self.queue) if many else sum(not w.granted.done() for w in self.queue)
        return policy.ModelView(
            key=self.key,
            instances=self.instances(),
            rungs=self.runtime.rungs().offered,
            timetable=self.timetable,
            max_instances=0 if self.leaving else self.settings.max_instances,
            min_ready=0 if self.leaving else self.settings.min_ready,
            max_concurrency=self.settings.max_concurrency,
            waiting=waiting,
            oldest_wait=first.since if waiting and first is not None else None,
            draining=self.draining,
            restock_at=self.restock_at,
            has_shared_image=self.runtime.shares_images and self.image.present and not self.discarding,
            worn=frozenset(i for i, s in self.slots.items() if s.renewable and self.ledger.worn(s.instance)),
        )


class Lease:
    """One request's hold on an instance. `async with` it, or call `release` in `finally`; further calls do nothing."""

    __slots__ = ("_pool", "_slot", "client", "found", "generation", "instance_id", "model", "queue_s", "wake")

    def __init__(self, pool: Pool, slot: _Slot, found: Tier, queue_s: float, wake: WakeRecord | None) -> None:
        assert slot.client is not None  # noqa: S101 - ready instances have one
        self._pool: Pool | None = pool
        self._slot = slot
        self.client = slot.client
        self.model = slot.instance.model
        self.instance_id = slot.instance.id
        self.generation = slot.instance.generation
        self.found = found
        """What the request found when it came."""
        self.queue_s = queue_s
        """How long it waited, beside the wake."""
        self.wake = wake
        """The wake it waited for, if it did."""

    def release(self) -> None:
        """Give the instance back."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._lease_ended(self._slot, self.generation)

    async def suspect(self) -> None:
        """Say that the engine failed the request; the pool looks, and breaks the instance if it does not serve."""
        if self._pool is not None:
            await self._pool._examine(self._slot, self.generation)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Pool:
    """All instances of all models on this host.

    `runtimes` by name; `clock` is monotonic, in seconds, and may be a test's; `connect` makes the client of an engine.
    `gpus`: whose memory is kept account of; opened by the runtimes. Without, it plays no part in any decision.
    """

    def __init__(
        self,
        settings: Settings,
        runtimes: Mapping[str, Runtime],
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        connect: Callable[[Handle, str, ModelSettings], EngineClient] | None = None,
        usage: Usage | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._connect = connect or _connect
        self._usage = usage or Usage()
        self._all_runtimes = runtimes
        self._runtimes = {m.runtime: runtimes[m.runtime] for m in settings.models.values()}
        self._gpus = gpus
        self._ledger = GpuLedger(settings.pool.gpu_creep)
        self._models = {
            key: _Model(key, model, settings.served_name(key), self._runtimes[model.runtime], self._ledger)
            for key, model in settings.models.items()
        }
        self._configure_ledger()
        self._weigh_due = asyncio.Event()
        self._weigher: asyncio.Task[None] | None = None
        self._leaving: list[_Model] = []
        """Models that the configuration has no more, or with other engines, until their last instance is gone."""
        self._reconfiguring = asyncio.Lock()
        self._costs = policy.Costs()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open_leases = 0
        self._timer: asyncio.TimerHandle | None = None
        self._open = False
        self._draining = False
        self._stopping = False
        self._shut = False
        self._closed = False
        self._orders: list[tuple[_Model, _Slot, Order]] = []
        self._listeners: set[Callable[[], None]] = set()
        self._wakes: deque[dict[str, Any]] = deque(maxlen=_WAKES_KEPT)
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._ticking = False
        metrics.expect(self._models, [tier.label for tier in Tier])
        metrics.before_collecting(self._publish)

    # --- life ---

    async def open(self) -> None:
        """Open the runtimes, adopt the checkpoints that are still good, start what `min_ready` asks for.

        Raises HostError when a runtime cannot work here.
        """
        for runtime in self._runtimes.values():
            await self._open_runtime(runtime)
        for name, runtime in self._runtimes.items():
            mine = {key: m.settings for key, m in self._models.items() if m.settings.runtime == name}
            recovered = await runtime.recover(mine)
            images = {owner: _image_of(facts) for owner, facts in recovered.images.items()}
            model_of = {found.handle.instance_id: found.handle.model for found in recovered.instances}
            for owner, facts in recovered.images.items():
                self._ledger.learn(owner if runtime.shares_images else model_of[owner], facts.details.get("gpu"))
            for key in mine.keys() & images.keys() if runtime.shares_images else ():
                self._models[key].image = images[key]
                log.info("%s: golden checkpoint adopted", key)
            await asyncio.gather(*(self._adopt(found, images) for found in recovered.instances))
        if self._gpus is not None and self._gpus.measurable:
            self._ledger.suspending_frees = self._gpus.usable
            await self._weigh()
            self._weigher = asyncio.create_task(self._keep_weighing(), name="weigh")
        self._open = True
        self.tick()

    async def _open_runtime(self, runtime: Runtime) -> None:
        await runtime.open()
        for tier, reason in runtime.rungs().missing.items():
            log.warning("no rung %s with runtime %s: %s", tier.label, runtime.name, reason)

    async def _adopt(self, found: Found, images: Mapping[str, _Image]) -> None:
        """Take over an instance as it is; one that runs but does not serve is ended."""
        model = self._models[found.handle.model]
        if len(model.slots) >= model.settings.max_instances:
            await model.runtime.remove(found.handle)
            return
        slot = self._new_slot(model, found.handle.instance_id)
        self._attach(model, slot, found.handle)
        if not model.runtime.shares_images and slot.instance.id in images:
            slot.image = images[slot.instance.id]
        instance = slot.instance
        if found.tier is Tier.READY:
            state = await self._state_of_running(model, slot)
            left_s = (found.started_unix_s or -math.inf) + model.settings.start_timeout - time.time()
            if state is State.BROKEN and left_s > 0 and await _client(slot).loads(model.settings.health.path):
                self._go_on_starting(model, slot, left_s)
                return
            instance.state = state
        else:
            instance.state = State.CHECKPOINTED if not slot.image.archived else State.ARCHIVED
        if instance.state is State.BROKEN:
            log.warning("%s runs but does not serve: ended", instance.id)
            await self._mend(model, slot)
            return
        if instance.state not in (State.CHECKPOINTED, State.ARCHIVED):
            self._watch(model, slot)
        instance.idle_since = self._clock()
        log.info("%s adopted: %s", instance.id, instance.state.value)

    def _go_on_starting(self, model: _Model, slot: _Slot, left_s: float) -> None:
        """An engine that loads, and whose time is not over."""
        instance = slot.instance
        instance.waking_from = Tier.STOPPED
        instance.apply(Event.WAKE)
        self._watch(model, slot)
        log.info("%s adopted: it is loading", instance.id)
        slot.task = self._spawn(f"wake {instance.id}", self._wake_adopted(model, slot, instance.generation, left_s))

    async def _wake_adopted(self, model: _Model, slot: _Slot, generation: int, left_s: float) -> None:
        """The rest of a start that another warmpool began; from nothing if it fails."""
        stages, began, instance = Stages(), self._clock(), slot.instance
        try:
            async with asyncio.timeout(left_s):
                await self._load(model, slot, stages)
        except Exception as error:  # noqa: BLE001 - as in `_wake`
            _note_unexpected(instance, error)
            log.warning("%s was loading and did not come up: %s", instance.id, str(error) or "no result in time")
            await self._clear_away(model, slot, Tier.STOPPED)
            await self._wake(model, slot, generation, _NO_EVICTIONS)
            return
        if instance.generation == generation and instance.state is State.WAKING:
            self._woken(model, instance, Tier.STOPPED, Tier.STOPPED, began, stages)

    async def _state_of_running(self, model: _Model, slot: _Slot) -> State:
        client = _client(slot)
        with contextlib.suppress(EngineError, TimeoutError):
            async with asyncio.timeout(_ADOPT_S):
                asleep = await client.is_sleeping()
                if asleep:
                    slot.instance.sleep_level = _DEEPEST_SLEEP  # which one is not to be learned: wake it thoroughly
                    return State.SLEEPING
                if await client.healthy(model.settings.health.path):
                    if asleep is None:
                        slot.instance.barred.add(Tier.SLEEPING)
                    return State.READY
        return State.BROKEN

    @property
    def ready(self) -> bool:
        """Whether requests are admitted."""
        return self._open and not self._draining and not self._stopping and not self._shut

    @property
    def stopping(self) -> bool:
        """Whether the server is about to end."""
        return self._stopping or self._closed

    def begin_drain(self) -> None:
        """Admit nothing new; what runs or waits goes on."""
        self._draining = True

    def begin_stop(self) -> None:
        """Not ready for new clients any more, but requests that come all the same are served until `close`.

        Nothing is begun that no request waits for.
        """
        self._stopping = True
        self._give_up_orders()
        self._tell()

    async def drained(self) -> None:
        """Return when no request runs or waits."""
        await self._quiet.wait()

    async def settled(self) -> None:
        """Return when no instance is on its way anywhere, those left aside that the next warmpool goes on with."""
        while moves := self._tasks - {s.task for m in self._everyone() for s in m.slots.values() if _is_left(m, s)}:
            await asyncio.wait(moves)

    async def close(self) -> None:
        """End everything: waiters get an error, moves are cancelled, engines end.

        Checkpoints stay for the next start, and engines too where the runtime leaves them.
        """
        self.begin_drain()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for model in self._models.values():
            self._fail_waiters(model, DrainingError("The server is shutting down.", retry_after_s=1.0))
        self._give_up_orders()
        tasks = [*self._tasks, *([self._weigher] if self._weigher is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(m, s) for m in self._everyone() for s in list(m.slots.values())))
        for runtime in self._runtimes.values():
            await runtime.close()

    async def _end(self, model: _Model, slot: _Slot) -> None:
        await self._unwatch(slot)
        if slot.client is not None:
            await slot.client.disconnect()
        if _is_left(model, slot):
            log.info("%s left running, for the next warmpool to adopt", slot.instance.id)
        elif slot.handle is not None:
            end = model.runtime.drop if slot.image.present else model.runtime.remove
            try:
                await end(slot.handle)
            except RuntimeFailure as error:
                log.error("%s: %s", slot.instance.id, error)
                return
        del model.slots[slot.instance.id]

    # --- checkpoints that are not on tmpfs ---

    def without_checkpoint(self) -> list[str]:
        """The models that are to be checkpointed when idle, and have neither a checkpoint on tmpfs nor an engine."""
        return [key for key, model in self._models.items() if self._lacks_checkpoint(model)]

    def _lacks_checkpoint(self, model: _Model) -> bool:
        if Tier.CHECKPOINTED not in model.runtime.rungs().offered or Tier.CHECKPOINTED not in model.timetable:
            return False
        if model.settings.min_ready or model.draining:
            return False
        on_tmpfs = model.runtime.shares_images and model.image.present and not model.image.archived
        return not on_tmpfs and all(i.state is State.ARCHIVED for i in model.instances())

    async def until_nobody_waits(self) -> None:
        """Return when no request waits for an engine."""
        changed = asyncio.Event()
        silence = self.listen(changed.set)
        try:
            while any(m.queue for m in self._models.values()):
                changed.clear()
                await changed.wait()
        finally:
            silence()

    async def bring_back(self, key: str) -> bool:
        """Bring a model's image from the archive to tmpfs; whether there was one. Raises RuntimeFailure."""
        model = self._models[key]
        slot = next((s for s in model.slots.values() if s.instance.state is State.ARCHIVED), None)
        if slot is None:
            return False
        async with slot.image.lock:
            if slot.image.archived:
                await model.runtime.unarchive_image(_handle(slot))
                slot.image.archived = False
        for same in [s for s in model.slots.values() if s.image is slot.image]:
            if same.instance.state is State.ARCHIVED:
                same.instance.apply(Event.AT_CHECKPOINTED)
                same.instance.idle_since = self._clock()
        self.tick()
        return True

    async def _copy_to_archive(self, model: _Model, slot: _Slot) -> None:
        try:
            await model.runtime.copy_to_archive(_handle(slot))
        except RuntimeFailure as error:
            log.warning("%s: no copy of its checkpoint in the archive: %s", model.key, error)
        else:
            log.info("%s: a copy of its checkpoint is in the archive", model.key)

    # --- another configuration ---

    def _configure_ledger(self) -> None:
        for key, model in self._settings.models.items():
            self._ledger.configure(key, model.gpu_memory, model.gpus)

    async def reconfigure(self, wanted: Settings) -> Changes:
        """Take another configuration on, as far as it can be had without a restart; what came of it.

        Models that did not change notice nothing. Where the engine of one changed, its instances take no new requests
        and go after their last one, while those who wait are served by new engines; so do those of a removed model,
        where those who wait are told that there is none.
        Raises ConfigError, HostError (a runtime that is needed now cannot work) or DrainingError, with nothing changed.
        """
        async with self._reconfiguring:
            changes, settings = reload.compare(self._settings, wanted)
            for name in {settings.models[key].runtime for key in (*changes.added, *changes.replaced)}:
                if name not in self._runtimes:
                    await self._open_runtime(self._all_runtimes[name])
                    self._runtimes[name] = self._all_runtimes[name]
                    await self._runtimes[name].recover({})
            going = [self._models[key] for key in (*changes.removed, *changes.replaced)]
            while True:
                await self._at_rest(going)
                images = await self._images_for(settings, (*changes.added, *changes.replaced))
                if not any(map(_on_its_way_down, going)):
                    break
            if self.stopping:
                raise DrainingError("The server is shutting down.", retry_after_s=1.0)
            self._switch(changes, settings, images)
        self.tick()
        return changes

    async def _at_rest(self, models: Sequence[_Model]) -> None:
        """Return when nothing is being written of an engine that will be gone."""
        while moves := [
            slot.task
            for model in models
            for slot in model.slots.values()
            if slot.instance.state in DESCENDING and slot.task is not None
        ]:
            await asyncio.wait(moves)

    async def _images_for(self, settings: Settings, keys: Sequence[str]) -> dict[str, ImageFacts]:
        """The golden checkpoints that fit the engines of these models already."""
        images: dict[str, ImageFacts] = {}
        for name in {settings.models[key].runtime for key in keys}:
            models = {key: m for key, m in settings.models.items() if m.runtime == name}
            found = await self._runtimes[name].images_for(models)
            images |= {key: facts for key, facts in found.items() if key in keys}
        return images

    def _switch(self, changes: Changes, settings: Settings, images: Mapping[str, ImageFacts]) -> None:
        before, self._settings = self._models, settings
        self._models = {}
        for key, entry in settings.models.items():
            old = before.get(key)
            if old is not None and key not in changes.replaced:
                old.settings = entry
                self._models[key] = old
                self._shrink(old)
                continue
            model = _Model(key, entry, settings.served_name(key), self._runtimes[entry.runtime], self._ledger)
            if key in images:
                model.image = _image_of(images[key])
            self._models[key] = model
            if old is not None:
                model.queue, old.queue = old.queue, model.queue
                model.draining = old.draining
        for key in (*changes.removed, *changes.replaced):
            self._ledger.unlearn(key)
            self._send_away(before[key])
        for key, facts in images.items():
            self._ledger.learn(key, facts.details.get("gpu"))
        self._configure_ledger()
        self._metrics.expect(changes.added, [tier.label for tier in Tier])

    def _shrink(self, model: _Model) -> None:
        """Fewer instances than there are: the coldest go, one that answers after its last request."""
        surplus = max(0, len(model.slots) - model.settings.max_instances)
        for slot in sorted(model.slots.values(), key=lambda s: (-s.instance.tier, s.instance.leases))[:surplus]:
            self._give(model, slot, Order(slot.instance.id, slot.instance.tier, Tier.STOPPED))

    def _send_away(self, model: _Model) -> None:
        self._fail_waiters(model, ModelNotFoundError(model.served_name))
        model.leaving = True
        # The image of that name may be another engine's soon: nothing here may touch it.
        model.image = _Image()
        self._leaving.append(model)
        for slot in model.slots.values():
            if model.runtime.shares_images:
                slot.image = model.image
            self._give(model, slot, Order(slot.instance.id, slot.instance.tier, Tier.STOPPED))
        self._forget_if_gone(model)

    def _forget_if_gone(self, model: _Model) -> None:
        if model.leaving and not model.slots:
            self._leaving.remove(model)
            if model.key not in self._models:
                self._metrics.forget(model.key)

    def _everyone(self) -> list[_Model]:
        return [*self._models.values(), *self._leaving]

    def _home(self, instance: Instance) -> _Model:
        """The model that an instance belongs to; of that name there may be two."""
        return next(m for m in self._everyone() if (s := m.slots.get(instance.id)) and s.instance is instance)

    # --- leases ---

    @property
    def settings(self) -> Settings:
        """The configuration in force."""
        return self._settings

    def resolve(self, name: str) -> str:
        """The key of the model that clients call `name`. Raises ModelNotFoundError."""
        return self._settings.key_of(name)

    def served_name(self, key: str) -> str:
        """What the engines of a model call it."""
        try:
            return next(m for m in self._everyone() if m.key == key).served_name
        except StopIteration:  # removed since its name was resolved
            raise ModelNotFoundError(key) from None

    async def lease(
        self,
        name: str,
        *,
        priority: int = 0,
        max_wait_s: float | None = None,
        preferred: str | None = None,
        counts: bool = True,
    ) -> Lease:
        """A hold on a ready instance of the model, once there is one; on the `preferred` one if it is ready.

        `counts`: it is a use of the model.
        Joins the wake under way or starts one. Of those who wait, the ones of a higher priority come first, but one
        that waited `priority_head_start` longer comes before them, so that nobody waits for ever. Raises
        ModelNotFoundError, QueueFullError, NoCapacityError (nothing became free in `queue_timeout`), MaxWaitError
        (nothing will, or did, in `max_wait_s`), WakeFailedError
        or DrainingError. Cancelling hands on what was granted in the same moment.
        """
        model = self._models[self.resolve(name)]
        if not self._open or self._draining:
            raise DrainingError("The server is starting or shutting down.", retry_after_s=1.0)
        if self._shut or model.draining:
            what = "The server" if self._shut else f"The model {name!r}"
            raise DrainingError(f"{what} is closed to new requests for now.", retry_after_s=1.0)
        if counts:
            self._usage.note(model.key)
        found = policy.best_tier(model.instances())
        if not model.queue:
            instance = policy.pick(model.instances(), model.settings.max_concurrency, preferred)
            if instance is not None:
                lease = self._grant(model, instance, found, 0.0, None)
                self._tell()
                return lease
        self._refuse_if_full(model)
        self._refuse_if_longer(model, max_wait_s)
        limit_s = min(model.settings.queue_timeout, math.inf if max_wait_s is None else max_wait_s)
        since = self._clock()
        rank = since - priority * self._settings.pool.priority_head_start
        waiter = _Waiter(asyncio.get_running_loop().create_future(), since, found, preferred)
        model.queue.add(waiter, priority, rank)
        self._quiet.clear()
        self.tick()
        try:
            async with asyncio.timeout(limit_s):
                return await waiter.granted
        except TimeoutError:
            _hand_on(waiter)
            kind = NoCapacityError if limit_s == model.settings.queue_timeout else MaxWaitError
            raise kind(
                f"No instance of {name!r} became free within {limit_s:g} s.",
                retry_after_s=self._expected_wait_s(model),
            ) from None
        except asyncio.CancelledError:
            _hand_on(waiter)
            raise
        finally:
            # One that was granted or failed has left the queue already.
            model.queue.discard(waiter)
            self._note_quiet()
            self._tell()

    def _refuse_if_full(self, model: _Model) -> None:
        everywhere = sum(len(m.queue) for m in self._models.values())
        if len(model.queue) >= model.settings.max_queue or everywhere >= self._settings.pool.max_queue:
            raise QueueFullError(
                f"{len(model.queue)} requests wait for {model.served_name!r} already.",
                retry_after_s=self._expected_wait_s(model),
            )

    def _refuse_if_longer(self, model: _Model, max_wait_s: float | None) -> None:
        expected_s = self.estimate_s(model.key)
        if max_wait_s is not None and expected_s > max_wait_s:
            raise MaxWaitError(
                f"An instance of {model.served_name!r} is expected in {expected_s:.1f} s, "
                f"more than the {max_wait_s:g} s that the request would wait.",
                retry_after_s=self._expected_wait_s(model),
            )

    def _grant(self, model: _Model, instance: Instance, found: Tier, queue_s: float, wake: WakeRecord | None) -> Lease:
        instance.begin_lease(time.time())
        self._open_leases += 1
        self._quiet.clear()
        return Lease(self, model.slots[instance.id], found, queue_s, wake)

    def _lease_ended(self, slot: _Slot, generation: int) -> None:
        self._open_leases -= 1
        instance = slot.instance
        if instance.generation == generation:
            instance.end_lease(self._clock(), time.time())
            if instance.state is State.READY and instance.ordered is None and not self._orders:
                # Unless others wait for its place, nothing is to be decided now; what an idle one does next has time.
                model = self._models.get(instance.model)
                mine = model is not None and model.slots.get(instance.id) is slot  # a reload may have replaced it
                if model is not None and mine and not any(m.queue for m in self._models.values() if m is not model):
                    self._dispatch(model)
                    if not instance.leases:
                        self._note_quiet()
                        self._tick_soon()
                    self._tell()
                    return
        self._note_quiet()
        self.tick()

    def _tick_soon(self) -> None:
        """Decide within a moment; requests that end one after the other are one reason, not many."""
        loop = asyncio.get_running_loop()
        if self._timer is None or self._timer.when() > loop.time() + _MOMENT_S:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(_MOMENT_S, self.tick)

    def _note_quiet(self) -> None:
        if self._open_leases == 0 and not any(m.queue for m in self._models.values()):
            self._quiet.set()

    def _fail_waiters(self, model: _Model, error: Exception) -> None:
        for waiter in model.queue:
            if not waiter.granted.done():
                waiter.granted.set_exception(error)
        model.queue.clear()

    def _expected_wait_s(self, model: _Model) -> float:
        return max(1.0, self.estimate_s(model.key))

    def estimate_s(self, key: str) -> float:
        """How long a request for the model would wait for a wake, from measured ones, in seconds."""
        model = self._models[key]
        tier = policy.best_tier(model.instances())
        whole_s = self._costs.estimate_s(key, tier)
        waking = [
            s.wake_began for s in model.slots.values() if s.instance.state is State.WAKING and s.instance.tier is tier
        ]
        return max(0.0, whole_s - (self._clock() - min(waking))) if waking else whole_s

    # --- orders of operators ---

    def find(self, name: str) -> str:
        """The key of the model that an operator calls `name`: its key, or what clients call it.

        Raises ModelNotFoundError.
        """
        return name if name in self._models else self.resolve(name)

    async def order_wake(self, key: str) -> tuple[str, Tier, WakeRecord | None]:
        """Have an instance of a model ready: its id, the rung that was found, the wake if there was one.

        A request that asks for nothing: it joins a wake that is under way, makes room, and fails as any other.
        Instances that an earlier order has closed are open again. Raises what `lease` does.
        """
        model = self._models[key]
        surplus = len(model.slots) > model.settings.max_instances  # they go because the configuration says so
        for slot in model.slots.values() if not surplus else ():
            if slot.order is not None and slot.instance.state in (State.RETIRING, State.WAKING):
                self._end_order(slot, "an order to wake came after it")
        self.tick()
        ready = next((i for i in model.instances() if i.state is State.READY), None)
        if ready is not None and self.ready:
            return ready.id, Tier.READY, None
        async with await self.lease(model.served_name, counts=False) as lease:
            return lease.instance_id, lease.found, lease.wake

    def order_down(
        self, key: str, to: Tier, *, instance_id: str | None = None, wait: bool = False, discard: bool = False
    ) -> list[Order]:
        """Send the instances of a model, or one of them, down to a rung or the next colder one that they have.

        Never cuts an answer off: with requests about, it is refused, or with `wait` the instance takes no new ones and
        goes after its last. Those that are there already have an order that has come true. `discard`: a golden
        checkpoint goes too, with the last instance.
        Raises InstanceNotFoundError, ConflictError or DrainingError, with nothing changed.
        """
        if self.stopping or not self._open:
            raise DrainingError("The server is starting or shutting down.", retry_after_s=1.0)
        model = self._models[key]
        slots = [slot for slot in model.slots.values() if instance_id in (None, slot.instance.id)]
        if instance_id is not None and not slots:
            there = ", ".join(model.slots) or "none"
            raise InstanceNotFoundError(f"{key!r} has no instance {instance_id!r}; there are: {there}.")
        goals = {slot.instance.id: self._goal(model, slot, to) for slot in slots}
        moving = [slot for slot in slots if _to_move(slot, goals[slot.instance.id])]
        if moving:
            self._refuse_order(model, moving, wait=wait)
        if discard and to is Tier.STOPPED and instance_id is None:
            model.discarding = bool(model.slots)
        orders = []
        for slot in slots:
            order = slot.order
            goal = goals[slot.instance.id]
            if order is None or order.to < goal:
                order = Order(slot.instance.id, slot.instance.tier, goal)
                self._give(model, slot, order)
            orders.append(order)
        self.tick()
        return orders

    def _goal(self, model: _Model, slot: _Slot, to: Tier) -> Tier:
        """The rung that an order means for an instance. Raises ConflictError when it has none."""
        instance = slot.instance
        if _height(instance) >= to:
            return to
        goal = policy.ordered_step(instance, to, model.view())
        if goal is None:
            missing = model.runtime.rungs().missing
            reason = next((missing[t] for t in (to, Tier.CHECKPOINTED) if t in missing), None)
            reason = reason or "this engine failed to go there before; one that is started anew may"
            raise ConflictError(f"{instance.id} has no rung {to.label}, nor a colder one but stopped: {reason}.")
        return goal

    def _refuse_order(self, model: _Model, moving: Sequence[_Slot], *, wait: bool) -> None:
        """Raise ConflictError if something is in the way of an order to go down."""
        if model.settings.min_ready and not model.draining:
            raise ConflictError(
                f"min_ready keeps {model.settings.min_ready} of {model.served_name!r} ready: drain the model first."
            )
        if wait:
            return
        busy = [f"{s.instance.id} is answering {s.instance.leases}" for s in moving if s.instance.leases]
        if busy:
            raise ConflictError(f'{"; ".join(busy)} requests. With "when_busy": "wait" it goes after the last.')
        if waiting := sum(not w.granted.done() for w in model.queue):
            raise ConflictError(
                f'{waiting} requests wait for {model.served_name!r} and would wake it again. With "when_busy": "wait" '
                f"it goes after them."
            )

    def _give(self, model: _Model, slot: _Slot, order: Order) -> None:
        before, slot.order = slot.order, order
        slot.instance.ordered = order.to
        self._orders.append((model, slot, order))
        if before is not None:
            before.end(f"an order to go to {order.to.label} came after it")

    def _note_orders(self) -> None:
        """End the orders that came true."""
        for model, slot, order in [*self._orders]:
            instance = slot.instance
            there = instance.state in RESTING and instance.tier >= order.to
            if there or slot.instance.id not in model.slots:
                self._end_order(slot)
        self._orders = [entry for entry in self._orders if entry[2].open]

    def _give_up_orders(self) -> None:
        for _, slot, _ in self._orders:
            self._end_order(slot, "the server is shutting down")

    def _end_order(self, slot: _Slot, failure: str | None = None) -> None:
        order, slot.order = slot.order, None
        slot.instance.ordered = None
        if order is not None:
            order.end(failure)

    def _fail_order(self, slot: _Slot, to: Tier, failure: str) -> None:
        """The step to `to` failed; an order for a colder rung than that goes on."""
        if slot.order is not None and to >= slot.order.to:
            self._end_order(slot, failure)

    def drain(self, key: str | None = None) -> None:
        """Admit nothing new, for one model or at all, until `admit`; what runs or waits goes on."""
        self._set_draining(key, draining=True)
        log.info("%s closed to new requests", key or "all models")

    def admit(self, key: str | None = None) -> None:
        """Take `drain` back."""
        self._set_draining(key, draining=False)
        log.info("%s open to requests", key or "all models")

    def _set_draining(self, key: str | None, *, draining: bool) -> None:
        if key is None:
            self._shut = draining
        else:
            self._models[key].draining = draining
        self.tick()

    def unused(self, key: str | None = None) -> bool:
        """Whether no request runs or waits, for one model or at all."""
        models = [model for name, model in self._models.items() if key in (None, name)]
        return not any(m.queue or any(i.leases for i in m.instances()) for m in models)

    async def until_unused(self, key: str | None = None) -> None:
        """Return when no request runs or waits, for one model or at all, or the server is about to end."""
        changed = asyncio.Event()
        silence = self.listen(changed.set)
        try:
            while not self.unused(key) and not self.stopping:
                changed.clear()
                await changed.wait()
        finally:
            silence()

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after whatever `status` says may have changed; the result ends that."""
        self._listeners.add(callback)
        return lambda: self._listeners.discard(callback)

    def _tell(self) -> None:
        for callback in [*self._listeners]:
            callback()

    # --- deciding ---

    def tick(self) -> None:
        """Decide anew and start what was decided."""
        if self._closed or not self._open or self._ticking:
            return
        self._ticking = True
        try:
            for model in self._models.values():
                self._dispatch(model)
            if self._orders:
                self._note_orders()
            plan = policy.decide(
                policy.View(
                    [m.view() for m in self._everyone()],
                    self._settings.pool.max_awake,
                    self._settings.pool.switch_after,
                    self._ledger.load(i for m in self._everyone() for i in m.instances()),
                ),
                self._clock(),
            )
            for action in plan.actions:
                if not self._stopping or self._is_waited_for(action):
                    self._begin(action)
            self._set_timer(plan.deadline)
        finally:
            self._ticking = False
        self._tell()

    def _is_waited_for(self, action: policy.Action) -> bool:
        return not isinstance(action, policy.StepDown | policy.Clone) and (
            not isinstance(action, policy.Wake) or bool(self._models[action.model].queue)
        )

    def _dispatch(self, model: _Model) -> None:
        """Grant leases in the order of the queue as long as there is room."""
        while (waiter := model.queue.first()) is not None:
            if waiter.granted.done():
                model.queue.discard(waiter)
                continue
            preferred = waiter.preferred
            instance = policy.pick(model.instances(), model.settings.max_concurrency, preferred)
            if instance is None:
                return
            model.queue.discard(waiter)
            waited_s = self._clock() - waiter.since
            wake = instance.last_wake
            # A wake that ended before the request came is not the one it waited for.
            if wake is not None and wake.ended < waiter.since:
                wake = None
            queue_s = max(0.0, waited_s - wake.seconds) if wake is not None else waited_s
            waiter.granted.set_result(self._grant(model, instance, waiter.found, queue_s, wake))

    def _begin(self, action: policy.Action) -> None:
        match action:
            case policy.Clone(key):
                model = self._models[key]
                slot = self._new_slot(model, self._free_id(model))
                slot.instance.apply(Event.CLONE)
                slot.task = self._spawn(f"clone {slot.instance.id}", self._clone(model, slot))
            case policy.Wake():
                self._begin_wake(action)
            case policy.StepDown():
                self._begin_step_down(action)
            case policy.Retire(instance):
                instance.apply(Event.RETIRE)
                log.info("%s retiring: another model waits for its place", instance.id)
            case policy.Readmit(instance):
                instance.apply(Event.READMIT)
                log.info("%s readmitted", instance.id)

    def _begin_wake(self, action: policy.Wake) -> None:
        evictions = self._evict(action) if action.victims else _NO_EVICTIONS
        model = self._models[action.model]
        known = action.instance
        slot = model.slots[known.id] if known is not None else self._new_slot(model, self._free_id(model))
        instance = slot.instance
        found = Tier.STOPPED if instance.state is State.NEW else instance.tier
        instance.waking_from = found
        slot.wake_began = self._clock()
        instance.apply(Event.WAKE)
        log.info("%s waking from %s", instance.id, found.label)
        slot.task = self._spawn(f"wake {instance.id}", self._wake(model, slot, instance.generation, evictions))

    def _evict(self, action: policy.Wake) -> _Evictions:
        held = self._ledger.charge(action.instance) if action.instance is not None else gpu_ledger.NOTHING
        needed = gpu_ledger.beyond(self._ledger.need(action.model) or gpu_ledger.NOTHING, held)
        if not gpu_ledger.beyond(needed, {gpu.uuid: gpu.free_bytes for gpu in self._ledger.gpus}):
            needed = {}  # as much was free before anybody made room: nothing is to be seen to
        expected = {}
        for slot in (s for m in self._everyone() for s in m.slots.values()):
            if slot.instance.state in (State.SLEEPING, State.SUSPENDED):
                expected[slot.instance.id] = self._ledger.expected(slot.instance, slot.instance.tier)
        for victim in action.victims:
            expected[victim.instance.id] = self._ledger.expected(victim.instance, victim.to)
        tasks = {victim.instance.id: self._begin_step_down(victim) for victim in action.victims}
        return _Evictions(tasks, needed, expected)

    def _begin_step_down(self, action: policy.StepDown) -> asyncio.Task[None]:
        instance = action.instance
        model = self._home(instance)
        slot = model.slots[instance.id]
        origin = instance.tier
        instance.apply(DESCENT[action.to])
        instance.evicted = action.reason == "evict"
        last_of_discarded = model.discarding and len(model.slots) == 1
        frees_image = (
            model.runtime.shares_images and slot.image.present and (action.reason == "idle" or last_of_discarded)
        )
        if action.to is Tier.STOPPED and frees_image:
            _reset(slot.image)  # the last rung frees everything, and no clone is prepared any more
            slot.discards_image = True
        log.info("%s %s -> %s (%s)", instance.id, origin.label, action.to.label, action.reason)
        work = (
            self._remove(model, slot, action.reason)
            if action.to is Tier.STOPPED
            else self._descend(model, slot, origin, action.to, action.reason)
        )
        slot.task = self._spawn(f"step down {instance.id}", work)
        return slot.task

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %r", task.get_name(), error, exc_info=error)
        self.tick()

    def _set_timer(self, deadline: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            delay_s = max(0.0, deadline - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.tick)

    def _new_slot(self, model: _Model, instance_id: str) -> _Slot:
        slot = _Slot(Instance(instance_id, model.key), model.image if model.runtime.shares_images else _Image())
        model.slots[instance_id] = slot
        return slot

    def _free_id(self, model: _Model) -> str:
        taken = {instance_id for m in self._everyone() if m.key == model.key for instance_id in m.slots}
        return next(i for n in itertools.count(1) if (i := f"{model.key}-{n}") not in taken)

    def _attach(self, model: _Model, slot: _Slot, handle: Handle) -> None:
        slot.handle = handle
        if slot.client is None:
            slot.client = self._connect(handle, model.served_name, model.settings)
        else:
            slot.client.base_url = handle.base_url

    # --- waking ---

    async def _wake(self, model: _Model, slot: _Slot, generation: int, evictions: _Evictions) -> None:
        """Bring an instance to ready from the warmest rung that works."""
        instance = slot.instance
        found = instance.waking_from or Tier.STOPPED
        stages = Stages()
        began = self._clock()
        failures: list[str] = []
        if evictions.tasks:
            with stages.measure("evict"):
                await asyncio.wait(evictions.tasks.values())
                await self._make_sure(evictions)
        for tier in _rungs_from(found, slot):
            try:
                await self._climb(model, slot, tier, stages)
            except Exception as error:  # noqa: BLE001 - whatever it was, a colder rung may work and nobody may be left waiting
                reason = str(error) or f"no result within {_limit_s(model.settings, tier):g} s"
                _note_unexpected(instance, error)
                failures.append(f"{tier.label}: {reason}")
                log.warning("%s did not wake from %s: %s", instance.id, tier.label, reason)
                self._metrics.wake_failures.labels(model.key, tier.label).inc()
                await self._clear_away(model, slot, tier)
                continue
            if instance.generation != generation or instance.state is not State.WAKING:
                return
            self._woken(model, instance, found, tier, began, stages)
            return
        self._fail_wake(model, slot, failures)
        await self._mend(model, slot)

    def _woken(self, model: _Model, instance: Instance, found: Tier, tier: Tier, began: float, stages: Stages) -> None:
        now = self._clock()
        seconds = now - began
        instance.apply(Event.AT_READY)
        instance.waking_from = None
        model.failed_wakes = 0
        instance.idle_since = now
        if tier in (Tier.SLEEPING, Tier.SUSPENDED):
            self._ledger.woke(instance)
        self._weigh_due.set()
        record = WakeRecord(found, tier, time.time(), now, seconds, dict(stages.seconds), dict(stages.starts))
        instance.last_wake = record
        self._wakes.appendleft(_wake_status(record) | {"model": model.key, "instance": instance.id})
        if tier is found:
            self._costs.record(model.key, tier, seconds)
        for stage, value in (*stages.seconds.items(), ("total", seconds)):
            self._metrics.wake.labels(model.key, found.label, stage).observe(value)
        detail = " ".join(f"{name}={value * 1000:.0f}ms" for name, value in stages.seconds.items())
        log.info("%s ready from %s in %.3f s: %s", instance.id, tier.label, seconds, detail)
        self.tick()

    def _fail_wake(self, model: _Model, slot: _Slot, failures: Sequence[str]) -> None:
        """Tell those who wait for nothing but this wake; the next request tries again."""
        slot.instance.apply(Event.BROKE)
        self._rest(model)
        found = (slot.instance.waking_from or Tier.STOPPED).label
        failed = {"found": found, "at_unix_s": time.time(), "failed": [*failures]}
        self._wakes.appendleft(failed | {"model": model.key, "instance": slot.instance.id})
        others = (s.instance.state for s in model.slots.values() if s is not slot)
        if any(state in (State.WAKING, State.READY) for state in others):
            return
        message = f"The model {model.served_name!r} could not be started: {'; '.join(failures)}"
        self._fail_waiters(model, WakeFailedError(message, retry_after_s=self._expected_wait_s(model)))

    def _rest(self, model: _Model) -> None:
        """Nothing that nobody waits for is started for a while."""
        delay_s = _RESTOCK_RETRY_S[min(model.failed_wakes, len(_RESTOCK_RETRY_S) - 1)]
        model.failed_wakes += 1
        model.restock_at = self._clock() + delay_s

    async def _climb(self, model: _Model, slot: _Slot, tier: Tier, stages: Stages) -> None:
        """One attempt from one rung, within its time limit."""
        async with asyncio.timeout(_limit_s(model.settings, tier)):
            match tier:
                case Tier.STOPPED:
                    await self._start(model, slot, stages)
                case Tier.CHECKPOINTED | Tier.ARCHIVED:
                    await self._restore(model, slot, stages)
                case Tier.SUSPENDED:
                    with stages.measure("resume"):
                        await model.runtime.resume(_handle(slot))
                    await self._wake_up(slot, stages)
                case _:
                    await self._wake_up(slot, stages)

    async def _start(self, model: _Model, slot: _Slot, stages: Stages) -> None:
        settings, instance = model.settings, slot.instance
        self._ledger.began(instance)
        with stages.measure("start"):
            handle = await model.runtime.start(instance.id, model.key, settings)
        self._attach(model, slot, handle)
        instance.sleep_level = 0
        instance.barred.clear()
        instance.postponed.clear()
        self._watch(model, slot)
        await self._load(model, slot, stages)

    async def _load(self, model: _Model, slot: _Slot, stages: Stages) -> None:
        """From an engine that was started to one that serves and is known."""
        settings, instance, client = model.settings, slot.instance, _client(slot)
        slot.loading = True
        with stages.measure("load"):
            await _unless_it_ends(slot, client.wait_healthy(settings.health.path, settings.health.interval))
        slot.loading = False
        with stages.measure("warmup"):
            slot.warmup = await _unless_it_ends(slot, client.warm_up(settings.warmup))
        if await client.is_sleeping() is None:
            instance.barred.add(Tier.SLEEPING)
        slot.canary, slot.weights_copy = None, "none"
        if settings.canary != "never" and Tier.CHECKPOINTED in model.runtime.rungs().offered:
            with stages.measure("canary"):
                slot.canary = await _unless_it_ends(slot, client.canary())

    async def _restore(self, model: _Model, slot: _Slot, stages: Stages) -> None:
        settings, instance, image = model.settings, slot.instance, slot.image
        await self._unwatch(slot)
        self._ledger.began(instance)
        async with image.lock:
            if image.archived:
                with stages.measure("unarchive"):
                    await model.runtime.unarchive_image(_handle(slot))
                image.archived = False
        reading = self._read_weights(model, image)
        with stages.measure("restore"):
            self._attach(model, slot, await model.runtime.restore(_handle(slot), stages))
        instance.sleep_level = image.sleep_level
        slot.canary = image.canary
        slot.weights_copy = "good" if settings.weights_copy else "none"
        self._watch(model, slot)
        client = _client(slot)
        with stages.measure("health"):
            await _unless_it_ends(slot, client.wait_healthy(settings.health.path, settings.health.interval))
        await self._wake_up(slot, stages)
        await asyncio.wait([reading])
        due = settings.canary == "always" or (settings.canary == "first" and not image.canary_checked)
        if due and image.canary is not None:
            with stages.measure("canary"):
                answer = await _unless_it_ends(slot, client.canary())
            if answer != image.canary:
                raise EngineError(
                    "canary", "the restored engine answers differently from the one that was checkpointed"
                )
            image.canary_checked = True
        image.failures = 0
        if not settings.keep and not model.leaving:
            await self._forget_image(model, slot)

    def _read_weights(self, model: _Model, image: _Image) -> asyncio.Task[None]:
        """Bring the weights into memory beside the restore, for an engine that has to load them again."""

        async def read() -> None:
            if image.sleep_level == _DEEPEST_SLEEP and model.settings.weights and not model.settings.weights_copy:
                await asyncio.to_thread(weights.read_ahead, model.settings.weights)

        return self._spawn(f"read the weights of {model.key}", read())

    async def _wake_up(self, slot: _Slot, stages: Stages) -> None:
        if slot.instance.sleep_level:
            level, copied = slot.instance.sleep_level, slot.weights_copy == "good"
            if not await _unless_it_ends(slot, _client(slot).wake_up(level, stages, copied=copied)):
                slot.weights_copy = "lost"
            slot.instance.sleep_level = 0

    async def _clear_away(self, model: _Model, slot: _Slot, tier: Tier) -> None:
        """After a failed attempt: no process is left, and an image that failed too often is gone."""
        slot.loading = False
        await self._unwatch(slot)
        if slot.client is not None:
            await slot.client.disconnect()
        if slot.handle is None:
            return
        try:
            await model.runtime.drop(slot.handle)
        except RuntimeFailure as error:
            log.error("%s: %s", slot.instance.id, error)
        if tier in (Tier.CHECKPOINTED, Tier.ARCHIVED):
            slot.image.failures += 1
            if slot.image.failures >= MAX_IMAGE_FAILURES and slot.image.present:
                await self._quarantine(model, slot)

    async def _quarantine(self, model: _Model, slot: _Slot) -> None:
        """Set the image aside; instances that are nothing but this image go with it."""
        log.error("%s: its checkpoint failed %d times and is set aside", slot.instance.id, slot.image.failures)
        self._metrics.quarantines.labels(model.key).inc()
        _reset(slot.image)
        for other in [s for s in model.slots.values() if s.image is slot.image and s is not slot]:
            if other.instance.state in (State.CHECKPOINTED, State.ARCHIVED):
                other.instance.apply(Event.STOP)
                other.task = self._spawn(
                    f"remove {other.instance.id}", self._remove(model, other, "its checkpoint was set aside")
                )
        try:
            await model.runtime.quarantine_image(_handle(slot))
        except (RuntimeFailure, OSError) as error:
            log.error("%s: %s", slot.instance.id, error)

    async def _forget_image(self, model: _Model, slot: _Slot) -> None:
        _reset(slot.image)
        try:
            await model.runtime.discard_image(_handle(slot))
        except RuntimeFailure as error:
            log.error("%s: %s", slot.instance.id, error)

    async def _clone(self, model: _Model, slot: _Slot) -> None:
        """Prepare an instance that the golden checkpoint can be restored to."""
        try:
            async with asyncio.timeout(model.settings.wake_timeout):
                handle = await model.runtime.clone(slot.instance.id, model.key, model.settings)
        except (RuntimeFailure, TimeoutError) as error:
            log.warning("%s cannot be prepared: %s", slot.instance.id, str(error) or "no result in time")
            self._rest(model)
            slot.instance.apply(Event.BROKE)
            await self._mend(model, slot)
            return
        self._attach(model, slot, handle)
        slot.instance.idle_since = self._clock()
        if not slot.image.present:  # set aside meanwhile
            slot.instance.apply(Event.BROKE)
            await self._mend(model, slot)
            return
        slot.instance.apply(Event.AT_ARCHIVED if slot.image.archived else Event.AT_CHECKPOINTED)
        log.info("%s prepared: a clone of the golden checkpoint", slot.instance.id)

    # --- stepping down ---

    async def _descend(self, model: _Model, slot: _Slot, origin: Tier, to: Tier, reason: str) -> None:
        """Take an idle instance down; a failure without harm leaves it where it is, any other breaks it."""
        instance, client, settings = slot.instance, _client(slot), model.settings
        try:
            limit_s = settings.checkpoint_timeout if to is Tier.CHECKPOINTED else settings.wake_timeout
            async with asyncio.timeout(limit_s):
                await self._go_down(model, slot, origin, to)
        except Exception as error:  # noqa: BLE001 - whatever it was, the instance may not stay between two rungs
            text = str(error) or "no result in time"
            _note_unexpected(instance, error)
            harmless = isinstance(error, RuntimeFailure) and error.alive
            if isinstance(error, RuntimeFailure) and error.leaked_bytes:
                self._metrics.gpu_leaks.labels(model.key).inc()
            if harmless:
                delay_s = _STEP_RETRY_S[min(slot.failed_steps, len(_STEP_RETRY_S) - 1)]
                slot.failed_steps += 1
                instance.postponed[to] = self._clock() + delay_s
            else:
                instance.barred.add(to)
            if isinstance(error, EngineError):
                harmless = await self._still_awake(slot)
            if not harmless:
                log.error("%s broke on its way to %s: %s", instance.id, to.label, text)
                self._fail_order(slot, to, f"the engine broke: {text}")
                instance.apply(Event.BROKE)
                await self._mend(model, slot)
                return
            log.warning("%s cannot go to %s, and stays: %s", instance.id, to.label, text)
            self._fail_order(slot, to, text)
            arrived = origin if origin is not Tier.READY or not instance.sleep_level else Tier.SLEEPING
            if slot.watcher is None:
                self._watch(model, slot)
        else:
            arrived = to
            slot.failed_steps = 0
            if to >= Tier.SUSPENDED:
                await client.disconnect()
            self._metrics.step_downs.labels(model.key, to.label, reason).inc()
            log.info("%s %s", instance.id, to.label)
        instance.apply(ARRIVAL[arrived])
        if arrived is not Tier.READY:
            self._ledger.arrived(instance, arrived)
        self._weigh_due.set()

    async def _go_down(self, model: _Model, slot: _Slot, origin: Tier, to: Tier) -> None:
        match to:
            case Tier.SLEEPING:
                await self._fall_asleep(model, slot, origin)
            case Tier.SUSPENDED:
                await self._fall_asleep(model, slot, origin)
                if slot.instance.sleep_level:
                    await self._weigh_once(model, slot, gpu_ledger.SLEEPING)
                await _client(slot).disconnect()
                await model.runtime.suspend(_handle(slot))
            case Tier.CHECKPOINTED:
                async with slot.image.lock:
                    await self._to_image(model, slot, origin)
            case _:
                async with slot.image.lock:
                    if not slot.image.archived:
                        await model.runtime.archive_image(_handle(slot))
                        slot.image.archived = True

    async def _fall_asleep(self, model: _Model, slot: _Slot, origin: Tier) -> None:
        if origin is Tier.READY and Tier.SLEEPING not in slot.instance.barred:
            # Level 1 leaves a pinned copy of the weights in the process for good, which would double the checkpoint.
            wanted = Tier.CHECKPOINTED in model.runtime.rungs().offered and Tier.CHECKPOINTED in model.timetable
            yet_to_come = wanted and not slot.image.present
            level = model.settings.golden_sleep_level if yet_to_come else model.settings.sleep_level
            if slot.weights_copy == "lost" or (yet_to_come and model.settings.weights_copy):
                await self._copy_weights(slot)
            if level == _DEEPEST_SLEEP and not yet_to_come and slot.weights_copy != "good":
                level = 1
            await _client(slot).sleep(level)
            slot.instance.sleep_level = level

    async def _copy_weights(self, slot: _Slot) -> None:
        """Have the engine write the copy of its weights; without one they are loaded in the engine's own way."""
        if slot.instance.evicted and slot.weights_copy == "lost":
            return  # somebody waits for its place
        async with slot.image.copying:
            try:
                written = await _client(slot).save_weights()
            except EngineError as error:
                log.warning("%s: no copy of its weights: %s", slot.instance.id, error)
                return
        slot.weights_copy = "good"
        log.info("%s: %.2f GiB of weights copied", slot.instance.id, written / (1 << 30))

    async def _to_image(self, model: _Model, slot: _Slot, origin: Tier) -> None:
        """End the processes; where there is no image yet, write one before."""
        instance, image, client = slot.instance, slot.image, _client(slot)
        if image.present:
            await self._unwatch(slot)
            await client.disconnect()
            await model.runtime.drop(_handle(slot))
        else:
            if slot.canary is None and origin is Tier.READY and model.settings.canary != "never":
                slot.canary = await client.canary()
            if origin is Tier.READY:
                await self._weigh_once(model, slot, gpu_ledger.READY)
            await self._fall_asleep(model, slot, origin)
            if instance.sleep_level and origin <= Tier.SLEEPING:
                await self._weigh_once(model, slot, gpu_ledger.SLEEPING)
            await client.disconnect()
            await self._unwatch(slot)
            details: dict[str, Any] = {"warmup": slot.warmup}
            if figures := self._ledger.figures(model.key):
                details["gpu"] = figures
            await model.runtime.checkpoint(
                _handle(slot), ImageFacts(instance.sleep_level, slot.canary, details), Stages()
            )
            image.present, image.archived, image.failures = True, False, 0
            if self._settings.pool.archive_copies and Tier.ARCHIVED in model.runtime.rungs().offered:
                self._spawn(f"copy {model.key} to the archive", self._copy_to_archive(model, slot))
            image.sleep_level, image.canary, image.canary_checked = instance.sleep_level, slot.canary, False
        instance.sleep_level = image.sleep_level

    async def _still_awake(self, slot: _Slot) -> bool:
        with contextlib.suppress(EngineError, TimeoutError):
            async with asyncio.timeout(5.0):
                return slot.instance.sleep_level == 0 and await _client(slot).is_sleeping() is False
        return False

    async def _remove(self, model: _Model, slot: _Slot, reason: str) -> None:
        """End an instance and forget it, in this order; tries again until it has ended."""
        instance = slot.instance
        await self._unwatch(slot)
        if slot.client is not None:
            await slot.client.disconnect()
        attempt = 0
        while slot.handle is not None:
            try:
                await model.runtime.remove(slot.handle)
                if slot.discards_image:
                    await model.runtime.discard_image(slot.handle)
                break
            except RuntimeFailure as error:
                delay_s = _REMOVE_RETRY_S[min(attempt, len(_REMOVE_RETRY_S) - 1)]
                attempt += 1
                log.error("%s cannot be removed, next try in %g s: %s", instance.id, delay_s, error)
                await asyncio.sleep(delay_s)
        instance.apply(Event.WENT)
        del model.slots[instance.id]
        self._ledger.forget(instance.id)
        self._weigh_due.set()
        self._forget_if_gone(model)
        model.discarding = model.discarding and bool(model.slots)
        self._end_order(slot)
        self._metrics.step_downs.labels(model.key, Tier.STOPPED.label, reason).inc()
        log.info("%s stopped", instance.id)

    # --- GPU memory ---

    async def _keep_weighing(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WEIGH_EVERY_S):
                    await self._weigh_due.wait()
            self._weigh_due.clear()
            await self._weigh()
            self.tick()

    async def _weigh(self) -> None:
        """Write down what the GPUs and our engines hold; nothing where that cannot be learned."""
        try:
            if self._gpus is not None:
                await self._weigh_all(self._gpus)
        except Exception:
            log.exception("GPU memory could not be weighed")

    async def _weigh_all(self, gpus: Gpus) -> None:
        seen = [(m, s, s.instance.state, s.instance.generation) for m, s in self._live()]
        readings = asyncio.gather(*(m.runtime.gpu_bytes(_handle(s)) for m, s, _, _ in seen))
        memory, held = await asyncio.gather(gpus.memory(), readings)
        if not memory:
            return
        settled = [s for _, s in self._live()] == [s for _, s, _, _ in seen]
        for (model, slot, state, generation), count in zip(seen, held, strict=True):
            instance = slot.instance
            same = instance.state is state and instance.generation == generation and instance.id in model.slots
            settled = settled and same and (state in RESTING or state is State.RETIRING)
            if same:
                self._ledger.weigh(instance, count, outgoing=model.leaving)
                self._tell_if_worn(slot)
        ours = [(slot.instance, count) for (_, slot, _, _), count in zip(seen, held, strict=True)]
        self._ledger.read(memory, ours, settled=settled)
        self._publish_gpus()

    def _live(self) -> list[tuple[_Model, _Slot]]:
        """The instances that have processes."""
        return [
            (m, s)
            for m in self._everyone()
            for s in m.slots.values()
            if s.handle is not None and s.instance.state not in gpu_ledger.HOLDS_NOTHING
        ]

    def _tell_if_worn(self, slot: _Slot) -> None:
        instance = slot.instance
        if self._ledger.newly_worn(instance):
            log.warning(
                "%s holds %d MiB more of the GPU than at first, after %d cycles: %s",
                instance.id,
                self._ledger.growth_bytes(instance) >> 20,
                self._ledger.cycles(instance),
                "it is replaced from its checkpoint when it is idle" if slot.renewable else "it has no checkpoint",
            )

    async def _weigh_once(self, model: _Model, slot: _Slot, kind: str) -> None:
        """Learn what a model holds awake or asleep in passing, where that was never seen."""
        if self._gpus is not None and not model.leaving and not self._ledger.knows(model.key, kind):
            self._ledger.learn(model.key, {kind: dict(await model.runtime.gpu_bytes(_handle(slot)))})

    async def _make_sure(self, evictions: _Evictions) -> None:
        """See that what the victims held came free; stop those that keep it. A failure to see is not one to wake."""
        try:
            if evictions.needed and await self._lacking(evictions.needed):
                await self._find_room(evictions)
        except Exception:
            log.exception("GPU memory could not be looked at")

    async def _find_room(self, evictions: _Evictions) -> None:
        # One that fell asleep would go off the GPU behind the wake: now, so that there may be enough.
        slots = {s.instance.id: (m, s) for m, s in self._live() if s.instance.id in evictions.expected}
        victims = [slots[i] for i in evictions.tasks if i in slots]
        for model, slot in victims:
            if policy.may_suspend(slot.instance, model.view(), self._clock()):
                self._begin_step_down(policy.StepDown(slot.instance, Tier.SUSPENDED, "evict"))
        leaving = [s.task for _, s in victims if s.instance.state is State.SUSPENDING and s.task is not None]
        if leaving:
            await asyncio.wait(leaving)
        await self._weigh()
        if not await self._lacking(evictions.needed):
            return
        stopping = []
        for instance_id, (model, slot) in slots.items():
            if slot.instance.state not in (State.SLEEPING, State.SUSPENDED):
                continue
            leaked = self._ledger.leaked_bytes(slot.instance, evictions.expected[instance_id])
            if leaked:
                log.error("%s holds %d MiB more of the GPU than expected: stopped", instance_id, leaked >> 20)
                self._metrics.gpu_leaks.labels(model.key).inc()
                self._break(model, slot)
                stopping += [slot.task] if slot.task is not None else []
        if stopping:
            await asyncio.wait(stopping)
        if lacking := await self._lacking(evictions.needed):
            log.warning("%d MiB of GPU memory are still missing for the next wake", sum(lacking.values()) >> 20)

    async def _lacking(self, needed: Bytes) -> dict[str, int]:
        """What is not free of what is needed; nothing where NVML does not answer."""
        memory: list[GpuMemory] = await self._gpus.memory() if self._gpus is not None else []
        return gpu_ledger.beyond(needed, {g.uuid: g.free_bytes for g in memory}) if memory else {}

    def _publish_gpus(self) -> None:
        for gpu in self._gpu_status():
            for kind in ("total", "used", "foreign", "charged"):
                self._metrics.gpu_memory.labels(str(gpu["index"]), kind).set(gpu[f"{kind}_bytes"])
        for model in self._models.values():
            held = sum(self._ledger.charged(model.instances()).values())
            self._metrics.instance_gpu.labels(model.key).set(held)

    def _gpu_status(self) -> list[dict[str, Any]]:
        charged = self._ledger.charged(i for m in self._everyone() for i in m.instances())
        return [
            {
                "index": gpu.index,
                "name": gpu.name,
                "uuid": gpu.uuid,
                "total_bytes": gpu.total_bytes,
                "used_bytes": gpu.used_bytes,
                "foreign_bytes": self._ledger.foreign.get(gpu.uuid, 0),
                "charged_bytes": charged.get(gpu.uuid, 0),
            }
            for gpu in self._ledger.gpus
        ]

    # --- engines that end by themselves ---

    def _watch(self, model: _Model, slot: _Slot) -> None:
        slot.watcher = asyncio.create_task(model.runtime.wait_exit(_handle(slot)), name=f"watch {slot.instance.id}")
        slot.watcher.add_done_callback(lambda task: self._engine_ended(model, slot, task))

    async def _unwatch(self, slot: _Slot) -> None:
        watcher, slot.watcher = slot.watcher, None
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait([watcher])

    def _engine_ended(self, model: _Model, slot: _Slot, watcher: asyncio.Task[str]) -> None:
        if watcher.cancelled() or slot.watcher is not watcher:
            return
        reason = watcher.result() if watcher.exception() is None else repr(watcher.exception())
        log.warning("%s: the engine ended in state %s: %s", slot.instance.id, slot.instance.state.value, reason)
        self._metrics.engine_exits.labels(model.key).inc()
        self._break(model, slot)

    def _break(self, model: _Model, slot: _Slot) -> None:
        """The engine is of no use any more. During a move the move's own task finds out."""
        if slot.instance.state in (State.READY, State.RETIRING, State.SLEEPING, State.SUSPENDED):
            slot.instance.apply(Event.BROKE)
            slot.task = self._spawn(f"mend {slot.instance.id}", self._mend(model, slot))
            self.tick()

    async def _examine(self, slot: _Slot, generation: int) -> None:
        instance = slot.instance
        if self._closed or instance.generation != generation:
            return
        model = self._home(instance)
        healthy = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                healthy = await _client(slot).healthy(model.settings.health.path)
        if not healthy and instance.generation == generation:
            log.warning("%s failed a request and does not answer %s", instance.id, model.settings.health.path)
            self._break(model, slot)

    async def _mend(self, model: _Model, slot: _Slot) -> None:
        """Clear a broken engine away: down to its checkpoint if it has one, else altogether."""
        instance = slot.instance
        await self._unwatch(slot)
        if slot.image.present and slot.handle is not None:
            if slot.client is not None:
                await slot.client.disconnect()
            try:
                await model.runtime.drop(slot.handle)
            except RuntimeFailure as error:
                log.error("%s: %s", instance.id, error)
            else:
                instance.sleep_level = slot.image.sleep_level
                instance.idle_since = self._clock()
                instance.apply(Event.AT_CHECKPOINTED)
                self._ledger.arrived(instance, Tier.CHECKPOINTED)
                self._weigh_due.set()
                return
        instance.apply(Event.STOP)
        await self._remove(model, slot, "broken")

    # --- seeing ---

    def _publish(self) -> None:
        """Bring the gauges up to date; asked for when they are read, since requests have no time for it."""
        models: dict[str, list[_Model]] = {}
        for model in self._everyone():
            models.setdefault(model.key, []).append(model)
        for key, same in models.items():
            instances = [i for m in same for i in m.instances()]
            states = Counter(i.state for i in instances)
            for state in State:
                if state is not State.GONE:
                    self._metrics.instances.labels(key, state.value).set(states[state])
            self._metrics.queue_depth.labels(key).set(sum(len(m.queue) for m in same))
            self._metrics.leases.labels(key).set(sum(i.leases for i in instances))

    def tiers(self) -> dict[str, Tier]:
        """Model key → the rung a request would find."""
        return {m.key: policy.best_tier(m.instances()) for m in (*self._leaving, *self._models.values())}

    def status(self) -> dict[str, Any]:
        """For `/admin/status`: models with tier and queue, instances with state, leases, last use and wake."""
        return {
            "ready": self.ready,
            "draining": self._draining or self._shut,
            "leases": self._open_leases,
            "gpus": self._gpu_status(),
            "models": {key: self._model_status(model) for key, model in self._models.items()},
            "leaving": [self._instance_status(m, slot) for m in self._leaving for slot in m.slots.values()],
            "wakes": [*self._wakes],
        }

    def _model_status(self, model: _Model) -> dict[str, Any]:
        rungs = model.runtime.rungs()
        return {
            "name": model.served_name,
            "aliases": [*model.settings.aliases],
            "draining": model.draining,
            "tier": policy.best_tier(model.instances()).label,
            "queue": len(model.queue),
            "estimate_s": round(self.estimate_s(model.key), 3),
            "runtime": model.runtime.name,
            "shares_checkpoint": model.runtime.shares_images,
            "rungs": sorted(t.label for t in rungs.offered),
            "missing_rungs": {t.label: reason for t, reason in rungs.missing.items()},
            "gpu_need_bytes": self._ledger.need(model.key),
            "instances": [self._instance_status(model, slot) for slot in model.slots.values()],
        }

    def _instance_status(self, model: _Model, slot: _Slot) -> dict[str, Any]:
        instance, wake = slot.instance, slot.instance.last_wake
        step = policy.next_step(instance, model.view())
        due = None if step is None else round(time.time() + max(0.0, step[1] - self._clock()))
        return {
            "id": instance.id,
            "state": instance.state.value,
            "tier": instance.tier.label,
            "leases": instance.leases,
            "generation": instance.generation,
            "has_checkpoint": slot.image.present,
            "gpu_bytes": self._ledger.charge(instance),
            "gpu_growth_bytes": self._ledger.growth_bytes(instance),
            "cycles": self._ledger.cycles(instance),
            "ordered": instance.ordered.label if instance.ordered is not None else None,
            "next_step": None if step is None else {"to": step[0].label, "at_unix_s": due},
            "last_used_unix_s": instance.last_used_unix_s,
            "last_wake": None if wake is None else _wake_status(wake),
        }


def _wake_status(wake: WakeRecord) -> dict[str, Any]:
    return {
        "found": wake.found.label,
        "from": wake.reached_from.label,
        "at_unix_s": wake.at_unix_s,
        "seconds": round(wake.seconds, 6),
        "stages": {name: round(value, 6) for name, value in wake.stages.items()},
        "starts": {name: round(value, 6) for name, value in wake.starts.items()},
    }


def _frees_image(model: _Model, reason: str) -> bool:
    """Whether a golden checkpoint goes with an instance that is about to be removed."""
    last = all(s.instance.state is State.STOPPING for s in model.slots.values())
    return model.runtime.shares_images and (reason == "idle" or (model.discarding and last))


def _height(instance: Instance) -> Tier:
    """The rung that an instance is on, or will be when the move under way has ended."""
    return Tier.READY if instance.state is State.WAKING else instance.tier


def _to_move(slot: _Slot, goal: Tier) -> bool:
    """Whether an order to go to `goal` asks something new of an instance."""
    return _height(slot.instance) < goal and (slot.order is None or slot.order.to < goal)


def _connect(handle: Handle, served_name: str, model: ModelSettings) -> EngineClient:
    return EngineClient(handle.base_url, served_name, response_timeout_s=model.response_timeout)


def _reset(image: _Image) -> None:
    """There is no image any more."""
    image.present = image.archived = image.canary_checked = False
    image.failures = 0
    image.canary = None


def _hand_on(waiter: _Waiter) -> None:
    """Give back a lease that was granted in the moment its waiter was cancelled."""
    granted = waiter.granted
    if granted.done() and not granted.cancelled() and granted.exception() is None:
        granted.result().release()


def _rungs_from(found: Tier, slot: _Slot) -> list[Tier]:
    """The rungs to try, warmest first."""
    rungs = [] if found is Tier.STOPPED else [found]
    if found < Tier.CHECKPOINTED and slot.image.present:
        rungs.append(Tier.ARCHIVED if slot.image.archived else Tier.CHECKPOINTED)
    return [*rungs, Tier.STOPPED]


def _image_of(facts: ImageFacts) -> _Image:
    return _Image(True, facts.archived, sleep_level=facts.sleep_level, canary=facts.canary)


def _note_unexpected(instance: Instance, error: Exception) -> None:
    """An error that no layer below promises is a bug: its stack belongs into the log."""
    if not isinstance(error, EngineError | RuntimeFailure | TimeoutError):
        log.error("%s: unexpected %r", instance.id, error, exc_info=error)


def _limit_s(model: ModelSettings, tier: Tier) -> float:
    return model.start_timeout if tier is Tier.STOPPED else model.wake_timeout


def _on_its_way_down(model: _Model) -> bool:
    return any(i.state in DESCENDING for i in model.instances())


def _is_left(model: _Model, slot: _Slot) -> bool:
    """Whether the engine goes on without us, for the next warmpool to adopt."""
    fit = slot.instance.state in _LEFT_RUNNING or (slot.instance.state is State.WAKING and slot.loading)
    return fit and slot.handle is not None and model.runtime.leave(slot.handle)


def _handle(slot: _Slot) -> Handle:
    assert slot.handle is not None  # noqa: S101 - an instance that was started has one
    return slot.handle


def _client(slot: _Slot) -> EngineClient:
    assert slot.client is not None  # noqa: S101 - made with the handle
    return slot.client


async def _unless_it_ends(slot: _Slot, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or RuntimeFailure at once when the engine ends before."""
    task = asyncio.ensure_future(work)
    watcher = slot.watcher
    try:
        await asyncio.wait([task, *([watcher] if watcher is not None else [])], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        assert watcher is not None  # noqa: S101 - else the task would be done
        raise RuntimeFailure("start", f"the engine ended: {watcher.result()}")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
