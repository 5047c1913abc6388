"""`warmpool pull`: weights from a hub, container images through podman."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from aiohttp.test_utils import TestServer

from proxy.cli.model_weights import UnknownWeightsError, Weights, weights_of
from proxy.config.model import ModelSettings
from tests.forked import PROXIES
from tests.hub import COMMIT, Hub
from tests.support import PYTHON

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    Pull = Callable[..., Coroutine[Any, Any, tuple[int, str]]]

REPO = "org/Tiny"
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors": os.urandom(300_000),
    "pytorch_model.bin": b"the same again",
    "original/consolidated.00.pth": b"and again",
}


def podman(command: list[str], volumes: list[dict[str, Any]] | None = None, **table: Any) -> dict[str, Any]:
    return {
        "podman": {"image": "localhost/x", "command": [*command, "--port", "{port}"], "volumes": volumes or [], **table}
    }


# --- which weights, and where ---


def found(table: dict[str, Any], name: str = "demo", **chosen: str) -> Weights:
    return weights_of("demo", name, ModelSettings.model_validate(table), **chosen)


CACHE = {"source": "/srv/models", "target": "/root/.cache/huggingface", "writable": True}
MODEL = {"source": "/srv/models/Tiny", "target": "/model"}


@pytest.mark.parametrize(
    ("table", "name", "repo", "folder", "is_cache"),
    [
        (podman(["org/Tiny"], [CACHE], entrypoint=["vllm", "serve"]), "demo", REPO, "/srv/models/hub", True),
        (podman(["org/Tiny"], [CACHE]), "demo", REPO, "/srv/models/hub", True),
        (podman(["--model", "org/Tiny"], [CACHE]), "demo", REPO, "/srv/models/hub", True),
        (podman(["--model=org/Tiny"], [CACHE]), "demo", REPO, "/srv/models/hub", True),
        (podman(["serve", "{model}"], [CACHE]), REPO, REPO, "/srv/models/hub", True),
        (podman(["/model"], [MODEL]), REPO, REPO, "/srv/models/Tiny", False),
        (podman(["/model/a"], [CACHE, MODEL]), REPO, REPO, "/srv/models/Tiny/a", False),
        (
            podman(["org/Tiny"], [{"source": "/a", "target": "/cache"}], env={"HF_HOME": "/cache/hf"}),
            "demo", REPO, "/a/hf/hub", True,
        ),
        ({"process": {"command": ["vllm", "serve", "/m/Tiny", "--port", "{port}"]}}, REPO, REPO, "/m/Tiny", False),
        (
            {"process": {"command": ["vllm", "serve", "org/Tiny", "{port}"], "env": {"HF_HUB_CACHE": "/c"}}},
            "demo", REPO, "/c", True,
        ),
    ],
)  # fmt: skip
def test_the_weights_are_those_that_the_engine_reads(
    table: dict[str, Any], name: str, repo: str, folder: str, is_cache: bool
) -> None:
    it = found(table, name)
    assert (it.repo, str(it.folder), it.is_cache) == (repo, folder, is_cache)


def test_a_revision_and_a_token_of_the_engine_count() -> None:
    table = podman(["org/Tiny", "--revision", "v1"], [CACHE], env={"HF_TOKEN": "hf_x"})
    assert (found(table).revision, found(table).token) == ("v1", "hf_x")
    assert found(table, revision="v2").revision == "v2"
    assert found(podman(["/model"], [MODEL]), repo="org/Other").repo == "org/Other"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (podman(["--host", "{host}"], [CACHE]), "names no model"),
        (podman(["org/Tiny"]), "no volume holds /root/.cache/huggingface/hub"),
        (podman(["org/Tiny"], [{**CACHE, "source": "cache"}]), "a volume of podman's"),
        (podman(["/model"], [MODEL]), "--repo OWNER/NAME"),
        (podman(["what?"], [CACHE]), "neither a path nor OWNER/NAME"),
    ],
)
def test_what_is_missing_is_said(table: dict[str, Any], said: str) -> None:
    with pytest.raises(UnknownWeightsError, match=said):
        found(table)


# --- weights from a hub ---


@pytest.fixture
async def hub() -> AsyncIterator[tuple[Hub, str]]:
    it = Hub({REPO: FILES})
    server = TestServer(it.application())
    await server.start_server()
    yield it, str(server.make_url("")).rstrip("/")
    await server.close()


@pytest.fixture
def pull(tmp_path: Path, hub: tuple[Hub, str]) -> Pull:
    """Runs the command for a model `demo` with this table; its status and what it printed."""
    pytest.importorskip("huggingface_hub")

    async def run(table: dict[str, Any], *options: str, **environment: str) -> tuple[int, str]:
        config = tmp_path / "warmpool.toml"
        config.write_text(tomli_w.dumps({"models": {"demo": {"name": REPO, **table}}}))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WARMPOOL_"))}
        clean |= {"HF_ENDPOINT": hub[1], "HF_HOME": str(tmp_path / "own"), "COLUMNS": "200", **environment}
        done = await asyncio.to_thread(PROXIES.run, ["pull", "demo", "-c", str(config), *options], clean)
        out = done.stdout + done.stderr
        assert "Traceback" not in out, out
        return done.returncode, out

    return run


def folder_table(tmp_path: Path, **table: Any) -> dict[str, Any]:
    return podman(["/model"], [{"source": str(tmp_path / "models" / "Tiny"), "target": "/model"}], **table)


async def test_weights_go_to_the_folder_that_the_engine_reads_once(
    pull: Pull, hub: tuple[Hub, str], tmp_path: Path
) -> None:
    status, out = await pull(folder_table(tmp_path))
    assert status == 0, out
    assert "complete in" in out
    folder = tmp_path / "models" / "Tiny"
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not (folder / "pytorch_model.bin").exists(), "the same weights in a format that is not read"
    assert not (folder / "original").exists()
    hub[0].fetched.clear()
    assert (await pull(folder_table(tmp_path)))[0] == 0
    assert hub[0].fetched == []


async def test_what_was_cut_off_is_continued(pull: Pull, hub: tuple[Hub, str], tmp_path: Path) -> None:
    hub[0].break_off.add("model.safetensors")
    for _ in range(2):
        status, out = await pull(folder_table(tmp_path))
    assert status == 0, out
    assert (tmp_path / "models" / "Tiny" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


async def test_an_engine_without_a_network_finds_them_in_its_cache(pull: Pull, tmp_path: Path) -> None:
    table = podman(["org/Tiny"], [{"source": str(tmp_path / "cache"), "target": "/root/.cache/huggingface"}])
    status, out = await pull(table)
    assert status == 0, out
    # As vLLM asks for them (its model_loader/weight_utils.py).
    code = (
        f"import huggingface_hub as h; h.hf_hub_download({REPO!r}, 'config.json'); "
        f"print(h.snapshot_download({REPO!r}, allow_patterns=['*.safetensors']))"
    )
    process = await asyncio.create_subprocess_exec(
        PYTHON, "-c", code, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    printed, _ = await process.communicate()
    assert printed.decode().strip().endswith(COMMIT)


async def test_failures_are_one_sentence(pull: Pull, hub: tuple[Hub, str], tmp_path: Path) -> None:
    table = folder_table(tmp_path)
    status, out = await pull(table, HF_ENDPOINT="http://127.0.0.1:9")
    assert (status, "cannot be reached" in out, "HF_ENDPOINT" in out) == (1, True, True), out
    status, out = await pull(table, "--repo", "org/Nothing")
    assert (status, "there is no such repository" in out) == (1, True), out
    status, out = await pull(table, "--revision", "v9")
    assert (status, "there is no revision v9" in out) == (1, True), out
    status, out = await pull(table, HF_HUB_OFFLINE="1")
    assert (status, "HF_HUB_OFFLINE is set" in out) == (1, True), out
    hub[0].token, hub[0].gated = "hf_good", True
    status, out = await pull(table)
    assert (status, "agreement" in out) == (1, True), out
    assert (await pull(folder_table(tmp_path, env={"HF_TOKEN": "hf_good"})))[0] == 0
    assert "hf_good" not in out
