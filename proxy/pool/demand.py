"""How much a model is asked for at present: a count of requests that fades within minutes."""

from __future__ import annotations

import math
from typing import Final

FADES_S: Final = 300.0
"""After so long a request counts 1/e."""


class Demand:
    """All times are readings of one clock, in seconds."""

    __slots__ = ("_at", "_count")

    def __init__(self) -> None:
        self._count, self._at = 0.0, 0.0

    def note(self, now: float, count: int = 1) -> None:
        """So many requests more."""
        self._count = self._count * math.exp((self._at - now) / FADES_S) + count
        self._at = now

    def count(self, now: float) -> float:
        """Requests, the older the less."""
        return self._count * math.exp((self._at - now) / FADES_S) if self._count else 0.0

    def worth_s(self, back_s: float) -> float:
        """How much later its instances count as last used, where bringing one back takes `back_s`.

        What is lost with an instance is what it takes to bring it back, times how likely that is soon. All counts fade
        alike, so that the order of these products does not change while nobody asks: their logarithm is a time.
        """
        return FADES_S * (math.log1p(self._count) + math.log1p(back_s))
