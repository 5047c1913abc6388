"""What the pool asks of a runtime: the runtime itself, the engines that it gives, and their images.

One contract test suite (tests/runtime_contract.py) runs against every runtime, the fake one of the tests included.
An engine does one operation at a time - the state machine sees to that - and any number of engines do theirs.

An image belongs to one instance, or, where `shares_images`, to a model: then it is the golden checkpoint from which any
number of its instances are restored side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from proxy.checkpoint.manifest import Manifest
    from proxy.config.model import ModelSettings
    from proxy.host.facts import Memory
    from proxy.telemetry.stages import Stages
    from proxy.tiers import Tier


@dataclass(frozen=True, slots=True)
class Tiers:
    """The tiers a runtime offers between ready and stopped, and why it lacks the others."""

    offered: frozenset[Tier]
    missing: Mapping[Tier, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Vitals:
    """What an engine's processes show from outside."""

    cpu_s: Mapping[int, float]
    """Process → CPU time that it has used."""
    stopped: bool
    """All of them stand still: they got SIGSTOP, or the container is paused."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the pool wants to find again in a checkpoint beside the engine itself."""

    sleep_level: int
    canary: str | None
    details: Mapping[str, Any] = field(default_factory=dict)
    """Warm-up figures and the like, for people; and `gpu`, what the engine holds (`GpuAccounting.figures`)."""
    archived: bool = False
    """The image is in the archive, not on tmpfs."""


@dataclass(frozen=True, slots=True)
class Found:
    """An instance that an earlier process of warmpool left."""

    engine: EngineProcess
    tier: Tier
    """READY: it runs, and whether it serves has to be asked; CHECKPOINTED and ARCHIVED: as its image."""
    started_unix_s: float | None = None
    """When the engine that runs was started, if that is known."""
    restored: bool = False
    """The engine that runs came from its image."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an earlier process of warmpool left: instances, and images by their owner.

    The owner is the instance's id, or the model's key where images are shared.
    """

    instances: Sequence[Found] = ()
    images: Mapping[str, ImageFacts] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    """Models, by key, that have an image which cannot be used here any more, and no other."""


@dataclass(frozen=True, slots=True)
class Outdated:
    """An image or a running engine is not what its model's configuration resolves to now."""

    reason: str
    usable: bool = True
    """It may serve until there is a new one; else no image of it may be restored any more, and no engine of it may
    load its weights again."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one more engine and image would take, and what is there; in bytes of host memory and of tmpfs."""

    engine: int
    image: int
    free: int
    """What may be written to the folder of images."""


class EngineProcess(Protocol):
    """The engine of one instance: its processes while it runs, else what `Runtime.start` or `restore` brings up again.

    Failures are `RuntimeFailure`; its `alive` says whether the engine is as usable as before. Cancelling an operation
    leaves the engine in a state from which `remove` works.
    """

    @property
    def instance_id(self) -> str:
        """Of the instance."""

    @property
    def key(self) -> str:
        """Of its model."""

    @property
    def image(self) -> str:
        """The name of its image."""

    @property
    def host(self) -> str:
        """Empty while nothing runs and the address is not known."""

    @property
    def port(self) -> int:
        """Where it listens on `host`; both may be others after a restore."""

    @property
    def base_url(self) -> str:
        """``http://HOST:PORT``"""

    def fingerprint(self) -> str:
        """Of all that decides whether it comes back from a suspend: command, environment, container image, driver."""

    async def suspend(self) -> None:
        """Freeze the engine where it is."""

    async def resume(self) -> None:
        """Let a suspended engine go on."""

    async def checkpoint(self, facts: ImageFacts, stages: Stages) -> None:
        """Write the engine to its image and end its processes; from any live tier.

        A failure with `alive` leaves the engine as it was; one without leaves nothing running.
        """

    async def restore(self, stages: Stages, gpus: Mapping[str, str] | None = None) -> None:
        """Bring the engine back from its image, which is kept; it runs (not suspended) afterwards.

        `gpus`: UUIDs of GPUs that it was on when the image was made → of those it is to be on, of the same kind.
        """

    def promote(self) -> None:
        """Have the image of an engine that was started `beside` take the place of its model's.

        Of the other instances of the model none may be about to be restored, or to write an image. Where it has none
        yet, it will be written there.
        """

    async def kill(self) -> None:
        """End the engine's processes, whole and at once; the image, if there is one, stays."""

    async def remove(self) -> None:
        """End the processes politely, then by force, and delete records; the image too, unless it is shared.

        Repeatable.
        """

    async def wait_exit(self) -> str:
        """Return when the engine has ended, with a word on how (``"exit status 3"``, ``"signal 9"``)."""

    async def listens(self) -> bool:
        """Whether the engine that runs listens where it should; False while nobody does.

        Raises PortTakenError where another program does: nothing may be sent there.
        """

    async def vitals(self) -> Vitals:
        """What its processes do; for an engine that should be running. Raises RuntimeFailure."""

    async def host_bytes(self) -> int:
        """The host memory that the engine's processes hold, shared memory once; 0 where nothing runs. Never raises."""

    async def gpu_bytes(self) -> Mapping[str, int]:
        """UUID of a GPU → bytes of its memory that the engine's processes hold, wherever on the ladder it is.

        Empty where nothing runs, on the CPU, and where NVML cannot be asked; never raises.
        """

    async def log_tail(self) -> Sequence[str]:
        """The last lines that the engine wrote since it was started or restored (`LogTails.read`); never raises."""


class Images(Protocol):
    """The images of a runtime, each asked for by an engine that it belongs to. Failures are `RuntimeFailure`."""

    async def fitting(self, models: Mapping[str, ModelSettings]) -> Mapping[str, ImageFacts]:
        """The images that serve any instance of these models, all of the runtime's, by the model's key.

        Those that do not fit stay, until their space is needed.
        """

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        """Why an image of this runtime cannot be used with this configuration on this host; None when it can."""

    async def footprint(self, key: str) -> Footprint | None:
        """What an engine of the model and its image took when one was written last; None where that is not known."""

    async def verify(self, engine: EngineProcess, *, whole: bool) -> None:
        """Raise RuntimeFailure where the image on tmpfs is not what was written; its `fault` says whether that is sure.

        `whole`: by every digest, which reads all of it; else by the sizes of its files.
        """

    async def quarantine(self, engine: EngineProcess, *, keep_copy: bool = False) -> bool:
        """Set an image aside that failed to restore: it is kept for inspection and never used.

        Its copy in the archive is deleted, unless there is nothing against it (`keep_copy`); whether there is one then.
        """

    async def copy_to_archive(self, engine: EngineProcess) -> None:
        """Write a copy of the image to the archive, if it is not there; a failure leaves everything as it was."""

    async def archive(self, engine: EngineProcess) -> None:
        """Move the image from tmpfs to the archive; a failure leaves it on tmpfs."""

    async def unarchive(self, engine: EngineProcess) -> None:
        """Bring the image back from the archive, which keeps it."""

    async def discard(self, engine: EngineProcess) -> None:
        """Delete the image, on tmpfs and in the archive; running processes stay."""


class Runtime(Protocol):
    """Starts engines, and finds those that are there."""

    name: str
    shares_images: bool
    """An image serves all instances of its model, and `clone` makes further ones."""

    @property
    def leaves(self) -> bool:
        """Whether engines go on without warmpool, to be adopted by the next one."""

    @property
    def images(self) -> Images:
        """Those of its engines; valid after `open`."""

    async def open(self) -> None:
        """Find out what the host can do and clear away what a crashed predecessor left half-done."""

    async def close(self) -> None:
        """Let go of the host; engines were removed, killed or left before."""

    def tiers(self) -> Tiers:
        """What this host offers; valid after `open`."""

    def memory(self) -> Memory:
        """The host memory there is for engines, where they run; valid after `open`, and asked in any thread."""

    def strays(self) -> Sequence[str]:
        """What is there of other warmpools that have ended, a line each; as of `recover`."""

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        """What is left of these very models and can be used; everything else that is ours is deleted."""

    def engine(self, instance_id: str, key: str) -> EngineProcess:
        """The engine of an instance, also of one that was never started, or whose start was cut off: to be removed."""

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> EngineProcess:
        """Start an engine's processes from nothing. It is not healthy yet.

        `beside`: its image is written beside the one that the model's instances come from, until `promote`.
        """

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> EngineProcess:
        """Prepare a further engine that `restore` brings up from the model's image; nothing runs yet."""

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None = None
    ) -> Mapping[str, Outdated]:
        """Of these models, all of the runtime's, those with an image or an engine that is outdated, by their key.

        `instances`: those that count, where not all do; others are on their way out.
        """
