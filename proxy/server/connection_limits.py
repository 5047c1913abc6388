"""How many connections there may be, and which of them have to be looked at by when.

Deadlines are kept in one set and looked at every now and then, since a timer for every request would cost more than
the whole check.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from typing import TYPE_CHECKING, Final

from proxy.config.values import is_loopback
from proxy.telemetry.refusals import network_of

if TYPE_CHECKING:
    from proxy.config.server import LimitSettings
    from proxy.server.connection import ClientConnection

log = logging.getLogger("warmpool.limits")

_FILES_KEPT: Final = 256
"""Open files that are not for clients: engines, pipes, images."""


class ConnectionLimits:
    """All connections of a server."""

    def __init__(self, limits: LimitSettings) -> None:
        self.limits = limits
        self.most = limits.connections
        self.most_head = limits.head
        """Bytes of a request's head."""
        self.open = 0
        self._by_address: Counter[str] = Counter()
        self._watched: set[ClientConnection] = set()
        self._timer: asyncio.TimerHandle | None = None
        times = (limits.head_timeout, limits.upload_timeout, limits.stall_timeout or limits.head_timeout)
        self.every_s = min(1.0, *(t / 4 for t in times))

    def fit_to_host(self, engine_connections: int) -> None:
        """No more connections than there can be open files; raises the soft limit of files as far as it may.

        `engine_connections`: how many there may be towards engines at the same time.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.limits.connections + engine_connections + _FILES_KEPT
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft != resource.RLIM_INFINITY and soft < wanted:
            self.most = max(soft // 4, soft - _FILES_KEPT - engine_connections)
            log.warning(
                "only %d connections at once instead of %d: the limit of open files is %d (ulimit -n, LimitNOFILE=)",
                self.most, self.limits.connections, soft,
            )  # fmt: skip

    def enter(self, address: str | None) -> str | None:
        """Count a connection in; the reason if there is no place for it."""
        if self.open >= self.most:
            return "connections"
        per_address = self.limits.connections_per_address
        if address is not None and per_address and self._by_address[address] >= per_address:
            return "connections_per_address"
        self.open += 1
        if address is not None:
            self._by_address[address] += 1
        return None

    def leave(self, address: str | None) -> None:
        """Count a connection out."""
        self.open -= 1
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def watch(self, connection: ClientConnection) -> None:
        """Have a connection look at its deadlines from now on, until `unwatch`."""
        self._watched.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.every_s, self._look)

    def unwatch(self, connection: ClientConnection) -> None:
        """It has none any more."""
        self._watched.discard(connection)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for connection in list(self._watched):
            connection.look(now)
        if self._watched:
            self._timer = asyncio.get_running_loop().call_later(self.every_s, self._look)


def counted_by(host: str | None) -> str | None:
    """What connections are counted by; None: not counted."""
    return None if host is None or is_loopback(host) else network_of(host)
