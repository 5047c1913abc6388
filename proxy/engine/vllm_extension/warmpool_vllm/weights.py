"""vLLM's weights, saved as they lie on the GPU and brought back by several threads.

Sleep level 2 drops the weights, and `reload_weights` reads them from safetensors one tensor after the other. This
copies every allocation of sleep mode's pool "weights" (vllm/device_allocator/cumem.py), which is what level 1 keeps in
pinned memory, to one file on tmpfs instead, outside of the process, and back. 3.09 GB on an H100: 0.15 s from huge
pages, 0.22 s from small ones, where `reload_weights` takes 0.6 s.

A file fits the process that wrote it, and every process restored from a checkpoint of that one: the allocations lie
at the same addresses there. An identifier kept in both says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import transfer

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "WARMPOOL_WEIGHTS"
"""The environment variable that names the folder for the copy."""
TAG = "weights"


class Weights:
    """The part of the worker extension that is about weights; methods return what JSON can hold."""

    _warmpool_copy = ""
    """Identifies the copy that fits this process; none before the first was written."""

    def warmpool_save_weights(self) -> dict[str, Any]:
        """Write the weights to the folder; `bytes` and `seconds`, or `error`. The engine must be awake."""
        began = time.perf_counter()
        identity = self._warmpool_copy or uuid.uuid4().hex
        try:
            total = _save(_folder(), _rank(self), identity, _allocations())
        except Exception as error:  # noqa: BLE001 - an exception would end the engine in some versions of vLLM
            return {"error": f"{type(error).__name__}: {error}"}
        self._warmpool_copy = identity
        return {"bytes": total, "seconds": round(time.perf_counter() - began, 4)}

    def warmpool_load_weights(self) -> dict[str, Any]:
        """Bring them back after `wake_up?tags=weights`; `bytes` and `seconds`, or `error`: `reload_weights` then."""
        began = time.perf_counter()
        try:
            total = _load(_folder(), _rank(self), self._warmpool_copy, _allocations())
        except Exception as error:  # noqa: BLE001 - as above
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            self._warmpool_copied()
        return {"bytes": total, "seconds": round(time.perf_counter() - began, 4)}

    def _warmpool_check_copy(self) -> None:
        """Raises ValueError or OSError when there is no copy that fits this process."""
        with _copy(_folder(), _rank(self), self._warmpool_copy, _allocations()):
            pass

    def _warmpool_copied(self) -> None:
        # Pinned memory that stayed would be in the next checkpoint, and slow every CUDA restore.
        transfer.release()


def _rank(worker: object) -> int:
    return int(getattr(worker, "rank", 0))


def _folder() -> Path:
    path = os.environ.get(FOLDER)
    if not path:
        raise ValueError(f"{FOLDER} is not set")
    return Path(path)


def _cumem() -> Any:
    return importlib.import_module("vllm.device_allocator.cumem")


def _allocations() -> list[tuple[int, int]]:
    """Address and size of each allocation of the weights' pool, in the order in which they were made."""
    allocator = _cumem().CuMemAllocator.get_instance()
    found = [(address, data.handle[1]) for address, data in allocator.pointer_to_data.items() if data.tag == TAG]
    if not found:
        raise ValueError("no weights in sleep mode's memory pool; is --enable-sleep-mode set?")
    return found


def _note(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _save(folder: Path, rank: int, identity: str, allocations: list[tuple[int, int]]) -> int:
    total = sum(size for _, size in allocations)
    note = _note(folder, rank)
    # Without a note the data counts for nothing, so it goes first and comes last. The data's name is always a new one:
    # whoever has read an older note finds that data or none.
    note.unlink(missing_ok=True)
    for old in folder.glob(f"rank-{rank}-*"):
        old.unlink(missing_ok=True)
    path = folder / f"rank-{rank}-{uuid.uuid4().hex}.weights"
    copy = _cumem().libcudart.cudaMemcpy
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Writing to a mapping of a full tmpfs would be a SIGBUS.
        os.posix_fallocate(descriptor, 0, total)
        with _mapped(descriptor, total) as base:
            target = base
            for address, size in allocations:
                copy(target, address, size)
                target += size
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    beside = note.with_suffix(".partial")
    beside.write_text(json.dumps({"id": identity, "bytes": total, "file": path.name}))
    beside.replace(note)
    return total


def _load(folder: Path, rank: int, identity: str, allocations: list[tuple[int, int]]) -> int:
    with _copy(folder, rank, identity, allocations) as (descriptor, total), _mapped(descriptor, total) as base:
        transfer.to_gpu(transfer.chunks(allocations, base))
    return total


@contextlib.contextmanager
def _copy(folder: Path, rank: int, identity: str, allocations: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Descriptor and size of the copy that fits this process. Raises ValueError or OSError when there is none."""
    total = sum(size for _, size in allocations)
    note = json.loads(_note(folder, rank).read_text())
    if not identity or note["id"] != identity or note["bytes"] != total:
        raise ValueError("the copy is of another process")
    descriptor = os.open(folder / note["file"], os.O_RDWR)
    try:
        if os.fstat(descriptor).st_size != total:
            raise ValueError("the copy is cut off")
        yield descriptor, total
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _mapped(descriptor: int, size: int) -> Iterator[int]:
    """The address of the file in memory."""
    with mmap.mmap(descriptor, size) as view:
        content = (ctypes.c_char * size).from_buffer(view)
        try:
            yield ctypes.addressof(content)
        finally:
            del content
