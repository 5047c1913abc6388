"""What the pool asks of a runtime.

One contract test suite (tests/runtime_contract.py) runs against every runtime, the fake one of the tests included.
A runtime does one operation at a time for an instance - the state machine sees to that - and any number for different
instances.

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
class Handle:
    """A runtime's grip on an instance, alive or checkpointed, and where its engine listens while it runs.

    Two handles of one instance are equal: the address may be another after a restore.
    """

    instance_id: str
    model: str
    """Its key."""
    host: str = field(compare=False)
    """Empty while nothing runs and the address is not known."""
    port: int = field(compare=False)
    image: str = field(default="", compare=False)
    """The name of its image, where that is to take the place of its model's; empty for the usual one."""

    @property
    def base_url(self) -> str:
        """``http://HOST:PORT``"""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


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

    handle: Handle
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


class Runtime(Protocol):
    """Starts, stops, suspends, checkpoints and restores engines.

    Failures are `RuntimeFailure`; its `alive` says whether the engine is as usable as before. Cancelling an operation
    leaves the instance in a state from which `remove` works.
    """

    name: str
    shares_images: bool
    """An image serves all instances of its model, and `clone` makes further ones."""

    async def open(self) -> None:
        """Find out what the host can do and clear away what a crashed predecessor left half-done."""

    async def close(self) -> None:
        """Let go of the host; instances were removed, dropped or left before."""

    def strays(self) -> Sequence[str]:
        """What is there of other warmpools that have ended, a line each; as of `recover`."""

    def memory(self) -> Memory:
        """The host memory there is for engines, where they run; valid after `open`, and asked in any thread."""

    def tiers(self) -> Tiers:
        """What this host offers; valid after `open`."""

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        """What is left of these very models and can be used; everything else that is ours is deleted."""

    async def images_for(self, models: Mapping[str, ModelSettings]) -> Mapping[str, ImageFacts]:
        """The images that serve any instance of these models, all of the runtime's, by the model's key.

        Those that do not fit stay, until their space is needed.
        """

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> Handle:
        """Start an engine's processes from nothing. It is not healthy yet.

        `beside`: its image is written beside the one that the model's instances come from, until `promote`.
        """

    def promote(self, handle: Handle) -> Handle:
        """Have the image of an instance that was started `beside` take the place of its model's.

        Of the other instances of the model none may be about to be restored, or to write an image. Where it has none
        yet, it will be written there.
        """

    async def footprint(self, key: str) -> Footprint | None:
        """What an engine of the model and its image took when one was written last; None where that is not known."""

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> Handle:
        """Prepare a further instance that `restore` brings up from the model's image; nothing runs yet."""

    async def wait_exit(self, handle: Handle) -> str:
        """Return when the engine has ended, with a word on how (``"exit status 3"``, ``"signal 9"``)."""

    async def host_bytes(self, handle: Handle) -> int:
        """The host memory that the engine's processes hold, shared memory once; 0 where nothing runs. Never raises."""

    async def vitals(self, handle: Handle) -> Vitals:
        """What its processes do; for an engine that should be running. Raises RuntimeFailure."""

    async def listens(self, handle: Handle) -> bool:
        """Whether the engine that runs listens where its handle says; False while nobody does.

        Raises PortTakenError where another program does: nothing may be sent there.
        """

    async def log_tail(self, handle: Handle) -> Sequence[str]:
        """The last lines that the engine wrote since it was started or restored (`LogTails.read`); never raises."""

    async def suspend(self, handle: Handle) -> None:
        """Freeze the engine where it is."""

    async def resume(self, handle: Handle) -> None:
        """Let a suspended engine go on."""

    async def gpu_bytes(self, handle: Handle) -> Mapping[str, int]:
        """UUID of a GPU → bytes of its memory that the engine's processes hold, wherever on the ladder it is.

        Empty where nothing runs, on the CPU, and where NVML cannot be asked; never raises.
        """

    async def checkpoint(self, handle: Handle, facts: ImageFacts, stages: Stages) -> None:
        """Write the engine to an image and end its processes; from any live tier.

        A failure with `alive` leaves the engine as it was; one without leaves nothing running.
        """

    async def restore(self, handle: Handle, stages: Stages) -> Handle:
        """Bring the engine back from its image, which is kept; it runs (not suspended) afterwards.

        The handle says where it listens now.
        """

    async def drop(self, handle: Handle) -> None:
        """End the engine's processes, whole and at once; the image, if there is one, stays."""

    def leave(self, handle: Handle) -> bool:
        """Whether the engine goes on without warmpool, to be adopted by the next one."""

    async def discard_image(self, handle: Handle) -> None:
        """Delete the image, on tmpfs and in the archive; running processes stay."""

    async def verify_image(self, handle: Handle, *, whole: bool) -> None:
        """Raise RuntimeFailure where the image on tmpfs is not what was written; its `fault` says whether that is sure.

        `whole`: by every digest, which reads all of it; else by the sizes of its files.
        """

    async def quarantine_image(self, handle: Handle, *, keep_copy: bool = False) -> bool:
        """Set an image aside that failed to restore: it is kept for inspection and never used.

        Its copy in the archive is deleted, unless there is nothing against it (`keep_copy`); whether there is one then.
        """

    async def copy_to_archive(self, handle: Handle) -> None:
        """Write a copy of the image to the archive, if it is not there; a failure leaves everything as it was."""

    async def archive_image(self, handle: Handle) -> None:
        """Move the image from tmpfs to the archive; a failure leaves it on tmpfs."""

    async def unarchive_image(self, handle: Handle) -> None:
        """Bring the image back from the archive, which keeps it."""

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        """Why an image of this runtime cannot be used with this configuration on this host; None when it can."""

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None = None
    ) -> Mapping[str, Outdated]:
        """Of these models, all of the runtime's, those with an image or an engine that is outdated, by their key.

        `instances`: those that count, where not all do; others are on their way out.
        """

    async def remove(self, handle: Handle) -> None:
        """End the processes politely, then by force, and delete records; the image too, unless it is shared.

        Repeatable.
        """
