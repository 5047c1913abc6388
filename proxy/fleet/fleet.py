"""This host in its fleet: what the server asks of it."""

from __future__ import annotations

import logging
import math
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy import __version__
from proxy.fleet import offers, record
from proxy.fleet.choice import choose, takes
from proxy.fleet.directory import Directory
from proxy.fleet.nats_bus import NatsBus
from proxy.fleet.own_record import OwnRecord
from proxy.fleet.peers import PeerLease, Peers
from proxy.fleet.record import Offer, RecordError
from proxy.fleet.sent import Sent
from proxy.fleet.table import READY, Candidate, HostEntry, Table
from proxy.fleet.tls import client_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.config.fleet import FleetSettings
    from proxy.fleet.bus import Bus
    from proxy.fleet.key_use import KeyLimits
    from proxy.fleet.peers import Hop
    from proxy.pool.lease import Lease
    from proxy.pool.pool import Pool
    from proxy.telemetry.metrics import Metrics


log = logging.getLogger("warmpool.fleet")

_UNKNOWN: Final = Offer("stopped", 0, 0, 0, 0)
"""Of a host that is asked for a model it says nothing of."""


class Fleet:
    """What this host knows of the others, and says of itself."""

    def __init__(
        self,
        settings: FleetSettings,
        pool: Pool,
        metrics: Metrics,
        *,
        bus: Bus | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads certificates and password. Raises ConfigError, and HostError where the extra is not installed."""
        assert settings.host is not None  # noqa: S101 - else there is no fleet
        assert settings.url is not None  # noqa: S101
        self.host = settings.host
        self._pool = pool
        self._clock = clock
        self._tls = client_context(settings)
        self.table = Table(clock)
        self._metrics = metrics
        self._sent = Sent()
        self._me = HostEntry(self.host)
        self._me.usable_seen = math.inf
        self._peers = Peers(lambda: self._tls)
        self._random = random.Random()  # noqa: S311 - no secret
        self._own = OwnRecord(self.host, settings.url, "host" if pool.settings.models else "gateway", __version__)
        self._directory = Directory(
            settings.nats.subject,
            self._own,
            self.table,
            bus if bus is not None else NatsBus(settings.nats, self.host, self._tls),
            offers=partial(offers.all_offers, pool),
            draining=lambda: not pool.ready,
            aliases=partial(offers.aliases, pool),
            count=lambda result: metrics.fleet_records.labels(result).inc(),
            clock=clock,
        )
        self._unlisten: Callable[[], object] | None = None

    # --- where requests go ---

    def name_of(self, called: str) -> str | None:
        """The name of the model that another host calls so; None where none has one."""
        return self.table.name_of(called)

    def has_ready(self, model: str) -> bool:
        """Whether another host has it ready, with room."""
        oldest = self.table.oldest
        return any(e.is_ready and e.room and e.host.usable_seen >= oldest for e in self.table.offers(model))

    def models(self) -> list[str]:
        """All names of models that other hosts offer."""
        names = self.table.models()
        known = {*names}
        return [*names, *(alias for alias, name in self.table.aliases().items() if name in known)]

    def listed(self, model: str) -> dict[str, Any]:
        """What `/v1/models` says of one, by the host that has it soonest."""
        oldest = self.table.oldest
        found = [each.offer for each in self.table.offers(model) if each.host.usable_seen >= oldest]
        best = min(found, key=lambda each: each.wait_ms, default=_UNKNOWN)
        value = "loaded" if best.tier == READY else "unloaded"
        return {"tier": best.tier, "expected_wait_s": best.wait_ms / 1000, "status": {"value": value}}

    def lease(self, model: str, hop: Hop, most_wait_s: float | None, *, may_stay: bool) -> PeerLease | None:
        """A hold on the host that a request should go to; None where that is this one, or none is good enough."""
        table, most_ms = self.table, None if most_wait_s is None else most_wait_s * 1000
        here = self._here(model) if may_stay and self.host not in hop.refused else None
        found = choose(
            table.offers(model), oldest=table.oldest, rank=partial(table.rank, model), draw=self._random.randrange,
            here=here, sent=self._sent.to(model), avoid=hop.refused, most_wait_ms=most_ms,
        )  # fmt: skip
        if found is None and not hop.refused and (resting := table.resting(model)):
            # Nobody else would: one connection that could not be made is not the end of a request.
            return self._leased(min(resting, key=lambda each: each.price_ms), model, hop)
        if hop.refused and (hop.final or found is None):
            hop.final = True
            best = min(hop.refused, key=hop.refused.__getitem__)
            if found is None or found.price_ms > hop.refused[best]:
                return self.lease_of(best, model, hop)
        if found is None or found.host.name == self.host:
            return None
        return self._leased(found, model, hop)

    def lease_of(self, name: str, model: str, hop: Hop) -> PeerLease | None:
        """A hold on this host and no other, whatever it offers; None where it cannot be reached now."""
        host = self.table.hosts.get(name)
        if host is None or name == self.host or host.usable_seen < self.table.oldest:
            return None
        hop.final = True
        offered = self.table.offers_of(name).get(model)
        return self._leased(offered if offered is not None else Candidate(host, _UNKNOWN), model, hop)

    def _here(self, model: str) -> Candidate | None:
        made = offers.present(self._pool, model)
        return Candidate(self._me, made) if made is not None else None

    def _leased(self, found: Candidate, model: str, hop: Hop) -> PeerLease:
        self._sent.note(model, found.host)
        hop.sent = False
        expected_ms = None if hop.final else found.offer.wait_ms
        return PeerLease(
            self._peers.to(found.host), found.host, model, found.offer.tier, expected_ms,
            reached=self._answered, lost=self._lost,
        )  # fmt: skip

    def _lost(self, name: str) -> None:
        self._count(name, "failed")
        rest_s = self.table.unreachable(name)
        log.warning("%s: a request could not be brought to it: left alone for %g s", name, rest_s)

    def expected_ms(self, lease: Lease) -> int | None:
        """How long a request is to wait at most where it goes, about; None where it has been tried enough."""
        return lease.expected_ms if isinstance(lease, PeerLease) else None

    def turned_away(self, model: str, lease: Lease, present: object, hop: Hop) -> None:
        """A host did not take a request; `present`: what it says to offer now."""
        name = lease.instance_id
        self._count(name, "refused")
        made = None
        if isinstance(present, list):
            try:
                made = record.offer(model, present)
            except RecordError:
                log.warning("%s: refused a request with an offer that is none", name)
        hop.refused[name] = made.price_ms if made is not None else math.inf
        host = self.table.hosts.get(name)
        if host is not None:
            self.table.reached(name)
            self.table.correct(name, model, made)
            self._sent.refused(model, host)

    def _answered(self, name: str) -> None:
        """A host has answered a request."""
        self._count(name, "answered")
        self.table.reached(name)

    def refusal(self, model: str, expected_ms: float) -> str | None:
        """What is offered here for a request that was sent for less, as another host reads it; None: it is taken."""
        present = offers.present(self._pool, model)
        if present is None:
            return "null"
        return None if takes(present, expected_ms) else orjson.dumps(present.encoded()).decode()

    def _count(self, name: str, outcome: str) -> None:
        if name in self.table.hosts:
            self._metrics.fleet_forwarded.labels(name, outcome).inc()

    # --- its life ---

    def share_limits(self, limits: KeyLimits) -> None:
        """Have the limits of keys hold for all hosts together; before it is opened."""
        self._directory.share_limits(limits)

    def open(self) -> None:
        """Begin to publish and to listen."""
        self._directory.open()
        self._unlisten = self._pool.listen(self._directory.note_change)

    async def close(self) -> None:
        """Say goodbye, and end. Returns within a few seconds."""
        if self._unlisten is not None:
            self._unlisten()
        await self._directory.close()

    async def close_peers(self) -> None:
        """End the connections to other hosts."""
        await self._peers.close()

    def status(self) -> dict[str, Any]:
        """For `/admin/fleet`: this host, and what is known of the others."""
        return {
            "host": self.host,
            "connected": self._directory.connected,
            "hosts": {name: self._status_of(entry) for name, entry in sorted(self.table.hosts.items())},
        }

    def _status_of(self, entry: HostEntry) -> dict[str, Any]:
        now = self._clock()
        return {
            "url": entry.url,
            "role": entry.role,
            "version": entry.release,
            "record_version": entry.version,
            "live": self.table.is_live(entry),
            "used": entry.usable_seen >= self.table.oldest,
            "draining": entry.drain,
            "heard_s": round(now - entry.seen, 3),
            "rests_s": round(max(0.0, entry.rest_until - now), 3),
            "models": {
                model: dict(zip(("tier", "wait_ms", "room", "queue", "hurt_ms"), found.offer, strict=True))
                for model, found in sorted(self.table.offers_of(entry.name).items())
            },
        }
