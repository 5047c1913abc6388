"""Fresh randomness after a restore on a real GPU: CUDA's generators, and vLLM out of its checkpoint.

The second part needs a configuration whose first model is vLLM in podman, as for `make bench-gpu`:
``GPU_TEST_CONFIG=your.toml pytest tests/gpu/test_reseed.py`` (root; one cold start).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from proxy.gpu.cuda import Gpus
from tests.served import ASK, Proxy
from tests.support import ROOT, get_json

log = logging.getLogger("tests.gpu")

CONFIG = os.environ.get("GPU_TEST_CONFIG")
_PATIENT = aiohttp.ClientTimeout(900)
"""For a cold start."""
QUICK = {"sleeping": "200ms", "suspended": "400ms", "checkpointed": "600ms", "archived": "never", "stopped": "never"}
_DRAW = """
import json, random, torch
from proxy.engine.vllm_extension import warmpool_vllm
devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
graph, static = torch.cuda.CUDAGraph(), torch.empty(4, device="cuda")
static.exponential_()
with torch.cuda.graph(graph):
    static.exponential_()
def draw():
    graph.replay()
    torch.cuda.synchronize()
    eager = [torch.empty(4, device=device).exponential_().tolist() for device in devices]
    return [random.random(), torch.rand(4).tolist(), static.tolist(), *eager]
drawn = []
for entropy in (None, None, "one", "one", "another"):
    random.seed(0)
    torch.manual_seed(0)  # as every restore from one image finds them
    done = warmpool_vllm.Worker().warmpool_reseed(entropy) if entropy else None
    drawn.append(draw())
print(json.dumps([done, drawn]))
"""


def _why_not() -> str | None:
    gpus = Gpus()
    reason = gpus.open()
    gpus.close()
    return reason


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_why_not() is not None, reason=_why_not() or "")]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_the_generators_of_all_devices_begin_anew_also_in_a_captured_graph() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DRAW], capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    said, (frozen, frozen_again, one, one_again, another) = orjson.loads(done.stdout.splitlines()[-1])
    assert {"random", "torch"} <= set(said["reseeded"])
    assert frozen == frozen_again
    assert one == one_again, "workers that sample side by side"
    for parts in zip(frozen, one, another, strict=True):
        assert parts[0] != parts[1] != parts[2] != parts[0]


async def _answer(proxy: Proxy, name: str, **more: Any) -> tuple[str, Any]:
    """The text of a completion, and the log probabilities of what it is made of."""
    body = {**ASK, "model": name, "max_tokens": 24, "ignore_eos": True, "logprobs": 1, **more}
    async with proxy.session.post("/v1/completions", json=body, timeout=_PATIENT) as response:
        answer = await response.json()
        assert response.status == 200, answer
    (choice,) = answer["choices"]
    return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.mark.skipif(CONFIG is None, reason="GPU_TEST_CONFIG names no configuration")
@pytest.mark.timeout(1200)
async def test_two_restores_of_vllm_draw_differently_and_have_the_same_weights(tmp_path: Path) -> None:
    settings = tomllib.loads(Path(str(CONFIG)).read_text())
    key, model = next(iter(settings["models"].items()))
    settings["models"] = {"demo": {**model, "name": "demo", "idle": QUICK}}
    settings["pool"] = {**settings.get("pool", {}), "state_dir": str(tmp_path / "state")}
    settings["runtime"] = {"podman": {**settings.get("runtime", {}).get("podman", {}), "on_exit": "stop"}}
    proxy = await Proxy(tmp_path / "warmpool", settings=settings).listening()
    try:
        cold = await _answer(proxy, "demo")
        texts, greedy, seeded = [], [], []
        for _ in range(2):
            await proxy.until("checkpointed")
            texts.append((await _answer(proxy, "demo", temperature=1))[0])
            texts.append((await _answer(proxy, "demo", temperature=1))[0])
            wake = (await proxy.instance())["last_wake"]
            assert wake["from"] == "checkpointed", wake
            assert "reseed" in wake["stages"]
            greedy.append(await _answer(proxy, "demo"))
            seeded.append(await _answer(proxy, "demo", temperature=1, seed=7))
        assert len({*texts}) == 4, texts
        assert greedy[0] == greedy[1], "the same weights, to the last bit of what they make"
        assert greedy[0][0] == cold[0]
        assert seeded[0] == seeded[1], "a client's own seed decides"
        status = await get_json(f"{proxy.url}/admin/status")
        assert status["models"]["demo"]["repeats_randomness"] is None
        log.info("%s: %s", key, {name: round(s, 4) for name, s in wake["stages"].items()})
    finally:
        proxy.process.terminate()
        await proxy.ended()
