"""llama.cpp's server, which is not vLLM: the contract of engines, and the ladder as a process and in a container.

`make test-engines`. The example configuration is what runs.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.llama_cpp import FOLDER, IMAGE, MODEL
from proxy.config.model import ModelSettings
from proxy.runtime.state_dir import Claim
from tests.engine_contract import EngineContract, Subject
from tests.podman_bench import podman, tmpfs_folder, why_no_podman
from tests.served import Proxy
from tests.support import ROOT, get_json, why_no_criu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PYTHON = FOLDER / "venv" / "bin" / "python"
EXAMPLE = tomllib.loads((ROOT / "config" / "llama-cpp.toml").read_text())
PATIENCE_S = 240.0
QUICK = {"sleeping": "never", "suspended": "400ms", "checkpointed": "800ms"}
AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}
SUSPENDS = {"sleeping": "never", "suspended": "200ms", "checkpointed": "never"}
SAMPLED = {"temperature": 1, "max_tokens": 24}
INFILL = {"input_prefix": "def ", "input_suffix": "return", "n_predict": 4, "temperature": 0}

pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(2 * PATIENCE_S),
    pytest.mark.skipif(not (FOLDER / MODEL).exists(), reason="no llama.cpp (make llama-cpp)"),
]

images = pytest.fixture(tmpfs_folder)


def why_no_image() -> str | None:
    if (reason := why_no_podman()) is not None:
        return reason
    found = subprocess.run(["podman", "image", "exists", IMAGE], check=False)
    return None if found.returncode == 0 else f"no image {IMAGE} (make llama-cpp)"


def entry(runtime: str, **more: Any) -> dict[str, Any]:
    """The example's model for a runtime, as `demo`, with the keys of its defaults."""
    key = {"process": "llama", "podman": "contained"}[runtime]
    table = {**EXAMPLE["defaults"], **EXAMPLE["models"][key], "max_instances": 1, **more}
    if runtime == "process":
        table["process"] = {**table["process"], "cwd": str(ROOT)}
    return table


class TestLlamaCpp(EngineContract):
    """As a plain process: what is said to it, without a runtime."""

    @pytest.fixture
    async def subject(self, tmp_path: Path) -> AsyncIterator[Subject]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        model = ModelSettings(**entry("process"))
        assert model.process is not None
        values = {"{host}": "127.0.0.1", "{port}": str(port), "{model}": "demo"}
        words = [values.get(word, word) for word in model.process.command]
        with (tmp_path / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stdout=log, stderr=log)
        try:
            has = frozenset({"canary", "tokens", "reseed"})
            async with Subject(f"http://127.0.0.1:{port}", "demo", model, has) as subject:
                yield subject
        finally:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()


class Host:
    """`warmpool serve` with it, one after the other."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder, self.images = folder, images
        self.proxy: Proxy | None = None

    async def serve(self, runtime: str, **more: Any) -> Proxy:
        await self.end()
        pool = {"state_dir": str(self.folder / "state"), "checkpoint_dir": str(self.images)}
        settings = {"pool": pool, "models": {"demo": entry(runtime, **{"idle": QUICK, **more})}}
        (self.folder / "log").unlink(missing_ok=True)
        self.proxy = await Proxy(self.folder, settings=settings).listening()
        return self.proxy

    async def end(self) -> None:
        if self.proxy is not None:
            proxy, self.proxy = self.proxy, None
            await proxy.session.close()
            proxy.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(proxy.process.wait, PATIENCE_S)

    def clear(self) -> None:
        if self.proxy is not None:
            self.proxy.process.kill()
            self.proxy.process.wait()
        if why_no_podman() is None:
            owner = Claim(self.folder / "state").owner
            if left := podman("ps", "--all", "--quiet", "--filter", f"label=io.warmpool.owner={owner}").split():
                podman("rm", "--force", "--time", "0", *left)


@pytest.fixture
async def host(tmp_path: Path, images: Path) -> AsyncIterator[Host]:
    made = Host(tmp_path, images)
    yield made
    await made.end()
    made.clear()


RUNTIMES = [
    pytest.param("process", marks=pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))),
    pytest.param("podman", marks=pytest.mark.skipif(why_no_image() is not None, reason=str(why_no_image()))),
]
each_runtime = pytest.mark.parametrize("runtime", RUNTIMES)


@each_runtime
async def test_every_tier_that_it_has(host: Host, runtime: str) -> None:
    proxy = await host.serve(runtime, idle=SUSPENDS)
    tier, answer = await proxy.ask()
    assert tier == "stopped"
    await proxy.until("suspended")
    assert await proxy.ask() == ("suspended", answer)
    proxy = await host.serve(runtime)
    tier, _ = await proxy.ask()
    assert tier in ("stopped", "ready", "suspended", "checkpointed"), "whatever the first one left"
    for _ in range(2):
        await proxy.until("checkpointed")
        assert await proxy.ask() == ("checkpointed", answer)
        (instance,) = (await get_json(f"{proxy.url}/admin/status"))["models"]["demo"]["instances"]
        assert instance["last_wake"]["from"] == "checkpointed", "and from nothing colder"
    status = (await get_json(f"{proxy.url}/admin/status"))["models"]["demo"]
    assert status["repeats_randomness"] is None


@each_runtime
async def test_two_restores_draw_differently_and_a_seed_decides(host: Host, runtime: str) -> None:
    """It draws a seed from the kernel for each request that has none."""
    proxy = await host.serve(runtime)
    await proxy.ask()
    texts, seeded = set(), set()
    for _ in range(2):
        await proxy.until("checkpointed")
        tier, text = await proxy.ask(**SAMPLED)
        assert tier == "checkpointed"
        texts.add(text)
        seeded.add((await proxy.ask(**SAMPLED, seed=7))[1])
    assert len(texts) == 2
    assert len(seeded) == 1


@pytest.mark.skipif(why_no_image() is not None, reason=str(why_no_image()))
async def test_clones_come_from_one_image_and_answer_alike(host: Host) -> None:
    proxy = await host.serve("podman", max_instances=2, max_concurrency=1)
    _, answer = await proxy.ask()
    await proxy.until_all(2, "checkpointed")
    found = await asyncio.gather(*(proxy.ask(max_tokens=64) for _ in range(2)))
    assert len({text for _, text in found}) == 1
    assert {tier for tier, _ in found} == {"checkpointed"}
    assert (await proxy.ask())[1] == answer
    assert [path.name for path in host.images.iterdir() if path.is_dir() and (path / "manifest.json").exists()] == [
        "demo"
    ]


async def test_infill_goes_through_with_and_without_a_model(host: Host) -> None:
    proxy = await host.serve("process", idle=AWAKE)
    answers = []
    for body in (INFILL, {**INFILL, "model": "demo"}):
        async with proxy.session.post("/infill", json=body) as response:
            assert response.status == 200, await response.text()
            answers.append((await response.json())["content"])
    assert answers[0] == answers[1]
    for path in ("/slots", "/props", "/lora-adapters"):
        async with proxy.session.post(path, json={"model": "demo"}) as response:
            assert response.status == 404, "management"
    async with proxy.session.get("/metrics") as response:
        assert re.search(r'^warmpool_requests_total\{.*model="demo".*\} ', await response.text(), re.MULTILINE)


def test_what_the_tests_need_is_there() -> None:
    assert os.access(PYTHON, os.X_OK)
