"""GPU memory, of GPUs and of processes on them, from NVML."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU's memory, in bytes."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What is not in use."""
        return self.total_bytes - self.used_bytes


class Monitor(Protocol):
    """What is asked of NVML."""

    def driver_version(self) -> str:
        """Such as ``580.159.04``."""

    def gpus(self) -> list[GpuMemory]:
        """Every GPU, by index."""

    def processes(self) -> dict[int, dict[str, int]]:
        """Host pid → UUID of a GPU → bytes of its memory that the process holds."""


class Nvml:
    """`pynvml` (nvidia-ml-py). Raises ImportError, or RuntimeError where there is no driver."""

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"NVML: {error}") from error

    def _handles(self) -> list[Any]:
        return [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]

    def driver_version(self) -> str:
        """See `Monitor`."""
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def gpus(self) -> list[GpuMemory]:
        """See `Monitor`."""
        found = []
        for index, handle in enumerate(self._handles()):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            name, uuid = self._nvml.nvmlDeviceGetName(handle), self._nvml.nvmlDeviceGetUUID(handle)
            found.append(GpuMemory(index, str(name), str(uuid), int(memory.total), int(memory.used)))
        return found

    def processes(self) -> dict[int, dict[str, int]]:
        """See `Monitor`."""
        held: dict[int, dict[str, int]] = {}
        for handle in self._handles():
            uuid = str(self._nvml.nvmlDeviceGetUUID(handle))
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                by_gpu = held.setdefault(process.pid, {})
                by_gpu[uuid] = by_gpu.get(uuid, 0) + int(process.usedGpuMemory or 0)
        return held


class MemoryReader:
    """What NVML says, asked in threads; nothing where there is no NVML."""

    def __init__(self) -> None:
        self._monitor: Monitor | None = None

    @property
    def measurable(self) -> bool:
        """Whether there is an NVML to ask."""
        return self._monitor is not None

    async def memory(self) -> list[GpuMemory]:
        """Every GPU's memory; none where NVML cannot be asked."""
        return await self._ask(lambda monitor: monitor.gpus(), [])

    async def held_bytes(self, pids: Iterable[int]) -> int:
        """GPU memory that these processes hold, in bytes."""
        return sum((await self.held_by_gpu(pids)).values())

    async def held_by_gpu(self, pids: Iterable[int]) -> dict[str, int]:
        """UUID of a GPU → bytes of its memory that these processes hold; empty where NVML cannot be asked."""
        held: Mapping[int, Mapping[str, int]] = await self._ask(lambda monitor: monitor.processes(), {})
        total: dict[str, int] = {}
        for pid in pids:
            for uuid, count in held.get(pid, {}).items():
                total[uuid] = total.get(uuid, 0) + count
        return total

    async def _ask(self, question: Callable[[Monitor], T], otherwise: T) -> T:
        monitor = self._monitor
        if monitor is not None:
            with contextlib.suppress(Exception):  # NVML's own errors: a figure less, and nothing worse
                return await asyncio.to_thread(question, monitor)
        return otherwise
