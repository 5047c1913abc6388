"""Engines' own metrics: read from what they say in Prometheus' text format, and passed on so that no counter goes back.

An engine that was restored from its checkpoint counts on from what it had when that was written, and one that was
started anew from 0. What it had counted before stays: the difference is added to everything that it says from then on,
to each bucket of its histograms too. What an engine says is not trusted: names, labels and size have bounds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MOST_BYTES: Final = 4 << 20
_MOST_SERIES: Final = 5_000
_LONGEST_LINE: Final = 4096
_LONGEST_HELP: Final = 500
_LABEL: Final = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
OWN_NAMES: Final = ("warmpool_", "process_")
"""What warmpool itself says; no engine may."""
_ADDED: Final = ("model", "instance")
"""Labels that warmpool adds; an engine's own of these names are renamed, as Prometheus does."""
_ACCUMULATED: Final = {
    "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count"),
}  # fmt: skip
"""The samples of a type that only grow. A summary's quantiles are left out."""

Series = tuple[str, str, tuple[tuple[str, str], ...]]
"""Its family, its name, and its labels in order."""


@dataclass(frozen=True, slots=True)
class Family:
    """What is said of a metric."""

    kind: str
    documentation: str


@dataclass(slots=True)
class Scrape:
    """What an engine said at one time."""

    families: dict[str, Family] = field(default_factory=dict)
    accumulated: dict[Series, float] = field(default_factory=dict)
    gauges: dict[Series, float] = field(default_factory=dict)


def parse(body: bytes, prefixes: Sequence[str]) -> Scrape:
    """What the metrics are whose names have one of these beginnings. Raises ValueError for what is none of it."""
    if len(body) >= MOST_BYTES:
        raise ValueError(f"over {MOST_BYTES} bytes")
    lines = [line for line in body.decode("utf-8").split("\n") if _is_wanted(line, prefixes)]
    if len(lines) > 2 * _MOST_SERIES or any(len(line) > _LONGEST_LINE for line in lines):
        raise ValueError(f"over {2 * _MOST_SERIES} lines, or a longer one than {_LONGEST_LINE}")
    found = Scrape()
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            _add(found, family)
    except Exception as error:  # the parser raises what comes, and an engine may write anything
        raise ValueError(f"not Prometheus' text format: {type(error).__name__}") from error
    if len(found.accumulated) + len(found.gauges) > _MOST_SERIES:
        raise ValueError(f"over {_MOST_SERIES} series")
    return found


def _is_wanted(line: str, prefixes: Sequence[str]) -> bool:
    name = line[7:] if line.startswith(("# TYPE ", "# HELP ")) else line
    return name.startswith(tuple(prefixes)) and not name.startswith(OWN_NAMES)


def _add(found: Scrape, family: Metric) -> None:
    # When a counter began is of no use where it is put together of several.
    if family.name.endswith("_created") or not _NAME.fullmatch(family.name):
        return
    suffixes = _ACCUMULATED.get(family.type)
    kind = family.type if suffixes is not None else "gauge"
    found.families[family.name] = Family(kind, family.documentation[:_LONGEST_HELP])
    for sample in family.samples:
        labels = _labels(sample.labels)
        value = float(sample.value)
        if labels is None or not math.isfinite(value):
            continue
        series = (family.name, sample.name, labels)
        if suffixes is None:
            if sample.name == family.name:
                found.gauges[series] = value
        elif value >= 0 and any(sample.name == family.name + suffix for suffix in suffixes):
            found.accumulated[series] = value


def _labels(said: Mapping[str, str]) -> tuple[tuple[str, str], ...] | None:
    if not all(_LABEL.fullmatch(name) for name in said):
        return None
    renamed = {f"exported_{name}" if name in _ADDED else name: value for name, value in said.items()}
    return tuple(sorted(renamed.items()))


class EngineCounts:
    """What one instance has counted, over all the engines that it has had."""

    def __init__(self) -> None:
        self._run: int | None = None
        self._last: Mapping[Series, float] = {}
        """As its engine said it last."""
        self._before: dict[Series, float] = {}
        """What is added to that."""
        self._families: dict[str, Family] = {}
        self._gauges: Mapping[Series, float] = {}
        self.shown: tuple[Mapping[str, Family], Mapping[Series, float]] = {}, {}
        """Another object whenever it changed: it is read by another thread."""

    def last_of(self, run: int) -> dict[Series, float] | None:
        """What it said last, if it is this engine that said it."""
        return dict(self._last) if self._run == run else None

    def take(self, run: int, scrape: Scrape, began_with: Mapping[Series, float]) -> None:
        """What it says now; `run` is another number for another engine, that came to be with so much counted."""
        now, before = scrape.accumulated, self._before
        if run != self._run:
            self._run = run
            before = self._sums()
            for series, value in began_with.items():
                # What was counted when its checkpoint was written is counted already, or another instance's.
                before[series] = before.get(series, 0.0) - min(value, now.get(series, 0.0))
        else:
            for series, value in self._last.items():
                if series not in now or now[series] < value:  # it was started anew by itself
                    before[series] = before.get(series, 0.0) + value
        if len(before) > 2 * _MOST_SERIES:  # one that makes up labels: what it says no more is forgotten
            before = {series: value for series, value in before.items() if series in now}
            self._families = {}
        self._before, self._last, self._gauges = before, now, scrape.gauges
        self._families.update(scrape.families)
        self._show()

    def stands_still(self) -> None:
        """Its engine says nothing for now: what it has counted stays, how it was is not true any more."""
        if self._gauges:
            self._gauges = {}
            self._show()

    def _sums(self) -> dict[Series, float]:
        sums = {series: value + self._before.get(series, 0.0) for series, value in self._last.items()}
        sums |= {series: value for series, value in self._before.items() if series not in sums}
        # To Prometheus the last digit of a float that is less is an engine that counted all of it anew.
        shown = self.shown[1]
        return {series: max(value, shown.get(series, 0.0)) for series, value in sums.items()}

    def _show(self) -> None:
        self.shown = dict(self._families), {**self._sums(), **self._gauges}


class EngineMetrics(Collector):
    """Those of all instances, by model and instance."""

    def __init__(self) -> None:
        self.instances: dict[tuple[str, str], EngineCounts] = {}
        """By the model's key and the instance's id."""

    def of(self, model: str, instance: str) -> EngineCounts:
        """Those of an instance."""
        return self.instances.setdefault((model, instance), EngineCounts())

    def keep_only(self, models: Iterable[str]) -> None:
        """Forget those of other models."""
        there = frozenset(models)
        for key in [key for key in self.instances if key[0] not in there]:
            del self.instances[key]

    def collect(self) -> Iterable[Metric]:
        """A family for each name; an engine's that says that one is something else is left out."""
        found: dict[str, Metric] = {}
        written: dict[str, str] = {}
        for (model, instance), counts in [*self.instances.items()]:
            families, series = counts.shown
            for (name, sample, labels), value in series.items():
                family = families[name]
                # As the text has it, where two of a name cannot be read.
                if written.setdefault(f"{name}_total" if family.kind == "counter" else name, name) != name:
                    continue
                metric = found.get(name)
                if metric is None:
                    metric = found[name] = Metric(name, family.documentation, family.kind)
                if metric.type == family.kind:
                    metric.add_sample(sample, {**dict(labels), "model": model, "instance": instance}, value)
        return found.values()
