"""How many requests this host has sent to each other one since that one's last word, which cannot know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.fleet.table import HostEntry

_FULL: Final = 1 << 40
_NONE: Final[Mapping[str, int]] = {}


class Sent:
    """Counts by model and host; a record that is newer than a count ends it."""

    def __init__(self) -> None:
        self._of_model: dict[str, dict[HostEntry, tuple[str, int, int]]] = {}
        """Host → boot and `seq` of its last record when it was counted, and the count."""

    def note(self, model: str, host: HostEntry) -> None:
        """A request went to it."""
        counts = self._of_model.setdefault(model, {})
        boot, seq, count = counts.get(host, (host.boot, host.seq, 0))
        if boot != host.boot or seq != host.seq:
            count = 0
        counts[host] = host.boot, host.seq, count + 1

    def refused(self, model: str, host: HostEntry) -> None:
        """It did not take one: it has no room, until it says otherwise."""
        self._of_model.setdefault(model, {})[host] = host.boot, host.seq, _FULL

    def to(self, model: str) -> Mapping[str, int]:
        """The counts that hold still, by host."""
        counts = self._of_model.get(model)
        if not counts:
            return _NONE
        held: dict[str, int] = {}
        for host, (boot, seq, count) in [*counts.items()]:
            if boot == host.boot and seq == host.seq:
                held[host.name] = count
            else:
                del counts[host]
        if not counts:
            del self._of_model[model]
        return held
