"""systemd's units for warmpool: written from the configuration, replaced on upgrade, taken away again.

A file is ours as long as it is what we wrote: a record beside the configuration holds the digest of each. One that
somebody changed is never overwritten nor deleted; then nothing at all is done, and the difference belongs into a
drop-in (`systemctl edit`).
"""

from __future__ import annotations

import enum
import hashlib
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from proxy.errors import HostError
from proxy.host import owned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from proxy.config.settings import Settings

UNITS: Final = Path("/etc/systemd/system")
CONFIG: Final = Path("/etc/warmpool/warmpool.toml")
RECORD: Final = Path("/etc/warmpool/.installed.json")
STATE: Final = Path("/var/lib/warmpool")

# What stands for these in the files of systemd/, which are a working set as they are.
_PROGRAM: Final = "/opt/warmpool/current/bin/warmpool"
_STORE: Final = "/mnt/checkpoint-ram"
_ADDRESS: Final = "127.0.0.1:8080"
_SIZE: Final = "size=50%"
_MOUNT: Final = "checkpoints.mount"
_TEMPLATES: Final = (
    "warmpool.service", "warmpool.socket", "warmpool-doctor.service",
    "podman.socket.d/warmpool.conf", "podman.service.d/warmpool.conf",
)  # fmt: skip
_CONTAINERS_ONLY: Final = "warmpool.service.d/containers.conf"
_ON_TMPFS_ALREADY: Final = (Path("/dev/shm"), Path("/run"))  # noqa: S108 - compared with, never written to
_TMPFS_UNITS: Final = {"KiB": "k", "MiB": "m", "GiB": "g"}


class Change(enum.Enum):
    """What becomes of a file."""

    CREATE = "create"
    REPLACE = "replace"
    REMOVE = "remove"
    NOTHING = "unchanged"
    REFUSE = "changed by somebody"


@dataclass(frozen=True, slots=True)
class Step:
    """One file, and what is to be done with it."""

    change: Change
    path: Path
    content: bytes = b""


def units(settings: Settings, program: Path, config: Path = CONFIG) -> dict[Path, bytes]:
    """The files for a configuration, by path. Raises HostError when it is not one for a service."""
    pool, server = settings.pool, settings.server
    if not pool.checkpoint_dir.is_absolute():
        raise HostError(f"pool.checkpoint_dir is {pool.checkpoint_dir}: a service needs an absolute path")
    if server.port == 0:
        raise HostError("server.port is 0: a service needs a port of its own")
    host = f"[{server.host}]" if ":" in server.host else server.host
    replaced = {
        _PROGRAM: str(program),
        str(CONFIG): str(config),
        _STORE: str(pool.checkpoint_dir),
        _ADDRESS: f"{'127.0.0.1' if host == 'localhost' else host}:{server.port}",
        _SIZE: f"size={_tmpfs_size(pool.checkpoint_size)}",
    }
    names = [*_TEMPLATES, *([_CONTAINERS_ONLY] if all(m.podman is not None for m in settings.models.values()) else [])]
    wanted = {name: _filled(name, replaced) for name in names}
    if pool.checkpoint_size != "0" and not any(pool.checkpoint_dir.is_relative_to(p) for p in _ON_TMPFS_ALREADY):
        wanted[mount_unit(pool.checkpoint_dir)] = _filled(_MOUNT, replaced)
    return {UNITS / name: text.encode() for name, text in wanted.items()}


def _filled(name: str, replaced: Mapping[str, str]) -> str:
    packaged = Path(__file__).with_name("units")
    folder = packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "systemd"
    text = (folder / name).read_text()
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text


def _tmpfs_size(text: str) -> str:
    """tmpfs takes a percentage of the memory, or k, m and g."""
    for suffix, letter in _TMPFS_UNITS.items():
        text = text.replace(suffix, letter)
    return text


def mount_unit(where: Path) -> str:
    """The name that the mount unit of a folder must have (systemd.unit(5), "string escaping")."""
    plain = string.ascii_letters + string.digits + ":_."
    parts = []
    for part in where.parts[1:]:
        escaped = "".join(c if c in plain else "".join(f"\\x{b:02x}" for b in c.encode()) for c in part)
        parts.append(escaped)
    name = "-".join(parts)
    return ("\\x2e" + name[1:] if name.startswith(".") else name) + ".mount"


class Installation:
    """The files that were installed below a root, `/` or a folder that stands for it."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._digests = self._read_record()

    def _read_record(self) -> dict[str, str]:
        try:
            record = orjson.loads(self._at(RECORD).read_bytes())
            return {str(path): str(digest) for path, digest in record.items()}
        except FileNotFoundError:
            return {}
        except (OSError, orjson.JSONDecodeError, AttributeError) as error:
            raise HostError(f"{self._at(RECORD)}: {error}; remove it if you know what is installed") from error

    def _at(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def steps(self, wanted: Mapping[Path, bytes]) -> list[Step]:
        """What it takes to have exactly these files; what was installed before and is not among them goes."""
        return [*self._to_write(wanted), *self._to_remove(Path(p) for p in self._digests if Path(p) not in wanted)]

    def _to_write(self, wanted: Mapping[Path, bytes]) -> Iterator[Step]:
        for path, content in wanted.items():
            there = self._content(path)
            if there is None:
                yield Step(Change.CREATE, path, content)
            elif there == content:
                yield Step(Change.NOTHING, path, content)
            else:
                yield Step(Change.REPLACE if self._is_ours(path, there) else Change.REFUSE, path, content)

    def _to_remove(self, paths: Iterable[Path]) -> Iterator[Step]:
        for path in paths:
            there = self._content(path)
            if there is not None:
                yield Step(Change.REMOVE if self._is_ours(path, there) else Change.REFUSE, path)

    def _content(self, path: Path) -> bytes | None:
        try:
            return self._at(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostError(f"{self._at(path)}: {error.strerror}") from error

    def _is_ours(self, path: Path, content: bytes) -> bool:
        return self._digests.get(str(path)) == _digest(content)

    def carry_out(self, steps: Iterable[Step]) -> None:
        """Do it, each file beside and renamed, the record last. Raises HostError."""
        digests = {}
        try:
            for step in steps:
                target = self._at(step.path)
                if step.change in (Change.CREATE, Change.REPLACE):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _write(target, step.content, 0o644)
                elif step.change is Change.REMOVE:
                    target.unlink()
                    if target.parent.name.endswith(".d") and not any(target.parent.iterdir()):
                        target.parent.rmdir()
                if step.change is not Change.REMOVE:
                    digests[str(step.path)] = _digest(step.content)
            if digests:
                self._at(RECORD).parent.mkdir(parents=True, exist_ok=True)
                _write(self._at(RECORD), orjson.dumps(digests, option=orjson.OPT_INDENT_2), 0o600)
            else:
                self._at(RECORD).unlink(missing_ok=True)
        except OSError as error:
            raise HostError(f"{error.filename}: {error.strerror}") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes, mode: int) -> None:
    with owned.replacing(path, mode) as file:
        file.write(content)
