"""Engines as plain local process trees: no container, no root needed; checkpoints with CRIU where the host can.

An engine is the leader of its own session, with its own log file. Suspended is SIGSTOP for every process of the tree.
A checkpoint is a CRIU image of the tree; it is restored with the same pids as our own child, as often as one likes.
Facts about CRIU that shape the options are in docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from proxy.checkpoint.inputs import Reader
from proxy.checkpoint.manifest import Manifest
from proxy.checkpoint.store import CRIU_FOLDER, CheckpointStore, StoreError
from proxy.errors import HostError, PortTakenError, RuntimeFailure
from proxy.host import command, processes
from proxy.host import facts as host
from proxy.runtime import criu, log_size, port_owner, ports, vllm_extension
from proxy.runtime.base import Found, Handle, ImageFacts, Recovered, Tiers, Vitals
from proxy.runtime.cuda import Cuda
from proxy.runtime.image_store import KeepsImages, Origin, failure
from proxy.runtime.log_tail import LogTails
from proxy.runtime.process import launch, unlinked_files
from proxy.runtime.process.orphan_reaper import OrphanReaper
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from proxy.config.model import ModelSettings
    from proxy.config.runtime import ProcessRuntimeSettings
    from proxy.gpu.cuda import Gpus
    from proxy.runtime.state_dir import Claim
    from proxy.telemetry.stages import Stages


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
    spec_digest: str
    model: ModelSettings
    origin: Origin = field(default_factory=Origin)
    pid: int | None = None
    suspended: bool = False
    off_gpu: bool = False
    """Its CUDA processes are suspended."""


class ProcessRuntime(KeepsImages):
    """The runtime `process`. See `proxy.runtime.base.Runtime` for what each method promises."""

    name = "process"
    shares_images = False

    def __init__(
        self, settings: ProcessRuntimeSettings, *, claim: Claim, store: CheckpointStore, gpus: Gpus | None = None
    ) -> None:
        self._settings = settings
        self._reader = Reader()
        self._cuda = Cuda(gpus)
        self._claim = claim
        self._store = store
        self._engines: dict[str, _Engine] = {}
        self._tails = LogTails(claim)
        self._ports = ports.Ports(*settings.port_range())
        self._tiers = Tiers(frozenset())
        self._criu_version = ""
        self._reaper = OrphanReaper()
        self._cutter: asyncio.Task[None] | None = None

    # --- the host ---

    async def open(self) -> None:
        """Claim the state folder, kill strays, find out about CRIU.

        Raises HostError when another warmpool uses the folder or it cannot be made.
        """
        self._claim.acquire()
        self._cuda.open()
        processes.become_subreaper()
        await processes.kill_whole(f"{self._claim.owner}:", None)
        try:
            self._reaper.open(f"{self._claim.owner}:")
        except OSError as error:
            raise HostError(f"the orphan reaper cannot be started: {error}") from error
        self._cutter = asyncio.create_task(log_size.keep_small(self._logs, self._claim.log_size), name="engine logs")
        self._criu_version, reason = await criu.why_not(self._settings.criu)
        self._tiers = self._open_store(reason)

    async def close(self) -> None:
        """Dismiss the orphan reaper and give up the claim."""
        if self._cutter is not None:
            self._cutter.cancel()
        await self._reaper.close()
        self._ports.close()
        self._store.close()
        self._claim.release()

    def strays(self) -> Sequence[str]:
        """See `Runtime.strays`: none, the orphan reaper ends processes with their warmpool."""
        return ()

    def memory(self) -> host.Memory:
        """See `Runtime.memory`: processes are in this one's cgroup."""
        return host.memory()

    def tiers(self) -> Tiers:
        """What `open` found."""
        return self._tiers

    # --- starting and ending ---

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> Handle:
        """Start the model's command; see `Runtime.start`."""
        assert model.process is not None  # noqa: S101 - the configuration says which runtime a model has
        known = self._engines.get(instance_id)
        handle = known.handle if known is not None else None
        if handle is None or self._ports.taken_by_others(handle.port):
            # The one of its image stays held: it is listened on again when the image is restored.
            handle = Handle(instance_id, key, ports.LOOPBACK, self._ports.take())
        values = {
            "host": handle.host,
            "port": str(handle.port),
            "model": model.name or key,
            "python": sys.executable,
        }
        words = [_fill(argument, values) for argument in model.process.command]
        given = {name: value.get_secret_value() for name, value in model.process.env.items()}
        if model.is_vllm and Tier.CHECKPOINTED in self._tiers.offered:
            words += vllm_extension.arguments(model)
            copies = str(self._store.weights(self._image(handle))) if model.weights_copy else None
            given |= vllm_extension.environment(
                str(vllm_extension.folder(self._claim.folder)), copies, {**os.environ, **given}
            )
        directory = str(model.process.cwd or Path.cwd())
        environment = {
            **os.environ,
            **given,
            processes.MARK: self._mark(instance_id),
        }
        if shutil.which(words[0], path=environment.get("PATH")) is None:
            raise RuntimeFailure("start", f"no program {words[0]!r}; correct models.{key}.process.command")
        engine = known or _Engine(handle, spec_digest(key, model), model)
        engine.handle, engine.model = handle, model
        engine.origin = Origin(extension=vllm_extension.extension(model))
        self._engines[instance_id] = engine
        self._tails.begin(instance_id)
        log = self._log(instance_id, "start")
        try:
            pid = os.posix_spawn(
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
        self._runs_as(engine, pid)
        return handle

    def _log(self, instance_id: str, operation: str) -> int:
        try:
            self._claim.ensure()
            return self._claim.open_log(instance_id)
        except HostError as error:
            raise RuntimeFailure(operation, str(error)) from error

    async def wait_exit(self, handle: Handle) -> str:
        """See `Runtime.wait_exit`."""
        engine = self._engines[handle.instance_id]
        return "ended" if engine.pid is None else await processes.wait_gone(engine.pid)

    async def host_bytes(self, handle: Handle) -> int:
        """See `Runtime.host_bytes`."""
        engine = self._engines.get(handle.instance_id)
        pid = engine.pid if engine is not None else None
        return 0 if pid is None else await asyncio.to_thread(lambda: processes.held_bytes(processes.tree(pid)))

    async def vitals(self, handle: Handle) -> Vitals:
        """See `Runtime.vitals`."""
        tree = await asyncio.to_thread(self._members, self._running(handle, "vitals"))
        return Vitals(processes.cpu_seconds(tree), processes.all_stopped(tree))

    async def log_tail(self, handle: Handle) -> list[str]:
        """See `Runtime.log_tail`."""
        return await self._tails.read(handle.instance_id)

    async def drop(self, handle: Handle) -> None:
        """See `Runtime.drop`."""
        engine = self._engines.get(handle.instance_id)
        if engine is not None:
            await processes.kill_whole(self._mark(handle.instance_id), engine.pid)
            self._runs_as(engine, None)

    def _runs_as(self, engine: _Engine, pid: int | None) -> None:
        """Note the leader of an engine's session, and tell the orphan reaper of it."""
        self._reaper.note(gone=engine.pid, runs=pid)
        engine.pid = pid
        engine.suspended = engine.off_gpu = False

    def leave(self, handle: Handle) -> bool:
        """See `Runtime.leave`: the orphan reaper ends processes with warmpool."""
        return False

    def promote(self, handle: Handle) -> Handle:
        """See `Runtime.promote`: each instance has its own image."""
        return handle

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> Handle:
        """See `Runtime.clone`: an image is restored with its own pids, so there is one instance of each."""
        raise RuntimeFailure("clone", "processes are restored with their own pids; use the podman runtime for clones")

    async def remove(self, handle: Handle) -> None:
        """See `Runtime.remove`."""
        engine = self._engines.get(handle.instance_id)
        if engine is None:
            return
        # One that is off the GPU cannot end politely: its CUDA calls are locked.
        if engine.pid is not None and not engine.off_gpu:
            tree = processes.members(self._mark(handle.instance_id), engine.pid)
            processes.send(tree, signal.SIGCONT)
            processes.send([engine.pid], signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.stop_grace):
                    await processes.wait_gone(engine.pid)
        await self.drop(handle)
        with contextlib.suppress(OSError, StoreError):
            await asyncio.to_thread(unlinked_files.forget, self._store.path(handle.instance_id))
        await self.discard_image(handle)
        self._engines.pop(handle.instance_id, None)
        self._ports.release(engine.handle.port)

    # --- suspended ---

    async def suspend(self, handle: Handle) -> None:
        """See `Runtime.suspend`: off the GPU, or where it uses none, every process is stopped."""
        engine = self._running(handle, "suspend")
        if await self._cuda.suspend("suspend", self._members(engine)):
            engine.off_gpu = True
            return
        await processes.stop_whole(self._mark(handle.instance_id), engine.pid)
        engine.suspended = True

    async def resume(self, handle: Handle) -> None:
        """See `Runtime.resume`."""
        engine = self._running(handle, "resume")
        if engine.off_gpu:
            await self._cuda.resume("resume", self._members(engine))
            engine.off_gpu = False
            return
        processes.send(processes.members(self._mark(handle.instance_id), engine.pid), signal.SIGCONT)
        engine.suspended = False

    async def gpu_bytes(self, handle: Handle) -> Mapping[str, int]:
        """See `Runtime.gpu_bytes`."""
        engine = self._engines.get(handle.instance_id)
        if engine is None or engine.pid is None:
            return {}
        return await self._cuda.held_by_gpu(partial(self._members, engine))

    # --- checkpointed ---

    async def checkpoint(self, handle: Handle, facts: ImageFacts, stages: Stages) -> None:
        """See `Runtime.checkpoint`."""
        engine = self._running(handle, "checkpoint")
        pid = engine.pid
        assert pid is not None  # noqa: S101 - _running saw to it
        mark = self._mark(handle.instance_id)
        tree = processes.members(mark, pid)
        read = await self._learn(engine.origin, engine.model)
        try:
            resident = processes.resident_bytes(tree)
            folder = self._store.begin(handle.instance_id, resident + await self._cuda.held_bytes(tree))
        except (StoreError, OSError) as error:
            raise RuntimeFailure("checkpoint", str(error), alive=True) from error
        memory = processes.memory_by_kind(tree)
        was_suspended, was_off_gpu = engine.suspended, engine.off_gpu
        if was_suspended:
            await self.resume(handle)
        try:
            with stages.measure("cuda"):
                engine.off_gpu = await self._cuda.before_dump(tree, off_gpu=was_off_gpu)
            if engine.off_gpu and not was_off_gpu:
                memory[processes.GPU_STATE] = max(0, processes.resident_bytes(tree) - resident)
            with stages.measure("dump"):
                status, output = await command.run(
                    self._settings.criu,
                    "dump",
                    "-t",
                    str(pid),
                    "-D",
                    str(folder / CRIU_FOLDER),
                    "-o",
                    "dump.log",
                    *_CRIU_COMMON,
                    *_CRIU_DUMP,
                )
            if status != 0:
                reason = criu.log_reason(folder / CRIU_FOLDER / "dump.log", output)
                raise RuntimeFailure("checkpoint", reason, alive=processes.alive(pid))
            await processes.kill_whole(mark, pid)
            off_gpu = engine.off_gpu
            self._runs_as(engine, None)
            await asyncio.to_thread(unlinked_files.take, folder / CRIU_FOLDER, folder)
            with stages.measure("digest"):
                await self._store.commit(
                    Manifest(
                        image=handle.instance_id,
                        model=handle.model,
                        runtime=self.name,
                        spec_digest=engine.spec_digest,
                        extension=engine.origin.extension,
                        created_unix_s=time.time(),
                        facts=self._facts(),
                        inputs=read,
                        sleep_level=facts.sleep_level,
                        canary=facts.canary,
                        private={"pid": pid, "port": handle.port, "cuda": off_gpu},
                        details={**facts.details, "memory": memory, "stages_s": dict(stages.seconds)},
                    )
                )
        except BaseException as error:
            self._store.abandon(handle.instance_id)
            if isinstance(error, RuntimeFailure) and error.alive:
                if was_suspended:
                    await self.suspend(handle)
                elif engine.off_gpu and not was_off_gpu:
                    await self.resume(handle)
            if isinstance(error, OSError):
                raise RuntimeFailure("checkpoint", f"{self._store.root}: {error}") from error
            raise

    async def restore(self, handle: Handle, stages: Stages) -> Handle:
        """See `Runtime.restore`."""
        engine = self._engines[handle.instance_id]
        mark = self._mark(handle.instance_id)
        try:
            manifest = self._store.load(handle.instance_id)
        except StoreError as error:
            raise failure("restore", error) from error
        await processes.kill_whole(mark, engine.pid)
        self._have_port(engine, manifest.private["port"])
        # The log is opened again by name; it may have been rotated away.
        os.close(self._log(handle.instance_id, "restore"))
        self._tails.begin(handle.instance_id)
        image = self._store.path(handle.instance_id)
        folder = image / CRIU_FOLDER
        try:
            used = await asyncio.to_thread(unlinked_files.put_back, image)
        except StoreError as error:
            raise failure("restore", error) from error
        except OSError as error:
            raise RuntimeFailure("restore", f"{error.filename or image}: {error.strerror or error}") from error
        self._runs_as(engine, manifest.private["pid"])
        engine.off_gpu = bool(manifest.private.get("cuda"))
        engine.origin.extension, engine.origin.inputs = manifest.extension, manifest.inputs
        with stages.measure("criu"):
            status, output = await command.run(
                self._settings.criu, "restore", "-D", str(folder), "-o", "restore.log", *_CRIU_COMMON, *_CRIU_RESTORE
            )
        if status != 0:
            reason = criu.log_reason(folder / "restore.log", output)
            unlinked_files.use_up(used)
            await self.drop(handle)
            self._have_port(engine, engine.handle.port)  # somebody may have been quicker
            raise RuntimeFailure("restore", reason, fault=criu.fault(reason))
        if engine.off_gpu:
            with stages.measure("cuda"):
                await self._cuda.resume("restore", self._members(engine))
            engine.off_gpu = False
        return engine.handle

    def _have_port(self, engine: _Engine, port: int) -> None:
        """Make the port of its image the engine's. Raises PortTakenError where another program has it."""
        if self._ports.taken_by_others(port):
            raise PortTakenError("restore", port, port_owner.owner(port))
        if engine.handle.port != port:
            self._ports.release(engine.handle.port)
            engine.handle = replace(engine.handle, port=port)

    async def listens(self, handle: Handle) -> bool:
        """See `Runtime.listens`."""
        engine = self._engines[handle.instance_id]
        return await port_owner.check(handle.port, engine.pid, partial(self._members, engine))

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        """See `Runtime.recover`."""
        if Tier.CHECKPOINTED not in self._tiers.offered:
            return Recovered()
        images = await self._usable_images(models)
        found = []
        for instance_id, (manifest, facts) in images.items():
            handle = Handle(instance_id, manifest.model, ports.LOOPBACK, manifest.private["port"])
            self._engines[instance_id] = _Engine(handle, manifest.spec_digest, models[manifest.model])
            self._ports.hold(handle.port)
            found.append(Found(handle, Tier.ARCHIVED if facts.archived else Tier.CHECKPOINTED))
        facts_of = {instance_id: facts for instance_id, (_, facts) in images.items()}
        return Recovered(found, facts_of, self._lost(models, images))

    # --- parts ---

    def _logs(self) -> list[Path]:
        return [self._claim.log_path(instance_id) for instance_id in self._engines]

    def _mark(self, instance_id: str) -> str:
        return f"{self._claim.owner}:{instance_id};"

    async def _facts_for(self, model: ModelSettings, manifest: Manifest) -> dict[str, str]:
        return self._facts()

    def _origins(self) -> Iterator[tuple[Handle, str, Origin]]:
        return ((e.handle, e.spec_digest, e.origin) for e in self._engines.values() if e.pid is not None)

    def _digest(self, key: str, model: ModelSettings) -> str:
        return spec_digest(key, model)

    def _members(self, engine: _Engine) -> list[int]:
        return processes.members(self._mark(engine.handle.instance_id), engine.pid)

    def _facts(self) -> dict[str, str]:
        return {"kernel": platform.release(), "CRIU": self._criu_version}

    def _running(self, handle: Handle, operation: str) -> _Engine:
        engine = self._engines.get(handle.instance_id)
        if engine is None or engine.pid is None or not processes.alive(engine.pid):
            raise RuntimeFailure(operation, "the engine is not running")
        return engine


def spec_digest(key: str, model: ModelSettings) -> str:
    """A digest of all that shapes an engine; an image of another digest is of another engine."""
    assert model.process is not None  # noqa: S101 - the configuration says which runtime a model has
    environment = {name: value.get_secret_value() for name, value in model.process.env.items()}
    parts = [key, model.name, model.process.command, environment, str(model.process.cwd), sys.executable]
    parts += ["weights_copy"] * model.weights_copy + ["vllm"] * model.is_vllm
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _fill(argument: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace("{" + name + "}", value)
    return argument
