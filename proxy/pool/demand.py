"""How much a model is asked for at present: a count of requests that fades within minutes, and how long they are."""

from __future__ import annotations

import math
from typing import Final

FADES_S: Final = 300.0
"""After so long a request counts 1/e."""
_SIZES: Final = 100
"""The usual size is about that of so many requests."""


class Demand:
    """All times are readings of one clock, in seconds."""

    __slots__ = ("_at", "_count", "_sizes", "usual_size")

    def __init__(self) -> None:
        self._count, self._at = 0.0, 0.0
        self._sizes = 0
        self.usual_size = 0.0
        """The mean of late."""

    def note_size(self, size: float) -> None:
        """How long a request is, in whatever unit; 0 where that is not known."""
        if size > 0:
            self._sizes = min(_SIZES, self._sizes + 1)
            self.usual_size += (size - self.usual_size) / self._sizes

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
