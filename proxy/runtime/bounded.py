"""A runtime whose every operation has a time limit, whatever the one behind it does.

What takes an instance up or down has its limit from the pool, which knows the model's; what ends one, and what is asked
of the runtime as a whole, has one here. As long as an operation hangs nothing else is begun with its instance.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from proxy.errors import HostError, OverdueError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Coroutine, Mapping, Sequence

    from proxy.checkpoint.manifest import Manifest
    from proxy.config.model import ModelSettings
    from proxy.host.facts import Memory
    from proxy.runtime.base import EngineProcess, Footprint, ImageFacts, Outdated, Recovered, Runtime, Tiers, Vitals
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


async def _on(
    overdue: Overdue,
    instance_id: str,
    operation: str,
    limit_s: float | None,
    begin: Callable[[], Coroutine[Any, Any, T]],
) -> T:
    """An operation on one instance. Raises OverdueError."""
    for hanging in overdue.hanging(instance_id):
        raise OverdueError(operation, f"{hanging.operation} of {instance_id} hangs", hangs=True)
    return await overdue.within(limit_s, operation, instance_id, begin())


class BoundedEngine:
    """See `proxy.runtime.base.EngineProcess` for what each method promises; here it raises OverdueError besides."""

    def __init__(self, engine: EngineProcess, overdue: Overdue, stop_grace_s: float) -> None:
        self._engine = engine
        self._overdue = overdue
        self._stop_grace_s = stop_grace_s

    @property
    def instance_id(self) -> str:
        return self._engine.instance_id

    @property
    def key(self) -> str:
        return self._engine.key

    @property
    def image(self) -> str:
        return self._engine.image

    @property
    def host(self) -> str:
        return self._engine.host

    @property
    def port(self) -> int:
        return self._engine.port

    @property
    def base_url(self) -> str:
        return self._engine.base_url

    def fingerprint(self) -> str:
        return self._engine.fingerprint()

    async def _on(self, operation: str, limit_s: float | None, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await _on(self._overdue, self.instance_id, operation, limit_s, begin)

    async def _look(self, operation: str, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A question beside whatever else is done with the instance, in whose way it is not."""
        return await _on(self._overdue, f"{self.instance_id}, asked", operation, _ASK_S, begin)

    async def suspend(self) -> None:
        await self._on("suspend", None, self._engine.suspend)

    async def resume(self) -> None:
        await self._on("resume", None, self._engine.resume)

    async def checkpoint(self, facts: ImageFacts, stages: Stages) -> None:
        await self._on("checkpoint", None, lambda: self._engine.checkpoint(facts, stages))

    async def restore(self, stages: Stages, gpus: Mapping[str, str] | None = None) -> None:
        await self._on("restore", None, lambda: self._engine.restore(stages, gpus))

    def promote(self) -> None:
        self._engine.promote()

    async def kill(self) -> None:
        await self._on("kill", _END_S, self._engine.kill)

    async def remove(self) -> None:
        await self._on("remove", self._stop_grace_s + _END_S, self._engine.remove)

    async def wait_exit(self) -> str:
        return await self._engine.wait_exit()

    async def listens(self) -> bool:
        return await self._look("listens", self._engine.listens)

    async def vitals(self) -> Vitals:
        return await self._look("vitals", self._engine.vitals)

    async def host_bytes(self) -> int:
        with contextlib.suppress(OverdueError):
            return await self._look("host_bytes", self._engine.host_bytes)
        return 0

    async def gpu_bytes(self) -> Mapping[str, int]:
        with contextlib.suppress(OverdueError):
            return await self._look("gpu_bytes", self._engine.gpu_bytes)
        return {}

    async def log_tail(self) -> Sequence[str]:
        with contextlib.suppress(OverdueError):
            return await self._look("log_tail", self._engine.log_tail)
        return ()


class BoundedImages:
    """See `proxy.runtime.base.Images` for what each method promises; here it raises OverdueError besides."""

    def __init__(self, runtime: Runtime, overdue: Overdue) -> None:
        self._runtime = runtime
        self._overdue = overdue

    async def fitting(self, models: Mapping[str, ModelSettings]) -> Mapping[str, ImageFacts]:
        name, work = self._runtime.name, self._runtime.images.fitting(models)
        try:
            return await self._overdue.within(_IMAGE_S, "fitting", name, work)
        except OverdueError as error:
            raise HostError(f"the checkpoints of the runtime {name} cannot be looked at: {error}") from error

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        return await self._runtime.images.refusal(manifest, models)

    async def footprint(self, key: str) -> Footprint | None:
        work = self._runtime.images.footprint(key)
        return await self._overdue.within(_ASK_S, "footprint", self._runtime.name, work)

    async def _on(
        self, engine: EngineProcess, operation: str, limit_s: float, begin: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        return await _on(self._overdue, engine.instance_id, operation, limit_s, begin)

    async def verify(self, engine: EngineProcess, *, whole: bool) -> None:
        # Beside whatever else is done with the instance, as below.
        subject, work = f"the checkpoint of {engine.key}", self._runtime.images.verify(engine, whole=whole)
        await self._overdue.within(_ARCHIVE_S if whole else _ASK_S, "verify_image", subject, work)

    async def quarantine(self, engine: EngineProcess, *, keep_copy: bool = False) -> bool:
        images = self._runtime.images
        return await self._on(
            engine, "quarantine_image", _IMAGE_S, lambda: images.quarantine(engine, keep_copy=keep_copy)
        )

    async def copy_to_archive(self, engine: EngineProcess) -> None:
        # Beside whatever else is done with the instance, which an archive that hangs does not concern.
        subject, work = f"the checkpoint of {engine.key}", self._runtime.images.copy_to_archive(engine)
        await self._overdue.within(_ARCHIVE_S, "copy_to_archive", subject, work)

    async def archive(self, engine: EngineProcess) -> None:
        await self._on(engine, "archive_image", _ARCHIVE_S, lambda: self._runtime.images.archive(engine))

    async def unarchive(self, engine: EngineProcess) -> None:
        await self._on(engine, "unarchive_image", _ARCHIVE_S, lambda: self._runtime.images.unarchive(engine))

    async def discard(self, engine: EngineProcess) -> None:
        await self._on(engine, "discard_image", _IMAGE_S, lambda: self._runtime.images.discard(engine))


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
        self.images = BoundedImages(runtime, overdue)

    @property
    def leaves(self) -> bool:
        return self._runtime.leaves

    async def open(self) -> None:
        try:
            await self._overdue.within(_OPEN_S, "open", self.name, self._runtime.open())
        except OverdueError as error:
            raise HostError(f"the runtime {self.name} cannot be opened: {error}") from error

    async def close(self) -> None:
        await self._overdue.within(_CLOSE_S, "close", self.name, self._runtime.close())

    def tiers(self) -> Tiers:
        return self._runtime.tiers()

    def memory(self) -> Memory:
        return self._runtime.memory()

    def strays(self) -> Sequence[str]:
        return self._runtime.strays()

    def _bounded(self, engine: EngineProcess) -> BoundedEngine:
        return BoundedEngine(engine, self._overdue, self._stop_grace_s)

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        try:
            recovered = await self._overdue.within(_RECOVER_S, "recover", self.name, self._runtime.recover(models))
        except OverdueError as error:
            raise HostError(
                f"what an earlier warmpool left cannot be looked at, runtime {self.name}: {error}"
            ) from error
        found = [replace(one, engine=self._bounded(one.engine)) for one in recovered.instances]
        return replace(recovered, instances=found)

    def engine(self, instance_id: str, key: str) -> BoundedEngine:
        return self._bounded(self._runtime.engine(instance_id, key))

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> BoundedEngine:
        return self._bounded(
            await _on(
                self._overdue, instance_id, "start", None,
                lambda: self._runtime.start(instance_id, key, model, beside=beside),
            )
        )  # fmt: skip

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> BoundedEngine:
        begin = lambda: self._runtime.clone(instance_id, key, model)  # noqa: E731 - as above
        return self._bounded(await _on(self._overdue, instance_id, "clone", None, begin))

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None = None
    ) -> Mapping[str, Outdated]:
        work = self._runtime.outdated(models, instances)
        return await self._overdue.within(_IMAGE_S, "outdated", self.name, work)
