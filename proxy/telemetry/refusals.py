"""What the log says of refused requests and connections: one line at once, then a sum for each address.

Anybody can be refused as often as he likes, and a line each would let him fill the disk.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import Counter
from typing import Final

log = logging.getLogger("warmpool.limits")

EVERY_S: Final = 60.0
MOST_ADDRESSES: Final = 256
"""Those that come later within an interval are counted together."""

_OTHERS: Final = "other addresses"


class Refusals:
    """Counts refusals by address and reason. What is said of one must hold nothing that a client sent."""

    def __init__(self, *, every_s: float = EVERY_S, most_addresses: int = MOST_ADDRESSES) -> None:
        self._every_s = every_s
        self._most = most_addresses
        self._counts: dict[str, Counter[str]] = {}
        """Address → reason → refusals in this interval, the one that was told included."""
        self._timer: asyncio.TimerHandle | None = None

    def first(self, address: str | None, reason: str) -> bool:
        """Count a refusal; whether it is the first of its kind in this interval, and so to be logged by the caller."""
        name = _name(address)
        counts = self._counts.get(name)
        if counts is None:
            if len(self._counts) >= self._most:
                name = _OTHERS
            counts = self._counts.setdefault(name, Counter())
        counts[reason] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._every_s, self.sum_up)
        return counts[reason] == 1

    def note(self, address: str | None, reason: str, text: str) -> None:
        """Count a refusal, and log the first one of its kind."""
        if self.first(address, reason):
            log.info("refused %s: %s", _name(address), text)

    def sum_up(self) -> None:
        """Log what was counted and not told yet; a new interval begins."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        counted, self._counts = self._counts, {}
        for address, counts in counted.items():
            more = {reason: count - 1 for reason, count in counts.items() if count > 1}
            if more:
                reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(more.items()))
                log.info(
                    "refused %s %d more times within %g s: %s", address, sum(more.values()), self._every_s, reasons
                )


def network_of(host: str) -> str:
    """Who is one client, by address: an IPv4 address, an IPv6 network of 64 bits."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    if address.is_loopback:
        return host
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def _name(address: str | None) -> str:
    try:
        return network_of(address or "")
    except ValueError:  # the peer of a unix socket has no name, or any
        return "a unix socket"
