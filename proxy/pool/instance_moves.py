"""The tasks that move instances: begun here, one for an instance at a time, and looked after until they end."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from proxy.config.values import format_size
from proxy.errors import NoMemoryError, RuntimeFailure
from proxy.pool import gpu_accounting
from proxy.pool.engine_scrape import EngineScrape
from proxy.pool.gpu_monitor import GpuMonitor
from proxy.pool.image_faults import ImageFaults
from proxy.pool.instance import MOVING, TRANSITIONS, Event, Instance, State
from proxy.pool.memory_monitor import MemoryMonitor
from proxy.pool.model import client_of, is_left
from proxy.pool.pausing import Pausing
from proxy.pool.plan import Action, Clone, Pause, Readmit, Refuse, Retire, StepDown, Unpause, Wake
from proxy.pool.stall_detection import StallDetection
from proxy.pool.state import Phase
from proxy.pool.stepping_down import SteppingDown
from proxy.pool.transitions import Steps
from proxy.pool.waking import NO_EVICTIONS, Evictions, Waking
from proxy.telemetry.overdue import GIVE_UP_S
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient
    from proxy.gpu.cuda import Gpus
    from proxy.host.facts import Memory
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.runtime.base import EngineProcess

log = logging.getLogger("warmpool.pool")

_MEMORY_RETRY_S = 10.0
"""When one may ask again who was refused for want of host memory."""


class Moves:
    """The `Effects` of the pool's parts, and of the transitions. `tick` and `tick_soon` are the pool's."""

    keeps_images = False

    def __init__(
        self,
        state: PoolState,
        *,
        tick: Callable[[], None],
        tick_soon: Callable[[], None],
        connect: Callable[[EngineProcess, str, ModelSettings], EngineClient],
        gpus: Gpus | None,
        memory: Callable[[], Memory] | None,
    ) -> None:
        self._state = state
        self.tick, self.tick_soon, self.connect = tick, tick_soon, connect
        self.tasks: set[asyncio.Task[None]] = set()
        self.gpus = GpuMonitor(gpus, state, self)
        self.memory_monitor = MemoryMonitor(memory if state.settings.pool.memory_check else None, state, self)
        self.stalls = StallDetection(state, self)
        self.faults = ImageFaults(state, self)
        self.measure_once, self.quarantine = self.gpus.measure_once, self.faults.quarantine
        self.has_room = self.gpus.has_room
        self.steps = Steps(self)
        self.engine_scrape = EngineScrape(state)
        self.last_look, self.image_written = self.engine_scrape.last_look, self.engine_scrape.image_written
        self.downs = SteppingDown(state, self, self.steps, self.faults)
        self.pauses = Pausing(state, self, self.downs)
        self.wakes = Waking(state, self, self.steps, self.faults, self.downs, self.gpus, self.memory_monitor)

    @property
    def copies_to_archive(self) -> bool:
        """Whether a copy of a new checkpoint goes to the archive."""
        return self._state.settings.pool.archive_copies

    async def start_watching(self) -> None:
        """Look after memory and after engines that stand still."""
        await self.gpus.start()
        await self.memory_monitor.start()
        self.stalls.start()

    def cancel(self) -> list[asyncio.Task[None]]:
        """End everything that goes on; the tasks that have to come to their end."""
        for task in self.tasks:
            task.cancel()
        watches = (self.stalls, self.memory_monitor, self.gpus)
        return [*self.tasks, *(asyncio.create_task(watch.stop(), name="looks") for watch in watches)]

    async def settled(self) -> None:
        """Return when no instance is on its way anywhere, those left aside that the next warmpool goes on with."""
        while moves := self.tasks - {
            s.task for m in self._state.everyone() for s in m.instances.values() if is_left(m, s)
        }:
            await asyncio.wait(moves)

    # --- what was decided ---

    def begin(self, action: Action) -> None:
        """Do what a plan says."""
        match action:
            case Clone(key):
                model = self._state.models[key]
                instance = self._state.new_instance(model, self._state.free_id(model))
                instance.apply(Event.CLONE)
                self.move(model, instance, "clone", self.wakes.clone(model, instance))
            case Wake():
                self._begin_wake(action)
            case StepDown():
                self.step_down(action)
            case Refuse(key, needed_bytes, missing_bytes):
                self._refuse_for_memory(self._state.models[key], needed_bytes, missing_bytes)
            case Retire(seen, reason):
                _, instance = self._state.find(seen)
                instance.apply(Event.RETIRE)
                log.info("%s retiring: %s", instance.id, reason)
            case Pause(seen):
                self.pauses.pause(*self._state.find(seen), "another model waits for its place")
            case Unpause(seen):
                self.pauses.unpause(*self._state.find(seen))
            case Readmit(seen):
                _, instance = self._state.find(seen)
                instance.apply(Event.READMIT)
                log.info("%s readmitted", instance.id)

    def _refuse_for_memory(self, model: Model, needed_bytes: int, missing_bytes: int) -> None:
        text = (
            f"There is not enough host memory for {model.served_name!r}: it needs {format_size(needed_bytes)}, "
            f"{format_size(missing_bytes)} more than can be made free."
        )
        log.error("%s: no wake: %s", model.key, text)
        model.fail_waiters(NoMemoryError(text, retry_after_s=_MEMORY_RETRY_S))

    def _begin_wake(self, action: Wake) -> None:
        everyone = [i for m in self._state.everyone() for i in m.instances.values()]
        if action.instance is not None:
            self._state.gpu_accounting.place(self._state.find(action.instance)[1], everyone)
        evictions = self._evict(action) if action.victims else NO_EVICTIONS
        model = self._state.models[action.model]
        if action.instance is None:
            instance = self._state.new_instance(model, self._state.free_id(model))
        else:
            instance = model.instances[action.instance.id]
        found = Tier.STOPPED if instance.state is State.NEW else instance.tier
        instance.begin_wake(found, self._state.clock())
        log.info("%s waking from %s", instance.id, found.label)
        self.move(model, instance, "wake", self.wakes.wake(model, instance, instance.generation, evictions))

    def _evict(self, action: Wake) -> Evictions:
        held, need = gpu_accounting.NOTHING, self._state.gpu_accounting.need(action.model) or gpu_accounting.NOTHING
        if action.instance is not None:
            candidate = self._state.find(action.instance)[1]
            held, need = self._state.gpu_accounting.charge(candidate), self._state.gpu_accounting.need_of(candidate)
        needed = gpu_accounting.beyond(need, held)
        if not gpu_accounting.beyond(needed, {gpu.uuid: gpu.free_bytes for gpu in self._state.gpu_accounting.gpus}):
            needed = {}  # as much was free before anybody made room: nothing is to be seen to
        expected = {}
        for instance in (s for m in self._state.everyone() for s in m.instances.values()):
            if instance.state in (State.SLEEPING, State.SUSPENDED):
                expected[instance.id] = self._state.gpu_accounting.expected(instance, instance.tier)
        for victim in action.victims:
            _, instance = self._state.find(victim.instance)
            expected[instance.id] = self._state.gpu_accounting.expected(instance, victim.to)
        tasks = {victim.instance.id: self.step_down(victim) for victim in action.victims}
        return Evictions(tasks, needed, expected)

    def step_down(self, action: StepDown) -> asyncio.Task[None]:
        model, instance = self._state.find(action.instance)
        origin = instance.tier
        instance.begin_step_down(action.to, evicted=action.reason == "evict")
        # All may begin to go in one moment: the last one takes the image along.
        last_of_discarded = model.discarding and all(s.state is State.STOPPING for s in model.instances.values())
        frees_image = (
            model.runtime.shares_images and instance.image.present and (action.reason == "idle" or last_of_discarded)
        )
        if action.to is Tier.STOPPED and frees_image:
            instance.discard_image()  # the last tier frees everything, and no clone is prepared any more
        log.info("%s %s -> %s (%s)", instance.id, origin.label, action.to.label, action.reason)
        work = (
            self.downs.remove(model, instance, action.reason)
            if action.to is Tier.STOPPED
            else self.downs.descend(model, instance, origin, action.to, action.reason)
        )
        return self.move(model, instance, "step down", work)

    def note_moved(self) -> None:
        self.gpus.due.set()
        self.memory_monitor.due.set()

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %r", task.get_name(), error, exc_info=error)
        self.tick()

    def move(self, model: Model, instance: Instance, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have a task take an instance out of a moving state; whatever becomes of it, it does not stay there."""
        task = self.spawn(f"{name} {instance.id}", work)
        instance.moved_by(task)
        task.add_done_callback(partial(self._moved, model, instance))
        return task

    def _moved(self, model: Model, instance: Instance, task: asyncio.Task[None]) -> None:
        if self._state.phase is Phase.CLOSED or instance.task is not task or instance.state not in MOVING:
            return
        error = None if task.cancelled() else task.exception()
        reason = f"{task.get_name()} ended in state {instance.state.value}: {error!r}"
        log.error("%s", reason)
        if model.coming:
            self.withdraw(model.key, reason)
            return
        if instance.state in (State.BROKEN, State.STOPPING):
            self.downs.write_off(model, instance, reason)
            return
        if instance.state is State.WAKING:
            self.wakes.fail(model, instance, [reason], [])
        else:
            instance.apply(Event.BROKE)
        self.move(model, instance, "mend", self.downs.mend(model, instance))

    def remove(self, model: Model, instance: Instance, reason: str) -> None:
        """Begin to end an instance that rests."""
        instance.apply(Event.STOP)
        self.move(model, instance, "remove", self.downs.remove(model, instance, reason))

    def give_way(self, reason: str) -> None:
        for key in [*self._state.coming]:
            self.withdraw(key, reason)

    def withdraw(self, key: str, reason: str) -> None:
        """End what is made ready for a model, if anything is; its outdated engines serve on."""
        new = self._state.coming.pop(key, None)
        if new is None:
            return
        if key in self._state.models:
            self._state.models[key].renewal = reason
        new.coming, new.leaving = False, True
        self._state.leaving.append(new)
        for instance in new.instances.values():
            log.warning("%s does not take over: %s", instance.id, reason)
            work = instance.task
            if instance.image.present and new.runtime.shares_images:
                instance.discard_image()
            else:
                instance.image.gone()
            instance.apply(Event.BROKE)
            instance.apply(Event.STOP)
            self.move(new, instance, "remove", self._remove_after(work, new, instance))
            if work is not None and work is not asyncio.current_task():
                work.cancel()

    async def _remove_after(self, work: asyncio.Task[None] | None, model: Model, instance: Instance) -> None:
        if work is not None:
            await asyncio.wait([work])
        await self.downs.remove(model, instance, "withdrawn")

    # --- engines that end, or are ended ---

    def ended(self, model: Model, instance: Instance, watcher: asyncio.Task[str]) -> None:
        if watcher.cancelled() or instance.watcher is not watcher:
            return
        reason = watcher.result() if watcher.exception() is None else repr(watcher.exception())
        log.warning("%s: the engine ended in state %s: %s", instance.id, instance.state.value, reason)
        self._state.metrics.engine_exits.labels(model.key).inc()
        self.give_up(model, instance)

    def give_up(self, model: Model, instance: Instance) -> None:
        """The engine is of no use any more. During a move the move's own task finds out."""
        if instance.state in (State.READY, State.RETIRING, State.PAUSED, State.SLEEPING, State.SUSPENDED):
            instance.apply(Event.BROKE)
            self._state.memory_accounting.broke(model.key)
            self.move(model, instance, "mend", self.downs.mend(model, instance))
            self.tick()

    def give_up_stalled(self, model: Model, instance: Instance, reason: str) -> None:
        """An engine that stands still: its clients get an error, and the next request another engine."""
        log.error("%s stands still and is replaced: %s", instance.id, reason)
        self._state.metrics.engine_stalls.labels(model.key).inc()
        client_of(instance).give_up("the engine stands still")
        self.give_up(model, instance)

    def force(self, model: Model, instance: Instance) -> None:
        work = instance.task
        log.warning("%s is stopped by force in state %s", instance.id, instance.state.value)
        if instance.client is not None:
            instance.client.give_up("an operator stopped the engine")
        if (instance.state, Event.BROKE) in TRANSITIONS:
            instance.apply(Event.BROKE)
        if instance.state is not State.STOPPING:
            instance.apply(Event.STOP)
        self.move(model, instance, "force", self._force_down(work, model, instance))
        if work is not None:
            work.cancel()

    async def _force_down(self, work: asyncio.Task[None] | None, model: Model, instance: Instance) -> None:
        if work is not None:
            await asyncio.wait([work], timeout=2 * GIVE_UP_S)
        await self.steps.unwatch(instance)
        if instance.engine is not None:
            try:
                await instance.engine.kill()
            except RuntimeFailure as error:
                log.error("%s: %s", instance.id, error)
        await self.downs.remove(model, instance, "force")
