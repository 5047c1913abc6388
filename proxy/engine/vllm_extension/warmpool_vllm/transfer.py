"""Bytes between host memory and the GPU, by several threads through pinned buffers.

Straight from or to pageable memory the driver manages 5 to 8 GB/s, whatever the number of threads; so it is 20.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    Chunk = tuple[int, int, int]
    """Address on the GPU, address in host memory, bytes."""

_CHUNK_BYTES = 16 << 20
_MAX_THREADS = 8
_buffers: list[Any] = []
"""Pinned, a thread's each; kept until `release`."""


def chunks(allocations: Iterable[tuple[int, int]], base: int) -> list[Chunk]:
    """Allocations on the GPU (address, bytes) that lie one behind the other in host memory from `base`."""
    made: list[Chunk] = []
    for address, size in allocations:
        starts = range(0, size, _CHUNK_BYTES)
        made += [(address + start, base + start, min(_CHUNK_BYTES, size - start)) for start in starts]
        base += size
    return made


def to_gpu(wanted: Iterable[Chunk]) -> None:
    """Copy chunks to the GPU."""
    copy = _copy()

    def through(buffer: int, gpu: int, host: int, size: int) -> None:
        ctypes.memmove(buffer, host, size)
        copy(gpu, buffer, size)

    _in_threads([*wanted], through)


def to_host(wanted: Iterable[Chunk]) -> None:
    """Copy chunks to host memory."""
    copy = _copy()

    def through(buffer: int, gpu: int, host: int, size: int) -> None:
        copy(buffer, gpu, size)
        ctypes.memmove(host, buffer, size)

    _in_threads([*wanted], through)


def release() -> None:
    """Give the pinned buffers back to the system."""
    if _buffers:
        _buffers.clear()
        empty = getattr(getattr(importlib.import_module("torch"), "_C", None), "_host_emptyCache", None)
        if empty is not None:
            empty()


def _copy() -> Any:
    return importlib.import_module("vllm.device_allocator.cumem").libcudart.cudaMemcpy


def _in_threads(left: list[Chunk], through: Any) -> None:
    """Each thread has a buffer and takes chunks as long as there are any."""
    torch = importlib.import_module("torch")
    device = torch.cuda.current_device()
    count = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(left)))
    while len(_buffers) < count:
        _buffers.append(torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True))
    failures: list[BaseException] = []
    turn = threading.Lock()

    def work(buffer: int) -> None:
        try:
            torch.cuda.set_device(device)
            while not failures:
                with turn:
                    if not left:
                        return
                    gpu, host, size = left.pop()
                through(buffer, gpu, host, size)
        except BaseException as error:  # noqa: BLE001 - raised below, by the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(buffer.data_ptr(),)) for buffer in _buffers[:count]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
