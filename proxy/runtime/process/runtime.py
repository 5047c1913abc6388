"""Engines as plain local process trees: no container, no root needed; checkpoints with CRIU where the host can."""

from __future__ import annotations

import asyncio
import platform
from typing import TYPE_CHECKING

from proxy.errors import HostError, RuntimeFailure
from proxy.host import facts as host
from proxy.host import processes
from proxy.runtime import criu, log_size, ports
from proxy.runtime.base import Found, Outdated, Recovered, Tiers
from proxy.runtime.cuda import Cuda
from proxy.runtime.image_store import ImageStore
from proxy.runtime.log_tail import LogTails
from proxy.runtime.process.engine import Parts, ProcessEngine, spec_digest
from proxy.runtime.process.orphan_reaper import OrphanReaper
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

    from proxy.checkpoint.manifest import Manifest
    from proxy.checkpoint.store import CheckpointStore
    from proxy.config.model import ModelSettings
    from proxy.config.runtime import ProcessRuntimeSettings
    from proxy.gpu.cuda import Gpus
    from proxy.runtime.state_dir import Claim


class ProcessImages(ImageStore):
    """The images of process trees: each is an instance's own."""

    facts: Mapping[str, str]

    def __init__(self, store: CheckpointStore, runtime: str) -> None:
        super().__init__(store, runtime, shared=False)
        self.facts = {}

    async def _facts_for(self, model: ModelSettings, manifest: Manifest) -> Mapping[str, str]:
        return self.facts

    def _digest(self, key: str, model: ModelSettings) -> str:
        return spec_digest(key, model)


class ProcessRuntime:
    """The runtime `process`. See `proxy.runtime.base.Runtime` for what each method promises."""

    name = "process"
    shares_images = False
    leaves = False
    """The orphan reaper ends processes with warmpool."""

    def __init__(
        self, settings: ProcessRuntimeSettings, *, claim: Claim, store: CheckpointStore, gpus: Gpus | None = None
    ) -> None:
        self.images = ProcessImages(store, self.name)
        self._parts = Parts(
            settings, claim, self.images, Cuda(gpus), LogTails(claim), ports.Ports(*settings.port_range()),
            OrphanReaper(), {},
        )  # fmt: skip
        self.engines = self._parts.engines
        self._cutter: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Claim the state folder, kill strays, find out about CRIU.

        Raises HostError when another warmpool uses the folder or it cannot be made.
        """
        parts, owner = self._parts, self._parts.claim.owner
        parts.claim.acquire()
        parts.cuda.open()
        processes.become_subreaper()
        await processes.kill_whole(f"{owner}:", None)
        try:
            parts.reaper.open(f"{owner}:")
        except OSError as error:
            raise HostError(f"the orphan reaper cannot be started: {error}") from error
        self._cutter = asyncio.create_task(log_size.keep_small(self._logs, parts.claim.log_size), name="engine logs")
        version, reason = await criu.why_not(parts.settings.criu)
        parts.facts = self.images.facts = {"kernel": platform.release(), "CRIU": version}
        self.images.open(reason)

    async def close(self) -> None:
        """Dismiss the orphan reaper and give up the claim."""
        if self._cutter is not None:
            self._cutter.cancel()
        await self._parts.reaper.close()
        self._parts.ports.close()
        self.images.store.close()
        self._parts.claim.release()

    def _logs(self) -> list[Path]:
        return [self._parts.claim.log_path(instance_id) for instance_id in self.engines]

    def tiers(self) -> Tiers:
        """What `open` found."""
        return self.images.tiers

    def memory(self) -> host.Memory:
        """See `Runtime.memory`: processes are in this one's cgroup."""
        return host.memory()

    def strays(self) -> Sequence[str]:
        """See `Runtime.strays`: none, the orphan reaper ends processes with their warmpool."""
        return ()

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        """See `Runtime.recover`."""
        if not self.images.usable:
            return Recovered()
        images = await self.images.usable_images(models)
        found = []
        for instance_id, (manifest, facts) in images.items():
            engine = self.engine(instance_id, manifest.model)
            engine.found(models[manifest.model], manifest.spec_digest, manifest.private["port"])
            found.append(Found(engine, Tier.ARCHIVED if facts.archived else Tier.CHECKPOINTED))
        facts_of = {instance_id: facts for instance_id, (_, facts) in images.items()}
        return Recovered(found, facts_of, self.images.lost(models, images))

    def engine(self, instance_id: str, key: str) -> ProcessEngine:
        """See `Runtime.engine`."""
        if instance_id not in self.engines:
            self.engines[instance_id] = ProcessEngine(instance_id, key, self._parts)
        return self.engines[instance_id]

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> ProcessEngine:
        """See `Runtime.start`."""
        engine = self.engine(instance_id, key)
        await engine.start(model)
        return engine

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> ProcessEngine:
        """See `Runtime.clone`: an image is restored with its own pids, so there is one instance of each."""
        raise RuntimeFailure("clone", "processes are restored with their own pids; use the podman runtime for clones")

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None = None
    ) -> Mapping[str, Outdated]:
        """See `Runtime.outdated`."""
        running = [running for e in self.engines.values() if (running := e.as_running()) is not None]
        return await self.images.outdated(models, instances, running)
