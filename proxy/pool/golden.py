"""Golden checkpoints made, proven and explained, one at a time and without a proxy running.

`create` is the seed workflow: start, warm up, record a canary, put to sleep, checkpoint, and then prove by a restore
that the image answers as the engine did.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from proxy.config.values import short_size
from proxy.engine import kinds
from proxy.engine.api_key import key_of
from proxy.errors import EngineError, PortTakenError, RuntimeFailure, WarmpoolError
from proxy.pool.gpu_accounting import GpuAccounting
from proxy.pool.image import Image, Place
from proxy.pool.instance import Event, Instance, State
from proxy.pool.memory_accounting import MemoryAccounting
from proxy.pool.model import Model, engine_of
from proxy.pool.transitions import Steps
from proxy.runtime.ladder_probes import FILE, LadderProbes
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping

    from proxy.checkpoint.manifest import Manifest
    from proxy.checkpoint.store import CheckpointStore
    from proxy.config.model import ModelSettings
    from proxy.config.settings import Settings
    from proxy.engine.client import EngineClient
    from proxy.runtime.base import EngineProcess, Runtime

_MIB: Final = 1 << 20


class GoldenError(WarmpoolError):
    """A golden checkpoint could not be made or is not good; the text says at which stage and why."""


class Watcher(Protocol):
    """Is told of each stage, as for a progress bar."""

    def begins(self, stage: str) -> None:
        """A stage begins."""

    def ended(self, stage: str, seconds: float) -> None:
        """It ended, well or not, after `seconds`."""


class _Watched(Stages):
    """Tells a watcher of each stage that lies in no other."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self._watcher = watcher
        self._in_stage = False
        self.current = ""
        """The last one that began."""

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """As of any stages."""
        if self._in_stage:
            with super().measure(name):
                yield
            return
        self._in_stage, self.current = True, name
        self._watcher.begins(name)
        try:
            with super().measure(name):
                yield
        finally:
            self._in_stage = False
            self._watcher.ended(name, self.seconds[name])


@dataclass(frozen=True, slots=True)
class CheckpointContext:
    """What is needed to work on the checkpoints of one model."""

    settings: Settings
    key: str
    runtime: Runtime
    store: CheckpointStore

    @property
    def model(self) -> ModelSettings:
        """The model's settings."""
        return self.settings.models[self.key]

    def client(self, engine: EngineProcess) -> EngineClient:
        """A client of a running instance."""
        key = key_of(self.key, self.model)
        return kinds.of(self.model).connect(
            engine.base_url, self.settings.served_name(self.key), self.model, instance=engine.instance_id, api_key=key
        )


@dataclass(frozen=True, slots=True)
class Created:
    """What `create` made: the manifest, and how long each stage of making and of proving it took, in seconds."""

    manifest: Manifest
    making_s: Mapping[str, float]
    proof_s: Mapping[str, float]
    canary_checked: bool
    """False where the engine offers no completions or the model has `canary = "never"`."""


class _Engine:
    """One instance of the model outside any pool; what moves it are the pool's own transitions."""

    def __init__(self, context: CheckpointContext, instance_id: str, image: Image | None = None) -> None:
        self._context, self.runtime, self.settings = context, context.runtime, context.model
        self.gpu_accounting = GpuAccounting(context.settings.pool.gpu_creep)
        name = context.settings.served_name(context.key)
        probes = LadderProbes(context.settings.pool.state_dir / FILE)
        probes.load()
        self.model = Model(
            context.key, context.model, name, context.runtime, self.gpu_accounting, MemoryAccounting(), probes
        )
        self.instance = Instance(instance_id, context.key, image)
        self.model.instances[instance_id] = self.instance
        self.steps = Steps(self)

    # --- what the transitions have done ---

    keeps_images = True
    copies_to_archive = False

    def connect(self, engine: EngineProcess, _served_name: str, _settings: ModelSettings) -> EngineClient:
        """The client of the engine."""
        return self._context.client(engine)

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task beside the move."""
        return asyncio.create_task(work, name=name)

    def ended(self, model: Model, instance: Instance, watcher: asyncio.Task[str]) -> None:
        """Whoever asks the engine something is told."""

    async def quarantine(self, model: Model, instance: Instance, reason: str) -> None:
        """Whoever makes the checkpoint sees to it."""

    def has_room(self, instance: Instance) -> bool:  # noqa: ARG002 - of the protocol
        """Nothing else runs."""
        return True

    async def measure_once(self, model: Model, instance: Instance, kind: str) -> None:
        """Learn what it holds of the GPUs, if it holds any."""
        held = dict(await engine_of(instance).gpu_bytes())
        if any(held.values()):
            self.gpu_accounting.learn(model.key, {kind: held})

    # --- what is done with it ---

    async def start(self, stages: Stages) -> None:
        """From nothing to an engine that serves."""
        await self.model.probes.forget(self.model.key)  # whoever asks for it wants it tried
        self.instance.begin_wake(Tier.STOPPED, 0.0)
        await self.steps.climb(self.model, self.instance, Tier.STOPPED, stages)
        self.instance.apply(Event.AT_READY)

    async def checkpoint(self, stages: Stages) -> None:
        """To its image."""
        self.instance.begin_step_down(Tier.CHECKPOINTED, evicted=False)
        async with asyncio.timeout(self.settings.checkpoint_timeout):
            await self.steps.go_down(self.model, self.instance, Tier.READY, Tier.CHECKPOINTED, stages)
        self.instance.apply(Event.AT_CHECKPOINTED)

    async def restore(self, stages: Stages) -> None:
        """From its image to an engine that has proven itself."""
        self.instance.begin_wake(Tier.CHECKPOINTED, 0.0)
        await self.steps.climb(self.model, self.instance, Tier.CHECKPOINTED, stages)

    async def let_go(self) -> None:
        """Nothing more is asked of it."""
        await self.steps.unwatch(self.instance)
        if self.instance.client is not None:
            await self.instance.client.disconnect()


async def create(context: CheckpointContext, watcher: Watcher) -> Created:
    """Make the golden checkpoint of a model and prove it. The runtime is open.

    Raises GoldenError. A checkpoint that was there stays until the new one is whole; one that fails its proof is set
    aside. Nothing keeps running, unless the model's `leave_running` asks for it.
    """
    making, proof = _Watched(watcher), _Watched(watcher)
    model, runtime = context.model, context.runtime
    _need_checkpoints(runtime)
    engine = _Engine(context, f"{context.key}-1")
    try:
        with making.measure("cleanup"):
            await _clear(context)
        await _need_room(context)
        await engine.start(making)
        await engine.checkpoint(making)
        image = engine_of(engine.instance).image
        with making.measure("check"):
            manifest = await asyncio.to_thread(context.store.load, image)
            if not manifest.bytes_by_kind()["memory pages"]:
                raise GoldenError("check: the image holds no memory pages")
        await _prove(context, engine, proof)
        if not (model.podman is not None and model.podman.criu.leave_running):
            with proof.measure("stop"):
                await engine_of(engine.instance).kill()
    except (RuntimeFailure, EngineError, TimeoutError, WarmpoolError) as error:
        await _abandon(context, engine)
        if isinstance(error, GoldenError):
            raise
        stage = proof.current or making.current
        setting = "checkpoint_timeout" if stage in ("weights", "sleep", "checkpoint") else "start_timeout"
        reason = str(error) or f"no result within {setting} ({getattr(model, setting):g} s)"
        raise GoldenError(f"{stage}: {reason}") from error
    except asyncio.CancelledError:
        await _abandon(context, engine)
        raise
    return Created(manifest, making.seconds, proof.seconds, engine.instance.image.canary_checked)


def _need_checkpoints(runtime: Runtime) -> None:
    tiers = runtime.tiers()
    if Tier.CHECKPOINTED not in tiers.offered:
        raise GoldenError(f"this host cannot checkpoint: {tiers.missing[Tier.CHECKPOINTED]}")


async def _need_room(context: CheckpointContext) -> None:
    """Raise GoldenError where an image as large as the one that is there, and stays until then, would not fit."""
    there = await context.runtime.images.footprint(context.key)
    if there is None or there.image <= there.free:
        return
    images = [name for name in context.store.names() if context.store.load(name).model == context.key]
    refused = [
        await context.runtime.images.refusal(context.store.load(name), context.settings.models) for name in images
    ]
    if not all(refused):  # else its space is free when it is needed
        raise GoldenError(
            f"nothing was started, for its checkpoint would not fit: the one that is there takes "
            f"{short_size(there.image)}, {short_size(max(0, there.free))} are free in pool.checkpoint_dir beyond the "
            f"reserve; `warmpool checkpoint archive {context.key}` or `rm` makes room"
        )


async def _clear(context: CheckpointContext) -> None:
    """Remove what is left of the model's instances; other models' are left as they are."""
    recovered = await context.runtime.recover(_models_of(context))
    for found in recovered.instances:
        if found.engine.key == context.key:
            if context.runtime.shares_images:
                await found.engine.remove()
            else:
                await found.engine.kill()


def _models_of(context: CheckpointContext) -> dict[str, ModelSettings]:
    return {key: model for key, model in context.settings.models.items() if model.runtime == context.runtime.name}


async def _prove(context: CheckpointContext, engine: _Engine, stages: _Watched) -> None:
    """Restore an image and compare its answer with the canary. Raises GoldenError, the image set aside if it failed."""
    try:
        await engine.restore(stages)
    except PortTakenError as error:
        raise GoldenError(f"the checkpoint is kept, and was not proven: {error}") from error
    except (RuntimeFailure, EngineError, TimeoutError) as error:
        await context.runtime.images.quarantine(engine_of(engine.instance))
        reason = str(error) or f"no result within wake_timeout ({context.model.wake_timeout:g} s)"
        text = f"the checkpoint does not prove good and was set aside: {stages.current}: {reason}"
        raise GoldenError(text) from error
    finally:
        await engine.let_go()


async def _abandon(context: CheckpointContext, engine: _Engine) -> None:
    await engine.let_go()
    if (process := engine.instance.engine) is not None:
        with contextlib.suppress(RuntimeFailure):
            await (process.remove() if context.runtime.shares_images else process.kill())


async def verify(context: CheckpointContext, image: str, watcher: Watcher, *, restore: bool) -> bool:
    """Check every digest of an image and, with `restore`, that it comes up and repeats its canary.

    True when the canary was asked. Raises GoldenError (the image is set aside when it is the restore that fails) and
    StoreError.
    """
    stages = _Watched(watcher)
    with stages.measure("digests"):
        manifest = await context.store.verify(image)
    if not restore:
        return False
    _need_checkpoints(context.runtime)
    reason = await context.runtime.images.refusal(manifest, context.settings.models)
    if reason is not None:
        raise GoldenError(f"the image is intact, but refused here: {reason}")
    recovered = await context.runtime.recover(_models_of(context))
    mine = [f.engine for f in recovered.instances if f.engine.image == image and f.tier is Tier.CHECKPOINTED]
    try:
        process = mine[0] if mine else await context.runtime.clone(f"{context.key}-verify", context.key, context.model)
    except RuntimeFailure as error:
        raise GoldenError(str(error)) from error
    there = Image(Place.TMPFS, sleep_level=manifest.sleep_level, canary=manifest.canary)
    engine = _Engine(context, process.instance_id, there)
    engine.instance.adopt(State.CHECKPOINTED, 0.0)
    engine.steps.attach(engine.model, engine.instance, process)
    try:
        await _prove(context, engine, stages)
    finally:
        await (process.kill() if mine else process.remove())
    return engine.instance.image.canary_checked


def advice(manifest: Manifest) -> list[str]:
    """What could make an image smaller or faster to restore, most bytes first; one sentence each."""
    kinds = manifest.space_by_kind()
    pages, shared, written = (kinds[kind] for kind in ("memory pages", "shared memory", "filesystem diff"))
    pinned = int((manifest.details.get("memory") or {}).get("/dev/zero", 0))
    found: list[tuple[int, str]] = []
    if shared > 64 * _MIB:
        text = "are shared memory. With vLLM, VLLM_MQ_MAX_CHUNK_BYTES_MB=1 shrinks its message queues from 419 MB."
        found.append((shared, f"{short_size(shared)} {text}"))
    if written > 64 * _MIB:
        text = "were written to the root filesystem. Mount a volume where the engine keeps its caches, or set"
        found.append((written, f"{short_size(written)} {text} criu.ignore_rootfs if it can do without them."))
    if pinned > 64 * _MIB:
        text = "were pinned host memory, such as the weights that sleep level 1 keeps there."
        found.append((pinned, f"{short_size(pinned)} {text} An engine that never slept at level 1 has none."))
    if pages > 1024 * _MIB and not manifest.sleep_level:
        text = "The engine was awake. With a sleep mode (vLLM: --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1) its KV"
        found.append((pages, f"{text} cache would not be in the image."))
    if pages > 1024 * _MIB:
        text = (
            "Most of a restore is the copying of memory pages. Transparent huge pages set to `always` make that faster:"
        )
        found.append((0, f"{text} a third for 4 GB, half for 8 GB."))
    return [text for _, text in sorted(found, key=lambda entry: -entry[0])]
