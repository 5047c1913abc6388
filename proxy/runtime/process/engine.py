"""An engine as a tree of local processes, the leader of its own session; a checkpoint is a CRIU image of the tree.

It is restored with the same pids as our own child, as often as one likes. Facts about CRIU that shape the options are
in docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from proxy.checkpoint.errors import StoreError
from proxy.checkpoint.store import CRIU_FOLDER
from proxy.engine import kinds
from proxy.errors import HostError, PortTakenError, RuntimeFailure
from proxy.host import command, processes
from proxy.runtime import criu, port_owner, ports
from proxy.runtime.base import Vitals
from proxy.runtime.engine import Activity, LocalEngine, Noted, Record
from proxy.runtime.image_store import ImageStore, Origin, failure
from proxy.runtime.process import launch, unlinked_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.config.model import ModelSettings
    from proxy.config.runtime import ProcessRuntimeSettings
    from proxy.runtime.cuda import Cuda
    from proxy.runtime.log_tail import LogTails
    from proxy.runtime.process.orphan_reaper import OrphanReaper
    from proxy.runtime.state_dir import Claim
    from proxy.telemetry.stages import Stages

# cgroups are left alone: the restored tree stays in warmpool's own. Established connections are dumped as closed, since
# a client's idle one would fail the dump. Ghost files are vLLM's unlinked shared memory.
_CRIU_COMMON: Final = ("-v2", "--tcp-close", "--file-locks", "--link-remap", "--manage-cgroups=ignore")
_CRIU_DUMP: Final = ("--network-lock", "skip", "--ghost-limit", str(4 << 30))
# A sibling of criu is our own child, so its end is seen and reaped like that of one we started.
_CRIU_RESTORE: Final = ("--restore-detached", "--restore-sibling")


@dataclass(slots=True)
class Parts:
    """What the engines of a runtime share."""

    settings: ProcessRuntimeSettings
    claim: Claim
    images: ImageStore
    cuda: Cuda
    tails: LogTails
    ports: ports.Ports
    reaper: OrphanReaper
    facts: Mapping[str, str]
    """What has to be the same where an image is restored."""
    engines: dict[str, ProcessEngine] = field(default_factory=dict)
    """By instance, until they are removed."""


class ProcessEngine(LocalEngine[Record]):
    """See `proxy.runtime.base.EngineProcess` for what each method promises."""

    def __init__(self, instance_id: str, key: str, parts: Parts) -> None:
        super().__init__(instance_id, key, images=parts.images, cuda=parts.cuda, tails=parts.tails)
        self._parts = parts

    @property
    def _mark(self) -> str:
        return f"{self._parts.claim.owner}:{self.instance_id};"

    def tree(self) -> list[int]:
        """Its processes."""
        return processes.members(self._mark, self.it.pid) if self.it is not None else []

    def found(self, model: ModelSettings, spec: str, port: int) -> None:
        """It has an image that a previous warmpool left, to be restored on that port."""
        self.it = Record(model, spec, ports.LOOPBACK, port)
        self._parts.ports.hold(port)

    # --- starting and ending ---

    async def start(self, model: ModelSettings) -> None:
        """Start the model's command; see `Runtime.start`."""
        assert model.process is not None  # noqa: S101 - the configuration says which runtime a model has
        parts = self._parts
        if self.it is None:
            host, port = ports.LOOPBACK, parts.ports.take()
        else:
            # The port of its image stays held: it is listened on again when the image is restored.
            host, port = self.it.host, self.it.port
            port = parts.ports.take() if parts.ports.taken_by_others(port) else port
        values = {"host": host, "port": str(port), "model": model.name or self.key, "python": sys.executable}
        words = [_fill(argument, values) for argument in model.process.command]
        given = {name: value.get_secret_value() for name, value in model.process.env.items()}
        inside = kinds.of(model).inside
        if inside is not None and (self._images.usable or model.weights_copy):
            words += inside.arguments(model)
            copies = str(self._images.store.weights(self.image)) if model.weights_copy else None
            given |= inside.environment(str(inside.folder(parts.claim.folder)), copies, {**os.environ, **given})
        environment = {**os.environ, **given, processes.MARK: self._mark}
        if shutil.which(words[0], path=environment.get("PATH")) is None:
            raise RuntimeFailure("start", f"no program {words[0]!r}; correct models.{self.key}.process.command")
        if self.it is None:
            self.it = Record(model, spec_digest(self.key, model))
        it = self.it
        it.host, it.port, it.model = host, port, model
        it.origin = Origin(extension=kinds.extension(model))
        self._tails.begin(self.instance_id)
        self._runs_as(it, self._spawned(str(model.process.cwd or Path.cwd()), words, environment))

    def _spawned(self, directory: str, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """The pid of a new engine."""
        log = self._log("start")
        try:
            return os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", launch.__file__, directory, *words],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ],
                setsid=True,
            )
        except OSError as error:
            raise RuntimeFailure("start", f"{words[0]}: {error}") from error
        finally:
            os.close(log)

    def _log(self, operation: str) -> int:
        try:
            self._parts.claim.ensure()
            return self._parts.claim.open_log(self.instance_id)
        except HostError as error:
            raise RuntimeFailure(operation, str(error)) from error

    def _runs_as(self, it: Record, pid: int | None) -> None:
        """Note the leader of an engine's session, and tell the orphan reaper of it."""
        self._parts.reaper.note(gone=it.pid, runs=pid)
        it.pid = pid
        it.activity = Activity.NOTHING if pid is None else Activity.RUNNING

    async def wait_exit(self) -> str:
        """See `EngineProcess.wait_exit`."""
        return "ended" if self.it is None or self.it.pid is None else await processes.wait_gone(self.it.pid)

    async def vitals(self) -> Vitals:
        """See `EngineProcess.vitals`."""
        self.running("vitals")
        tree = await asyncio.to_thread(self.tree)
        return Vitals(processes.cpu_seconds(tree), processes.all_stopped(tree))

    async def listens(self) -> bool:
        """See `EngineProcess.listens`."""
        return await port_owner.check(self.port, self.it.pid if self.it is not None else None, self.tree)

    def promote(self) -> None:
        """See `EngineProcess.promote`: each instance has its own image."""

    async def kill(self) -> None:
        """See `EngineProcess.kill`."""
        if self.it is not None:
            await processes.kill_whole(self._mark, self.it.pid)
            self._runs_as(self.it, None)

    async def remove(self) -> None:
        """See `EngineProcess.remove`."""
        it = self.it
        if it is None:
            self._parts.engines.pop(self.instance_id, None)
            return
        # One that is off the GPU cannot end politely: its CUDA calls are locked.
        if it.pid is not None and it.activity is not Activity.OFF_GPU:
            processes.send(self.tree(), signal.SIGCONT)
            processes.send([it.pid], signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._parts.settings.stop_grace):
                    await processes.wait_gone(it.pid)
        await self.kill()
        with contextlib.suppress(OSError, StoreError):
            await asyncio.to_thread(unlinked_files.forget, self._images.store.path(self.image))
        await self._images.discard(self)
        self._parts.engines.pop(self.instance_id, None)
        self._parts.ports.release(it.port)
        self.forget()

    # --- suspended ---

    async def _freeze(self, it: Record) -> None:
        await processes.stop_whole(self._mark, it.pid)

    async def _thaw(self, it: Record) -> None:  # noqa: ARG002 - of the base class
        processes.send(self.tree(), signal.SIGCONT)

    # --- checkpointed ---

    async def _note(self, it: Record, pids: Sequence[int]) -> Noted:  # noqa: ARG002 - of the base class
        return Noted(self._parts.facts, {"pid": it.pid, "port": it.port})

    async def _dump(self, it: Record, folder: Path, expected_bytes: int, stages: Stages) -> Mapping[str, object]:  # noqa: ARG002 - of the base class
        pid = it.pid
        assert pid is not None  # noqa: S101 - it runs
        with stages.measure("dump"):
            status, output = await command.run(
                self._parts.settings.criu, "dump", "-t", str(pid), "-D", str(folder / CRIU_FOLDER), "-o", "dump.log",
                *_CRIU_COMMON, *_CRIU_DUMP,
            )  # fmt: skip
        if status != 0:
            reason = criu.log_reason(folder / CRIU_FOLDER / "dump.log", output)
            raise RuntimeFailure("checkpoint", reason, alive=processes.alive(pid))
        await self.kill()
        return {}

    async def _collect(self, it: Record, folder: Path, stages: Stages) -> None:  # noqa: ARG002 - of the base class
        await asyncio.to_thread(unlinked_files.take, folder / CRIU_FOLDER, folder)

    async def restore(self, stages: Stages, gpus: Mapping[str, str] | None = None) -> None:
        """See `EngineProcess.restore`."""
        it, store = self.it, self._images.store
        if it is None:
            raise RuntimeFailure("restore", "it was never started; a cold start makes its image")
        try:
            manifest = store.load(self.image)
        except StoreError as error:
            raise failure("restore", error) from error
        await processes.kill_whole(self._mark, it.pid)
        self._have_port(it, manifest.private["port"])
        # The log is opened again by name; it may have been rotated away.
        os.close(self._log("restore"))
        self._tails.begin(self.instance_id)
        image = store.path(self.image)
        folder = image / CRIU_FOLDER
        try:
            used = await asyncio.to_thread(unlinked_files.put_back, image)
        except StoreError as error:
            raise failure("restore", error) from error
        except OSError as error:
            raise RuntimeFailure("restore", f"{error.filename or image}: {error.strerror or error}") from error
        self._runs_as(it, manifest.private["pid"])
        it.activity = Activity.OFF_GPU if manifest.private.get("cuda") else Activity.RUNNING
        it.origin.extension, it.origin.inputs = manifest.extension, manifest.inputs
        with stages.measure("criu"):
            status, output = await command.run(
                self._parts.settings.criu, "restore", "-D", str(folder), "-o", "restore.log",
                *_CRIU_COMMON, *_CRIU_RESTORE,
            )  # fmt: skip
        if status != 0:
            reason = criu.log_reason(folder / "restore.log", output)
            unlinked_files.use_up(used)
            await self.kill()
            self._have_port(it, it.port)  # somebody may have been quicker
            raise RuntimeFailure("restore", reason, fault=criu.fault(reason))
        await self._back_on_gpu(it, manifest, stages, gpus)

    def _have_port(self, it: Record, port: int) -> None:
        """Make the port of its image the engine's. Raises PortTakenError where another program has it."""
        if self._parts.ports.taken_by_others(port):
            raise PortTakenError("restore", port, port_owner.owner(port))
        if it.port != port:
            self._parts.ports.release(it.port)
            it.port = port


def spec_digest(key: str, model: ModelSettings) -> str:
    """A digest of all that shapes an engine; an image of another digest is of another engine."""
    assert model.process is not None  # noqa: S101 - the configuration says which runtime a model has
    environment = {name: value.get_secret_value() for name, value in model.process.env.items()}
    parts = [key, model.name, model.process.command, environment, str(model.process.cwd), sys.executable]
    parts += ["weights_copy"] * model.weights_copy + [*kinds.of(model).spec]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _fill(argument: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace("{" + name + "}", value)
    return argument
