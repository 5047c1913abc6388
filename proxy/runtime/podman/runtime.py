"""Engines in podman containers, checkpointed by CRIU into the store and restored in place.

The container's own checkpoint folder is a symbolic link into the store on tmpfs, so that any number of containers of a
model restore from one golden checkpoint, each from the same pages, in its own network namespace. A container that is
not running is only a configuration: it costs nothing until it is restored. docs/architecture.md has the whole picture.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import HostError, RuntimeFailure
from proxy.host import facts as host
from proxy.host import processes
from proxy.runtime import ports
from proxy.runtime.base import Found, ImageFacts, Outdated, Recovered, Tiers
from proxy.runtime.cuda import Cuda
from proxy.runtime.engine import Activity
from proxy.runtime.image_store import CONTAINER_IMAGE
from proxy.runtime.log_tail import LogTails
from proxy.runtime.podman import abandoned, container, strays
from proxy.runtime.podman.api import PodmanError
from proxy.runtime.podman.containers import ContainerRecord, Containers
from proxy.runtime.podman.engine import Parts, PodmanEngine
from proxy.runtime.podman.host import PodmanHost, twice
from proxy.runtime.podman.images import PodmanImages
from proxy.runtime.podman.maker import Maker
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence
    from pathlib import Path

    import psutil

    from proxy.checkpoint.manifest import Manifest
    from proxy.checkpoint.store import CheckpointStore
    from proxy.config.model import ModelSettings
    from proxy.config.runtime import PodmanRuntimeSettings
    from proxy.gpu.cuda import Gpus
    from proxy.runtime.state_dir import Claim

log = logging.getLogger("warmpool.podman")

_CLOCK_S: Final = 2.0
"""How far the kernel's time of a process's start, which counts from the boot, may be off."""


class PodmanRuntime:
    """The runtime `podman`. See `proxy.runtime.base.Runtime` for what each method promises."""

    name = "podman"
    shares_images = True

    def __init__(
        self,
        settings: PodmanRuntimeSettings,
        *,
        claim: Claim,
        store: CheckpointStore,
        criu_programs: Iterable[Path] = (),
        gpus: Gpus | None = None,
    ) -> None:
        self._claim = claim
        self.engines: dict[str, PodmanEngine] = {}
        self.host = PodmanHost(settings, claim, criu_programs)
        self.images = PodmanImages(store, self.name, self.host, self.engines)
        containers, taken = Containers(self.host), ports.Ports(*settings.port_range())
        maker = Maker(self.host, self.images, containers, taken)
        self._parts = Parts(
            self.host, self.images, containers, maker, taken, Cuda(gpus), LogTails(claim), self.engines
        )  # fmt: skip
        self._strays = strays.Strays(self.host.containers, claim.owner)

    async def open(self) -> None:
        """Claim the state folder, reach podman, find out what it can do. Raises HostError."""
        self._claim.acquire()
        self._parts.cuda.open()
        try:
            reason = await self.host.open()
        except BaseException as error:
            await self.close()
            if isinstance(error, PodmanError):
                raise HostError(str(error)) from error
            raise
        self.images.open(reason)

    async def close(self) -> None:
        """Disconnect and give up the claim."""
        await self._strays.close()
        await self.host.close()
        self._parts.ports.close()
        self._parts.pid_namespaces.close()
        self.images.store.close()
        self._claim.release()

    @property
    def leaves(self) -> bool:
        """See `Runtime.leaves`."""
        return self.host.settings.on_exit == "keep"

    def tiers(self) -> Tiers:
        """What `open` found."""
        return self.images.tiers

    def memory(self) -> host.Memory:
        """See `Runtime.memory`: containers are in cgroups of podman's, beside this process's."""
        return host.memory(self.host.cgroup)

    def strays(self) -> Sequence[str]:
        """See `Runtime.strays`."""
        return self._strays.lines()

    # --- what an earlier warmpool left ---

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        """See `Runtime.recover`. Raises HostError when podman cannot be asked."""
        try:
            return await self._recover(models)
        except PodmanError as error:
            raise HostError(str(error)) from error

    async def _recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        images: dict[str, ImageFacts] = {}
        golden: dict[str, Manifest] = {}
        lost: frozenset[str] = frozenset()
        if self.images.usable:
            usable = await self.images.usable_images(models)
            images = {key: image for key, (_, image) in usable.items()}
            lost = self.images.lost(models, images)
            golden = {key: manifest for key, (manifest, _) in usable.items()}
        await self._strays.look()
        entries = await self.host.containers(self._claim.owner)
        helpers = await asyncio.to_thread(abandoned.helpers) if entries else []
        found = await asyncio.gather(*(self._recovered(entry, models, images, helpers) for entry in entries))
        kept = [one for one in found if one is not None and await self._is_kept(one, golden.get(one.engine.key))]
        return Recovered(kept, images, lost)

    async def _is_kept(self, one: Found, golden: Manifest | None) -> bool:
        """Whether a container that was found is of use; else it is removed.

        Where there is a golden checkpoint that can be used, those that come from it are: one that runs was on its way
        out when the last warmpool ended, or was being made ready to take over, if it did not.
        """
        engine = self.engines[one.engine.instance_id]
        it = engine.it
        assert it is not None  # noqa: S101 - it was found
        if golden is None or (
            it.origin.image_id == golden.facts.get(CONTAINER_IMAGE)
            and (one.tier is not Tier.READY or (one.restored and _is_later(it.pid, golden)))
        ):
            return True
        log.info("container %s does not come from the checkpoint that there is now: removed", it.name)
        await self._parts.containers.delete(it.id)
        self._parts.maker.let_go(it)
        del self.engines[engine.instance_id]
        return False

    async def _recovered(
        self,
        entry: Mapping[str, Any],
        models: Mapping[str, ModelSettings],
        images: Mapping[str, ImageFacts],
        helpers: Iterable[psutil.Process],
    ) -> Found | None:
        """An instance of the container if it can be used; else the container is removed."""
        interrupted = await asyncio.to_thread(abandoned.kill_helpers, entry["Id"], helpers)
        labels = {n.removeprefix(container.LABEL): v for n, v in (entry["Labels"] or {}).items()}
        key, instance_id = labels.get("model", ""), labels.get("instance", "")
        known = models.get(key)
        if known is None or labels.get("spec") != container.spec_digest(key, known):
            log.info("container %s is of another configuration: removed", entry["Names"][0])
            await self._parts.containers.delete(entry["Id"])
            return None
        it = ContainerRecord(known, labels["spec"], name=self._parts.maker.name(instance_id))
        it.origin.extension = labels.get("extension") or None
        state = await self._looked_at(it, interrupted=interrupted)
        started_unix_s = float(entry.get("StartedAt") or 0)
        tier = None
        if state in ("running", "paused"):
            tier = Tier.READY
            it.activity = Activity.RUNNING
            it.origin.started_unix_s = started_unix_s
        elif state in ("exited", "stopped") and key in images:
            it.pid = None
            tier = Tier.ARCHIVED if images[key].archived else Tier.CHECKPOINTED
        if tier is None:
            await self._parts.containers.delete(entry["Id"])
            return None
        engine = PodmanEngine(instance_id, key, self._parts)
        if it.pid is None:
            await self.images.reset_rootfs(it, engine.image)
        engine.it, self.engines[instance_id] = it, engine
        if it.on_host_network:
            self._parts.ports.hold(it.port)
        return Found(engine, tier, started_unix_s or None, it.restored)

    async def _looked_at(self, it: ContainerRecord, *, interrupted: bool) -> str:
        """The state of a container that was found; what stands still goes on."""
        containers, podman = self._parts.containers, self.host.podman
        try:
            state = await containers.inspect(it)
            if interrupted:
                # Half dumped or half restored: not to be trusted, but its image is whole if it is there.
                it.activity = Activity.INTERRUPTED
                await containers.stop(it)
                state = await containers.inspect(it)
            if state == "paused":
                await podman.post(f"/containers/{it.id}/unpause")
            if state in ("running", "paused") and self._parts.cuda.usable:
                await self._parts.cuda.resume("recover", it.tree())
        except (PodmanError, RuntimeFailure) as error:
            log.warning("container %s: %s", it.name, error)
            return "unknown"
        return state

    # --- engines ---

    def engine(self, instance_id: str, key: str) -> PodmanEngine:
        """See `Runtime.engine`."""
        if instance_id not in self.engines:
            self.engines[instance_id] = PodmanEngine(instance_id, key, self._parts)
        return self.engines[instance_id]

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> PodmanEngine:
        """Start a container from nothing; see `Runtime.start`."""
        engine = self.engine(instance_id, key)
        engine.beside = beside
        try:
            await twice(partial(engine.start, model))
        except PodmanError as error:
            raise RuntimeFailure("start", str(error)) from error
        return engine

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> PodmanEngine:
        """See `Runtime.clone`."""
        engine = self.engine(instance_id, key)
        await engine.clone(model)
        return engine

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None = None
    ) -> Mapping[str, Outdated]:
        """See `Runtime.outdated`."""
        engines = [e for e in self.engines.values() if not e.beside and e.it is not None]
        # Of one that was adopted after its restore, the image knows.
        told = [e for e in engines if e.it is not None and (e.it.origin.inputs is not None or not e.it.restored)]
        running = [running for engine in told if (running := engine.as_running()) is not None]
        try:
            return await self.images.outdated(models, instances, running)
        except PodmanError as error:
            raise RuntimeFailure("compare", str(error), alive=True) from error


def _is_later(pid: int | None, golden: Manifest) -> bool:
    """Whether a process was made after an image was written: for one that CRIU restored, that is its restore."""
    return pid is not None and processes.began_unix_s(pid) + _CLOCK_S >= golden.created_unix_s
