"""The store of checkpoint images: one folder each, written beside and renamed, the manifest last.

::

    checkpoint_dir/
      demo-1/            an image that can be restored
        manifest.json
        *.img            CRIU's files
      demo-2.partial/    one being written; if nobody writes it, a crash left it: removed by `sweep`

Folders have mode 0700: an image holds the memory of an engine, prompts included.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import orjson

from proxy.config import format_size
from proxy.errors import WarmpoolError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = 1
_PARTIAL = ".partial"


class StoreError(WarmpoolError):
    """The store cannot take or give an image; nothing that was there was harmed."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What has to be known to restore an image, and to refuse it on a host where it would not work."""

    instance: str
    model: str
    spec_digest: str
    """Of everything that shaped the engine (command, environment, names); another digest, another engine."""
    created_unix_s: float
    kernel: str
    criu: str
    pid: int
    port: int
    sleep_level: int
    canary: str | None
    bytes_by_file: Mapping[str, int]
    format: int = FORMAT

    def total_bytes(self) -> int:
        """The size of the image."""
        return sum(self.bytes_by_file.values())


class CheckpointStore:
    """The images below one folder. Blocking file work is short, but for `remove`, which runs in a thread."""

    def __init__(self, root: Path, reserve_bytes: int) -> None:
        self.root = root
        self.reserve_bytes = reserve_bytes

    def open(self) -> None:
        """Make the folder. Raises StoreError when that is not possible."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root.chmod(0o700)
        except OSError as error:
            raise StoreError(f"checkpoint_dir {self.root}: {error.strerror}") from error

    def path(self, instance: str) -> Path:
        """The folder of a finished image."""
        return self.root / instance

    def sweep(self) -> list[str]:
        """Delete what a crash left half-written; the names of what was deleted."""
        left = [p for p in self.root.iterdir() if p.name.endswith(_PARTIAL) or not (p / MANIFEST).is_file()]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in left]

    def free_bytes(self) -> int:
        """What may still be written: free space less the reserve."""
        return shutil.disk_usage(self.root).free - self.reserve_bytes

    def begin(self, instance: str, expected_bytes: int) -> Path:
        """An empty folder to write an image of about `expected_bytes` to. Raises StoreError when it would not fit."""
        free = self.free_bytes()
        if expected_bytes > free:
            raise StoreError(
                f"checkpoint_dir {self.root}: the image needs about {format_size(expected_bytes)}, "
                f"{format_size(max(0, free))} are free beyond the reserve of {format_size(self.reserve_bytes)}"
            )
        path = self.root / (instance + _PARTIAL)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        return path

    def commit(self, instance: str, manifest: Manifest) -> None:
        """Turn the folder of `begin` into the image of `instance`, in place of an older one."""
        partial, final = self.root / (instance + _PARTIAL), self.path(instance)
        with (partial / MANIFEST).open("wb") as file:
            file.write(orjson.dumps(asdict(manifest), option=orjson.OPT_INDENT_2))
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    def abandon(self, instance: str) -> None:
        """Delete the folder of `begin`."""
        shutil.rmtree(self.root / (instance + _PARTIAL), ignore_errors=True)

    def load(self, instance: str) -> Manifest:
        """The manifest of an image whose files are all there in full. Raises StoreError otherwise."""
        path = self.path(instance)
        try:
            raw = orjson.loads((path / MANIFEST).read_bytes())
            if raw["format"] != FORMAT:
                raise StoreError(f"{path}: format {raw['format']!r}, this version reads {FORMAT}")
            manifest = Manifest(**raw)
            for name, size in manifest.bytes_by_file.items():
                actual = (path / name).stat().st_size
                if actual != size:
                    raise StoreError(f"{path / name}: {actual} bytes, the manifest says {size}")
        except (OSError, orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{path}: not a usable image: {error}") from error
        return manifest

    def names(self) -> list[str]:
        """The instances that have an image."""
        return sorted(p.name for p in self.root.iterdir() if (p / MANIFEST).is_file())

    async def remove(self, instance: str) -> None:
        """Delete an image, finished or partial, if there is one."""
        for path in (self.path(instance), self.root / (instance + _PARTIAL)):
            if path.exists():
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


def measure(path: Path) -> dict[str, int]:
    """File name → bytes, for every file of an image's folder."""
    return {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file() and p.name != MANIFEST}
