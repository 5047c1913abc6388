"""The last lines of an engine's log, for whoever has to say why it did not start."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

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

    def read(self, instance_id: str) -> list[str]:
        """The last lines since then, MAX_LINES and MAX_BYTES at most; nothing where they cannot be read."""
        path = self._claim.log_path(instance_id)
        began = self._began.get(instance_id, 0)
        return last_lines(path, began if began <= _size(path) else 0)  # it may have been rotated


def last_lines(path: Path, began: int = 0) -> list[str]:
    """The last lines of a log from byte `began` on, without control characters."""
    try:
        with path.open("rb") as file:
            file.seek(max(began, _size(path) - MAX_BYTES))
            text = file.read(MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    lines = [_UNPRINTABLE.sub("", _PODMAN.sub("", line)) for line in text.splitlines()]
    return [line for line in lines if line.strip()][-MAX_LINES:]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
