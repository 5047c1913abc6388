"""The links that CRIU makes for files whose name is gone, kept with the image.

With ``--link-remap`` CRIU gives a file that was opened by a name that it lost, such as the semaphores of Python's
multiprocessing, a new one beside it (``/dev/shm/link_remap.403``), and a restore uses that up. In a container podman's
image has it each time; on the host it would be there for one restore only, and gone after a reboot. Other names of the
same file, by which further processes find it, are kept too.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any, Final

import orjson

from proxy import criu_images
from proxy.criu_images import UnknownFormatError, fields

FOLDER: Final = "links"
_INDEX: Final = "index.json"
_NAME: Final = re.compile(r"link_remap\.\d+")


def take(images: Path, image: Path) -> None:
    """Move what a dump left on the host into the folder of its image. Raises OSError."""
    target = image / FOLDER
    index: list[dict[str, str | int | list[str]]] = []
    for path in _named_in(images / "files.img"):
        if not stat.S_ISREG((found := path.lstat()).st_mode):
            continue
        target.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(path, target / str(len(index)))
        others = [p for p in path.parent.iterdir() if p != path and _same(p, found)] if found.st_nlink > 1 else []
        index.append({
            "path": str(path), "mode": stat.S_IMODE(found.st_mode), "uid": found.st_uid, "gid": found.st_gid,
            "names": [p.name for p in others],
        })  # fmt: skip
        path.unlink()
    if index:
        (target / _INDEX).write_bytes(orjson.dumps(index))


def put_back(image: Path) -> list[Path]:
    """Have everything there for a restore, which uses it up; what was made. Raises OSError."""
    source = image / FOLDER
    made = []
    for number, (path, names, entry) in enumerate(_index_of(image)):
        path.unlink(missing_ok=True)  # of a restore that failed halfway
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as out, (source / str(number)).open("rb") as kept:
            os.fchown(descriptor, entry["uid"], entry["gid"])
            os.fchmod(descriptor, entry["mode"])
            shutil.copyfileobj(kept, out)
        made.append(path)
        for name in names:
            # What is there is as the last restore left it.
            name.unlink(missing_ok=True)
            name.hardlink_to(path)
    return made


def forget(image: Path) -> None:
    """Remove the other names: nothing of the image runs any more, and nothing will. Raises OSError."""
    for _, names, _ in _index_of(image):
        for name in names:
            name.unlink(missing_ok=True)


def _index_of(image: Path) -> list[tuple[Path, list[Path], dict[str, Any]]]:
    """Path, other paths and the rest of each entry."""
    index = image / FOLDER / _INDEX
    if not index.exists():
        return []
    found = []
    for entry in orjson.loads(index.read_bytes()):
        path = Path(entry["path"])
        if not path.is_absolute() or not _NAME.fullmatch(path.name) or any("/" in name for name in entry["names"]):
            raise OSError(f"{index}: {path} is no link of CRIU's")
        found.append((path, [path.with_name(name) for name in entry["names"]], entry))
    return found


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
