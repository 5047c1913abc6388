"""CUDA suspend and resume on a real GPU, with a process of PyTorch's. Skips where there is none."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from proxy.gpu.cuda import MAX_LEFT_BYTES, Gpus, ProcessState
from proxy.gpu.nvml import Nvml

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30
_PROGRAM = """
import sys, torch
numbers = torch.arange(GIB // 4, dtype=torch.int32, device="cuda")
print("ready", flush=True)
for line in sys.stdin:
    print(int(numbers[int(line)].item()), flush=True)
""".replace("GIB", str(GIB))


def _why_not() -> str | None:
    gpus = Gpus()
    reason = gpus.open()
    gpus.close()
    if reason is None and importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    return reason


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_why_not() is not None, reason=_why_not() or "")]


class Holder:
    """A process that holds 1 GiB of GPU memory and answers what is in it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, index: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{index}\n")
        self.process.stdin.flush()
        return int(self._read())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def gpus() -> Iterator[Gpus]:
    made = Gpus()
    assert made.open() is None
    yield made
    made.close()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    made = [Holder(), Holder()]
    yield made
    for holder in made:
        holder.end()


async def test_memory_comes_free_and_comes_back_with_its_content(gpus: Gpus, holders: list[Holder]) -> None:
    pids = [holder.process.pid for holder in holders]
    (before,) = [g for g in await gpus.memory() if g.index == 0]
    held = await gpus.held_bytes(pids)
    assert held > 2 * GIB
    assert await gpus.held_by_gpu([1, *pids]) == {before.uuid: held}
    for _ in range(3):
        assert await gpus.suspend([1, *pids]) == pids
        assert await gpus.held_bytes(pids) <= MAX_LEFT_BYTES
        assert set((await gpus.states(pids)).values()) == {ProcessState.CHECKPOINTED}
        (suspended,) = [g for g in await gpus.memory() if g.index == 0]
        assert before.used_bytes - suspended.used_bytes > held * 0.9
        assert await gpus.resume([1, *pids]) == pids
        assert [holder.ask(12345) for holder in holders] == [12345, 12345]
    (after,) = (await gpus.held_by_gpu(pids)).values()
    assert abs(after - held) < MAX_LEFT_BYTES


async def test_a_process_that_is_killed_while_suspended_leaves_nothing(gpus: Gpus, holders: list[Holder]) -> None:
    one = holders[0]
    await gpus.suspend([one.process.pid])
    one.end()
    assert await gpus.states([one.process.pid]) == {}
    assert holders[1].ask(7) == 7


_WORKER = """
import ctypes, json, sys, types, torch
from proxy.engine.vllm_extension import warmpool_vllm
path = next(line.split()[-1] for line in open("/proc/self/maps") if "libcudart" in line)
runtime = ctypes.CDLL(path)
runtime.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def copy(target, source, size):
    assert runtime.cudaMemcpy(target, source, size, 4) == 0  # cudaMemcpyDefault
weights = [torch.randint(-(2**31), 2**31 - 1, (size,), dtype=torch.int32, device="cuda") for size in (1 << 28, 12345)]
data = {w.data_ptr(): types.SimpleNamespace(tag="weights", handle=(0, w.nbytes, w.data_ptr(), 0)) for w in weights}
cumem = types.ModuleType("vllm.device_allocator.cumem")
cumem.CuMemAllocator = types.SimpleNamespace(get_instance=lambda: types.SimpleNamespace(pointer_to_data=data))
cumem.libcudart = types.SimpleNamespace(cudaMemcpy=copy)
sys.modules["vllm.device_allocator.cumem"] = cumem
before = [w.clone() for w in weights]
worker = warmpool_vllm.Worker()
saved = worker.warmpool_save_weights()
for w in weights: w.zero_()
torch.cuda.synchronize()
loaded = worker.warmpool_load_weights()
pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
print(json.dumps([saved, loaded, all(torch.equal(a, b) for a, b in zip(before, weights)), pinned]))
"""


def test_weights_go_to_a_file_and_come_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WORKER], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2], env={**os.environ, "WARMPOOL_WEIGHTS": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved, loaded, equal, pinned = orjson.loads(done.stdout.splitlines()[-1])
    assert saved["bytes"] == loaded["bytes"] == (1 << 30) + 4 * 12345
    assert equal
    assert pinned == 0, "no pinned memory stays for the next checkpoint"


def test_nvml_says_what_a_gpu_is_called() -> None:
    assert all(re.fullmatch(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", gpu.uuid) for gpu in Nvml().gpus())
