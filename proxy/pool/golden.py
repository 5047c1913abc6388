"""Golden checkpoints made, proven and explained, one at a time and without a proxy running.

`create` is the seed workflow: start, warm up, record a canary, put to sleep, checkpoint, and then prove by a restore
that the image answers as the engine did.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from proxy.config.values import short_size
from proxy.engine.api_key import key_of
from proxy.engine.client import EngineClient
from proxy.errors import EngineError, PortTakenError, RuntimeFailure, WarmpoolError
from proxy.pool import gpu_accounting
from proxy.pool.model import unless_it_ends, until_it_listens
from proxy.runtime import reseed
from proxy.runtime.base import ImageFacts
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping

    from proxy.checkpoint.manifest import Manifest
    from proxy.checkpoint.store import CheckpointStore
    from proxy.config.model import ModelSettings
    from proxy.config.settings import Settings
    from proxy.runtime.base import Handle, Runtime

T = TypeVar("T")

_MIB: Final = 1 << 20


class GoldenError(WarmpoolError):
    """A golden checkpoint could not be made or is not good; the text says at which stage and why."""


class Watcher(Protocol):
    """Is told of each stage, as for a progress bar."""

    def begins(self, stage: str) -> None:
        """A stage begins."""

    def ended(self, stage: str, seconds: float) -> None:
        """It ended, well or not, after `seconds`."""


@dataclass
class _Steps:
    watcher: Watcher
    stages: Stages = field(default_factory=Stages)
    current: str = ""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.current = name
        self.watcher.begins(name)
        try:
            with self.stages.measure(name):
                yield
        finally:
            self.watcher.ended(name, self.stages.seconds[name])


@dataclass(frozen=True, slots=True)
class Workshop:
    """What is needed to work on the checkpoints of one model."""

    settings: Settings
    key: str
    runtime: Runtime
    store: CheckpointStore

    @property
    def model(self) -> ModelSettings:
        """The model's settings."""
        return self.settings.models[self.key]

    def image(self, handle: Handle) -> str:
        """The name of an instance's image in the store."""
        return handle.model if self.runtime.shares_images else handle.instance_id

    def client(self, handle: Handle) -> EngineClient:
        """A client of a running instance."""
        key = key_of(self.key, self.model)
        return EngineClient(handle.base_url, self.settings.served_name(self.key), api_key=key)


@dataclass(frozen=True, slots=True)
class Created:
    """What `create` made: the manifest, and how long each stage of making and of proving it took, in seconds."""

    manifest: Manifest
    making_s: Mapping[str, float]
    proof_s: Mapping[str, float]
    canary_checked: bool
    """False where the engine offers no completions or the model has `canary = "never"`."""


async def create(shop: Workshop, watcher: Watcher) -> Created:
    """Make the golden checkpoint of a model and prove it. The runtime is open.

    Raises GoldenError. A checkpoint that was there stays until the new one is whole; one that fails its proof is set
    aside. Nothing keeps running, unless the model's `leave_running` asks for it.
    """
    steps, proof = _Steps(watcher), _Steps(watcher)
    model, runtime = shop.model, shop.runtime
    _need_checkpoints(runtime)
    handle: Handle | None = None
    try:
        with steps.step("leftovers"):
            await _clear(shop)
        await _need_room(shop)
        async with asyncio.timeout(model.start_timeout):
            with steps.step("start"):
                handle = await runtime.start(f"{shop.key}-1", shop.key, model)
            facts = await _prepare(shop, handle, steps)
        async with asyncio.timeout(model.checkpoint_timeout):
            with steps.step("checkpoint"):
                await runtime.checkpoint(handle, facts, steps.stages)
        with steps.step("check"):
            manifest = await asyncio.to_thread(shop.store.load, shop.image(handle))
            if not manifest.bytes_by_kind()["memory pages"]:
                raise GoldenError("check: the image holds no memory pages")
        checked = await _prove(shop, handle, manifest, proof)
        if not (model.podman is not None and model.podman.criu.leave_running):
            with proof.step("stop"):
                await runtime.drop(handle)
    except (RuntimeFailure, EngineError, TimeoutError, WarmpoolError) as error:
        await _abandon(shop, handle)
        if isinstance(error, GoldenError):
            raise
        stage = proof.current or steps.current
        setting = "checkpoint_timeout" if stage == "checkpoint" else "start_timeout"
        reason = str(error) or f"no result within {setting} ({getattr(model, setting):g} s)"
        raise GoldenError(f"{stage}: {reason}") from error
    except asyncio.CancelledError:
        await _abandon(shop, handle)
        raise
    return Created(manifest, steps.stages.seconds, proof.stages.seconds, checked)


def _need_checkpoints(runtime: Runtime) -> None:
    tiers = runtime.tiers()
    if Tier.CHECKPOINTED not in tiers.offered:
        raise GoldenError(f"this host cannot checkpoint: {tiers.missing[Tier.CHECKPOINTED]}")


async def _need_room(shop: Workshop) -> None:
    """Raise GoldenError where an image as large as the one that is there, and stays until then, would not fit."""
    there = await shop.runtime.footprint(shop.key)
    if there is None or there.image <= there.free:
        return
    images = [name for name in shop.store.names() if shop.store.load(name).model == shop.key]
    refused = [await shop.runtime.refusal(shop.store.load(name), shop.settings.models) for name in images]
    if not all(refused):  # else its space is free when it is needed
        raise GoldenError(
            f"nothing was started, for its checkpoint would not fit: the one that is there takes "
            f"{short_size(there.image)}, {short_size(max(0, there.free))} are free in pool.checkpoint_dir beyond the "
            f"reserve; `warmpool checkpoint archive {shop.key}` or `rm` makes room"
        )


async def _clear(shop: Workshop) -> None:
    """Remove what is left of the model's instances; other models' are left as they are."""
    recovered = await shop.runtime.recover(_models_of(shop))
    for found in recovered.instances:
        if found.handle.model == shop.key:
            if shop.runtime.shares_images:
                await shop.runtime.remove(found.handle)
            else:
                await shop.runtime.drop(found.handle)


def _models_of(shop: Workshop) -> dict[str, ModelSettings]:
    return {key: model for key, model in shop.settings.models.items() if model.runtime == shop.runtime.name}


async def _prepare(shop: Workshop, handle: Handle, steps: _Steps) -> ImageFacts:
    """Bring a started engine to where it is checkpointed: warm, asleep, with no connection open."""
    model = shop.model
    async with _engine(shop, handle) as engine:
        client = engine.client
        with steps.step("load"):
            await engine.listens(shop.runtime, handle, model.health.interval)
            await engine.asked(client.wait_healthy(model.health.path, model.health.interval))
        with steps.step("warmup"):
            warmup = await engine.asked(client.warm_up(model.warmup))
        canary = None
        if model.canary != "never":
            with steps.step("canary"):
                canary = await engine.asked(client.canary())
        repeats = await engine.asked(reseed.asked_gap(client, model))
        ready, asleep = dict(await shop.runtime.gpu_bytes(handle)), {}
        level, copied = 0, 0
        if await engine.asked(client.is_sleeping()) is not None:
            if model.weights_copy:
                with steps.step("weights"):
                    copied = await engine.asked(client.save_weights())
            with steps.step("sleep"):
                level = model.golden_sleep_level
                await engine.asked(client.sleep(level))
            asleep = dict(await shop.runtime.gpu_bytes(handle))
    making_s = {name: round(value, 4) for name, value in steps.stages.seconds.items()}
    details = {"warmup": warmup, "making_s": making_s, "weights_copy_bytes": copied, "repeats_randomness": repeats}
    if any(ready.values()):
        details["gpu"] = {gpu_accounting.READY: ready, **({gpu_accounting.SLEEPING: asleep} if asleep else {})}
    return ImageFacts(level, canary, details)


class _Engine:
    """A running engine, and its client."""

    def __init__(self, client: EngineClient, watcher: asyncio.Task[str]) -> None:
        self.client = client
        self._watcher = watcher

    async def asked(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of what its client is asked for, or RuntimeFailure when the engine ends before."""
        return await unless_it_ends(self._watcher, work)

    async def listens(self, runtime: Runtime, handle: Handle, interval_s: float) -> None:
        """See `until_it_listens`."""
        await until_it_listens(runtime, handle, self._watcher, interval_s)


@contextlib.asynccontextmanager
async def _engine(shop: Workshop, handle: Handle) -> AsyncIterator[_Engine]:
    """An engine that is talked to; its client is disconnected afterwards."""
    client = shop.client(handle)
    watcher = asyncio.create_task(shop.runtime.wait_exit(handle))
    try:
        yield _Engine(client, watcher)
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
        await client.disconnect()


async def _prove(shop: Workshop, handle: Handle, manifest: Manifest, steps: _Steps) -> bool:
    """Restore an image and compare its answer with the canary. Raises GoldenError, the image set aside if it failed."""
    try:
        async with asyncio.timeout(shop.model.wake_timeout):
            return await _answer_of(shop, handle, manifest, steps)
    except PortTakenError as error:
        raise GoldenError(f"the checkpoint is kept, and was not proven: {error}") from error
    except (RuntimeFailure, EngineError, GoldenError, TimeoutError) as error:
        await shop.runtime.quarantine_image(handle)
        reason = str(error) or f"no result within wake_timeout ({shop.model.wake_timeout:g} s)"
        raise GoldenError(f"the checkpoint does not prove good and was set aside: {steps.current}: {reason}") from error


async def _answer_of(shop: Workshop, handle: Handle, manifest: Manifest, steps: _Steps) -> bool:
    with steps.step("restore"):
        handle = await shop.runtime.restore(handle, steps.stages)
    async with _engine(shop, handle) as engine:
        client = engine.client
        with steps.step("health"):
            await engine.listens(shop.runtime, handle, shop.model.health.interval)
            await engine.asked(client.wait_healthy(shop.model.health.path, shop.model.health.interval))
        if manifest.sleep_level:
            with steps.step("wake_up"):
                await engine.asked(client.wake_up(manifest.sleep_level, Stages(), copied=shop.model.weights_copy))
        if reseed.possible(shop.model):
            with steps.step(reseed.STAGE):
                await engine.asked(reseed.reseed(client, handle, shop.model, shop.settings.served_name(shop.key)))
        if manifest.canary is None:
            return False
        with steps.step("canary"):
            if await engine.asked(client.canary()) != manifest.canary:
                raise GoldenError("the restored engine answers differently from the one that was checkpointed")
    return True


async def _abandon(shop: Workshop, handle: Handle | None) -> None:
    if handle is not None:
        with contextlib.suppress(RuntimeFailure):
            await (shop.runtime.remove(handle) if shop.runtime.shares_images else shop.runtime.drop(handle))


async def verify(shop: Workshop, image: str, watcher: Watcher, *, restore: bool) -> bool:
    """Check every digest of an image and, with `restore`, that it comes up and repeats its canary.

    True when the canary was asked. Raises GoldenError (the image is set aside when it is the restore that fails) and
    StoreError.
    """
    steps = _Steps(watcher)
    with steps.step("digests"):
        manifest = await shop.store.verify(image)
    if not restore:
        return False
    _need_checkpoints(shop.runtime)
    reason = await shop.runtime.refusal(manifest, shop.settings.models)
    if reason is not None:
        raise GoldenError(f"the image is intact, but refused here: {reason}")
    recovered = await shop.runtime.recover(_models_of(shop))
    mine = [f.handle for f in recovered.instances if shop.image(f.handle) == image and f.tier is Tier.CHECKPOINTED]
    try:
        handle = mine[0] if mine else await shop.runtime.clone(f"{shop.key}-verify", shop.key, shop.model)
    except RuntimeFailure as error:
        raise GoldenError(str(error)) from error
    try:
        return await _prove(shop, handle, manifest, steps)
    finally:
        await (shop.runtime.drop(handle) if mine else shop.runtime.remove(handle))


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
