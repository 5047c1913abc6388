"""The way down: to a colder tier, to nothing, and for a broken engine to whatever is left of it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from proxy.errors import EngineError, Fault, OverdueError, RuntimeFailure, fault_of
from proxy.pool.instance import Event, Instance, State
from proxy.pool.model import client_of, note_unexpected
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.effects import Effects
    from proxy.pool.image_faults import ImageFaults
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.pool.transitions import Steps

log = logging.getLogger("warmpool.pool")

_REMOVE_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_STEP_RETRY_S: Final = (60.0, 300.0, 1800.0)
"""Between two tries to step down to a tier that could not be had without harm, as for want of space."""


class SteppingDown:
    """The tasks that take an instance down, and away."""

    def __init__(self, state: PoolState, effects: Effects, steps: Steps, faults: ImageFaults) -> None:
        self._state, self._effects, self._steps, self._faults = state, effects, steps, faults

    async def descend(self, model: Model, instance: Instance, origin: Tier, to: Tier, reason: str) -> None:
        """Take an idle instance down; a failure without harm leaves it where it is, any other breaks it."""
        client, settings = client_of(instance), model.settings
        damage: str | None = None
        had_image = instance.image.present
        try:
            limit_s = settings.checkpoint_timeout if to is Tier.CHECKPOINTED else settings.wake_timeout
            async with asyncio.timeout(limit_s):
                if origin is Tier.READY and reason != "evict":
                    await self._effects.last_look(model, instance)
                await self._steps.go_down(model, instance, origin, to)
        except Exception as error:  # noqa: BLE001 - whatever it was, the instance may not stay between two tiers
            setting = "checkpoint_timeout" if to is Tier.CHECKPOINTED else "wake_timeout"
            text = str(error) or f"no result within {setting} ({limit_s:g} s)"
            note_unexpected(instance, error)
            damage = text if fault_of(error) is Fault.DAMAGE else None
            # No engine runs on the way to the archive, so none can break.
            harmless = to is Tier.ARCHIVED or (isinstance(error, RuntimeFailure) and error.alive)
            harmless = harmless and not self._state.overdue.hanging(instance.id)
            if isinstance(error, RuntimeFailure) and error.leaked_bytes:
                self._state.metrics.gpu_leaks.labels(model.key).inc()
            if harmless:
                delay_s = _STEP_RETRY_S[min(instance.failed_steps, len(_STEP_RETRY_S) - 1)]
                instance.postpone(to, self._state.clock() + delay_s)
            else:
                instance.bar(to)
            if isinstance(error, EngineError):
                harmless = await self._steps.still_awake(instance)
            if not harmless:
                log.error("%s broke on its way to %s: %s", instance.id, to.label, text)
                instance.fail_command(to, f"the engine broke: {text}")
                instance.apply(Event.BROKE)
                await self.mend(model, instance)
                return
            log.warning("%s cannot go to %s, and stays: %s", instance.id, to.label, text)
            instance.fail_command(to, text)
            arrived = origin if origin is not Tier.READY or not instance.sleep_level else Tier.SLEEPING
            if instance.watcher is None and arrived < Tier.CHECKPOINTED:
                self._steps.watch(model, instance)
            instance.stay(arrived)
        else:
            arrived = to
            if instance.image.present and not had_image:
                self._effects.image_written(model, instance)
            if to >= Tier.SUSPENDED:
                await client.disconnect()
            self._state.metrics.step_downs.labels(model.key, to.label, reason).inc()
            log.info("%s %s", instance.id, to.label)
            instance.stepped_down(to)
        if arrived is not Tier.READY:
            self._state.gpu_accounting.arrived(instance, arrived)
        self._effects.note_moved()
        if damage is not None:
            await self._faults.quarantine(model, instance, damage)

    async def remove(self, model: Model, instance: Instance, reason: str) -> None:
        """End an instance and forget it, in this order; tries again until it has ended, or is written off."""
        await self._steps.unwatch(instance)
        if instance.client is not None:
            await instance.client.disconnect()
        attempt = 0
        while instance.engine is not None:
            try:
                await instance.engine.remove()
                if instance.discards_image:
                    await model.runtime.images.discard(instance.engine)
                break
            except RuntimeFailure as error:
                if isinstance(error, OverdueError) or attempt == len(_REMOVE_RETRY_S):
                    self.write_off(model, instance, str(error))
                    return
                delay_s = _REMOVE_RETRY_S[attempt]
                attempt += 1
                log.error("%s cannot be removed, next try in %g s: %s", instance.id, delay_s, error)
                await asyncio.sleep(delay_s)
        self._forget(model, instance)
        self._state.metrics.step_downs.labels(model.key, Tier.STOPPED.label, reason).inc()
        log.info("%s stopped", instance.id)

    def _forget(self, model: Model, instance: Instance, failure: str | None = None) -> None:
        """An instance is no more the pool's; `failure`: it has not ended."""
        instance.apply(Event.WENT)
        del model.instances[instance.id]
        self._state.gpu_accounting.forget(instance.id)
        self._state.memory_accounting.forget(instance.id)
        self._effects.note_moved()
        self._state.forget_if_gone(model)
        model.discarding = model.discarding and bool(model.instances)
        instance.end_command(failure)

    def write_off(self, model: Model, instance: Instance, reason: str) -> None:
        """Nothing waits any longer for a broken or stopping instance that does not go."""
        if instance.state is State.BROKEN:
            instance.apply(Event.STOP)
        self._forget(model, instance, f"it is written off: {reason}")
        if instance.engine is not None:
            self._state.written_off.add(model, instance, reason)
        self._effects.tick()

    async def mend(self, model: Model, instance: Instance) -> None:
        """Clear a broken engine away: down to its checkpoint if it has one, else altogether."""
        await self._steps.unwatch(instance)
        if instance.image.present and instance.engine is not None:
            if instance.client is not None:
                await instance.client.disconnect()
            try:
                await instance.engine.kill()
            except RuntimeFailure as error:
                log.error("%s: %s", instance.id, error)
            else:
                instance.sleeps(instance.image.sleep_level)
                instance.rest(Tier.CHECKPOINTED, self._state.clock())
                self._state.gpu_accounting.arrived(instance, Tier.CHECKPOINTED)
                self._effects.note_moved()
                return
        instance.apply(Event.STOP)
        await self.remove(model, instance, "broken")
