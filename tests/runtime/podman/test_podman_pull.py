"""Container images fetched through podman, from a registry of ours."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from aiohttp.test_utils import TestServer

from proxy.runtime.podman.api import Podman, PodmanError, PodmanSilentError
from proxy.runtime.podman.pull import pull_image
from tests.podman_bench import why_no_podman
from tests.registry import Registry
from tests.support import PATIENCE_S, PYTHON, ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.podman, pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or "")]


@pytest.fixture
async def registry() -> AsyncIterator[tuple[Registry, str]]:
    """The registry, and its address."""
    it = Registry("org/engine")
    server = TestServer(it.application())
    await server.start_server()
    yield it, f"127.0.0.1:{server.port}"
    await server.close()


@pytest.fixture
async def socket(tmp_path: Path, registry: tuple[Registry, str]) -> AsyncIterator[Path]:
    """A podman service with a store of its own, which may speak HTTP with that registry."""
    configuration = tmp_path / "registries.conf"
    configuration.write_text(f'[[registry]]\nlocation = "{registry[1]}"\ninsecure = true\n')
    path = tmp_path / "podman.sock"
    short = Path(tempfile.mkdtemp(dir="/tmp"))  # podman takes 50 characters at most
    process = subprocess.Popen(
        [
            "podman", "--root", tmp_path / "root", "--runroot", short, "--storage-driver", "vfs",
            "system", "service", "--time", "0", f"unix://{path}",
        ],
        env={**os.environ, "CONTAINERS_REGISTRIES_CONF": str(configuration)},
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE_S):
        while not path.exists():
            assert process.poll() is None
            await asyncio.sleep(0.02)
    yield path
    process.terminate()
    process.wait(PATIENCE_S)
    shutil.rmtree(short)


@pytest.fixture
async def service(socket: Path, tmp_path: Path) -> AsyncIterator[Podman]:
    podman = Podman(socket, tmp_path / "own.sock", timeout_s=20.0)
    await podman.open()
    yield podman
    await podman.close()


async def test_an_image_is_fetched_with_its_progress_and_again_when_its_name_means_another(
    service: Podman, registry: tuple[Registry, str]
) -> None:
    seen: list[tuple[int, int | None]] = []
    registry[0].pause_s = 2.5  # podman tells of progress once a second
    name = f"{registry[1]}/org/engine:latest"
    first = await pull_image(service, name, lambda done, total: seen.append((done, total)))
    assert first.is_new
    assert any(total is not None and 0 < done < total for done, total in seen), seen
    registry[0].pause_s = 0.0
    assert await pull_image(service, name, lambda *_: None) == type(first)(first.image_id, is_new=False)
    registry[0].renew()
    again = await pull_image(service, name, lambda *_: None)
    assert again.is_new
    assert again.image_id != first.image_id


async def test_what_cannot_be_fetched_says_why(service: Podman, registry: tuple[Registry, str]) -> None:
    with pytest.raises(PodmanError, match="nothing|not known|unknown|404"):
        await pull_image(service, f"{registry[1]}/org/nothing:latest", lambda *_: None)
    with pytest.raises(PodmanError, match="connection refused"):
        await pull_image(service, "127.0.0.1:9/org/engine:latest", lambda *_: None)


async def test_the_command_fetches_the_image_of_a_model(
    socket: Path, registry: tuple[Registry, str], tmp_path: Path
) -> None:
    config = tmp_path / "warmpool.toml"
    table = {"image": f"{registry[1]}/org/engine:latest", "command": ["--port", "{port}"]}
    settings: dict[str, Any] = {
        "pool": {"state_dir": str(tmp_path / "state")},
        "runtime": {"podman": {"socket": str(socket)}},
        "models": {"demo": {"podman": table}},
    }
    config.write_text(tomli_w.dumps(settings))

    async def pull(*options: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            PYTHON, "-m", "proxy", "pull", "demo", "-c", str(config), *options,
            cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(PATIENCE_S):
            out, _ = await process.communicate()
        return process.returncode, out.decode()

    status, out = await pull("--only", "image")
    assert (status, "fetched" in out) == (0, True), out
    status, out = await pull()
    assert (status, "up to date" in out, "no weights are fetched" in out) == (0, True, True), out
    table["image"] = f"{registry[1]}/org/nothing:latest"
    config.write_text(tomli_w.dumps(settings))
    status, out = await pull("--only", "image")
    assert (status, "warmpool: cannot fetch" in out) == (1, True), out


async def test_a_podman_that_says_nothing_more_is_given_up(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{}\n")
        if b"_ping" not in asked:
            await reader.read()  # until we are left
            left.set()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(silent, tmp_path / "silent.sock")
    podman = Podman(tmp_path / "silent.sock", tmp_path / "own.sock", timeout_s=PATIENCE_S)
    await podman.open()
    lines = podman.lines("http://podman/v1.40/images/create", silence_s=0.2, fromImage="x")
    assert await anext(lines) == {}
    with pytest.raises(PodmanSilentError):
        await anext(lines)
    await podman.close()
    async with asyncio.timeout(PATIENCE_S):
        await left.wait()
    server.close()
    await asyncio.sleep(0)  # its connections' ends
