"""What is mounted where, as the kernel shows it (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MOUNTINFO: Final = Path("/proc/self/mountinfo")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount."""

    root: str
    """The folder of the filesystem that is seen at `point`."""
    point: str
    kind: str
    options: frozenset[str]
    """Of the mount and of the filesystem."""

    def option(self, name: str) -> str | None:
        """The value of an option such as ``huge=always``; None without one."""
        return next((o.removeprefix(f"{name}=") for o in self.options if o.startswith(f"{name}=")), None)


def parse(text: str) -> Iterator[Mount]:
    """Each mount of a mountinfo, in its order; lines that are not understood are left out."""
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        words, tail = fields.split(), rest.split()
        if len(words) >= 6 and len(tail) >= 3:
            yield Mount(_plain(words[3]), _plain(words[4]), tail[0], frozenset(f"{words[5]},{tail[2]}".split(",")))


def _plain(field: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field)


def holding(path: Path, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that an absolute path is on, which need not exist: the deepest, and the last of those at one point."""
    found: Mount | None = None
    for mount in mounts:
        if path.is_relative_to(mount.point) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found
