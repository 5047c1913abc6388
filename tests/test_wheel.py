"""What is built to be installed: complete, and it serves from an empty environment."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.support import ENGINE_PORTS, PATIENCE_S, PYTHON, ROOT

if TYPE_CHECKING:
    from pathlib import Path

BUILD_S = 600.0


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, check=False, text=True, timeout=BUILD_S,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist of this tree."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(PYTHON, "-m", "hatchling", "build", "--directory", folder)
    return folder


def tracked(*folders: str) -> set[str]:
    """The files of the sources, by path."""
    return {path for path in run("git", "ls-files", "--", *folders).splitlines() if (ROOT / path).exists()}


def in_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_packages_and_what_they_read(dist: Path) -> None:
    (wheel,) = dist.glob("warmpool_proxy-*.whl")
    there = in_wheel(wheel)
    assert tracked("proxy", "loadtest") - there == set()
    units = {path.replace("systemd/", "proxy/systemd/units/", 1) for path in tracked("systemd")}
    assert there - tracked("proxy", "loadtest") == units | {"proxy/config/embedded.toml"}


def test_the_sources_are_complete_and_make_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as tar:
        there = {name.partition("/")[2] for name in tar.getnames()}
    assert {path for path in tracked() if not path.startswith(".ci/")} - there == set()
    run(PYTHON, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist)
    (again,) = tmp_path.glob("*.whl")
    assert in_wheel(again) == in_wheel(wheel)


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with nothing but the wheel and what that asks for; its folder of programs."""
    folder = tmp_path_factory.mktemp("venv")
    run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--without-pip", folder)
    (wheel,) = dist.glob("*.whl")
    pip: list[str | Path] = [
        PYTHON,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "--quiet",
        "--disable-pip-version-check",
    ]
    run(*pip, "install", "--no-compile", wheel)
    return folder / "bin"


@pytest.mark.timeout(2 * BUILD_S)
async def test_installed_from_the_wheel_it_serves_without_a_configuration_and_says_what_to_do(
    installed: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WARMPOOL_", "PYTHON"))}
    environment |= {
        "WARMPOOL_SERVER__PORT": "0",
        "WARMPOOL_POOL__STATE_DIR": str(tmp_path / "state"),
        "WARMPOOL_POOL__CHECKPOINT_DIR": str(tmp_path / "images"),
        "WARMPOOL_RUNTIME__PROCESS__PORTS": ENGINE_PORTS,
    }
    (tmp_path / "empty").mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [installed / "warmpool", "serve"], cwd=tmp_path / "empty", env=environment, stdout=output, stderr=output
        )
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (found := re.search(r"OpenAI API: (\S+), status page: (\S+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.05)
        api, page = found[1], found[2]
        ask: dict[str, Any] = {"model": "demo", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
        timeout = aiohttp.ClientTimeout(PATIENCE_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            async with session.post(f"{api}/chat/completions", json=ask) as answer:
                assert answer.status == 200, await answer.text()
                assert (await answer.text()).endswith("data: [DONE]\n\n")
            async with session.get(page) as answer:
                assert (answer.status, "<title>" in await answer.text()) == (200, True)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
    said = log.read_text()
    assert "no configuration was named" in said
    assert "warmpool serve --config" in said
