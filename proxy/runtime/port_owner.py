"""Whose socket it is that listens on an engine's port.

On the host's network anybody can listen on a port that is free: where an engine is about to, or was before its
checkpoint. Whoever answers there would be sent prompts. So the listening sockets are looked up in /proc/net/tcp, and
have to be among the descriptors of the engine's processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from proxy.errors import PortTakenError
from proxy.host import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

_LISTEN: Final = "0A"  # TCP_LISTEN (include/net/tcp_states.h), as in /proc/net/tcp
_REACHED: Final = {
    Path("/proc/net/tcp"): {"0100007F", "00000000"},
    Path("/proc/net/tcp6"): {"0" * 32, "0000000000000000FFFF00000100007F"},
}
"""The local addresses, as they stand there, at which a connection to 127.0.0.1 ends."""
_WHOLE_EVERY_S: Final = 1.0
_looked_at: Final[dict[int, float]] = {}
"""By port: when all sockets were looked at last."""


class Listener(Enum):
    """Who listens on a port."""

    NOBODY = "nobody"
    ENGINE = "the engine"
    ANOTHER = "another program"


def who_listens(port: int, engine: Iterable[int]) -> Listener:
    """Who listens on a port of loopback, as seen from an engine's processes; ANOTHER if not the engine alone."""
    sockets = listening(port)
    if not sockets:
        return Listener.NOBODY
    return Listener.ENGINE if sockets <= _sockets_of(engine) else Listener.ANOTHER


async def check(port: int, leader: int | None, members: Callable[[], Iterable[int]]) -> bool:
    """Whether an engine listens on its port; False while nobody does. Raises PortTakenError where another does.

    `leader` is the engine's first process; `members`, slower, finds those too that do not descend from it any more.
    """

    def look() -> Listener:
        found = who_listens(port, processes.tree(leader) if leader is not None else ())
        return who_listens(port, members()) if found is Listener.ANOTHER else found

    found = await asyncio.to_thread(look)
    if found is Listener.ANOTHER:
        raise PortTakenError("listen", port, await asyncio.to_thread(owner, port))
    return found is Listener.ENGINE


def listening(port: int) -> set[str]:
    """The inodes of the sockets at which a connection to this port of loopback may end.

    Linux lists sockets that listen before all others (net/ipv4/tcp_ipv4.c, `tcp_get_idx`), and the others may be the
    connections of thousands of clients that wait for this engine: they are looked at once a second, for other kernels.
    """
    now = time.monotonic()
    whole = now - _looked_at.get(port, -math.inf) >= _WHOLE_EVERY_S
    if whole:
        _looked_at[port] = now
    return {inode for path, addresses in _REACHED.items() for inode in _listed(path, addresses, port, whole=whole)}


def _listed(path: Path, addresses: Collection[str], port: int, *, whole: bool) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError), path.open() as lines:  # there are kernels without IPv6
        next(lines, None)
        for line in lines:
            fields = line.split()
            address, _, number = fields[1].partition(":")
            if fields[3] != _LISTEN:
                if not whole:
                    return
            elif int(number, 16) == port and address in addresses:
                yield fields[9]


def _sockets_of(pids: Iterable[int]) -> set[str]:
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    target = os.readlink(descriptor.path)  # noqa: PTH115 - thousands of them
                    if target.startswith("socket:["):
                        found.add(target[len("socket:[") : -1])
    return found


def owner(port: int) -> str:
    """Who listens there, in words, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            here = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if here and connection.pid is not None:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another program"
