"""The work on the way up and down the ladder: what is asked of runtime and engine, in which order.

Nothing is decided here. An instance is moved along its table before and after, by the pool; a failure is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

from proxy.engine import kinds, weights
from proxy.errors import EngineError, Fault, OverdueError, PortTakenError, RuntimeFailure
from proxy.pool import gpu_accounting
from proxy.pool.image import Image, Place
from proxy.pool.ladder_probe import LadderProbe
from proxy.pool.model import client_of, engine_of, limit_s, unless_it_ends, until_it_listens
from proxy.runtime.base import ImageFacts
from proxy.telemetry.overdue import GIVE_UP_S
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient
    from proxy.pool.instance import Instance
    from proxy.pool.model import Model
    from proxy.runtime.base import EngineProcess

log = logging.getLogger("warmpool.pool")

DEEPEST_SLEEP = 2
_PORTS_TRIED = 3
_ASK_S = 5.0


def note_gap(model: Model, instance_id: str, gap: str | None) -> None:
    """Remember why engines of a model repeat random numbers after a restore, and say it once."""
    if gap is not None and gap != model.reseed_gap:
        log.warning(
            "%s: without a seed of the client's, its answers repeat after each restore, and on clones: %s",
            instance_id, gap,
        )  # fmt: skip
    model.reseed_gap = gap


class StepEffects(Protocol):
    """What the transitions have done by whoever moves the instance: the pool, or the command that makes checkpoints."""

    @property
    def keeps_images(self) -> bool:
        """Whether an image stays after its restore, whatever its model's `keep` says."""

    @property
    def copies_to_archive(self) -> bool:
        """Whether a copy of a new checkpoint goes to the archive."""

    def connect(self, engine: EngineProcess, served_name: str, settings: ModelSettings, /) -> EngineClient:
        """The client of an engine."""

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task beside the move that begins it."""

    def ended(self, model: Model, instance: Instance, watcher: asyncio.Task[str]) -> None:
        """The watcher of an engine says that it has ended."""

    async def measure_once(self, model: Model, instance: Instance, kind: str) -> None:
        """Learn what a model holds of the GPUs awake or asleep in passing, where that was never seen."""

    async def quarantine(self, model: Model, instance: Instance, reason: str) -> None:
        """Set an image aside that is not what was written."""

    def has_room(self, instance: Instance) -> bool:
        """Whether the GPUs have room for the instance awake, beside all others."""


class Steps:
    """The work of each transition, for the pool and for `checkpoint create` alike."""

    def __init__(self, effects: StepEffects) -> None:
        self._effects = effects
        self._probe = LadderProbe(self, effects)

    async def climb(self, model: Model, instance: Instance, tier: Tier, stages: Stages) -> None:
        """One attempt from one tier, within its time limit."""
        async with asyncio.timeout(limit_s(model.settings, tier)):
            match tier:
                case Tier.STOPPED:
                    await self._start(model, instance, stages)
                case Tier.CHECKPOINTED | Tier.ARCHIVED:
                    await self._restore(model, instance, stages)
                case Tier.SUSPENDED:
                    with stages.measure("resume"):
                        await engine_of(instance).resume()
                    await self.wake_up(instance, stages)
                    await self._prove(model, instance, stages)
                case _:
                    await self.wake_up(instance, stages)
                    await self._prove(model, instance, stages)

    async def _start(self, model: Model, instance: Instance, stages: Stages) -> None:
        settings = model.settings
        model.gpu_accounting.started(instance)
        # Whatever is left of a start that is cut off can be removed by this.
        instance.reserve(model.runtime.engine(instance.id, model.key))
        for others_left in reversed(range(_PORTS_TRIED)):
            with stages.measure("start"):
                engine = await model.runtime.start(instance.id, model.key, settings, beside=model.coming)
            self.attach(model, instance, engine)
            instance.started()
            self.watch(model, instance)
            try:
                await self.load(model, instance, stages)
                return
            except PortTakenError as error:
                if not others_left:
                    raise
                log.warning("%s: %s; it is started on another port", instance.id, error)
                await self.unwatch(instance)
                await engine.kill()

    async def load(self, model: Model, instance: Instance, stages: Stages) -> None:
        """From an engine that was started to one that serves and is known."""
        settings, client = model.settings, client_of(instance)
        await model.probes.started(model.key, engine_of(instance).fingerprint())
        instance.begin_load()
        with stages.measure("load"):
            await until_it_listens(engine_of(instance), instance.watcher, settings.health.interval)
            await unless_it_ends(instance.watcher, client.wait_healthy(settings.health.path, settings.health.interval))
        instance.end_load()
        with stages.measure("warmup"):
            model.max_model_len = await unless_it_ends(instance.watcher, client.max_model_len()) or model.max_model_len
            instance.warmed_up(await unless_it_ends(instance.watcher, client.warm_up(settings.warmup)))
        if await client.is_sleeping() is None:
            instance.bar(Tier.SLEEPING)
        if self._is_checkpointed(model):
            note_gap(model, instance.id, await unless_it_ends(instance.watcher, client.reseed_gap()))
        if settings.canary != "never" and Tier.CHECKPOINTED in model.tiers().offered:
            with stages.measure("canary"):
                instance.answers(await unless_it_ends(instance.watcher, client.canary()))
        if settings.weights_copy:
            await unless_it_ends(instance.watcher, self._prepare_pauses(instance, stages))

    async def _prepare_pauses(self, instance: Instance, stages: Stages) -> None:
        """Find out whether its requests can be made to stand still, and write the copy of the weights it takes."""
        answer = await client_of(instance).can_pause()
        instance.learn_pausable(pausable=answer != "never")
        if instance.pausable:
            await self._copy_weights(instance, stages)

    async def learn_pausable(self, instance: Instance) -> None:
        """Ask an engine that runs already, as after a restore, whether its requests can be made to stand still."""
        generation = instance.generation
        try:
            async with asyncio.timeout(_ASK_S):
                answer = await client_of(instance).can_pause()
        except (EngineError, TimeoutError) as error:
            log.warning("%s: whether it can pause is not known: %s", instance.id, error)
            return
        if instance.generation != generation:
            return
        if answer == "yes":
            instance.weights_copied()
        elif answer != "never" and instance.weights_copy == "good":
            instance.weights_lost()
        instance.learn_pausable(pausable=answer != "never")

    async def _restore(self, model: Model, instance: Instance, stages: Stages) -> None:
        await self.restored(model, instance, stages)
        if not model.settings.keep and not model.leaving and not self._effects.keeps_images:
            await self.forget_image(model, instance)

    async def restored(self, model: Model, instance: Instance, stages: Stages) -> None:
        """From the image to an engine that serves; the image stays."""
        image = instance.image
        await self.unwatch(instance)
        model.gpu_accounting.began(instance)
        await self.unarchive(model, instance, stages)
        reading = self._read_weights(model, image)
        with stages.measure("restore"):
            await engine_of(instance).restore(stages, model.gpu_accounting.moves(instance))
            self.attach(model, instance, engine_of(instance))
        instance.sleeps(image.sleep_level)
        instance.restored(copies_weights=model.settings.weights_copy)
        self.watch(model, instance)
        await self._be_healthy(model, instance, stages)
        if not image.sleep_level and await client_of(instance).is_sleeping() is None:
            # An instance that was adopted or cloned, whose engine nobody has asked.
            instance.bar(Tier.SLEEPING)
        await self.wake_up(instance, stages)
        await asyncio.wait([reading])
        await self._prove(model, instance, stages)
        image.restored()

    async def prove(self, model: Model, instance: Instance, stages: Stages) -> None:
        """The rest of a restore, for an engine that is awake."""
        await self._be_healthy(model, instance, stages)
        await self._prove(model, instance, stages)

    async def _be_healthy(self, model: Model, instance: Instance, stages: Stages) -> None:
        health = model.settings.health
        with stages.measure("health"):
            await until_it_listens(engine_of(instance), instance.watcher, health.interval)
            await unless_it_ends(instance.watcher, client_of(instance).wait_healthy(health.path, health.interval))

    def _is_checkpointed(self, model: Model) -> bool:
        return Tier.CHECKPOINTED in model.tiers().offered and Tier.CHECKPOINTED in model.timetable

    async def _prove(self, model: Model, instance: Instance, stages: Stages) -> None:
        """Give a restored engine fresh randomness, and have it repeat its canary, if that is due."""
        if instance.unproven and self._reseeds(model):
            with stages.measure("reseed"):
                work = client_of(instance).reseed()
                note_gap(model, instance.id, await unless_it_ends(instance.watcher, work))
        if self.needs_canary(model, instance):
            with stages.measure("canary"):
                answer = await unless_it_ends(instance.watcher, client_of(instance).canary())
            if answer != instance.image.canary:
                raise EngineError(
                    "canary",
                    "the restored engine answers differently from the one that was checkpointed",
                    fault=Fault.IMAGE,
                )
            instance.image.canary_repeated()
        instance.proven()

    def _reseeds(self, model: Model) -> bool:
        return kinds.of(model.settings).reseeds(model.settings)

    def needs_proof(self, model: Model, instance: Instance) -> bool:
        """Whether something is to be asked of it before it serves."""
        return self.needs_canary(model, instance) or (instance.unproven and self._reseeds(model))

    def needs_canary(self, model: Model, instance: Instance) -> bool:
        """Whether it has to answer before it serves."""
        asked, image = model.settings.canary, instance.image
        due = asked == "always" or (asked == "first" and not image.canary_checked)
        return instance.unproven and due and image.canary is not None

    async def unarchive(self, model: Model, instance: Instance, stages: Stages) -> None:
        """Bring the image from the archive to tmpfs, if that is where it is."""
        async with instance.image.lock:
            if instance.image.archived:
                with stages.measure("unarchive"):
                    await model.runtime.images.unarchive(engine_of(instance))
                instance.image.moved(Place.TMPFS)

    def _read_weights(self, model: Model, image: Image) -> asyncio.Task[None]:
        """Bring the weights into memory beside the restore, for an engine that has to load them again."""

        async def read() -> None:
            if image.sleep_level == DEEPEST_SLEEP and model.settings.weights and not model.settings.weights_copy:
                await asyncio.to_thread(weights.read_ahead, model.settings.weights)

        return self._effects.spawn(f"read the weights of {model.key}", read())

    async def wake_up(self, instance: Instance, stages: Stages) -> None:
        """Have an engine that sleeps wake up."""
        if instance.sleep_level:
            level, copied = instance.sleep_level, instance.weights_copy == "good"
            if not await unless_it_ends(instance.watcher, client_of(instance).wake_up(level, stages, copied=copied)):
                instance.weights_lost()
            instance.sleeps(0)

    async def forget_image(self, model: Model, instance: Instance) -> None:
        """Delete the image."""
        instance.image.gone()
        try:
            await model.runtime.images.discard(engine_of(instance))
        except RuntimeFailure as error:
            log.error("%s: %s", instance.id, error)

    async def go_down(
        self, model: Model, instance: Instance, origin: Tier, to: Tier, stages: Stages | None = None
    ) -> None:
        """One step down; raises RuntimeFailure or EngineError."""
        stages = Stages() if stages is None else stages
        match to:
            case Tier.SLEEPING:
                await self.fall_asleep(model, instance, origin, stages)
            case Tier.SUSPENDED:
                await self._probe.try_suspend(model, instance, stages)
                await self.fall_asleep(model, instance, origin, stages)
                if instance.sleep_level:
                    await self._effects.measure_once(model, instance, gpu_accounting.SLEEPING)
                await client_of(instance).disconnect()
                await engine_of(instance).suspend()
            case Tier.CHECKPOINTED:
                if origin <= Tier.SLEEPING and not instance.image.present:
                    await self._probe.try_suspend(model, instance, stages)
                async with instance.image.lock:
                    await self._to_image(model, instance, origin, stages)
                await self._probe.try_restore(model, instance, stages)
            case _:
                async with instance.image.lock:
                    if not instance.image.archived:
                        await model.runtime.images.archive(engine_of(instance))
                        instance.image.moved(Place.ARCHIVE)

    async def fall_asleep(
        self, model: Model, instance: Instance, origin: Tier, stages: Stages, *, to_image: bool = False
    ) -> int:
        """Have an awake engine sleep, if it can; how many bytes of its weights were copied. `to_image`: for one."""
        copied = 0
        if origin is Tier.READY and Tier.SLEEPING not in instance.barred:
            # Level 1 leaves a pinned copy of the weights in the process for good, which would double the checkpoint.
            yet_to_come = to_image or (self._is_checkpointed(model) and not instance.image.present)
            level = model.settings.golden_sleep_level if yet_to_come else model.settings.sleep_level
            if instance.pausable:
                await self._end_pauses(instance)
            if instance.weights_copy == "lost" or (yet_to_come and model.settings.weights_copy):
                copied = await self._copy_weights(instance, stages)
            if level == DEEPEST_SLEEP and not yet_to_come and instance.weights_copy != "good":
                level = 1
            with stages.measure("sleep"):
                await client_of(instance).sleep(level)
            instance.sleeps(level)
        return copied

    async def _end_pauses(self, instance: Instance) -> None:
        """Have it give back what it keeps for the next pause: it would be in its checkpoint."""
        try:
            await client_of(instance).end_pauses()
        except EngineError as error:
            log.warning("%s: %s", instance.id, error)

    async def _copy_weights(self, instance: Instance, stages: Stages) -> int:
        """Have the engine write the copy of its weights; without one they are loaded in the engine's own way."""
        if instance.evicted and instance.weights_copy == "lost":
            return 0  # somebody waits for its place
        async with instance.image.copying:
            try:
                with stages.measure("weights"):
                    written = await client_of(instance).save_weights()
            except EngineError as error:
                log.warning("%s: no copy of its weights: %s", instance.id, error)
                return 0
        instance.weights_copied()
        log.info("%s: %.2f GiB of weights copied", instance.id, written / (1 << 30))
        return written

    async def _to_image(self, model: Model, instance: Instance, origin: Tier, stages: Stages) -> None:
        """End the processes; where there is no image yet, write one before."""
        image, client = instance.image, client_of(instance)
        if image.present and not await self._still_there(model, instance):
            image.gone()
        if image.present:
            await self.unwatch(instance)
            await client.disconnect()
            await engine_of(instance).kill()
        else:
            if instance.canary is None and origin is Tier.READY and model.settings.canary != "never":
                instance.answers(await client.canary())
            if origin is Tier.READY:
                await self._effects.measure_once(model, instance, gpu_accounting.READY)
            copied = await self.fall_asleep(model, instance, origin, stages, to_image=True)
            if instance.sleep_level and origin <= Tier.SLEEPING:
                await self._effects.measure_once(model, instance, gpu_accounting.SLEEPING)
            await client.disconnect()
            await self.unwatch(instance)
            making_s = {name: round(value, 4) for name, value in stages.seconds.items()}
            details: dict[str, Any] = {"warmup": instance.warmup, "weights_copy_bytes": copied, "making_s": making_s}
            if self._is_checkpointed(model) or model.reseed_gap is not None:
                details["repeats_randomness"] = model.reseed_gap
            if model.max_model_len is not None:
                details["max_model_len"] = model.max_model_len
            if figures := model.gpu_accounting.figures(model.key):
                details["gpu"] = figures
            facts = ImageFacts(instance.sleep_level, instance.canary, details)
            with stages.measure("checkpoint"):
                await engine_of(instance).checkpoint(facts, stages)
            image.written(instance.sleep_level, instance.canary)
            model.gpu_accounting.wrote_image(instance)
            if not model.coming:
                self.keep_copy(model, instance)
        instance.sleeps(image.sleep_level)

    async def _still_there(self, model: Model, instance: Instance) -> bool:
        """Whether the image of an engine that runs can be restored once more, as far as the sizes of its files say."""
        try:
            if instance.image.archived:  # what was on tmpfs was damaged
                await model.runtime.images.unarchive(engine_of(instance))
                instance.image.moved(Place.TMPFS)
            await model.runtime.images.verify(engine_of(instance), whole=False)
        except OverdueError:
            return True  # nor could another one be written now
        except RuntimeFailure as error:
            log.error("%s: its checkpoint is written anew: %s", instance.id, error.reason)
            return False
        return True

    def keep_copy(self, model: Model, instance: Instance) -> None:
        """Have a copy of a new checkpoint go to the archive, in the background, where that is wanted."""
        if self._effects.copies_to_archive and Tier.ARCHIVED in model.tiers().offered:
            self._effects.spawn(f"copy {model.key} to the archive", self._copy_to_archive(model, instance))

    async def _copy_to_archive(self, model: Model, instance: Instance) -> None:
        try:
            await model.runtime.images.copy_to_archive(engine_of(instance))
        except RuntimeFailure as error:
            log.warning("%s: no copy of its checkpoint in the archive: %s", model.key, error)
            if error.fault is Fault.DAMAGE:
                await self._effects.quarantine(model, instance, error.reason)
        else:
            log.info("%s: a copy of its checkpoint is in the archive", model.key)

    async def still_awake(self, instance: Instance) -> bool:
        """Whether an engine that refused to sleep serves on."""
        with contextlib.suppress(EngineError, TimeoutError):
            async with asyncio.timeout(5.0):
                return instance.sleep_level == 0 and await client_of(instance).is_sleeping() is False
        return False

    def attach(self, model: Model, instance: Instance, engine: EngineProcess) -> None:
        """Take note of an engine, and of where it is."""
        instance.attach(engine, lambda it: self._effects.connect(it, model.served_name, model.settings))

    def watch(self, model: Model, instance: Instance) -> None:
        """Learn of the engine's end."""
        watcher = asyncio.create_task(engine_of(instance).wait_exit(), name=f"watch {instance.id}")
        instance.watched_by(watcher)
        watcher.add_done_callback(lambda task: self._effects.ended(model, instance, task))

    async def unwatch(self, instance: Instance) -> None:
        """It may end now."""
        if (watcher := instance.unwatch()) is not None:
            watcher.cancel()
            await asyncio.wait([watcher], timeout=GIVE_UP_S)
