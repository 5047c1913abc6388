"""An engine on several GPUs is suspended, and restored, once for a trial before anything relies on it.

With driver 580 the suspend of such an engine succeeds and the resume may fail, by how its ranks reach each other: the
engine is lost then. So the first one that is idle is tried. A trial that fails costs this engine, and the tier that it
does not come back from is left out of its model's ladder.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from proxy.errors import EngineError, OverdueError, RuntimeFailure, WarmpoolError
from proxy.pool.model import client_of, engine_of, unless_it_ends
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.instance import Instance
    from proxy.pool.model import Model
    from proxy.pool.transitions import StepEffects, Steps
    from proxy.telemetry.stages import Stages

log = logging.getLogger("warmpool.pool")

_PART: Final = 0.75
"""Of the time that a step down may take: what hangs is found out before that is over."""
_ADVICE: Final = "docs/operations.md, Tensor parallel, has the settings that come back"


class LadderProbe:
    """Used by `Steps` on the way down."""

    def __init__(self, steps: Steps, effects: StepEffects) -> None:
        self._steps, self._effects = steps, effects

    async def try_suspend(self, model: Model, instance: Instance, stages: Stages) -> None:
        """For an engine that is awake or asleep, and so afterwards: suspend, resume, wake up, the canary.

        Raises RuntimeFailure: with `alive` where it could not be tried now.
        """
        engine = engine_of(instance)
        if model.probes.known(model.key, engine.fingerprint(), Tier.SUSPENDED) or not await _uses_several(
            model, instance
        ):
            return
        was_asleep = instance.sleep_level
        if was_asleep and not self._effects.has_room(instance):
            raise RuntimeFailure(
                "probe", "on several GPUs, and its suspend is to be tried first, for which there is no room", alive=True
            )
        log.info("%s uses several GPUs: whether it comes back from a suspend is tried", instance.id)
        with model.gpu_accounting.holding(instance), stages.measure("probe"):
            await self._steps.wake_up(instance, stages)
            client = client_of(instance)
            expected = instance.canary
            if expected is None:
                expected = await unless_it_ends(instance.watcher, client.canary())
            await self._steps.fall_asleep(model, instance, Tier.READY, stages)
            await client.disconnect()
            try:
                async with asyncio.timeout(model.settings.wake_timeout * _PART):
                    await engine.suspend()
                    await engine.resume()
                    await self._steps.wake_up(instance, stages)
                    if await unless_it_ends(instance.watcher, client.canary()) != expected:
                        raise EngineError("canary", "it answers differently afterwards")
            except (WarmpoolError, TimeoutError) as error:
                await self._failed(model, instance, Tier.SUSPENDED, error)
            await model.probes.note(model.key, engine.fingerprint(), Tier.SUSPENDED)
            model.note_change()
            if was_asleep:
                await client.sleep(was_asleep)
                instance.sleeps(was_asleep)
        log.info("%s came back from its suspend", instance.id)

    async def try_restore(self, model: Model, instance: Instance, stages: Stages) -> None:
        """For an engine that was just checkpointed, and is so afterwards: restore, wake up, the canary.

        One that is not to be had now proves itself in its first wake. Raises RuntimeFailure, the image set aside.
        """
        engine = engine_of(instance)
        fingerprint, image = engine.fingerprint(), instance.image
        due = model.probes.known(model.key, fingerprint, Tier.SUSPENDED) and not model.probes.known(
            model.key, fingerprint, Tier.CHECKPOINTED
        )
        if not due or not self._effects.has_room(instance):
            return
        with model.gpu_accounting.holding(instance), stages.measure("probe"):
            try:
                async with asyncio.timeout(model.settings.wake_timeout * _PART):
                    await self._steps.restored(model, instance, stages)
            except (WarmpoolError, TimeoutError) as error:
                await self._steps.unwatch(instance)
                await model.runtime.images.quarantine(engine)
                image.gone()
                await self._failed(model, instance, Tier.CHECKPOINTED, error)
            await self._steps.unwatch(instance)
            await client_of(instance).disconnect()
            await engine.kill()
            instance.sleeps(image.sleep_level)
        await model.probes.note(model.key, fingerprint, Tier.CHECKPOINTED)
        model.note_change()

    async def _failed(self, model: Model, instance: Instance, tier: Tier, error: Exception) -> None:
        """Keep what it says of the tier; raises RuntimeFailure."""
        if isinstance(error, RuntimeFailure) and error.alive:
            raise error
        reason = str(error) or f"no result within {model.settings.wake_timeout * _PART:g} s"
        if not _says_nothing(error, instance):
            what = "a suspend" if tier is Tier.SUSPENDED else "its checkpoint"
            text = f"an engine on several GPUs did not come back from {what} when that was tried: {reason}; {_ADVICE}"
            log.error("%s: %s", model.key, text)
            await model.probes.note(model.key, engine_of(instance).fingerprint(), tier, text)
            model.note_change()
        raise RuntimeFailure("probe", reason) from error


def _says_nothing(error: Exception, instance: Instance) -> bool:
    """Whether the host is to blame: it was too slow, had no memory, or somebody ended the engine."""
    if isinstance(error, OverdueError) or "OUT_OF_MEMORY" in str(error):
        return True
    return instance.watcher is not None and instance.watcher.done()


async def _uses_several(model: Model, instance: Instance) -> bool:
    held = [count for count in (await engine_of(instance).gpu_bytes()).values() if count]
    if len(held) > 1:
        return True
    # NVML may not tell processes apart.
    return model.settings.gpus_an_engine > 1 and bool(held or model.gpu_accounting.gpus)
