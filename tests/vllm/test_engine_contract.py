"""The contract of engines with the real vLLM on the CPU, as a plain process; and what it says that it offers."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import urllib.error
import urllib.request
from time import monotonic, sleep
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from proxy.cli.main import cli
from proxy.config.model import ModelSettings
from proxy.engine import kinds
from tests.engine_contract import EngineContract, Subject
from tests.vllm.bench_serve import VENV
from tests.vllm.test_vllm import MODEL, PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

log = logging.getLogger("tests.vllm")

SETTINGS = ModelSettings(process={"command": ["vllm", "serve", "{port}"]})
OPTIONS = (
    "--served-model-name", "demo", "--host", "127.0.0.1", "--enforce-eager", "--kv-cache-memory-bytes", "67108864",
    "--max-model-len", "512", "--dtype", "float32",
)  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3 * PATIENCE_S),
    pytest.mark.skipif(not ((VENV / "bin" / "vllm").exists() and MODEL.is_dir()), reason="no vllm-cpu (make vllm-cpu)"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that runs, with what warmpool gives it."""
    folder = tmp_path_factory.mktemp("vllm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inside = kinds.of(SETTINGS).inside
    assert inside is not None
    given = inside.environment(str(inside.folder(folder)), None, {})
    words = [
        str(VENV / "bin" / "vllm"),
        "serve",
        str(MODEL),
        "--port",
        str(port),
        *OPTIONS,
        *inside.arguments(SETTINGS),
    ]
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(
            words, cwd=folder, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT, **given},
            start_new_session=True,
        )  # fmt: skip
    try:
        ends = monotonic() + 2 * PATIENCE_S
        while not _serves(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            assert monotonic() < ends, (folder / "log").read_text()[-4000:]
            sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(PATIENCE_S)


def _serves(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class TestVllm(EngineContract):
    """Its sleep mode frees nothing on the CPU, and its endpoints are there in the development mode all the same."""

    @pytest.fixture
    async def subject(self, url: str) -> AsyncIterator[Subject]:
        async with Subject(url, "demo", SETTINGS, frozenset({"canary", "sleep", "reseed", "tokens"})) as subject:
            yield subject


async def test_what_it_offers_is_seen_by_the_probe(url: str) -> None:
    result = await asyncio.to_thread(CliRunner().invoke, cli, ["engine", "probe", url, "--try", "--format", "markdown"])
    log.info("%s", result.output)
    assert result.exit_code == 0, result.output
    rows = dict(line.strip("|").split("|", 1) for line in result.output.splitlines()[2:])
    facts = {name.strip(): text.strip() for name, text in rows.items()}
    assert facts["sleep mode"] == "yes, awake (/is_sleeping)"
    assert facts["pause, resume"] == "yes, running (/is_paused)"
    assert facts["collective_rpc"] == facts["warmpool's extension"] == "yes"
    assert "1: the same answer afterwards" in facts["sleep levels"]
    assert "/v1/completions" in facts["routes that clients may use"]
    assert "/collective_rpc" in facts["further routes"]
    assert "vllm:generation_tokens_total" in facts["metrics"]
