"""An engine in a container, checkpointed by CRIU into the store and restored in place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from proxy.checkpoint.errors import StoreError
from proxy.config.masking import masked
from proxy.errors import Fault, HostError, PortTakenError, RuntimeFailure
from proxy.host import owned, processes
from proxy.runtime import criu, namespaces, port_owner
from proxy.runtime.base import Vitals
from proxy.runtime.engine import Activity, LocalEngine, Noted
from proxy.runtime.image_store import CONTAINER_IMAGE, failure
from proxy.runtime.podman import bundle, container
from proxy.runtime.podman.api import PodmanError, PodmanSilentError
from proxy.runtime.podman.containers import ContainerRecord

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from proxy.checkpoint.manifest import Manifest
    from proxy.config.model import ModelSettings
    from proxy.runtime.cuda import Cuda
    from proxy.runtime.log_tail import LogTails
    from proxy.runtime.podman.containers import Containers
    from proxy.runtime.podman.host import PodmanHost
    from proxy.runtime.podman.images import PodmanImages
    from proxy.runtime.podman.maker import Maker
    from proxy.runtime.ports import Ports
    from proxy.telemetry.stages import Stages

log = logging.getLogger("warmpool.podman")

_SLOWEST_BYTES_PER_S: Final = 20 << 20
"""What a dump or a restore is given time for: a slow disk."""


@dataclass(slots=True)
class Parts:
    """What the engines of a runtime share."""

    host: PodmanHost
    images: PodmanImages
    containers: Containers
    maker: Maker
    ports: Ports
    cuda: Cuda
    tails: LogTails
    engines: dict[str, PodmanEngine]
    """By instance, until they are removed."""
    pid_namespaces: namespaces.PidNamespaces = field(default_factory=namespaces.PidNamespaces)


class PodmanEngine(LocalEngine[ContainerRecord]):
    """See `proxy.runtime.base.EngineProcess` for what each method promises."""

    def __init__(self, instance_id: str, key: str, parts: Parts) -> None:
        super().__init__(instance_id, key, images=parts.images, cuda=parts.cuda, tails=parts.tails)
        self._parts = parts

    def tree(self) -> list[int]:
        """Its processes."""
        return self.it.tree() if self.it is not None else []

    # --- starting and ending ---

    async def start(self, model: ModelSettings) -> None:
        """Start a container from nothing; see `Runtime.start`. Raises PodmanError besides."""
        parts = self._parts
        while True:
            known = self.it
            it = await parts.maker.make("start", self, model)
            self._tails.begin(self.instance_id)
            try:
                await parts.host.podman.post(f"/containers/{it.id}/start")
                it.activity = Activity.RUNNING
                await parts.containers.inspect(it)
                if not await self._names_as_in_another_image(it):
                    return
            except BaseException as error:
                await parts.maker.undo(self, it, known, error)
                raise
            log.info("%s: its sockets would have the names of those in another image; once more", self.instance_id)

    async def _names_as_in_another_image(self, it: ContainerRecord) -> bool:
        """Whether a container on the host's network has the number of a pid namespace that an image has in names.

        The namespace is held then, so that the next container has another number.
        """
        if not it.on_host_network or it.pid is None:
            return False
        with contextlib.suppress(OSError):  # it has ended
            number = str(namespaces.number_of(it.pid))
            if any(number in name for name in await self._parts.images.socket_names(self.image)):
                self._parts.pid_namespaces.hold(it.pid)
                return True
        return False

    async def clone(self, model: ModelSettings) -> ContainerRecord:
        """Make a container with a bundle, which `restore` needs, and nothing in it; see `Runtime.clone`."""
        parts = self._parts
        try:
            golden = await parts.images.manifest(self.image)
        except StoreError as error:
            raise failure("clone", error) from error
        known = self.it
        it = await parts.maker.make("clone", self, model, golden)
        try:
            await parts.host.podman.post(f"/containers/{it.id}/init")
            await parts.containers.stop(it)
            await parts.containers.inspect(it)
            it.pid = None
            await parts.images.reset_rootfs(it, self.image)
        except BaseException as error:
            await parts.maker.undo(self, it, known, error)
            if isinstance(error, PodmanError | OSError):
                raise RuntimeFailure("clone", str(error)) from error
            raise
        return it

    async def wait_exit(self) -> str:
        """See `EngineProcess.wait_exit`."""
        it = self.it
        if it is None or it.pid is None:
            return "ended"
        reason = await processes.wait_gone(it.pid)
        return await self._parts.containers.exit_reason(it) or reason

    async def vitals(self) -> Vitals:
        """See `EngineProcess.vitals`."""
        it = self.running("vitals")
        try:
            paused = await self._parts.containers.inspect(it) == "paused"
        except PodmanError as error:
            raise RuntimeFailure("vitals", str(error)) from error
        tree = it.tree()
        return Vitals(processes.cpu_seconds(tree), paused or processes.all_stopped(tree))

    async def listens(self) -> bool:
        """See `EngineProcess.listens`: on podman's bridge nobody else has the address of a container."""
        it = self.it
        return it is None or not it.on_host_network or await port_owner.check(it.port, it.pid, self.tree)

    def promote(self) -> None:
        """See `EngineProcess.promote`."""
        try:
            self._images.store.promote(self.key)
        except StoreError as error:
            raise RuntimeFailure("promote", str(error), alive=True) from error
        self.beside = False
        if self.it is not None:
            # Its container mounts the weights' copy under the name that it had: it is made again when it is restored.
            self.it.renamed = self.it.model.weights_copy

    async def kill(self) -> None:
        """See `EngineProcess.kill`."""
        if self.it is None:
            return
        try:
            await self._parts.containers.stop(self.it)
            await self._parts.images.reset_rootfs(self.it, self.image)
        except (PodmanError, OSError) as error:
            await self._parts.containers.kill_past(self.it, error)
            raise RuntimeFailure("kill", str(error)) from error

    async def remove(self) -> None:
        """See `EngineProcess.remove`."""
        it, containers = self.it, self._parts.containers
        try:
            if it is not None and it.activity is Activity.INTERRUPTED:
                await containers.stop(it)
            elif it is not None and it.pid is not None:
                await containers.end_politely(it, self._parts.host.settings.stop_grace)
            # There may be one of a start that was cut off.
            await containers.delete(it.id if it is not None and it.id else self._parts.maker.name(self.instance_id))
        except PodmanError as error:
            if it is not None:
                await containers.kill_past(it, error)
            raise RuntimeFailure("remove", str(error)) from error
        self._parts.engines.pop(self.instance_id, None)
        if it is not None:
            self._parts.maker.let_go(it)
            self.forget()

    # --- suspended ---

    async def _freeze(self, it: ContainerRecord) -> None:
        await self._change(it, "pause", "suspend", "paused")

    async def _thaw(self, it: ContainerRecord) -> None:
        await self._change(it, "unpause", "resume", "running")

    async def _change(self, it: ContainerRecord, verb: str, operation: str, wanted: str) -> None:
        try:
            await self._parts.containers.change(it, verb, wanted)
        except PodmanError as error:
            raise RuntimeFailure(operation, str(error)) from error

    # --- checkpointed ---

    def _shared_bytes(self, it: ContainerRecord) -> int:
        return bundle.shared_memory_bytes(it.pid)

    async def _note(self, it: ContainerRecord, pids: Sequence[int]) -> Noted:
        parts, engine = self._parts, container.engine_of(it.model)
        facts = {**parts.host.facts(it.model), CONTAINER_IMAGE: it.origin.image_id}
        private: dict[str, Any] = {}
        if it.on_host_network:  # see proxy/runtime/namespaces.py
            names = await parts.images.socket_names()
            parts.pid_namespaces.release_unless(lambda number: any(str(number) in name for name in names))
            if it.pid is not None:
                parts.pid_namespaces.hold(it.pid)
            sockets = await asyncio.to_thread(namespaces.abstract_names, pids)
            private = {"host_port": it.port, "abstract_sockets": sockets}
        await asyncio.to_thread(parts.maker.criu_config, self.key, it.model)
        return Noted(facts, private, engine.criu.leave_out_zeros)

    async def _dump(
        self, it: ContainerRecord, folder: Path, expected_bytes: int, stages: Stages
    ) -> Mapping[str, object]:
        engine, was = container.engine_of(it.model), it.activity
        bundle.link(it.userdata, folder)
        owned.unlink(it.userdata / "dump.log")
        began = time.perf_counter()
        it.image_bytes, it.activity = expected_bytes, Activity.INTERRUPTED
        try:
            answer = await self._parts.host.podman.post(
                f"/containers/{it.id}/checkpoint",
                work_s=it.image_bytes / _SLOWEST_BYTES_PER_S,
                keep="true",
                tcpEstablished=_flag(engine.criu.tcp_established),
                fileLocks=_flag(engine.criu.file_locks),
                printStats=_flag(engine.criu.print_stats),
            )
        except PodmanError as error:
            silent = isinstance(error, PodmanSilentError)
            reason = str(error) if silent else criu.log_reason(it.userdata / "dump.log", str(error))
            alive = await self._parts.containers.still_runs(it)
            it.activity = was if alive else it.activity
            raise RuntimeFailure("checkpoint", reason, alive=alive) from error
        it.pid, it.activity = None, Activity.NOTHING
        # The time frozen holds that of dumping memory, which holds that of writing it.
        statistics = _note_times(answer, "dump", ("freezing_time", "frozen_time"), began, stages)
        return {"engine": masked(engine.model_dump(mode="json", exclude={"env", "criu"})), "criu_us": statistics}

    async def _collect(self, it: ContainerRecord, folder: Path, stages: Stages) -> None:
        """The files in its memory, and what it wrote to its root filesystem."""
        ignored = container.engine_of(it.model).criu.ignore_rootfs
        with stages.measure("collect"):
            await bundle.collect(it.userdata, None if ignored else it.upper, folder)

    async def _bring_back(self, it: ContainerRecord) -> bool:
        try:
            await self._bring_up(it)
        except (PodmanError, OSError) as error:
            log.error("%s could not be brought back: %s", self.instance_id, error)
            return False
        return True

    async def restore(self, stages: Stages, gpus: Mapping[str, str] | None = None) -> None:
        """See `EngineProcess.restore`."""
        it, parts = self.it, self._parts
        if it is None:
            raise RuntimeFailure("restore", "it has no container to be restored in; a cold start makes one")
        image, store = self.image, parts.images.store
        folder = store.path(image)
        try:
            manifest = await asyncio.to_thread(store.load, image)
            if it.pid is not None:
                await parts.containers.stop(it)
                await parts.images.reset_rootfs(it, image)
            it = await self._made_for(it, manifest)
            self._have_port(it)
            it.image_bytes = manifest.total_bytes()
            await asyncio.to_thread(parts.maker.criu_config, self.key, it.model)
            collision = namespaces.taken(manifest.private.get("abstract_sockets", []))
        except (HostError, StoreError, PodmanError, OSError) as error:
            raise failure("restore", error) from error
        if collision is not None:
            raise RuntimeFailure(
                "restore",
                f"the unix socket {collision[0]} of its image is bound on the host's network already, by "
                f'{collision[1]}; with models.{self.key}.podman.network = "bridge" it would have names of its own',
            )
        if it.model.weights_copy:
            store.weights(image)  # mounted, and gone after a reboot
        self._tails.begin(self.instance_id)
        it.origin.inputs = manifest.inputs
        began = time.perf_counter()
        try:
            answer = await self._bring_up_from(it, folder)
        except (PodmanError, OSError) as error:
            it = await self._clear_for_another_try(it, error)
            try:
                answer = await self._bring_up_from(it, folder)
            except (PodmanError, OSError) as again:
                raise RuntimeFailure("restore", str(again)) from again
        _note_times(answer, "criu", ("restore_time",), began, stages)
        it.activity = Activity.OFF_GPU if manifest.private.get("cuda") else Activity.RUNNING
        await self._back_on_gpu(it, manifest, stages, gpus)

    def _have_port(self, it: ContainerRecord) -> None:
        """Raises PortTakenError where the port of an engine that is not running has gone to another program."""
        if it.on_host_network and self._parts.ports.taken_by_others(it.port):
            raise PortTakenError("restore", it.port, port_owner.owner(it.port))

    async def _made_for(self, it: ContainerRecord, manifest: Manifest) -> ContainerRecord:
        """A container to restore this image in, made from the container image that it was taken from."""
        made_from = (manifest.facts.get(CONTAINER_IMAGE), manifest.extension)
        fits = not it.on_host_network or it.port == manifest.private.get("host_port")
        if fits and (it.origin.image_id, it.origin.extension) == made_from and not it.renamed:
            return it
        log.info("%s: its container is made again, as its checkpoint needs it", self.instance_id)
        return await self.clone(it.model)

    async def _clear_for_another_try(self, it: ContainerRecord, error: Exception) -> ContainerRecord:
        """The container to try once more, where the failure was none of the image's; else raises RuntimeFailure."""
        parts = self._parts
        try:
            if await parts.host.is_missing(f"/containers/{it.id}/exists"):
                log.warning("%s: somebody removed its container: it is made again", self.instance_id)
                return await self.clone(it.model)
            if isinstance(error, PodmanError) and error.status == 0:
                log.warning("%s: %s; once more", self.instance_id, error)
                await parts.containers.stop(it)
                await parts.images.reset_rootfs(it, self.image)
                return it
        except (PodmanError, OSError) as again:
            raise RuntimeFailure("restore", str(again)) from again
        self._have_port(it)  # somebody may have been quicker
        log_file = it.userdata / "restore.log"
        reason = criu.log_reason(log_file, str(error))
        # Without a log CRIU was not even started.
        fault = criu.fault(reason) if log_file.exists() else Fault.HOST
        raise RuntimeFailure("restore", reason, fault=fault) from error

    async def _bring_up_from(self, it: ContainerRecord, folder: Path) -> Any:
        """Make an image of the store the container's own, and restore it."""
        if not it.userdata.is_dir():
            raise PodmanError(404, f"{it.name}: its bundle {it.userdata} is gone")
        bundle.link_image(it.userdata, folder)
        return await self._bring_up(it)

    async def _bring_up(self, it: ContainerRecord) -> Any:
        """Restore a container from the image that its bundle links to."""
        engine = container.engine_of(it.model)
        it.activity = Activity.INTERRUPTED
        owned.unlink(it.userdata / "restore.log")
        answer = await self._parts.host.podman.post(
            f"/containers/{it.id}/restore",
            work_s=it.image_bytes / _SLOWEST_BYTES_PER_S,
            keep="true",
            tcpEstablished=_flag(engine.criu.tcp_established),
            fileLocks=_flag(engine.criu.file_locks),
            printStats=_flag(engine.criu.print_stats),
            # A connection belongs to an address.
            ignoreStaticIP=_flag(engine.criu.ignore_static_ip and not engine.criu.tcp_established),
            ignoreStaticMAC=_flag(engine.criu.ignore_static_mac and not engine.criu.tcp_established),
        )
        await self._parts.containers.inspect(it)
        it.activity = Activity.RUNNING
        return answer


def _flag(wanted: bool) -> str:
    return "true" if wanted else "false"


def _note_times(answer: Any, stage: str, wanted: tuple[str, ...], began: float, stages: Stages) -> dict[str, int]:
    """Split what a call took into CRIU's part, stage `stage`, and podman's; CRIU's figures in microseconds."""
    wall_s = time.perf_counter() - began
    statistics = answer.get("criu_statistics") if isinstance(answer, dict) else None
    figures = {n: v for n, v in (statistics or {}).items() if isinstance(v, int)}
    own_s = sum(figures.get(name, 0) for name in wanted) / 1e6
    podmans_s = max(0.0, wall_s - own_s)
    stages.add("podman", podmans_s, began)
    if own_s:
        stages.add(stage, own_s, began + podmans_s)
    return figures
