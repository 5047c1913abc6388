"""`warmpool serve` with a configuration made for a test, in folders of its own, and nothing left of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import tomli_w

from loadtest import image
from loadtest.client import Client, Outcome, Request, Target
from loadtest.machine import ROOT
from proxy.runtime.claim import Claim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

PATIENCE_S: Final = 600.0
PROMPT: Final = "The quick brown fox jumps over the lazy dog. Once upon a time"
TMPFS: Final = Path("/dev/shm")
NEVER: Final = dict.fromkeys(("sleeping", "suspended", "checkpointed", "archived", "stopped"), "never")
RUNGS: Final[Mapping[str, Mapping[str, str]]] = {
    "ready": {},
    "sleeping": {"sleeping": "100ms"},
    "suspended": {"sleeping": "100ms", "suspended": "200ms"},
    "checkpointed": {"sleeping": "100ms", "checkpointed": "200ms"},
    "archived": {"sleeping": "100ms", "checkpointed": "200ms", "archived": "300ms"},
    "stopped": {"stopped": "100ms"},
}
"""An idle timetable with which an instance comes to rest on a rung."""


class ServeError(Exception):
    """The proxy could not be brought to where a test needs it; the text says why."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The load-test engine's own figures."""

    memory: str = "256MiB"
    load_s: float = 5.0
    ttft_s: float = 0.02
    tokens_per_second: float = 100.0
    max_model_len: int = 4096
    sleep_mode: bool = True
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """For its command."""
        return [
            "--host", "{host}", "--port", "{port}", "--model", "{model}",
            "--sleep-mode" if self.sleep_mode else "--no-sleep-mode",
            "--memory", self.memory, "--load-seconds", str(self.load_s), "--ttft", str(self.ttft_s),
            "--tokens-per-second", str(self.tokens_per_second), "--max-model-len", str(self.max_model_len),
            *self.options,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setup:
    """What is served: the load-test engine in one of the runtimes, or models of the user's own configuration."""

    runtime: str = "process"
    engine: Engine = field(default_factory=Engine)
    config: Path | None = None
    model: str | None = None
    """A key of `config`; default is its first model."""
    sleep_level: int | None = None
    """At which an engine sleeps in its checkpoint, instead of as configured."""

    def base(self) -> dict[str, Any]:
        """The user's configuration. Raises ServeError."""
        if self.config is None:
            return {}
        try:
            found = tomllib.loads(self.config.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ServeError(f"{self.config}: {error}") from error
        if not found.get("models"):
            raise ServeError(f"{self.config}: there is no model in it")
        return found

    def keys(self, count: int = 1) -> list[str]:
        """The keys of the models that are served."""
        if self.config is None:
            return ["demo"] if count == 1 else [f"model_{number}" for number in range(1, count + 1)]
        models = list(self.base()["models"])
        if self.model is not None:
            if self.model not in models:
                raise ServeError(f"{self.config}: no model {self.model!r}; there are: {', '.join(models)}")
            models = [self.model, *(m for m in models if m != self.model)]
        if len(models) < count:
            raise ServeError(f"{self.config}: {count} models are needed, there are {len(models)}")
        return models[:count]

    def name(self, key: str) -> str:
        """What clients call a model."""
        return str(self.base().get("models", {}).get(key, {}).get("name", key))

    def settings(
        self,
        idle: Mapping[str, str],
        *,
        count: int = 1,
        pool: Mapping[str, Any] | None = None,
        entry: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A configuration in which `count` models have an idle timetable of `idle` and nothing else.

        `pool` and `entry` are further keys of `[pool]` and of every model.
        """
        base = self.base()
        models = {
            key: {
                **(self._table() if self.config is None else base["models"][key]),
                **({} if self.sleep_level is None else {"golden_sleep_level": self.sleep_level}),
                **(entry or {}),
                "idle": {**NEVER, **idle},
            }
            for key in self.keys(count)
        }
        return {**base, "pool": {**base.get("pool", {}), **(pool or {})}, "models": models}

    def _table(self) -> dict[str, Any]:
        health = {"interval": "20ms"}
        if self.runtime == "podman":
            command = [image.build() if not _built else _built[0], *self.engine.arguments()]
            _built[:] = command[:1]
            return {"podman": {"image": command[0], "command": command[1:]}, "health": health}
        command = ["{python}", "-m", "loadtest.engine", *self.engine.arguments()]
        return {"process": {"command": command, "cwd": str(ROOT)}, "health": health}


_built: list[str] = []
"""The image's name, once it was made in this process."""


def default_runtime() -> str:
    """Containers where they can be had, else processes."""
    return "podman" if os.geteuid() == 0 and shutil.which("podman") and shutil.which("criu") else "process"


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a proxy keeps what: both are deleted afterwards."""

    state: Path
    images: Path


@contextlib.contextmanager
def folders(images_below: Path = TMPFS) -> Iterator[Folders]:
    """Temporary ones; the images' on tmpfs where there is one."""
    below = images_below if os.access(images_below, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="warmpool-loadtest-") as state,
        tempfile.TemporaryDirectory(prefix="warmpool-loadtest-", dir=below) as images,
    ):
        yield Folders(Path(state), Path(images))


class Served:
    """A proxy that serves."""

    def __init__(self, client: Client, log: Path, process: asyncio.subprocess.Process) -> None:
        self.client = client
        self.log = log
        self.process = process

    async def status(self) -> dict[str, Any]:
        """Model key → what `/admin/status` says of it."""
        found = await self.client.json("/admin/status")
        if found is None:
            raise ServeError(f"the proxy does not answer any more:\n{tail(self.log)}")
        models: dict[str, Any] = found["models"]
        return models

    async def state(self, key: str) -> str:
        """Of the first instance; `stopped` when there is none."""
        instances = (await self.status())[key]["instances"]
        return str(instances[0]["state"]) if instances else "stopped"

    async def until(self, key: str, state: str) -> None:
        """Return when the first instance has come to a state. Raises ServeError when the host lacks that rung."""
        missing = (await self.status())[key]["missing_rungs"].get(state)
        if missing:
            raise ServeError(f"there is no rung {state!r} here: {missing}")
        began_s = time.monotonic()
        while (found := await self.state(key)) != state:
            if found == "stopped" and not (await self.status())[key]["queue"]:
                raise ServeError(f"{key} should be {state}, but its engine has ended:\n{tail(self.log)}")
            if time.monotonic() - began_s > PATIENCE_S:
                raise ServeError(f"{key} is {found} instead of {state}:\n{tail(self.log)}")
            await asyncio.sleep(0.01)

    async def ask(self, name: str, series: str, *, max_tokens: int = 16, **tags: Any) -> Outcome:
        """One streamed completion, now."""
        return await self.client.ask(completion(name, 0.0, series, max_tokens=max_tokens, keep_text=True, **tags))


def completion(
    name: str,
    due_s: float,
    series: str,
    *,
    prompt: str = PROMPT,
    max_tokens: int = 16,
    keep_text: bool = False,
    **tags: Any,
) -> Request:
    """A request for a streamed completion at temperature 0."""
    body = {"model": name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    return Request(due_s, body, series=series, tags=tags, keep_text=keep_text)


@contextlib.asynccontextmanager
async def serving(settings: Mapping[str, Any], where: Folders) -> AsyncIterator[Served]:
    """A proxy with these settings and folders; afterwards it and its engines have ended, its images stay."""
    base_runtime = settings.get("runtime", {})
    # Two proxies that start engines in one moment could pick the same port.
    first_port = 20000 + os.getpid() % 120 * 100
    made = {
        **settings,
        "server": {**settings.get("server", {}), "host": "127.0.0.1", "port": 0},
        "pool": {**settings.get("pool", {}), "state_dir": str(where.state), "checkpoint_dir": str(where.images)},
        "runtime": {
            **base_runtime,
            "podman": {**base_runtime.get("podman", {}), "on_exit": "stop"},
            "process": {"ports": f"{first_port}-{first_port + 99}", **base_runtime.get("process", {})},
        },
    }
    config, log = where.state / "serve.toml", where.state / "serve.log"
    config.write_text(tomli_w.dumps(made))
    start = log.stat().st_size if log.exists() else 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WARMPOOL_")}
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", "serve", "-c", str(config),
            stdout=file, stderr=file, cwd=ROOT, env=environment,
        )  # fmt: skip
    try:
        url = await _listening(process, log, start)
        async with Client(Target.at(url), timeout_s=PATIENCE_S) as client:
            yield Served(client, log, process)
    finally:
        await _end(process)
        if any("podman" in model for model in settings["models"].values()):
            await asyncio.to_thread(remove_containers, where)


async def _listening(process: asyncio.subprocess.Process, log: Path, start: int) -> str:
    while True:
        found = re.findall(rb"listening on (http://[\d.:]+)", log.read_bytes()[start:])
        if found:
            return str(found[-1].decode())
        if process.returncode is not None:
            raise ServeError(f"the proxy ended with status {process.returncode}:\n{tail(log)}")
        await asyncio.sleep(0.02)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 60)
        except TimeoutError:
            process.kill()
    await process.wait()


def remove_containers(where: Folders) -> None:
    """Those that a proxy on these folders left for its successor."""
    owned = f"--filter=label=io.warmpool.owner={Claim(where.state).owner}"
    listed = subprocess.run(["podman", "ps", "--all", "--quiet", owned], check=False, capture_output=True, text=True)
    if ids := listed.stdout.split():
        subprocess.run(["podman", "rm", "--force", "--time", "0", *ids], check=False, capture_output=True)


def tail(log: Path, count: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-count:])


def warmpool(*arguments: str, config: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of warmpool with a configuration."""
    return subprocess.run(
        [sys.executable, "-m", "proxy", *arguments, "-c", str(config)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
