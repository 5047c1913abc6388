"""This host in its fleet: what the server asks of it."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from proxy import __version__
from proxy.fleet import offers
from proxy.fleet.directory import Directory
from proxy.fleet.nats_bus import NatsBus
from proxy.fleet.own_record import OwnRecord
from proxy.fleet.sent import Sent
from proxy.fleet.table import Table
from proxy.fleet.tls import client_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.config.fleet import FleetSettings
    from proxy.fleet.bus import Bus
    from proxy.fleet.table import HostEntry
    from proxy.pool.pool import Pool
    from proxy.telemetry.metrics import Metrics


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
        self._sent = Sent()
        self._random = random.Random()  # noqa: S311 - no secret
        self._own = OwnRecord(self.host, settings.url, "host", __version__)
        self._directory = Directory(
            settings.nats.subject,
            self._own,
            self.table,
            bus if bus is not None else NatsBus(settings.nats, self.host, self._tls),
            offers=partial(offers.all_offers, pool),
            draining=lambda: not pool.ready,
            count=lambda result: metrics.fleet_records.labels(result).inc(),
            clock=clock,
        )
        self._unlisten: Callable[[], object] | None = None

    def open(self) -> None:
        """Begin to publish and to listen."""
        self._directory.open()
        self._unlisten = self._pool.listen(self._directory.note_change)

    async def close(self) -> None:
        """Say goodbye, and end. Returns within a few seconds."""
        if self._unlisten is not None:
            self._unlisten()
        await self._directory.close()

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
