"""Single containers: looked at, ended, cleared away. What is known of one is written down in its record."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from proxy.host import command, owned, processes
from proxy.runtime import ports
from proxy.runtime.engine import Activity, Record
from proxy.runtime.podman import abandoned, container
from proxy.runtime.podman.api import PodmanError, PodmanSilentError
from proxy.runtime.podman.host import tried, twice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.runtime.podman.host import PodmanHost

log = logging.getLogger("warmpool.podman")

SETTLE_S: Final = 5.0
"""How long podman may take to see what the kernel says already."""
_NOWHERE: Final = Path("/nonexistent")


@dataclass(slots=True)
class ContainerRecord(Record):
    """What is known of one engine's container."""

    name: str = ""
    id: str = ""
    userdata: Path = _NOWHERE
    """Its bundle, where podman looks for the checkpoint."""
    upper: Path | None = None
    """Where what it writes to its root filesystem is."""
    merged: str = ""
    restored: bool = False
    """What runs came from an image."""
    renamed: bool = False
    """What it mounts has another name by now."""
    image_bytes: int = 0
    """What the image that it is restored from has, last we knew."""

    @property
    def on_host_network(self) -> bool:
        """Whether it has no network of its own."""
        return container.engine_of(self.model).network == "host"

    def tree(self) -> list[int]:
        """Its processes."""
        return processes.tree(self.pid) if self.pid is not None else []


class Containers:
    """Raises PodmanError."""

    def __init__(self, host: PodmanHost) -> None:
        self._host = host

    async def inspect(self, it: ContainerRecord) -> str:
        """Learn where the container's parts are; its state."""
        answer = await self._host.podman.get(f"/containers/{it.id or it.name}/json")
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
            it.host, it.port = _address(it, answer)
            if it.pid is not None:
                await self._host.hold_bridges(answer["NetworkSettings"].get("Networks") or {})
            return str(answer["State"]["Status"])
        except (KeyError, TypeError, ValueError) as error:
            raise PodmanError(0, f"{it.name}: inspect answers what this version does not understand: {error}") from None
        except OSError as error:
            raise PodmanError(409, f"{it.name}: {error.filename}: {error.strerror}") from error

    async def change(self, it: ContainerRecord, verb: str, wanted: str) -> None:
        """Pause or unpause it, and see that it is so where podman broke off."""

        async def call() -> None:
            try:
                await self._host.podman.post(f"/containers/{it.id}/{verb}")
            except PodmanError as error:
                if error.status or await self.inspect(it) != wanted:
                    raise

        await twice(call)

    async def stop(self, it: ContainerRecord) -> None:
        """End all processes of a container at once and return when its filesystem is unmounted."""
        if it.activity is Activity.INTERRUPTED:
            await asyncio.to_thread(abandoned.kill_helpers, it.id)
            await self._forget_half_made(it)
            it.activity = Activity.NOTHING if it.pid is None else Activity.RUNNING
        if it.activity is Activity.FROZEN:
            await self.unpause(it)
        await self._kill(it)
        it.pid, it.activity = None, Activity.NOTHING
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while it.merged and it.merged in abandoned.mounts():
                    await asyncio.sleep(0.01)

    async def unpause(self, it: ContainerRecord) -> None:
        """Let a frozen container be ended."""
        await tried(self._host.podman.post(f"/containers/{it.id}/unpause"))
        it.activity = Activity.RUNNING

    async def _kill(self, it: ContainerRecord) -> None:
        podman = self._host.podman

        async def stop() -> None:
            try:
                await podman.post(f"/containers/{it.id or it.name}/stop", repeatable=True, timeout="0")
            except PodmanError as error:
                if error.status != 404:
                    raise

        try:
            await stop()
        except PodmanError as error:
            # Paused by hand, or by a call of ours that was given up.
            if isinstance(error, PodmanSilentError) or await self.inspect(it) != "paused":
                raise
            await podman.post(f"/containers/{it.id}/unpause")
            await stop()

    async def _forget_half_made(self, it: ContainerRecord) -> None:
        """Clear what a killed OCI runtime and CRIU leave: mounts, and a record that the container exists."""
        # The mounts first: runc's `delete` would empty what is mounted there.
        for path in reversed(
            [p for p in abandoned.mounts() if f"/{it.id}/criu-root" in p or f"{it.userdata}/.criu" in p]
        ):
            await abandoned.unmount(path)
        await command.quietly(self._host.oci_program, "delete", "--force", it.id)

    async def end_politely(self, it: ContainerRecord, grace_s: float) -> None:
        """Ask it to end, and end it after that long."""
        if it.activity is Activity.FROZEN:
            await self._host.podman.post(f"/containers/{it.id}/unpause")
            it.activity = Activity.RUNNING
        # One that is off the GPU cannot end politely: its CUDA calls are locked.
        grace = "0" if it.activity is Activity.OFF_GPU else str(max(1, round(grace_s)))
        call = self._host.podman.post(f"/containers/{it.id}/stop", work_s=float(grace), timeout=grace)
        await tried(call)

    async def kill_past(self, it: ContainerRecord, error: Exception) -> None:
        """Where podman says nothing, end the engine without it: memory and GPU come free, the record stays."""
        if not isinstance(error, PodmanSilentError) or it.pid is None or not it.id:
            return
        with contextlib.suppress(OSError, TimeoutError):
            # Its first process ends with all others in its pid namespace; the number may be another's by now.
            if it.id in await asyncio.to_thread(Path(f"/proc/{it.pid}/cgroup").read_text):
                log.warning("%s: podman says nothing; its engine is killed without it", it.name)
                processes.send([it.pid], signal.SIGKILL)
                async with asyncio.timeout(SETTLE_S):
                    await processes.wait_gone(it.pid)

    async def delete(self, name: str) -> None:
        """Delete a container, if it is there, with what we keep of it."""
        podman = self._host.podman
        try:
            id_ = (await podman.get(f"/containers/{name}/json"))["Id"]
        except PodmanError as error:
            if isinstance(error, PodmanSilentError):
                raise
        else:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(owned.delete_tree, self._host.claim.folder / "oci" / id_)
        try:
            await podman.delete(f"/containers/{name}", force="true", v="true", timeout="0")
        except PodmanError as error:
            if error.status != 404:
                raise

    async def exit_reason(self, it: ContainerRecord) -> str | None:
        """How a container whose first process has gone ended; podman knows a moment later, from conmon."""
        with contextlib.suppress(PodmanError, TimeoutError, KeyError, TypeError):
            async with asyncio.timeout(SETTLE_S):
                while True:
                    state = (await self._host.podman.get(f"/containers/{it.id}/json"))["State"]
                    if state["Status"] not in ("running", "stopping"):
                        return f"exit status {state['ExitCode']}" + (", out of memory" if state["OOMKilled"] else "")
                    await asyncio.sleep(0.02)
        return None

    async def still_runs(self, it: ContainerRecord) -> bool:
        """Whether podman and the kernel say that it runs."""
        with contextlib.suppress(PodmanError):
            return await self.inspect(it) == "running" and it.pid is not None and processes.alive(it.pid)
        return False


def _address(it: ContainerRecord, answer: Mapping[str, Any]) -> tuple[str, int]:
    """Host and port that podman says the container has."""
    if it.on_host_network:
        return ports.LOOPBACK, int(answer["Config"]["Labels"][f"{container.LABEL}port"])
    networks = (answer["NetworkSettings"]["Networks"] or {}).values()
    addresses = [n.get(kind) for kind in ("IPAddress", "GlobalIPv6Address") for n in networks]
    return next((a for a in addresses if a), ""), container.engine_of(it.model).container_port
