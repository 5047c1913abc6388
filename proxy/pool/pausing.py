"""The tasks that have the requests of an instance stand still while another model runs, and go on."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from proxy.errors import EngineError, NoRoomError, RuntimeFailure
from proxy.pool.instance import Event, Instance
from proxy.pool.model import client_of, note_unexpected, unless_it_ends
from proxy.telemetry.stages import Stages

if TYPE_CHECKING:
    from proxy.pool.effects import Effects
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.pool.stepping_down import SteppingDown

_AGAIN_S: Final = 30.0
"""After a pause for which there was too little host memory, it is tried again."""

log = logging.getLogger("warmpool.pool")


class Pausing:
    """Pauses instances. An engine that does not come back from it breaks, and the answers it was giving break off."""

    def __init__(self, state: PoolState, effects: Effects, downs: SteppingDown) -> None:
        self._state, self._effects, self._downs = state, effects, downs

    def pause(self, model: Model, instance: Instance, reason: str) -> asyncio.Task[None]:
        """Begin to have its requests stand still."""
        instance.begin_pause()
        log.info("%s pausing with %d requests: %s", instance.id, instance.leases, reason)
        return self._effects.move(model, instance, "pause", self._pause(model, instance))

    def unpause(self, model: Model, instance: Instance) -> asyncio.Task[None]:
        """Begin to have them go on."""
        instance.begin_unpause()
        return self._effects.move(model, instance, "unpause", self._unpause(model, instance))

    async def _pause(self, model: Model, instance: Instance) -> None:
        began, stages = self._state.clock(), Stages()
        try:
            async with asyncio.timeout(model.settings.wake_timeout):
                saved = await unless_it_ends(instance.watcher, client_of(instance).pause(stages))
        except Exception as error:  # noqa: BLE001 - whatever it was, its requests must not stand still for ever
            note_unexpected(instance, error)
            log.warning("%s could not be paused, and runs on: %s", instance.id, _reason(model, error))
            instance.no_pauses()
            if isinstance(error, NoRoomError):
                again = asyncio.get_running_loop().call_later
                again(_AGAIN_S, self._may_pause_again, instance, instance.generation)
            await self._go_on(model, instance)
            return
        now = self._state.clock()
        instance.paused(now)
        self._state.metrics.pauses.labels(model.key).inc()
        self._state.metrics.pause.labels(model.key).observe(now - began)
        self._state.costs.record_pause(model.key, now - began)
        self._state.gpu_accounting.paused(instance)
        self._effects.note_moved()
        log.info(
            "%s paused in %.3f s, %d MiB kept in host memory: %s",
            instance.id, now - began, saved >> 20, _told(stages),
        )  # fmt: skip

    def _may_pause_again(self, instance: Instance, generation: int) -> None:
        """There may be more host memory by now; only another pause can tell."""
        if instance.generation == generation:
            instance.learn_pausable(pausable=True)
            self._effects.tick()

    async def _unpause(self, model: Model, instance: Instance) -> None:
        since = instance.paused_since
        began = self._state.clock()
        if not await self._go_on(model, instance):
            return
        now = self._state.clock()
        self._state.metrics.unpause.labels(model.key).observe(now - began)
        self._state.costs.record_unpause(model.key, now - began)
        if since is not None:
            self._state.metrics.paused.labels(model.key).observe(now - since)

    async def _go_on(self, model: Model, instance: Instance) -> bool:
        """Whether its requests go on; if not, it broke."""
        began, stages = self._state.clock(), Stages()
        try:
            async with asyncio.timeout(model.settings.wake_timeout):
                if not await unless_it_ends(instance.watcher, client_of(instance).unpause(stages)):
                    instance.weights_lost()
        except Exception as error:  # noqa: BLE001 - as above
            note_unexpected(instance, error)
            log.error("%s does not continue after its pause, and is replaced: %s", instance.id, _reason(model, error))
            instance.apply(Event.BROKE)
            self._state.memory_accounting.broke(model.key)
            await self._downs.mend(model, instance)
            return False
        now = self._state.clock()
        instance.runs_on(now)
        self._state.gpu_accounting.runs_on(instance)
        self._effects.note_moved()
        log.info(
            "%s continues after %.3f s with %d requests: %s", instance.id, now - began, instance.leases, _told(stages)
        )
        return True


def _told(stages: Stages) -> str:
    return " ".join(f"{name}={value * 1000:.0f}ms" for name, value in stages.seconds.items())


def _reason(model: Model, error: Exception) -> str:
    if isinstance(error, EngineError | RuntimeFailure):
        return str(error)
    return str(error) or f"no result within wake_timeout ({model.settings.wake_timeout:g} s)"
