"""Two real GPUs: a process that goes on on the other one, and what the benchmark of two GPUs says of vLLM."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from loadtest.bench_two_gpus import Holder
from proxy.gpu.cuda import Gpus
from tests.support import ROOT

GIB = 1 << 30


def _why_not() -> str | None:
    gpus = Gpus()
    try:
        if reason := gpus.open():
            return reason
        if not gpus.can_move:
            return f"driver {gpus.driver_version} cannot move a process to another GPU"
        if len(asyncio.run(gpus.memory())) < 2:
            return "there is one GPU"
    finally:
        gpus.close()
    return None if importlib.util.find_spec("torch") else "PyTorch is not installed"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_why_not() is not None, reason=_why_not() or "")]


async def test_a_process_goes_on_on_the_other_gpu() -> None:
    gpus = Gpus()
    assert gpus.open() is None
    one, other = (gpu.uuid for gpu in (await gpus.memory())[:2])
    everyone = {gpu.uuid: gpu.uuid for gpu in await gpus.memory()}
    holder = await Holder.start(0, GIB)
    try:
        for here, there in ((one, other), (other, one)):
            assert (await gpus.held_by_gpu([holder.pid])).get(here, 0) > GIB
            assert await gpus.suspend([holder.pid]) == [holder.pid]
            await gpus.resume([holder.pid], everyone | {one: other, other: one})
            assert (await gpus.held_by_gpu([holder.pid])).get(there, 0) > GIB
            assert await holder.ask() == 42
    finally:
        await holder.end()
        gpus.close()


@pytest.mark.timeout(600)
async def test_vllm_on_two_gpus_comes_back_from_what_its_ladder_has(tmp_path: Path) -> None:
    """Cold, asleep, suspended, checkpointed; an image on the other GPU; two instances of one image side by side."""
    config = os.environ.get("WARMPOOL_TWO_GPUS_CONFIG")
    if config is None:
        pytest.skip(reason="WARMPOOL_TWO_GPUS_CONFIG names no configuration for loadtest.bench_two_gpus")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.bench_two_gpus", "--config", str(Path(config).absolute()),
        "--out", str(tmp_path), "--count", "1", "--limit", "500", cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
