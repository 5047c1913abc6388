"""The claim on a state folder: one warmpool at a time, the mark of what is its own, and where engine logs go."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from typing import TYPE_CHECKING, Final

from proxy.errors import HostError
from proxy.host import owned

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO


log = logging.getLogger("warmpool.runtime")

LOG_SIZE: Final = 64 << 20
_MARKS: Final = ("lock", "logs", "usage.json", "archive", "state")
"""What a state folder of warmpool's has in it, of any version, or a folder below which it was by default."""


class InUseError(HostError):
    """Another warmpool has the folder."""


class Claim:
    """A hold on `state_dir`, shared by the runtimes of one warmpool.

    `owner` marks everything that belongs to it, so that two proxies with different folders leave each other's alone.
    """

    def __init__(self, state_dir: Path, *, log_size: int = LOG_SIZE) -> None:
        """`log_size`: how many bytes an engine's log may have."""
        self.folder = state_dir.absolute()
        self.owner = hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        self.log_size = log_size
        self._file: IO[bytes] | None = None
        self._holders = 0

    def ensure(self) -> None:
        """Have the folders there again if something has removed them, as cleaners of /tmp and /run do.

        Raises HostError, also where another warmpool has taken the folder meanwhile.
        """
        if self._file is None or self._is_there():
            return
        log.warning("state_dir %s was removed while in use; it is made again", self.folder)
        self._unlock()
        self._lock()

    def _is_there(self) -> bool:
        """Whether the lock that is held is the one that others would find, and logs can be written."""
        assert self._file is not None  # noqa: S101 - ensure saw to it
        try:
            return (self.folder / "logs").is_dir() and os.path.samestat(
                (self.folder / "lock").lstat(), os.fstat(self._file.fileno())
            )
        except OSError:
            return False

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
            raise InUseError(f"another warmpool uses state_dir {self.folder}; stop it or set another one") from None
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

    def open_log(self, instance_id: str) -> int:
        """A descriptor to append to it; it is there afterwards. Raises HostError."""
        try:
            return owned.open_file(self.log_path(instance_id), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise HostError(f"{error.filename or self.log_path(instance_id)}: {error.strerror}") from error


def of_earlier_version(state_dir: Path, directory: Path) -> str | None:
    """What to say where `directory` has the state folder of a warmpool whose default was ./run, and it is not used."""
    earlier = directory / "run"
    if earlier == state_dir or not (earlier / "lock").is_file() or not (earlier / "logs").is_dir():
        return None
    return (
        f"{earlier} is the state folder of an earlier version; state_dir is {state_dir} now. To go on with what it "
        f'has, set pool.state_dir = "{earlier}"; else `podman ps --all --filter label=io.warmpool.owner='
        f"{Claim(earlier).owner}` shows its containers, remove them and the folder"
    )
