"""A wake that is under way: what it has done so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxy.telemetry.stages import Stages
    from proxy.tiers import Tier


@dataclass(frozen=True, slots=True)
class WakeProgress:
    """Its stages, and the tiers that did not work."""

    found: Tier
    began: float
    """By the pool's clock."""
    stages: Stages
    failures: list[str] = field(default_factory=list)
    """For each tier that was tried in vain, what it failed at."""
    at_unix_s: float = field(default_factory=time.time)

    def status(self) -> dict[str, Any]:
        """For `/admin/status`; nothing in it changes by the clock alone."""
        return {
            "found": self.found.label,
            "began_unix_s": self.at_unix_s,
            "failed": [*self.failures],
            "stages": [
                {"stage": name, "start_s": round(at, 6), "seconds": None if took is None else round(took, 6)}
                for name, at, took in self.stages.so_far()
            ],
        }
