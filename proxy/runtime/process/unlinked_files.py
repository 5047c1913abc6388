"""The links that CRIU makes for files whose name is gone, kept with the image.

With ``--link-remap`` CRIU gives a file that was opened by a name that it lost, such as the semaphores of Python's
multiprocessing, a new one beside it (``/dev/shm/link_remap.403``), and a restore uses that up. In a container podman's
image has it each time; on the host it would be there for one restore only, and gone after a reboot. Other names of the
same file, by which further processes find it, are kept too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from proxy.checkpoint import criu_images
from proxy.checkpoint.criu_images import UnknownFormatError, fields
from proxy.checkpoint.errors import DamagedError
from proxy.host import owned

if TYPE_CHECKING:
    from collections.abc import Iterable

FOLDER: Final = "links"
_INDEX: Final = "index.json"
_NAME: Final = re.compile(r"link_remap\.\d+")
_LIMIT_BYTES: Final = 1 << 20

_Id = Annotated[int, Field(ge=0, lt=1 << 32)]


class _Link(BaseModel):
    """One of the files. Nothing but plain permissions: what is made here belongs to whom the image says."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: Annotated[str, Field(pattern=r"^(/[^/\x00]+)*/link_remap\.\d+$", max_length=4096)]
    mode: Annotated[int, Field(ge=0, le=0o777)]
    uid: _Id
    gid: _Id
    names: Annotated[list[Annotated[str, Field(pattern=r"^[^/\x00]+$", max_length=255)]], Field(max_length=1000)]


_Index = TypeAdapter(Annotated[list[_Link], Field(max_length=10_000)])


def take(images: Path, image: Path) -> None:
    """Move what a dump left on the host into the folder of its image. Raises OSError."""
    target = image / FOLDER
    index: list[_Link] = []
    for path in _named_in(images / "files.img"):
        if not stat.S_ISREG((found := path.lstat()).st_mode):
            continue
        target.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(path, target / str(len(index)))
        others = [p for p in path.parent.iterdir() if p != path and _same(p, found)] if found.st_nlink > 1 else []
        index.append(
            _Link(
                path=str(path), mode=found.st_mode & 0o777, uid=found.st_uid, gid=found.st_gid,
                names=[p.name for p in others],
            )
        )  # fmt: skip
        owned.unlink_beside(path.parent, path.name, found.st_uid)
    if index:
        (target / _INDEX).write_bytes(_Index.dump_json(index))


def put_back(image: Path) -> list[Path]:
    """Have everything there for a restore, which uses it up; what was made. Raises OSError, DamagedError."""
    source = image / FOLDER
    made = []
    for number, link in enumerate(_index_of(image)):
        path = Path(link.path)
        owned.unlink_beside(path.parent, path.name, link.uid)  # of a restore that failed halfway
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as out, (source / str(number)).open("rb") as kept:
            os.fchown(descriptor, link.uid, link.gid)
            os.fchmod(descriptor, link.mode)
            shutil.copyfileobj(kept, out)
        made.append(path)
        for name in link.names:
            # What is there is as the last restore left it.
            _remove_name(path.parent, name, link)
            path.with_name(name).hardlink_to(path)
    return made


def use_up(made: Iterable[Path]) -> None:
    """Remove what `put_back` made for a restore that failed. Raises OSError."""
    for path in made:
        with contextlib.suppress(FileNotFoundError):
            owned.unlink_beside(path.parent, path.name, path.lstat().st_uid)


def forget(image: Path) -> None:
    """Remove the other names: nothing of the image runs any more, and nothing will. Raises OSError, DamagedError."""
    for link in _index_of(image):
        for name in link.names:
            _remove_name(Path(link.path).parent, name, link)


def _remove_name(folder: Path, name: str, link: _Link) -> None:
    """Remove a name in a folder that is for all, such as /dev/shm; elsewhere it may be anybody's file by now."""
    if folder.stat().st_mode & stat.S_ISVTX:
        owned.unlink_beside(folder, name, link.uid)


def _index_of(image: Path) -> list[_Link]:
    index = image / FOLDER / _INDEX
    if not index.exists():
        return []
    try:
        with index.open("rb") as file:
            return _Index.validate_json(file.read(_LIMIT_BYTES))
    except ValidationError as error:
        raise DamagedError(f"{index}: not an index of links: {error.errors()[0]['msg']}") from None


def _same(path: Path, as_what: os.stat_result) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (as_what.st_dev, as_what.st_ino)


def _named_in(table: Path) -> list[Path]:
    """The links that an image's table of open files names (images/fdinfo.proto, regfile.proto)."""
    found: dict[Path, None] = {}
    try:
        for message in criu_images.read(table, criu_images.FILES_MAGIC):
            for number, value in fields(message):
                if number != 3 or not isinstance(value, bytes):
                    continue  # not a file
                name = dict(fields(value)).get(6)
                if isinstance(name, bytes) and _NAME.fullmatch((path := Path("/", os.fsdecode(name))).name):
                    found[path] = None
    except UnknownFormatError:
        return []
    return [path for path in found if path.exists()]
