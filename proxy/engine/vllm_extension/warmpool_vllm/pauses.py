"""A worker off its GPU and back while its requests stand still; vLLM's scheduler is paused then, its requests kept.

Off: what sleep mode's pool holds beside the weights, which is the KV cache, goes to host memory; then the pool gives
its memory back, and the weights with it, of which there is a copy (see weights.py). Back: the pool takes memory at the
same addresses, the KV cache returns to it, and the weights are loaded by who asked for all this.

Which blocks of the KV cache are in use only vLLM's scheduler knows, in another place: running requests hold some, the
prefix cache others. What was never written is zeros, though, and that is seen here: such parts are not copied.

The room in host memory is kept for the next pause until `warmpool_end_pauses`: touching new memory takes longer than
copying.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import transfer
from .weights import TAG, Weights

_PART_BYTES = 2 << 20
"""So much of the KV cache is looked at together: a page of the GPU's."""
_MOST_OF_FREE = 0.8
"""No more of the host's free memory is taken: the OOM killer would choose any process."""


class Pauses(Weights):
    """The part of the worker extension that is about pauses; methods return what JSON can hold."""

    _warmpool_saved: _Saved | None = None
    """What is in host memory; None while the worker is on its GPU."""
    _warmpool_room: mmap.mmap | None = None

    def warmpool_can_pause(self) -> dict[str, Any]:
        """`copy`: whether there is a copy of the weights that fits this process; `error`: why it can never pause."""
        try:
            _allocator()
            has_pool = self._warmpool_saved is not None or bool(_others())
        except Exception as error:  # noqa: BLE001 - an exception would end the engine in some versions of vLLM
            return {"error": f"{type(error).__name__}: {error}"}
        if not has_pool:
            return {"error": "no KV cache in sleep mode's memory pool"}
        try:
            self._warmpool_check_copy()
        except Exception:  # noqa: BLE001 - there is none, or it fits another process
            return {"copy": False}
        return {"copy": True}

    def warmpool_pause(self) -> dict[str, Any]:
        """Off the GPU; `bytes` saved of `held`, and `seconds`, or `error`, and then nothing was given back."""
        began = time.perf_counter()
        try:
            if self._warmpool_saved is None:
                self._warmpool_check_copy()
                saved = self._warmpool_save()
                self._warmpool_saved = saved  # from here on the way back is `warmpool_unpause`
                _allocator().sleep(offload_tags=())
            saved = self._warmpool_saved
            return {"bytes": saved.bytes, "held": saved.held, "seconds": round(time.perf_counter() - began, 4)}
        except Exception as error:  # noqa: BLE001 - as above
            return {"error": f"{type(error).__name__}: {error}"}

    def _warmpool_save(self) -> _Saved:
        torch = importlib.import_module("torch")
        torch.cuda.synchronize()
        parts, blank = _parts(torch)
        needed = sum(size for _, size in parts)
        if self._warmpool_room is None or len(self._warmpool_room) < needed:
            self._warmpool_room = None
            self._warmpool_room = _room(needed)
        base = _address(self._warmpool_room)
        chunks = transfer.chunks(parts, base)
        transfer.to_host(chunks)
        return _Saved(chunks, blank, needed, needed + sum(size for _, size in blank))

    def warmpool_unpause(self) -> dict[str, Any]:
        """Back on the GPU, but for the weights; `bytes` and `seconds`, or `error`.

        `again`: it has no memory there for now, and is as it was.
        """
        began, saved = time.perf_counter(), self._warmpool_saved
        if saved is None:
            return {"bytes": 0, "seconds": 0.0}
        try:
            _allocator().wake_up(None)
        except Exception as error:  # noqa: BLE001 - as above
            return {"error": f"{type(error).__name__}: {error}", "again": True}
        try:
            torch = importlib.import_module("torch")
            clear = importlib.import_module("vllm.device_allocator.cumem").libcudart.cudaMemset
            for address, size in saved.blank:
                clear(address, 0, size)
            transfer.to_gpu(saved.chunks)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - as above
            return {"error": f"{type(error).__name__}: {error}"}
        self._warmpool_saved = None
        return {"bytes": saved.bytes, "seconds": round(time.perf_counter() - began, 4)}

    def warmpool_end_pauses(self) -> dict[str, Any]:
        """Give back what is kept for the next pause; `bytes`. Nothing where it is paused."""
        if self._warmpool_saved is not None:
            return {"bytes": 0}
        room, self._warmpool_room = self._warmpool_room, None
        transfer.release()
        return {"bytes": 0 if room is None else len(room)}

    def _warmpool_copied(self) -> None:
        if self._warmpool_room is None:
            super()._warmpool_copied()


@dataclass(frozen=True)
class _Saved:
    chunks: list[transfer.Chunk]
    blank: list[tuple[int, int]]
    """Address and bytes of what was zeros."""
    bytes: int
    held: int


def _allocator() -> Any:
    return importlib.import_module("vllm.device_allocator.cumem").CuMemAllocator.get_instance()


def _others() -> list[tuple[int, int]]:
    """Address and bytes of each allocation that holds no weights."""
    return [(address, data.handle[1]) for address, data in _allocator().pointer_to_data.items() if data.tag != TAG]


def _parts(torch: Any) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What is to be saved, and what is zeros; address and bytes of each, neighbours together."""
    used: list[tuple[int, int]] = []
    blank: list[tuple[int, int]] = []
    for address, size in _others():
        for number, is_used in enumerate(_in_use(torch, address, size)):
            part = address + number * _PART_BYTES
            found = used if is_used else blank
            length = min(_PART_BYTES, address + size - part)
            if found and found[-1][0] + found[-1][1] == part and part > address:
                found[-1] = found[-1][0], found[-1][1] + length
            else:
                found.append((part, length))
    return used, blank


def _in_use(torch: Any, address: int, size: int) -> list[bool]:
    """Of each part of an allocation, whether there is anything in it; where that cannot be seen, there is."""
    count = -(-size // _PART_BYTES)
    if size % _PART_BYTES:
        return [True] * count
    with contextlib.suppress(Exception):
        words = torch.as_tensor(_Words(address, size // 8), device="cuda").view(count, _PART_BYTES // 8)
        return [bool(found) for found in torch.any(words, dim=1).tolist()]
    return [True] * count


class _Words:
    """Memory of the GPU as 64-bit numbers, for `torch.as_tensor` (numba's CUDA array interface, version 3)."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (count,), "typestr": "<i8", "data": (address, False), "version": 3,
        }  # fmt: skip


def _room(size: int) -> mmap.mmap:
    if size > _MOST_OF_FREE * (free := _free_bytes()):
        raise MemoryError(f"{size >> 20} MiB are to be kept, and {free >> 20} MiB of host memory are free")
    room = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
    return room


def _free_bytes() -> int:
    """Of the host's memory, and of what this process' control group may take."""
    words = Path("/proc/meminfo").read_text().split()
    free = int(words[words.index("MemAvailable:") + 1]) << 10
    with contextlib.suppress(OSError, ValueError):  # no limit is "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def _address(room: mmap.mmap) -> int:
    content = (ctypes.c_char * len(room)).from_buffer(room)
    try:
        return ctypes.addressof(content)
    finally:
        del content
