"""An image as one file: packed to it, and unpacked from it, every digest checked on the way."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import tarfile
import zlib
from typing import IO, TYPE_CHECKING, Final, Literal, cast

import zstandard

from proxy.checkpoint import manifest as manifests
from proxy.checkpoint.errors import DamagedError, StoreError
from proxy.checkpoint.files import CHUNK_BYTES, LARGE_BYTES, MANIFEST, Stoppable, differs, parsed, write_manifest
from proxy.host import owned

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from proxy.checkpoint.manifest import Manifest

Compression = Literal["none", "gzip", "zstd"]
SUFFIX: Final[Mapping[Compression, str]] = {"none": ".tar", "gzip": ".tar.gz", "zstd": ".tar.zst"}

_HEADERS_BYTES: Final = 16 << 10
"""Of a file in a tar archive, and its padding; and as much as tarfile reads ahead."""
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"

DAMAGE: Final = (OSError, EOFError, tarfile.TarError, zstandard.ZstdError, zlib.error)
"""What reading a file that is cut off, not an archive or damaged raises."""


def unusable(source: Path, error: Exception) -> StoreError:
    """What could not be read: damaged, unless the kernel says that it could not be opened, read or written now."""
    kind = StoreError if isinstance(error, OSError) and error.errno not in (None, errno.EFBIG) else DamagedError
    return kind(f"{source}: not a usable export: {error}")


class _Hashing:
    """A file whose digest is taken as it is read."""

    def __init__(self, file: Stoppable) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def digest(self) -> str:
        return self._digest.hexdigest()


class _Limited:
    """A file of which no more than so many bytes are read: what is compressed may turn out to be any size."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self._left = most

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.EFBIG, "it is larger than its manifest says")
        return data


def pack(source: Path, manifest: Manifest, target: Path, compression: Compression, stop: threading.Event) -> None:
    """Write the files of an image to one file, beside and renamed. Raises OSError, DamagedError."""
    with (
        owned.replacing(target.absolute()) as file,
        _compressing(file, compression) as out,
        tarfile.open(fileobj=out, mode="w|") as tar,
    ):
        for name in (MANIFEST, *manifest.bytes_by_file):
            info = tar.gettarinfo(source / name, name)
            with (source / name).open("rb") as content:
                read = _Hashing(Stoppable(content, stop))
                tar.addfile(info, cast("IO[bytes]", read))
            if manifest.sha256_by_file.get(name, read.digest()) != read.digest():
                raise DamagedError(differs(source / name))


@contextlib.contextmanager
def _compressing(raw: IO[bytes], compression: Compression) -> Iterator[IO[bytes]]:
    match compression:
        case "none":
            yield raw
        case "gzip":
            with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) as out:
                yield cast("IO[bytes]", out)
        case "zstd":
            with zstandard.ZstdCompressor(level=3, threads=-1).stream_writer(raw, closefd=False) as out:
                yield out


@contextlib.contextmanager
def _decompressing(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        if magic.startswith(_GZIP_MAGIC):
            with gzip.GzipFile(fileobj=raw, mode="rb") as file:
                yield cast("IO[bytes]", file)
        elif magic == _ZSTD_MAGIC:
            with zstandard.ZstdDecompressor().stream_reader(raw, closefd=False) as file:
                yield file
        else:
            yield raw


def _tar_of(file: IO[bytes], most_bytes: int) -> tarfile.TarFile:
    return tarfile.open(fileobj=cast("IO[bytes]", _Limited(file, most_bytes)), mode="r|")


def peek(source: Path) -> Manifest:
    """The manifest at the head of an exported file."""
    most = manifests.LIMIT_BYTES + _HEADERS_BYTES
    with (
        _decompressing(source) as file,
        _tar_of(file, most) as tar,
    ):
        member = tar.next()
        content = tar.extractfile(member) if member is not None and member.name == MANIFEST else None
        if content is None:
            raise DamagedError(f"{source}: not an export of warmpool's: no {MANIFEST} at its head")
        return parsed(content.read(manifests.LIMIT_BYTES), str(source))


def unpack(
    source: Path, target: Path, manifest: Manifest, stop: threading.Event, free_bytes: Callable[[], int]
) -> None:
    """Extract the files that the manifest names, and nothing else, and check their sizes and digests on the way."""
    missing = dict(manifest.sha256_by_file)
    most = manifest.total_bytes() + manifests.LIMIT_BYTES + _HEADERS_BYTES * (len(missing) + 2)
    with (
        _decompressing(source) as file,
        _tar_of(file, most) as tar,
    ):
        for member in tar:
            expected = missing.pop(member.name, None)
            content = tar.extractfile(member) if expected is not None and member.isreg() else None
            if content is None:
                if member.name == MANIFEST:
                    continue
                raise DamagedError(f"{source}: {member.name!r} is not in the manifest")
            declared = manifest.bytes_by_file[member.name]
            if member.size != declared:
                raise DamagedError(f"{source}: {member.name} has {member.size} bytes, the manifest says {declared}")
            path = target / member.name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                if member.size >= LARGE_BYTES:
                    os.posix_fallocate(out.fileno(), 0, member.size)  # see measure
                digest = _copied(Stoppable(content, stop), out, free_bytes, str(source))
            if digest != expected:
                raise DamagedError(f"{source}: {member.name} is damaged (SHA-256 differs)")
    if missing:
        raise DamagedError(f"{source}: {next(iter(missing))} is missing")
    write_manifest(target, manifest)


def _copied(content: Stoppable, out: IO[bytes], free_bytes: Callable[[], int], source: str) -> str:
    """The digest of what was copied, as long as there is space: others may have taken it meanwhile."""
    digest = hashlib.sha256()
    while chunk := content.read(CHUNK_BYTES):
        if free_bytes() < 0:
            raise StoreError(f"{source}: there is no space left beyond the reserve; the import was given up")
        digest.update(chunk)
        out.write(chunk)
    return digest.hexdigest()
