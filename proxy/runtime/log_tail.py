"""The last lines of an engine's log, for whoever has to say why it did not start."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

import aiofiles

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.runtime.state_dir import Claim

MAX_LINES: Final = 20
MAX_BYTES: Final = 4096
# The k8s-file format of podman's logs: time, stream, whole or partial line.
_PODMAN: Final = re.compile(r"^\S+ (?:stdout|stderr) [FP] ")
_UNPRINTABLE: Final = re.compile(r"[^\t\x20-\x7e\xa0-\U0010ffff]")


class LogTails:
    """Where in its log each engine began, since a log goes on from one engine of an instance to the next."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._began: dict[str, int] = {}

    def begin(self, instance_id: str) -> None:
        """The engine is about to be started or restored: what was written before is not its own."""
        self._began[instance_id] = _size(self._claim.log_path(instance_id))

    async def read(self, instance_id: str) -> list[str]:
        """The last lines since then, MAX_LINES and MAX_BYTES at most; nothing where they cannot be read."""
        return await last_lines(self._claim.log_path(instance_id), self._began.get(instance_id, 0))


async def last_lines(path: Path, began: int = 0) -> list[str]:
    """The last lines of a log from byte `began` on, without control characters; of all of it if it is shorter."""
    try:
        async with aiofiles.open(path, "rb") as file:
            size = await file.seek(0, os.SEEK_END)
            await file.seek(max(began if began <= size else 0, size - MAX_BYTES))  # it may have been rotated
            text = (await file.read(MAX_BYTES)).decode("utf-8", "replace")
    except OSError:
        return []
    lines = [_UNPRINTABLE.sub("", _PODMAN.sub("", line)) for line in text.splitlines()]
    return [line for line in lines if line.strip()][-MAX_LINES:]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
