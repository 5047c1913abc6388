"""What this host says of itself, message by message: everything, or what has changed since the last one."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from proxy.fleet.record import VERSION, Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.fleet.record import Offer, Role


class OwnRecord:
    """Counts what was said. A new process says everything anew, under another `boot`."""

    def __init__(self, host: str, url: str, role: Role, release: str) -> None:
        self.host = host
        self.url = url
        self.role: Role = role
        self.boot = secrets.token_hex(8)
        self._release = release
        self._seq = -1
        self._said: dict[str, list[Any]] = {}
        self._drain = False

    def everything(
        self, offers: Mapping[str, Offer], *, drain: bool, aliases: Mapping[str, str] | None = None
    ) -> Record:
        """All of it."""
        self._said = {model: each.encoded() for model, each in offers.items()}
        return self._record(dict(self._said), aliases or {}, drain=drain, full=True)

    def changes(self, offers: Mapping[str, Offer], *, drain: bool) -> Record | None:
        """What has changed; None where nothing has."""
        now = {model: each.encoded() for model, each in offers.items()}
        changed: dict[str, list[Any] | None] = {m: made for m, made in now.items() if self._said.get(m) != made}
        changed |= dict.fromkeys(self._said.keys() - now.keys())
        if not changed and drain == self._drain:
            return None
        self._said = now
        return self._record(changed, {}, drain=drain, full=False)

    def _record(
        self, models: Mapping[str, list[Any] | None], aliases: Mapping[str, str], *, drain: bool, full: bool
    ) -> Record:
        self._seq += 1
        self._drain = drain
        return Record(
            VERSION, self.host, self.boot, self._seq, full, self.url, self.role, drain, self._release, models,
            aliases,
        )  # fmt: skip
