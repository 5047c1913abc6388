"""podman on this host: its service, what it can do, its networks, and what it has."""

from __future__ import annotations

import logging
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

from proxy.errors import HostError
from proxy.host import command
from proxy.host import facts as host
from proxy.host.files import write_if_other
from proxy.runtime import criu
from proxy.runtime.podman import bridges, container
from proxy.runtime.podman.api import Podman, PodmanError, PodmanSilentError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from proxy.config.model import ModelSettings
    from proxy.config.runtime import PodmanRuntimeSettings
    from proxy.runtime.state_dir import Claim

log = logging.getLogger("warmpool.podman")

T = TypeVar("T")

_CRUN_WITH_ANNOTATION: Final = (1, 26)
_HOST_CRIU_CONFIG: Final = Path("/etc/criu/default.conf")


class PodmanHost:
    """`open` before use; `podman` is the client of its service."""

    def __init__(self, settings: PodmanRuntimeSettings, claim: Claim, criu_programs: Iterable[Path]) -> None:
        self.settings = settings
        self.claim = claim
        self.oci_program = ""
        self.default_seccomp = container.DEFAULT_SECCOMP
        self.cgroup: str | None = None
        """The one that all containers are in; None where that is not known."""
        self._criu_programs = sorted(set(criu_programs))
        self._criu_versions: dict[Path, str] = {}
        self._facts: dict[str, str] = {}
        self._annotated = True
        """A container can have a CRIU configuration of its own."""
        self._bridges: dict[str, str] = {}
        """Network → its bridge's device; empty for a network of another kind."""
        self.podman = self._client()

    def _client(self, oci_runtime: Path | None = None) -> Podman:
        timeout_s = self.settings.timeout
        return Podman(self.settings.socket, self.own_socket(), timeout_s=timeout_s, oci_runtime=oci_runtime)

    def own_socket(self) -> Path:
        """Where a service of our own listens."""
        path = self.claim.folder / "podman.sock"
        # sun_path has 108 bytes
        return path if len(str(path)) < 100 else Path(f"/run/warmpool-{self.claim.owner}.sock")

    async def open(self) -> str | None:
        """Reach podman, find out what it can do: None when containers can be checkpointed here, else what is missing.

        Raises HostError, PodmanError.
        """
        await self.podman.open()
        info = await self._info()
        if self._criu_programs:
            await self._give_containers_their_criu()
        return await self._look_around(info)

    async def _info(self) -> dict[str, Any]:
        info = await self.podman.get("/info")
        try:
            self.oci_program = info["host"]["ociRuntime"]["path"]
            self.default_seccomp = Path(info["host"]["security"].get("seccompProfilePath") or container.DEFAULT_SECCOMP)
            self.cgroup = container.cgroup_of_all(info["host"])
            return {
                "podman": str(info["version"]["Version"]),
                "runtime": str(info["host"]["ociRuntime"]["name"]),
                "version": str(info["host"]["ociRuntime"]["version"]),
            }
        except (KeyError, TypeError) as error:
            raise HostError(f"podman's service answers what this version does not understand: no {error}") from error

    async def _look_around(self, info: Mapping[str, str]) -> str | None:
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
        folder = self.claim.folder / "oci"
        text = container.runtime_wrapper(self.oci_program, folder)
        wrapper = write_if_other(folder / Path(self.oci_program).name, text.encode(), mode=0o700)
        for program in self._criu_programs:
            self._criu_versions[program], reason = await criu.why_not(str(program))
            if reason is not None:
                log.error("models with criu.program = %s cannot be checkpointed: %s", program, reason)
        await self.podman.close()
        self.podman = self._client(wrapper)
        await self.podman.open()

    async def close(self) -> None:
        """Disconnect."""
        await self.podman.close()

    def facts(self, model: ModelSettings) -> dict[str, str]:
        """What has to be the same where an image of the model is restored."""
        engine = container.engine_of(model)
        own = {} if engine.criu.program is None else {"CRIU": self._criu_versions.get(engine.criu.program, "")}
        return self._facts | own

    def configure_criu(self, options: str) -> None:
        """For a crun that has no configuration per container: all of CRIU's."""
        if not self._annotated:
            _write_host_criu_config(options)

    # --- what it has ---

    async def containers(self, owner: str | None = None) -> list[dict[str, Any]]:
        """Those of one owner's, or of all warmpools, as podman lists them. Raises PodmanError."""
        label = f"{container.LABEL}owner" + (f"={owner}" if owner is not None else "")
        labelled = orjson.dumps({"label": [label]}).decode()
        entries: list[dict[str, Any]] = await self.podman.get("/containers/json", all="true", filters=labelled)
        return entries

    async def is_missing(self, path: str) -> bool:
        """Whether podman says that there is no such thing."""
        try:
            await self.podman.get(path)
        except PodmanError as error:
            return error.status == 404
        return False

    async def image_named(self, name: str) -> str:
        """The id of the container image that a name means. Raises PodmanError."""
        try:
            return str((await self.podman.get(f"/images/{name}/json"))["Id"])
        except (KeyError, TypeError) as error:
            raise PodmanError(0, f"{name}: inspect answers what this version does not understand: {error}") from None

    async def image_now(self, model: ModelSettings) -> str | None:
        """The id of the container image that an engine would be started from; None where there is none."""
        try:
            return await self.image_named(container.engine_of(model).image)
        except PodmanError as error:
            if error.status != 404:
                raise
            return None

    # --- networks ---

    async def hold_bridges(self, networks: Iterable[str]) -> None:
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
            facts = await self.podman.get(f"/networks/{network}/json")
        except PodmanError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return ""
        return str(facts.get("network_interface", "")) if facts.get("driver") == "bridge" else ""


async def twice(work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work`, which is tried once more when podman's service broke off."""
    try:
        return await work()
    except PodmanError as error:
        if error.status:
            raise
        log.warning("%s; once more", error)
        return await work()


async def tried(call: Awaitable[Any]) -> None:
    """A call whose failure makes no difference, unless it is that podman says nothing."""
    try:
        await call
    except PodmanSilentError:
        raise
    except PodmanError as error:
        log.debug("%s", error)


def _write_host_criu_config(options: str) -> None:
    """All of CRIU's configuration, unless somebody else wrote it."""
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
