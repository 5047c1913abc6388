"""The claim on a state folder: one warmpool at a time, the mark of what is its own, and where engine logs go."""

from __future__ import annotations

import fcntl
import hashlib
from typing import TYPE_CHECKING

from proxy.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO


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
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / "logs").mkdir(mode=0o700, exist_ok=True)
            self._file = (self.folder / "lock").open("wb")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise HostError(f"another warmpool uses state_dir {self.folder}; stop it or set another one") from None
        except OSError as error:
            raise HostError(f"state_dir {self.folder}: {error.strerror}; set pool.state_dir") from error

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
