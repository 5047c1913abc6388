"""CUDA suspend and resume on a real GPU, with a process of PyTorch's. Skips where there is none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from proxy.gpu import MAX_LEFT_BYTES, Gpus, ProcessState

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
