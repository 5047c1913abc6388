"""The memory that cgroups leave, this process's or others, versions 1 and 2 of the kernel's interface."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from proxy.host import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT: Final = Path("/")
_NO_LIMIT: Final = 1 << 60
"""Version 1 says "no limit" with a number near 2**63."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One cgroup with a limit, in bytes."""

    limit_bytes: int
    available_bytes: int
    """What may still be taken; file pages that nobody writes count, since the kernel lets go of them first."""


@dataclass(frozen=True, slots=True)
class _Names:
    limit: str
    usage: str
    files: tuple[str, str]


_V1: Final = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2: Final = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def memory_limits(root: Path = _ROOT, *, of: str | None = None) -> list[Limit]:
    """Of this process's own memory cgroup and those above it, as far as they have a limit. `root`: for tests.

    `of`: instead of the own one, that of this path below the top.
    """
    return [limit for folder, names in _known_folders(root, of) if (limit := _limit(folder, names)) is not None]


@cache
def _known_folders(root: Path, of: str | None) -> tuple[tuple[Path, _Names], ...]:
    return tuple(_folders(root, of))


def _folders(root: Path, of: str | None) -> Iterator[tuple[Path, _Names]]:
    """From the cgroup up to the mount, of each hierarchy that accounts for memory."""
    try:
        own = (root / "proc/self/cgroup").read_text().splitlines()
        mounted = [*mounts.parse((root / "proc/self/mountinfo").read_text())]
    except OSError:
        return
    for line in own:
        _, controllers, path = line.split(":", 2)
        v1 = "memory" in controllers.split(",")
        if not v1 and controllers:
            continue
        for mount in mounted:
            if mount.kind != ("cgroup" if v1 else "cgroup2") or (v1 and "memory" not in mount.options):
                continue
            own_path = path.removeprefix(mount.root if mount.root != "/" else "").strip("/")
            below = own_path if of is None else of
            top = root / mount.point.lstrip("/")
            folder = top / below
            while folder != top and folder.is_relative_to(top):
                yield folder, _V1 if v1 else _V2
                folder = folder.parent
            yield top, _V1 if v1 else _V2
            break


def _limit(folder: Path, names: _Names) -> Limit | None:
    try:
        limit = (folder / names.limit).read_text().strip()
        usage = int((folder / names.usage).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if not limit.isdecimal() or int(limit) >= _NO_LIMIT:
        return None
    files = sum(int(m[1]) for name in names.files if (m := re.search(rf"^{name} (\d+)$", stat, re.MULTILINE)))
    return Limit(int(limit), max(0, int(limit) - usage + files))
