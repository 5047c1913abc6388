"""The claim on a state folder: one warmpool at a time, the mark of what is its own, and where engine logs go."""

from __future__ import annotations

import fcntl
import hashlib
import os
from typing import TYPE_CHECKING, Final

from proxy import owned
from proxy.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO


_MARKS: Final = ("lock", "logs", "usage.json")
"""What a state folder of warmpool's has in it, of any version."""


class Claim:
    """A hold on `state_dir`, shared by the runtimes of one warmpool.

    `owner` marks everything that belongs to it, so that two proxies with different folders leave each other's alone.
    """

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir.absolute()
        self.owner = hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        self._file: IO[bytes] | None = None
        self._holders = 0

    def acquire(self) -> None:
        """Make the folder and lock it, unless it is ours already. Raises HostError."""
        if self._holders == 0:
            self._lock()
        self._holders += 1

    def _lock(self) -> None:
        try:
            owned.claim(self.folder, _MARKS)
            owned.claim(self.folder / "logs", [path.name for path in (self.folder / "logs").glob("*.log")])
            self._file = os.fdopen(owned.open_file(self.folder / "lock", os.O_RDWR | os.O_CREAT), "rb")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise HostError(f"another warmpool uses state_dir {self.folder}; stop it or set another one") from None
        except OSError as error:
            self._unlock()
            where = f"{error.filename}: " if error.filename not in (None, str(self.folder)) else ""
            raise HostError(f"state_dir {self.folder}: {where}{error.strerror}; set pool.state_dir") from error

    def release(self) -> None:
        """Let go; the last one unlocks."""
        if self._holders:
            self._holders -= 1
        if self._holders == 0:
            self._unlock()

    def _unlock(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def log_path(self, instance_id: str) -> Path:
        """Where an engine's output goes."""
        return self.folder / "logs" / f"{instance_id}.log"
