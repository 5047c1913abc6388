"""The CUDA part of the runtimes: real processes and real CRIU, a fake driver that takes them for CUDA processes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from proxy.checkpoint.store import CheckpointStore
from proxy.config.runtime import PodmanRuntimeSettings, ProcessRuntimeSettings
from proxy.config.settings import Settings
from proxy.errors import RuntimeFailure
from proxy.gpu.cuda import DriverError, Gpus, ProcessState
from proxy.gpu.nvml import GpuMemory
from proxy.host import processes
from proxy.pool.gpu_accounting import READY
from proxy.pool.pool import Pool
from proxy.runtime import cuda
from proxy.runtime.ladder_probes import LadderProbes
from proxy.runtime.podman.runtime import PodmanRuntime
from proxy.runtime.state_dir import Claim
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier
from tests.fake_cuda import GIB, FakeDriver, FakeNvml, gpus_of
from tests.forked import ForkingRuntime
from tests.podman_bench import engine_image, model_of, why_no_podman
from tests.runtime_contract import FACTS
from tests.support import HttpBench, engine_settings, get_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.config.model import ModelSettings
    from proxy.runtime.base import EngineProcess


_ENGINE = "-m\0loadtest.engine\0"
_MARK = f"{processes.MARK}="


class EveryEngine(FakeDriver):
    """Takes every load-test engine for a CUDA process; one that was just restored by CRIU is as it was dumped."""

    def __init__(self) -> None:
        super().__init__()
        self.dumped = int(ProcessState.RUNNING)
        self.refused = ""
        """A call that this driver does not support for them."""

    def restore(self, pid: int, moves: Mapping[str, str]) -> None:
        if self.refused == "restore":
            raise DriverError("restore", pid, "CUDA_ERROR_NOT_SUPPORTED")
        super().restore(pid, moves)

    def state(self, pid: int) -> int:
        if pid not in self.states and _is_engine(pid):
            self.states[pid] = self.dumped
        return super().state(pid)

    def checkpoint(self, pid: int) -> None:
        super().checkpoint(pid)
        self.dumped = self.states[pid]


def _is_engine(pid: int) -> bool:
    """By its command line, which those that are forked share with what forks them, or by the runtime's mark."""
    try:
        return _ENGINE in Path(f"/proc/{pid}/cmdline").read_text() or _MARK in Path(f"/proc/{pid}/environ").read_text()
    except OSError:
        return False


class Bench(HttpBench):
    """A runtime with a fake driver."""

    def __init__(
        self, runtime: Any, driver: EveryEngine, nvml: FakeNvml, model: ModelSettings, store: CheckpointStore
    ) -> None:
        self.runtime, self.driver, self.nvml, self.model, self.store = runtime, driver, nvml, model, store

    async def start(self) -> EngineProcess:
        engine: EngineProcess = await self.runtime.start("demo-1", "demo", self.model)
        await self.healthy(engine)
        return engine


@pytest.fixture(params=["process", pytest.param("podman", marks=pytest.mark.podman)])
async def bench(request: pytest.FixtureRequest, tmp_path: Path, images: Path) -> AsyncIterator[Bench]:
    driver, nvml = EveryEngine(), FakeNvml()
    gpus = gpus_of(driver, nvml)
    claim, store = Claim(tmp_path / "state"), CheckpointStore(images, 0)
    runtime: Any
    if request.param == "podman":
        if reason := why_no_podman():
            pytest.skip(reason=reason)
        engine_image()
        runtime, model = PodmanRuntime(PodmanRuntimeSettings(), claim=claim, store=store, gpus=gpus), model_of()
    else:
        runtime = ForkingRuntime(ProcessRuntimeSettings(), claim=claim, store=store, gpus=gpus)
        model = engine_settings()
    await runtime.open()
    made = Bench(runtime, driver, nvml, model, store)
    yield made
    for engine in list(runtime.engines.values()):
        await engine.remove()
        await runtime.images.discard(engine)
    await runtime.close()
    gpus.close()


@pytest.fixture
def checkpoints(bench: Bench) -> None:
    """Skips where the host cannot checkpoint."""
    tiers = bench.runtime.tiers()
    if Tier.CHECKPOINTED not in tiers.offered:
        pytest.skip(reason=tiers.missing[Tier.CHECKPOINTED])


async def test_suspending_frees_the_gpu_instead_of_freezing_the_process(bench: Bench) -> None:
    engine = await bench.start()
    pids = await _cuda_pids(bench, engine)
    bench.nvml.held = dict.fromkeys(pids, 1 << 20) | {1: 1 << 30}
    assert await engine.gpu_bytes() == {bench.nvml.UUID: len(pids) << 20}
    await engine.suspend()
    assert set(bench.driver.states.values()) == {ProcessState.CHECKPOINTED}
    assert await bench.answers(engine), "no longer on the GPU, but not frozen: it is not asked anything"
    await engine.resume()
    assert set(bench.driver.states.values()) == {ProcessState.RUNNING}


async def test_one_that_is_off_the_gpu_is_ended_without_being_asked(bench: Bench) -> None:
    engine = await bench.start()
    await engine.suspend()
    pids = await _cuda_pids(bench, engine)
    await engine.remove()
    assert not any(processes.alive(pid) for pid in pids)


async def test_a_dump_goes_off_the_gpu_and_a_restore_comes_back(bench: Bench, checkpoints: None) -> None:
    engine = await bench.start()
    boot = await bench.boot_id(engine)
    for suspended in (False, True):
        if suspended:
            await engine.suspend()
        stages = Stages()
        await engine.checkpoint(FACTS, stages)
        assert "cuda" in stages.seconds
        (image,) = bench.store.names()
        # How much came from the GPU is known where nothing had left it before.
        assert (processes.GPU_STATE in bench.store.load(image).details["memory"]) is not suspended
        bench.driver.states.clear()
        again = Stages()
        await engine.restore(again)
        assert "cuda" in again.seconds
        assert set(bench.driver.states.values()) == {ProcessState.RUNNING}
        await bench.healthy(engine)
        assert await bench.boot_id(engine) == boot


async def test_an_image_is_restored_onto_another_gpu(bench: Bench, checkpoints: None) -> None:
    bench.nvml.uuids = (bench.nvml.UUID, bench.nvml.SECOND)
    engine = await bench.start()
    bench.nvml.held = dict.fromkeys(await _cuda_pids(bench, engine), 1 << 20)
    for suspended in (False, True):
        if suspended:
            await engine.restore(Stages())
            bench.nvml.held = dict.fromkeys(await _cuda_pids(bench, engine), 1 << 20)
            await engine.suspend()
            bench.nvml.held.clear()
        await engine.checkpoint(FACTS, Stages())
        (image,) = bench.store.names()
        noted = bench.store.load(image).private["gpus"]
        assert [(gpu["uuid"], gpu["name"], gpu["used"]) for gpu in noted] == [
            ("GPU-1", "NVIDIA H100", True),
            ("GPU-2", "NVIDIA H100", False),
        ]
        for gpus, told in (({"GPU-1": "GPU-2"}, {"GPU-1": "GPU-2", "GPU-2": "GPU-1"}), ({}, {})):
            bench.driver.states.clear()
            bench.driver.moves.clear()
            await engine.restore(Stages(), gpus)
            await bench.healthy(engine)
            assert set(map(str, bench.driver.moves.values())) == {str(told)}
            await engine.kill()
        bench.driver.states.clear()
        with pytest.raises(RuntimeFailure, match="cannot go from GPU GPU-1"):
            await engine.restore(Stages(), {"GPU-1": "GPU-9"})
        await engine.kill()
        bench.driver.states.clear()
        await engine.restore(Stages())
        bench.nvml.held = dict.fromkeys(await _cuda_pids(bench, engine), 1 << 20)


async def test_an_engine_whose_lock_is_late_serves_on(bench: Bench, checkpoints: None) -> None:
    engine = await bench.start()
    pid = (await get_json(f"{engine.base_url}/debug/state"))["pid"]
    pids = [p for p in await _cuda_pids(bench, engine) if p != 0]
    bench.driver.failures.update({("lock", p): "CUDA_ERROR_NOT_READY" for p in (pid, *pids)})
    for operation in (engine.suspend(), engine.checkpoint(FACTS, Stages())):
        with pytest.raises(RuntimeFailure, match="CUDA: lock of process") as failure:
            await operation
        assert failure.value.alive
    assert await bench.answers(engine)
    assert bench.store.names() == []


async def _cuda_pids(bench: Bench, engine: EngineProcess) -> list[int]:
    return processes.tree(bench.runtime.engines[engine.instance_id].it.pid)


@pytest.mark.parametrize("call", ["checkpoint", "restore"])
async def test_an_engine_that_fails_on_the_gpu_is_of_no_use_and_can_be_ended(bench: Bench, call: str) -> None:
    engine = await bench.start()
    pids = await _cuda_pids(bench, engine)
    bench.driver.failures.update({(call, p): "CUDA_ERROR_UNKNOWN" for p in pids})
    with pytest.raises(RuntimeFailure, match=f"CUDA: {call} of process") as failure:
        await engine.suspend()
        await engine.resume()
    assert not failure.value.alive
    await engine.kill()
    assert not await bench.answers(engine)
    bench.driver.failures.clear()
    engine = await bench.start()
    await engine.suspend()
    await engine.resume()


async def test_a_dump_that_fails_brings_the_engine_back_to_the_gpu(
    bench: Bench, checkpoints: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await bench.start()

    async def fail(*_: object) -> Any:
        raise RuntimeFailure("checkpoint", "no", alive=True)

    if isinstance(bench.runtime, PodmanRuntime):
        monkeypatch.setattr(engine, "_dump", fail)
    else:
        monkeypatch.setattr("proxy.runtime.process.engine.command.run", fail)
    with pytest.raises(RuntimeFailure, match="no"):
        await engine.checkpoint(FACTS, Stages())
    assert set(bench.driver.states.values()) == {ProcessState.RUNNING}
    assert await bench.answers(engine)


async def test_where_criu_has_its_plugin_the_gpu_is_left_to_it(
    bench: Bench, checkpoints: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cuda_plugin.so").touch()
    monkeypatch.setattr("proxy.gpu.cuda.PLUGINS", (tmp_path / "cuda_plugin.so",))
    bench.runtime._parts.cuda.open()
    assert not bench.runtime._parts.cuda.left_to_criu, "the plugin does nothing without its program"
    (tmp_path / "cuda-checkpoint").write_text("#!/bin/sh\n")
    (tmp_path / "cuda-checkpoint").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    bench.runtime._parts.cuda.open()
    assert bench.runtime._parts.cuda.left_to_criu
    engine = await bench.start()
    await engine.suspend()
    await engine.checkpoint(FACTS, Stages())
    calls = bench.driver.calls["checkpoint"]
    bench.driver.states.clear()
    bench.driver.dumped = int(ProcessState.RUNNING)
    await engine.restore(Stages())
    await bench.healthy(engine)
    assert calls == 1, "only the suspend's; before the dump it was brought back"


async def test_without_a_gpu_processes_are_frozen(tmp_path: Path) -> None:
    without = cuda.Cuda(None)
    without.open()
    assert not without.usable
    assert await without.suspend("suspend", [1]) is False
    assert await without.before_dump([1], off_gpu=False) is False
    assert await without.held_bytes([1]) == 0
    assert await without.held_by_gpu(lambda: [1]) == {}
    with pytest.raises(RuntimeFailure, match="CUDA"):
        await without.resume("resume", [1])


class OneGpu:
    """NVML as it would be if every engine that we started held 60 GiB while its CUDA state is on the GPU."""

    def __init__(self, driver: EveryEngine) -> None:
        self.driver = driver

    def driver_version(self) -> str:
        return "580.159.04"

    def processes(self) -> dict[int, dict[str, int]]:
        ours = [p.pid for p in psutil.Process().children(recursive=True) if _is_engine(p.pid)]
        on_gpu = [pid for pid in ours if self.driver.states.get(pid) != ProcessState.CHECKPOINTED]
        return {pid: {"GPU-1": 60 * GIB} for pid in on_gpu}

    def gpus(self) -> list[GpuMemory]:
        used = sum(held["GPU-1"] for held in self.processes().values())
        return [GpuMemory(0, "NVIDIA H100", "GPU-1", 80 * GIB, used)]


async def test_two_models_of_which_one_fits_take_turns_on_the_gpu(tmp_path: Path) -> None:
    driver = EveryEngine()
    gpus = Gpus(driver=lambda: driver, monitor=lambda: OneGpu(driver))
    claim, store = Claim(tmp_path / "state"), CheckpointStore(tmp_path / "images", 0)
    runtime = ForkingRuntime(ProcessRuntimeSettings(), claim=claim, store=store, gpus=gpus)
    model = engine_settings(gpu_memory="60GiB")
    settings = Settings(models={"a": model, "b": model})
    pool = Pool(settings, {"process": runtime}, Metrics(), gpus=gpus)
    await pool.open()
    try:
        for _ in range(3):
            for name in ("a", "b"):
                async with await pool.lease(name):
                    assert len(OneGpu(driver).processes()) == 1
                await _measured(pool, name)
        states = {key: entry["instances"][0]["state"] for key, entry in pool.status()["models"].items()}
        assert states == {"a": "suspended", "b": "ready"}
        assert pool.status()["models"]["a"]["instances"][0]["cycles"] == 2
        figures = {"GPU-1": 60 * GIB}
        held = pool._state.gpu_accounting.figures("b")
        assert held == {"ready": figures, "sleeping": figures}, "so it has to be suspended first"
    finally:
        await pool.close()
        gpus.close()


async def _measured(pool: Pool, name: str) -> None:
    """Return when the pool knows what the model's engine holds."""
    async with asyncio.timeout(30):
        while not pool._state.gpu_accounting.knows(name, READY):
            await asyncio.sleep(0.01)


class TwoGpus(OneGpu):
    """The same with 20 GiB on each of two GPUs."""

    def processes(self) -> dict[int, dict[str, int]]:
        return {pid: {"GPU-1": 20 * GIB, "GPU-2": 20 * GIB} for pid in super().processes()}

    def gpus(self) -> list[GpuMemory]:
        used = sum(held["GPU-1"] for held in self.processes().values())
        return [GpuMemory(i, "NVIDIA H100", f"GPU-{i + 1}", 80 * GIB, used) for i in range(2)]


@pytest.mark.parametrize("comes_back", [True, False])
async def test_an_engine_on_two_gpus_is_suspended_and_restored_for_a_trial_first(
    tmp_path: Path, images: Path, comes_back: bool
) -> None:
    driver = EveryEngine()
    gpus = Gpus(driver=lambda: driver, monitor=lambda: TwoGpus(driver))
    claim, store = Claim(tmp_path / "state"), CheckpointStore(images, 0)
    runtime = ForkingRuntime(ProcessRuntimeSettings(), claim=claim, store=store, gpus=gpus)
    idle = {"sleeping": "100ms", "suspended": "200ms", "checkpointed": "300ms"}
    settings = Settings(models={"wide": engine_settings(idle=idle)})
    probes = LadderProbes(tmp_path / "probes.json")
    pool = Pool(settings, {"process": runtime}, Metrics(), gpus=gpus, probes=probes)
    await pool.open()
    try:
        if Tier.CHECKPOINTED not in runtime.tiers().offered:
            pytest.skip(reason=runtime.tiers().missing[Tier.CHECKPOINTED])
        if not comes_back:
            driver.refused = "restore"
        async with await pool.lease("wide"):
            pass
        wanted = {"checkpointed"} if comes_back else {"stopped"}
        await _rests_on(pool, wanted)
        missing = pool.status()["models"]["wide"]["missing_tiers"]
        if comes_back:
            assert driver.calls["restore"] == 2, "after the suspend, and after CRIU's restore"
            assert missing == {}
        else:
            assert "CUDA_ERROR_NOT_SUPPORTED" in missing["suspended"]
            assert store.names() == []
            assert not TwoGpus(driver).processes(), "it has ended"
        async with await pool.lease("wide") as lease:
            assert lease.wake is not None
            assert lease.wake.found is (Tier.CHECKPOINTED if comes_back else Tier.STOPPED)
        await _rests_on(pool, {"checkpointed"} if comes_back else {"sleeping"})
    finally:
        await pool.close()
        gpus.close()


async def _rests_on(pool: Pool, tiers: set[str]) -> None:
    async with asyncio.timeout(60):
        while True:
            await pool.settled()
            if pool.status()["models"]["wide"]["tier"] in tiers:
                return
            await asyncio.sleep(0.02)
