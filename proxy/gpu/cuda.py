"""CUDA suspend and resume by process, through the driver API in-process.

A process's CUDA state is locked, copied to its own host memory ("checkpointed", which frees the GPU), copied back
("restored") and unlocked (CUDA driver API, "CUDA Checkpointing", driver 570 or later; cuda-checkpoint's README). Calls
in this process avoid the 2.7 s of start-up that each `cuda-checkpoint` command costs. All calls block, release the GIL
and run in threads, those for several processes side by side.

Needs `cuda-bindings` and `nvidia-ml-py` (the extra `gpu`); without them, or without a GPU, `Gpus.open` says
why and nothing else is lost.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import importlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from uuid import UUID

from proxy.errors import WarmpoolError
from proxy.gpu.nvml import MemoryReader, Monitor, Nvml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

T = TypeVar("T")

MIN_DRIVER: Final = 570
"""The first driver with the checkpoint API."""
REMAP_DRIVER: Final = 580
"""The first that restores onto another GPU of the same chip."""
NOT_INITIALIZED: Final = "CUDA_ERROR_NOT_INITIALIZED"
"""The answer for a process that never used CUDA."""
_NOT_READY: Final = "CUDA_ERROR_NOT_READY"
"""A lock that timed out: the process runs on."""
_SKIPPED: Final = frozenset({NOT_INITIALIZED, "CUDA_ERROR_INVALID_VALUE"})
"""No CUDA process, or no process any more."""
MAX_LEFT_BYTES: Final = 64 << 20
"""What suspended processes may still hold; 4 MiB was seen. More is a leak, and they are of no use."""
PLUGINS: Final = (
    Path("/usr/lib/criu/cuda_plugin.so"),
    Path("/usr/lib/x86_64-linux-gnu/criu/cuda_plugin.so"),
    Path("/usr/lib/aarch64-linux-gnu/criu/cuda_plugin.so"),
    Path("/usr/local/lib/criu/cuda_plugin.so"),
    Path("/opt/warmpool-criu/usr/lib/criu/cuda_plugin.so"),
)


class GpuError(WarmpoolError):
    """A call of the driver failed; `alive` says whether the process is as it was before.

    `leaked_bytes`: GPU memory that should have come free and did not, if that is the failure.
    """

    def __init__(self, message: str, *, alive: bool = False, leaked_bytes: int = 0) -> None:
        self.alive = alive
        self.leaked_bytes = leaked_bytes
        super().__init__(message)


class DriverError(WarmpoolError):
    """What the driver answered, by the name of its CUresult."""

    def __init__(self, call: str, pid: int, result: str) -> None:
        self.result = result
        super().__init__(f"{call} of process {pid}: {result}")


class ProcessState(enum.IntEnum):
    """CUprocessState of cuda.h."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3


class Driver(Protocol):
    """The calls of the CUDA driver that are used; each raises DriverError."""

    def state(self, pid: int) -> int:
        """The CUprocessState of a process; a number that `ProcessState` lacks is passed on."""

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Block further CUDA calls of a running process and wait for those under way."""

    def checkpoint(self, pid: int) -> None:
        """Copy a locked process's GPU memory to its host memory and free the GPU."""

    def restore(self, pid: int, moves: Mapping[str, str]) -> None:
        """Copy it back; with `moves`, UUIDs old → new of every GPU that it sees, onto other GPUs of the same chip."""

    def unlock(self, pid: int) -> None:
        """Let a locked process go on."""


class CudaDriver:
    """`cuda.bindings.driver`. Raises ImportError, or OSError and RuntimeError where there is no driver."""

    def __init__(self) -> None:
        self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        (result,) = self._cuda.cuInit(0)
        if result != self._cuda.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuInit: {result.name}")

    def _check(self, call: str, pid: int, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        result, *values = answer
        if result != self._cuda.CUresult.CUDA_SUCCESS:
            raise DriverError(call, pid, getattr(result, "name", str(result)))
        return tuple(values)

    def state(self, pid: int) -> int:
        """See `Driver`."""
        (state,) = self._check("state", pid, self._cuda.cuCheckpointProcessGetState(pid))
        return int(state)

    def lock(self, pid: int, timeout_ms: int) -> None:
        """See `Driver`."""
        arguments = self._cuda.CUcheckpointLockArgs()
        arguments.timeoutMs = timeout_ms
        self._check("lock", pid, self._cuda.cuCheckpointProcessLock(pid, arguments))

    def checkpoint(self, pid: int) -> None:
        """See `Driver`."""
        self._check("checkpoint", pid, self._cuda.cuCheckpointProcessCheckpoint(pid, None))

    def restore(self, pid: int, moves: Mapping[str, str]) -> None:
        """See `Driver`."""
        arguments = self.restore_arguments(moves) if moves else None
        self._check("restore", pid, self._cuda.cuCheckpointProcessRestore(pid, arguments))

    def restore_arguments(self, moves: Mapping[str, str]) -> Any:
        """CUcheckpointRestoreArgs for UUIDs old → new, as NVML writes them."""
        arguments = self._cuda.CUcheckpointRestoreArgs()
        arguments.gpuPairs = [self._pair(old, new) for old, new in moves.items()]
        arguments.gpuPairsCount = len(moves)
        return arguments

    def _pair(self, old: str, new: str) -> Any:
        pair = self._cuda.CUcheckpointGpuPair()
        for field, text in (("oldUuid", old), ("newUuid", new)):
            value = self._cuda.CUuuid()
            uuid = UUID(text.removeprefix("GPU-")).bytes
            ctypes.memmove(value.getPtr(), uuid, len(uuid))  # its attribute `bytes` is read-only
            setattr(pair, field, value)
        return pair

    def unlock(self, pid: int) -> None:
        """See `Driver`."""
        self._check("unlock", pid, self._cuda.cuCheckpointProcessUnlock(pid, None))


def criu_has_cuda_plugin() -> bool:
    """Whether CRIU saves and restores CUDA state itself; then nobody else may.

    Its plugin does nothing without NVIDIA's cuda-checkpoint in PATH (CRIU's cuda_plugin.c).
    """
    return any(path.exists() for path in PLUGINS) and shutil.which("cuda-checkpoint") is not None


class Gpus(MemoryReader):
    """Suspends and resumes processes on GPUs, and says what they hold. `open` before use."""

    def __init__(
        self,
        *,
        driver: Callable[[], Driver] = CudaDriver,
        monitor: Callable[[], Monitor] = Nvml,
        lock_timeout_s: float = 10.0,
    ) -> None:
        super().__init__()
        self._make_driver, self._make_monitor = driver, monitor
        self._lock_timeout_ms = max(1, round(lock_timeout_s * 1000))
        self._driver: Driver | None = None
        self.driver_version = ""
        """As of `open`."""
        self._threads: ThreadPoolExecutor | None = None

    def open(self) -> str | None:
        """None when CUDA processes can be suspended here, else why not; nothing else is lost then."""
        if self._driver is not None:
            return None
        try:
            monitor = self._monitor = self._make_monitor()
            version = self.driver_version = monitor.driver_version()
            self._driver = self._make_driver()
        except ImportError as error:
            return f"the extra gpu is not installed ({error.name}): make install EXTRAS=gpu, from the sources"
        except Exception as error:  # noqa: BLE001 - NVIDIA's libraries raise their own where there is no driver
            return f"no usable NVIDIA driver: {error}"
        if int(version.split(".")[0]) < MIN_DRIVER:
            self._driver = None
            return f"NVIDIA driver {version}: {MIN_DRIVER} or later is needed"
        # Enough for every process of a few instances at once; the calls do nothing but wait.
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="cuda")
        return None

    def close(self) -> None:
        """Let the threads go."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None
        self._driver = None

    @property
    def usable(self) -> bool:
        """Whether `open` found all that is needed."""
        return self._driver is not None

    @property
    def can_move(self) -> bool:
        """Whether a process can be resumed on another GPU than it was suspended on."""
        return self.usable and int(self.driver_version.split(".")[0]) >= REMAP_DRIVER

    async def _side_by_side(self, work: Callable[[Driver, int], T], pids: Iterable[int]) -> list[T | BaseException]:
        driver, threads = self._driver, self._threads
        if driver is None or threads is None:
            raise GpuError("CUDA processes cannot be suspended here", alive=True)
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(threads, work, driver, pid) for pid in pids]
        # A call cannot be taken back: who is cancelled waits until the driver is done with the process.
        waiting = asyncio.gather(*calls, return_exceptions=True)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await waiting
            raise

    async def states(self, pids: Iterable[int]) -> dict[int, int]:
        """The CUDA processes among these, and the state of each (`ProcessState`, or a number unknown to it)."""
        asked = list(pids)
        answers = await self._side_by_side(_state_of, asked)
        return {pid: answer for pid, answer in zip(asked, answers, strict=True) if isinstance(answer, int)}

    async def suspend(self, pids: Iterable[int]) -> list[int]:
        """Free the GPU of every CUDA process among these; those processes.

        Raises GpuError: with `alive`, when a process could not be locked in time and all run on; without, when one is
        of no use any more.
        """
        states = await self.states(pids)
        _refuse(states, {ProcessState.FAILED}, "cannot suspend")
        todo = [pid for pid, state in states.items() if state != ProcessState.CHECKPOINTED]
        unlocked = [pid for pid in todo if states[pid] != ProcessState.LOCKED]
        locked = await self._side_by_side(lambda driver, pid: driver.lock(pid, self._lock_timeout_ms), unlocked)
        refused = [error for error in locked if isinstance(error, BaseException)]
        if refused:
            await self._unlock([pid for pid, error in zip(unlocked, locked, strict=True) if error is None])
            late = all(isinstance(error, DriverError) and error.result == _NOT_READY for error in refused)
            raise GpuError(str(refused[0]), alive=late)
        _raise_first(await self._side_by_side(lambda driver, pid: driver.checkpoint(pid), todo))
        after = await self.states(todo)
        _refuse(after, {ProcessState.RUNNING, ProcessState.LOCKED, ProcessState.FAILED}, "was suspended, but")
        if len(after) != len(todo):
            raise GpuError("was suspended, but a process is gone")
        left = await self.held_bytes(states)
        if left > MAX_LEFT_BYTES:
            raise GpuError(f"was suspended, but still holds {left >> 20} MiB of GPU memory", leaked_bytes=left)
        return list(states)

    async def _unlock(self, pids: Sequence[int]) -> None:
        _raise_first(await self._side_by_side(lambda driver, pid: driver.unlock(pid), pids))

    async def resume(self, pids: Iterable[int], moves: Mapping[str, str] | None = None) -> list[int]:
        """Bring every suspended CUDA process among these back to its GPU; those processes.

        `moves`: to other GPUs of the same chip (UUIDs old → new, of every GPU that they see; driver 580).
        Raises GpuError; the processes are of no use then.
        """
        states = await self.states(pids)
        _refuse(states, {ProcessState.FAILED}, "cannot resume")

        def bring_back(driver: Driver, pid: int) -> None:
            if states[pid] != ProcessState.LOCKED and states[pid] != ProcessState.RUNNING:
                driver.restore(pid, moves or {})
            if states[pid] != ProcessState.RUNNING:
                driver.unlock(pid)

        _raise_first(await self._side_by_side(bring_back, states))
        return list(states)


def _state_of(driver: Driver, pid: int) -> int | None:
    try:
        return driver.state(pid)
    except DriverError as error:
        if error.result in _SKIPPED:
            return None
        raise


def _raise_first(results: Iterable[object]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise GpuError(str(result)) from result


def _refuse(states: Mapping[int, int], bad: set[ProcessState], text: str) -> None:
    wrong = [f"process {pid} is {ProcessState(state).name.lower()}" for pid, state in states.items() if state in bad]
    if wrong:
        raise GpuError(f"{text}: {', '.join(wrong)}")
