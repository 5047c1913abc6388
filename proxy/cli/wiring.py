"""What the settings stand for: the store of checkpoints, and the runtimes. The only module that names concrete ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.checkpoint.store import CheckpointStore
from proxy.gpu.cuda import Gpus
from proxy.runtime.podman.runtime import PodmanRuntime
from proxy.runtime.process.runtime import ProcessRuntime
from proxy.runtime.state_dir import Claim

if TYPE_CHECKING:
    from proxy.config.runtime import RuntimeSettings
    from proxy.config.settings import Settings
    from proxy.runtime.base import Runtime


def store(settings: Settings) -> CheckpointStore:
    """Where its checkpoints are."""
    pool = settings.pool
    return CheckpointStore(pool.checkpoint_dir, pool.checkpoint_reserve, pool.archive_dir)


def runtimes(settings: Settings, gpus: Gpus | None = None) -> dict[str, Runtime]:
    """Every runtime, by name."""
    images, claim = store(settings), Claim(settings.pool.state_dir, log_size=settings.pool.engine_log_size)
    programs = [m.podman.criu.program for m in settings.models.values() if m.podman and m.podman.criu.program]
    gpus = gpus or Gpus()
    return {
        "process": ProcessRuntime(settings.runtime.process, claim=claim, store=images, gpus=gpus),
        "podman": PodmanRuntime(settings.runtime.podman, claim=claim, store=images, criu_programs=programs, gpus=gpus),
    }


def runtime(name: str, settings: RuntimeSettings, claim: Claim, images: CheckpointStore) -> Runtime:
    """One runtime, for a trial."""
    if name == "podman":
        return PodmanRuntime(settings.podman, claim=claim, store=images)
    return ProcessRuntime(settings.process, claim=claim, store=images)
