"""What the pool asks of a runtime.

One contract test suite (tests/runtime_contract.py) runs against every runtime, the fake one of the tests included.
A runtime does one operation at a time for an instance - the state machine sees to that - and any number for different
instances.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.config import ModelSettings
    from proxy.instance import Stages, Tier


@dataclass(frozen=True, slots=True)
class Rungs:
    """The rungs a runtime offers between ready and stopped, and why it lacks the others."""

    offered: frozenset[Tier]
    missing: Mapping[Tier, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Handle:
    """A runtime's grip on an instance, alive or checkpointed: where its engine listens."""

    instance_id: str
    host: str
    port: int

    @property
    def base_url(self) -> str:
        """``http://HOST:PORT``"""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpointed instance that an earlier process of warmpool left, still restorable."""

    handle: Handle
    model: str
    sleep_level: int
    canary: str | None


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the pool wants to find again in a checkpoint beside the engine itself."""

    sleep_level: int
    canary: str | None


class Runtime(Protocol):
    """Starts, stops, suspends, checkpoints and restores engines.

    Failures are `RuntimeFailure`; its `alive` says whether the engine is as usable as before. Cancelling an operation
    leaves the instance in a state from which `remove` works.
    """

    name: str

    async def open(self) -> None:
        """Find out what the host can do and clear away what a crashed predecessor left running."""

    async def close(self) -> None:
        """Let go of the host; instances were removed or dropped before."""

    def rungs(self) -> Rungs:
        """What this host offers; valid after `open`."""

    async def recover(self, models: Mapping[str, ModelSettings]) -> Sequence[Found]:
        """Checkpoints of these very models that can be restored; others that are found are deleted."""

    async def start(self, instance_id: str, key: str, model: ModelSettings) -> Handle:
        """Start an engine's processes from nothing. It is not healthy yet.

        An instance that was started before keeps its address, so that its checkpoint stays restorable.
        """

    async def wait_exit(self, handle: Handle) -> str:
        """Return when the engine has ended, with a word on how (``"exit status 3"``, ``"signal 9"``)."""

    async def suspend(self, handle: Handle) -> None:
        """Freeze the engine where it is."""

    async def resume(self, handle: Handle) -> None:
        """Let a suspended engine go on."""

    async def checkpoint(self, handle: Handle, facts: ImageFacts, stages: Stages) -> None:
        """Write the engine to an image and end its processes; from any live rung.

        A failure with `alive` leaves the engine as it was; one without leaves nothing running.
        """

    async def restore(self, handle: Handle, stages: Stages) -> None:
        """Bring the engine back from its image, which is kept; it runs (not suspended) afterwards."""

    async def drop(self, handle: Handle) -> None:
        """End the engine's processes, whole and at once; the image, if there is one, stays."""

    async def discard_image(self, handle: Handle) -> None:
        """Delete the image; running processes stay."""

    async def remove(self, handle: Handle) -> None:
        """End the processes politely, then by force, and delete image and records. Repeatable."""
