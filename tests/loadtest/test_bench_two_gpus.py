"""The benchmark of two GPUs on a host without one: every tier of two models at once, and what it prints."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from typing import TYPE_CHECKING

import tomli_w

from loadtest.proxy_peers import free_port
from tests.support import ROOT, engine_model

if TYPE_CHECKING:
    from pathlib import Path


async def test_it_goes_down_and_up_the_ladder_of_each_model(tmp_path: Path) -> None:
    config = tmp_path / "models.toml"
    pool = {"state_dir": str(tmp_path / "state"), "checkpoint_dir": str(tmp_path / "images")}
    config.write_text(tomli_w.dumps({"pool": pool, "models": dict.fromkeys(("one", "two"), engine_model())}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.bench_two_gpus", "--config", str(config), "--out", str(tmp_path / "out"),
        "--count", "1", "--port", str(free_port()), cwd=ROOT, stdout=asyncio.subprocess.PIPE, env=os.environ,
    )  # fmt: skip
    output, _ = await process.communicate()
    printed = output.decode()
    for model in ("one", "two"):
        for tier in ("cold", "sleeping", "suspended"):
            assert re.search(rf"s  {model} +{tier} +found \w+, first token [\d.]+ s, same answer", printed), printed
            assert re.search(rf"^\| {model} \| {tier} \| 1 \|", printed, re.MULTILINE)
    left_out = re.findall(r"(\w+) +checkpointed +left out: checkpointed: ", printed)
    found = re.findall(r"(\w+) +checkpointed +found checkpointed", printed)
    assert sorted(left_out or found) == ["one", "two"], printed
    assert process.returncode == (1 if left_out else 0), printed
    assert "other GPU      not tried" in printed
