"""The CUDA part of a runtime's operations: which processes use a GPU, and suspending and resuming those."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from proxy.errors import RuntimeFailure
from proxy.gpu import cuda, placement
from proxy.gpu.placement import ImageGpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from proxy.gpu.cuda import Gpus


class Cuda:
    """What a runtime does with the GPU; without `gpus`, or where they are not usable, nothing uses CUDA."""

    def __init__(self, gpus: Gpus | None) -> None:
        self._gpus = gpus
        self.reason: str | None = "no GPU support was asked for"
        """Why CUDA processes cannot be suspended here; None when they can."""
        self.left_to_criu = False
        """CRIU has a plugin that does this part of a dump and a restore."""

    def open(self) -> None:
        """Find out what there is."""
        if self._gpus is not None:
            self.reason = self._gpus.open()
            self.left_to_criu = cuda.criu_has_cuda_plugin()

    @property
    def driver_version(self) -> str:
        """Such as ``580.159.04``; empty where there is none."""
        return self._gpus.driver_version if self._gpus is not None else ""

    async def held_bytes(self, pids: Sequence[int]) -> int:
        """GPU memory that these processes hold, which a suspend moves to host memory."""
        return await self._gpus.held_bytes(pids) if self._gpus is not None else 0

    async def held_by_gpu(self, pids: Callable[[], Sequence[int]]) -> Mapping[str, int]:
        """UUID of a GPU → bytes of its memory that these processes hold; see `Runtime.gpu_bytes`.

        `pids` is asked in a thread, and only where there is a GPU: it may read all of /proc.
        """
        if self._gpus is None or not self._gpus.measurable:
            return {}
        return await self._gpus.held_by_gpu(await asyncio.to_thread(pids))

    @property
    def usable(self) -> bool:
        """Whether CUDA processes can be suspended here."""
        return self._gpus is not None and self._gpus.usable

    async def suspend(self, operation: str, pids: Sequence[int]) -> bool:
        """Free the GPU; False where none of these uses one. Raises RuntimeFailure."""
        if self._gpus is None or not self.usable:
            return False
        try:
            return bool(await self._gpus.suspend(pids))
        except cuda.GpuError as error:
            raise RuntimeFailure(
                operation, f"CUDA: {error}", alive=error.alive, leaked_bytes=error.leaked_bytes
            ) from error

    async def before_dump(self, pids: Sequence[int], *, off_gpu: bool) -> bool:
        """CRIU cannot dump a process that is on a GPU; its plugin, if there is one, wants it there.

        Whether the processes are off it now. Raises RuntimeFailure.
        """
        if self.left_to_criu:
            if off_gpu:
                await self.resume("checkpoint", pids)
            return False
        return off_gpu or await self.suspend("checkpoint", pids)

    async def gpus_of(self, pids: Sequence[int]) -> list[ImageGpu]:
        """Every GPU of the host, and whether these processes use it; none where that is not known."""
        if self._gpus is None or not self._gpus.measurable:
            return []
        held = await self._gpus.held_by_gpu(pids)
        if not any(held.values()):
            return []
        return [ImageGpu(g.uuid, g.name, g.total_bytes, held.get(g.uuid, 0) > 0) for g in await self._gpus.memory()]

    async def moves(self, made_on: Sequence[ImageGpu], wanted: Mapping[str, str]) -> Mapping[str, str]:
        """UUIDs old → new for the processes of an image; empty where they stay. Raises RuntimeFailure."""
        here = await self._gpus.memory() if self._gpus is not None and made_on else []
        if not here:
            return {}
        try:
            return placement.pairs(made_on, wanted, here)
        except placement.PlacementError as error:
            raise RuntimeFailure("restore", str(error)) from error

    async def resume(self, operation: str, pids: Sequence[int], moves: Mapping[str, str] | None = None) -> None:
        """Bring suspended processes back to the GPU. Raises RuntimeFailure; they are of no use then."""
        if self._gpus is None or not self.usable:
            raise RuntimeFailure(operation, f"CUDA: {self.reason}")
        try:
            await self._gpus.resume(pids, moves)
        except cuda.GpuError as error:
            raise RuntimeFailure(operation, f"CUDA: {error}") from error
