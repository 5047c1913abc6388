"""The podman runtime with load-test engines in real containers, for tests."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from loadtest import image
from proxy.checkpoint.store import CheckpointStore
from proxy.config.model import ModelSettings
from proxy.config.runtime import PodmanRuntimeSettings
from proxy.runtime.podman.runtime import PodmanRuntime
from proxy.runtime.state_dir import Claim
from tests.support import HttpBench, files_in, why_no_criu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from proxy.runtime.base import EngineProcess


def why_no_podman() -> str | None:
    """None where containers can be checkpointed, else the reason to skip."""
    if shutil.which("podman") is None:
        return "no podman in PATH (make host)"
    return why_no_criu()


@functools.cache
def engine_image() -> str:
    """The container image of the load-test engine, made once per session."""
    return image.build()


def podman(*arguments: str) -> str:
    """What a podman command prints."""
    done = subprocess.run(["podman", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


class Tag:
    """A name for two container images with the same engine, of which it means the first until it is moved."""

    def __init__(self, name: str) -> None:
        self.name = name
        container = podman("create", "--label", f"{name}=2", engine_image())
        self.ids = [
            podman("commit", "--quiet", "--change", f"LABEL {name}={version}", container, f"{name}:v{version}")
            for version in (1, 2)
        ]
        podman("rm", container)
        self.point_to(0)

    def point_to(self, number: int) -> None:
        podman("tag", self.ids[number], f"{self.name}:latest")

    def remove(self) -> None:
        podman("rmi", "--force", "--ignore", *(f"{self.name}:{version}" for version in ("latest", "v1", "v2")))


def moving_tag() -> Iterator[Tag]:
    """For a fixture."""
    tag = Tag(f"localhost/warmpool-test-{os.getpid()}")
    yield tag
    tag.remove()


def engine_table(*options: str, **podman_keys: Any) -> dict[str, Any]:
    """A model's `podman` table with a load-test engine that is up at once and writes files as it works."""
    return {
        "image": engine_image(),
        "command": [
            "--host", "{host}", "--port", "{port}", "--model", "{model}", "--memory", "8MiB", "--ttft", "0.001",
            "--tokens-per-second", "2000", "--sleep-mode", "--faults", "--scratch", "/root/scratch",
            "--scratch", "/dev/shm/scratch", *options,
        ],
        **podman_keys,
    }  # fmt: skip


def model_of(*options: str, **podman_keys: Any) -> ModelSettings:
    """The same as a whole model."""
    return ModelSettings(podman=engine_table(*options, **podman_keys), health={"interval": "20ms"}, max_instances=1)


class PodmanBench(HttpBench):
    """One runtime on folders of its own."""

    runtime: PodmanRuntime

    def __init__(
        self, folder: Path, images: Path, *, changed: bool = False, criu_programs: Sequence[Path] = (), **settings: Any
    ) -> None:
        self.folder, self.images = folder, images
        self.claim = Claim(folder / "state")
        self.store = CheckpointStore(images, 0, folder / "archive")
        self.runtime = PodmanRuntime(
            PodmanRuntimeSettings(**settings), claim=self.claim, store=self.store, criu_programs=criu_programs
        )
        self.model = model_of("--max-model-len", "2048" if changed else "4096")

    def container(self, engine: EngineProcess) -> str:
        return self.runtime._parts.maker.name(engine.instance_id)

    def pid_of(self, instance_id: str) -> int:
        """Of the first process of a container that runs."""
        it = self.runtime.engines[instance_id].it
        assert it is not None
        assert it.pid is not None
        return it.pid

    async def crash(self, engine: EngineProcess) -> None:
        pid = self.pid_of(engine.instance_id)
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            process.kill()

    def remains(self) -> list[str]:
        owned = f"label=io.warmpool.owner={self.claim.owner}"
        return [
            *podman("ps", "--all", "--quiet", "--filter", owned).split(),
            *(p.name for folder in (self.images, self.folder / "archive") for p in files_in(folder)),
        ]

    def another(self, *, changed: bool) -> PodmanBench:
        return PodmanBench(self.folder, self.images, changed=changed)

    async def clear(self) -> None:
        """End and forget everything."""
        last = self
        while last.heir is not None:
            last = last.heir
        for engine in list(last.runtime.engines.values()):
            await engine.remove()
            await last.runtime.images.discard(engine)
        await self.close()


def tmpfs_folder() -> Iterator[Path]:
    """A folder on tmpfs where there is one, deleted afterwards; for a fixture."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="warmpool-test-", dir=base))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
