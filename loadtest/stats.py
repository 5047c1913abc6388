"""Medians with intervals, percentiles, outliers: what may be said of a set of measurements.

A median of a sample is itself uncertain. Its interval is the bootstrap's (Efron 1979): what the median would be in
samples drawn with replacement from this one, the middle 95 % of them. The k-th smallest of n such draws is the sample
at the k-th smallest of n uniform numbers, which has a beta distribution, so that each resample costs one random number
whatever the size, and nothing is approximated.
"""

from __future__ import annotations

import functools
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hdrh.histogram import HdrHistogram

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FEWEST: Final = 10
"""With fewer samples a median is shown, but with a warning."""
CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 10_000
_MOST_OUTLIERS: Final = 20
_US: Final = 1_000_000
_HDR_MOST_US: Final = 24 * 3600 * _US


@dataclass(frozen=True, slots=True)
class Summary:
    """A set of measurements in a few numbers; same unit as the measurements."""

    n: int
    median: float
    low: float
    """The interval of the median: with 95 % confidence it is between `low` and `high`."""
    high: float
    p95: float
    p99: float
    least: float
    most: float
    outliers: tuple[float, ...]
    """Beyond 1.5 interquartile ranges (Tukey's fences), largest first, at most 20; they count in all the rest."""
    outlier_count: int

    @property
    def enough(self) -> bool:
        """Whether there are as many samples as a median should have."""
        return self.n >= FEWEST


def summary(values: Iterable[float]) -> Summary | None:
    """Of at least one value; None of none."""
    ordered = tuple(sorted(values))
    return _summary(ordered) if ordered else None


@functools.lru_cache(maxsize=4096)
def _summary(ordered: tuple[float, ...]) -> Summary:
    # A report asks for the same one several times, and each is 20 ms of work.
    medians = sorted(_resampled_medians(ordered, random.Random(0)))
    low, high = _middle(medians)
    beyond = outliers(ordered)
    return Summary(
        len(ordered),
        statistics.median(ordered),
        low,
        high,
        percentile(ordered, 95),
        percentile(ordered, 99),
        ordered[0],
        ordered[-1],
        tuple(sorted(beyond, reverse=True)[:_MOST_OUTLIERS]),
        len(beyond),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` of all (nearest rank); `ordered` is sorted and not empty."""
    return ordered[max(0, min(len(ordered) - 1, -int(-percent * len(ordered) // 100) - 1))]


def outliers(ordered: Sequence[float]) -> list[float]:
    """Those beyond Tukey's fences; none of fewer than four values."""
    if len(ordered) < 4:
        return []
    first, _, third = statistics.quantiles(ordered, n=4, method="inclusive")
    reach = 1.5 * (third - first)
    return [value for value in ordered if not first - reach <= value <= third + reach]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How one set's median relates to another's."""

    ratio: float
    low: float
    high: float


def ratio(base: Sequence[float], other: Sequence[float]) -> Ratio | None:
    """`other`'s median by `base`'s, with its bootstrap interval; None where there is none."""
    if not base or not other or statistics.median(base) <= 0:
        return None
    draw = random.Random(0)
    bases = _resampled_medians(sorted(base), draw)
    others = _resampled_medians(sorted(other), draw)
    low, high = _middle(sorted(o / b for b, o in zip(bases, others, strict=True) if b > 0))
    return Ratio(statistics.median(other) / statistics.median(base), low, high)


def _resampled_medians(ordered: Sequence[float], draw: random.Random) -> list[float]:
    """The medians of samples drawn from a sorted one with replacement."""
    n = len(ordered)
    middle = (n + 1) // 2
    medians = []
    for _ in range(_RESAMPLES):
        at = draw.betavariate(middle, n + 1 - middle)
        lower = ordered[min(n - 1, int(at * n))]
        if n % 2:
            medians.append(lower)
            continue
        # The next one up is the least of the n/2 that are above.
        at += (1 - at) * (1 - draw.random() ** (2 / n))
        medians.append((lower + ordered[min(n - 1, int(at * n))]) / 2)
    return medians


def _middle(ordered: Sequence[float]) -> tuple[float, float]:
    outside = (1 - CONFIDENCE) / 2
    return ordered[int(outside * len(ordered))], ordered[min(len(ordered) - 1, int((1 - outside) * len(ordered)))]


class Histogram:
    """Times in an HdrHistogram: microseconds to a day, three digits."""

    def __init__(self) -> None:
        self._hdr: Any = HdrHistogram(1, _HDR_MOST_US, 3)

    def add(self, seconds: float) -> None:
        """Count a time; what is longer than a day counts as a day."""
        self._hdr.record_value(min(_HDR_MOST_US, max(1, round(seconds * _US))))

    def at_s(self, percent: float) -> float:
        """The time that `percent` of all are not above."""
        return float(self._hdr.get_value_at_percentile(percent)) / _US

    @property
    def count(self) -> int:
        """How many were added."""
        return int(self._hdr.get_total_count())

    def encoded(self) -> str:
        """In HdrHistogram's own compressed form (V2, base64), as its other tools read it."""
        return bytes(self._hdr.encode()).decode("ascii")


def histogram(values: Iterable[float]) -> Histogram:
    """Of times in seconds."""
    made = Histogram()
    for value in values:
        made.add(value)
    return made
