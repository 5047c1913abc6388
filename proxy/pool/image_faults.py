"""Images that there is evidence against: what becomes of them, and of the instances that are nothing else."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from proxy.errors import Fault, RuntimeFailure
from proxy.pool.instance import Instance, State
from proxy.pool.model import engine_of

if TYPE_CHECKING:
    from proxy.pool.effects import Effects
    from proxy.pool.image import Image
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState

log = logging.getLogger("warmpool.pool")

MAX_IMAGE_FAILURES: Final = 2
"""An image that failed to restore this often in a row is set aside."""


class ImageFaults:
    """Judges images by how their restores failed."""

    def __init__(self, state: PoolState, effects: Effects) -> None:
        self._state, self._effects = state, effects

    async def judge(self, model: Model, instance: Instance, fault: Fault) -> None:
        """What becomes of an image that could not be restored."""
        image = instance.image
        image.restore_failed(counts=fault is not Fault.HOST)
        if not image.present:
            return
        if fault is Fault.DAMAGE:
            await self.quarantine(model, instance, "it is damaged")
        elif image.failures >= MAX_IMAGE_FAILURES:
            await self.quarantine(model, instance, f"it failed {image.failures} times", damaged=False)
        elif image.verification is None or image.verification.done():
            work = self._verify(model, instance)
            image.verified_by(self._effects.spawn(f"verify the checkpoint of {instance.id}", work))

    async def _verify(self, model: Model, instance: Instance) -> None:
        """Read all of an image, so that one that is damaged does not cost every wake a cold start."""
        image = instance.image
        try:
            async with image.lock, asyncio.timeout(model.settings.checkpoint_timeout):
                if image.present and not image.archived:
                    await model.runtime.images.verify(engine_of(instance), whole=True)
        except RuntimeFailure as error:
            log.warning("%s: %s", instance.id, error)
            if error.fault is Fault.DAMAGE and image.present:
                await self.quarantine(model, instance, error.reason)
        except TimeoutError:
            log.warning("%s: its checkpoint was not read within checkpoint_timeout", instance.id)

    async def quarantine(self, model: Model, instance: Instance, reason: str, *, damaged: bool = True) -> None:
        """Set the image aside; instances that are nothing but this image go with it.

        `damaged`: by its files, not by what it holds, so that a copy of it may be good.
        """
        log.error("%s: its checkpoint is set aside: %s", instance.id, reason)
        self._state.metrics.quarantines.labels(model.key).inc()
        image, canary = instance.image, instance.image.canary
        resting = instance.state in (State.CHECKPOINTED, State.ARCHIVED) and not model.runtime.shares_images
        keep_copy = damaged and not image.archived and not resting
        image.gone()
        self._forget_resting(model, image, "its checkpoint was set aside")
        # A clone that could not be made has no engine yet.
        engine = instance.engine or model.runtime.engine(instance.id, model.key)
        try:
            if await model.runtime.images.quarantine(engine, keep_copy=keep_copy) and not image.present:
                image.copied_back(canary)
                log.info("%s: its checkpoint is restored from the copy in the archive", instance.id)
        except (RuntimeFailure, OSError) as error:
            log.error("%s: %s", instance.id, error)

    def forget_all(self, model: Model, reason: str) -> None:
        """No instance of a model is restored from the images there are; those that are nothing else go."""
        for image in {id(i): i for i in (model.image, *(s.image for s in model.instances.values()))}.values():
            image.gone()
            self._forget_resting(model, image, reason)

    def _forget_resting(self, model: Model, image: Image, reason: str) -> None:
        for instance in [s for s in model.instances.values() if s.image is image]:
            if instance.state in (State.CHECKPOINTED, State.ARCHIVED):
                self._effects.remove(model, instance, reason)
