"""The images of a runtime's engines: where they are, whether they are whole, and whether they fit this host."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proxy.checkpoint.errors import DamagedError, OtherVersionError, StoreError
from proxy.checkpoint.inputs import Reader
from proxy.checkpoint.manifest import Inputs
from proxy.engine import kinds
from proxy.errors import Fault, RuntimeFailure
from proxy.host import cpu
from proxy.runtime.base import Footprint, ImageFacts, Outdated, Tiers
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from proxy.checkpoint.inputs import Edited
    from proxy.checkpoint.manifest import Manifest
    from proxy.checkpoint.store import CheckpointStore
    from proxy.config.model import ModelSettings
    from proxy.runtime.base import EngineProcess

log = logging.getLogger("warmpool.runtime")

CONTAINER_IMAGE: Final = "container image"
"""The fact of a manifest: the id of the container image that the engine was started from."""
_DROPS_WEIGHTS: Final = 2
"""The sleep level."""


@dataclass(slots=True)
class Origin:
    """What an engine was started from, beside its configuration."""

    started_unix_s: float = field(default_factory=time.time)
    image_id: str = ""
    """Of the container image that its container was made from, whatever the image's name means by now."""
    extension: str | None = None
    """The digest of the code of ours that is in it, which may come from an earlier version."""
    inputs: Inputs | None = None
    """What it has read; None before that was looked at."""


@dataclass(frozen=True, slots=True)
class Running:
    """An engine that runs."""

    instance_id: str
    key: str
    spec_digest: str
    origin: Origin


def failure(operation: str, error: Exception, *, alive: bool = False) -> RuntimeFailure:
    """A failure of the store's or of the kernel's, with what it says of the image."""
    fault = Fault.DAMAGE if isinstance(error, DamagedError) else Fault.HOST
    return RuntimeFailure(operation, str(error), alive=alive, fault=fault)


class ImageStore(abc.ABC):
    """See `proxy.runtime.base.Images`. A runtime adds how it tells whether an image fits.

    `shared`: an image is a model's, named by its key; else an instance's, named by its id.
    """

    def __init__(self, store: CheckpointStore, runtime: str, *, shared: bool) -> None:
        self.store = store
        self.shared = shared
        self.tiers = Tiers(frozenset())
        """What the host offers, as of `open`."""
        self.runtime = runtime
        """Its name."""
        self._reader = Reader()

    @property
    def usable(self) -> bool:
        """Whether this host can checkpoint."""
        return Tier.CHECKPOINTED in self.tiers.offered

    def open(self, reason: str | None) -> None:
        """Open the store if this host can checkpoint (`reason` None: it can), and find the tiers that there are."""
        if reason is None:
            try:
                self.store.open()
            except StoreError as error:
                reason = str(error)
        offered = {Tier.SLEEPING, Tier.SUSPENDED}
        if reason is not None:
            self.tiers = Tiers(frozenset(offered), {Tier.CHECKPOINTED: reason})
            return
        self.store.sweep()
        archived = {Tier.ARCHIVED} if self.store.archive is not None else set()
        refused = self.store.archive_refused
        self.tiers = Tiers(
            frozenset({*offered, Tier.CHECKPOINTED, *archived}),
            {Tier.ARCHIVED: refused} if refused is not None else {},
        )

    @abc.abstractmethod
    async def _facts_for(self, model: ModelSettings, manifest: Manifest) -> Mapping[str, str]:
        """What must be the same where this image of the model is restored."""

    @abc.abstractmethod
    def _digest(self, key: str, model: ModelSettings) -> str:
        """Of everything that shapes the model's engine."""

    async def _moved(self, model: ModelSettings, image_id: str) -> str | None:  # noqa: ARG002 - others need it
        """In which way an engine that is started now would have another container image than this."""
        return None

    async def discard(self, engine: EngineProcess) -> None:
        """See `Images.discard`."""
        await self.store.remove(engine.image)
        await self.store.remove_archive(engine.image)

    async def verify(self, engine: EngineProcess, *, whole: bool) -> None:
        """See `Images.verify`."""
        image = engine.image
        try:
            if whole:
                await self.store.verify(image)
            else:
                await asyncio.to_thread(self.store.load, image)
        except (StoreError, OSError) as error:
            raise failure("verify", error, alive=True) from error

    async def quarantine(self, engine: EngineProcess, *, keep_copy: bool = False) -> bool:
        """See `Images.quarantine`."""
        image = engine.image
        kept = keep_copy and await self._has_copy(image)
        await asyncio.to_thread(self.store.quarantine, image)
        if not kept:
            await self.store.remove_archive(image)
        return kept

    async def _has_copy(self, image: str) -> bool:
        """Whether the archive holds what an image, some file of which may be damaged, should be."""
        try:
            return await self._is_archived(self.store.manifest(image))
        except StoreError:
            return False

    async def copy_to_archive(self, engine: EngineProcess) -> None:
        """See `Images.copy_to_archive`."""
        image = engine.image
        try:
            async with self.store.archiving:
                if not await self._is_archived(self.store.load(image)):
                    await self.store.put_into_archive(image)
        except StoreError as error:
            raise failure("archive", error, alive=True) from error

    async def archive(self, engine: EngineProcess) -> None:
        """See `Images.archive`."""
        await self.copy_to_archive(engine)
        await self.store.remove(engine.image)

    async def _is_archived(self, manifest: Manifest) -> bool:
        """Whether the archive holds this very image, as far as its head says."""
        if manifest.image not in self.store.archived():
            return False
        try:
            return (await self.store.archived_manifest(manifest.image)).sha256_by_file == manifest.sha256_by_file
        except StoreError as error:
            log.warning("archive %s cannot be used, and is written anew: %s", manifest.image, error)
            return False

    async def unarchive(self, engine: EngineProcess) -> None:
        """See `Images.unarchive`."""
        try:
            await self.store.take_from_archive(engine.image)
        except StoreError as error:
            raise failure("unarchive", error) from error

    async def fitting(self, models: Mapping[str, ModelSettings]) -> Mapping[str, ImageFacts]:
        """See `Images.fitting`."""
        if not self.shared or not self.usable:
            return {}
        return {key: facts for key, (_, facts) in (await self.usable_images(models)).items()}

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        """See `Images.refusal`."""
        model = models.get(manifest.model)
        if model is None:
            return f"there is no model {manifest.model!r} any more"
        if manifest.spec_digest != self._digest(manifest.model, model):
            return f"models.{manifest.model} has changed since"
        return "; ".join(manifest.differences(await self._facts_for(model, manifest), cpu.here())) or (
            await self._weights_edited(manifest)
        )

    async def _weights_edited(self, manifest: Manifest) -> str | None:
        """Whether an engine that dropped its weights would wake up with others."""
        edited = await self._edited(_origin_of(manifest)) if manifest.sleep_level == _DROPS_WEIGHTS else None
        return edited.reason if edited is not None and edited.weights else None

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None, running: Sequence[Running]
    ) -> Mapping[str, Outdated]:
        """See `Runtime.outdated`; `running`: the engines that run and whose origin is known."""
        found = await self._outdated_images(models, instances)
        for engine in running:
            key = engine.key
            model = models.get(key) if instances is None or engine.instance_id in instances else None
            if model is not None and key not in found and engine.spec_digest == self._digest(key, model):
                await self.learn(engine.origin, model)
                if (outdated := await self._since(model, engine.origin, reloads=True)) is not None:
                    found[key] = outdated
        return found

    async def _since(self, model: ModelSettings, origin: Origin, *, reloads: bool) -> Outdated | None:
        """In which way an engine that is started now would be another one; `reloads`: it may load its weights again."""
        edited = await self._edited(origin)
        if edited is not None:
            return Outdated(edited.reason, usable=not (edited.weights and reloads))
        reason = await self._moved(model, origin.image_id) or kinds.upgraded(model, origin.extension)
        return None if reason is None else Outdated(reason)

    async def learn(self, origin: Origin, model: ModelSettings) -> Inputs:
        """What an engine has read, by the first look since its start."""
        if origin.inputs is None:
            try:
                origin.inputs = await self._reader.note(model, origin.started_unix_s)
            except OSError as error:  # TimeoutError is one
                log.warning("edits of files are not seen: %s", str(error) or "they could not be read in time")
                return Inputs()
        return origin.inputs

    async def _edited(self, origin: Origin) -> Edited | None:
        try:
            return await self._reader.edited(origin.inputs or Inputs())
        except OSError as error:  # TimeoutError is one
            log.warning("whether files were edited is not known: %s", str(error) or "they could not be read in time")
            return None

    async def _outdated_images(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None
    ) -> dict[str, Outdated]:
        found: dict[str, Outdated] = {}
        if not self.usable:
            return found
        for image in sorted({*self.store.names(), *self.store.archived()}):
            if not self.shared and instances is not None and image not in instances:
                continue
            try:
                manifest = await self.manifest(image)
            except StoreError:
                continue  # who uses it will say so
            model = models.get(manifest.model)
            if model is None or manifest.runtime != self.runtime or self.store.refuses(image):
                continue
            reason = await self.refusal(manifest, models)
            outdated = (
                Outdated(reason, usable=False)
                if reason
                else await self._since(model, _origin_of(manifest), reloads=False)
            )
            if outdated is not None:
                found[manifest.model] = outdated
                if not outdated.usable:
                    self.store.refuse(image)
        return found

    async def footprint(self, key: str) -> Footprint | None:
        """See `Images.footprint`."""
        for image in self.store.names():
            with contextlib.suppress(StoreError):
                manifest = self.store.load(image)
                if manifest.model == key:
                    engine = sum((manifest.details.get("memory") or {}).values())
                    size = manifest.total_bytes() + self.store.weights_bytes(image)
                    return Footprint(engine, size, self.store.free_bytes())
        for image in self.store.archived() if Tier.ARCHIVED in self.tiers.offered else ():
            with contextlib.suppress(StoreError):
                manifest = await self.store.archived_manifest(image)
                if manifest.model == key:
                    engine = sum((manifest.details.get("memory") or {}).values())
                    return Footprint(engine, manifest.total_bytes(), self.store.free_bytes())
        return None

    async def manifest(self, image: str) -> Manifest:
        """That of an image on tmpfs, or in the archive. Raises StoreError."""
        if image in self.store.names():
            return self.store.load(image)
        return await self.store.archived_manifest(image)

    def lost(self, models: Mapping[str, ModelSettings], usable: Iterable[str]) -> frozenset[str]:
        """See `Recovered.lost`."""

        def model_of(image: str) -> str:
            return image if self.shared else image.rpartition("-")[0]

        there = {model_of(image) for image in (*self.store.names(), *self.store.archived())}
        return frozenset(there & models.keys() - {model_of(image) for image in usable})

    async def usable_images(self, models: Mapping[str, ModelSettings]) -> dict[str, tuple[Manifest, ImageFacts]]:
        """The images of these models that fit this host, on tmpfs or archived; others are refused, with a reason."""
        usable: dict[str, tuple[Manifest, ImageFacts]] = {}
        for archived, names in ((False, self.store.names()), (True, self.store.archived())):
            for image in names:
                if image in usable:
                    continue
                try:
                    manifest = await self.store.archived_manifest(image) if archived else self.store.load(image)
                except OtherVersionError as error:
                    log.warning("%s %s is refused: %s", "archive" if archived else "checkpoint", image, error)
                    if not archived:
                        self.store.refuse(image)
                    continue
                except StoreError as error:
                    log.error("%s %s is damaged: %s", "archive" if archived else "checkpoint", image, error)
                    if not archived:
                        await asyncio.to_thread(self.store.quarantine, image)
                    continue
                if manifest.runtime != self.runtime:
                    continue
                reason = await self.refusal(manifest, models)
                if reason is not None:
                    log.warning("%s %s is refused: %s", "archive" if archived else "checkpoint", image, reason)
                    if not archived:
                        self.store.refuse(image)
                    continue
                self.store.accept(image)
                facts = ImageFacts(manifest.sleep_level, manifest.canary, manifest.details, archived)
                usable[image] = manifest, facts
        return usable


def _origin_of(manifest: Manifest) -> Origin:
    image_id = manifest.facts.get(CONTAINER_IMAGE, "")
    return Origin(manifest.created_unix_s, image_id, manifest.extension, manifest.inputs)
