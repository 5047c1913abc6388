"""What a dump or a restore that was given up leaves behind: the OCI runtime, CRIU below it, and their mounts."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from proxy.host import command
from proxy.host import mounts as mountinfo

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger("warmpool.podman")


def mounts() -> list[str]:
    """Where something is mounted."""
    return [mount.point for mount in mountinfo.parse(mountinfo.MOUNTINFO.read_text())]


async def unmount(path: str) -> None:
    """Unmount here, and where podman's service mounted it: a service of systemd's may see copies only."""
    await command.quietly("umount", "--lazy", path)
    if _has_mounts_of_its_own():
        await command.quietly("nsenter", "--mount=/proc/1/ns/mnt", "umount", "--lazy", path)


def _has_mounts_of_its_own() -> bool:
    with contextlib.suppress(OSError):
        return Path("/proc/self/ns/mnt").readlink() != Path("/proc/1/ns/mnt").readlink()
    return False


def helpers() -> list[psutil.Process]:
    """The OCI runtimes that dump or restore a container."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() in ("runc", "crun") and {"restore", "checkpoint"} & set(process.cmdline()):
                found.append(process)
    return found


def kill_helpers(container_id: str, among: Iterable[psutil.Process] | None = None) -> bool:
    """Kill the OCI runtime that dumps or restores this container, and the CRIU below it; whether there was one."""
    killed = False
    for process in helpers() if among is None else among:
        with contextlib.suppress(psutil.Error):
            if container_id not in " ".join(process.cmdline()):
                continue
            tree = [process, *process.children(recursive=True)]
            log.warning("killed %s of container %.12s, which was given up", process.name(), container_id)
            killed = True
            for member in tree:
                with contextlib.suppress(psutil.Error):
                    member.kill()
    return killed
