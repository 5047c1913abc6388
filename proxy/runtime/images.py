"""What every runtime that checkpoints to the store does with images, whoever they belong to."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from proxy.checkpoints import StoreError
from proxy.errors import RuntimeFailure
from proxy.runtime.base import ImageFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from proxy.checkpoints import CheckpointStore, Manifest
    from proxy.config import ModelSettings
    from proxy.runtime.base import Handle

log = logging.getLogger("warmpool.runtime")


class KeepsImages:
    """The image part of a runtime. `shares_images` says whose they are."""

    name: str
    shares_images: bool
    _store: CheckpointStore

    def _image(self, handle: Handle) -> str:
        return handle.model if self.shares_images else handle.instance_id

    async def discard_image(self, handle: Handle) -> None:
        """See `Runtime.discard_image`."""
        image = self._image(handle)
        await self._store.remove(image)
        if image in self._store.archived():
            self._store.archive_path(image).unlink(missing_ok=True)

    async def quarantine_image(self, handle: Handle) -> None:
        """See `Runtime.quarantine_image`."""
        image = self._image(handle)
        await asyncio.to_thread(self._store.quarantine, image)
        if image in self._store.archived():
            self._store.archive_path(image).unlink(missing_ok=True)

    async def archive_image(self, handle: Handle) -> None:
        """See `Runtime.archive_image`."""
        image = self._image(handle)
        try:
            if not await self._is_archived(self._store.load(image)):
                await self._store.put_into_archive(image)
        except StoreError as error:
            raise RuntimeFailure("archive", str(error), alive=True) from error
        await self._store.remove(image)

    async def _is_archived(self, manifest: Manifest) -> bool:
        """Whether the archive holds this very image."""
        if manifest.image not in self._store.archived():
            return False
        return (await self._store.archived_manifest(manifest.image)).sha256_by_file == manifest.sha256_by_file

    async def unarchive_image(self, handle: Handle) -> None:
        """See `Runtime.unarchive_image`."""
        try:
            await self._store.take_from_archive(self._image(handle))
        except StoreError as error:
            raise RuntimeFailure("unarchive", str(error)) from error

    async def _usable_images(
        self,
        models: Mapping[str, ModelSettings],
        facts: Mapping[str, Mapping[str, str]],
        digest: Callable[[str, ModelSettings], str],
    ) -> dict[str, tuple[Manifest, ImageFacts]]:
        """The images of these models that fit this host, on tmpfs or archived; others are refused, with a reason."""
        usable: dict[str, tuple[Manifest, ImageFacts]] = {}
        for archived, names in ((False, self._store.names()), (True, self._store.archived())):
            for image in names:
                if image in usable:
                    continue
                try:
                    manifest = await self._store.archived_manifest(image) if archived else self._store.load(image)
                except StoreError as error:
                    log.error("checkpoint %s is damaged: %s", image, error)
                    if not archived:
                        await asyncio.to_thread(self._store.quarantine, image)
                    continue
                if manifest.runtime != self.name:
                    continue
                reason = why_not(manifest, models, facts, digest)
                if reason is not None:
                    log.warning("%s %s is refused: %s", "archive" if archived else "checkpoint", image, reason)
                    if not archived:
                        self._store.refuse(image)
                    continue
                usable[image] = manifest, ImageFacts(manifest.sleep_level, manifest.canary, archived=archived)
        return usable


def why_not(
    manifest: Manifest,
    models: Mapping[str, ModelSettings],
    facts: Mapping[str, Mapping[str, str]],
    digest: Callable[[str, ModelSettings], str],
) -> str | None:
    """Why an image cannot be used with this configuration on this host; None when it can."""
    if manifest.model not in models:
        return f"there is no model {manifest.model!r} any more"
    if manifest.spec_digest != digest(manifest.model, models[manifest.model]):
        return f"models.{manifest.model} has changed since"
    return "; ".join(manifest.differences(facts[manifest.model])) or None
