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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import tomli_w

from loadtest import image, machine
from loadtest.client import Client, Outcome, Request, Target
from loadtest.machine import ROOT
from proxy.checkpoint.store import CheckpointStore
from proxy.runtime.state_dir import Claim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from loadtest.results import Writer

PATIENCE_S: Final = 600.0
_POSTPONED_S: Final = 15.0
"""No timetable of a test has a step so far ahead: it was tried, and is tried again later."""
_STAYS_S: Final = 1.0
"""An instance that rests for so long with nothing to come stays there."""
PROMPT: Final = "The quick brown fox jumps over the lazy dog. Once upon a time"
TMPFS: Final = Path("/dev/shm")
NEVER: Final = dict.fromkeys(("sleeping", "suspended", "checkpointed", "archived", "stopped"), "never")
TIERS: Final[Mapping[str, Mapping[str, str]]] = {
    "ready": {},
    "sleeping": {"sleeping": "100ms"},
    "suspended": {"sleeping": "100ms", "suspended": "200ms"},
    "checkpointed": {"sleeping": "100ms", "checkpointed": "200ms"},
    "archived": {"sleeping": "100ms", "checkpointed": "200ms", "archived": "300ms"},
    "stopped": {"stopped": "100ms"},
}
"""An idle timetable with which an instance comes to rest on a tier."""


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
    pauses: bool = False
    """It is served as vLLM is, with a copy of its weights: so it can be paused while another model runs."""
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
    keep: Path | None = None
    """A folder in which images stay, and are found again, instead of being made for each run."""

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

    def count(self, wanted: int | None, default: int) -> int:
        """How many models to serve: `wanted`, or `default` of them as far as the configuration has so many."""
        if wanted is not None or self.config is None:
            return wanted or default
        return min(default, len(self.base()["models"]))

    def entry(self, key: str) -> Mapping[str, Any]:
        """What the configuration says of a model."""
        found: Mapping[str, Any] = self.base().get("models", {}).get(key, {})
        return found

    def command(self, key: str) -> list[str]:
        """The whole command of a model's engine, behind image and entry point; empty for the load-test engine."""
        engine = self.entry(key).get("podman") or self.entry(key).get("process") or {}
        parts = [engine.get("image"), *(engine.get("entrypoint") or ()), *(engine.get("command") or ())]
        return [str(part) for part in parts if part is not None]

    def is_vllm(self, key: str) -> bool:
        """Whether a model's engine is vLLM, by its command."""
        return any("vllm" in part for part in self.command(key))

    @property
    def in_podman(self) -> bool:
        """Whether any engine runs in a container."""
        if self.config is None:
            return self.runtime == "podman"
        return any("podman" in model for model in self.base()["models"].values())

    @contextlib.contextmanager
    def folders(self, images_below: Path = TMPFS, *, fresh: bool = False) -> Iterator[Folders]:
        """Those of a run: what is kept, unless they are to be `fresh`, else temporary ones.

        Several proxies may serve one after the other with the same: the next one finds the images of the last.
        """
        if self.keep is not None and not fresh:
            where = _kept(self.keep)
            self._check(where)
            yield where
            return
        with folders(images_below) as where:
            try:
                yield replace(where, shared=True)
            finally:
                if self.in_podman:
                    remove_containers(where)

    def name(self, key: str) -> str:
        """What clients call a model."""
        return str(self.base().get("models", {}).get(key, {}).get("name", key))

    def _check(self, where: Folders) -> None:
        """Raises ServeError when an image that was kept is not of the kind that is asked for."""
        for name in where.image_names() if self.sleep_level is not None else ():
            level = CheckpointStore(where.images, 0, None).load(name).sleep_level
            if level != self.sleep_level:
                raise ServeError(
                    f"{self.keep}: the engine in the image {name} sleeps at level {level}; keep another one"
                )

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
        for model in models.values():
            if model.get("golden_sleep_level") == 1:
                # With the weights in the image there is nothing that a copy of them would be for.
                model.update({"weights_copy": False, "sleep_level": 1} if "weights_copy" in model else {})
        return {**base, "pool": {**base.get("pool", {}), **(pool or {})}, "models": models}

    def _table(self) -> dict[str, Any]:
        # Fresh random numbers after a restore, or each start would log that there are none.
        more: dict[str, Any] = {"health": {"interval": "20ms"}}
        more |= (
            {"engine": "vllm", "weights_copy": True} if self.engine.pauses else {"reseed": {"path": "/debug/reseed"}}
        )
        if self.runtime == "podman":
            command = [image.build() if not _built else _built[0], *self.engine.arguments()]
            _built[:] = command[:1]
            return {"podman": {"image": command[0], "command": command[1:]}, **more}
        command = ["{python}", "-m", "loadtest.engine", *self.engine.arguments()]
        return {"process": {"command": command, "cwd": str(ROOT)}, **more}


_built: list[str] = []
"""The image's name, once it was made in this process."""


def default_runtime() -> str:
    """Containers where they can be had, else processes."""
    return "podman" if os.geteuid() == 0 and shutil.which("podman") and shutil.which("criu") else "process"


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a proxy keeps what: both are deleted afterwards, unless they are to be kept."""

    state: Path
    images: Path
    shared: bool = False
    """Another proxy comes after this one: its containers stay."""

    def image_names(self) -> list[str]:
        """The finished images."""
        return sorted(path.parent.name for path in self.images.glob("*/manifest.json") if "." not in path.parent.name)


@contextlib.contextmanager
def folders(images_below: Path = TMPFS) -> Iterator[Folders]:
    """Temporary ones; the images' on tmpfs where there is one."""
    below = images_below if os.access(images_below, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="warmpool-loadtest-") as state,
        tempfile.TemporaryDirectory(prefix="warmpool-loadtest-", dir=below) as images,
    ):
        yield Folders(Path(state), Path(images))


def _kept(folder: Path) -> Folders:
    """Folders for good. Raises ServeError."""
    where = Folders(folder.absolute() / "state", folder.absolute() / "images", shared=True)
    for path in (where.state, where.images):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ServeError(f"{path}: {error.strerror}") from error
    return where


def discard(folder: Path) -> None:
    """Delete what was kept, and its containers. Raises ServeError when a folder was made by nobody's `--keep`."""
    where = Folders(folder.absolute() / "state", folder.absolute() / "images")
    if not (where.state.is_dir() and where.images.is_dir()):
        raise ServeError(f"{folder}: nothing was kept there")
    if shutil.which("podman"):
        remove_containers(where)
    for path in (where.state, where.images):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class Served:
    """A proxy that serves."""

    def __init__(self, client: Client, log: Path, process: asyncio.subprocess.Process, begin: int = 0) -> None:
        self.client = client
        self.log = log
        self.process = process
        self._begin = begin
        """Of its lines in the log."""
        self.ended_s: float | None = None
        """From SIGTERM to its end; None while it runs, and when it had to be killed."""

    async def status(self) -> dict[str, Any]:
        """Model key → what `/admin/status` says of it."""
        found = await self.client.json("/admin/status")
        if found is None:
            raise ServeError(f"the proxy does not answer any more:\n{tail(self.log)}")
        models: dict[str, Any] = found["models"]
        return models

    async def state(self, key: str) -> str:
        """Of the first instance; `stopped` when there is none."""
        return _state((await self.status())[key])

    async def until(self, key: str, state: str) -> None:
        """Return when the first instance has come to a state. Raises ServeError when the host lacks that tier."""
        missing = (await self.status())[key]["missing_tiers"].get(state)
        if missing:
            raise ServeError(f"there is no tier {state!r} here: {missing}")
        began_s = stays_s = time.monotonic()
        while (model := (await self.status())[key]) and (found := _state(model)) != state:
            if found == "stopped" and not model["queue"]:
                raise ServeError(f"{key} should be {state}, but its engine has ended:\n{tail(self.log)}")
            now_s = time.monotonic()
            if now_s - began_s > PATIENCE_S:
                raise ServeError(f"{key} is {found} instead of {state}:\n{tail(self.log)}")
            if not _stays(model):
                stays_s = now_s
            elif now_s - stays_s > _STAYS_S:
                raise ServeError(f"{key} stays {found}: {self._trouble() or 'its engine has no such tier'}")
            await asyncio.sleep(0.01)

    def _trouble(self) -> str:
        """The last of its lines on a step that failed, without the time; empty without one."""
        lines = self.log.read_bytes()[self._begin :].decode("utf-8", "replace").splitlines()
        found = [line for line in lines if " ERROR " in line or " cannot go to " in line]
        return re.sub(r"^\S+ [A-Z]+ +", "", found[-1]) if found else ""

    async def ask(self, name: str, series: str, *, max_tokens: int = 16, **tags: Any) -> Outcome:
        """One streamed completion, now."""
        return await self.client.ask(completion(name, 0.0, series, max_tokens=max_tokens, keep_text=True, **tags))


def _state(model: Mapping[str, Any]) -> str:
    instances = model["instances"]
    return str(instances[0]["state"]) if instances else "stopped"


def _stays(model: Mapping[str, Any]) -> bool:
    """Whether its first instance rests where no time will take it further down: no step is left, or it failed."""
    if model["queue"] or not model["instances"]:
        return False
    first = model["instances"][0]
    step = first["next_step"]
    return (
        first["state"] in TIERS
        and not first["leases"]
        and (step is None or step["at_unix_s"] > time.time() + _POSTPONED_S)
    )


def completion(
    name: str,
    due_s: float,
    series: str,
    *,
    prompt: str | list[int] = PROMPT,
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
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", "serve", "-c", str(config),
            stdout=file, stderr=file, cwd=ROOT, env=_environment(),
        )  # fmt: skip
    try:
        url = await _listening(process, log, start)
        async with Client(Target.at(url), timeout_s=PATIENCE_S) as client:
            served = Served(client, log, process, start)
            yield served
        served.ended_s = await _end(process)
    finally:
        await _end(process)
        if not where.shared and any("podman" in model for model in settings["models"].values()):
            await asyncio.to_thread(remove_containers, where)


async def _listening(process: asyncio.subprocess.Process, log: Path, start: int) -> str:
    while True:
        found = re.findall(rb"listening on (http://[\d.:]+)", log.read_bytes()[start:])
        if found:
            return str(found[-1].decode())
        if process.returncode is not None:
            raise ServeError(f"the proxy ended with status {process.returncode}:\n{tail(log)}")
        await asyncio.sleep(0.02)


async def _end(process: asyncio.subprocess.Process) -> float | None:
    """End the proxy; how long that took, unless it had ended already or obeyed only SIGKILL."""
    took_s = None
    if process.returncode is None:
        began_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 60)
            took_s = time.monotonic() - began_s
        except TimeoutError:
            process.kill()
    await process.wait()
    return took_s


def remove_containers(where: Folders) -> None:
    """Those that a proxy on these folders left for its successor."""
    owned = f"--filter=label=io.warmpool.owner={Claim(where.state).owner}"
    listed = subprocess.run(["podman", "ps", "--all", "--quiet", owned], check=False, capture_output=True, text=True)
    if ids := listed.stdout.split():
        subprocess.run(["podman", "rm", "--force", "--time", "0", *ids], check=False, capture_output=True)


def tail(log: Path, count: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-count:])


async def learn_versions(setup: Setup, where: Folders, writer: Writer) -> None:
    """Write down what the user's engine that runs now is made of, unless it is known."""
    if setup.config is not None and not machine.ENGINE_PACKAGES.keys() <= writer.result.versions.keys():
        writer.learn(await asyncio.to_thread(machine.engine_versions, Claim(where.state).owner))


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    status: int
    output: str
    errors: str

    @property
    def reason(self) -> str:
        """The last line of what it said went wrong."""
        return (self.errors.strip().splitlines() or ["no reason given"])[-1]


async def warmpool(*arguments: str, config: Path) -> Done:
    """Run a command of warmpool with a configuration; when cancelled, it is interrupted and waited for."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", *arguments, "-c", str(config),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=_environment(),
    )  # fmt: skip
    try:
        said, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()
    return Done(process.returncode or 0, said.decode(), errors.decode())


def _environment() -> dict[str, str]:
    """Without keys of a proxy's configuration."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WARMPOOL_")}
