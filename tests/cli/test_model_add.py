"""`warmpool model add`: the entry written and checked, the golden checkpoint made, and a server that uses it."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import pytest

from proxy.config.load import load
from tests.forked import PROXIES
from tests.podman_bench import engine_image, tmpfs_folder, why_no_podman
from tests.served import Proxy
from tests.support import ENGINE_PORTS, PYTHON, why_no_criu

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

HEAD = """\
# Kept: what a person wrote.
[server]
port = 0   # any

[models.first]
process = { command = ["x", "{port}"] }  # this too
"""
ENGINE = ["--memory", "8MiB", "--ttft", "0.001", "--tokens-per-second", "2000", "--sleep-mode"]
PROCESS = [PYTHON, "-m", "loadtest.engine", "--host", "0.0.0.0", "--port", "8000", "--model", "demo", *ENGINE]


def warmpool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return PROXIES.run(arguments)


@pytest.fixture
def images() -> Iterator[Path]:
    yield from tmpfs_folder()


@pytest.fixture
def file(tmp_path: Path, images: Path) -> Path:
    path = tmp_path / "warmpool.toml"
    folders = f'[pool]\nstate_dir = "{tmp_path}/state"\ncheckpoint_dir = "{images}"\n'
    path.write_text(f'{HEAD}\n{folders}[runtime.process]\nports = "{ENGINE_PORTS}"\n')
    path.chmod(0o640)
    return path


def test_the_entry_is_added_and_the_rest_stays_as_it_is(file: Path) -> None:
    before = file.read_text()
    done = warmpool("model", "add", "-c", str(file), "--no-checkpoint", "--", *PROCESS)
    assert done.returncode == 0, done.stderr
    assert file.read_text().startswith(before.rstrip())
    assert file.stat().st_mode & 0o777 == 0o640
    assert f"{file}: models.demo was added, which clients call demo" in done.stdout
    assert re.search(r"checkpointed +10m idle +~2.5 s", done.stdout)
    demo = load(file).models["demo"]
    assert demo.process is not None
    assert demo.process.command[:7] == [PYTHON, "-m", "loadtest.engine", "--host", "{host}", "--port", "{port}"]
    again = warmpool("model", "add", "-c", str(file), "--no-checkpoint", "--", *PROCESS)
    assert (again.returncode, "there is a model demo in" in again.stderr) == (2, True)
    other = warmpool("model", "add", "-c", str(file), "--no-checkpoint", "--key", "b", "vllm serve org/B --port 1")
    assert other.returncode == 0, other.stderr
    assert "warning: programs of engines: models.b.process.command: there is no program vllm" in other.stderr
    assert load(file).names() == {"first": "first", "demo": "demo", "org/B": "b"}


def test_a_bad_line_or_a_bad_file_changes_nothing(file: Path, tmp_path: Path) -> None:
    before = file.read_text()
    for line in (["ls", "-la"], ["docker", "run", "--user", "3", "x"], ["vllm", "serve"]):
        done = warmpool("model", "add", "-c", str(file), "--", *line)
        assert done.returncode == 1
        assert done.stderr.startswith("warmpool: ")
        assert "Nothing was written" in done.stderr
    # A name that another model has, and an image that nobody could pull.
    for line in (["vllm", "serve", "first"], ["podman", "run", "--net", "a:b", "vllm", "--model", "m"]):
        done = warmpool("model", "add", "-c", str(file), "--key", "second", "--", *line)
        assert (done.returncode, "nothing was written" in done.stderr) == (78, True), done.stderr
    assert file.read_text() == before
    broken = tmp_path / "broken.toml"
    broken.write_text("[server\n")
    done = warmpool("model", "add", "-c", str(broken), "--", *PROCESS)
    assert (done.returncode, broken.read_text()) == (78, "[server\n")


def test_a_new_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new.toml"
    done = warmpool("model", "add", "-c", str(path), "--no-checkpoint", "--", "vllm", "serve", "m", "--api-key", "k")
    assert done.returncode == 0, done.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    assert "can be read by others" not in done.stderr
    path.chmod(0o644)
    done = warmpool("model", "add", "-c", str(path), "--no-checkpoint", "--", "vllm", "serve", "n", "--api-key", "k")
    assert "can be read by others; chmod 600" in done.stderr


async def served(file: Path, tmp_path: Path) -> str:
    """The tier that the first request to a server of this file finds."""
    settings = tomllib.loads(file.read_text())
    del settings["models"]["first"]
    proxy = await Proxy(tmp_path / "w", settings=settings).listening()
    tier, _ = await proxy.ask()
    proxy.process.terminate()
    assert await proxy.ended() == 0
    return tier


@pytest.mark.criu
@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
async def test_a_process_is_checkpointed_and_served(file: Path, tmp_path: Path) -> None:
    done = warmpool("model", "add", "-c", str(file), "--", *PROCESS)
    assert done.returncode == 0, done.stderr
    assert re.search(r"demo-1: restored in [\d.]+ s; it answers as before", done.stdout)
    assert re.search(r"checkpointed +10m idle +[\d.]+ s +[\d.]+ MiB on tmpfs", done.stdout)
    assert re.search(r"stopped +never +[\d.]+ s +nothing", done.stdout)
    assert await served(file, tmp_path) == "checkpointed"


@pytest.mark.podman
@pytest.mark.skipif(why_no_podman() is not None, reason=str(why_no_podman()))
async def test_a_container_is_checkpointed_and_served(file: Path, tmp_path: Path) -> None:
    line = ["podman", "run", "--rm", "-d", "-p", "8000:8000", "--shm-size", "16m", "-e", "A=b", engine_image()]
    done = warmpool(
        "model", "add", "-c", str(file), "--", *line, "--host", "0.0.0.0", "--port", "8000", "--model", "demo", *ENGINE
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"demo: restored in [\d.]+ s; it answers as before", done.stdout)
    assert re.search(r"checkpointed +10m idle +[\d.]+ s +[\d.]+ MiB on tmpfs", done.stdout)
    assert await served(file, tmp_path) == "checkpointed"


@pytest.mark.criu
@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
def test_a_checkpoint_that_cannot_be_made_leaves_the_entry_and_says_what_to_do(file: Path) -> None:
    done = warmpool("model", "add", "-c", str(file), "--", *PROCESS, "--no-such-option")
    assert done.returncode == 1
    assert "its golden checkpoint was not made: " in done.stderr
    assert f"`warmpool checkpoint create demo -c {file}` tries again" in done.stderr
    assert "demo" in load(file).models
