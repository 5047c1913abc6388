"""Images that there is evidence against: what becomes of them, and of the instances that are nothing else."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from proxy.errors import Fault, RuntimeFailure
from proxy.pool.instance import State
from proxy.pool.model import handle_of, reset
from proxy.runtime.base import Handle

if TYPE_CHECKING:
    from proxy.pool.effects import Effects
    from proxy.pool.model import Image, Model, Slot
    from proxy.pool.state import PoolState

log = logging.getLogger("warmpool.pool")

MAX_IMAGE_FAILURES: Final = 2
"""An image that failed to restore this often in a row is set aside."""


class ImageFaults:
    """Judges images by how their restores failed."""

    def __init__(self, state: PoolState, effects: Effects) -> None:
        self._state, self._effects = state, effects

    async def judge(self, model: Model, slot: Slot, fault: Fault) -> None:
        """What becomes of an image that could not be restored."""
        image = slot.image
        image.failures += fault is not Fault.HOST
        if not image.present:
            return
        if fault is Fault.DAMAGE:
            await self.quarantine(model, slot, "it is damaged")
        elif image.failures >= MAX_IMAGE_FAILURES:
            await self.quarantine(model, slot, f"it failed {image.failures} times", damaged=False)
        elif image.verification is None or image.verification.done():
            work = self._verify(model, slot)
            image.verification = self._effects.spawn(f"verify the checkpoint of {slot.instance.id}", work)

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
                await self.quarantine(model, slot, error.reason)
        except TimeoutError:
            log.warning("%s: its checkpoint was not read within checkpoint_timeout", slot.instance.id)

    async def quarantine(self, model: Model, slot: Slot, reason: str, *, damaged: bool = True) -> None:
        """Set the image aside; instances that are nothing but this image go with it.

        `damaged`: by its files, not by what it holds, so that a copy of it may be good.
        """
        log.error("%s: its checkpoint is set aside: %s", slot.instance.id, reason)
        self._state.metrics.quarantines.labels(model.key).inc()
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

    def forget_all(self, model: Model, reason: str) -> None:
        """No instance of a model is restored from the images there are; those that are nothing else go."""
        for image in {id(i): i for i in (model.image, *(s.image for s in model.slots.values()))}.values():
            reset(image)
            self._forget_resting(model, image, reason)

    def _forget_resting(self, model: Model, image: Image, reason: str) -> None:
        for slot in [s for s in model.slots.values() if s.image is image]:
            if slot.instance.state in (State.CHECKPOINTED, State.ARCHIVED):
                self._effects.remove(model, slot, reason)
