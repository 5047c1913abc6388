"""A worker with sleep mode's memory pool, in host memory: what vLLM's worker extensions find on a GPU.

With `--worker-extension-cls MODULE.CLASS` the load-test engine mixes that class into its worker, as vLLM does, and
`/collective_rpc` calls its methods. The modules that such an extension imports are stood in for here: of vLLM the
memory pool and its copy function, of PyTorch a handful of names.
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
        self._stand_in()
        module, _, name = extension.rpartition(".")
        self._worker: Any = type("Worker", (getattr(importlib.import_module(module), name),), {})()
        self.load()

    def _stand_in(self) -> None:
        """The modules that an extension imports, where the real ones are not."""
        allocator = types.SimpleNamespace(pointer_to_data={a.handle[2]: a for a in self._pool})
        cumem: Any = types.ModuleType("vllm.device_allocator.cumem")
        cumem.CuMemAllocator = types.SimpleNamespace(get_instance=lambda: allocator)
        cumem.libcudart = types.SimpleNamespace(cudaMemcpy=ctypes.memmove)
        torch: Any = types.ModuleType("torch")
        torch.cuda = types.SimpleNamespace(current_device=lambda: 0, set_device=lambda _: None)
        torch.uint8, torch.empty = None, _Pinned
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

    def _weights(self) -> list[_Allocation]:
        return [allocation for allocation in self._pool if allocation.tag == "weights"]

    def call(self, method: str) -> Any:
        """What a method of the extension answers. Raises AttributeError when it has none of that name."""
        return getattr(self._worker, method)()
