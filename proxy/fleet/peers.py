"""Connections to the other hosts, and a request's hold on one of them.

To whoever forwards a request, another host is an engine like those here: the same connections, kept and paused and
ended in the same way, and the same lease. What it will not do it says with 409 and what it offers just now.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proxy.engine.client import EngineClient
from proxy.engine.connection import Upstream
from proxy.pool.lease import Lease
from proxy.tiers import Tier

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    from proxy.fleet.table import HostEntry

_TIERS: Final = {tier.label: tier for tier in Tier}
_SEPARATOR: Final = "/"
"""Between a host and an instance of it, in what is said of who answered."""


class Peer(EngineClient):
    """One other host; its connections are kept from one request to the next."""

    def __init__(self, host: str, url: str, tls: ssl.SSLContext) -> None:
        super().__init__(url, host)
        self.upstream = Upstream(url, None, tls=tls, tls_name=host)
        self._tls, self._tls_name = tls, host


class Peers:
    """All that requests went to; `tls` returns what shows who this host is."""

    def __init__(self, tls: Callable[[], ssl.SSLContext]) -> None:
        self._tls = tls
        self._peers: dict[str, Peer] = {}

    def to(self, host: HostEntry) -> Peer:
        """The one of this name, where it says that it is."""
        peer = self._peers.get(host.name)
        if peer is None:
            peer = self._peers[host.name] = Peer(host.name, host.url, self._tls())
        elif peer.base_url != host.url:
            peer.base_url = host.url
        return peer

    async def close(self) -> None:
        """End every connection; what is under way fails."""
        for peer in self._peers.values():
            await peer.disconnect()


@dataclass(slots=True)
class Hop:
    """What is known of one request's way: who did not want it, and what for."""

    refused: dict[str, float] = field(default_factory=dict)
    """By host: its price then, in milliseconds."""
    unreached: int = 0
    """How many could not be reached."""
    sent: bool = False
    """Something of it was sent to the host that it went to last."""
    final: bool = False
    """It has been tried enough: where it goes now it waits."""


class PeerLease(Lease):
    """A request's hold on another host. Nothing here counts it: there it has a lease of an instance."""

    __slots__ = ("_lost", "_reached", "expected_ms", "host", "sent_at", "timing")

    is_remote = True

    def __init__(
        self,
        peer: Peer,
        host: HostEntry,
        model: str,
        tier: str,
        expected_ms: int | None,
        *,
        reached: Callable[[str], object],
        lost: Callable[[str], object],
    ) -> None:
        """`expected_ms`: how long it is to wait there; None: as long as it takes."""
        self.client = peer
        self.host = host.name
        self.model = model
        self.instance_id = host.name
        self.generation = 0
        self.found = _TIERS.get(tier, Tier.STOPPED)
        self.queue_s = 0.0
        self.wake = None
        self.keep_s = None
        self.expected_ms = expected_ms
        self.timing = b""
        """As the host said it; for `Server-Timing`."""
        self.sent_at = time.perf_counter()
        self._reached, self._lost = reached, lost

    def answered(self, told: Mapping[bytes, bytes]) -> None:
        """Its answer has begun; `told`: what it says of who answers there."""
        self._reached(self.host)
        self.found = _TIERS.get(told.get(b"x-warmpool-tier", b"").decode("latin-1"), self.found)
        instance = told.get(b"x-warmpool-instance", b"").decode("latin-1")
        self.instance_id = f"{self.host}{_SEPARATOR}{instance}" if instance else self.host
        hop = b"hop;desc=%b;dur=%.1f" % (self.host.encode("ascii"), (time.perf_counter() - self.sent_at) * 1000)
        there = told.get(b"server-timing", b"")
        self.timing = b"%b, %b" % (hop, there) if there else hop

    @property
    def paused(self) -> bool:
        """It is said there."""
        return False

    def charge(self, key: str) -> None:
        """It is charged there."""

    def await_token(self) -> None:
        """It is counted there."""

    def token_came(self) -> None:
        """It is counted there."""

    def release(self) -> None:
        """It ends there with its connection."""

    async def suspect(self) -> None:
        """It could not be reached, or broke off before its answer: it is left alone for a while."""
        self._lost(self.host)


def host_of(instance: str) -> str | None:
    """The host of an instance elsewhere; None for one that is here."""
    host, separator, _ = instance.partition(_SEPARATOR)
    return host if separator else None
