"""Folders that warmpool owns, and the only way to delete, rename or replace anything.

A folder is owned once `claim` has made it or looked at it by its descriptor: it belongs to the user that runs warmpool,
nobody else can enter it, and nobody else can put another one in its place. The last is a matter of every folder above:
each belongs to root or to that user, and others may write to none of them, unless its sticky bit keeps them from
renaming what is not theirs, as in /dev/shm. `register` adds a folder that another program made for warmpool, as podman
does for a container.

Whatever destroys something takes an absolute path below such a folder. It goes there by descriptors and follows no
symbolic link, so that neither a wrong path nor a link that somebody planted leads out of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_FOR_ALL: Final = (Path("/dev/shm"), Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - never written to
_MOST_LINKS: Final = 40
"""As the kernel (path_resolution(7))."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_roots: set[Path] = set()


class NotOwnedError(PermissionError):
    """A folder that is not warmpool's alone, or a path outside of all that are; `strerror` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EPERM, reason, str(path))


# --- which folders ---


def claim(folder: Path, marks: Collection[str] = ()) -> None:
    """Make a folder of warmpool's own, mode 0700, or take one that is there. Raises NotOwnedError, OSError.

    One that others may enter is tightened if it is empty or has one of `marks` in it, the names by which warmpool knows
    a folder of its own; else somebody may have named /etc.
    """
    with _opened(folder, make=True) as descriptor:
        facts = os.fstat(descriptor)
        if facts.st_uid != os.geteuid():
            raise NotOwnedError(
                folder,
                f"belongs to user {facts.st_uid}, and warmpool runs as user {os.geteuid()}; "
                "remove it, change its owner, or name another folder",
            )
        if stat.S_IMODE(facts.st_mode) & 0o077 or facts.st_mode & stat.S_ISVTX:
            _tighten(folder, descriptor, facts, marks)
        _refuse_what_others_put_there(folder, descriptor)
    _roots.add(folder)


def _tighten(folder: Path, descriptor: int, facts: os.stat_result, marks: Collection[str]) -> None:
    # A tmpfs of its own is mounted with the sticky bit and for all, unless told otherwise.
    if facts.st_mode & stat.S_ISVTX and (folder in _FOR_ALL or not folder.is_mount()):
        raise NotOwnedError(folder, "is for others too; name a folder of warmpool's own")
    there = os.listdir(descriptor)
    if there and not set(there) & set(marks):
        raise NotOwnedError(
            folder,
            f"is for others too (mode {stat.S_IMODE(facts.st_mode):04o}), and what is in it is not warmpool's; "
            f"name a folder of warmpool's own, or chmod 700 {folder}",
        )
    os.fchmod(descriptor, 0o700)


def _refuse_what_others_put_there(folder: Path, descriptor: int) -> None:
    """Nobody else can add to it any more; what was added while others could is not to be used."""
    for name in os.listdir(descriptor):
        with contextlib.suppress(FileNotFoundError):
            owner = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_uid
            if owner != os.geteuid():
                raise NotOwnedError(folder / name, f"belongs to user {owner}, who could write to {folder}; remove it")


def register(folder: Path) -> None:
    """Take a folder that another program has made for warmpool, with its mode. Raises NotOwnedError, OSError."""
    with _opened(folder):
        _roots.add(folder)


def release(folder: Path) -> None:
    """Forget a folder: nothing in it can be deleted any more."""
    _roots.discard(folder)


# --- what destroys ---


def unlink(path: Path) -> None:
    """Delete a file or a link, if it is there. Raises NotOwnedError, OSError."""
    with _parent(path) as descriptor, contextlib.suppress(FileNotFoundError):
        os.unlink(path.name, dir_fd=descriptor)


def delete_tree(path: Path) -> None:
    """Delete what is there: a folder with all that is in it, a file or a link. Raises NotOwnedError, OSError."""
    with _parent(path) as descriptor:
        _delete(path.name, descriptor)


def delete_root(folder: Path) -> None:
    """Delete an owned folder itself, as far as it can be, and forget it. Raises NotOwnedError."""
    if folder not in _roots:
        raise NotOwnedError(folder, "is not a folder of warmpool's own: left alone")
    with contextlib.suppress(OSError):
        empty(folder)
        folder.rmdir()
    release(folder)


def clear_socket(path: Path, *, even_if_heard: bool = False) -> None:
    """Delete the unix socket of a server that is gone, in any folder, if it is there.

    Raises OSError where one still listens, another file is there, or others could put one there in its place.
    """
    with _opened(path.parent) as folder:
        _refuse_if_others_may_rename(path, folder)
        try:
            facts = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(facts.st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket", str(path))
        if not even_if_heard:
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe,
                contextlib.suppress(ConnectionRefusedError),
            ):
                probe.connect(str(path))
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), str(path))
        os.unlink(path.name, dir_fd=folder)


def empty(folder: Path) -> None:
    """Delete all that is in a folder, which may be an owned one itself. Raises NotOwnedError, OSError."""
    with _opened(folder) if folder in _roots else _below(folder) as descriptor:
        for name in os.listdir(descriptor):  # noqa: PTH208 - by descriptor
            _delete(name, descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, over a file that is there. Raises NotOwnedError, OSError."""
    with _parent(source) as old, _parent(target) as new:
        os.rename(source.name, target.name, src_dir_fd=old, dst_dir_fd=new)


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """A descriptor of a plain file of ours below an owned folder. Raises NotOwnedError, OSError."""
    with _parent(path) as folder:
        descriptor = os.open(path.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode, dir_fd=folder)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        os.close(descriptor)
        raise NotOwnedError(path, "is not a plain file of the user that runs warmpool")
    return descriptor


def unlink_beside(folder: Path, name: str, owner: int) -> None:
    """Delete a plain file of user `owner` by its name in any folder, if it is that. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        facts = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_ISREG(facts.st_mode) and facts.st_uid == owner:
            os.unlink(name, dir_fd=descriptor)
    except FileNotFoundError:
        return
    finally:
        os.close(descriptor)


def open_plain(path: Path, *, follow: bool = False) -> IO[bytes]:
    """A plain file to read: no pipe is waited for, and no link is followed but with `follow`. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "is not a plain file", str(path))
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, most_bytes: int) -> bytes:
    """What is in a plain file, up to so much of it; no link is followed. Raises OSError."""
    with open_plain(path) as file:
        return file.read(most_bytes)


@contextlib.contextmanager
def replacing(target: Path, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `target` when the block has ended without an error, synced. Raises OSError.

    For a file that warmpool or its user named, in any folder: what is there is replaced whole, never written to, and
    a link is replaced, not followed.
    """
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()  # it was made here a moment ago, by O_EXCL
        raise


def _delete(name: str, folder: int) -> None:
    while True:
        try:
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            # It is gone, or somebody deletes in it as well.
            if not _exists(name, folder):
                return
        else:
            return


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


# --- the way there ---


@contextlib.contextmanager
def _parent(path: Path) -> Iterator[int]:
    """A descriptor of the folder that a path below an owned folder is in."""
    if path.parent in _roots and ".." not in path.parts:
        with _opened(path.parent) as descriptor:
            yield descriptor
    else:
        with _below(path.parent) as descriptor:
            yield descriptor


@contextlib.contextmanager
def _below(folder: Path) -> Iterator[int]:
    """A descriptor of a folder below an owned one, reached without a link."""
    root = next((p for p in folder.parents if p in _roots), None)
    if not folder.is_absolute() or ".." in folder.parts or root is None:
        raise NotOwnedError(folder, "is not below a folder of warmpool's own: left alone")
    with _opened(root) as descriptor, contextlib.ExitStack() as stack:
        below = descriptor
        for name in folder.relative_to(root).parts:
            below = os.open(name, _FOLDER, dir_fd=below)
            stack.callback(os.close, below)
        yield below


@contextlib.contextmanager
def _opened(folder: Path, *, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder that nobody else can put another one in the place of."""
    if not folder.is_absolute() or ".." in folder.parts or len(folder.parts) < 2:
        raise NotOwnedError(folder, "is not an absolute path of a folder, without `..`")
    descriptor = os.open("/", _FOLDER)
    try:
        left, links = [*reversed(folder.parts[1:])], 0
        while left:
            _refuse_if_others_may_rename(folder, descriptor)
            name = left.pop()
            try:
                below = os.open(name, _FOLDER, dir_fd=descriptor)
            except FileNotFoundError:
                if not make:
                    raise
                os.mkdir(name, 0o700, dir_fd=descriptor)
                left.append(name)
                continue
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                target = _link(folder, name, descriptor)
                links += 1
                if links > _MOST_LINKS:
                    raise
                left += [p for p in reversed(target.parts) if p != "/"]
                if not target.is_absolute():
                    continue
                below = os.open("/", _FOLDER)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def _link(folder: Path, name: str, descriptor: int) -> Path:
    """Where a link on the way leads; only root's and our own are followed."""
    facts = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    if not stat.S_ISLNK(facts.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if facts.st_uid not in (0, os.geteuid()):
        raise NotOwnedError(folder, f"{name} on the way to it is a link of user {facts.st_uid}")
    return Path(os.readlink(name, dir_fd=descriptor))


def _refuse_if_others_may_rename(folder: Path, descriptor: int) -> None:
    facts = os.fstat(descriptor)
    above = Path(f"/proc/self/fd/{descriptor}").readlink()
    if facts.st_uid not in (0, os.geteuid()):
        raise NotOwnedError(
            folder, f"{above} above it belongs to user {facts.st_uid}, who could replace it; name another folder"
        )
    # A group with the number of its only user is that user.
    for_group = facts.st_mode & stat.S_IWGRP and facts.st_gid not in (0, os.geteuid())
    if (for_group or facts.st_mode & stat.S_IWOTH) and not facts.st_mode & stat.S_ISVTX:
        raise NotOwnedError(
            folder, f"others may write to {above} above it, and so replace it; chmod go-w it, or name another folder"
        )
