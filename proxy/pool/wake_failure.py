"""A wake that failed down to its cold start: what is kept and told of it, and how long nothing is started after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from proxy.tiers import Tier

_FIRST_DELAY_S: Final = 1.0
_MOST_DELAY_S: Final = 300.0


def delay_s(failures: int) -> float:
    """How long to wait after so many failed starts in a row (1 and up): 1 s, then twice as long each time, to 5 min."""
    return min(_MOST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(failures - 1, 16))


@dataclass(frozen=True, slots=True)
class WakeFailure:
    """Why no tier gave a working engine."""

    instance: str
    found: Tier
    at_unix_s: float
    reasons: tuple[str, ...]
    """For each tier that was tried, what it failed at."""
    log_lines: tuple[str, ...] = ()
    """What the engine wrote last, for operators only."""

    def message_for_clients(self, name: str) -> str:
        """The error of those who asked for the model: which tiers failed, and nothing of this host."""
        tiers = ", ".join(reason.partition(":")[0] for reason in self.reasons)
        return f"The model {name!r} could not be started (tried: {tiers})"

    def status(self) -> dict[str, Any]:
        """For `/admin/status`."""
        return {
            "instance": self.instance,
            "found": self.found.label,
            "at_unix_s": self.at_unix_s,
            "reasons": [*self.reasons],
            "log_lines": [*self.log_lines],
        }
