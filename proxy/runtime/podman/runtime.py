"""Engines in podman containers, checkpointed by CRIU into the store and restored in place.

The container's own checkpoint folder is a symbolic link into the store on tmpfs, so that any number of containers of a
model restore from one golden checkpoint, each from the same pages, in its own network namespace. A container that is
not running is only a configuration: it costs nothing until it is restored. docs/architecture.md has the whole picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

from proxy.checkpoint.inputs import Reader
from proxy.checkpoint.manifest import Manifest
from proxy.checkpoint.store import CheckpointStore, StoreError, next_to
from proxy.errors import Fault, HostError, PortTakenError, RuntimeFailure
from proxy.host import command, owned, processes
from proxy.host import facts as host
from proxy.host.files import write_if_other
from proxy.runtime import criu, namespaces, port_owner, ports, vllm_extension
from proxy.runtime.base import Found, Handle, ImageFacts, Outdated, Recovered, Tiers, Vitals
from proxy.runtime.cuda import Cuda
from proxy.runtime.image_store import CONTAINER_IMAGE, KeepsImages, Origin, failure
from proxy.runtime.log_tail import LogTails
from proxy.runtime.podman import abandoned, bridges, bundle, container, strays
from proxy.runtime.podman.api import Podman, PodmanError, PodmanSilentError
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping, Sequence

    import psutil

    from proxy.config.model import ModelSettings
    from proxy.config.runtime import PodmanRuntimeSettings
    from proxy.gpu.cuda import Gpus
    from proxy.runtime.state_dir import Claim
    from proxy.telemetry.stages import Stages

log = logging.getLogger("warmpool.podman")

T = TypeVar("T")

_SETTLE_S: Final = 5.0
_CLOCK_S: Final = 2.0
"""How far the kernel's time of a process's start, which counts from the boot, may be off."""
_SLOWEST_BYTES_PER_S: Final = 20 << 20
"""What a dump or a restore is given time for: a slow disk."""
# In the container: what is run in vLLM, and the copies of its weights.
_EXTENSION: Final = "/opt/warmpool"
_WEIGHTS: Final = "/run/warmpool-weights"
_NOWHERE: Final = Path("/nonexistent")
_CRUN_WITH_ANNOTATION: Final = (1, 26)
_HOST_CRIU_CONFIG: Final = Path("/etc/criu/default.conf")


@dataclass(slots=True)
class _Container:
    """What is known of one instance's container."""

    handle: Handle
    name: str
    model: ModelSettings
    spec_digest: str
    id: str = ""
    origin: Origin = field(default_factory=Origin)
    userdata: Path = _NOWHERE
    """Its bundle, where podman looks for the checkpoint."""
    upper: Path | None = None
    """Where what it writes to its root filesystem is."""
    merged: str = ""
    pid: int | None = None
    """Of its first process; None while nothing runs."""
    paused: bool = False
    off_gpu: bool = False
    """Its CUDA processes are suspended."""
    restored: bool = False
    """What runs came from an image."""
    renamed: bool = False
    """What it mounts has another name by now."""
    interrupted: bool = False
    """A dump or restore was given up half-way, and its helpers may still run."""
    image_bytes: int = 0
    """What the image that it is restored from has, last we knew."""


class PodmanRuntime(KeepsImages):
    """The runtime `podman`. See `proxy.runtime.base.Runtime` for what each method promises."""

    name = "podman"
    shares_images = True

    def __init__(
        self,
        settings: PodmanRuntimeSettings,
        *,
        claim: Claim,
        store: CheckpointStore,
        criu_programs: Iterable[Path] = (),
        gpus: Gpus | None = None,
    ) -> None:
        self._settings = settings
        self._claim = claim
        self._store = store
        self._reader = Reader()
        self._cuda = Cuda(gpus)
        self._criu_programs = sorted(set(criu_programs))
        self._criu_versions: dict[Path, str] = {}
        self._containers: dict[str, _Container] = {}
        self._tails = LogTails(claim)
        self._ports = ports.Ports(*settings.port_range())
        self._pid_namespaces = namespaces.PidNamespaces()
        self._tiers = Tiers(frozenset())
        self._facts: dict[str, str] = {}
        self._oci_program = ""
        self._default_seccomp = container.DEFAULT_SECCOMP
        self._cgroup: str | None = None
        """The one that all containers are in; None where that is not known."""
        self._strays = strays.Strays(self._of_warmpools, claim.owner)
        self._bridges: dict[str, str] = {}
        """Network → its bridge's device; empty for a network of another kind."""
        self._annotated = True
        self._podman = self._client()

    def _client(self, oci_runtime: Path | None = None) -> Podman:
        timeout_s = self._settings.timeout
        return Podman(self._settings.socket, self._own_socket(), timeout_s=timeout_s, oci_runtime=oci_runtime)

    def _own_socket(self) -> Path:
        path = self._claim.folder / "podman.sock"
        # sun_path has 108 bytes
        return path if len(str(path)) < 100 else Path(f"/run/warmpool-{self._claim.owner}.sock")

    # --- the host ---

    async def open(self) -> None:
        """Claim the state folder, reach podman, find out what it can do. Raises HostError."""
        self._claim.acquire()
        self._cuda.open()
        try:
            await self._podman.open()
            info = await self._info()
            if self._criu_programs:
                await self._give_containers_their_criu()
        except BaseException as error:
            await self.close()
            if isinstance(error, PodmanError):
                raise HostError(str(error)) from error
            raise
        self._tiers = self._open_store(await self._look_around(info))

    async def _info(self) -> dict[str, Any]:
        info = await self._podman.get("/info")
        try:
            self._oci_program = info["host"]["ociRuntime"]["path"]
            self._default_seccomp = Path(
                info["host"]["security"].get("seccompProfilePath") or container.DEFAULT_SECCOMP
            )
            self._cgroup = container.cgroup_of_all(info["host"])
            return {
                "podman": str(info["version"]["Version"]),
                "runtime": str(info["host"]["ociRuntime"]["name"]),
                "version": str(info["host"]["ociRuntime"]["version"]),
            }
        except (KeyError, TypeError) as error:
            raise HostError(f"podman's service answers what this version does not understand: no {error}") from error

    async def _look_around(self, info: Mapping[str, str]) -> str | None:
        """None when containers can be checkpointed here, else what is missing."""
        version, reason = await criu.why_not("criu")
        numbers = command.version_in(info["version"])
        self._annotated = info["runtime"] != "crun" or numbers >= _CRUN_WITH_ANNOTATION
        self._facts = {
            "kernel": host.kernel(),
            "CRIU": version,
            "podman": info["podman"],
            info["runtime"]: ".".join(map(str, numbers)),
            **host.gpu_facts(),
        }
        if reason is None and info["runtime"] == "crun" and "+CRIU" not in info["version"]:
            reason = "this crun was built without CRIU; use runc, or a crun with it"
        return reason

    async def _give_containers_their_criu(self) -> None:
        """Start podman's service again, with an OCI runtime that looks for the CRIU programs of the user's own."""
        folder = self._claim.folder / "oci"
        text = container.runtime_wrapper(self._oci_program, folder)
        wrapper = write_if_other(folder / Path(self._oci_program).name, text.encode(), mode=0o700)
        for program in self._criu_programs:
            self._criu_versions[program], reason = await criu.why_not(str(program))
            if reason is not None:
                log.error("models with criu.program = %s cannot be checkpointed: %s", program, reason)
        await self._podman.close()
        self._podman = self._client(wrapper)
        await self._podman.open()

    async def close(self) -> None:
        """Disconnect and give up the claim."""
        await self._strays.close()
        await self._podman.close()
        self._ports.close()
        self._pid_namespaces.close()
        self._store.close()
        self._claim.release()

    def tiers(self) -> Tiers:
        """What `open` found."""
        return self._tiers

    async def recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        """See `Runtime.recover`. Raises HostError when podman cannot be asked."""
        try:
            return await self._recover(models)
        except PodmanError as error:
            raise HostError(str(error)) from error

    async def _recover(self, models: Mapping[str, ModelSettings]) -> Recovered:
        images: dict[str, ImageFacts] = {}
        golden: dict[str, Manifest] = {}
        lost: frozenset[str] = frozenset()
        if Tier.CHECKPOINTED in self._tiers.offered:
            usable = await self._usable_images(models)
            images = {key: image for key, (_, image) in usable.items()}
            lost = self._lost(models, images)
            golden = {key: manifest for key, (manifest, _) in usable.items()}
        await self._strays.look()
        entries = await self._ours()
        helpers = await asyncio.to_thread(abandoned.helpers) if entries else []
        found = await asyncio.gather(*(self._recovered(entry, models, images, helpers) for entry in entries))
        kept = [one for one in found if one is not None and await self._is_kept(one, golden.get(one.handle.model))]
        return Recovered(kept, images, lost)

    async def _is_kept(self, one: Found, golden: Manifest | None) -> bool:
        """Whether a container that was found is of use; else it is removed.

        Where there is a golden checkpoint that can be used, those that come from it are: one that runs was on its way
        out when the last warmpool ended, or was being made ready to take over, if it did not.
        """
        it = self._containers[one.handle.instance_id]
        if golden is None or (
            it.origin.image_id == golden.facts.get(CONTAINER_IMAGE)
            and (one.tier is not Tier.READY or (one.restored and _is_later(it.pid, golden)))
        ):
            return True
        log.info("container %s does not come from the checkpoint that there is now: removed", it.name)
        await self._delete(it.id)
        self._forget(it)
        return False

    def memory(self) -> host.Memory:
        """See `Runtime.memory`: containers are in cgroups of podman's, beside this process's."""
        return host.memory(self._cgroup)

    def strays(self) -> Sequence[str]:
        """See `Runtime.strays`."""
        return self._strays.lines()

    async def _of_warmpools(self) -> list[dict[str, Any]]:
        labelled = orjson.dumps({"label": [f"{container.LABEL}owner"]}).decode()
        entries: list[dict[str, Any]] = await self._podman.get("/containers/json", all="true", filters=labelled)
        return entries

    async def _ours(self) -> list[dict[str, Any]]:
        owned = orjson.dumps({"label": [f"{container.LABEL}owner={self._claim.owner}"]}).decode()
        entries: list[dict[str, Any]] = await self._podman.get("/containers/json", all="true", filters=owned)
        return entries

    async def _recovered(
        self,
        entry: Mapping[str, Any],
        models: Mapping[str, ModelSettings],
        images: Mapping[str, ImageFacts],
        helpers: Iterable[psutil.Process],
    ) -> Found | None:
        """An instance of the container if it can be used; else the container is removed."""
        interrupted = await asyncio.to_thread(abandoned.kill_helpers, entry["Id"], helpers)
        labels = {n.removeprefix(container.LABEL): v for n, v in (entry["Labels"] or {}).items()}
        key, instance_id = labels.get("model", ""), labels.get("instance", "")
        known = models.get(key)
        if known is None or labels.get("spec") != container.spec_digest(key, known):
            log.info("container %s is of another configuration: removed", entry["Names"][0])
            await self._delete(entry["Id"])
            return None
        it = _Container(Handle(instance_id, key, "", 0), self._container_name(instance_id), known, labels["spec"])
        it.origin.extension = labels.get("extension") or None
        try:
            state = await self._inspect(it)
            if interrupted:
                # Half dumped or half restored: not to be trusted, but its image is whole if it is there.
                it.interrupted = True
                await self._stop(it)
                state = await self._inspect(it)
            if state == "paused":
                await self._podman.post(f"/containers/{it.id}/unpause")
            if state in ("running", "paused") and self._cuda.usable:
                await self._cuda.resume("recover", _tree(it))
        except (PodmanError, RuntimeFailure) as error:
            log.warning("container %s: %s", it.name, error)
            state = "unknown"
        tier = None
        if state in ("running", "paused"):
            tier = Tier.READY
            it.origin.started_unix_s = float(entry.get("StartedAt") or 0)
        elif state in ("exited", "stopped") and key in images:
            it.pid = None
            await self._reset_rootfs(it)
            tier = Tier.ARCHIVED if images[key].archived else Tier.CHECKPOINTED
        if tier is None:
            await self._delete(entry["Id"])
            return None
        self._containers[instance_id] = it
        if _on_host_network(it):
            self._ports.hold(it.handle.port)
        return Found(it.handle, tier, float(entry.get("StartedAt") or 0) or None, it.restored)

    # --- starting and ending ---

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> Handle:
        """Start a container from nothing; see `Runtime.start`."""
        try:
            return await _twice(partial(self._start, instance_id, key, model, next_to(key) if beside else ""))
        except PodmanError as error:
            raise RuntimeFailure("start", str(error)) from error

    async def _start(self, instance_id: str, key: str, model: ModelSettings, image: str) -> Handle:
        while True:
            known = self._containers.get(instance_id)
            it = await self._create("start", instance_id, key, model, image=image)
            self._tails.begin(instance_id)
            try:
                await self._podman.post(f"/containers/{it.id}/start")
                await self._inspect(it)
                if not await self._names_as_in_another_image(it):
                    return it.handle
            except BaseException as error:
                await self._undo(it, known, error)
                raise
            log.info("%s: its sockets would have the names of those in another image; once more", instance_id)

    async def _names_as_in_another_image(self, it: _Container) -> bool:
        """Whether a container on the host's network has the number of a pid namespace that an image has in names.

        The namespace is held then, so that the next container has another number.
        """
        if not _on_host_network(it) or it.pid is None:
            return False
        with contextlib.suppress(OSError):  # it has ended
            number = str(namespaces.number_of(it.pid))
            if any(number in name for name in await self._names_in_images(self._image(it.handle))):
                self._pid_namespaces.hold(it.pid)
                return True
        return False

    async def _names_in_images(self, left_out: str | None = None) -> list[str]:
        """Of the abstract unix sockets on the host's network in the images there are, on tmpfs and archived."""
        names: list[str] = []
        for image in {*self._store.names(), *self._store.archived()} - {left_out}:
            with contextlib.suppress(StoreError):
                here = image in self._store.names()
                manifest = self._store.load(image) if here else await self._store.archived_manifest(image)
                names += manifest.private.get("abstract_sockets", [])
        return names

    async def clone(self, instance_id: str, key: str, model: ModelSettings) -> Handle:
        """Make a container with a bundle, which `restore` needs, and nothing in it; see `Runtime.clone`."""
        return (await self._clone(Handle(instance_id, key, "", 0), model)).handle

    async def _clone(self, handle: Handle, model: ModelSettings) -> _Container:
        try:
            golden = await self._manifest(self._image(handle))
        except StoreError as error:
            raise failure("clone", error) from error
        known = self._containers.get(handle.instance_id)
        it = await self._create("clone", handle.instance_id, handle.model, model, golden, image=handle.image)
        try:
            await self._podman.post(f"/containers/{it.id}/init")
            await self._stop(it)
            await self._inspect(it)
            it.pid = None
            await self._reset_rootfs(it)
        except BaseException as error:
            await self._undo(it, known, error)
            if isinstance(error, PodmanError | OSError):
                raise RuntimeFailure("clone", str(error)) from error
            raise
        return it

    async def _create(
        self,
        operation: str,
        instance_id: str,
        key: str,
        model: ModelSettings,
        golden: Manifest | None = None,
        *,
        image: str = "",
    ) -> _Container:
        """A container that is not started, in place of one that was there; after a failure nothing is known of it.

        For an engine that is restored from `golden`, made from what that was taken from; else from what the
        configuration means now. `image`: as in its handle.
        """
        image_id = golden.facts.get(CONTAINER_IMAGE) if golden is not None else None
        try:
            it = await self._to_be_made(Handle(instance_id, key, "", 0, image), model, image_id)
            it.origin.extension = golden.extension if golden is not None else vllm_extension.extension(model)
            answer = await self._made(it)
        except PodmanError as error:
            hint = await self._hint(key, container.engine_of(model).image, image_id, error)
            raise RuntimeFailure(operation, f"{error}{hint}") from error
        except OSError as error:
            raise RuntimeFailure(operation, f"{error.filename or self._claim.folder}: {error.strerror}") from error
        for warning in answer.get("Warnings") or []:
            log.warning("%s: podman: %s", instance_id, warning)
        return it

    async def _to_be_made(self, handle: Handle, model: ModelSettings, made_from: str | None) -> _Container:
        """`made_from`: the container image of the checkpoint that is to be restored in it."""
        known = self._containers.get(handle.instance_id)
        key, engine = handle.model, container.engine_of(model)
        image_id = made_from or await self._image_named(engine.image)
        if engine.network == "host":
            port = await self._host_port(handle.image or key, known, its_own=made_from is not None)
            handle = replace(handle, host=ports.LOOPBACK, port=port)
        else:
            handle = replace(handle, port=engine.container_port)
        name = self._container_name(handle.instance_id)
        return _Container(handle, name, model, container.spec_digest(key, model), origin=Origin(image_id=image_id))

    async def _made(self, it: _Container) -> Any:
        """Have podman make the container, in place of one that was there; it is known only then."""
        known = self._containers.get(it.handle.instance_id)
        engine = container.engine_of(it.model)
        try:
            answer = await _twice(partial(self._create_anew, it))
            it.id = answer["Id"]
            if engine.criu.program is not None:
                bundle.put_link(self._claim.folder / "oci" / it.id / "criu", engine.criu.program)
        except BaseException as error:
            await self._undo(it, known, error)
            raise
        self._containers[it.handle.instance_id] = it
        return answer

    async def _hint(self, key: str, image: str, image_id: str | None, error: PodmanError) -> str:
        """What to do about a container that could not be made, where that is known."""
        if isinstance(error, PodmanSilentError) or not await self._is_missing(f"/images/{image_id or image}/exists"):
            return ""
        if image_id is not None:
            return "; its checkpoint was taken from that container image, which is gone"
        return f"; podman pull {image}, or correct models.{key}.podman.image"

    async def _create_anew(self, it: _Container) -> Any:
        await self._delete(it.name)
        return await self._podman.post("/containers/create", self._specification(it, await self._python_path(it)))

    async def _python_path(self, it: _Container) -> dict[str, str]:
        """The variable PYTHONPATH that the engine would have without us, where something is added to it."""
        engine = container.engine_of(it.model)
        if not it.model.is_vllm or "PYTHONPATH" in engine.env:
            return {name: value.get_secret_value() for name, value in engine.env.items() if name == "PYTHONPATH"}
        image = await self._podman.get(f"/images/{it.origin.image_id}/json")
        pairs = (entry.partition("=") for entry in (image.get("Config") or {}).get("Env") or ())
        return {name: value for name, _, value in pairs if name == "PYTHONPATH"}

    async def _is_missing(self, path: str) -> bool:
        """Whether podman says that there is no such thing."""
        try:
            await self._podman.get(path)
        except PodmanError as error:
            return error.status == 404
        return False

    def _specification(self, it: _Container, python_path: Mapping[str, str]) -> dict[str, Any]:
        engine = container.engine_of(it.model)
        key = it.handle.model
        environment = {processes.MARK: self._mark(it.handle.instance_id)}
        mounts: list[tuple[str, str, bool]] = []
        arguments: tuple[str, ...] = ()
        if it.model.is_vllm and Tier.CHECKPOINTED in self._tiers.offered:
            copies = _WEIGHTS if it.model.weights_copy else None
            environment |= vllm_extension.environment(_EXTENSION, copies, python_path)
            mounts.append((str(vllm_extension.folder(self._claim.folder)), _EXTENSION, False))
            if copies is not None:
                mounts.append((str(self._store.weights(self._image(it.handle))), copies, True))
            arguments = vllm_extension.arguments(it.model)
        return container.specification(
            name=it.name,
            image=it.origin.image_id,
            key=key,
            model=it.model,
            host_port=it.handle.port if engine.network == "host" else None,
            labels={
                "owner": self._claim.owner,
                "state-dir": str(self._claim.folder),
                "instance": it.handle.instance_id,
                "model": key,
                "spec": it.spec_digest,
                "image": it.origin.image_id,
                "extension": it.origin.extension or "",
                "port": str(it.handle.port),
            },
            environment=environment,
            mounts=mounts,
            arguments=arguments,
            criu_config=self._criu_config(it),
            seccomp=container.seccomp_profile(engine, self._claim.folder / "podman", self._default_seccomp),
            log=self._claim.log_path(it.handle.instance_id),
            log_size=self._claim.log_size,
        )

    def _criu_config(self, it: _Container) -> Path:
        """CRIU's options for a container, in the file that its annotation names, which a cleaner may have removed.

        Raises OSError, HostError.
        """
        self._claim.ensure()
        folder, key, settings = self._claim.folder / "podman", it.handle.model, container.engine_of(it.model).criu
        dispatcher = None
        if settings.action_scripts:
            text = container.action_dispatcher(settings.action_scripts)
            dispatcher = write_if_other(folder / f"{key}.actions", text.encode(), mode=0o700)
        options = container.criu_options(settings, dispatcher)
        if not self._annotated:
            _write_host_criu_config(options)
        if it.model.is_vllm and Tier.CHECKPOINTED in self._tiers.offered:
            vllm_extension.folder(self._claim.folder)  # mounted
        return write_if_other(folder / f"{key}.criu.conf", options.encode())

    async def _inspect(self, it: _Container) -> str:
        """Learn where the container's parts are; its state."""
        answer = await self._podman.get(f"/containers/{it.id or it.name}/json")
        try:
            it.id = answer["Id"]
            it.origin.image_id = answer["Image"]
            it.userdata = Path(answer["StaticDir"])
            graph = answer["GraphDriver"]["Data"] or {}
            it.upper = Path(graph["UpperDir"]) if "UpperDir" in graph else None
            for folder in (it.userdata, it.upper):
                if folder is not None:
                    owned.register(folder)
            it.merged = graph.get("MergedDir", it.merged)
            it.pid = answer["State"]["Pid"] or None
            it.restored = bool(answer["State"].get("Restored"))
            it.handle = _addressed(it, answer)
            if it.pid is not None:
                await self._hold_bridges(answer["NetworkSettings"].get("Networks") or {})
            return str(answer["State"]["Status"])
        except (KeyError, TypeError, ValueError) as error:
            raise PodmanError(0, f"{it.name}: inspect answers what this version does not understand: {error}") from None
        except OSError as error:
            raise PodmanError(409, f"{it.name}: {error.filename}: {error.strerror}") from error

    async def _hold_bridges(self, networks: Iterable[str]) -> None:
        """See proxy/runtime/podman/bridges.py; before the engine is spoken to."""
        for network in networks:
            if network not in self._bridges:
                self._bridges[network] = await self._bridge_of(network)
            try:
                if bridges.hold_address(self._bridges[network]):
                    log.info("the MAC address of %s is held from now on", self._bridges[network])
            except OSError as error:
                log.warning("the MAC address of %s cannot be held: %s", self._bridges[network], error.strerror)

    async def _bridge_of(self, network: str) -> str:
        """The device of a network's bridge; empty where it has none, as with `host`, which podman 5 lists too."""
        try:
            facts = await self._podman.get(f"/networks/{network}/json")
        except PodmanError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return ""
        return str(facts.get("network_interface", "")) if facts.get("driver") == "bridge" else ""

    async def listens(self, handle: Handle) -> bool:
        """See `Runtime.listens`: on podman's bridge nobody else has the address of a container."""
        it = self._containers.get(handle.instance_id)
        if it is None or not _on_host_network(it):
            return True
        return await port_owner.check(handle.port, it.pid, partial(_tree, it))

    async def wait_exit(self, handle: Handle) -> str:
        """See `Runtime.wait_exit`."""
        it = self._containers.get(handle.instance_id)
        if it is None or it.pid is None:
            return "ended"
        reason = await processes.wait_gone(it.pid)
        # podman knows the status a moment later, from conmon.
        with contextlib.suppress(PodmanError, TimeoutError, KeyError, TypeError):
            async with asyncio.timeout(_SETTLE_S):
                while True:
                    state = (await self._podman.get(f"/containers/{it.id}/json"))["State"]
                    if state["Status"] not in ("running", "stopping"):
                        return f"exit status {state['ExitCode']}" + (", out of memory" if state["OOMKilled"] else "")
                    await asyncio.sleep(0.02)
        return reason

    async def host_bytes(self, handle: Handle) -> int:
        """See `Runtime.host_bytes`."""
        it = self._containers.get(handle.instance_id)
        if it is None or it.pid is None:
            return 0
        return await asyncio.to_thread(lambda: processes.held_bytes(_tree(it)))

    async def vitals(self, handle: Handle) -> Vitals:
        """See `Runtime.vitals`."""
        it = self._running(handle, "vitals")
        try:
            paused = await self._inspect(it) == "paused"
        except PodmanError as error:
            raise RuntimeFailure("vitals", str(error)) from error
        tree = _tree(it)
        return Vitals(processes.cpu_seconds(tree), paused or processes.all_stopped(tree))

    async def log_tail(self, handle: Handle) -> list[str]:
        """See `Runtime.log_tail`."""
        return await self._tails.read(handle.instance_id)

    async def drop(self, handle: Handle) -> None:
        """See `Runtime.drop`."""
        it = self._containers.get(handle.instance_id)
        if it is None:
            return
        try:
            await self._stop(it)
            await self._reset_rootfs(it)
        except (PodmanError, OSError) as error:
            await self._kill_past(it, error)
            raise RuntimeFailure("drop", str(error)) from error

    async def _stop(self, it: _Container) -> None:
        """End all processes of a container at once and return when its filesystem is unmounted."""
        if it.interrupted:
            await asyncio.to_thread(abandoned.kill_helpers, it.id)
            await self._forget_half_made(it)
            it.interrupted = False
        if it.paused:
            await _tried(self._podman.post(f"/containers/{it.id}/unpause"))
            it.paused = False
        await self._kill(it)
        it.pid = None
        it.off_gpu = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while it.merged and it.merged in abandoned.mounts():
                    await asyncio.sleep(0.01)

    async def _kill(self, it: _Container) -> None:
        async def stop() -> None:
            try:
                await self._podman.post(f"/containers/{it.id or it.name}/stop", repeatable=True, timeout="0")
            except PodmanError as error:
                if error.status != 404:
                    raise

        try:
            await stop()
        except PodmanError as error:
            # Paused by hand, or by a call of ours that was given up.
            if isinstance(error, PodmanSilentError) or await self._inspect(it) != "paused":
                raise
            await self._podman.post(f"/containers/{it.id}/unpause")
            await stop()

    async def _forget_half_made(self, it: _Container) -> None:
        """Clear what a killed OCI runtime and CRIU leave: mounts, and a record that the container exists."""
        # The mounts first: runc's `delete` would empty what is mounted there.
        for path in reversed(
            [p for p in abandoned.mounts() if f"/{it.id}/criu-root" in p or f"{it.userdata}/.criu" in p]
        ):
            await abandoned.unmount(path)
        await command.quietly(self._oci_program, "delete", "--force", it.id)

    def leave(self, handle: Handle) -> bool:
        """See `Runtime.leave`."""
        return self._settings.on_exit == "keep"

    async def remove(self, handle: Handle) -> None:
        """See `Runtime.remove`."""
        it = self._containers.get(handle.instance_id)
        try:
            if it is None:  # of a start that was cut off
                await self._delete(self._container_name(handle.instance_id))
                return
            if it.interrupted:
                await self._stop(it)
            elif it.pid is not None:
                if it.paused:
                    await self._podman.post(f"/containers/{it.id}/unpause")
                    it.paused = False
                # One that is off the GPU cannot end politely: its CUDA calls are locked.
                grace = "0" if it.off_gpu else str(max(1, round(self._settings.stop_grace)))
                await _tried(self._podman.post(f"/containers/{it.id}/stop", work_s=float(grace), timeout=grace))
            await self._delete(it.id or it.name)
        except PodmanError as error:
            if it is not None:
                await self._kill_past(it, error)
            raise RuntimeFailure("remove", str(error)) from error
        self._forget(it)

    async def _kill_past(self, it: _Container, error: Exception) -> None:
        """Where podman says nothing, end the engine without it: memory and GPU come free, the record stays."""
        if not isinstance(error, PodmanSilentError) or it.pid is None or not it.id:
            return
        with contextlib.suppress(OSError, TimeoutError):
            # Its first process ends with all others in its pid namespace; the number may be another's by now.
            if it.id in await asyncio.to_thread(Path(f"/proc/{it.pid}/cgroup").read_text):
                log.warning("%s: podman says nothing; its engine is killed without it", it.handle.instance_id)
                processes.send([it.pid], signal.SIGKILL)
                async with asyncio.timeout(_SETTLE_S):
                    await processes.wait_gone(it.pid)

    async def _delete(self, name: str) -> None:
        try:
            id_ = (await self._podman.get(f"/containers/{name}/json"))["Id"]
        except PodmanError as error:
            if isinstance(error, PodmanSilentError):
                raise
        else:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(owned.delete_tree, self._claim.folder / "oci" / id_)
        try:
            await self._podman.delete(f"/containers/{name}", force="true", v="true", timeout="0")
        except PodmanError as error:
            if error.status != 404:
                raise

    async def _undo(self, it: _Container, known: _Container | None, error: BaseException) -> None:
        """A container that could not be made or started is nobody's; one that podman makes yet, the next one replaces.

        The one that it was to replace is still known, though it was deleted: it is made again for the next restore.
        """
        if not isinstance(error, PodmanSilentError):
            with contextlib.suppress(PodmanError):
                await self._delete(it.name)
        if known is None:
            self._forget(it)
        else:
            known.pid = None
            self._containers[it.handle.instance_id] = known

    def _forget(self, it: _Container) -> None:
        self._containers.pop(it.handle.instance_id, None)
        for folder in (it.userdata, it.upper):
            if folder is not None:
                owned.release(folder)
        if _on_host_network(it):
            self._ports.release(it.handle.port)

    # --- suspended ---

    async def suspend(self, handle: Handle) -> None:
        """See `Runtime.suspend`: off the GPU, or where it uses none, the container's cgroup is frozen."""
        it = self._running(handle, "suspend")
        if await self._cuda.suspend("suspend", _tree(it)):
            it.off_gpu = True
            return
        await self._order(it, "pause", "suspend", "paused")
        it.paused = True

    async def resume(self, handle: Handle) -> None:
        """See `Runtime.resume`."""
        it = self._running(handle, "resume")
        if it.off_gpu:
            await self._cuda.resume("resume", _tree(it))
            it.off_gpu = False
            return
        await self._order(it, "unpause", "resume", "running")
        it.paused = False

    async def gpu_bytes(self, handle: Handle) -> Mapping[str, int]:
        """See `Runtime.gpu_bytes`."""
        it = self._containers.get(handle.instance_id)
        if it is None or it.pid is None:
            return {}
        return await self._cuda.held_by_gpu(partial(_tree, it))

    async def _order(self, it: _Container, verb: str, operation: str, wanted: str) -> None:
        async def order() -> None:
            try:
                await self._podman.post(f"/containers/{it.id}/{verb}")
            except PodmanError as error:
                if error.status or await self._inspect(it) != wanted:
                    raise

        try:
            await _twice(order)
        except PodmanError as error:
            raise RuntimeFailure(operation, str(error)) from error

    # --- checkpointed ---

    async def checkpoint(self, handle: Handle, facts: ImageFacts, stages: Stages) -> None:
        """See `Runtime.checkpoint`."""
        it = self._running(handle, "checkpoint")
        engine = container.engine_of(it.model)
        image = self._image(handle)
        try:
            pids = await asyncio.to_thread(_tree, it)
            resident = await asyncio.to_thread(processes.resident_bytes, pids)
            expected = resident + bundle.shared_memory_bytes(it.pid) + await self._cuda.held_bytes(pids)
            memory = await asyncio.to_thread(processes.memory_by_kind, pids)
            folder = await asyncio.to_thread(self._store.begin, image, expected)
            host_facts = {**self._host_facts(it.model), CONTAINER_IMAGE: it.origin.image_id}
            read = await self._learn(it.origin, it.model)
            on_host = await self._note_names(it, pids) if _on_host_network(it) else {}
            await asyncio.to_thread(self._criu_config, it)
        except (HostError, StoreError, OSError, PodmanError) as error:
            raise RuntimeFailure("checkpoint", str(error), alive=True) from error
        was_paused, was_off_gpu = it.paused, it.off_gpu
        try:
            if was_paused:
                await self.resume(handle)
            with stages.measure("cuda"):
                it.off_gpu = await self._cuda.before_dump(_tree(it), off_gpu=was_off_gpu)
            if it.off_gpu and not was_off_gpu:
                grown = await asyncio.to_thread(processes.resident_bytes, pids) - resident
                memory[processes.GPU_STATE] = max(0, grown)
            it.image_bytes = expected
            statistics = await self._dump(it, folder, stages)
            try:
                await self._collect(it, folder, stages)
                with stages.measure("digest"):
                    await self._store.commit(
                        Manifest(
                            image=handle.model,
                            model=handle.model,
                            runtime=self.name,
                            spec_digest=it.spec_digest,
                            extension=it.origin.extension,
                            created_unix_s=time.time(),
                            facts=host_facts,
                            inputs=read,
                            sleep_level=facts.sleep_level,
                            canary=facts.canary,
                            private={"cuda": it.off_gpu, **on_host},
                            details={
                                **facts.details,
                                "engine": engine.model_dump(mode="json", exclude={"env", "criu"}),
                                "memory": memory,
                                "criu_us": statistics,
                                "stages_s": dict(stages.seconds),
                            },
                        ),
                        beside=bool(handle.image),
                        leave_out_zeros=engine.criu.leave_out_zeros,
                    )
            except (OSError, StoreError) as error:
                # What CRIU wrote is whole: the engine comes back from it.
                alive = await self._bring_back(it)
                raise RuntimeFailure("checkpoint", f"{self._store.root}: {error}", alive=alive) from error
        except BaseException as error:
            self._store.abandon(image)
            if isinstance(error, RuntimeFailure) and error.alive:
                if was_paused:
                    await self.suspend(handle)
                elif it.off_gpu and not was_off_gpu:
                    await self.resume(handle)
            raise

    async def _note_names(self, it: _Container, pids: Iterable[int]) -> dict[str, Any]:
        """What the image of a container on the host's network takes of that; see proxy/runtime/namespaces.py."""
        names = await self._names_in_images()
        self._pid_namespaces.release_unless(lambda number: any(str(number) in name for name in names))
        if it.pid is not None:
            self._pid_namespaces.hold(it.pid)
        sockets = await asyncio.to_thread(namespaces.abstract_names, pids)
        return {"host_port": it.handle.port, "abstract_sockets": sockets}

    async def _dump(self, it: _Container, folder: Path, stages: Stages) -> dict[str, int]:
        """CRIU's files into `folder`; the container has ended afterwards. CRIU's statistics, in microseconds."""
        engine = container.engine_of(it.model)
        bundle.link(it.userdata, folder)
        owned.unlink(it.userdata / "dump.log")
        began = time.perf_counter()
        it.interrupted = True
        try:
            answer = await self._podman.post(
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
            raise RuntimeFailure("checkpoint", reason, alive=await self._still_runs(it)) from error
        it.interrupted = False
        it.pid = None
        # The time frozen holds that of dumping memory, which holds that of writing it.
        return _note_times(answer, "dump", ("freezing_time", "frozen_time"), began, stages)

    async def _still_runs(self, it: _Container) -> bool:
        with contextlib.suppress(PodmanError):
            if await self._inspect(it) == "running" and it.pid is not None and processes.alive(it.pid):
                it.interrupted = False
                return True
        return False

    async def _collect(self, it: _Container, folder: Path, stages: Stages) -> None:
        """What belongs to the engine beside CRIU's files: /dev/shm, and what it wrote to its root filesystem."""
        engine = container.engine_of(it.model)
        with stages.measure("collect"):
            await bundle.collect(it.userdata, None if engine.criu.ignore_rootfs else it.upper, folder)

    async def _bring_back(self, it: _Container) -> bool:
        try:
            await self._bring_up(it)
        except (PodmanError, OSError) as error:
            log.error("%s could not be brought back: %s", it.handle.instance_id, error)
            return False
        return True

    async def restore(self, handle: Handle, stages: Stages) -> Handle:
        """See `Runtime.restore`."""
        it = self._containers.get(handle.instance_id)
        if it is None:
            raise RuntimeFailure("restore", "it has no container to be restored in; a cold start makes one")
        image = self._image(handle)
        folder = self._store.path(image)
        try:
            manifest = await asyncio.to_thread(self._store.load, image)
            if it.pid is not None:
                await self._stop(it)
                await self._reset_rootfs(it)
            it = await self._made_for(it, manifest)
            self._have_port(it)
            it.image_bytes = manifest.total_bytes()
            await asyncio.to_thread(self._criu_config, it)
            collision = namespaces.taken(manifest.private.get("abstract_sockets", []))
        except (HostError, StoreError, PodmanError, OSError) as error:
            raise failure("restore", error) from error
        if collision is not None:
            raise RuntimeFailure(
                "restore",
                f"the unix socket {collision[0]} of its image is bound on the host's network already, by "
                f'{collision[1]}; with models.{handle.model}.podman.network = "bridge" it would have names of its own',
            )
        if it.model.weights_copy:
            self._store.weights(image)  # mounted, and gone after a reboot
        self._tails.begin(handle.instance_id)
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
        it.off_gpu = bool(manifest.private.get("cuda"))
        if it.off_gpu:
            with stages.measure("cuda"):
                await self._cuda.resume("restore", _tree(it))
            it.off_gpu = False
        return it.handle

    def _have_port(self, it: _Container) -> None:
        """Raises PortTakenError where the port of an engine that is not running has gone to another program."""
        if _on_host_network(it) and self._ports.taken_by_others(it.handle.port):
            raise PortTakenError("restore", it.handle.port, port_owner.owner(it.handle.port))

    def promote(self, handle: Handle) -> Handle:
        """See `Runtime.promote`."""
        it = self._containers[handle.instance_id]
        try:
            self._store.promote(handle.model)
        except StoreError as error:
            raise RuntimeFailure("promote", str(error), alive=True) from error
        it.handle = replace(it.handle, image="")
        # Its container mounts the weights' copy under the name that it had: it is made again when it is restored.
        it.renamed = it.model.weights_copy
        return it.handle

    async def _made_for(self, it: _Container, manifest: Manifest) -> _Container:
        """A container to restore this image in, made from the container image that it was taken from."""
        made_from = (manifest.facts.get(CONTAINER_IMAGE), manifest.extension)
        fits = not _on_host_network(it) or it.handle.port == manifest.private.get("host_port")
        if fits and (it.origin.image_id, it.origin.extension) == made_from and not it.renamed:
            return it
        log.info("%s: its container is made again, as its checkpoint needs it", it.handle.instance_id)
        return await self._clone(it.handle, it.model)

    async def _clear_for_another_try(self, it: _Container, error: Exception) -> _Container:
        """The container to try once more, where the failure was none of the image's; else raises RuntimeFailure."""
        try:
            if await self._is_missing(f"/containers/{it.id}/exists"):
                log.warning("%s: somebody removed its container: it is made again", it.handle.instance_id)
                return await self._clone(it.handle, it.model)
            if isinstance(error, PodmanError) and error.status == 0:
                log.warning("%s: %s; once more", it.handle.instance_id, error)
                await self._stop(it)
                await self._reset_rootfs(it)
                return it
        except (PodmanError, OSError) as again:
            raise RuntimeFailure("restore", str(again)) from again
        self._have_port(it)  # somebody may have been quicker
        log_file = it.userdata / "restore.log"
        reason = criu.log_reason(log_file, str(error))
        # Without a log CRIU was not even started.
        fault = criu.fault(reason) if log_file.exists() else Fault.HOST
        raise RuntimeFailure("restore", reason, fault=fault) from error

    async def _bring_up_from(self, it: _Container, folder: Path) -> Any:
        """Make an image of the store the container's own, and restore it."""
        if not it.userdata.is_dir():
            raise PodmanError(404, f"{it.name}: its bundle {it.userdata} is gone")
        bundle.link_image(it.userdata, folder)
        return await self._bring_up(it)

    async def _bring_up(self, it: _Container) -> Any:
        """Restore a container from the image that its bundle links to."""
        engine = container.engine_of(it.model)
        it.interrupted = True
        owned.unlink(it.userdata / "restore.log")
        answer = await self._podman.post(
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
        await self._inspect(it)
        it.interrupted = False
        it.paused = False
        return answer

    async def _reset_rootfs(self, it: _Container) -> None:
        """Make a stopped container's own files those of the image: CRIU refuses a file that has grown since."""
        engine = container.engine_of(it.model)
        if it.upper is not None and not engine.criu.ignore_rootfs:
            await bundle.reset_rootfs(it.upper, self._store.path(self._image(it.handle)))

    async def unarchive_image(self, handle: Handle) -> None:
        """See `Runtime.unarchive_image`."""
        await super().unarchive_image(handle)
        image = self._image(handle)
        for it in [c for c in self._containers.values() if self._image(c.handle) == image and c.pid is None]:
            await self._reset_rootfs(it)

    # --- parts ---

    def _host_facts(self, model: ModelSettings) -> dict[str, str]:
        engine = container.engine_of(model)
        own = {} if engine.criu.program is None else {"CRIU": self._criu_versions.get(engine.criu.program, "")}
        return self._facts | own

    async def _facts_for(self, model: ModelSettings, manifest: Manifest) -> dict[str, str]:
        """The host, and the container image that the engine was started from, while podman has it."""
        facts = self._host_facts(model)
        made_from = manifest.facts.get(CONTAINER_IMAGE, "")
        if made_from and not await self._is_missing(f"/images/{made_from}/exists"):
            facts[CONTAINER_IMAGE] = made_from
        return facts

    async def _moved(self, model: ModelSettings, image_id: str) -> str | None:
        """Whether the configuration's name for the container image means another one than this by now."""
        now = await self._image_now(model)
        if image_id == now:
            return None
        what = f"is {now[:12]} now" if now is not None else "is not there any more"
        name = container.engine_of(model).image
        return f"the container image {name} {what}, the engine was started from {image_id[:12]}"

    async def outdated(
        self, models: Mapping[str, ModelSettings], instances: Container[str] | None = None
    ) -> Mapping[str, Outdated]:
        """See `Runtime.outdated`."""
        try:
            return await super().outdated(models, instances)
        except PodmanError as error:
            raise RuntimeFailure("compare", str(error), alive=True) from error

    def _origins(self) -> Iterator[tuple[Handle, str, Origin]]:
        for it in self._containers.values():
            # Of one that was adopted after its restore, the image knows.
            if it.pid is not None and not it.handle.image and (it.origin.inputs is not None or not it.restored):
                yield it.handle, it.spec_digest, it.origin

    async def _image_named(self, name: str) -> str:
        """The id of the container image that a name means. Raises PodmanError."""
        try:
            return str((await self._podman.get(f"/images/{name}/json"))["Id"])
        except (KeyError, TypeError) as error:
            raise PodmanError(0, f"{name}: inspect answers what this version does not understand: {error}") from None

    async def _image_now(self, model: ModelSettings) -> str | None:
        """The id of the container image that an engine would be started from; None where there is none."""
        try:
            return await self._image_named(container.engine_of(model).image)
        except PodmanError as error:
            if error.status != 404:
                raise
            return None

    def _digest(self, key: str, model: ModelSettings) -> str:
        return container.spec_digest(key, model)

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        """See `Runtime.refusal`. Raises HostError when podman cannot be asked."""
        try:
            return await super().refusal(manifest, models)
        except PodmanError as error:
            raise HostError(str(error)) from error

    async def _host_port(self, image: str, known: _Container | None, *, its_own: bool) -> int:
        """The port for a container on the host's network: the one its image was taken with, or a free one.

        `its_own`: the image is to be restored there, and can only have its own.
        """
        port = known.handle.port if known is not None else None
        with contextlib.suppress(StoreError):
            noted = self._store.load(image).private.get("host_port")
            port = noted if isinstance(noted, int) else port
        if port is not None and (not self._ports.taken_by_others(port) or its_own):
            return port
        taken = set()
        labelled = orjson.dumps({"label": [f"{container.LABEL}port"]}).decode()
        for entry in await self._podman.get("/containers/json", all="true", filters=labelled):
            with contextlib.suppress(ValueError, TypeError):
                taken.add(int((entry["Labels"] or {}).get(f"{container.LABEL}port", "")))
        return self._ports.take(taken)

    def _container_name(self, instance_id: str) -> str:
        return f"warmpool-{self._claim.owner[:6]}-{instance_id}"

    def _mark(self, instance_id: str) -> str:
        # Not what the process runtime's marks begin with: its orphan reaper ends everything that carries one.
        return f"podman:{self._claim.owner}:{instance_id};"

    def _running(self, handle: Handle, operation: str) -> _Container:
        it = self._containers.get(handle.instance_id)
        if it is None or it.pid is None or not processes.alive(it.pid):
            raise RuntimeFailure(operation, "the engine is not running")
        return it


async def _twice(work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work`, which is tried once more when podman's service broke off."""
    try:
        return await work()
    except PodmanError as error:
        if error.status:
            raise
        log.warning("%s; once more", error)
        return await work()


async def _tried(call: Awaitable[Any]) -> None:
    """A call whose failure makes no difference, unless it is that podman says nothing."""
    try:
        await call
    except PodmanSilentError:
        raise
    except PodmanError as error:
        log.debug("%s", error)


def _tree(it: _Container) -> list[int]:
    return processes.tree(it.pid) if it.pid is not None else []


def _is_later(pid: int | None, golden: Manifest) -> bool:
    """Whether a process was made after an image was written: for one that CRIU restored, that is its restore."""
    return pid is not None and processes.began_unix_s(pid) + _CLOCK_S >= golden.created_unix_s


def _on_host_network(it: _Container) -> bool:
    return container.engine_of(it.model).network == "host"


def _addressed(it: _Container, answer: Mapping[str, Any]) -> Handle:
    """The handle with the address that podman says the container has."""
    if _on_host_network(it):
        labels = answer["Config"]["Labels"]
        return replace(it.handle, host=ports.LOOPBACK, port=int(labels[f"{container.LABEL}port"]))
    networks = (answer["NetworkSettings"]["Networks"] or {}).values()
    addresses = [n.get(kind) for kind in ("IPAddress", "GlobalIPv6Address") for n in networks]
    port = container.engine_of(it.model).container_port
    return replace(it.handle, host=next((a for a in addresses if a), ""), port=port)


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


def _write_host_criu_config(options: str) -> None:
    """For a crun that has no configuration per container: all of CRIU's, unless somebody else wrote it."""
    try:
        if _HOST_CRIU_CONFIG.exists() and not _HOST_CRIU_CONFIG.read_text().startswith("# Written by warmpool"):
            lines = set(_HOST_CRIU_CONFIG.read_text().splitlines())
            lacking = [o for o in options.splitlines() if o and not o.startswith("#") and o not in lines]
            if lacking:
                log.warning("%s is not warmpool's and lacks: %s", _HOST_CRIU_CONFIG, ", ".join(lacking))
            return
        write_if_other(_HOST_CRIU_CONFIG, options.encode(), folder_mode=0o755, mode=0o644)
    except OSError as error:
        log.warning("%s: %s", _HOST_CRIU_CONFIG, error.strerror)
