"""What engines in containers on the host's network share with one another: the names of abstract unix sockets.

CUDA names its sockets after the number of the pid namespace and the pid in it (`@cuda-uvmfd-4026532561-7`). Containers
that run have different numbers. But an image keeps the names it was taken with, the kernel gives the number of a
namespace that is gone to the next one, and pids in containers are alike: so two images may have the same names, of
which CRIU can bind only one (`unix: Can't bind …: Address already in use`).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_SOCKETS = Path("/proc/net/unix")


def number_of(pid: int) -> int:
    """The number of a process's pid namespace. Raises OSError when the process is gone."""
    return Path(f"/proc/{pid}/ns/pid").stat().st_ino


class PidNamespaces:
    """Pid namespaces that are kept, though nothing runs in them any more, so that no other one gets their numbers."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}

    def hold(self, pid: int) -> None:
        """Keep the namespace of a process. Raises OSError when it is gone."""
        descriptor = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        number = os.fstat(descriptor).st_ino
        if number in self._held:
            os.close(descriptor)
        else:
            self._held[number] = descriptor

    def release_unless(self, needed: Callable[[int], bool]) -> None:
        """Let go of those whose number is not needed."""
        for number in [n for n in self._held if not needed(n)]:
            os.close(self._held.pop(number))

    def close(self) -> None:
        """Let go of all."""
        self.release_unless(lambda _: False)


def abstract_names(pids: Iterable[int]) -> list[str]:
    """The names of the abstract unix sockets that these processes have, with the `@` that stands for the NUL."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            names |= {str(c.laddr) for c in psutil.Process(pid).net_connections("unix")}
    return sorted(name for name in names if name.startswith("@"))


def taken(names: Iterable[str]) -> tuple[str, str] | None:
    """One of these names that is bound on this network already, and by whom, in words; None when they are free."""
    with _SOCKETS.open() as lines:
        bound = {line.rstrip("\n").rpartition(" ")[2] for line in lines}
    name = next((name for name in names if name in bound), None)
    return None if name is None else (name, _owner(name))


def _owner(name: str) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("unix"):
            if str(connection.laddr) == name and connection.pid is not None:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"
