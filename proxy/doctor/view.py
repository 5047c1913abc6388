"""The host as the checks see it: files, commands, limits; tests put another in its place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proxy.host import capabilities, mounts
from proxy.host.command import run

_TIMEOUT_S: Final = 30.0
_LIMITS: Final = {
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "memlock": resource.RLIMIT_MEMLOCK,
}


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended; `status` is None when it could not be run or took too long."""

    status: int | None
    output: str
    """Of both streams."""

    def reason(self) -> str:
        """Its last words, in one line."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit status {self.status}, no output"


@dataclass(frozen=True, slots=True)
class Space:
    """Sizes of a filesystem."""

    total_bytes: int
    free_bytes: int


class Host:
    """This machine, or the tree of another below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    # --- files ---

    def path(self, path: Path | str) -> Path:
        """Where an absolute path of the host is."""
        return self.root / str(path).lstrip("/")

    def text(self, path: Path | str) -> str | None:
        """A file's content; None when it cannot be read."""
        try:
            return self.path(path).read_text("utf-8", "replace")
        except OSError:
            return None

    def files(self, folder: Path | str) -> list[Path]:
        """The paths of what is in a folder; nothing when it cannot be read."""
        try:
            return sorted(Path(folder) / name for name in os.listdir(self.path(folder)))  # noqa: PTH208 - names wanted
        except OSError:
            return []

    def exists(self, path: Path | str) -> bool:
        """Whether there is something at a path."""
        return os.path.lexists(self.path(path))

    def mount_of(self, path: Path) -> mounts.Mount | None:
        """The filesystem that holds an absolute path, which need not exist."""
        return mounts.holding(path, mounts.parse(self.text(mounts.MOUNTINFO) or ""))

    def space(self, path: Path) -> Space | None:
        """Of the filesystem of a path, or of the nearest folder above that exists."""
        for candidate in (path, *path.parents):
            with contextlib.suppress(OSError):
                usage = shutil.disk_usage(self.path(candidate))
                return Space(usage.total, usage.free)
        return None

    # --- the machine and this process ---

    def memory(self) -> dict[str, int]:
        """The fields of /proc/meminfo, in bytes."""
        found = re.findall(r"^(\w+):\s+(\d+) kB$", self.text("/proc/meminfo") or "", re.MULTILINE)
        return {name: int(kib) << 10 for name, kib in found}

    def uid(self) -> int:
        """The user we act as."""
        return os.geteuid()

    def has_capability(self, number: int) -> bool:
        """Whether this process has a capability of linux/capability.h."""
        return capabilities.has(number, self.text(capabilities.STATUS) or "")

    def limits(self) -> dict[str, tuple[int, int]]:
        """Soft and hard resource limits of this process by name; -1 is none."""
        return {name: resource.getrlimit(number) for name, number in _LIMITS.items()}

    # --- programs ---

    def which(self, program: str) -> str | None:
        """The path of a program of PATH, or of one given by path."""
        return shutil.which(program)

    async def run(self, *command: str, timeout_s: float = _TIMEOUT_S) -> Ran:
        """Run a command to its end, without input and in the C locale."""
        try:
            async with asyncio.timeout(timeout_s):
                status, output = await run(*command, environment={**os.environ, "LC_ALL": "C"})
        except TimeoutError:
            return Ran(None, f"{' '.join(command[:2])}: no answer after {timeout_s:.0f} s")
        except (OSError, ValueError) as error:
            return Ran(None, f"{command[0]} cannot be run: {error}")
        return Ran(status, output)

    async def listens(self, socket: Path) -> bool:
        """Whether somebody accepts connections on a unix socket."""
        try:
            _, writer = await asyncio.open_unix_connection(str(self.path(socket)))
        except (OSError, ValueError):
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True
