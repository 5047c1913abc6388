"""Here, or on another host: where a request gets its lease that finds no instance ready here.

What hosts tell one another of a request is in fields of its head, and counts on the peers' listener only, where each
shows who it is with its certificate. No request goes further than to one other host.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import orjson

from proxy.errors import (
    DrainingError,
    MaxWaitError,
    ModelNotFoundError,
    NoCapacityError,
    NoHostError,
    NoMemoryError,
    NotHereError,
    QueueFullError,
    WakeFailedError,
)  # fmt: skip
from proxy.fleet.choice import MOST_TRIES
from proxy.fleet.peers import Hop, host_of
from proxy.server.forward import leasing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.fleet.fleet import Fleet
    from proxy.pool.lease import Lease
    from proxy.server.auth.caller import Caller
    from proxy.server.forward.cycle import RequestCycle
    from proxy.server.forward.model_resolver import Address

_MOST_UNREACHED: Final = 4
_NOT_HERE: Final = (
    DrainingError, MaxWaitError, ModelNotFoundError, NoMemoryError, QueueFullError, WakeFailedError,
)  # fmt: skip
"""Why a request cannot wait here, though it might elsewhere."""
FROM: Final = "x-warmpool-from"
KEY: Final = "x-warmpool-key"
PRIORITY: Final = "x-warmpool-priority"
EXPECTED: Final = "x-warmpool-expected-wait"
"""Milliseconds; without, the request has been tried enough, and waits."""


def marks_of(host: str, caller: Caller | None, most_wait_s: float | None) -> dict[str, str]:
    """What a host, of this name, tells another one of a request."""
    marks = {FROM: host, "x-warmpool-hop": "1"}
    if caller is not None:
        marks |= {KEY: caller.name, PRIORITY: str(caller.priority)}
    if most_wait_s is not None:
        marks["x-warmpool-max-wait"] = f"{most_wait_s:.3f}"
    return marks


class Hops:
    """Finds leases in the whole fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._own = ((b"x-warmpool-host", fleet.host.encode("ascii")),)

    async def lease(self, cycle: RequestCycle, address: Address) -> Lease:
        """A hold on an instance here, or on another host. Raises RequestError."""
        if cycle.connection.peers is not None:
            return await self._for_peer(cycle, address)
        if cycle.hop is None:
            cycle.hop = Hop()
        hop, fleet = cycle.hop, self._fleet
        if hop.unreached > _MOST_UNREACHED:
            raise NoHostError("The hosts that have this model could not be reached.")
        model, most_s = cycle.served_name(), self._left_s(cycle)
        if address.instance is not None and (bound := host_of(address.instance)) is not None:
            lease = fleet.lease_of(bound, model, hop)
            if lease is not None:
                return lease
            address.instance = None  # what made it is gone: as of an instance that is
        if address.instance is not None:
            return await leasing.lease_here(cycle, address)
        hop.final = hop.final or len(hop.refused) >= MOST_TRIES
        lease = fleet.lease(model, hop, most_s, may_stay=not address.elsewhere)
        if lease is not None:
            return lease
        if address.elsewhere:
            raise NoHostError(f"No host would serve {model!r} now, or in the time that the request waits.")
        try:
            return await leasing.lease_here(cycle, address)
        except _NOT_HERE:
            hop.refused[fleet.host] = float("inf")
            lease = fleet.lease(model, hop, self._left_s(cycle), may_stay=False)
            if lease is None:
                raise
            return lease

    def has_ready(self, cycle: RequestCycle) -> bool:
        """Whether another host would answer a request at once, so that no other model has to."""
        return cycle.connection.peers is None and self._fleet.has_ready(cycle.served_name())

    async def _for_peer(self, cycle: RequestCycle, address: Address) -> Lease:
        """For a request that another host has sent: here, or back. Raises NotHereError too."""
        expected_ms = cycle.head.headers.get(EXPECTED)
        if expected_ms is None:
            return await leasing.lease_here(cycle, address)
        if (offer := self._fleet.refusal(cycle.served_name(), float(expected_ms))) is not None:
            raise NotHereError(offer)
        try:
            return await leasing.lease_here(cycle, address)
        except NoCapacityError:
            raise
        except _NOT_HERE as error:
            raise NotHereError("null") from error

    def _left_s(self, cycle: RequestCycle) -> float | None:
        most_s = cycle.head.max_wait_s
        return None if most_s is None else max(0.0, most_s - (time.perf_counter() - cycle.began))

    def marks(self, cycle: RequestCycle) -> bytes:
        """The fields that another host gets with a request."""
        lease = cycle.lease
        if cycle.hop is not None:
            cycle.hop.sent = True
        marks = marks_of(self._fleet.host, cycle.caller, self._left_s(cycle))
        fields = [f"{name}: {value}" for name, value in marks.items()]
        if (keep_s := cycle.head.keep_s) is not None:
            fields.append(f"x-warmpool-keep-alive: {keep_s:g}")
        if lease is not None and (expected_ms := self._fleet.expected_ms(lease)) is not None:
            fields.append(f"{EXPECTED}: {expected_ms}")
        return "".join([f"\r\n{field}" for field in fields]).encode("ascii")

    def turned_away(self, cycle: RequestCycle, lease: Lease, offer: bytes) -> None:
        """Another host did not take a request."""
        assert cycle.hop is not None  # noqa: S101 - it made one
        try:
            present = orjson.loads(offer)
        except orjson.JSONDecodeError:
            present = None
        self._fleet.turned_away(cycle.served_name(), lease, present, cycle.hop)

    def tries_on(self, cycle: RequestCycle, lease: Lease) -> bool:
        """Whether a failure of the host that had a request does not count: nothing of it was sent."""
        hop = cycle.hop
        if not lease.is_remote or hop is None or hop.sent:
            return False
        hop.unreached += 1
        return True

    def fields(self, cycle: RequestCycle) -> Sequence[tuple[bytes, bytes]]:
        """Which host answers."""
        lease = cycle.lease
        if lease is None or not lease.is_remote:
            return self._own
        host = host_of(lease.instance_id) or lease.instance_id
        return ((b"x-warmpool-host", host.encode("ascii")),)
