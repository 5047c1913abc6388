"""CUDA suspend and resume on a fake driver: states, errors, what runs side by side."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from proxy.gpu.cuda import CudaDriver, GpuError, Gpus, ProcessState
from proxy.gpu.nvml import Nvml
from tests.fake_cuda import GIB, LATE, FakeDriver, FakeNvml, gpus_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

R, L, C, F = (int(s) for s in ProcessState)


@pytest.fixture
def opened() -> Iterator[Callable[..., Gpus]]:
    made: list[Gpus] = []

    def open_(driver: FakeDriver, monitor: FakeNvml | None = None) -> Gpus:
        made.append(gpus_of(driver, monitor))
        return made[-1]

    yield open_
    for gpus in made:
        gpus.close()


async def test_every_cuda_process_goes_off_the_gpu_and_comes_back(opened: Callable[..., Gpus]) -> None:
    driver = FakeDriver(p1=R, p2=R)
    gpus = opened(driver)
    assert await gpus.states([1, 2, 3]) == {1: R, 2: R}
    assert await gpus.suspend([1, 2, 3]) == [1, 2]
    assert driver.states == {1: C, 2: C}
    assert await gpus.resume([1, 2, 3]) == [1, 2]
    assert driver.states == {1: R, 2: R}


async def test_processes_without_cuda_are_left_alone(opened: Callable[..., Gpus]) -> None:
    driver = FakeDriver()
    gpus = opened(driver)
    assert await gpus.suspend([1, 2]) == []
    assert await gpus.resume([1, 2]) == []
    assert await gpus.states([1, 2]) == {}
    assert set(driver.calls) == {"state"}


async def test_several_processes_are_worked_on_side_by_side_and_the_loop_goes_on(opened: Callable[..., Gpus]) -> None:
    driver = FakeDriver(p1=R, p2=R, p3=R)
    driver.takes_s = 0.05
    gpus = opened(driver)
    suspending = asyncio.create_task(gpus.suspend([1, 2, 3]))
    turns = 0
    while not suspending.done():
        turns += 1
        await asyncio.sleep(0.001)
    assert driver.most_at_once == 3
    assert turns > 10


@pytest.mark.parametrize("state", [R, L, C, 7])
async def test_whatever_state_a_process_is_in_it_ends_up_suspended_then_running(
    opened: Callable[..., Gpus], state: int
) -> None:
    driver = FakeDriver(p1=state)
    gpus = opened(driver)
    await gpus.suspend([1])
    assert driver.states == {1: C}
    await gpus.resume([1])
    assert driver.states == {1: R}
    await gpus.resume([1])
    assert driver.states == {1: R}, "one that runs is left running"


async def test_a_lock_that_is_late_leaves_everything_running(opened: Callable[..., Gpus]) -> None:
    driver = FakeDriver(p1=R, p2=R)
    driver.failures["lock", 2] = LATE
    with pytest.raises(GpuError, match="lock of process 2: CUDA_ERROR_NOT_READY") as failure:
        await opened(driver).suspend([1, 2])
    assert failure.value.alive
    assert driver.states == {1: R, 2: R}


@pytest.mark.parametrize(
    ("way", "state", "call", "pid", "error"),
    [
        ("suspend", R, "lock", 2, "CUDA_ERROR_NOT_SUPPORTED"),
        ("suspend", R, "checkpoint", 2, "CUDA_ERROR_NOT_SUPPORTED"),
        ("resume", C, "restore", 1, "CUDA_ERROR_OUT_OF_MEMORY"),
        ("resume", C, "unlock", 1, "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
async def test_any_other_failure_on_the_way_down_or_up_means_the_process_is_of_no_use(
    opened: Callable[..., Gpus], way: str, state: int, call: str, pid: int, error: str
) -> None:
    driver = FakeDriver(p1=state, p2=state)
    driver.failures[call, pid] = error
    driver.leaves[pid] = F
    move = getattr(opened(driver), way)
    with pytest.raises(GpuError, match=f"{call} of process {pid}: {error}") as failure:
        await move([1, 2])
    assert not failure.value.alive
    with pytest.raises(GpuError, match=f"cannot {way}: process {pid} is failed"):
        await move([1, 2])


async def test_a_process_that_is_not_suspended_after_all_is_noticed(opened: Callable[..., Gpus]) -> None:
    class Lying(FakeDriver):
        def checkpoint(self, pid: int) -> None:
            self._call("checkpoint", pid, L, R)

    with pytest.raises(GpuError, match="was suspended, but: process 1 is running"):
        await opened(Lying(p1=R)).suspend([1])


async def test_memory_that_did_not_come_free_is_a_failure(opened: Callable[..., Gpus]) -> None:
    monitor = FakeNvml()
    monitor.held = {1: 4 << 20, 9: 70 * GIB}
    gpus = opened(FakeDriver(p1=R), monitor)
    assert await gpus.suspend([1]) == [1]
    await gpus.resume([1])
    monitor.held[1] = GIB
    with pytest.raises(GpuError, match="still holds 1024 MiB of GPU memory") as failure:
        await gpus.suspend([1])
    assert not failure.value.alive
    assert failure.value.leaked_bytes == GIB


async def test_who_is_cancelled_waits_until_the_driver_is_done(opened: Callable[..., Gpus]) -> None:
    driver = FakeDriver(p1=R)
    gpus = opened(driver)
    driver.takes_s = 0.1
    suspending = asyncio.create_task(gpus.suspend([1]))
    while not driver.at_once:
        await asyncio.sleep(0.001)
    suspending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await suspending
    assert driver.at_once == 0


async def test_memory_is_told_by_gpu_and_by_process(opened: Callable[..., Gpus]) -> None:
    monitor = FakeNvml()
    monitor.held = {1: 3 * GIB, 2: GIB, 9: GIB}
    gpus = opened(FakeDriver(), monitor)
    assert await gpus.held_bytes([1, 2, 3]) == 4 * GIB
    assert await gpus.held_by_gpu([1, 2, 3]) == {"GPU-1": 4 * GIB}
    (memory,) = await gpus.memory()
    assert (memory.index, memory.total_bytes, memory.free_bytes) == (0, 80 * GIB, 75 * GIB)
    monitor.broken = True
    assert (await gpus.memory(), await gpus.held_bytes([1]), await gpus.held_by_gpu([1])) == ([], 0, {})


@pytest.mark.parametrize(("version", "usable"), [("570.86.15", True), ("565.57.01", False), ("580.1", True)])
async def test_old_drivers_lack_the_tier(version: str, usable: bool) -> None:
    gpus = Gpus(driver=FakeDriver, monitor=lambda: FakeNvml(version))
    reason = gpus.open()
    assert gpus.usable is usable
    assert (reason is None) is usable
    gpus.close()


async def test_without_the_libraries_or_a_driver_it_is_said_what_is_missing() -> None:
    def no_library() -> FakeNvml:
        raise ModuleNotFoundError(name="pynvml")

    def no_driver() -> FakeDriver:
        raise RuntimeError("cuInit: CUDA_ERROR_NO_DEVICE")

    missing = Gpus(driver=FakeDriver, monitor=no_library)
    assert missing.open() == "the extra gpu is not installed (pynvml): make install EXTRAS=gpu, from the sources"
    assert "CUDA_ERROR_NO_DEVICE" in (Gpus(driver=no_driver, monitor=FakeNvml).open() or "")
    assert not missing.usable
    with pytest.raises(GpuError):
        await missing.suspend([1])


def test_the_real_libraries_either_work_or_say_why() -> None:
    gpus = Gpus(driver=CudaDriver, monitor=Nvml)
    assert (gpus.open() is None) is gpus.usable
    gpus.close()
