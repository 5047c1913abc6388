"""A container's own files: where podman looks for its checkpoint, and what its engine wrote.

podman restores a container in place from the folder `checkpoint` in its bundle, and unpacks /dev/shm from a file beside
it. Both are links into the store here, so that any number of containers restore from the same pages.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import TYPE_CHECKING, Final

from proxy.checkpoint.store import CRIU_FOLDER
from proxy.host import command, owned

if TYPE_CHECKING:
    from pathlib import Path

ROOTFS: Final = "rootfs.tar"
SHARED_MEMORY: Final = "devshm.tar"
_IN_BUNDLE: Final = "devshm-checkpoint.tar"
"""podman's name for the content of /dev/shm (libpod/container_internal_linux.go)."""
_TAR: Final = ("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner")


def link_image(userdata: Path, folder: Path) -> None:
    """Make an image of the store the checkpoint of a container."""
    link(userdata, folder)
    shared = userdata / _IN_BUNDLE
    if (folder / SHARED_MEMORY).exists():
        shared.symlink_to(folder / SHARED_MEMORY)


def link(userdata: Path, folder: Path) -> None:
    """Have podman read and write CRIU's files in a folder of the store."""
    checkpoint = userdata / "checkpoint"
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        owned.delete_tree(checkpoint)
    put_link(checkpoint, folder / CRIU_FOLDER)
    # podman would write through a link that is left there.
    owned.unlink(userdata / _IN_BUNDLE)


def put_link(link: Path, target: Path) -> None:
    """Make a link, in place of one that is there."""
    link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    owned.unlink(link)
    link.symlink_to(target)


async def collect(userdata: Path, upper: Path | None, folder: Path) -> None:
    """Add to an image what a dump leaves beside CRIU's files; `upper`: what was written to the root filesystem.

    Raises OSError.
    """
    shared = userdata / _IN_BUNDLE
    if shared.exists():
        # vLLM's message queues are mostly zeros, which cost nothing as holes.
        await command.checked("cp", "--sparse=always", str(shared), str(folder / SHARED_MEMORY))
    if upper is not None:
        await _tar("-cf", str(folder / ROOTFS), "-C", str(upper), ".")
    stats = userdata / "stats-dump"
    if stats.exists():
        await asyncio.to_thread(shutil.copyfile, stats, folder / CRIU_FOLDER / "stats-dump")


async def reset_rootfs(upper: Path, image: Path) -> None:
    """Make what was written to the root filesystem that of an image, if the image has it. Raises OSError."""
    if await asyncio.to_thread(_emptied, upper, image / ROOTFS):
        await _tar("-xpf", str(image / ROOTFS), "-C", str(upper))


def shared_memory_bytes(pid: int | None) -> int:
    """What is in the container's /dev/shm."""
    try:
        shm = os.statvfs(f"/proc/{pid}/root/dev/shm")
    except OSError:
        return 0
    return (shm.f_blocks - shm.f_bfree) * shm.f_frsize


def _emptied(folder: Path, archive: Path) -> bool:
    """Whether a folder is empty now, so that the archive can be unpacked to it; both must be there."""
    if not archive.is_file() or not folder.is_dir():
        return False
    owned.empty(folder)
    return True


async def _tar(*arguments: str) -> None:
    """Run tar, which keeps owners, extended attributes and overlayfs's white-outs. Raises OSError."""
    await command.checked(*_TAR, *arguments)
