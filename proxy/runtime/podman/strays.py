"""Containers of another state folder that no warmpool holds any more: nobody stops them, and nobody goes on with them.

They are shown, never touched: a state folder may be moved, or be that of a warmpool which starts again tomorrow.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from proxy.runtime.podman.api import PodmanError
from proxy.runtime.podman.container import LABEL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

log = logging.getLogger("warmpool.runtime")

AGAIN_S: Final = 600.0
"""How old what is shown may be before it is looked for again."""
_LOOK_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Stray:
    """The containers of one state folder."""

    found: str
    removal: str
    """The command that removes them."""

    def __str__(self) -> str:
        return f"{self.found}; if it is not to start again: {self.removal}"


class Strays:
    """What is known of them. `listed`: all containers of warmpools, as podman lists them; raises PodmanError."""

    def __init__(
        self,
        listed: Callable[[], Awaitable[Iterable[Mapping[str, Any]]]],
        owner: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listed, self._owner, self._clock = listed, owner, clock
        self._lines: list[str] = []
        self._looked_at: float | None = None
        self._again: asyncio.Task[None] | None = None

    def lines(self) -> Sequence[str]:
        """One for each; what is older than AGAIN_S is looked for again, for whoever asks next."""
        if self._looked_at is not None and self._clock() - self._looked_at > AGAIN_S:
            self._looked_at = self._clock()
            self._again = asyncio.create_task(self._look_again(), name="look for containers that nobody holds")
        return self._lines

    async def look(self) -> None:
        """Look for them, and say which are new. Raises PodmanError."""
        found = [*map(str, await asyncio.to_thread(among, await self._listed(), self._owner))]
        for line in found:
            if line not in self._lines:
                log.warning("%s", line)
        self._lines, self._looked_at = found, self._clock()

    async def _look_again(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_S):
                await self.look()
        except (PodmanError, TimeoutError) as error:
            log.info("containers that nobody holds could not be looked for: %s", str(error) or "podman is too slow")

    async def close(self) -> None:
        """Give up what is under way."""
        if self._again is not None:
            self._again.cancel()
            await asyncio.wait([self._again])


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
