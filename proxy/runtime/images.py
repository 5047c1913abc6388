"""What every runtime that checkpoints to the store does with images, whoever they belong to."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from proxy.checkpoints import OtherVersionError, StoreError
from proxy.errors import RuntimeFailure
from proxy.instance import Tier
from proxy.runtime.base import Footprint, ImageFacts, Outdated, Rungs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.checkpoints import CheckpointStore
    from proxy.config import ModelSettings
    from proxy.manifest import Manifest
    from proxy.runtime.base import Handle

log = logging.getLogger("warmpool.runtime")


class KeepsImages(abc.ABC):
    """The image part of a runtime. `shares_images` says whose they are."""

    name: str
    shares_images: bool
    _store: CheckpointStore

    def _image(self, handle: Handle) -> str:
        return handle.image or (handle.model if self.shares_images else handle.instance_id)

    def _open_store(self, reason: str | None) -> Rungs:
        """The rungs there are, the store open if this host can checkpoint (`reason` None: it can)."""
        if reason is None:
            try:
                self._store.open()
            except StoreError as error:
                reason = str(error)
        offered = {Tier.SLEEPING, Tier.SUSPENDED}
        if reason is not None:
            return Rungs(frozenset(offered), {Tier.CHECKPOINTED: reason})
        self._store.sweep()
        archived = {Tier.ARCHIVED} if self._store.archive is not None else set()
        refused = self._store.archive_refused
        return Rungs(
            frozenset({*offered, Tier.CHECKPOINTED, *archived}),
            {Tier.ARCHIVED: refused} if refused is not None else {},
        )

    async def discard_image(self, handle: Handle) -> None:
        """See `Runtime.discard_image`."""
        image = self._image(handle)
        await self._store.remove(image)
        await self._store.remove_archive(image)

    async def quarantine_image(self, handle: Handle) -> None:
        """See `Runtime.quarantine_image`."""
        image = self._image(handle)
        await asyncio.to_thread(self._store.quarantine, image)
        await self._store.remove_archive(image)

    async def copy_to_archive(self, handle: Handle) -> None:
        """See `Runtime.copy_to_archive`."""
        image = self._image(handle)
        try:
            async with self._store.archiving:
                if not await self._is_archived(self._store.load(image)):
                    await self._store.put_into_archive(image)
        except StoreError as error:
            raise RuntimeFailure("archive", str(error), alive=True) from error

    async def archive_image(self, handle: Handle) -> None:
        """See `Runtime.archive_image`."""
        await self.copy_to_archive(handle)
        await self._store.remove(self._image(handle))

    async def _is_archived(self, manifest: Manifest) -> bool:
        """Whether the archive holds this very image, as far as its head says."""
        if manifest.image not in self._store.archived():
            return False
        try:
            return (await self._store.archived_manifest(manifest.image)).sha256_by_file == manifest.sha256_by_file
        except StoreError as error:
            log.warning("archive %s cannot be used, and is written anew: %s", manifest.image, error)
            return False

    async def unarchive_image(self, handle: Handle) -> None:
        """See `Runtime.unarchive_image`."""
        try:
            await self._store.take_from_archive(self._image(handle))
        except StoreError as error:
            raise RuntimeFailure("unarchive", str(error)) from error

    @abc.abstractmethod
    def rungs(self) -> Rungs:
        """See `Runtime.rungs`."""

    async def images_for(self, models: Mapping[str, ModelSettings]) -> Mapping[str, ImageFacts]:
        """See `Runtime.images_for`."""
        if not self.shares_images or Tier.CHECKPOINTED not in self.rungs().offered:
            return {}
        return {key: facts for key, (_, facts) in (await self._usable_images(models)).items()}

    @abc.abstractmethod
    async def _facts_for(self, model: ModelSettings, manifest: Manifest) -> Mapping[str, str]:
        """What must be the same where this image of the model is restored."""

    @abc.abstractmethod
    async def _since_changed(self, model: ModelSettings, manifest: Manifest) -> Outdated | None:
        """In which way an engine that is started now would be another one than that of an image that can be used."""

    @abc.abstractmethod
    def _digest(self, key: str, model: ModelSettings) -> str:
        """Of everything that shapes the model's engine."""

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        """See `Runtime.refusal`."""
        model = models.get(manifest.model)
        if model is None:
            return f"there is no model {manifest.model!r} any more"
        if manifest.spec_digest != self._digest(manifest.model, model):
            return f"models.{manifest.model} has changed since"
        return "; ".join(manifest.differences(await self._facts_for(model, manifest))) or None

    async def outdated(self, models: Mapping[str, ModelSettings]) -> Mapping[str, Outdated]:
        """See `Runtime.outdated`."""
        found: dict[str, Outdated] = {}
        if Tier.CHECKPOINTED not in self.rungs().offered:
            return found
        for image in sorted({*self._store.names(), *self._store.archived()}):
            try:
                manifest = await self._manifest(image)
            except StoreError:
                continue  # who uses it will say so
            model = models.get(manifest.model)
            if model is None or manifest.runtime != self.name or self._store.refuses(image):
                continue
            reason = await self.refusal(manifest, models)
            outdated = Outdated(reason, usable=False) if reason else await self._since_changed(model, manifest)
            if outdated is not None:
                found[manifest.model] = outdated
                if not outdated.usable:
                    self._store.refuse(image)
        return found

    async def footprint(self, key: str) -> Footprint | None:
        """See `Runtime.footprint`."""
        for image in self._store.names():
            with contextlib.suppress(StoreError):
                manifest = self._store.load(image)
                if manifest.model == key:
                    engine = sum((manifest.details.get("memory") or {}).values())
                    size = manifest.total_bytes() + self._store.weights_bytes(image)
                    return Footprint(engine, size, self._store.free_bytes())
        return None

    async def _manifest(self, image: str) -> Manifest:
        """That of an image on tmpfs, or in the archive. Raises StoreError."""
        if image in self._store.names():
            return self._store.load(image)
        return await self._store.archived_manifest(image)

    async def _usable_images(self, models: Mapping[str, ModelSettings]) -> dict[str, tuple[Manifest, ImageFacts]]:
        """The images of these models that fit this host, on tmpfs or archived; others are refused, with a reason."""
        usable: dict[str, tuple[Manifest, ImageFacts]] = {}
        for archived, names in ((False, self._store.names()), (True, self._store.archived())):
            for image in names:
                if image in usable:
                    continue
                try:
                    manifest = await self._store.archived_manifest(image) if archived else self._store.load(image)
                except OtherVersionError as error:
                    log.warning("%s %s is refused: %s", "archive" if archived else "checkpoint", image, error)
                    if not archived:
                        self._store.refuse(image)
                    continue
                except StoreError as error:
                    log.error("%s %s is damaged: %s", "archive" if archived else "checkpoint", image, error)
                    if not archived:
                        await asyncio.to_thread(self._store.quarantine, image)
                    continue
                if manifest.runtime != self.name:
                    continue
                reason = await self.refusal(manifest, models)
                if reason is not None:
                    log.warning("%s %s is refused: %s", "archive" if archived else "checkpoint", image, reason)
                    if not archived:
                        self._store.refuse(image)
                    continue
                self._store.accept(image)
                facts = ImageFacts(manifest.sleep_level, manifest.canary, manifest.details, archived)
                usable[image] = manifest, facts
        return usable
