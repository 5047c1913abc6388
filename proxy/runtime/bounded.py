"""A runtime whose every operation has a time limit, whatever the one behind it does.

What takes an instance up or down has its limit from the pool, which knows the model's; what ends one, and what is asked
of the runtime as a whole, has one here. As long as an operation hangs nothing else is begun with its instance.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, TypeVar

from proxy.errors import HostError, OverdueError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Coroutine, Mapping, Sequence

    from proxy.checkpoint.manifest import Manifest
    from proxy.config.model import ModelSettings
    from proxy.host.facts import Memory
    from proxy.runtime.base import Footprint, Handle, ImageFacts, Outdated, Recovered, Runtime, Tiers, Vitals
    from proxy.telemetry.overdue import Overdue
    from proxy.telemetry.stages import Stages

T = TypeVar("T")

_OPEN_S: Final = 60.0
_RECOVER_S: Final = 300.0
"""With many containers and images there is much to look at, on a disk that may be slow."""
_CLOSE_S: Final = 5.0
_END_S: Final = 30.0
"""Killing an engine, beside what it is given to end by itself."""
_IMAGE_S: Final = 60.0
"""Deleting or moving aside an image of many GiB."""
_ARCHIVE_S: Final = 3600.0
_ASK_S: Final = 10.0


class Bounded:
    """See `proxy.runtime.base.Runtime` for what each method promises; here it raises OverdueError besides.

    `stop_grace_s`: how long an engine may take to end by itself.
    """

    def __init__(self, runtime: Runtime, overdue: Overdue, stop_grace_s: float) -> None:
        self._runtime = runtime
        self._overdue = overdue
        self._stop_grace_s = stop_grace_s
        self.name = runtime.name
        self.shares_images = runtime.shares_images

    async def _on(
        self,
        handle_or_id: Handle | str,
        operation: str,
        limit_s: float | None,
        begin: Callable[[], Coroutine[Any, Any, T]],
    ) -> T:
        """An operation on one instance."""
        instance_id = handle_or_id if isinstance(handle_or_id, str) else handle_or_id.instance_id
        for hanging in self._overdue.hanging(instance_id):
            raise OverdueError(operation, f"{hanging.operation} of {instance_id} hangs", hangs=True)
        return await self._overdue.within(limit_s, operation, instance_id, begin())

    async def _look(self, handle: Handle, operation: str, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A question beside whatever else is done with the instance, in whose way it is not."""
        return await self._on(f"{handle.instance_id}, asked", operation, _ASK_S, begin)

    # --- the runtime as a whole ---

    async def open(self) -> None:
        try:
            await self._overdue.within(_OPEN_S, "open", self.name, self._runtime.open())
        except OverdueError as error:
            raise HostError(f"the runtime {self.name} cannot be opened: {error}") from error

    async def close(self) -> None:
        await self._overdue.within(_CLOSE_S, "close", self.name, self._runtime.close())

    def strays(self) -> Sequence[str]:
        return self._runtime.strays()

    def memory(self) -> Memory:
        return self._runtime.memory()

    def tiers(self) -> Tiers:
        return self._runtime.tiers()

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        try:
            return await self._overdue.within(_RECOVER_S, "recover", self.name, self._runtime.recover(models))
        except OverdueError as error:
            raise HostError(
                f"what an earlier warmpool left cannot be looked at, runtime {self.name}: {error}"
            ) from error

    async def images_for(self, models: Mapping[str, ModelSettings]) -> Mapping[str, ImageFacts]:
        try:
            return await self._overdue.within(_IMAGE_S, "images_for", self.name, self._runtime.images_for(models))
        except OverdueError as error:
            raise HostError(f"the checkpoints of the runtime {self.name} cannot be looked at: {error}") from error

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        return await self._runtime.refusal(manifest, models)

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None = None
    ) -> Mapping[str, Outdated]:
        work = self._runtime.outdated(models, instances)
        return await self._overdue.within(_IMAGE_S, "outdated", self.name, work)

    async def footprint(self, key: str) -> Footprint | None:
        return await self._overdue.within(_ASK_S, "footprint", self.name, self._runtime.footprint(key))

    # --- one instance ---

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> Handle:
        return await self._on(
            instance_id, "start", None, lambda: self._runtime.start(instance_id, key, model, beside=beside)
        )

    def promote(self, handle: Handle) -> Handle:
        return self._runtime.promote(handle)

    async def vitals(self, handle: Handle) -> Vitals:
        return await self._look(handle, "vitals", lambda: self._runtime.vitals(handle))

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> Handle:
        return await self._on(instance_id, "clone", None, lambda: self._runtime.clone(instance_id, key, model))

    async def wait_exit(self, handle: Handle) -> str:
        return await self._runtime.wait_exit(handle)

    async def listens(self, handle: Handle) -> bool:
        return await self._look(handle, "listens", lambda: self._runtime.listens(handle))

    async def log_tail(self, handle: Handle) -> Sequence[str]:
        with contextlib.suppress(OverdueError):
            return await self._look(handle, "log_tail", lambda: self._runtime.log_tail(handle))
        return ()

    async def suspend(self, handle: Handle) -> None:
        await self._on(handle, "suspend", None, lambda: self._runtime.suspend(handle))

    async def resume(self, handle: Handle) -> None:
        await self._on(handle, "resume", None, lambda: self._runtime.resume(handle))

    async def gpu_bytes(self, handle: Handle) -> Mapping[str, int]:
        with contextlib.suppress(OverdueError):
            return await self._look(handle, "gpu_bytes", lambda: self._runtime.gpu_bytes(handle))
        return {}

    async def host_bytes(self, handle: Handle) -> int:
        with contextlib.suppress(OverdueError):
            return await self._look(handle, "host_bytes", lambda: self._runtime.host_bytes(handle))
        return 0

    async def checkpoint(self, handle: Handle, facts: ImageFacts, stages: Stages) -> None:
        await self._on(handle, "checkpoint", None, lambda: self._runtime.checkpoint(handle, facts, stages))

    async def restore(self, handle: Handle, stages: Stages) -> Handle:
        return await self._on(handle, "restore", None, lambda: self._runtime.restore(handle, stages))

    async def drop(self, handle: Handle) -> None:
        await self._on(handle, "drop", _END_S, lambda: self._runtime.drop(handle))

    def leave(self, handle: Handle) -> bool:
        return self._runtime.leave(handle)

    async def discard_image(self, handle: Handle) -> None:
        await self._on(handle, "discard_image", _IMAGE_S, lambda: self._runtime.discard_image(handle))

    async def quarantine_image(self, handle: Handle, *, keep_copy: bool = False) -> bool:
        return await self._on(
            handle, "quarantine_image", _IMAGE_S, lambda: self._runtime.quarantine_image(handle, keep_copy=keep_copy)
        )

    async def verify_image(self, handle: Handle, *, whole: bool) -> None:
        # Beside whatever else is done with the instance, as below.
        subject, work = f"the checkpoint of {handle.model}", self._runtime.verify_image(handle, whole=whole)
        await self._overdue.within(_ARCHIVE_S if whole else _ASK_S, "verify_image", subject, work)

    async def copy_to_archive(self, handle: Handle) -> None:
        # Beside whatever else is done with the instance, which an archive that hangs does not concern.
        subject, work = f"the checkpoint of {handle.model}", self._runtime.copy_to_archive(handle)
        await self._overdue.within(_ARCHIVE_S, "copy_to_archive", subject, work)

    async def archive_image(self, handle: Handle) -> None:
        await self._on(handle, "archive_image", _ARCHIVE_S, lambda: self._runtime.archive_image(handle))

    async def unarchive_image(self, handle: Handle) -> None:
        await self._on(handle, "unarchive_image", _ARCHIVE_S, lambda: self._runtime.unarchive_image(handle))

    async def remove(self, handle: Handle) -> None:
        await self._on(handle, "remove", self._stop_grace_s + _END_S, lambda: self._runtime.remove(handle))
