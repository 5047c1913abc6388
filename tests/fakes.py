"""A runtime, an engine client and a clock that tests hold in their hands.

The fake runtime passes the same contract suite as the real ones (tests/runtime_contract.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from proxy.config.settings import Settings
from proxy.engine import kinds
from proxy.errors import EngineError, RuntimeFailure
from proxy.host import facts
from proxy.pool.pool import Pool
from proxy.runtime.base import EngineProcess, Footprint, Found, ImageFacts, Outdated, Recovered, Tiers, Vitals
from proxy.telemetry.metrics import Metrics
from proxy.tiers import Tier
from tests.fake_cuda import FakeDriver, FakeNvml, PromptGpus

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

    from proxy.checkpoint.manifest import Manifest
    from proxy.config.engine import WarmupSettings
    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient
    from proxy.gpu.cuda import Gpus
    from proxy.host.facts import Memory
    from proxy.runtime.ladder_probes import LadderProbes
    from proxy.telemetry.stages import Stages

ALL_TIERS = frozenset({Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED, Tier.ARCHIVED})


class Clock:
    """A monotonic clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Process:
    """What the fake runtime runs."""

    boot: int
    served: int = 0
    frozen: bool = False
    sleep_level: int = 0
    paused: bool = False
    command: list[str] = field(default_factory=list)
    healthy: bool = True
    listens: bool = True
    restored: bool = False
    entropy: bytes | None = None
    """What its generators were begun with; None as they were when it was started or checkpointed."""
    started_unix_s: float = field(default_factory=time.time)
    exited: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass
class Image:
    """What the fake runtime keeps of a checkpointed process."""

    boot: int
    served: int
    sleep_level: int
    model: str
    facts: ImageFacts
    archived: bool = False
    command: list[str] = field(default_factory=list)


class FakeRuntime:
    """Keeps processes and images in dictionaries; operations can be held, failed and counted.

    `gates[operation]` is awaited in it; `failures[operation]` is a list of errors to raise, one per call.
    An operation of `hanging` never ends, cancelled or not, until `answers` is set.
    """

    name = "process"

    def __init__(self, *, shares_images: bool = False, gpus: Gpus | None = None, nvml: FakeNvml | None = None) -> None:
        self.shares_images = shares_images
        self.images = FakeImages(self)
        self.gpus = gpus
        self.nvml = nvml or FakeNvml()
        self.takes: dict[str, tuple[int, int]] = {}
        """Model → bytes of GPU memory that an engine of it holds when it is awake, and asleep."""
        self.places: dict[str, tuple[int, ...]] = {}
        """Model → the GPUs, by index, of each of which its engines hold that; the first one where nothing is said."""
        self.restored_on: dict[str, dict[str, str]] = {}
        """Instance → the GPUs that it was restored onto instead of those of its image."""
        self.host_takes: dict[str, int] = {}
        """Model → bytes of host memory that an engine of it holds."""
        self.leaks: dict[str, int] = {}
        """Instance → bytes of GPU memory that its processes hold in addition, whatever they do."""
        self.leaves = False
        self.offered = ALL_TIERS
        self.missing: dict[Tier, str] = {}
        self.processes: dict[str, Process] = {}
        self.copies: set[int] = set()
        """Of weights, by the boot of the engine that wrote them."""
        self.fingerprint = "580.159.04"
        """Of its engines."""
        self.can_pause = False
        """Whether the requests of its engines can stand still."""
        self.reseed_gap: str | None = None
        """What engines say of their workers' randomness."""
        self.engines: dict[str, FakeProcess] = {}
        """By instance; those that were never started, or were removed, have no port."""
        self.calls: Counter[str] = Counter()
        self.max_model_len: int | None = None
        """What engines say of it."""
        self.log_lines: dict[str, list[str]] = {}
        """Instance → what its engine wrote last."""
        self.takes_s: dict[str, float] = {}
        """Operation → how long it takes, by the event loop's clock."""
        self.gates: dict[str, asyncio.Event] = {}
        self.failures: dict[str, list[Exception]] = {}
        self.hanging: set[str] = set()
        self.answers = asyncio.Event()
        self.changes: dict[str, Outdated] = {}
        """Model → what has changed since its engines were started."""
        self.lost: set[str] = set()
        """Models whose images are of another version."""
        self.boots = itertools.count(1)
        self.ports = itertools.count(20000)

    async def _enter(self, operation: str) -> None:
        self.calls[operation] += 1
        if seconds := self.takes_s.get(operation):
            await asyncio.sleep(seconds)
        if operation in self.hanging:
            answers = self.answers
            while not answers.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await answers.wait()
            raise RuntimeFailure(operation, "it answered at last")
        if gate := self.gates.get(operation):
            await gate.wait()
        if errors := self.failures.get(operation):
            raise errors.pop(0)

    def kill(self, instance_id: str) -> None:
        """The engine ends by itself."""
        process = self.processes.pop(instance_id)
        process.exited.set_result("signal 9")

    def inherit(self, before: FakeRuntime, *, keep: bool) -> None:
        """Take over what a predecessor left."""
        self.boots, self.ports = before.boots, before.ports
        if keep:
            self.images.there, self.processes = before.images.there, before.processes
            for left in before.engines.values():
                if left.port:
                    self.engine(left.instance_id, left.key).port = left.port

    async def open(self) -> None:
        await self._enter("open")

    async def close(self) -> None:
        await self._enter("close")

    def strays(self) -> list[str]:
        return []

    def memory(self) -> Memory:
        return facts.memory()

    def tiers(self) -> Tiers:
        return Tiers(self.offered, self.missing)

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        await self._enter("recover")
        found = []
        for engine in [e for e in self.engines.values() if e.key not in models]:
            engine.forget()
        for owner in [o for o, image in self.images.there.items() if image.model not in models]:
            del self.images.there[owner]
        for engine in self.engines.values():
            image = self.images.there.get(engine.image)
            if process := self.processes.get(engine.instance_id):
                found.append(Found(engine, Tier.READY, process.started_unix_s, process.restored))
            elif image is not None and engine.port:
                found.append(Found(engine, Tier.ARCHIVED if image.archived else Tier.CHECKPOINTED))
        images = {owner: replace(image.facts, archived=image.archived) for owner, image in self.images.there.items()}
        return Recovered(found, images, frozenset(self.lost))

    def engine(self, instance_id: str, key: str) -> FakeProcess:
        if instance_id not in self.engines:
            self.engines[instance_id] = FakeProcess(self, instance_id, key)
        return self.engines[instance_id]

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> FakeProcess:
        await self._enter("start")
        engine = self._prepared(instance_id, key)
        engine.beside = beside and self.shares_images
        self.restored_on.pop(instance_id, None)
        self.processes[instance_id] = Process(next(self.boots), command=_command(model))
        engine.measure()
        return engine

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> FakeProcess:
        await self._enter("clone")
        if not self.shares_images:
            raise RuntimeFailure("clone", "this runtime has no clones")
        return self._prepared(instance_id, key)

    def _prepared(self, instance_id: str, key: str) -> FakeProcess:
        engine = self.engine(instance_id, key)
        engine.port = engine.port or next(self.ports)
        return engine

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None = None
    ) -> Mapping[str, Outdated]:
        await self._enter("outdated")
        return {key: entry for key, entry in self.changes.items() if key in models}


class FakeProcess:
    """An engine of the fake runtime."""

    host = "127.0.0.1"

    def __init__(self, runtime: FakeRuntime, instance_id: str, key: str) -> None:
        self.runtime, self.instance_id, self.key = runtime, instance_id, key
        self.port = 0
        self.beside = False

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def image(self) -> str:
        if self.beside:
            return f"{self.key}.next"
        return self.key if self.runtime.shares_images else self.instance_id

    def _process(self, operation: str) -> Process:
        process = self.runtime.processes.get(self.instance_id)
        if process is None:
            raise RuntimeFailure(operation, "the engine is not running")
        return process

    def measure(self) -> None:
        """Let NVML see what the engine holds now."""
        runtime = self.runtime
        process = runtime.processes.get(self.instance_id)
        gpus = (runtime.nvml.held, runtime.nvml.held_on_second)
        if process is None:
            for gpu in gpus:
                gpu.pop(self.port, None)
            return
        ready, asleep = runtime.takes.get(self.key, (0, 0))
        held = 0 if process.frozen else asleep if process.sleep_level or process.paused else ready
        uuids, moves = runtime.nvml.uuids, runtime.restored_on.get(self.instance_id, {})
        for gpu in gpus:
            gpu.pop(self.port, None)
        for index in (uuids.index(moves.get(uuids[i], uuids[i])) for i in runtime.places.get(self.key, (0,))):
            gpus[index][self.port] = held + runtime.leaks.get(self.instance_id, 0)

    async def gpu_bytes(self) -> Mapping[str, int]:
        if self.runtime.gpus is None or self.instance_id not in self.runtime.processes:
            return {}
        return await self.runtime.gpus.held_by_gpu([self.port])  # the port stands for the pid

    def fingerprint(self) -> str:
        return self.runtime.fingerprint

    async def wait_exit(self) -> str:
        process = self.runtime.processes.get(self.instance_id)
        return "ended" if process is None else await asyncio.shield(process.exited)

    async def host_bytes(self) -> int:
        return self.runtime.host_takes.get(self.key, 0) if self.instance_id in self.runtime.processes else 0

    async def vitals(self) -> Vitals:
        return Vitals({}, self._process("vitals").frozen)

    async def listens(self) -> bool:
        return True

    async def log_tail(self) -> list[str]:
        return [*self.runtime.log_lines.get(self.instance_id, ())]

    async def suspend(self) -> None:
        await self.runtime._enter("suspend")
        self._process("suspend").frozen = True
        self.measure()

    async def resume(self) -> None:
        await self.runtime._enter("resume")
        self._process("resume").frozen = False
        self.measure()

    async def checkpoint(self, facts: ImageFacts, stages: Stages) -> None:
        process = self._process("checkpoint")
        await self.runtime._enter("checkpoint")
        image = Image(process.boot, process.served, process.sleep_level, self.key, facts, command=process.command)
        self.runtime.images.there[self.image] = image
        self._end()

    async def restore(self, stages: Stages, gpus: Mapping[str, str] | None = None) -> None:
        with stages.measure("fake"):
            await self.runtime._enter("restore")
        image = self.runtime.images.of(self, "restore")
        if image.archived:
            raise RuntimeFailure("restore", "the image is archived")
        self.runtime.processes[self.instance_id] = Process(
            image.boot, image.served, sleep_level=image.sleep_level, command=image.command, restored=True
        )
        self.runtime.leaks.pop(self.instance_id, None)
        self.runtime.restored_on[self.instance_id] = dict(gpus or {})
        self.measure()

    def promote(self) -> None:
        self.runtime.calls["promote"] += 1
        images = self.runtime.images.there
        if self.beside and self.image in images:
            images[self.key] = images.pop(self.image)
        self.beside = False

    def _end(self) -> None:
        process = self.runtime.processes.pop(self.instance_id, None)
        self.measure()
        if process is not None and not process.exited.done():
            process.exited.set_result("signal 9")

    async def kill(self) -> None:
        await self.runtime._enter("kill")
        self._end()

    async def remove(self) -> None:
        await self.runtime._enter("remove")
        self.forget()

    def forget(self) -> None:
        """Nothing of it is left, but an image that it shares."""
        self._end()
        if not self.runtime.shares_images:
            self.runtime.images.there.pop(self.instance_id, None)
        self.runtime.engines.pop(self.instance_id, None)


class FakeImages:
    """What the fake runtime keeps."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime
        self.there: dict[str, Image] = {}
        self.quarantined: dict[str, Image] = {}
        self.keeps_copies = False
        """Whether copies of images stay in the archive."""
        self.archive_copies: set[str] = set()
        """The owners of those images."""
        self.footprints: dict[str, Footprint] = {}

    def of(self, engine: EngineProcess, operation: str) -> Image:
        image = self.there.get(engine.image)
        if image is None:
            raise RuntimeFailure(operation, "no image")
        return image

    async def fitting(self, models: Mapping[str, ModelSettings]) -> Mapping[str, ImageFacts]:
        await self.runtime._enter("fitting")
        if not self.runtime.shares_images:
            return {}
        return {key: i.facts for key, i in self.there.items() if key in models and i.command == _command(models[key])}

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        return None

    async def footprint(self, key: str) -> Footprint | None:
        return self.footprints.get(key)

    async def discard(self, engine: EngineProcess) -> None:
        await self.runtime._enter("discard_image")
        self.there.pop(engine.image, None)

    async def verify(self, engine: EngineProcess, *, whole: bool) -> None:
        await self.runtime._enter("verify_image" if whole else "look_at_image")

    async def quarantine(self, engine: EngineProcess, *, keep_copy: bool = False) -> bool:
        await self.runtime._enter("quarantine_image")
        owner = engine.image
        image = self.there.pop(owner, None)
        if image is not None:
            self.quarantined[owner] = image
            if keep_copy and owner in self.archive_copies:
                self.there[owner] = replace(image, archived=True)
                return True
        self.archive_copies.discard(owner)
        return False

    async def copy_to_archive(self, engine: EngineProcess) -> None:
        await self.runtime._enter("copy_to_archive")
        self.of(engine, "archive")
        if self.keeps_copies:
            self.archive_copies.add(engine.image)

    async def archive(self, engine: EngineProcess) -> None:
        await self.runtime._enter("archive_image")
        self.of(engine, "archive").archived = True

    async def unarchive(self, engine: EngineProcess) -> None:
        await self.runtime._enter("unarchive_image")
        self.of(engine, "unarchive").archived = False


def _command(model: ModelSettings) -> list[str]:
    assert model.process is not None
    return model.process.command


class FakeEngine:
    """What EngineClient is to a real engine, to a process of the fake runtime."""

    def __init__(self, runtime: FakeRuntime, engine: EngineProcess, model: ModelSettings | None = None) -> None:
        self.runtime = runtime
        self.model = model
        self.engine = engine
        self.base_url = engine.base_url
        self.connected = False
        self.sleeps = True
        self.silent_s = 0.0
        self.answer = "canary"

    def _process(self, stage: str) -> Process:
        process = self.runtime.processes.get(self.engine.instance_id)
        if process is None or process.frozen or not process.listens:
            raise EngineError(stage, "no answer")
        self.connected = True
        return process

    async def wait_healthy(self, path: str, interval_s: float) -> None:
        await self.runtime._enter("health")
        while not await self.healthy(path):
            await asyncio.sleep(interval_s if self.runtime.takes_s else 0)

    async def healthy(self, path: str) -> bool:
        process = self.runtime.processes.get(self.engine.instance_id)
        return process is not None and process.healthy and process.listens and not process.frozen

    async def metrics(self, most_bytes: int) -> bytes | None:
        self._process("metrics")
        return None

    async def loads(self, path: str) -> bool:
        process = self.runtime.processes.get(self.engine.instance_id)
        return process is None or not process.listens

    async def is_sleeping(self) -> bool | None:
        return self._process("probe").sleep_level > 0 if self.sleeps else None

    async def complete(self, stage: str, prompt: str, max_tokens: int) -> str | None:
        self._process(stage)
        await self.runtime._enter(stage)
        return "text"

    async def canary(self) -> str | None:
        process = self._process("canary")
        await self.runtime._enter("canary")
        return f"{self.answer}" if process.sleep_level == 0 else "garbage"

    async def max_model_len(self) -> int | None:
        self._process("warmup")
        return self.runtime.max_model_len

    async def warm_up(self, settings: WarmupSettings) -> list[dict[str, float]]:
        for _ in range(settings.requests):
            await self.complete("warmup", settings.prompt, settings.max_tokens)
        return [{"ttft_s": 0.1, "total_s": 0.2, "tokens": 8.0}] * settings.requests

    async def reseed_gap(self) -> str | None:
        self._process("reseed")
        gap = kinds.of(self.model).reseed_gap(self.model) if self.model is not None else None
        return gap or self.runtime.reseed_gap

    async def reseed(self) -> str | None:
        process = self._process("reseed")
        await self.runtime._enter("reseed")
        process.entropy = os.urandom(32).hex().encode()
        return await self.reseed_gap()

    async def sleep(self, level: int) -> None:
        process = self._process("sleep")
        await self.runtime._enter("sleep")
        process.sleep_level = level
        self.runtime.engines[self.engine.instance_id].measure()

    async def save_weights(self) -> int:
        process = self._process("save_weights")
        await self.runtime._enter("save_weights")
        self.runtime.copies.add(process.boot)
        return 1 << 20

    async def wake_up(self, level: int, stages: Stages, *, copied: bool = False) -> bool:
        process = self._process("wake_up")
        with stages.measure("wake_up"):
            await self.runtime._enter("wake_up")
        process.sleep_level = 0
        self.runtime.engines[self.engine.instance_id].measure()
        if level < 2:
            return True
        good = copied and process.boot in self.runtime.copies
        if not good:
            with stages.measure("reload_weights"):
                await self.runtime._enter("reload_weights")
            return not copied
        with stages.measure("load_weights"):
            await self.runtime._enter("load_weights")
        return True

    async def can_pause(self) -> Literal["never", "without a copy of its weights", "yes"]:
        process = self._process("probe")
        if not self.runtime.can_pause:
            return "never"
        return "yes" if process.boot in self.runtime.copies else "without a copy of its weights"

    async def is_paused(self) -> bool | None:
        return self._process("probe").paused if self.runtime.can_pause else None

    async def pause(self, stages: Stages) -> int:
        process = self._process("pause")
        process.paused = True
        await self.runtime._enter("pause")
        self.runtime.engines[self.engine.instance_id].measure()
        return 1 << 20

    async def unpause(self, stages: Stages) -> bool:
        process = self._process("unpause")
        await self.runtime._enter("unpause")
        process.paused = False
        self.runtime.engines[self.engine.instance_id].measure()
        return process.boot in self.runtime.copies

    async def end_pauses(self) -> None:
        await self.runtime._enter("end_pauses")

    async def disconnect(self) -> None:
        self.connected = False

    def give_up(self, reason: str) -> None:
        self.silent_s = 0.0


class Rig:
    """A pool on fakes: `rig.pool`, `rig.runtime`, `rig.clock`, `rig.metrics`, `rig.nvml`.

    `takes`: there is a GPU, and this is what the models' engines hold of it (`FakeRuntime.takes`).
    `places`: there are two, and these are whose (`FakeRuntime.places`).
    `clock`: the pool's instead of `rig.clock`.
    """

    def __init__(
        self,
        models: dict[str, dict[str, Any]] | None = None,
        *,
        shares_images: bool = False,
        takes: dict[str, tuple[int, int]] | None = None,
        memory: Callable[[], Memory] | None = None,
        places: dict[str, tuple[int, ...]] | None = None,
        probes: LadderProbes | None = None,
        unix_s: Callable[[], float] = time.time,
        clock: Callable[[], float] | None = None,
        **pool: Any,
    ) -> None:
        entries = models or {"demo": {}}
        self.settings = Settings(
            models={key: model_settings(**entry) for key, entry in entries.items()},
            pool={"switch_after": "10s", **pool},
        )
        self.runtime = FakeRuntime(shares_images=shares_images, nvml=FakeNvml(gpus=1 if places is None else 2))
        self.runtime.places = places or {}
        self.nvml = self.runtime.nvml
        self.gpus = PromptGpus(driver=FakeDriver, monitor=lambda: self.nvml)
        if takes is not None:
            self.runtime.gpus, self.runtime.takes = self.gpus, takes
            assert self.gpus.open() is None
        self.clock = Clock()
        self.metrics = Metrics()
        self.engines: dict[str, FakeEngine] = {}
        self.pool = Pool(
            self.settings,
            {"process": self.runtime},
            self.metrics,
            clock=clock or self.clock,
            unix_s=unix_s,
            connect=self._connect,
            gpus=self.gpus if takes is not None else None,
            memory=memory,
            probes=probes,
        )

    def _connect(self, process: EngineProcess, served_name: str, model: ModelSettings) -> EngineClient:
        engine = FakeEngine(self.runtime, process, model)
        self.engines[process.instance_id] = engine
        return cast("EngineClient", engine)

    def states(self) -> dict[str, str]:
        """Instance id → state."""
        return {i["id"]: i["state"] for m in self.pool.status()["models"].values() for i in m["instances"]}

    async def until(self, **states: str) -> None:
        """Return when these instances (`demo_1="ready"`) have these states; "gone" for one that is not there."""
        wanted = {name[::-1].replace("_", "-", 1)[::-1]: state for name, state in states.items()}
        async with asyncio.timeout(5):
            while any(self.states().get(name, "gone") != state for name, state in wanted.items()):
                await asyncio.sleep(0)

    async def pass_time(self, seconds: float) -> None:
        """Move the clock, let the pool see it, and let what it started come to an end."""
        self.clock.now += seconds
        self.pool.tick()
        await settle()


async def ended(rigs: Iterable[Rig]) -> None:
    """Close them, whatever they wait for, and count what is left."""
    for rig in rigs:
        for gate in rig.runtime.gates.values():
            gate.set()
        await rig.pool.close()
        assert rig.states() == {}
        assert rig.runtime.processes == {}
        assert rig.pool.status()["leases"] == 0
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


def model_settings(**entry: Any) -> dict[str, Any]:
    """A model's table with a command that is never run."""
    return {"process": {"command": ["engine", "{port}"]}, "warmup": {"requests": 1}, **entry}


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(50):
        await asyncio.sleep(0)
