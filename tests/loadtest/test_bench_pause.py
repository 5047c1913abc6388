"""The benchmark of pauses, with load-test engines in place of vLLM."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import orjson
import tomli_w

from tests.support import ENGINE_PORTS, PYTHON, ROOT, engine_model

if TYPE_CHECKING:
    from pathlib import Path


def run(tmp_path: Path, *options: str, models: int = 2) -> subprocess.CompletedProcess[str]:
    engine = engine_model("--tokens-per-second", "200")
    config = {
        "models": dict.fromkeys(("first", "second")[:models], engine),
        "pool": {"state_dir": str(tmp_path / "state"), "checkpoint_dir": str(tmp_path / "images")},
        "runtime": {"process": {"ports": ENGINE_PORTS}},
    }
    (tmp_path / "bench.toml").write_text(tomli_w.dumps(config))
    return subprocess.run(
        [
            PYTHON, "-m", "loadtest.bench_pause", "--config", str(tmp_path / "bench.toml"), "--out",
            str(tmp_path / "out"), "--port", "0", *options,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


def test_two_models_are_needed(tmp_path: Path) -> None:
    done = run(tmp_path, models=1)
    assert done.returncode == 1
    assert "two models are needed" in done.stderr


def test_every_part_runs_and_answers_are_the_same(tmp_path: Path, unused_tcp_port: int) -> None:
    done = run(
        tmp_path, "--count", "2", "--many", "3", "--tokens", "120", "--long-tokens", "300", "--streams", "3",
        "--asks", "2", "--quantum", "300ms", "--port", str(unused_tcp_port),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = orjson.loads((tmp_path / "out" / "bench-pause.json").read_bytes())
    assert [s["part"] for s in found["samples"]] == ["single"] * 2 + ["many"] * 3 + ["batch"] * 2
    assert all(s["same"] == s["streams"] and not s["moved"] for s in found["samples"])
    assert found["problems"] == []
    assert found["turns"]["turns"]["ttft_p50_s"] < found["turns"]["fifo"]["ttft_p50_s"]
