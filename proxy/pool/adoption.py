"""At the start: engines and checkpoints that an earlier process left are taken over as they are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING

from proxy.errors import EngineError, RuntimeFailure
from proxy.pool.instance import Instance, State
from proxy.pool.model import client_of, engine_of, image_of, limit_s, note_unexpected, too_slow
from proxy.pool.transitions import DEEPEST_SLEEP
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.pool.image import Image
    from proxy.pool.instance_moves import Moves
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.runtime.base import Found, Runtime

log = logging.getLogger("warmpool.pool")

_ADOPT_S = 5.0
"""How long an engine that runs already may take to say that it serves."""


class Adoption:
    """Takes over what a runtime recovered."""

    def __init__(self, state: PoolState, moves: Moves) -> None:
        self._state, self._effects, self._moves = state, moves, moves
        self._steps, self._wakes, self._downs = moves.steps, moves.wakes, moves.downs

    async def adopt(self, name: str, runtime: Runtime) -> None:
        """Take over what a runtime finds: images, and the instances of its models."""
        models = self._state.models
        mine = {key: m.settings for key, m in models.items() if m.settings.runtime == name}
        recovered = await runtime.recover(mine)
        self._state.lost |= recovered.lost
        images = {owner: image_of(facts) for owner, facts in recovered.images.items()}
        model_of = {found.engine.instance_id: found.engine.key for found in recovered.instances}
        for owner, facts in recovered.images.items():
            self._state.gpu_accounting.learn(
                owner if runtime.shares_images else model_of[owner], facts.details.get("gpu")
            )
            if (model := models.get(owner if runtime.shares_images else model_of[owner])) is not None:
                model.learn(facts.details)
        for key in mine.keys() & images.keys() if runtime.shares_images else ():
            models[key].image = images[key]
            self._state.observe(models[key])
            log.info("%s: golden checkpoint adopted", key)
        await asyncio.gather(*(self._adopt(found, images) for found in recovered.instances))

    async def _adopt(self, found: Found, images: Mapping[str, Image]) -> None:
        """Take over an instance as it is; one that runs but does not serve is ended."""
        model = self._state.models[found.engine.key]
        if len(model.instances) >= model.settings.max_instances:
            try:
                await found.engine.remove()
            except RuntimeFailure as error:
                log.error(
                    "%s, of which there is one too many, stays until the next start: %s",
                    found.engine.instance_id,
                    error,
                )
            return
        instance = self._state.new_instance(model, found.engine.instance_id)
        self._steps.attach(model, instance, found.engine)
        if not model.runtime.shares_images and instance.id in images:
            instance.use_image(images[instance.id])
        if found.tier is Tier.READY:
            if found.restored:
                instance.restored(copies_weights=model.settings.weights_copy)
            state = await self._state_of_running(model, instance)
            left_s = (found.started_unix_s or -math.inf) + model.settings.start_timeout - time.time()
            if state is State.BROKEN and left_s > 0 and await client_of(instance).loads(model.settings.health.path):
                self._go_on_waking(model, instance, Tier.STOPPED, left_s)
                return
            if state is State.READY and self._steps.needs_proof(model, instance):
                self._go_on_waking(model, instance, Tier.CHECKPOINTED, model.settings.wake_timeout)
                return
            self._take_over(model, instance, state)
        else:
            resting = State.ARCHIVED if instance.image.archived else State.CHECKPOINTED
            instance.adopt(resting, self._state.clock())
        if instance.state is State.BROKEN:
            log.warning("%s runs but does not serve: ended", instance.id)
            self._effects.move(model, instance, "mend", self._downs.mend(model, instance))
            return
        if instance.state not in (State.CHECKPOINTED, State.ARCHIVED):
            self._steps.watch(model, instance)
        log.info("%s adopted: %s", instance.id, instance.state.value)

    def _take_over(self, model: Model, instance: Instance, state: State) -> None:
        instance.adopt(state, self._state.clock())
        if state is State.PAUSED:  # it goes on when there is room; requests whose clients are gone end then
            instance.weights_copied()
            instance.learn_pausable(pausable=True)
        elif state is State.READY and model.settings.weights_copy:
            self._effects.spawn(f"ask {instance.id} about pauses", self._steps.learn_pausable(instance))

    def _go_on_waking(self, model: Model, instance: Instance, origin: Tier, left_s: float) -> None:
        """An engine that loads, and whose time is not over, or one that was restored and has to prove itself."""
        instance.begin_wake(origin, self._state.clock() - (limit_s(model.settings, origin) - left_s))
        self._steps.watch(model, instance)
        log.info("%s adopted: it is %s", instance.id, "loading" if origin is Tier.STOPPED else "to prove itself")
        self._effects.move(
            model, instance, "wake", self._wake_adopted(model, instance, instance.generation, origin, left_s)
        )

    async def _wake_adopted(
        self, model: Model, instance: Instance, generation: int, origin: Tier, left_s: float
    ) -> None:
        """The rest of a wake that another warmpool began; all of it once more if that fails."""
        stages, began = Stages(), self._state.clock()
        rest = self._steps.load if origin is Tier.STOPPED else self._steps.prove
        try:
            async with asyncio.timeout(left_s):
                await rest(model, instance, stages)
        except Exception as error:  # noqa: BLE001 - as in `_wake`
            note_unexpected(instance, error)
            reason = str(error) or too_slow(model.settings, origin)
            log.warning("%s was adopted and did not come up: %s", instance.id, reason)
            await self._wakes.clear_away(model, instance, origin, error)
            await self._wakes.wake(model, instance, generation)
            return
        if instance.generation == generation and instance.state is State.WAKING:
            self._wakes.woken(model, instance, origin, origin, began, stages, whole=False)

    async def _state_of_running(self, model: Model, instance: Instance) -> State:
        client = client_of(instance)
        with contextlib.suppress(EngineError, RuntimeFailure, TimeoutError):
            async with asyncio.timeout(_ADOPT_S):
                if not await engine_of(instance).listens():
                    return State.BROKEN
                if model.settings.weights_copy and await client.is_paused():
                    return State.PAUSED
                asleep = await client.is_sleeping()
                if asleep:
                    instance.sleeps(DEEPEST_SLEEP)  # which one is not to be learned: wake it thoroughly
                    return State.SLEEPING
                if await client.healthy(model.settings.health.path):
                    if asleep is None:
                        instance.bar(Tier.SLEEPING)
                    if model.max_model_len is None:
                        model.max_model_len = await client.max_model_len()
                    return State.READY
        return State.BROKEN
