"""Engines as plain local process trees: no container, no root needed; checkpoints with CRIU where the host can.

An engine is the leader of its own session, with its own log file. Suspended is SIGSTOP for every process of the tree.
A checkpoint is a CRIU image of the tree; it is restored with the same pids as our own child, as often as one likes.
Facts about CRIU that shape the options are in docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from proxy.checkpoints import CheckpointStore, Manifest, StoreError, measure
from proxy.errors import HostError, RuntimeFailure
from proxy.instance import Tier
from proxy.runtime import launch, processes
from proxy.runtime.base import Found, Handle, ImageFacts, Rungs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import IO

    from proxy.config import ModelSettings, ProcessRuntimeSettings
    from proxy.instance import Stages

HOST = "127.0.0.1"
MIN_CRIU = (4, 2)

# cgroups are left alone: the restored tree stays in warmpool's own. Established connections are dumped as closed, since
# a client's idle one would fail the dump. Ghost files are vLLM's unlinked shared memory.
_CRIU_COMMON: Final = ("-v2", "--tcp-close", "--file-locks", "--link-remap", "--manage-cgroups=ignore")
_CRIU_DUMP: Final = ("--network-lock", "skip", "--ghost-limit", str(4 << 30))
# A sibling of criu is our own child, so its end is seen and reaped like that of one we started.
_CRIU_RESTORE: Final = ("--restore-detached", "--restore-sibling")


@dataclass(slots=True)
class _Engine:
    """What is known of one instance; `pid` is the session's leader, None while nothing runs."""

    handle: Handle
    model: str
    spec_digest: str
    pid: int | None = None
    suspended: bool = False


class ProcessRuntime:
    """The runtime `process`. See `proxy.runtime.base.Runtime` for what each method promises."""

    name = "process"

    def __init__(self, settings: ProcessRuntimeSettings, *, state_dir: Path, store: CheckpointStore) -> None:
        self._settings = settings
        self._state_dir = state_dir.absolute()
        self._store = store
        self._engines: dict[str, _Engine] = {}
        self._rungs = Rungs(frozenset())
        self._criu_version = ""
        self._lock_file: IO[bytes] | None = None
        self._guard: asyncio.subprocess.Process | None = None
        # The mark of all our engines, so that two proxies with different folders leave each other's alone.
        self._owner = hashlib.sha256(str(self._state_dir).encode()).hexdigest()[:12]

    # --- the host ---

    async def open(self) -> None:
        """Lock the state folder, kill strays, find out about CRIU.

        Raises HostError when another warmpool uses the folder or it cannot be made.
        """
        self._lock()
        processes.become_subreaper()
        await processes.kill_whole(f"{self._owner}:", None)
        self._guard = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy.runtime.guard", f"{self._owner}:",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        reason = await self._why_no_criu()
        if reason is None:
            self._rungs = Rungs(frozenset({Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED}))
            self._store.sweep()
        else:
            self._rungs = Rungs(frozenset({Tier.SLEEPING, Tier.SUSPENDED}), {Tier.CHECKPOINTED: reason})

    def _lock(self) -> None:
        try:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._state_dir / "logs").mkdir(mode=0o700, exist_ok=True)
            self._lock_file = (self._state_dir / "lock").open("wb")
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise HostError(f"another warmpool uses state_dir {self._state_dir}; stop it or set another one") from None
        except OSError as error:
            raise HostError(f"state_dir {self._state_dir}: {error.strerror}; set pool.state_dir") from error

    async def _why_no_criu(self) -> str | None:
        """None when trees can be checkpointed here, else what is missing."""
        if shutil.which(self._settings.criu) is None:
            return f"no program {self._settings.criu!r} in PATH; install CRIU 4.2 or later (make host)"
        if os.geteuid() != 0:
            return "checkpointing needs root"
        status, output = await self._criu_output("--version")
        version = next((w for line in output.splitlines() if line.startswith("Version:") for w in line.split()[1:]), "")
        numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdigit())
        if status != 0 or numbers < MIN_CRIU:
            return f"CRIU is {version or 'unknown'}, 4.2 or later is needed (make host)"
        status, output = await self._criu_output("check")
        if status != 0:
            return f"criu check fails: {_last_line(output)}"
        try:
            self._store.open()
        except StoreError as error:
            return str(error)
        self._criu_version = version
        return None

    async def close(self) -> None:
        """Dismiss the guard and unlock the folder."""
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            await self._guard.wait()
            self._guard = None
        self._unlock()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def rungs(self) -> Rungs:
        """What `open` found."""
        return self._rungs

    # --- starting and ending ---

    async def start(self, instance_id: str, key: str, model: ModelSettings) -> Handle:
        """Start the model's command; see `Runtime.start`."""
        assert model.process is not None  # noqa: S101 - the configuration says which runtime a model has
        known = self._engines.get(instance_id)
        handle = known.handle if known is not None else Handle(instance_id, HOST, self._free_port())
        values = {
            "host": handle.host,
            "port": str(handle.port),
            "model": model.name or key,
            "python": sys.executable,
        }
        command = [_fill(argument, values) for argument in model.process.command]
        directory = str(model.process.cwd or Path.cwd())
        environment = {
            **os.environ,
            **{name: value.get_secret_value() for name, value in model.process.env.items()},
            processes.MARK: self._mark(instance_id),
        }
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            raise RuntimeFailure("start", f"no program {command[0]!r}; correct models.{key}.process.command")
        engine = known or _Engine(handle, key, spec_digest(key, model))
        self._engines[instance_id] = engine
        log = os.open(self.log_path(instance_id), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            engine.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", launch.__file__, directory, *command],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ],
                setsid=True,
            )
        except OSError as error:
            raise RuntimeFailure("start", f"{command[0]}: {error}") from error
        finally:
            os.close(log)
        engine.suspended = False
        return handle

    async def wait_exit(self, handle: Handle) -> str:
        """See `Runtime.wait_exit`."""
        engine = self._engines[handle.instance_id]
        return "ended" if engine.pid is None else await processes.wait_gone(engine.pid)

    async def drop(self, handle: Handle) -> None:
        """See `Runtime.drop`."""
        engine = self._engines.get(handle.instance_id)
        if engine is not None:
            await processes.kill_whole(self._mark(handle.instance_id), engine.pid)
            engine.pid = None
            engine.suspended = False

    async def discard_image(self, handle: Handle) -> None:
        """See `Runtime.discard_image`."""
        await self._store.remove(handle.instance_id)

    async def remove(self, handle: Handle) -> None:
        """See `Runtime.remove`."""
        engine = self._engines.get(handle.instance_id)
        if engine is None:
            return
        if engine.pid is not None:
            tree = processes.members(self._mark(handle.instance_id), engine.pid)
            processes.send(tree, signal.SIGCONT)
            processes.send([engine.pid], signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.stop_grace):
                    await processes.wait_gone(engine.pid)
        await self.drop(handle)
        await self._store.remove(handle.instance_id)
        self._engines.pop(handle.instance_id, None)

    # --- suspended ---

    async def suspend(self, handle: Handle) -> None:
        """See `Runtime.suspend`."""
        engine = self._running(handle, "suspend")
        await processes.stop_whole(self._mark(handle.instance_id), engine.pid)
        engine.suspended = True

    async def resume(self, handle: Handle) -> None:
        """See `Runtime.resume`."""
        engine = self._running(handle, "resume")
        processes.send(processes.members(self._mark(handle.instance_id), engine.pid), signal.SIGCONT)
        engine.suspended = False

    # --- checkpointed ---

    async def checkpoint(self, handle: Handle, facts: ImageFacts, stages: Stages) -> None:
        """See `Runtime.checkpoint`."""
        engine = self._running(handle, "checkpoint")
        pid = engine.pid
        assert pid is not None  # noqa: S101 - _running saw to it
        mark = self._mark(handle.instance_id)
        tree = processes.members(mark, pid)
        try:
            folder = self._store.begin(handle.instance_id, processes.resident_bytes(tree))
        except (StoreError, OSError) as error:
            raise RuntimeFailure("checkpoint", str(error), alive=True) from error
        was_suspended = engine.suspended
        if was_suspended:
            await self.resume(handle)
        try:
            with stages.measure("dump"):
                status, output = await self._criu_output(
                    "dump", "-t", str(pid), "-D", str(folder), "-o", "dump.log", *_CRIU_COMMON, *_CRIU_DUMP
                )
            if status != 0:
                reason = _log_reason(folder / "dump.log", output)
                raise RuntimeFailure("checkpoint", reason, alive=processes.alive(pid))
            await processes.kill_whole(mark, pid)
            engine.pid = None
            self._store.commit(
                handle.instance_id,
                Manifest(
                    instance=handle.instance_id,
                    model=engine.model,
                    spec_digest=engine.spec_digest,
                    created_unix_s=time.time(),
                    kernel=platform.release(),
                    criu=self._criu_version,
                    pid=pid,
                    port=handle.port,
                    sleep_level=facts.sleep_level,
                    canary=facts.canary,
                    bytes_by_file=measure(folder),
                ),
            )
        except BaseException as error:
            self._store.abandon(handle.instance_id)
            if isinstance(error, RuntimeFailure) and error.alive and was_suspended:
                await self.suspend(handle)
            if isinstance(error, OSError):
                raise RuntimeFailure("checkpoint", f"{self._store.root}: {error}") from error
            raise

    async def restore(self, handle: Handle, stages: Stages) -> None:
        """See `Runtime.restore`."""
        engine = self._engines[handle.instance_id]
        mark = self._mark(handle.instance_id)
        try:
            manifest = self._store.load(handle.instance_id)
        except StoreError as error:
            raise RuntimeFailure("restore", str(error)) from error
        await processes.kill_whole(mark, engine.pid)
        # The log is opened again by name; it may have been rotated away.
        self.log_path(handle.instance_id).touch(mode=0o600)
        folder = self._store.path(handle.instance_id)
        engine.pid = manifest.pid
        engine.suspended = False
        with stages.measure("criu"):
            status, output = await self._criu_output(
                "restore", "-D", str(folder), "-o", "restore.log", *_CRIU_COMMON, *_CRIU_RESTORE
            )
        if status != 0:
            reason = _log_reason(folder / "restore.log", output)
            await self.drop(handle)
            raise RuntimeFailure("restore", reason)

    async def recover(self, models: Mapping[str, ModelSettings]) -> Sequence[Found]:
        """See `Runtime.recover`."""
        if Tier.CHECKPOINTED not in self._rungs.offered:
            return []
        found = []
        for name in self._store.names():
            try:
                manifest = self._store.load(name)
                usable = (
                    manifest.model in models
                    and manifest.spec_digest == spec_digest(manifest.model, models[manifest.model])
                    and (manifest.kernel, manifest.criu) == (platform.release(), self._criu_version)
                )
            except StoreError:
                usable = False
            if not usable:
                await self._store.remove(name)
                continue
            handle = Handle(name, HOST, manifest.port)
            self._engines[name] = _Engine(handle, manifest.model, manifest.spec_digest)
            found.append(Found(handle, manifest.model, manifest.sleep_level, manifest.canary))
        return found

    # --- parts ---

    def log_path(self, instance_id: str) -> Path:
        """Where an engine's output goes."""
        return self._state_dir / "logs" / f"{instance_id}.log"

    def _mark(self, instance_id: str) -> str:
        return f"{self._owner}:{instance_id};"

    def _running(self, handle: Handle, operation: str) -> _Engine:
        engine = self._engines.get(handle.instance_id)
        if engine is None or engine.pid is None or not processes.alive(engine.pid):
            raise RuntimeFailure(operation, "the engine is not running")
        return engine

    def _free_port(self) -> int:
        """A port of the range that no instance has and nobody listens on. Raises RuntimeFailure when there is none."""
        first, last = self._settings.port_range()
        taken = {engine.handle.port for engine in self._engines.values()}
        for port in range(first, last + 1):
            if port in taken:
                continue
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with contextlib.suppress(OSError):
                    probe.bind((HOST, port))
                    return port
        raise RuntimeFailure("start", f"no free port in runtime.process.ports ({first}-{last})")

    async def _criu_output(self, *arguments: str) -> tuple[int, str]:
        """Run CRIU to its end: exit status, and what it printed. Cancelling kills it."""
        criu = await asyncio.create_subprocess_exec(
            self._settings.criu, *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = await criu.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                criu.kill()
            await criu.wait()
            raise
        return criu.returncode or 0, output.decode("utf-8", "replace")


def spec_digest(key: str, model: ModelSettings) -> str:
    """A digest of all that shapes an engine; an image of another digest is of another engine."""
    assert model.process is not None  # noqa: S101 - the configuration says which runtime a model has
    environment = {name: value.get_secret_value() for name, value in model.process.env.items()}
    parts = [key, model.name, model.process.command, environment, str(model.process.cwd), sys.executable]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _fill(argument: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace("{" + name + "}", value)
    return argument


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def _log_reason(log: Path, output: str) -> str:
    """CRIU's first error, which is the cause; the ones after it are consequences."""
    with contextlib.suppress(OSError):
        text = log.read_text("utf-8", "replace")
        errors = [line for line in text.splitlines() if "Error" in line and "RLIMIT_NOFILE" not in line]
        if errors:
            return f"CRIU: {errors[0].strip()}"
    return f"CRIU: {_last_line(output)}"
