"""A CUDA driver and an NVML that tests hold in their hands, with the real ones' states and errors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, TypeVar, cast

from proxy.gpu.cuda import NOT_INITIALIZED, DriverError, Gpus, ProcessState
from proxy.gpu.nvml import GpuMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from proxy.gpu.nvml import Monitor

T = TypeVar("T")
GIB = 1 << 30
ILLEGAL = "CUDA_ERROR_ILLEGAL_STATE"
LATE = "CUDA_ERROR_NOT_READY"


class FakeDriver:
    """CUDA processes by pid; everything else never used CUDA.

    `failures[call, pid]` is what the driver answers instead; `leaves[pid]` the state a failed process is left in.
    """

    def __init__(self, **processes: int) -> None:
        self.states: dict[int, int] = {int(name[1:]): state for name, state in processes.items()}
        self.failures: dict[tuple[str, int], str] = {}
        self.leaves: dict[int, int] = {}
        self.moves: dict[int, dict[str, str]] = {}
        """Process → the GPUs that it was restored onto, where they are others."""
        self.calls: Counter[str] = Counter()
        self.takes_s = 0.0
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def _call(self, call: str, pid: int, needs: int | None, then: int | None) -> None:
        with self._lock:
            self.calls[call] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.takes_s)
        with self._lock:
            self.at_once -= 1
            if pid not in self.states:
                raise DriverError(call, pid, NOT_INITIALIZED)
            if failure := self.failures.get((call, pid)):
                self.states[pid] = self.leaves.get(pid, self.states[pid])
                raise DriverError(call, pid, failure)
            if needs is not None and self.states[pid] != needs and self.states[pid] in list(ProcessState):
                raise DriverError(call, pid, ILLEGAL)
            if then is not None:
                self.states[pid] = then

    def state(self, pid: int) -> int:
        self._call("state", pid, None, None)
        return self.states[pid]

    def lock(self, pid: int, timeout_ms: int) -> None:
        self._call("lock", pid, ProcessState.RUNNING, ProcessState.LOCKED)

    def checkpoint(self, pid: int) -> None:
        self._call("checkpoint", pid, ProcessState.LOCKED, ProcessState.CHECKPOINTED)

    def restore(self, pid: int, moves: Mapping[str, str]) -> None:
        self._call("restore", pid, ProcessState.CHECKPOINTED, ProcessState.LOCKED)
        self.moves[pid] = dict(moves)

    def unlock(self, pid: int) -> None:
        self._call("unlock", pid, ProcessState.LOCKED, ProcessState.RUNNING)


class FakeNvml:
    """GPUs of 80 GiB; `held` by pid, on the first one, and on the one after it where `held_on_second` says so."""

    UUID = "GPU-1"
    SECOND = "GPU-2"

    def __init__(self, version: str = "580.159.04", gpus: int = 1) -> None:
        self.version = version
        self.uuids = (self.UUID, self.SECOND)[:gpus]
        self.held: dict[int, int] = {}
        self.held_on_second: dict[int, int] = {}
        self.broken = False

    def driver_version(self) -> str:
        return self.version

    def gpus(self) -> list[GpuMemory]:
        if self.broken:
            raise RuntimeError("NVML_ERROR_GPU_IS_LOST")
        used = [sum(self.held.values()), sum(self.held_on_second.values())]
        return [GpuMemory(index, "NVIDIA H100", uuid, 80 * GIB, used[index]) for index, uuid in enumerate(self.uuids)]

    def processes(self) -> dict[int, dict[str, int]]:
        if self.broken:
            raise RuntimeError("NVML_ERROR_GPU_IS_LOST")
        held = {pid: {self.UUID: count} for pid, count in self.held.items()}
        for pid, count in self.held_on_second.items():
            held.setdefault(pid, {})[self.SECOND] = count
        return held


class PromptGpus(Gpus):
    """Asks its monitor at once instead of in a thread, so that a test knows when it is answered."""

    async def _ask(self, question: Callable[[Monitor], T], otherwise: T) -> T:
        with contextlib.suppress(RuntimeError):
            return question(cast("Monitor", self._monitor))
        return otherwise


def gpus_of(driver: FakeDriver, monitor: FakeNvml | None = None) -> Gpus:
    """Gpus on fakes, open."""
    made = Gpus(driver=lambda: driver, monitor=lambda: monitor or FakeNvml())
    assert made.open() is None
    return made
