"""The store of checkpoint images: one folder each, written beside and renamed, the manifest last.

::

    checkpoint_dir/
      demo-1/               an image that can be restored
        manifest.json
        criu/               CRIU's files
        rootfs.tar …        what else the runtime needs
      demo-2.partial/       one being written; if nobody writes it, a crash left it: removed by `sweep`
      demo.next/            a whole one that is about to take the place of `demo`; removed by `sweep` likewise
      demo.quarantined/     one that failed to restore twice: never used, deleted first when space is needed
      .lock                 held by the warmpool that uses the folder
    archive_dir/
      demo.tar.zst          an image that left tmpfs

Folders have mode 0700 and files 0600: an image holds the memory of an engine, prompts included.
Every file's SHA-256 is in the manifest; `verify` reads them all, `load` only looks at the sizes.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import stat
import threading
from typing import IO, TYPE_CHECKING, Final

from proxy.checkpoint import archive, zero_pages
from proxy.checkpoint.archive import DAMAGE, SUFFIX, Compression, unusable
from proxy.checkpoint.errors import DamagedError, StoreError
from proxy.checkpoint.files import MANIFEST, check_digests, holes, in_thread, measure, read_manifest, write_manifest
from proxy.checkpoint.manifest import Manifest, ManifestError, by_kind
from proxy.config.values import format_size
from proxy.host import cpu, facts, owned
from proxy.host.owned import NotOwnedError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("warmpool.checkpoints")

LOCK: Final = ".lock"
CRIU_FOLDER: Final = "criu"

_PARTIAL: Final = ".partial"
_OLD: Final = ".old.partial"
_NEXT: Final = ".next"
_QUARANTINED: Final = ".quarantined"
_WEIGHTS: Final = ".weights"


def next_to(image: str) -> str:
    """The name of the image that is to take the place of one, while both are there."""
    return image + _NEXT


class CheckpointStore:
    """The images below one folder, and their archives below another.

    File work over a few KiB runs in a thread; cancelling it waits until the thread has stopped.
    """

    def __init__(self, root: Path, reserve_bytes: int, archive: Path | None = None) -> None:
        self.root = root.absolute()
        self.reserve_bytes = reserve_bytes
        self.archive = archive.absolute() if archive is not None else None
        self.archive_refused: str | None = None
        """Why there is no archive though one is configured."""
        self._lock: IO[bytes] | None = None
        self._users = 0
        self._unwanted: set[str] = set()
        self._deleting: list[threading.Thread] = []
        self.archiving = asyncio.Lock()
        """For whoever writes to the archive, one at a time."""

    def open(self) -> None:
        """Make the folder and lock it against other processes; each `open` wants a `close`. Raises StoreError."""
        if self._users == 0:
            self._claim()
            self._lock = _locked(self.root / LOCK, self.root)
            if self.archive is not None and self.archive.exists():
                try:
                    self._claim_archive()
                except StoreError as error:
                    self.archive, self.archive_refused = None, str(error)
        self._users += 1

    def _claim(self) -> None:
        """Make the folder, or look whether it is ours. Raises StoreError."""
        try:
            there = {path.name: path for path in self.root.iterdir()} if self.root.exists() else {}
            images = [name for name, path in there.items() if (path / MANIFEST).is_file()]
            if there and LOCK not in there and len(images) < len(there):
                raise NotOwnedError(self.root, "is for others too; name a folder of warmpool's own")
            owned.claim(self.root, (LOCK, *images))
        except OSError as error:
            raise _trouble("checkpoint_dir", self.root, error) from error

    def _ensure(self) -> None:
        """Have the folder there, and ours, again if something removed it while it was open. Raises StoreError."""
        self._claim()
        if self._lock is not None and not (self.root / LOCK).exists():
            log.warning("checkpoint_dir %s was removed while in use; it is made again", self.root)
            self._lock.close()
            self._lock = _locked(self.root / LOCK, self.root)

    def close(self) -> None:
        """Let go; the last one unlocks."""
        if self._users:
            self._users -= 1
            for thread in self._deleting if self._users == 0 else ():
                thread.join()
            if self._users == 0 and self._lock is not None:
                self._lock.close()
                self._lock = None

    def path(self, image: str) -> Path:
        """The folder of a finished image."""
        return self.root / image

    def partial(self, image: str) -> Path:
        """The folder of one being written."""
        return self.root / (image + _PARTIAL)

    def weights(self, image: str) -> Path:
        """The folder for the copy of the weights that goes with an image; it is there.

        It stays when the image goes, for containers have it mounted; its files do not.
        """
        self._ensure()
        path = self.root / (image + _WEIGHTS)
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def _forget_weights(self, image: str) -> None:
        for path in (self.root / (image + _WEIGHTS)).glob("*"):
            _delete(path)

    def weights_bytes(self, image: str) -> int:
        """The size of the copy."""
        return sum(path.stat().st_size for path in (self.root / (image + _WEIGHTS)).glob("*"))

    def sweep(self) -> list[str]:
        """Delete what a crash left half-written; the names of what was deleted."""
        for old in self.root.glob(f"*{_OLD}"):
            # The crash came between the two renames that replace an image: the older one is whole.
            final = self.root / old.name.removesuffix(_OLD)
            if not final.exists():
                owned.rename(old, final)
        left = [*self.root.glob(f"*{_PARTIAL}"), *self.root.glob(f"*{_NEXT}")]
        left += self.root.glob(f"*{_NEXT}{_WEIGHTS}/*")
        if self.archive is not None and self.archive.is_dir():
            left += self.archive.glob(f"*{_PARTIAL}")
        for path in left:
            _delete(path)
        return [path.name for path in left]

    def free_bytes(self) -> int:
        """What may still be written: free space less the reserve."""
        return shutil.disk_usage(self.root).free - self.reserve_bytes

    def begin(self, image: str, expected_bytes: int) -> Path:
        """An empty folder to write an image of about `expected_bytes` to. Raises StoreError when it would not fit.

        Where space is short, quarantined images go first, then those that do not fit this host.
        """
        self._ensure()
        expendable = [self.root / (name + _QUARANTINED) for name in self.quarantined()]
        for path in (*expendable, *(self.path(name) for name in sorted(self._unwanted))):
            if expected_bytes > self.free_bytes():
                _delete(path)
        if expected_bytes > (available := facts.available_bytes()) and facts.huge_pages_of(self.root):  # on tmpfs
            raise StoreError(
                f"checkpoint_dir {self.root}: the image needs about {format_size(expected_bytes)} of host memory, "
                f"{format_size(available)} are available; give warmpool more memory, or end something else"
            )
        free = self.free_bytes()
        if expected_bytes > free:
            raise StoreError(
                f"checkpoint_dir {self.root}: the image needs about {format_size(expected_bytes)}, "
                f"{format_size(max(0, free))} are free beyond the reserve of {format_size(self.reserve_bytes)}"
            )
        path = self.partial(image)
        _delete(path)
        path.mkdir(mode=0o700)
        (path / CRIU_FOLDER).mkdir(mode=0o700)
        return path

    async def commit(self, manifest: Manifest, *, beside: bool = False, leave_out_zeros: bool = True) -> Manifest:
        """Turn the folder of `begin` into the image `manifest.image`, in place of an older one.

        `beside`: into the one next to it, until `promote`.

        The sizes and digests of its files are added to the manifest, which is returned. `leave_out_zeros`: pages of
        zeros are taken out of CRIU's files before; restored memory is the same without them.
        """
        image = next_to(manifest.image) if beside else manifest.image
        partial = self.partial(image)
        lay_out = facts.huge_pages_of(self.root) == "within_size"

        def work(stop: threading.Event) -> tuple[int, dict[str, int], dict[str, int], dict[str, str]]:
            left_out, known = 0, {}
            if leave_out_zeros:
                left_out, written = zero_pages.leave_out_zeros(partial / CRIU_FOLDER, stop)
                known = {f"{CRIU_FOLDER}/{name}": digest for name, digest in written.items()}
            sizes, digests = measure(partial, stop, known, lay_out=lay_out)
            return left_out, holes(partial, sizes), sizes, digests

        left_out, empty, sizes, digests = await in_thread(work)
        found = {"bytes_by_kind": by_kind(sizes), "holes_by_kind": empty, "zero_bytes_left_out": left_out}
        try:
            manifest = manifest.completed(sizes, digests, found, cpu.here())
        except ManifestError as error:
            raise StoreError(f"{partial}: {error}") from None
        write_manifest(partial, manifest)
        _delete(self._put_in_place(image, partial))
        return manifest

    def _put_in_place(self, image: str, source: Path) -> Path:
        """Make a folder the image; where the one that had its place is now, if there was one."""
        final, old = self.path(image), self.root / (image + _OLD)
        if final.exists():
            _delete(old)
            owned.rename(final, old)
        owned.rename(source, final)
        self._unwanted.discard(image)
        return old

    def promote(self, image: str) -> None:
        """Have the image beside it (`next_to`), if there is one, take an image's place; a matter of renames.

        Of the older one only the name has gone afterwards: whoever reads its files may read on for a moment. Raises
        StoreError, with nothing changed.
        """
        beside = next_to(image)
        if not self.path(beside).exists():
            return
        try:
            self.load(beside)
            old = self._put_in_place(image, self.path(beside))
            weights, copies = self.root / (beside + _WEIGHTS), self.root / (image + _WEIGHTS)
            if weights.exists():
                _delete(copies)
                owned.rename(weights, copies)
        except OSError as error:
            raise StoreError(f"{error.filename or self.root}: {error.strerror}") from error
        thread = threading.Thread(target=_delete, args=(old,), name="delete an image")
        thread.start()
        self._deleting = [*(t for t in self._deleting if t.is_alive()), thread]

    def abandon(self, image: str) -> None:
        """Delete the folder of `begin`."""
        _delete(self.partial(image))

    def manifest(self, image: str) -> Manifest:
        """The manifest of an image, whatever became of its files. Raises StoreError."""
        path = self.path(image)
        manifest = read_manifest(path)
        if manifest.image != image.removesuffix(_NEXT):
            raise DamagedError(f"{path}: its manifest is that of {manifest.image!r}")
        return manifest

    def load(self, image: str) -> Manifest:
        """The manifest of an image whose files are all there in full. Raises StoreError otherwise."""
        path, manifest = self.path(image), self.manifest(image)
        for name, size in manifest.bytes_by_file.items():
            try:
                actual = (path / name).lstat()
            except FileNotFoundError as error:
                raise DamagedError(f"{path / name}: {error.strerror}") from error
            except OSError as error:
                raise StoreError(f"{path / name}: {error.strerror}") from error
            if not stat.S_ISREG(actual.st_mode):
                raise DamagedError(f"{path / name}: not a plain file")
            if actual.st_size != size:
                raise DamagedError(f"{path / name}: {actual.st_size} bytes, the manifest says {size}")
        return manifest

    async def verify(self, image: str) -> Manifest:
        """`load`, and the digest of every file. Raises StoreError naming the first file that differs."""
        manifest = self.load(image)
        await in_thread(lambda stop: check_digests(self.path(image), manifest, stop))
        return manifest

    def refuse(self, image: str) -> None:
        """Note that an image does not fit this host or its configuration: it stays until its space is needed."""
        self._unwanted.add(image)

    def accept(self, image: str) -> None:
        """Note that an image that was refused fits again."""
        self._unwanted.discard(image)

    def refuses(self, image: str) -> bool:
        """Whether that was noted."""
        return image in self._unwanted

    def names(self) -> list[str]:
        """The images there are."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if "." not in p.name and (p / MANIFEST).is_file())

    def quarantined(self) -> list[str]:
        """The images that were set aside."""
        if not self.root.is_dir():
            return []
        return sorted(p.name.removesuffix(_QUARANTINED) for p in self.root.glob(f"*{_QUARANTINED}"))

    def quarantine(self, image: str) -> None:
        """Set an image aside, in place of one that was set aside before."""
        self._forget_weights(image)
        path = self.root / (image + _QUARANTINED)
        if self.path(image).exists():
            _delete(path)
            owned.rename(self.path(image), path)

    async def remove(self, image: str) -> None:
        """Delete an image, finished, partial or quarantined, if there is one."""
        await asyncio.to_thread(self._forget_weights, image)
        for path in (self.path(image), self.partial(image), self.root / (image + _QUARANTINED)):
            if path.exists():
                await asyncio.to_thread(_delete, path)

    # --- archives ---

    def archive_path(self, image: str) -> Path:
        """Where the archive of an image is or would be. Raises StoreError without an `archive_dir`."""
        if self.archive is None:
            raise StoreError("there is no archive: set pool.archive_dir to a folder on disk")
        return self.archive / (image + SUFFIX["zstd"])

    def archived(self) -> list[str]:
        """The images that have an archive."""
        if self.archive is None or not self.archive.is_dir():
            return []
        return sorted(p.name.removesuffix(SUFFIX["zstd"]) for p in self.archive.glob(f"*{SUFFIX['zstd']}"))

    async def remove_archive(self, image: str) -> None:
        """Delete the archive of an image, if there is one. Raises StoreError."""
        if image in self.archived():
            self._claim_archive()
            await asyncio.to_thread(_delete, self.archive_path(image))

    async def archived_manifest(self, image: str) -> Manifest:
        """The manifest of an archived image. Raises StoreError when there is none that can be read."""
        path = self.archive_path(image)
        try:
            manifest = await asyncio.to_thread(archive.peek, path)
        except DAMAGE as error:
            raise unusable(path, error) from error
        if manifest.image != image:
            raise StoreError(f"{path}: holds the image {manifest.image!r}")
        return manifest

    async def put_into_archive(self, image: str) -> Path:
        """Write an image to `archive_dir`; it stays where it is. Raises StoreError."""
        path = self.archive_path(image)
        self._claim_archive()
        await self.export(image, path, "zstd")
        return path

    def _claim_archive(self) -> None:
        """Make `archive_dir`, or look whether it is ours. Raises StoreError."""
        assert self.archive is not None  # noqa: S101 - archive_path saw to it
        try:
            archives = [path.name for path in self.archive.glob(f"*{SUFFIX['zstd']}")]
            owned.claim(self.archive, archives)
        except OSError as error:
            raise _trouble("archive_dir", self.archive, error) from error

    async def take_from_archive(self, image: str) -> Manifest:
        """Bring an archived image back; the archive stays. Raises StoreError."""
        return await self.import_(self.archive_path(image), image)

    async def export(self, image: str, target: Path, compression: Compression) -> None:
        """Write an image to one file, beside and renamed. Raises StoreError."""
        manifest = self.load(image)
        source = self.path(image)

        try:
            await in_thread(lambda stop: archive.pack(source, manifest, target, compression, stop))
        except OSError as error:
            raise StoreError(f"{error.filename or target}: {error.strerror or error}") from error

    async def import_(self, source: Path, image: str | None = None) -> Manifest:
        """Make an image of an exported file, digests checked, under its own name or the given one.

        Raises StoreError when the file is not one, is damaged, or does not fit.
        """
        try:
            manifest = await asyncio.to_thread(archive.peek, source)
            if image is not None and manifest.image != image:
                raise StoreError(f"{source}: holds the image {manifest.image!r}, not {image!r}")
            if "." in manifest.image:
                raise StoreError(f"{source}: {manifest.image!r} is not the name of an image")
            partial = self.begin(manifest.image, manifest.total_bytes())
            try:
                await in_thread(lambda stop: archive.unpack(source, partial, manifest, stop, self.free_bytes))
                _delete(self._put_in_place(manifest.image, partial))
            finally:
                self.abandon(manifest.image)
        except DAMAGE as error:
            raise unusable(source, error) from error
        return manifest


def _trouble(setting: str, folder: Path, error: OSError) -> StoreError:
    where = f"{error.filename}: " if error.filename not in (None, str(folder)) else ""
    return StoreError(f"{setting} {folder}: {where}{error.strerror}")


def _locked(path: Path, folder: Path) -> IO[bytes]:
    file = None
    try:
        file = os.fdopen(owned.open_file(path, os.O_RDWR | os.O_CREAT), "rb")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if file is not None:
            file.close()
        if isinstance(error, BlockingIOError):
            reason = "another warmpool uses it; stop that, or set another one"
            raise StoreError(f"checkpoint_dir {folder}: {reason}") from None
        raise _trouble("checkpoint_dir", folder, error) from error
    return file


def _delete(path: Path) -> None:
    """Delete what is there, as far as it can be. Raises NotOwnedError for what is not ours."""
    try:
        owned.delete_tree(path)
    except NotOwnedError:
        raise
    except OSError as error:
        log.warning("%s cannot be deleted: %s", error.filename or path, error.strerror)
