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
from functools import partial
from typing import TYPE_CHECKING, Any

from proxy.config import diff
from proxy.config.values import format_size
from proxy.engine.api_key import key_of
from proxy.engine.client import EngineClient
from proxy.errors import (
    ConflictError,
    DrainingError,
    EngineError,
    Fault,
    InstanceNotFoundError,
    MaxWaitError,
    ModelNotFoundError,
    NoCapacityError,
    NoMemoryError,
    OverdueError,
    QueueFullError,
    RuntimeFailure,
    WakeFailedError,
    fault_of,
)
from proxy.host import facts as host
from proxy.host.turns import in_turns
from proxy.pool import gpu_accounting, policy
from proxy.pool import status as pool_status
from proxy.pool.gpu_accounting import GpuLedger
from proxy.pool.gpu_monitor import GpuWatch
from proxy.pool.instance import (
    ARRIVAL,
    AWAKE,
    DESCENDING,
    DESCENT,
    MOVING,
    RESTING,
    TRANSITIONS,
    Event,
    Instance,
    State,
    WakeRecord,
)
from proxy.pool.memory_accounting import MemoryLedger
from proxy.pool.memory_monitor import MemoryWatch
from proxy.pool.model import (
    NO_EVICTIONS,
    Evictions,
    Image,
    Lease,
    Model,
    Order,
    Slot,
    Waiter,
    client_of,
    hand_on,
    handle_of,
    image_of,
    is_left,
    limit_s,
    note_unexpected,
    reset,
    stop_grace_s,
    tier_found,
    tiers_from,
    too_slow,
)
from proxy.pool.stalls import Stalls
from proxy.pool.transitions import DEEPEST_SLEEP, Steps
from proxy.pool.usage import Usage
from proxy.pool.wake_failure import WakeFailure
from proxy.pool.written_off import WrittenOff
from proxy.runtime.base import Handle
from proxy.runtime.bounded import Bounded
from proxy.telemetry.overdue import GIVE_UP_S, Overdue
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence

    from proxy.config.diff import Changes
    from proxy.config.model import ModelSettings
    from proxy.config.settings import Settings
    from proxy.gpu.cuda import Gpus
    from proxy.host.facts import Memory
    from proxy.runtime.base import Found, ImageFacts, Outdated, Runtime
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.pool")

MAX_IMAGE_FAILURES = 2
"""An image that failed to restore this often in a row is set aside."""
_MOMENT_S = 0.05
_MODELS_A_TURN = 10
"""How many models `/admin/status` looks at in one turn of the event loop."""
_ADOPT_S = 5.0
"""How long an engine that runs already may take to say that it serves."""
_CLOSE_S = 60.0
"""How long `close` may take where nobody says so."""
_REMOVE_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_STEP_RETRY_S = (60.0, 300.0, 1800.0)
"""Between two tries to step down to a tier that could not be had without harm, as for want of space."""
_WAKES_KEPT = 50
_MEMORY_RETRY_S = 10.0
"""When one may ask again who was refused for want of host memory."""


class Pool:
    """All instances of all models on this host.

    `runtimes` by name; `clock` is monotonic, in seconds, and may be a test's; `connect` makes the client of an engine.
    `gpus`: whose memory is kept account of; opened by the runtimes. Without, it plays no part in any decision.
    `memory` reads the host's; likewise.
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
        memory: Callable[[], Memory] | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._usage = usage or Usage()
        self._overdue = Overdue(metrics)
        self._written_off = WrittenOff(metrics)
        self._all_runtimes = {
            name: Bounded(runtime, self._overdue, stop_grace_s(settings, name)) for name, runtime in runtimes.items()
        }
        self._runtimes = {m.runtime: self._all_runtimes[m.runtime] for m in settings.models.values()}
        self._ledger = GpuLedger(settings.pool.gpu_creep)
        self._gpus = GpuWatch(
            gpus,
            self._ledger,
            metrics,
            clock=clock,
            everyone=self._everyone,
            step_down=self._begin_step_down,
            give_up=self._break,
            changed=self.tick,
        )
        self._memory = MemoryLedger()
        self._memory_watch = MemoryWatch(
            memory if settings.pool.memory_check else None,
            self._memory,
            metrics,
            everyone=self._everyone,
            changed=self.tick,
        )
        self._stalls = Stalls(everyone=self._everyone, give_up=self._give_up_stalled)
        self._steps = Steps(
            connect=connect or _connect,
            spawn=self._spawn,
            ended=self._engine_ended,
            ledger=self._ledger,
            gpus=self._gpus,
            archives=lambda: self._settings.pool.archive_copies,
            damaged=self._quarantine,
        )
        self._models = {
            key: Model(key, model, settings.served_name(key), self._runtimes[model.runtime], self._ledger, self._memory)
            for key, model in settings.models.items()
        }
        self._configure_ledger()
        self._leaving: list[Model] = []
        """Models that the configuration has no more, or with other engines, until their last instance is gone."""
        self._coming: dict[str, Model] = {}
        """By key: models whose engine is made ready to take over from an outdated one."""
        self.changed = asyncio.Event()
        """Set when a model is found to be outdated."""
        self.lost: set[str] = set()
        """Models whose checkpoint could not be used at the start, as after an upgrade."""
        self._reconfiguring = asyncio.Lock()
        self._costs = policy.Costs()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open_leases = 0
        self._waiting = 0
        """Those in a queue, and those who have just left one."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        """When it fires, by the event loop's clock: uvloop's handles for very short delays do not know."""
        self._open = False
        self._draining = False
        self._stopping = False
        self._shut = False
        self._closed = False
        self._orders: list[tuple[Model, Slot, Order]] = []
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
            self.lost |= recovered.lost
            images = {owner: image_of(facts) for owner, facts in recovered.images.items()}
            model_of = {found.handle.instance_id: found.handle.model for found in recovered.instances}
            for owner, facts in recovered.images.items():
                self._ledger.learn(owner if runtime.shares_images else model_of[owner], facts.details.get("gpu"))
            for key in mine.keys() & images.keys() if runtime.shares_images else ():
                self._models[key].image = images[key]
                log.info("%s: golden checkpoint adopted", key)
            await asyncio.gather(*(self._adopt(found, images) for found in recovered.instances))
        await self._gpus.start()
        await self._memory_watch.start()
        self._stalls.start()
        self._open = True
        self.tick()

    async def _open_runtime(self, runtime: Runtime) -> None:
        await runtime.open()
        for tier, reason in runtime.tiers().missing.items():
            log.warning("no tier %s with runtime %s: %s", tier.label, runtime.name, reason)

    async def _adopt(self, found: Found, images: Mapping[str, Image]) -> None:
        """Take over an instance as it is; one that runs but does not serve is ended."""
        model = self._models[found.handle.model]
        if len(model.slots) >= model.settings.max_instances:
            try:
                await model.runtime.remove(found.handle)
            except RuntimeFailure as error:
                log.error(
                    "%s, of which there is one too many, stays until the next start: %s",
                    found.handle.instance_id,
                    error,
                )
            return
        slot = self._new_slot(model, found.handle.instance_id)
        self._steps.attach(model, slot, found.handle)
        if not model.runtime.shares_images and slot.instance.id in images:
            slot.image = images[slot.instance.id]
        instance = slot.instance
        if found.tier is Tier.READY:
            if found.restored:
                self._steps.note_restored(model, slot)
            state = await self._state_of_running(model, slot)
            left_s = (found.started_unix_s or -math.inf) + model.settings.start_timeout - time.time()
            if state is State.BROKEN and left_s > 0 and await client_of(slot).loads(model.settings.health.path):
                self._go_on_waking(model, slot, Tier.STOPPED, left_s)
                return
            if state is State.READY and self._steps.owes_proof(model, slot):
                self._go_on_waking(model, slot, Tier.CHECKPOINTED, model.settings.wake_timeout)
                return
            instance.state = state
        else:
            instance.state = State.CHECKPOINTED if not slot.image.archived else State.ARCHIVED
        if instance.state is State.BROKEN:
            log.warning("%s runs but does not serve: ended", instance.id)
            self._move(model, slot, "mend", self._mend(model, slot))
            return
        if instance.state not in (State.CHECKPOINTED, State.ARCHIVED):
            self._steps.watch(model, slot)
        instance.idle_since = self._clock()
        log.info("%s adopted: %s", instance.id, instance.state.value)

    def _go_on_waking(self, model: Model, slot: Slot, origin: Tier, left_s: float) -> None:
        """An engine that loads, and whose time is not over, or one that was restored and has to prove itself."""
        instance = slot.instance
        instance.waking_from = origin
        slot.wake_began = self._clock() - (limit_s(model.settings, origin) - left_s)
        instance.apply(Event.WAKE)
        self._steps.watch(model, slot)
        log.info("%s adopted: it is %s", instance.id, "loading" if origin is Tier.STOPPED else "to prove itself")
        self._move(model, slot, "wake", self._wake_adopted(model, slot, instance.generation, origin, left_s))

    async def _wake_adopted(self, model: Model, slot: Slot, generation: int, origin: Tier, left_s: float) -> None:
        """The rest of a wake that another warmpool began; all of it once more if that fails."""
        stages, began, instance = Stages(), self._clock(), slot.instance
        rest = self._steps.load if origin is Tier.STOPPED else self._steps.prove
        try:
            async with asyncio.timeout(left_s):
                await rest(model, slot, stages)
        except Exception as error:  # noqa: BLE001 - as in `_wake`
            note_unexpected(instance, error)
            reason = str(error) or too_slow(model.settings, origin)
            log.warning("%s was adopted and did not come up: %s", instance.id, reason)
            await self._clear_away(model, slot, origin, error)
            await self._wake(model, slot, generation, NO_EVICTIONS)
            return
        if instance.generation == generation and instance.state is State.WAKING:
            self._woken(model, instance, origin, origin, began, stages, whole=False)

    async def _state_of_running(self, model: Model, slot: Slot) -> State:
        client = client_of(slot)
        with contextlib.suppress(EngineError, RuntimeFailure, TimeoutError):
            async with asyncio.timeout(_ADOPT_S):
                if not await model.runtime.listens(handle_of(slot)):
                    return State.BROKEN
                asleep = await client.is_sleeping()
                if asleep:
                    slot.instance.sleep_level = DEEPEST_SLEEP  # which one is not to be learned: wake it thoroughly
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
        self._give_way("the server is stopping")
        self._tell()

    async def drained(self) -> None:
        """Return when no request runs or waits."""
        await self._quiet.wait()

    async def settled(self) -> None:
        """Return when no instance is on its way anywhere, those left aside that the next warmpool goes on with."""
        while moves := self._tasks - {s.task for m in self._everyone() for s in m.slots.values() if is_left(m, s)}:
            await asyncio.wait(moves)

    async def close(self, limit_s: float = _CLOSE_S) -> None:
        """End everything: waiters get an error, moves are cancelled, engines end.

        Checkpoints stay for the next start, and engines too where the runtime leaves them. Returns within `limit_s`;
        what has not ended by then is named in the log and left to the next start.
        """
        self.begin_drain()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for model in self._models.values():
            self._fail_waiters(model, DrainingError("The server is shutting down.", retry_after_s=1.0))
        self._give_up_orders()
        self._give_way("the server is stopping")
        self._written_off.close()
        clock = asyncio.get_running_loop().time
        end = clock() + limit_s
        for task in self._tasks:
            task.cancel()
        # A third of the time for each: what moves, engines, runtimes; more for those that come later.
        looks = [
            asyncio.create_task(watch.stop(), name="looks") for watch in (self._stalls, self._memory_watch, self._gpus)
        ]
        await _ended_within(end - limit_s * 2 / 3 - clock(), [*self._tasks, *looks])
        everyone = [(m, s) for m in self._everyone() for s in m.slots.values()]
        grace_s = max(0.0, end - limit_s * 2 / 5 - clock())
        ends = [asyncio.create_task(self._end(m, s, grace_s), name=f"end {s.instance.id}") for m, s in everyone]
        await _ended_within(end - limit_s / 5 - clock(), ends)
        await _ended_within(end - clock(), [asyncio.create_task(r.close()) for r in self._runtimes.values()])

    async def _end(self, model: Model, slot: Slot, grace_s: float) -> None:
        """End an engine, by force after `grace_s`."""
        await self._steps.unwatch(slot)
        if slot.client is not None:
            await slot.client.disconnect()
        if is_left(model, slot):
            log.info("%s left running, for the next warmpool to adopt", slot.instance.id)
        elif slot.handle is not None:
            end = model.runtime.drop if slot.image.present else model.runtime.remove
            try:
                async with asyncio.timeout(grace_s):
                    await end(slot.handle)
            except TimeoutError:
                log.warning("%s did not end within %.1f s: ended by force", slot.instance.id, grace_s)
                await model.runtime.drop(slot.handle)
        del model.slots[slot.instance.id]

    # --- checkpoints that are not on tmpfs ---

    def without_checkpoint(self) -> list[str]:
        """The models that are to be checkpointed when idle, and have neither a checkpoint on tmpfs nor an engine."""
        return [key for key, model in self._models.items() if self._lacks_checkpoint(model)]

    def _lacks_checkpoint(self, model: Model) -> bool:
        if Tier.CHECKPOINTED not in model.runtime.tiers().offered or Tier.CHECKPOINTED not in model.timetable:
            return False
        if model.settings.min_ready or model.draining:
            return False
        on_tmpfs = model.runtime.shares_images and model.image.present and not model.image.archived
        return not on_tmpfs and all(i.state is State.ARCHIVED for i in model.instances())

    async def until_room(self) -> None:
        """Return when no request waits for an engine, and one that is started would not make others step down."""
        changed = asyncio.Event()
        silence = self.listen(changed.set)
        try:
            while any(m.queue for m in self._models.values()) or self._is_tight():
                changed.clear()
                await changed.wait()
        finally:
            silence()

    def _is_tight(self) -> bool:
        limited = bool(self._settings.pool.max_awake or self._ledger.gpus)
        return limited and any(i.state in AWAKE for m in self._everyone() for i in m.instances())

    async def bring_back(self, key: str) -> bool:
        """Bring a model's image from the archive to tmpfs; whether there was one. Raises RuntimeFailure."""
        model = self._models[key]
        slot = next((s for s in model.slots.values() if s.instance.state is State.ARCHIVED), None)
        if slot is None:
            return False
        await self._steps.unarchive(model, slot, Stages())
        for same in [s for s in model.slots.values() if s.image is slot.image]:
            if same.instance.state is State.ARCHIVED:
                same.instance.apply(Event.AT_CHECKPOINTED)
                same.instance.idle_since = self._clock()
        self.tick()
        return True

    # --- another configuration ---

    def _configure_ledger(self) -> None:
        for key, model in self._settings.models.items():
            self._ledger.configure(key, model.gpu_memory, model.gpus)
            self._memory.configure(key, model.host_memory)
        self._memory.reserve_bytes = int(self._settings.pool.memory_reserve)

    async def reconfigure(self, wanted: Settings) -> Changes:
        """Take another configuration on, as far as it can be had without a restart; what came of it.

        Models that did not change notice nothing. Where the engine of one changed, its instances take no new requests
        and go after their last one, while those who wait are served by new engines; so do those of a removed model,
        where those who wait are told that there is none.
        Raises ConfigError, HostError (a runtime that is needed now cannot work) or DrainingError, with nothing changed.
        """
        async with self._reconfiguring:
            changes, settings = diff.compare(self._settings, wanted)
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
        self._spawn("look for changes", self.look_for_changes())
        self.tick()
        return changes

    async def _at_rest(self, models: Sequence[Model]) -> None:
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
        for key in (*changes.removed, *changes.replaced):
            self._withdraw(key, "the configuration has changed")
        for key, coming in self._coming.items():
            coming.settings = settings.models[key]
        for key, entry in settings.models.items():
            old = before.get(key)
            if old is not None and key not in changes.replaced:
                old.settings = entry
                old.end_back_off()
                self._models[key] = old
                self._shrink(old)
                continue
            model = Model(
                key, entry, settings.served_name(key), self._runtimes[entry.runtime], self._ledger, self._memory
            )
            if key in images:
                model.image = image_of(images[key])
            self._models[key] = model
            if old is not None:
                model.queue, old.queue = old.queue, model.queue
                model.draining = old.draining
        for key in (*changes.removed, *changes.replaced):
            self._ledger.unlearn(key)
            self._memory.unlearn(key)
            self._send_away(before[key])
        for key, facts in images.items():
            self._ledger.learn(key, facts.details.get("gpu"))
        self._configure_ledger()
        self._metrics.expect(changes.added, [tier.label for tier in Tier])

    def _shrink(self, model: Model) -> None:
        """Fewer instances than there are: the coldest go, one that answers after its last request."""
        surplus = max(0, len(model.slots) - model.settings.max_instances)
        for slot in sorted(model.slots.values(), key=lambda s: (-s.instance.tier, s.instance.leases))[:surplus]:
            self._give(model, slot, Order(slot.instance.id, slot.instance.tier, Tier.STOPPED))

    def _send_away(self, model: Model) -> None:
        self._fail_waiters(model, ModelNotFoundError(model.served_name))
        model.leaving = True
        # The image of that name may be another engine's soon: nothing here may touch it.
        model.image = Image()
        self._leaving.append(model)
        for slot in model.slots.values():
            if model.runtime.shares_images:
                slot.image = model.image
            self._give(model, slot, Order(slot.instance.id, slot.instance.tier, Tier.STOPPED))
        self._forget_if_gone(model)

    def _forget_if_gone(self, model: Model) -> None:
        if model.leaving and not model.slots:
            self._leaving.remove(model)
            if model.key not in self._models:
                self._metrics.forget(model.key)

    def _everyone(self) -> list[Model]:
        return [*self._models.values(), *self._coming.values(), *self._leaving]

    def _home(self, instance: Instance) -> Model:
        """The model that an instance belongs to; of that name there may be two."""
        return next(m for m in self._everyone() if (s := m.slots.get(instance.id)) and s.instance is instance)

    # --- what is outdated ---

    async def look_for_changes(self) -> None:
        """Find the models whose engines are not what their configuration resolves to now."""
        before = dict(self._models)
        for name, runtime in [*self._runtimes.items()]:
            mine = {key: m.settings for key, m in before.items() if m.settings.runtime == name}
            try:
                found = await runtime.outdated(mine, {i for key in mine for i in before[key].slots})
            except RuntimeFailure as error:
                log.warning("whether engines are outdated is not known: %s", error)
                continue
            for key in mine:
                if self._models.get(key) is before[key]:
                    self._note_outdated(before[key], found.get(key))
        self.tick()

    def _note_outdated(self, model: Model, outdated: Outdated | None) -> None:
        known = model.outdated
        if outdated is None:
            # One that was lost is missed until there is an engine again.
            if known is not None and (known.usable or model.slots):
                self._withdraw(model.key, "what had changed was undone")
                model.outdated = None
            return
        if known is not None and known.reason == outdated.reason:
            return
        log.warning("%s is outdated: %s", model.key, outdated.reason)
        model.outdated, model.renewal = outdated, ""
        self._withdraw(model.key, "more has changed")
        if not outdated.usable:
            self._forget_images(model, "its checkpoint does not fit any more")
            self._keep_from_reloading(model)
        self.changed.set()

    def _keep_from_reloading(self, model: Model) -> None:
        """Engines that would load their weights again at their wake go now; the others do not drop them any more."""
        for slot in model.slots.values():
            instance = slot.instance
            if instance.state in (State.SLEEPING, State.SUSPENDED) and instance.sleep_level == DEEPEST_SLEEP:
                self._give(model, slot, Order(instance.id, instance.tier, Tier.STOPPED))
            else:
                instance.barred.add(Tier.SLEEPING)

    def outdated(self) -> dict[str, str]:
        """Key → in which way; of those models that nothing is made for yet."""
        missing = self._models.keys() - self._coming.keys()
        return {key: o.reason for key in missing if (o := self._models[key].outdated) is not None}

    async def room_beside(self, key: str) -> bool:
        """Whether an engine can be started beside those of a model, with nobody stepping down for it."""
        model = self._models[key]
        if not self.ready or model.draining:
            return False
        if policy.has_room(self._view(), key) and not await self._lacks_memory(model, engine=True):
            return True
        model.renewal = "waits for room beside the engines that are awake"
        return False

    async def _lacks_memory(self, model: Model, *, engine: bool) -> bool:
        """Whether there is too little host memory for another engine, or on tmpfs for an image, or none can say."""
        try:
            print_ = await model.runtime.footprint(model.key)
        except OverdueError as error:
            log.warning("%s: how much memory it needs is not known: %s", model.key, error)
            return True
        if print_ is None:
            return False
        if engine:
            return print_.engine > host.available_bytes()
        return print_.image > min(print_.free, host.available_bytes())

    async def renew(self, key: str) -> bool:
        """Start, warm up, checkpoint and prove an engine beside a model's outdated ones, which serve meanwhile.

        Then the model is switched: new requests are for the new engine, the old ones go after their last request.
        False where that did not come about: it failed, or a request needed the place; the status says which.
        """
        old = self._models[key]
        new = Model(key, old.settings, old.served_name, old.runtime, self._ledger, self._memory, coming=True)
        self._coming[key] = new
        slot = self._new_slot(new, self._free_id(new))
        slot.instance.waking_from = Tier.STOPPED
        slot.wake_began = self._clock()
        slot.instance.apply(Event.WAKE)
        old.renewal = f"{slot.instance.id} is being made ready"
        log.info("%s is started beside the outdated engines of %s", slot.instance.id, key)
        await asyncio.wait([self._move(new, slot, "renew", self._prepare(new, slot))])
        return self._models.get(key) is new

    async def _prepare(self, new: Model, slot: Slot) -> None:
        stages, began = Stages(), self._clock()
        try:
            origin = await self._make_ready(new, slot, stages)
            while moves := self._moves_of(self._models[new.key]):
                await asyncio.wait(moves)
            slot.handle = new.runtime.promote(handle_of(slot))
        except Exception as error:  # noqa: BLE001 - whatever it was, the outdated engines serve on
            note_unexpected(slot.instance, error)
            self._withdraw(new.key, f"failed: {str(error) or 'no result in time'}")
            return
        self._take_over(new, slot)
        self._woken(new, slot.instance, Tier.STOPPED, origin, began, stages, whole=False)

    def _moves_of(self, model: Model) -> list[asyncio.Task[None]]:
        """What may read the model's image, or write it."""
        slots = model.slots.values()
        return [s.task for s in slots if s.task is not None and s.instance.state in (*DESCENDING, State.WAKING)]

    async def _make_ready(self, new: Model, slot: Slot, stages: Stages) -> Tier:
        """From nothing to an engine that serves, by its own checkpoint where there is to be one."""
        instance = slot.instance
        await self._steps.climb(new, slot, Tier.STOPPED, stages)
        wanted = Tier.CHECKPOINTED in new.runtime.tiers().offered and Tier.CHECKPOINTED in new.timetable
        if not wanted or await self._lacks_memory(new, engine=False):
            return Tier.STOPPED  # it is warm, and writes its checkpoint when it is idle
        # In one step: nobody is to see it ready.
        instance.apply(Event.AT_READY)
        instance.apply(Event.CHECKPOINT)
        with stages.measure("checkpoint"):
            async with asyncio.timeout(new.settings.checkpoint_timeout):
                await self._steps.go_down(new, slot, Tier.READY, Tier.CHECKPOINTED)
        self._ledger.arrived(instance, Tier.CHECKPOINTED)
        instance.apply(Event.AT_CHECKPOINTED)
        instance.waking_from = Tier.CHECKPOINTED
        instance.apply(Event.WAKE)
        await self._steps.climb(new, slot, Tier.CHECKPOINTED, stages)
        return Tier.CHECKPOINTED

    def _take_over(self, new: Model, slot: Slot) -> None:
        """Have a model that was made ready take the place of the one of the same key."""
        old = self._models[new.key]
        del self._coming[new.key]
        new.coming = False
        self._models[new.key] = new
        new.queue, old.queue = old.queue, new.queue
        new.draining = old.draining
        log.info("%s: new requests go to %s", new.key, slot.instance.id)
        if new.image.present or slot.image.present:
            self._steps.keep_copy(new, slot)
        self._send_away(old)

    def _give_way(self, reason: str) -> None:
        for key in [*self._coming]:
            self._withdraw(key, reason)

    def _withdraw(self, key: str, reason: str) -> None:
        """End what is made ready for a model, if anything is; its outdated engines serve on."""
        new = self._coming.pop(key, None)
        if new is None:
            return
        if key in self._models:
            self._models[key].renewal = reason
        new.coming, new.leaving = False, True
        self._leaving.append(new)
        for slot in new.slots.values():
            log.warning("%s does not take over: %s", slot.instance.id, reason)
            work, slot.discards_image = slot.task, slot.image.present and new.runtime.shares_images
            reset(slot.image)
            slot.instance.apply(Event.BROKE)
            slot.instance.apply(Event.STOP)
            self._move(new, slot, "remove", self._remove_after(work, new, slot))
            if work is not None and work is not asyncio.current_task():
                work.cancel()

    async def _remove_after(self, work: asyncio.Task[None] | None, model: Model, slot: Slot) -> None:
        if work is not None:
            await asyncio.wait([work])
        await self._remove(model, slot, "withdrawn")

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
        """A hold on a ready instance of the model, once there is one.

        On the `preferred` one as long as that holds the engine it had: it is woken, or waited for.
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
        if (lease := self._at_once(model, preferred)) is not None:
            return lease
        held = policy.holding(model.instances(), preferred) if preferred is not None else None
        found = tier_found(model.slots.values() if held is None else [model.slots[held.id]])
        self._refuse_if_failing(model)
        self._refuse_if_full(model)
        self._refuse_if_longer(model, max_wait_s)
        limit_s = min(model.settings.queue_timeout, math.inf if max_wait_s is None else max_wait_s)
        since = self._clock()
        rank = since - priority * self._settings.pool.priority_head_start
        waiter = Waiter(asyncio.get_running_loop().create_future(), since, found, preferred)
        self._waiting += 1
        model.queue.add(waiter, priority, rank)
        if preferred is not None:
            model.wanted[preferred] += 1
        self._quiet.clear()
        try:
            self.tick()
            async with asyncio.timeout(limit_s):
                return await waiter.granted
        except TimeoutError:
            hand_on(waiter)
            kind = NoCapacityError if limit_s == model.settings.queue_timeout else MaxWaitError
            raise kind(
                f"No instance of {name!r} became free within {limit_s:g} s.",
                retry_after_s=self._expected_wait_s(model),
            ) from None
        except asyncio.CancelledError:
            hand_on(waiter)
            raise
        finally:
            # One that was granted or failed has left the queue already.
            model.queue.discard(waiter)
            self._waiting -= 1
            if preferred is not None:
                model.wanted[preferred] -= 1
            self._note_quiet()
            self._tell()

    def try_lease(self, key: str) -> Lease | None:
        """A hold on a ready instance of a model, by its key, if there is one with room for which nobody waits.

        None wherever `lease` would wait or refuse; nothing has happened then.
        """
        model = self._models.get(key)
        if model is None or model.draining or self._shut or self._draining or not self._open:
            return None
        if (lease := self._at_once(model)) is not None:
            self._usage.note(key)
        return lease

    def _at_once(self, model: Model, preferred: str | None = None) -> Lease | None:
        if self._waiting and model.queue:
            return None
        instance = policy.pick(model.instances(), model.settings.max_concurrency, preferred)
        if instance is None:
            return None
        lease = self._grant(model, instance, Tier.READY, 0.0, None)
        if self._listeners:
            self._tell()
        return lease

    def _refuse_if_failing(self, model: Model) -> None:
        if model.last_failure is not None and policy.is_failing(model.view(), self._clock()):
            raise self._wake_failed(model, model.last_failure)

    def _wake_failed(self, model: Model, failure: WakeFailure) -> WakeFailedError:
        left_s = max(1.0, model.start_at - self._clock())
        message = f"{failure.told_to_clients(model.served_name)}. It is tried again in {math.ceil(left_s)} s."
        return WakeFailedError(message, retry_after_s=left_s, detail="; ".join(failure.reasons))

    def _refuse_if_full(self, model: Model) -> None:
        everywhere = sum(len(m.queue) for m in self._models.values())
        if len(model.queue) >= model.settings.max_queue or everywhere >= self._settings.pool.max_queue:
            raise QueueFullError(
                f"{len(model.queue)} requests wait for {model.served_name!r} already.",
                retry_after_s=self._expected_wait_s(model),
            )

    def _refuse_if_longer(self, model: Model, max_wait_s: float | None) -> None:
        expected_s = self.estimate_s(model.key)
        if max_wait_s is not None and expected_s > max_wait_s:
            raise MaxWaitError(
                f"An instance of {model.served_name!r} is expected in {expected_s:.1f} s, "
                f"more than the {max_wait_s:g} s that the request would wait.",
                retry_after_s=self._expected_wait_s(model),
            )

    def _grant(self, model: Model, instance: Instance, found: Tier, queue_s: float, wake: WakeRecord | None) -> Lease:
        instance.begin_lease(time.time())
        self._open_leases += 1
        self._quiet.clear()
        return Lease(self, model.slots[instance.id], found, queue_s, wake)

    def lease_ended(self, slot: Slot, generation: int) -> None:
        self._open_leases -= 1
        instance = slot.instance
        if instance.generation == generation:
            instance.end_lease(self._clock(), time.time())
            if instance.leases and not self._waiting and instance.state is State.READY and not self._orders:
                # It goes on, and nobody waits: there is nothing to decide.
                if self._listeners:
                    self._tell()
                return
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
        if self._timer is None or self._timer_at > asyncio.get_running_loop().time() + _MOMENT_S:
            self._tick_in(_MOMENT_S)

    def _tick_in(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = loop.call_later(delay_s, self.tick), loop.time() + delay_s

    def _note_quiet(self) -> None:
        if self._open_leases == 0 and not any(m.queue for m in self._models.values()):
            self._quiet.set()

    def _fail_waiters(self, model: Model, error: Exception) -> None:
        for waiter in model.queue:
            if not waiter.granted.done():
                waiter.granted.set_exception(error)
        model.queue.clear()

    def _expected_wait_s(self, model: Model) -> float:
        return max(1.0, self.estimate_s(model.key))

    def estimate_s(self, key: str) -> float:
        """How long a request for the model would wait for a wake, from measured ones, in seconds."""
        model = self._models[key]
        tier = tier_found(model.slots.values())
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
        """Have an instance of a model ready: its id, the tier that was found, the wake if there was one.

        A request that asks for nothing: it joins a wake that is under way, makes room, and fails as any other.
        Instances that an earlier order has closed are open again. Raises what `lease` does.
        """
        model = self._models[key]
        model.end_back_off()
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
        """Send the instances of a model, or one of them, down to a tier or the next colder one that they have.

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
            raise self._not_found(model, instance_id)
        goals = {slot.instance.id: self._goal(model, slot, to) for slot in slots}
        moving = [slot for slot in slots if _to_move(slot, goals[slot.instance.id])]
        if moving:
            self._refuse_order(model, moving, wait=wait)
        if discard and to is Tier.STOPPED and instance_id is None:
            model.discarding = bool(model.slots)
            self._withdraw(key, "the model was stopped")
        orders = []
        for slot in slots:
            order = slot.order
            goal = goals[slot.instance.id]
            if order is None or order.to < goal:
                order = Order(slot.instance.id, _height(slot.instance), goal)
                self._give(model, slot, order)
            orders.append(order)
        self.tick()
        return orders

    def force_stop(self, key: str, *, instance_id: str | None = None, discard: bool = False) -> list[Order]:
        """End the instances of a model, or one of them, at once and whatever they do: answers are cut off.

        One that cannot be ended is written off, which fails its order. `discard`: a golden checkpoint goes too.
        Raises InstanceNotFoundError or DrainingError, with nothing changed.
        """
        if self.stopping or not self._open:
            raise DrainingError("The server is starting or shutting down.", retry_after_s=1.0)
        self._withdraw(key, "an operator stopped the model by force")
        slots = [(m, s) for m in self._everyone() if m.key == key for s in m.slots.values()]
        chosen = [(m, s) for m, s in slots if instance_id in (None, s.instance.id)]
        if instance_id is not None and not chosen:
            raise self._not_found(self._models[key], instance_id)
        orders = []
        for model, slot in chosen:
            orders.append(Order(slot.instance.id, _height(slot.instance), Tier.STOPPED))
            self._give(model, slot, orders[-1])
            if discard and model.runtime.shares_images and instance_id is None and slot.image.present:
                reset(slot.image)
                slot.discards_image = True
            self._force(model, slot)
        self.tick()
        return orders

    def _force(self, model: Model, slot: Slot) -> None:
        instance, work = slot.instance, slot.task
        log.warning("%s is stopped by force in state %s", instance.id, instance.state.value)
        if slot.client is not None:
            slot.client.give_up("an operator stopped the engine")
        if (instance.state, Event.BROKE) in TRANSITIONS:
            instance.apply(Event.BROKE)
        if instance.state is not State.STOPPING:
            instance.apply(Event.STOP)
        self._move(model, slot, "force", self._force_down(work, model, slot))
        if work is not None:
            work.cancel()

    async def _force_down(self, work: asyncio.Task[None] | None, model: Model, slot: Slot) -> None:
        if work is not None:
            await asyncio.wait([work], timeout=2 * GIVE_UP_S)
        await self._steps.unwatch(slot)
        if slot.handle is not None:
            try:
                await model.runtime.drop(slot.handle)
            except RuntimeFailure as error:
                log.error("%s: %s", slot.instance.id, error)
        await self._remove(model, slot, "force")

    @staticmethod
    def _not_found(model: Model, instance_id: str) -> InstanceNotFoundError:
        there = ", ".join(model.slots) or "none"
        return InstanceNotFoundError(f"{model.key!r} has no instance {instance_id!r}; there are: {there}.")

    def _goal(self, model: Model, slot: Slot, to: Tier) -> Tier:
        """The tier that an order means for an instance. Raises ConflictError when it has none."""
        instance = slot.instance
        if _height(instance) >= to:
            return to
        goal = policy.ordered_step(instance, to, model.view())
        if goal is None:
            missing = model.runtime.tiers().missing
            reason = next((missing[t] for t in (to, Tier.CHECKPOINTED) if t in missing), None)
            reason = reason or "this engine failed to go there before; one that is started anew may"
            raise ConflictError(f"{instance.id} has no tier {to.label}, nor a colder one but stopped: {reason}.")
        return goal

    def _refuse_order(self, model: Model, moving: Sequence[Slot], *, wait: bool) -> None:
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

    def _give(self, model: Model, slot: Slot, order: Order) -> None:
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

    def _end_order(self, slot: Slot, failure: str | None = None) -> None:
        order, slot.order = slot.order, None
        slot.instance.ordered = None
        if order is not None:
            order.end(failure)

    def _fail_order(self, slot: Slot, to: Tier, failure: str) -> None:
        """The step to `to` failed; an order for a colder tier than that goes on."""
        if slot.order is not None and to >= slot.order.to:
            self._end_order(slot, failure)

    def drain(self, key: str | None = None) -> None:
        """Admit nothing new, for one model or at all, until `admit`; what runs or waits goes on."""
        self._set_draining(key, draining=True)
        log.info("%s closed to new requests", key or "all models")

    def admit(self, key: str | None = None) -> None:
        """Take `drain` back."""
        for model in self._models.values() if key is None else (self._models[key],):
            model.end_back_off()
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
            plan = policy.decide(self._view(), self._clock())
            if self._coming and plan.presses():
                self._give_way("a request needed its place")
                plan = policy.decide(self._view(), self._clock())
            for action in plan.actions:
                if not self._stopping or self._is_waited_for(action):
                    self._begin(action)
            self._set_timer(plan.deadline)
        finally:
            self._ticking = False
        self._tell()

    def _view(self) -> policy.View:
        everyone = self._everyone()
        return policy.View(
            [m.view() for m in everyone],
            self._settings.pool.max_awake,
            self._settings.pool.switch_after,
            self._memory.load(
                self._ledger.load(i for m in everyone for i in m.instances()),
                (i for m in everyone for i in m.instances()),
                {i: (s.image.present, not m.runtime.shares_images) for m in everyone for i, s in m.slots.items()},
            ),
        )

    def _is_waited_for(self, action: policy.Action) -> bool:
        return not isinstance(action, policy.StepDown | policy.Clone) and (
            not isinstance(action, policy.Wake) or bool(self._models[action.model].queue)
        )

    def _dispatch(self, model: Model) -> None:
        """Grant leases in the order of the queue as long as there is room; past who waits for one instance."""
        done: list[Waiter] = []
        for waiter in model.queue:
            if not waiter.granted.done():
                instance = policy.pick(model.instances(), model.settings.max_concurrency, waiter.preferred)
                if instance is None and waiter.preferred is None:
                    break
                if instance is None:
                    continue
                self._grant_to(waiter, model, instance)
            done.append(waiter)
        for waiter in done:
            model.queue.discard(waiter)

    def _grant_to(self, waiter: Waiter, model: Model, instance: Instance) -> None:
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
                self._move(model, slot, "clone", self._clone(model, slot))
            case policy.Wake():
                self._begin_wake(action)
            case policy.StepDown():
                self._begin_step_down(action)
            case policy.Refuse(key, needed_bytes, missing_bytes):
                self._refuse_for_memory(self._models[key], needed_bytes, missing_bytes)
            case policy.Retire(instance, reason):
                instance.apply(Event.RETIRE)
                log.info("%s retiring: %s", instance.id, reason)
            case policy.Readmit(instance):
                instance.apply(Event.READMIT)
                log.info("%s readmitted", instance.id)

    def _refuse_for_memory(self, model: Model, needed_bytes: int, missing_bytes: int) -> None:
        text = (
            f"There is not enough host memory for {model.served_name!r}: it needs {format_size(needed_bytes)}, "
            f"{format_size(missing_bytes)} more than can be made free."
        )
        log.error("%s: no wake: %s", model.key, text)
        self._fail_waiters(model, NoMemoryError(text, retry_after_s=_MEMORY_RETRY_S))

    def _begin_wake(self, action: policy.Wake) -> None:
        evictions = self._evict(action) if action.victims else NO_EVICTIONS
        model = self._models[action.model]
        known = action.instance
        slot = model.slots[known.id] if known is not None else self._new_slot(model, self._free_id(model))
        instance = slot.instance
        found = Tier.STOPPED if instance.state is State.NEW else instance.tier
        instance.waking_from = found
        slot.wake_began = self._clock()
        instance.apply(Event.WAKE)
        log.info("%s waking from %s", instance.id, found.label)
        self._move(model, slot, "wake", self._wake(model, slot, instance.generation, evictions))

    def _evict(self, action: policy.Wake) -> Evictions:
        held = self._ledger.charge(action.instance) if action.instance is not None else gpu_accounting.NOTHING
        needed = gpu_accounting.beyond(self._ledger.need(action.model) or gpu_accounting.NOTHING, held)
        if not gpu_accounting.beyond(needed, {gpu.uuid: gpu.free_bytes for gpu in self._ledger.gpus}):
            needed = {}  # as much was free before anybody made room: nothing is to be seen to
        expected = {}
        for slot in (s for m in self._everyone() for s in m.slots.values()):
            if slot.instance.state in (State.SLEEPING, State.SUSPENDED):
                expected[slot.instance.id] = self._ledger.expected(slot.instance, slot.instance.tier)
        for victim in action.victims:
            expected[victim.instance.id] = self._ledger.expected(victim.instance, victim.to)
        tasks = {victim.instance.id: self._begin_step_down(victim) for victim in action.victims}
        return Evictions(tasks, needed, expected)

    def _begin_step_down(self, action: policy.StepDown) -> asyncio.Task[None]:
        instance = action.instance
        model = self._home(instance)
        slot = model.slots[instance.id]
        origin = instance.tier
        instance.apply(DESCENT[action.to])
        instance.evicted = action.reason == "evict"
        # All may begin to go in one moment: the last one takes the image along.
        last_of_discarded = model.discarding and all(s.instance.state is State.STOPPING for s in model.slots.values())
        frees_image = (
            model.runtime.shares_images and slot.image.present and (action.reason == "idle" or last_of_discarded)
        )
        if action.to is Tier.STOPPED and frees_image:
            reset(slot.image)  # the last tier frees everything, and no clone is prepared any more
            slot.discards_image = True
        log.info("%s %s -> %s (%s)", instance.id, origin.label, action.to.label, action.reason)
        work = (
            self._remove(model, slot, action.reason)
            if action.to is Tier.STOPPED
            else self._descend(model, slot, origin, action.to, action.reason)
        )
        return self._move(model, slot, "step down", work)

    def _note_moved(self) -> None:
        self._gpus.due.set()
        self._memory_watch.due.set()

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

    def _move(self, model: Model, slot: Slot, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have a task take an instance out of a moving state; whatever becomes of it, it does not stay there."""
        task = slot.task = self._spawn(f"{name} {slot.instance.id}", work)
        task.add_done_callback(partial(self._moved, model, slot))
        return task

    def _moved(self, model: Model, slot: Slot, task: asyncio.Task[None]) -> None:
        instance = slot.instance
        if self._closed or slot.task is not task or instance.state not in MOVING:
            return
        error = None if task.cancelled() else task.exception()
        reason = f"{task.get_name()} ended in state {instance.state.value}: {error!r}"
        log.error("%s", reason)
        if model.coming:
            self._withdraw(model.key, reason)
            return
        if instance.state in (State.BROKEN, State.STOPPING):
            self._write_off(model, slot, reason)
            return
        if instance.state is State.WAKING:
            self._fail_wake(model, slot, [reason], [])
        else:
            instance.apply(Event.BROKE)
        self._move(model, slot, "mend", self._mend(model, slot))

    def _set_timer(self, deadline: float | None) -> None:
        if deadline is not None:
            self._tick_in(max(0.0, deadline - self._clock()))
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _new_slot(self, model: Model, instance_id: str) -> Slot:
        slot = Slot(Instance(instance_id, model.key), model.image if model.runtime.shares_images else Image())
        model.slots[instance_id] = slot
        return slot

    def _free_id(self, model: Model) -> str:
        taken = {instance_id for m in self._everyone() if m.key == model.key for instance_id in m.slots}
        ids = (f"{model.key}-{n}" for n in itertools.count(1))
        return next(i for i in ids if i not in taken and i not in self._written_off)

    # --- waking ---

    async def _wake(self, model: Model, slot: Slot, generation: int, evictions: Evictions) -> None:
        """Bring an instance to ready from the warmest tier that works."""
        instance = slot.instance
        found = instance.waking_from or Tier.STOPPED
        stages = Stages()
        began = self._clock()
        failures: list[str] = []
        log_lines: list[str] = []
        if evictions.tasks:
            with stages.measure("evict"):
                await asyncio.wait(evictions.tasks.values())
                await self._gpus.make_sure(evictions)
        tiers = tiers_from(found, slot)
        for tier in tiers:
            try:
                if tier >= Tier.CHECKPOINTED:
                    await self._check_memory(instance)
                await self._steps.climb(model, slot, tier, stages)
            except Exception as error:  # noqa: BLE001 - whatever it was, a colder tier may work and nobody may be left waiting
                reason = str(error) or too_slow(model.settings, tier)
                note_unexpected(instance, error)
                failures.append(f"{tier.label}: {reason}")
                log.warning("%s did not wake from %s: %s", instance.id, tier.label, reason)
                self._metrics.wake_failures.labels(model.key, tier.label).inc()
                log_lines = await self._last_log_lines(model, slot)
                await self._clear_away(model, slot, tier, error)
                if tier is Tier.CHECKPOINTED and slot.image.archived:  # only its copy is any good
                    tiers.insert(tiers.index(tier) + 1, Tier.ARCHIVED)
                continue
            if instance.generation != generation or instance.state is not State.WAKING:
                return
            self._woken(model, instance, found, tier, began, stages)
            return
        self._fail_wake(model, slot, failures, log_lines)
        await self._mend(model, slot)

    def _woken(
        self,
        model: Model,
        instance: Instance,
        found: Tier,
        tier: Tier,
        began: float,
        stages: Stages,
        *,
        whole: bool = True,
    ) -> None:
        """`whole`: all of the wake was seen, and says what one costs."""
        now = self._clock()
        seconds = now - began
        instance.apply(Event.AT_READY)
        instance.waking_from = None
        model.end_back_off()
        instance.idle_since = now
        if tier in (Tier.SLEEPING, Tier.SUSPENDED):
            self._ledger.woke(instance)
        self._note_moved()
        record = WakeRecord(found, tier, time.time(), now, seconds, dict(stages.seconds), dict(stages.starts))
        instance.last_wake = record
        self._wakes.appendleft(pool_status.wake_status(record) | {"model": model.key, "instance": instance.id})
        if tier is found and whole:
            self._costs.record(model.key, tier, seconds)
        for stage, value in (*stages.seconds.items(), ("total", seconds)):
            self._metrics.wake.labels(model.key, found.label, stage).observe(value)
        detail = " ".join(f"{name}={value * 1000:.0f}ms" for name, value in stages.seconds.items())
        log.info("%s ready from %s in %.3f s: %s", instance.id, tier.label, seconds, detail)
        self.tick()

    async def _check_memory(self, instance: Instance) -> None:
        """Fail rather than have the OOM killer choose, where what was to be made free is not."""
        if not self._memory.lacking(instance):
            return
        await self._memory_watch.weigh()
        if missing := self._memory.lacking(instance):
            raise RuntimeFailure("memory", f"{format_size(missing)} of host memory are missing for it")

    async def _last_log_lines(self, model: Model, slot: Slot) -> list[str]:
        """What the engine wrote last, which goes to the log too."""
        lines = [*await model.runtime.log_tail(slot.handle)] if slot.handle is not None else []
        if lines:
            log.warning("%s: the last lines of its log:\n  %s", slot.instance.id, "\n  ".join(lines))
        return lines

    def _fail_wake(self, model: Model, slot: Slot, failures: Sequence[str], log_lines: Sequence[str]) -> None:
        """Tell those who wait for nothing but this wake; those who come next are told too, until it is tried again."""
        slot.instance.apply(Event.BROKE)
        found = slot.instance.waking_from or Tier.STOPPED
        failure = WakeFailure(slot.instance.id, found, time.time(), tuple(failures), tuple(log_lines))
        model.last_failure = failure
        model.back_off(self._clock())
        model.start_at = model.restock_at
        model.failing.add(slot.instance.id)
        failed = {"found": found.label, "at_unix_s": failure.at_unix_s, "failed": [*failures]}
        self._wakes.appendleft(failed | {"model": model.key, "instance": slot.instance.id})
        others = (s.instance.state for s in model.slots.values() if s is not slot)
        if any(state in (State.WAKING, State.READY) for state in others):
            return
        self._fail_waiters(model, self._wake_failed(model, failure))

    async def _clear_away(self, model: Model, slot: Slot, tier: Tier, cause: Exception) -> None:
        """After a failed attempt: no process is left, and an image that there is evidence against is gone."""
        slot.loading = False
        await self._steps.unwatch(slot)
        if slot.client is not None:
            await slot.client.disconnect()
        if slot.handle is None:
            return
        try:
            await model.runtime.drop(slot.handle)
        except RuntimeFailure as error:
            log.error("%s: %s", slot.instance.id, error)
        hangs = self._overdue.hanging(slot.instance.id)  # which is the host's fault, not the image's
        if tier in (Tier.CHECKPOINTED, Tier.ARCHIVED) and not hangs:
            await self._judge(model, slot, fault_of(cause))

    async def _judge(self, model: Model, slot: Slot, fault: Fault) -> None:
        """What becomes of an image that could not be restored."""
        image = slot.image
        image.failures += fault is not Fault.HOST
        if not image.present:
            return
        if fault is Fault.DAMAGE:
            await self._quarantine(model, slot, "it is damaged")
        elif image.failures >= MAX_IMAGE_FAILURES:
            await self._quarantine(model, slot, f"it failed {image.failures} times", damaged=False)
        elif image.verification is None or image.verification.done():
            work = self._verify(model, slot)
            image.verification = self._spawn(f"verify the checkpoint of {slot.instance.id}", work)

    async def _verify(self, model: Model, slot: Slot) -> None:
        """Read all of an image, so that one that is damaged does not cost every wake a cold start."""
        image = slot.image
        try:
            async with image.lock, asyncio.timeout(model.settings.checkpoint_timeout):
                if image.present and not image.archived:
                    await model.runtime.verify_image(handle_of(slot), whole=True)
        except RuntimeFailure as error:
            log.warning("%s: %s", slot.instance.id, error)
            if error.fault is Fault.DAMAGE and image.present:
                await self._quarantine(model, slot, error.reason)
        except TimeoutError:
            log.warning("%s: its checkpoint was not read within checkpoint_timeout", slot.instance.id)

    async def _quarantine(self, model: Model, slot: Slot, reason: str, *, damaged: bool = True) -> None:
        """Set the image aside; instances that are nothing but this image go with it.

        `damaged`: by its files, not by what it holds, so that a copy of it may be good.
        """
        log.error("%s: its checkpoint is set aside: %s", slot.instance.id, reason)
        self._metrics.quarantines.labels(model.key).inc()
        image, canary = slot.image, slot.image.canary
        resting = slot.instance.state in (State.CHECKPOINTED, State.ARCHIVED) and not model.runtime.shares_images
        keep_copy = damaged and not image.archived and not resting
        reset(image)
        self._forget_resting(model, image, "its checkpoint was set aside")
        # A clone that could not be made has no handle yet.
        handle = slot.handle or Handle(slot.instance.id, model.key, "", 0)
        try:
            if await model.runtime.quarantine_image(handle, keep_copy=keep_copy) and not image.present:
                image.present, image.archived, image.canary = True, True, canary
                log.info("%s: its checkpoint is restored from the copy in the archive", slot.instance.id)
        except (RuntimeFailure, OSError) as error:
            log.error("%s: %s", slot.instance.id, error)

    def _forget_images(self, model: Model, reason: str) -> None:
        """No instance of a model is restored from the images there are; those that are nothing else go."""
        for image in {id(i): i for i in (model.image, *(s.image for s in model.slots.values()))}.values():
            reset(image)
            self._forget_resting(model, image, reason)

    def _forget_resting(self, model: Model, image: Image, reason: str) -> None:
        for slot in [s for s in model.slots.values() if s.image is image]:
            if slot.instance.state in (State.CHECKPOINTED, State.ARCHIVED):
                slot.instance.apply(Event.STOP)
                self._move(model, slot, "remove", self._remove(model, slot, reason))

    async def _clone(self, model: Model, slot: Slot) -> None:
        """Prepare an instance that the golden checkpoint can be restored to."""
        try:
            async with asyncio.timeout(model.settings.wake_timeout):
                handle = await model.runtime.clone(slot.instance.id, model.key, model.settings)
        except (RuntimeFailure, TimeoutError) as error:
            reason = str(error) or too_slow(model.settings, Tier.CHECKPOINTED)
            log.warning("%s cannot be prepared: %s", slot.instance.id, reason)
            if fault_of(error) is Fault.DAMAGE and slot.image.present:
                await self._quarantine(model, slot, reason)
            else:
                model.back_off(self._clock())
            slot.instance.apply(Event.BROKE)
            await self._mend(model, slot)
            return
        self._steps.attach(model, slot, handle)
        slot.instance.idle_since = self._clock()
        if not slot.image.present:  # set aside meanwhile
            slot.instance.apply(Event.BROKE)
            await self._mend(model, slot)
            return
        slot.instance.apply(Event.AT_ARCHIVED if slot.image.archived else Event.AT_CHECKPOINTED)
        log.info("%s prepared: a clone of the golden checkpoint", slot.instance.id)

    # --- stepping down ---

    async def _descend(self, model: Model, slot: Slot, origin: Tier, to: Tier, reason: str) -> None:
        """Take an idle instance down; a failure without harm leaves it where it is, any other breaks it."""
        instance, client, settings = slot.instance, client_of(slot), model.settings
        damage: str | None = None
        try:
            limit_s = settings.checkpoint_timeout if to is Tier.CHECKPOINTED else settings.wake_timeout
            async with asyncio.timeout(limit_s):
                await self._steps.go_down(model, slot, origin, to)
        except Exception as error:  # noqa: BLE001 - whatever it was, the instance may not stay between two tiers
            setting = "checkpoint_timeout" if to is Tier.CHECKPOINTED else "wake_timeout"
            text = str(error) or f"no result within {setting} ({limit_s:g} s)"
            note_unexpected(instance, error)
            damage = text if fault_of(error) is Fault.DAMAGE else None
            # No engine runs on the way to the archive, so none can break.
            harmless = to is Tier.ARCHIVED or (isinstance(error, RuntimeFailure) and error.alive)
            harmless = harmless and not self._overdue.hanging(instance.id)
            if isinstance(error, RuntimeFailure) and error.leaked_bytes:
                self._metrics.gpu_leaks.labels(model.key).inc()
            if harmless:
                delay_s = _STEP_RETRY_S[min(slot.failed_steps, len(_STEP_RETRY_S) - 1)]
                slot.failed_steps += 1
                instance.postponed[to] = self._clock() + delay_s
            else:
                instance.barred.add(to)
            if isinstance(error, EngineError):
                harmless = await self._steps.still_awake(slot)
            if not harmless:
                log.error("%s broke on its way to %s: %s", instance.id, to.label, text)
                self._fail_order(slot, to, f"the engine broke: {text}")
                instance.apply(Event.BROKE)
                await self._mend(model, slot)
                return
            log.warning("%s cannot go to %s, and stays: %s", instance.id, to.label, text)
            self._fail_order(slot, to, text)
            arrived = origin if origin is not Tier.READY or not instance.sleep_level else Tier.SLEEPING
            if slot.watcher is None and arrived < Tier.CHECKPOINTED:
                self._steps.watch(model, slot)
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
        self._note_moved()
        if damage is not None:
            await self._quarantine(model, slot, damage)

    async def _remove(self, model: Model, slot: Slot, reason: str) -> None:
        """End an instance and forget it, in this order; tries again until it has ended, or is written off."""
        instance = slot.instance
        await self._steps.unwatch(slot)
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
                if isinstance(error, OverdueError) or attempt == len(_REMOVE_RETRY_S):
                    self._write_off(model, slot, str(error))
                    return
                delay_s = _REMOVE_RETRY_S[attempt]
                attempt += 1
                log.error("%s cannot be removed, next try in %g s: %s", instance.id, delay_s, error)
                await asyncio.sleep(delay_s)
        self._forget(model, slot)
        self._metrics.step_downs.labels(model.key, Tier.STOPPED.label, reason).inc()
        log.info("%s stopped", instance.id)

    def _forget(self, model: Model, slot: Slot, failure: str | None = None) -> None:
        """An instance is no more the pool's; `failure`: it has not ended."""
        instance = slot.instance
        instance.apply(Event.WENT)
        del model.slots[instance.id]
        self._ledger.forget(instance.id)
        self._memory.forget(instance.id)
        self._note_moved()
        self._forget_if_gone(model)
        model.discarding = model.discarding and bool(model.slots)
        self._end_order(slot, failure)

    def _write_off(self, model: Model, slot: Slot, reason: str) -> None:
        """Nothing waits any longer for a broken or stopping instance that does not go."""
        if slot.instance.state is State.BROKEN:
            slot.instance.apply(Event.STOP)
        self._forget(model, slot, f"it is written off: {reason}")
        if slot.handle is not None:
            self._written_off.add(model, slot, reason)
        self.tick()

    # --- engines that end by themselves ---

    def _engine_ended(self, model: Model, slot: Slot, watcher: asyncio.Task[str]) -> None:
        if watcher.cancelled() or slot.watcher is not watcher:
            return
        reason = watcher.result() if watcher.exception() is None else repr(watcher.exception())
        log.warning("%s: the engine ended in state %s: %s", slot.instance.id, slot.instance.state.value, reason)
        self._metrics.engine_exits.labels(model.key).inc()
        self._break(model, slot)

    def _break(self, model: Model, slot: Slot) -> None:
        """The engine is of no use any more. During a move the move's own task finds out."""
        if slot.instance.state in (State.READY, State.RETIRING, State.SLEEPING, State.SUSPENDED):
            slot.instance.apply(Event.BROKE)
            self._memory.broke(model.key)
            self._move(model, slot, "mend", self._mend(model, slot))
            self.tick()

    def _give_up_stalled(self, model: Model, slot: Slot, reason: str) -> None:
        """An engine that stands still: its clients get an error, and the next request another engine."""
        log.error("%s stands still and is replaced: %s", slot.instance.id, reason)
        self._metrics.engine_stalls.labels(model.key).inc()
        client_of(slot).give_up("the engine stands still")
        self._break(model, slot)

    async def examine(self, slot: Slot, generation: int) -> None:
        instance = slot.instance
        if self._closed or instance.generation != generation:
            return
        model = self._home(instance)
        most_s = model.settings.response_timeout
        if most_s is not None and (silent_s := client_of(slot).silent_s) >= most_s:
            self._give_up_stalled(model, slot, f"no byte for {silent_s:.0f} s, which is over response_timeout")
            return
        healthy = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                healthy = await client_of(slot).healthy(model.settings.health.path)
        if not healthy and instance.generation == generation:
            log.warning("%s failed a request and does not answer %s", instance.id, model.settings.health.path)
            self._break(model, slot)

    async def _mend(self, model: Model, slot: Slot) -> None:
        """Clear a broken engine away: down to its checkpoint if it has one, else altogether."""
        instance = slot.instance
        await self._steps.unwatch(slot)
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
                self._note_moved()
                return
        instance.apply(Event.STOP)
        await self._remove(model, slot, "broken")

    # --- seeing ---

    def _publish(self) -> Iterator[None]:
        """Bring the gauges up to date, a model a step; asked for when they are read: requests have no time for it."""
        models: dict[str, list[Model]] = {}
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
            yield

    def tier(self, key: str) -> Tier:
        """The tier that a request for the model would find."""
        return tier_found(self._models[key].slots.values())

    def status(self) -> dict[str, Any]:
        """For `/admin/status`: models with tier and queue, instances with state, leases, last use and wake."""
        return self._status({key: self._model_status(key) for key in self._models})

    async def status_in_turns(self) -> dict[str, Any]:
        """The same, without holding the event loop: what it says of one model may be older than of the next."""
        models = {}
        async for key in in_turns([*self._models], _MODELS_A_TURN):
            if key in self._models:  # still
                models[key] = self._model_status(key)
        return self._status(models)

    def _model_status(self, key: str) -> dict[str, Any]:
        return pool_status.model_status(self._models[key], self.estimate_s(key), self._clock())

    def _status(self, models: dict[str, Any]) -> dict[str, Any]:
        return {
            "ready": self.ready,
            "draining": self._draining or self._shut,
            "leases": self._open_leases,
            "gpus": self._gpus.status(),
            "models": models,
            "coming": [
                pool_status.instance_status(m, slot, self._clock())
                for m in self._coming.values()
                for slot in m.slots.values()
            ],
            "leaving": [
                pool_status.instance_status(m, slot, self._clock()) for m in self._leaving for slot in m.slots.values()
            ],
            "wakes": [*self._wakes],
            "strays": [line for runtime in self._runtimes.values() for line in runtime.strays()],
            "overdue": self._overdue.status(),
            "written_off": self._written_off.status(),
        }


async def _ended_within(limit_s: float, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for tasks, not for longer than that; say what failed and what goes on."""
    if tasks:
        await asyncio.wait(tasks, timeout=max(0.0, limit_s))
    for task in tasks:
        if not task.done():
            log.error("%s: it does not end, and is left to the next start", task.get_name())
            task.cancel()
        elif not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %s", task.get_name(), error)


def _height(instance: Instance) -> Tier:
    """The tier that an instance is on, or will be when the move under way has ended."""
    return Tier.READY if instance.state is State.WAKING else instance.tier


def _to_move(slot: Slot, goal: Tier) -> bool:
    """Whether an order to go to `goal` asks something new of an instance."""
    return _height(slot.instance) < goal and (slot.order is None or slot.order.to < goal)


def _connect(handle: Handle, served_name: str, model: ModelSettings) -> EngineClient:
    key = key_of(handle.model, model)
    return EngineClient(handle.base_url, served_name, response_timeout_s=model.response_timeout, api_key=key)


def _on_its_way_down(model: Model) -> bool:
    return any(i.state in DESCENDING for i in model.instances())
