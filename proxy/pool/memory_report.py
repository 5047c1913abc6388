"""What memory there is and who has it: the host's, the tmpfs of the checkpoints, the archive."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Any

from proxy.checkpoint.errors import StoreError
from proxy.checkpoint.files import MANIFEST
from proxy.checkpoint.store import CheckpointStore
from proxy.host import facts as host

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.config.pool import PoolSettings


class MemoryReport:
    """Reads sizes for `/admin/status`, beside the runtimes that write; an image is read again only when it changed."""

    def __init__(self, pool: PoolSettings) -> None:
        self._store = CheckpointStore(pool.checkpoint_dir, pool.checkpoint_reserve, pool.archive_dir)
        self._known: dict[str, tuple[int, dict[str, Any]]] = {}

    async def read(self) -> dict[str, Any]:
        """`host`, `checkpoints` and, with an archive, `archive`: bytes, and the images with their sizes."""
        return await asyncio.to_thread(self._read)

    async def checkpoint_space(self) -> tuple[int, int]:
        """Size of the filesystem that checkpoints are on, and free space on it, in bytes; 0 while it is not there."""
        usage = await asyncio.to_thread(_usage, self._store.root)
        return usage.get("total_bytes", 0), usage.get("free_bytes", 0)

    def _read(self) -> dict[str, Any]:
        memory = host.memory()
        report: dict[str, Any] = {
            "host": {"total_bytes": memory.total_bytes, "available_bytes": memory.available_bytes},
            "checkpoints": {
                **_usage(self._store.root),
                "reserve_bytes": int(self._store.reserve_bytes),
                "images": self._images(),
            },
        }
        if self._store.archive is not None:
            report["archive"] = {**_usage(self._store.archive), "images": self._archived()}
        return report

    def _images(self) -> list[dict[str, Any]]:
        known: dict[str, tuple[int, dict[str, Any]]] = {}
        for image in self._store.names():
            try:
                written = (self._store.path(image) / MANIFEST).stat().st_mtime_ns
                before = self._known.get(image)
                if before is not None and before[0] == written:
                    known[image] = before
                    continue
                manifest = self._store.load(image)
            except (OSError, StoreError):
                continue  # it is being replaced or removed
            facts = {"image": image, "model": manifest.model, "bytes": manifest.total_bytes()}
            known[image] = (written, facts)
        self._known = known
        return [facts for _, facts in known.values()]

    def _archived(self) -> list[dict[str, Any]]:
        found = []
        for image in self._store.archived():
            try:
                found.append({"image": image, "bytes": self._store.archive_path(image).stat().st_size})
            except OSError:
                continue
        return found


def _usage(folder: Path) -> dict[str, Any]:
    """Of the filesystem that a folder is on; without figures while there is no such folder."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return {"path": str(folder)}
    return {"path": str(folder), "total_bytes": usage.total, "used_bytes": usage.used, "free_bytes": usage.free}
