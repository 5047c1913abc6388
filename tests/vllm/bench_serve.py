"""vLLM's own load generator, `vllm bench serve`, as a client."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import orjson

from loadtest.vllm_cpu import FOLDER

VENV = Path(os.environ.get("VLLM_CPU_VENV", FOLDER / "venv"))
MODEL = Path(os.environ.get("VLLM_CPU_MODEL", FOLDER / "model"))
PATIENCE_S = 240.0


async def bench_serve(url: str, folder: Path, *options: str, endpoint: str = "/v1/completions") -> dict[str, Any]:
    """What it measured, as it writes it to its file; `completed` and `failed` are numbers of requests."""
    backend = "openai-chat" if "chat" in endpoint else "openai"
    process = await asyncio.create_subprocess_exec(
        str(VENV / "bin" / "vllm"), "bench", "serve", "--backend", backend, "--endpoint", endpoint,
        "--base-url", url, "--model", "demo", "--tokenizer", str(MODEL), "--dataset-name", "random",
        "--random-input-len", "16", "--random-output-len", "8", "--disable-tqdm", "--save-result",
        "--result-dir", str(folder), "--result-filename", "result.json", *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE_S):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()[-2000:]
    return dict(orjson.loads((folder / "result.json").read_bytes()))
