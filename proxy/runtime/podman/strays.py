"""Containers of another state folder that no warmpool holds any more: nobody stops them, and nobody goes on with them.

They are shown, never touched: a state folder may be moved, or be that of a warmpool which starts again tomorrow.
"""

from __future__ import annotations

import fcntl
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy.runtime.podman.container import LABEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Stray:
    """The containers of one state folder."""

    found: str
    removal: str
    """The command that removes them."""

    def __str__(self) -> str:
        return f"{self.found}; if it is not to start again: {self.removal}"


def among(entries: Iterable[Mapping[str, Any]], owner: str) -> Sequence[Stray]:
    """One for each state folder with such containers, of what podman lists, those of `owner` left out."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in entries:
        labels = entry.get("Labels") or {}
        other, folder = str(labels.get(f"{LABEL}owner", "")), str(labels.get(f"{LABEL}state-dir", ""))
        if other not in ("", owner) and not (folder and is_held(Path(folder))):
            names[other, folder].append(str((entry.get("Names") or ["?"])[0]))
    return [_stray(folder, other, sorted(found)) for (other, folder), found in sorted(names.items())]


def _stray(folder: str, owner: str, names: Sequence[str]) -> Stray:
    where = f"state_dir {folder}, which no warmpool holds" if folder else "a warmpool of an earlier version"
    count = "1 container" if len(names) == 1 else f"{len(names)} containers"
    return Stray(
        f"{count} of {where}: {', '.join(names[:3])}{', …' * (len(names) > 3)}",
        f"podman rm --force $(podman ps --all --quiet --filter label={LABEL}owner={owner})",
    )


def is_held(state_dir: Path) -> bool:
    """Whether a warmpool runs on a state folder; False where that cannot be known."""
    try:
        descriptor = os.open(state_dir / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
