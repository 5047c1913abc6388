"""A worker with sleep mode's memory pool, in host memory: what vLLM's worker extensions find on a GPU.

With `--worker-extension-cls MODULE.CLASS` the load-test engine mixes that class into its worker, as vLLM does, and
`/collective_rpc` calls its methods. The modules that such an extension imports are stood in for here: of vLLM the
memory pool and its copy function, of PyTorch a handful of names. What is sampled without a seed is drawn from PyTorch's
generator, which is as it was after a restore.
"""

from __future__ import annotations

import ctypes
import importlib
import random
import sys
import types
from typing import Any, Final

ALLOCATIONS: Final = ((256 << 10, "weights"), (17, "weights"), (64 << 10, "kv_cache"))


class _Allocation:
    def __init__(self, size: int, tag: str) -> None:
        self.buffer = ctypes.create_string_buffer(size)
        self.tag = tag
        self.handle = (0, size, ctypes.addressof(self.buffer), 0)


class _Pinned:
    def __init__(self, size: int, **_: object) -> None:
        self._buffer = ctypes.create_string_buffer(size)

    def data_ptr(self) -> int:
        return ctypes.addressof(self._buffer)


class Worker:
    """Weights with a known content, which sleep level 2 loses; `extension` is a class by its qualified name."""

    def __init__(self, extension: str) -> None:
        self._pool = [_Allocation(size, tag) for size, tag in ALLOCATIONS]
        self._generator = random.Random(0)  # vLLM's own seed, where it is told none
        self._stand_in()
        module, _, name = extension.rpartition(".")
        self._worker: Any = type("Worker", (getattr(importlib.import_module(module), name),), {})()
        self.load()
        self._fill_cache()

    def _stand_in(self) -> None:
        """The modules that an extension imports, where the real ones are not."""
        allocator = types.SimpleNamespace(
            pointer_to_data={a.handle[2]: a for a in self._pool}, sleep=self._give_back, wake_up=self._take_back
        )
        cumem: Any = types.ModuleType("vllm.device_allocator.cumem")
        cumem.CuMemAllocator = types.SimpleNamespace(get_instance=lambda: allocator)
        cumem.libcudart = types.SimpleNamespace(cudaMemcpy=ctypes.memmove, cudaMemset=ctypes.memset)
        torch: Any = types.ModuleType("torch")
        torch.cuda = types.SimpleNamespace(
            current_device=lambda: 0, set_device=lambda _: None, synchronize=lambda: None
        )
        torch.uint8, torch.empty = None, _Pinned
        torch.manual_seed = self._generator.seed
        torch._C = types.SimpleNamespace(_host_emptyCache=lambda: None)
        sys.modules["vllm.device_allocator.cumem"], sys.modules["torch"] = cumem, torch

    def load(self) -> None:
        """The weights as they belong."""
        for number, allocation in enumerate(self._weights()):
            allocation.buffer.raw = random.Random(number).randbytes(allocation.handle[1])

    def lose(self) -> None:
        """What sleep level 2 does to them."""
        for allocation in self._weights():
            ctypes.memset(allocation.handle[2], 0, allocation.handle[1])

    def valid(self) -> bool:
        """Whether they are as they belong, byte for byte."""
        return all(
            allocation.buffer.raw == random.Random(number).randbytes(allocation.handle[1])
            for number, allocation in enumerate(self._weights())
        )

    def _fill_cache(self) -> None:
        """A KV cache that running requests rely on."""
        for number, allocation in enumerate(self._cache()):
            allocation.buffer.raw = random.Random(-1 - number).randbytes(allocation.handle[1])

    def cache_valid(self) -> bool:
        """Whether the KV cache is as it was, byte for byte."""
        return all(
            allocation.buffer.raw == random.Random(-1 - number).randbytes(allocation.handle[1])
            for number, allocation in enumerate(self._cache())
        )

    def _cache(self) -> list[_Allocation]:
        return [allocation for allocation in self._pool if allocation.tag == "kv_cache"]

    def _give_back(self, offload_tags: tuple[str, ...] | str | None = None) -> None:
        """What `CuMemAllocator.sleep` does to memory that is not offloaded: nothing is left of it."""
        if offload_tags != ():
            raise ValueError("offloading is not stood in for")
        for allocation in self._pool:
            ctypes.memset(allocation.handle[2], 0xA5, allocation.handle[1])

    def _take_back(self, tags: list[str] | None = None) -> None:
        """What `CuMemAllocator.wake_up` does: memory with whatever is in it."""

    def _weights(self) -> list[_Allocation]:
        return [allocation for allocation in self._pool if allocation.tag == "weights"]

    def call(self, method: str, *arguments: str) -> Any:
        """What a method of the extension answers. Raises AttributeError when it has none of that name."""
        return getattr(self._worker, method)(*arguments)

    def draw(self) -> bytes:
        """What decides on a text that is sampled without a seed."""
        return self._generator.randbytes(16)
