"""The files of an image: their digests, and its manifest on disk. Long work runs in a thread that can be stopped."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Final, TypeVar

from proxy.checkpoint import manifest as manifests
from proxy.checkpoint.errors import DamagedError, OtherVersionError, StoreError
from proxy.checkpoint.manifest import Manifest, ManifestError, OtherFormatError, kind_of
from proxy.host import owned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MANIFEST: Final = manifests.NAME
LARGE_BYTES: Final = 64 << 20
CHUNK_BYTES: Final = 4 << 20
_HASHING_THREADS: Final = 4

T = TypeVar("T")


class Stoppable:
    """A file that cannot be read on once `stop` is set."""

    def __init__(self, file: IO[bytes], stop: threading.Event) -> None:
        self._file = file
        self._stop = stop

    def read(self, size: int = -1) -> bytes:
        if self._stop.is_set():
            raise OSError("cancelled")
        return self._file.read(size)


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """The result of `work` in a thread; when cancelled, `work` is told so and waited for."""
    stop = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([task])
        raise


def write_manifest(folder: Path, manifest: Manifest) -> None:
    with (folder / MANIFEST).open("wb") as file:
        file.write(manifest.as_bytes())
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        return parsed(owned.read_plain(path, manifests.LIMIT_BYTES), str(folder))
    except OSError as error:
        kind = DamagedError if error.errno in (errno.EINVAL, errno.ELOOP) else StoreError
        raise kind(f"{path}: {error.strerror}") from error


def parsed(data: bytes, where: str) -> Manifest:
    try:
        return manifests.parse(data)
    except OtherFormatError as error:
        raise OtherVersionError(f"{where}: {error}") from None
    except ManifestError as error:
        raise DamagedError(f"{where}: not a usable image: {error}") from None


def measure(
    folder: Path, stop: threading.Event, known: Mapping[str, str], *, lay_out: bool
) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and digests of every file of an image's folder, by path.

    `lay_out`: on a tmpfs with huge=within_size, files that grow as they are written get small pages. Large ones are
    written again with their size known, which makes restores faster; small ones would take 2 MiB each. `known`: the
    digests of files that were written so already.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    files = {name: path for path in paths if (name := str(path.relative_to(folder))) != MANIFEST}

    def measure(name: str) -> tuple[int, str]:
        path = files[name]
        path.chmod(0o600)
        size = path.stat().st_size
        return size, known.get(name) or (lay_out and _laid_out(path, size, stop)) or _sha256(path, stop)

    # Hashing lets other threads run; it is what takes longest.
    with ThreadPoolExecutor(_HASHING_THREADS, thread_name_prefix="digest") as threads:
        found = dict(zip(files, threads.map(measure, files), strict=True))
    return {name: size for name, (size, _) in found.items()}, {name: digest for name, (_, digest) in found.items()}


def holes(folder: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Kind → bytes of its files that take no space, where there are any."""
    holes: Counter[str] = Counter()
    for name, size in sizes.items():
        holes[kind_of(name)] += max(0, size - (folder / name).stat().st_blocks * 512)  # stat(2): on any filesystem
    return {kind: count for kind, count in holes.items() if count}


def _laid_out(path: Path, size: int, stop: threading.Event) -> str | None:
    """The digest of a file that was written again, or None: it is too small for that, or there is no space."""
    if size < LARGE_BYTES:
        return None
    digest = hashlib.sha256()
    try:
        with path.open("rb") as old, owned.replacing(path) as new:
            os.posix_fallocate(new.fileno(), 0, size)
            stoppable = Stoppable(old, stop)
            while chunk := stoppable.read(CHUNK_BYTES):
                digest.update(chunk)
                new.write(chunk)
    except OSError:
        if stop.is_set():
            raise
        return None
    return digest.hexdigest()


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        stoppable = Stoppable(file, stop)
        while chunk := stoppable.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_digests(folder: Path, manifest: Manifest, stop: threading.Event) -> None:
    for name, expected in manifest.sha256_by_file.items():
        if _sha256(folder / name, stop) != expected:
            raise DamagedError(differs(folder / name))


def differs(path: Path) -> str:
    return f"{path}: its content is not what was written (SHA-256 differs)"
