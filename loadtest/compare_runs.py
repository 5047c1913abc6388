"""`compare`: two files of results, the ratio of their medians, and whether it got worse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadtest import stats
from loadtest.results import TTFT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.results import Result

SHOWN = (TTFT, "total_s", "create_s", "image_bytes", "error_s")
"""What is compared where both have it; more of it is worse."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measurement of one series in both files."""

    series: str
    name: str
    base: stats.Summary
    other: stats.Summary
    ratio: stats.Ratio

    def regressed(self, bound: float) -> bool:
        """Worse beyond the bound, and not by chance: the whole interval of the ratio is above 1, of enough samples."""
        return self.enough and self.ratio.ratio > bound and self.ratio.low > 1

    @property
    def enough(self) -> bool:
        """Whether both have as many samples as a median should have."""
        return self.base.enough and self.other.enough

    def verdict(self, bound: float) -> str:
        """In a word."""
        if not self.enough:
            return f"fewer than {stats.FEWEST} samples"
        if self.regressed(bound):
            return "regression"
        if self.ratio.low > 1:
            return "slower, within the bound"
        if self.ratio.high < 1:
            return "faster"
        return "no clear difference"


def compare(base: Result, other: Result) -> Iterator[Comparison]:
    """All that both have."""
    others, bases = other.summaries(), base.summaries()
    for series, names in bases.items():
        for name, summary in names.items():
            if name not in SHOWN or name not in others.get(series, {}):
                continue
            ratio = stats.ratio(base.values(series, name), other.values(series, name))
            if ratio is not None:
                yield Comparison(series, name, summary, others[series][name], ratio)


def differences(base: Result, other: Result) -> list[str]:
    """What else is not the same, so that nobody compares two machines without knowing."""
    found = []
    for what in ("machine", "versions", "options"):
        mine, theirs = getattr(base, what), getattr(other, what)
        for name in dict.fromkeys([*mine, *theirs]):
            if name in ("load when it began", "out") or mine.get(name) == theirs.get(name):
                continue
            found.append(f"{name}: {mine.get(name, 'none')} | {theirs.get(name, 'none')}")
    return found
