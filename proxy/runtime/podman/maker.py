"""Containers for engines: made from what the configuration means now, or for the restore of a checkpoint."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.engine import kinds
from proxy.errors import RuntimeFailure
from proxy.host import owned, processes
from proxy.host.files import write_if_other
from proxy.runtime import ports
from proxy.runtime.image_store import CONTAINER_IMAGE, Origin
from proxy.runtime.podman import bundle, container
from proxy.runtime.podman.api import PodmanError, PodmanSilentError
from proxy.runtime.podman.containers import ContainerRecord
from proxy.runtime.podman.host import twice

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from proxy.checkpoint.manifest import Manifest
    from proxy.config.model import ModelSettings
    from proxy.runtime.podman.containers import Containers
    from proxy.runtime.podman.engine import PodmanEngine
    from proxy.runtime.podman.host import PodmanHost
    from proxy.runtime.podman.images import PodmanImages

log = logging.getLogger("warmpool.podman")

# In the container: what is run in vLLM, and the copies of its weights.
_EXTENSION: Final = "/opt/warmpool"
_WEIGHTS: Final = "/run/warmpool-weights"


class Maker:
    """Makes an engine's container, and takes it back."""

    def __init__(self, host: PodmanHost, images: PodmanImages, containers: Containers, taken: ports.Ports) -> None:
        self._host, self._images, self._containers = host, images, containers
        self._ports = taken

    def name(self, instance_id: str) -> str:
        """Of an instance's container."""
        return f"warmpool-{self._host.claim.owner[:6]}-{instance_id}"

    def _mark(self, instance_id: str) -> str:
        # Not what the process runtime's marks begin with: its orphan reaper ends everything that carries one.
        return f"podman:{self._host.claim.owner}:{instance_id};"

    async def make(
        self, operation: str, engine: PodmanEngine, model: ModelSettings, golden: Manifest | None = None
    ) -> ContainerRecord:
        """A container that is not started, in place of one that was there; after a failure nothing is known of it.

        For an engine that is restored from `golden`, made from what that was taken from; else from what the
        configuration means now. Raises RuntimeFailure.
        """
        image_id = golden.facts.get(CONTAINER_IMAGE) if golden is not None else None
        try:
            it = await self._to_be_made(engine, model, image_id)
            it.origin.extension = golden.extension if golden is not None else kinds.extension(model)
            answer = await self._made(engine, it)
        except PodmanError as error:
            hint = await self._hint(engine.key, container.engine_of(model).image, image_id, error)
            raise RuntimeFailure(operation, f"{error}{hint}") from error
        except OSError as error:
            where = error.filename or self._host.claim.folder
            raise RuntimeFailure(operation, f"{where}: {error.strerror}") from error
        for warning in answer.get("Warnings") or []:
            log.warning("%s: podman: %s", engine.instance_id, warning)
        return it

    async def _to_be_made(self, engine: PodmanEngine, model: ModelSettings, made_from: str | None) -> ContainerRecord:
        """`made_from`: the container image of the checkpoint that is to be restored in it."""
        table = container.engine_of(model)
        image_id = made_from or await self._host.image_named(table.image)
        host, port = "", table.container_port
        if table.network == "host":
            host, port = ports.LOOPBACK, await self._host_port(engine, its_own=made_from is not None)
        spec_digest, name = container.spec_digest(engine.key, model), self.name(engine.instance_id)
        return ContainerRecord(model, spec_digest, host, port, Origin(image_id=image_id), name=name)

    async def _made(self, engine: PodmanEngine, it: ContainerRecord) -> Any:
        """Have podman make the container, in place of one that was there; it is known only then."""
        known, table = engine.it, container.engine_of(it.model)
        try:
            answer = await twice(partial(self._make_anew, engine, it))
            it.id = answer["Id"]
            if table.criu.program is not None:
                bundle.put_link(self._host.claim.folder / "oci" / it.id / "criu", table.criu.program)
        except BaseException as error:
            await self.undo(engine, it, known, error)
            raise
        engine.it = it
        return answer

    async def undo(
        self, engine: PodmanEngine, it: ContainerRecord, known: ContainerRecord | None, error: BaseException
    ) -> None:
        """A container that could not be made or started is nobody's; one that podman makes yet, the next one replaces.

        The one that it was to replace is still known, though it was deleted: it is made again for the next restore.
        """
        if not isinstance(error, PodmanSilentError):
            with contextlib.suppress(PodmanError):
                await self._containers.delete(it.name)
        if known is None:
            self.let_go(it)
            engine.forget()
        else:
            known.pid = None
            engine.it = known

    def let_go(self, it: ContainerRecord) -> None:
        """A container is not there any more."""
        for folder in (it.userdata, it.upper):
            if folder is not None:
                owned.release(folder)
        if it.on_host_network:
            self._ports.release(it.port)

    async def _hint(self, key: str, image: str, image_id: str | None, error: PodmanError) -> str:
        """What to do about a container that could not be made, where that is known."""
        silent = isinstance(error, PodmanSilentError)
        if silent or not await self._host.is_missing(f"/images/{image_id or image}/exists"):
            return ""
        if image_id is not None:
            return "; its checkpoint was taken from that container image, which is gone"
        return f"; podman pull {image}, or correct models.{key}.podman.image"

    async def _make_anew(self, engine: PodmanEngine, it: ContainerRecord) -> Any:
        await self._containers.delete(it.name)
        specification = self._specification(engine, it, await self._python_path(it))
        return await self._host.podman.post("/containers/create", specification)

    async def _python_path(self, it: ContainerRecord) -> dict[str, str]:
        """The variable PYTHONPATH that the engine would have without us, where something is added to it."""
        table = container.engine_of(it.model)
        if kinds.of(it.model).inside is None or "PYTHONPATH" in table.env:
            return {name: value.get_secret_value() for name, value in table.env.items() if name == "PYTHONPATH"}
        image = await self._host.podman.get(f"/images/{it.origin.image_id}/json")
        pairs = (entry.partition("=") for entry in (image.get("Config") or {}).get("Env") or ())
        return {name: value for name, _, value in pairs if name == "PYTHONPATH"}

    def _specification(
        self, engine: PodmanEngine, it: ContainerRecord, python_path: Mapping[str, str]
    ) -> dict[str, Any]:
        claim, table = self._host.claim, container.engine_of(it.model)
        environment = {processes.MARK: self._mark(engine.instance_id)}
        mounts: list[tuple[str, str, bool]] = []
        arguments: tuple[str, ...] = ()
        inside = kinds.of(it.model).inside
        if inside is not None and (self._images.usable or it.model.weights_copy):
            copies = _WEIGHTS if it.model.weights_copy else None
            environment |= inside.environment(_EXTENSION, copies, python_path)
            mounts.append((str(inside.folder(claim.folder)), _EXTENSION, False))
            if copies is not None:
                mounts.append((str(self._images.store.weights(engine.image)), copies, True))
            arguments = inside.arguments(it.model)
        return container.specification(
            name=it.name,
            image=it.origin.image_id,
            key=engine.key,
            model=it.model,
            host_port=it.port if table.network == "host" else None,
            labels={
                "owner": claim.owner,
                "state-dir": str(claim.folder),
                "instance": engine.instance_id,
                "model": engine.key,
                "spec": it.spec_digest,
                "image": it.origin.image_id,
                "extension": it.origin.extension or "",
                "port": str(it.port),
            },
            environment=environment,
            mounts=mounts,
            arguments=arguments,
            criu_config=self.criu_config(engine.key, it.model),
            seccomp=container.seccomp_profile(table, claim.folder / "podman", self._host.default_seccomp),
            log=claim.log_path(engine.instance_id),
            log_size=claim.log_size,
        )

    def criu_config(self, key: str, model: ModelSettings) -> Path:
        """CRIU's options for a container, in the file that its annotation names, which a cleaner may have removed.

        Raises OSError, HostError.
        """
        claim = self._host.claim
        claim.ensure()
        folder, settings = claim.folder / "podman", container.engine_of(model).criu
        dispatcher = None
        if settings.action_scripts:
            text = container.action_dispatcher(settings.action_scripts)
            dispatcher = write_if_other(folder / f"{key}.actions", text.encode(), mode=0o700)
        options = container.criu_options(settings, dispatcher)
        self._host.configure_criu(options)
        if (inside := kinds.of(model).inside) is not None and self._images.usable:
            inside.folder(claim.folder)  # mounted
        return write_if_other(folder / f"{key}.criu.conf", options.encode())

    async def _host_port(self, engine: PodmanEngine, *, its_own: bool) -> int:
        """The port for a container on the host's network: the one its image was taken with, or a free one.

        `its_own`: the image is to be restored there, and can only have its own.
        """
        port = self._images.host_port(engine.image)
        if port is None and engine.it is not None:
            port = engine.it.port
        if port is not None and (not self._ports.taken_by_others(port) or its_own):
            return port
        taken = set()
        labelled = orjson.dumps({"label": [f"{container.LABEL}port"]}).decode()
        for entry in await self._host.podman.get("/containers/json", all="true", filters=labelled):
            with contextlib.suppress(ValueError, TypeError):
                taken.add(int((entry["Labels"] or {}).get(f"{container.LABEL}port", "")))
        return self._ports.take(taken)
