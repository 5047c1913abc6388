"""The way up: a wake from the warmest tier that works, and a clone of the golden checkpoint."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.config.values import format_size
from proxy.errors import Fault, RuntimeFailure, fault_of
from proxy.pool import status
from proxy.pool.instance import Event, Instance, State, WakeRecord
from proxy.pool.model import note_unexpected, tiers_from, too_slow
from proxy.pool.wake_failure import WakeFailure
from proxy.pool.wake_progress import WakeProgress
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.pool.effects import Effects
    from proxy.pool.gpu_accounting import Bytes
    from proxy.pool.gpu_monitor import GpuMonitor
    from proxy.pool.image_faults import ImageFaults
    from proxy.pool.memory_monitor import MemoryMonitor
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.pool.stepping_down import SteppingDown
    from proxy.pool.transitions import Steps

log = logging.getLogger("warmpool.pool")


@dataclass(frozen=True, slots=True)
class Evictions:
    """What a wake waits for, and what it expects of it."""

    tasks: Mapping[str, asyncio.Task[None]]
    """The victims' ids, and their way down."""
    needed: Bytes
    """GPU memory that has to be free afterwards."""
    expected: Mapping[str, Bytes]
    """Instance → what it should hold by then."""


NO_EVICTIONS = Evictions({}, {}, {})


class Waking:
    """The tasks that bring an instance to ready."""

    def __init__(
        self,
        state: PoolState,
        effects: Effects,
        steps: Steps,
        faults: ImageFaults,
        downs: SteppingDown,
        gpus: GpuMonitor,
        memory_monitor: MemoryMonitor,
    ) -> None:
        self._state, self._effects, self._steps = state, effects, steps
        self._faults, self._downs = faults, downs
        self._gpus, self._memory_monitor = gpus, memory_monitor

    async def wake(
        self, model: Model, instance: Instance, generation: int, evictions: Evictions = NO_EVICTIONS
    ) -> None:
        """Bring an instance to ready from the warmest tier that works."""
        found = instance.waking_from or Tier.STOPPED
        stages = Stages(on_begin=self._state.tell)
        progress = WakeProgress(found, self._state.clock(), stages)
        self._state.wakes_under_way[instance.id] = progress
        try:
            await self._wake(model, instance, generation, evictions, progress)
        finally:
            if self._state.wakes_under_way.get(instance.id) is progress:
                del self._state.wakes_under_way[instance.id]

    async def _wake(
        self, model: Model, instance: Instance, generation: int, evictions: Evictions, progress: WakeProgress
    ) -> None:
        found, stages, failures = progress.found, progress.stages, progress.failures
        log_lines: list[str] = []
        if evictions.tasks:
            with stages.measure("evict"):
                await asyncio.wait(evictions.tasks.values())
                await self._gpus.make_sure(evictions)
        tiers = tiers_from(found, instance)
        for tier in tiers:
            try:
                if tier >= Tier.CHECKPOINTED:
                    await self._check_memory(instance, unpacks=tier < Tier.STOPPED and instance.image.archived)
                await self._steps.climb(model, instance, tier, stages)
            except Exception as error:  # noqa: BLE001 - whatever it was, a colder tier may work and nobody may be left waiting
                reason = str(error) or too_slow(model.settings, tier)
                note_unexpected(instance, error)
                failures.append(f"{tier.label}: {reason}")
                log.warning("%s did not wake from %s: %s", instance.id, tier.label, reason)
                self._state.metrics.wake_failures.labels(model.key, tier.label).inc()
                log_lines = await self._last_log_lines(instance)
                await self.clear_away(model, instance, tier, error)
                if tier is Tier.CHECKPOINTED and instance.image.archived:  # only its copy is any good
                    tiers.insert(tiers.index(tier) + 1, Tier.ARCHIVED)
                continue
            if instance.generation != generation or instance.state is not State.WAKING:
                return
            self.woken(model, instance, found, tier, progress.began, stages)
            return
        self.fail(model, instance, failures, log_lines)
        await self._downs.mend(model, instance)

    def woken(
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
        now = self._state.clock()
        seconds = now - began
        record = WakeRecord(found, tier, time.time(), now, seconds, dict(stages.seconds), dict(stages.starts))
        instance.woken(record)
        model.end_back_off()
        if tier in (Tier.SLEEPING, Tier.SUSPENDED):
            self._state.gpu_accounting.woke(instance)
        if model.settings.weights_copy and tier is not Tier.STOPPED and not instance.pausable:
            self._effects.spawn(f"ask {instance.id} about pauses", self._steps.learn_pausable(instance))
        self._effects.note_moved()
        self._state.wakes.appendleft(status.wake_status(record) | {"model": model.key, "instance": instance.id})
        if tier is found and whole:
            self._state.costs.record(model.key, tier, seconds)
        for stage, value in (*stages.seconds.items(), ("total", seconds)):
            self._state.metrics.wake.labels(model.key, found.label, stage).observe(value)
        detail = " ".join(f"{name}={value * 1000:.0f}ms" for name, value in stages.seconds.items())
        log.info("%s ready from %s in %.3f s: %s", instance.id, tier.label, seconds, detail)
        self._effects.tick()

    async def _check_memory(self, instance: Instance, *, unpacks: bool) -> None:
        """Fail rather than have the OOM killer choose, where what was to be made free is not."""
        if not self._state.memory_accounting.lacking(instance, unpacks=unpacks):
            return
        await self._memory_monitor.measure()
        if missing := self._state.memory_accounting.lacking(instance, unpacks=unpacks):
            raise RuntimeFailure("memory", f"{format_size(missing)} of host memory are missing for it")

    async def _last_log_lines(self, instance: Instance) -> list[str]:
        """What the engine wrote last, which goes to the log too."""
        lines = [*await instance.engine.log_tail()] if instance.engine is not None else []
        if lines:
            log.warning("%s: the last lines of its log:\n  %s", instance.id, "\n  ".join(lines))
        return lines

    def fail(self, model: Model, instance: Instance, failures: Sequence[str], log_lines: Sequence[str]) -> None:
        """Tell those who wait for nothing but this wake; those who come next are told too, until it is tried again."""
        instance.apply(Event.BROKE)
        found = instance.waking_from or Tier.STOPPED
        failure = WakeFailure(instance.id, found, time.time(), tuple(failures), tuple(log_lines))
        model.last_failure = failure
        model.back_off(self._state.clock())
        model.start_at = model.restock_at
        model.failing.add(instance.id)
        failed = {"found": found.label, "at_unix_s": failure.at_unix_s, "failed": [*failures]}
        self._state.wakes.appendleft(failed | {"model": model.key, "instance": instance.id})
        others = (s.state for s in model.instances.values() if s is not instance)
        if any(state in (State.WAKING, State.READY) for state in others):
            return
        model.fail_waiters(model.wake_failed(failure, self._state.clock()))

    async def clear_away(self, model: Model, instance: Instance, tier: Tier, cause: Exception) -> None:
        """After a failed attempt: no process is left, and an image that there is evidence against is gone."""
        instance.end_load()
        await self._steps.unwatch(instance)
        if instance.client is not None:
            await instance.client.disconnect()
        if instance.engine is None:
            return
        try:
            await instance.engine.kill()
        except RuntimeFailure as error:
            log.error("%s: %s", instance.id, error)
        hangs = self._state.overdue.hanging(instance.id)  # which is the host's fault, not the image's
        if tier in (Tier.CHECKPOINTED, Tier.ARCHIVED) and not hangs:
            await self._faults.judge(model, instance, fault_of(cause))

    async def clone(self, model: Model, instance: Instance) -> None:
        """Prepare an instance that the golden checkpoint can be restored to."""
        try:
            async with asyncio.timeout(model.settings.wake_timeout):
                engine = await model.runtime.clone(instance.id, model.key, model.settings)
        except (RuntimeFailure, TimeoutError) as error:
            reason = str(error) or too_slow(model.settings, Tier.CHECKPOINTED)
            log.warning("%s cannot be prepared: %s", instance.id, reason)
            if fault_of(error) is Fault.DAMAGE and instance.image.present:
                await self._faults.quarantine(model, instance, reason)
            else:
                model.back_off(self._state.clock())
            instance.apply(Event.BROKE)
            await self._downs.mend(model, instance)
            return
        self._steps.attach(model, instance, engine)
        if not instance.image.present:  # set aside meanwhile
            instance.apply(Event.BROKE)
            await self._downs.mend(model, instance)
            return
        instance.rest(Tier.ARCHIVED if instance.image.archived else Tier.CHECKPOINTED, self._state.clock())
        log.info("%s prepared: a clone of the golden checkpoint", instance.id)
