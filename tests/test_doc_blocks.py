"""The code blocks of README and docs: what can run is run, configurations can be used."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import tomli_w

from proxy.config.load import load
from tests.served import Proxy
from tests.support import PATIENCE_S, engine_model
from tests.test_docs import FENCE, PAGES, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS: Final = "http://127.0.0.1:8080"
ENGINE: Final = {"process": {"command": ["engine", "{port}"]}}
BIN: Final = Path(sys.executable).parent

AGAINST_THE_SERVER: Final = {"status", "wake", "suspend", "stop", "drain", "undrain", "logs"}
"""Commands that ask a running server."""
BY_THEMSELVES: Final = {"config", "key", "routes", "completion"}
"""Commands that need a configuration at most."""
ELSEWHERE: Final = {
    "checkpoint": "needs CRIU: tests of the commands",
    "doctor": "examines the host: tests/doctor",
    "install": "needs systemd: tests/systemd",
    "uninstall": "needs systemd: tests/systemd",
    "serve": "tests/cli/test_serve.py, tests/test_wheel.py",
    "pull": "tests/cli/test_pull.py",
    "model": "its own tests",
    "engine": "asks engines themselves: tests/cli/test_engine_probe.py",
    "fleet": "needs several hosts: tests/fleet",
}
NOT_RUN: Final = {
    *(
        "apt-get",
        "git",
        "make",
        "ln",
        "cp",
        "mkdir",
        "cd",
        "rm",
        "mount",
        "sleep",
        "python",
        "python3",
    ),  # run on an empty machine by the script for it
    *("systemctl", "journalctl"),  # need systemd: tests/systemd
    *("podman", "pip", "npm"),  # need a registry
    *("claude", "kubectl"),  # not here
    "export",
}


def fenced() -> Iterator[Any]:
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text()), 1):
            yield pytest.param(page, match[2], match[3], id=f"{name_of(page)}:{number}")


BLOCKS: Final = [*fenced()]


def of(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.values[1] in languages]
    return pytest.mark.parametrize(("page", "language", "text"), chosen)


def test_every_block_says_what_it_is() -> None:
    known = {"", "sh", "console", "python", "toml", "json", "yaml", "nginx", "caddy"}
    assert {str(block.values[1]) for block in BLOCKS} <= known


# --- data ---


@of("toml")
def test_configurations_can_be_used(
    page: Path, language: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of one with what it takes to be whole."""
    if text.startswith("# ~/"):
        tomllib.loads(text)  # another program's
        return
    document = tomllib.loads(text)
    defaults = document.get("defaults", {})
    models = document.setdefault("models", {"demo": {}})
    for model in models.values():
        both = {**defaults, **model}
        if not {"process", "podman"} & both.keys():
            model.update(ENGINE)
        merged = {**defaults.get("podman", {}), **model.get("podman", {})}
        if "podman" in both and not {"image", "command"} <= merged.keys():
            model["podman"] = {"image": "x", "command": ["{port}"], **model.get("podman", {})}
    default = document.get("server", {}).get("default_model")
    if default is not None:
        next(iter(models.values())).setdefault("name", default)
    for name in re.findall(r"\{env:(\w+)\}", text):
        monkeypatch.setenv(name, "1")
    path = tmp_path / "warmpool.toml"
    path.write_text(tomli_w.dumps(document))
    load(path)


@of("json")
def test_json_is_json(page: Path, language: str, text: str) -> None:
    json.loads(text)


@of("yaml")
def test_yaml_is_yaml(page: Path, language: str, text: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(text), (dict, list))


# --- what runs ---


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages' files are; /etc/warmpool is a folder in it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Proxy]:
    """A server with the model `demo`, which the pages call by other names too."""
    never = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}
    names = ["code", "org/Demo-7B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"]
    settings = {"models": {"demo": engine_model(idle=never, aliases=names)}}
    proxy = Proxy(home / "server", settings=settings)
    deadline = time.monotonic() + PATIENCE_S
    while not (found := re.findall(r"listening on (http://[\d.:]+)", proxy.log.read_text())):
        assert proxy.process.poll() is None, proxy.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    proxy.url = found[0]
    yield proxy
    proxy.process.terminate()
    proxy.process.wait(PATIENCE_S)


async def run(command: list[str], cwd: Path, **environment: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT, env={**os.environ, **environment},
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE_S):
        out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


@of("python")
async def test_python_runs(page: Path, language: str, text: str, server: Proxy, home: Path) -> None:
    for package in ("openai", "anthropic", "langchain_openai"):
        if package in text and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    assert ADDRESS in text
    status, out = await run([sys.executable, "-W", "ignore", "-c", text.replace(ADDRESS, server.url)], home)
    assert status == 0, out
    assert out.strip(), "an answer"


def commands(text: str) -> Iterator[str]:
    """Whole commands of a block: lines that are continued, or within quotes, together; without what is only shown."""
    lines = text.splitlines()
    prompts = any(re.match(r"\s*\$ ", line) for line in lines)
    waiting = ""
    for line in lines:
        if not waiting:
            if prompts and not re.match(r"\s*\$ ", line):
                continue
            line = re.sub(r"^\s*\$ ", "", line).strip()
        waiting = f"{waiting}\n{line}" if waiting else line
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:
            continue  # a quote is open
        if waiting.endswith("\\"):
            continue
        if words:
            yield waiting
        waiting = ""
    assert not waiting, waiting


def program(command: str) -> str:
    """The program, without its folder; of variables that are set for it the first one's name."""
    return Path(re.split(r"[\s=]", command.strip(), maxsplit=1)[0]).name


def is_command(text: str) -> bool:
    return (
        re.match(r"(\$ |#|[\w./-]*(curl|warmpool|make|apt-get|podman|git|export|claude|cd|mkdir|cp)\b)", text)
        is not None
    )


@of("", "sh", "console")
async def test_commands_run(page: Path, language: str, text: str, server: Proxy, home: Path) -> None:
    if language == "" and not any(is_command(line.strip()) for line in text.splitlines()):
        return  # a picture of a folder, lines of a log, something to be typed into a file
    home = home / page.stem
    folder = home / "etc" / "warmpool"
    folder.mkdir(parents=True, exist_ok=True)
    (home / ".env").write_text("MODEL_ID=org/Demo-7B\n")
    shutil.copy(server.folder / "warmpool.toml", folder / "warmpool.toml")
    if "import-env" not in text:  # which writes one
        shutil.copy(server.folder / "warmpool.toml", home / "warmpool.toml")
    if text.startswith("openssl "):  # a script
        if shutil.which("openssl") is None:
            pytest.skip("no openssl here")
        status, out = await run(["bash", "-euc", text], home)
        assert status == 0, out
        return
    for command in commands(text):
        await _one(page, command, server, home)


async def _one(page: Path, command: str, server: Proxy, home: Path) -> None:
    if "://10." in command:
        return  # asks another host
    name = program(command)
    words = shlex.split(command, comments=True)
    if name == "warmpool":
        group = next((word for word in words[1:] if not word.startswith("-")), "")
        if group in ELSEWHERE or re.search(r"[\[…]|\b[A-Z]{4,}\b", " ".join(words[1:])) or {"--watch", "-f"} & {*words}:
            return
        assert group in AGAINST_THE_SERVER | BY_THEMSELVES, f"{name_of(page)}: {command}"
    elif name != "curl":
        assert name in NOT_RUN or re.fullmatch(r"[A-Z_]+", name), (
            f"{name_of(page)}: {command}: neither run nor excepted"
        )
        return
    line = re.sub(r"(?<![\w/])\S*/bin/warmpool\b", "warmpool", command)
    line = line.replace("/etc/warmpool", str(home / "etc" / "warmpool")).replace(ADDRESS, server.url)
    line = line.replace("http://127.0.0.1:18100", server.url)
    path = f"{BIN}:{os.environ['PATH']}"
    installed = str(home / "etc" / "warmpool" / "warmpool.toml")
    status, out = await run(
        ["bash", "-c", line], home, PATH=path, WARMPOOL_URL=server.url, WARMPOOL_CONFIG=installed, HOME=str(home)
    )
    assert status == 0, f"{name_of(page)}: {command}\n{out}"
    assert '"error"' not in out, f"{name_of(page)}: {command}\n{out}"
