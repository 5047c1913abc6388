"""What waking costs, as measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPICAL_S: Final[Mapping[Tier, float]] = {
    Tier.READY: 0.0,
    Tier.SLEEPING: 0.1,
    Tier.SUSPENDED: 0.5,
    Tier.CHECKPOINTED: 2.5,
    Tier.ARCHIVED: 10.0,
    Tier.STOPPED: 100.0,
}
"""What a wake costs before it was measured here: 1.5B parameters on an H100, see docs/architecture.md."""

TYPICAL_PAUSE_S: Final = 0.35
TYPICAL_UNPAUSE_S: Final = 0.25
"""The same for pauses, with 1 GiB of KV cache."""


class Costs:
    """What waking from each tier took, per model: an exponential average that follows changes within a few wakes."""

    _WEIGHT: Final = 0.3

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, Tier], float] = {}
        self._pauses: dict[tuple[str, str], float] = {}

    def record(self, model: str, tier: Tier, seconds: float) -> None:
        """Take a measured wake into account."""
        self._seconds[model, tier] = self._average(self._seconds.get((model, tier)), seconds)

    def record_pause(self, model: str, seconds: float) -> None:
        """What it took to have an instance's requests stand still."""
        self._pauses[model, "off"] = self._average(self._pauses.get((model, "off")), seconds)

    def record_unpause(self, model: str, seconds: float) -> None:
        """What it took to have them go on."""
        self._pauses[model, "back"] = self._average(self._pauses.get((model, "back")), seconds)

    def pause_s(self, model: str) -> float:
        """The expected time that a pause takes to begin."""
        return self._pauses.get((model, "off"), TYPICAL_PAUSE_S)

    def unpause_s(self, model: str) -> float:
        """The expected time that it takes to end."""
        return self._pauses.get((model, "back"), TYPICAL_UNPAUSE_S)

    def _average(self, old: float | None, seconds: float) -> float:
        return seconds if old is None else old + self._WEIGHT * (seconds - old)

    def by_tier(self, model: str) -> Mapping[Tier, float]:
        """The expected time to wake from each tier."""
        return {tier: self.estimate_s(model, tier) for tier in TYPICAL_S}

    def estimate_s(self, model: str, tier: Tier) -> float:
        """The expected time to wake from `tier`, in seconds; a typical one before any was measured."""
        return self._seconds.get((model, tier), TYPICAL_S[tier])
