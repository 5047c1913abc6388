"""The engine of one instance on this host: what is the same whatever runs it, and in which order things are done."""

from __future__ import annotations

import abc
import asyncio
import enum
import hashlib
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from proxy.checkpoint.errors import StoreError
from proxy.checkpoint.manifest import Manifest
from proxy.checkpoint.store import next_to
from proxy.errors import HostError, RuntimeFailure
from proxy.gpu.placement import ImageGpu
from proxy.host import processes
from proxy.runtime.image_store import Origin, Running

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from proxy.config.model import ModelSettings
    from proxy.runtime.base import ImageFacts
    from proxy.runtime.cuda import Cuda
    from proxy.runtime.image_store import ImageStore
    from proxy.runtime.log_tail import LogTails
    from proxy.telemetry.stages import Stages


class Activity(enum.Enum):
    """What the processes of an engine do."""

    NOTHING = enum.auto()
    """There are none."""
    RUNNING = enum.auto()
    FROZEN = enum.auto()
    """They stand still."""
    OFF_GPU = enum.auto()
    """Their CUDA state is in host memory."""
    INTERRUPTED = enum.auto()
    """A dump or restore was given up half-way, and its helpers may still run."""


@dataclass(slots=True)
class Record:
    """What is known of an engine that was started or found."""

    model: ModelSettings
    spec_digest: str
    host: str = ""
    port: int = 0
    origin: Origin = field(default_factory=Origin)
    pid: int | None = None
    """Of its first process; None while nothing runs."""
    activity: Activity = Activity.NOTHING
    gpus: Sequence[ImageGpu] = ()
    """Those of the host, when it was last on one."""


@dataclass(frozen=True, slots=True)
class Noted:
    """What a manifest says that only the runtime knows."""

    facts: Mapping[str, str]
    private: Mapping[str, Any]
    leave_out_zeros: bool = True


R = TypeVar("R", bound=Record)


class LocalEngine(abc.ABC, Generic[R]):
    """See `proxy.runtime.base.EngineProcess`. A runtime adds how processes are frozen, dumped, restored and ended."""

    def __init__(self, instance_id: str, key: str, *, images: ImageStore, cuda: Cuda, tails: LogTails) -> None:
        self.instance_id = instance_id
        self.key = key
        self.beside = False
        """Its image is written beside that of its model, until `promote`."""
        self.it: R | None = None
        """None where it was never started, or is forgotten."""
        self._images, self._cuda, self._tails = images, cuda, tails
        self._last = ("", 0)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.instance_id}>"

    @property
    def _image_name(self) -> str:
        """Of the image in its usual place."""
        return self.key if self._images.shared else self.instance_id

    @property
    def image(self) -> str:
        """See `EngineProcess.image`."""
        return next_to(self._image_name) if self.beside else self._image_name

    @property
    def host(self) -> str:
        """See `EngineProcess.host`."""
        return self.it.host if self.it is not None else self._last[0]

    @property
    def port(self) -> int:
        """See `EngineProcess.port`."""
        return self.it.port if self.it is not None else self._last[1]

    @property
    def base_url(self) -> str:
        """See `EngineProcess.base_url`."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def fingerprint(self) -> str:
        """See `EngineProcess.fingerprint`."""
        it = self.it
        parts = [] if it is None else [it.spec_digest, it.origin.image_id, self._cuda.driver_version]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def forget(self) -> None:
        """Nothing is known of it any more, but where it was."""
        self._last, self.it = (self.host, self.port), None

    def running(self, operation: str) -> R:
        """What is known of an engine that runs. Raises RuntimeFailure."""
        if self.it is None or self.it.pid is None or not processes.alive(self.it.pid):
            raise RuntimeFailure(operation, "the engine is not running")
        return self.it

    def as_running(self) -> Running | None:
        """What it was started from; None where nothing runs."""
        it = self.it
        return None if it is None or it.pid is None else Running(self.instance_id, self.key, it.spec_digest, it.origin)

    @abc.abstractmethod
    def tree(self) -> list[int]:
        """Its processes; none where nothing runs."""

    # --- looking at it ---

    async def host_bytes(self) -> int:
        """See `EngineProcess.host_bytes`."""
        if self.it is None or self.it.pid is None:
            return 0
        return await asyncio.to_thread(lambda: processes.held_bytes(self.tree()))

    async def gpu_bytes(self) -> Mapping[str, int]:
        """See `EngineProcess.gpu_bytes`."""
        if self.it is None or self.it.pid is None:
            return {}
        return await self._cuda.held_by_gpu(self.tree)

    async def log_tail(self) -> Sequence[str]:
        """See `EngineProcess.log_tail`."""
        return await self._tails.read(self.instance_id)

    # --- suspended ---

    @abc.abstractmethod
    async def _freeze(self, it: R) -> None:
        """Make its processes stand still."""

    @abc.abstractmethod
    async def _thaw(self, it: R) -> None:
        """Let them go on."""

    async def suspend(self) -> None:
        """See `EngineProcess.suspend`: off the GPU, or where it uses none, its processes stand still."""
        it = self.running("suspend")
        await self._note_gpus(it)
        if await self._cuda.suspend("suspend", self.tree()):
            it.activity = Activity.OFF_GPU
            return
        await self._freeze(it)
        it.activity = Activity.FROZEN

    async def resume(self) -> None:
        """See `EngineProcess.resume`."""
        it = self.running("resume")
        if it.activity is Activity.OFF_GPU:
            await self._cuda.resume("resume", self.tree())
        else:
            await self._thaw(it)
        it.activity = Activity.RUNNING

    # --- checkpointed ---

    @abc.abstractmethod
    async def _note(self, it: R, pids: Sequence[int]) -> Noted:
        """What is to be known of its image, and see that a dump is possible. Raises HostError, StoreError, OSError."""

    def _shared_bytes(self, it: R) -> int:  # noqa: ARG002 - others need it
        """Files in its memory, which a dump writes too."""
        return 0

    @abc.abstractmethod
    async def _dump(self, it: R, folder: Path, expected_bytes: int, stages: Stages) -> Mapping[str, Any]:
        """CRIU's files into a folder of the store; nothing runs afterwards. Details for the manifest."""

    @abc.abstractmethod
    async def _collect(self, it: R, folder: Path, stages: Stages) -> None:
        """What belongs to it beside CRIU's files. Raises OSError."""

    async def _bring_back(self, it: R) -> bool:  # noqa: ARG002 - others need it
        """Whether the engine, which was dumped whole but to no image, runs again."""
        return False

    async def checkpoint(self, facts: ImageFacts, stages: Stages) -> None:
        """See `EngineProcess.checkpoint`."""
        it, store = self.running("checkpoint"), self._images.store
        was = it.activity
        try:
            pids = await asyncio.to_thread(self.tree)
            resident = await asyncio.to_thread(processes.resident_bytes, pids)
            expected = resident + self._shared_bytes(it) + await self._cuda.held_bytes(pids)
            memory = await asyncio.to_thread(processes.memory_by_kind, pids)
            folder = await asyncio.to_thread(store.begin, self.image, expected)
            inputs = await self._images.learn(it.origin, it.model)
            noted = await self._note(it, pids)
            await self._note_gpus(it)
        except (HostError, StoreError, OSError) as error:
            raise RuntimeFailure("checkpoint", str(error), alive=True) from error
        try:
            if was is Activity.FROZEN:
                await self.resume()
            with stages.measure("cuda"):
                off_gpu = await self._cuda.before_dump(self.tree(), off_gpu=was is Activity.OFF_GPU)
            it.activity = Activity.OFF_GPU if off_gpu else Activity.RUNNING
            if off_gpu and was is not Activity.OFF_GPU:
                grown = await asyncio.to_thread(processes.resident_bytes, pids) - resident
                memory[processes.GPU_STATE] = max(0, grown)
            details = await self._dump(it, folder, expected, stages)
            try:
                await self._collect(it, folder, stages)
                with stages.measure("digest"):
                    await store.commit(
                        Manifest(
                            image=self._image_name,
                            model=self.key,
                            runtime=self._images.runtime,
                            spec_digest=it.spec_digest,
                            extension=it.origin.extension,
                            created_unix_s=time.time(),
                            facts=noted.facts,
                            inputs=inputs,
                            sleep_level=facts.sleep_level,
                            canary=facts.canary,
                            private={"cuda": off_gpu, **_as_noted(it.gpus), **noted.private},
                            details={
                                **facts.details, **details, "memory": memory, "stages_s": dict(stages.seconds)
                            },
                        ),
                        beside=self.beside,
                        leave_out_zeros=noted.leave_out_zeros,
                    )  # fmt: skip
            except (OSError, StoreError) as error:
                alive = await self._bring_back(it)
                if alive:
                    it.activity = Activity.OFF_GPU if off_gpu else Activity.RUNNING
                raise RuntimeFailure("checkpoint", f"{store.root}: {error}", alive=alive) from error
        except BaseException as error:
            store.abandon(self.image)
            if isinstance(error, RuntimeFailure) and error.alive:
                await self._put_back(it, was)
            if isinstance(error, OSError):
                raise RuntimeFailure("checkpoint", f"{store.root}: {error}") from error
            raise

    async def _put_back(self, it: R, was: Activity) -> None:
        """Make an engine that could not be dumped what it was before."""
        if was is Activity.FROZEN:
            await self.suspend()
        elif it.activity is Activity.OFF_GPU and was is not Activity.OFF_GPU:
            await self.resume()

    async def _note_gpus(self, it: R) -> None:
        """Which GPUs it uses, while it is on them."""
        if it.activity is not Activity.OFF_GPU and (gpus := await self._cuda.gpus_of(self.tree())):
            it.gpus = gpus

    async def _back_on_gpu(self, it: R, manifest: Manifest, stages: Stages, gpus: Mapping[str, str] | None) -> None:
        """The CUDA part of a restore, for processes that CRIU has just restored; see `EngineProcess.restore`."""
        it.gpus = ()
        if it.activity is Activity.OFF_GPU:
            made_on = [ImageGpu(**gpu) for gpu in manifest.private.get("gpus", ())]
            with stages.measure("cuda"):
                await self._cuda.resume("restore", self.tree(), await self._cuda.moves(made_on, gpus or {}))
            it.activity = Activity.RUNNING


def _as_noted(gpus: Sequence[ImageGpu]) -> dict[str, Any]:
    """For a manifest."""
    return {"gpus": [asdict(gpu) for gpu in gpus]} if gpus else {}
