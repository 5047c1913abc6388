"""The Prometheus registry and every metric in it.

Labels are bounded: `model` is a configured model's key (or "unknown"), `tier`, `state` and `stage` are words of this
project. Each `Metrics` has a registry of its own, so that two proxies in one process do not meet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN_MODEL = "unknown"

_SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    320.0,
)


class Metrics:
    """All metrics of one proxy."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "warmpool_requests",
            "Requests answered, by model and HTTP status.",
            ["model", "status"],
            registry=r,
        )
        self.ttft = Histogram(
            "warmpool_ttft_seconds",
            "From a request's arrival to the first byte of the engine's answer, by the tier the request found.",
            ["model", "tier"],
            buckets=_SECONDS,
            registry=r,
        )
        self.wake = Histogram(
            "warmpool_wake_seconds",
            'Stages of bringing an instance to ready, by the tier it was woken from; stage "total" is the whole.',
            ["model", "tier", "stage"],
            buckets=_SECONDS,
            registry=r,
        )
        self.wake_failures = Counter(
            "warmpool_wake_failures",
            "Rungs that failed to wake, by model and tier.",
            ["model", "tier"],
            registry=r,
        )
        self.step_downs = Counter(
            "warmpool_step_downs",
            "Steps down, by model, tier reached and reason.",
            ["model", "tier", "reason"],
            registry=r,
        )
        self.engine_exits = Counter(
            "warmpool_engine_exits", "Engines that ended without being asked to.", ["model"], registry=r
        )
        self.quarantines = Counter(
            "warmpool_quarantined_checkpoints", "Checkpoints set aside after failing twice.", ["model"], registry=r
        )
        self.instances = Gauge("warmpool_instances", "Instances by state.", ["model", "state"], registry=r)
        self.queue_depth = Gauge("warmpool_queue_depth", "Requests waiting for an instance.", ["model"], registry=r)
        self.leases = Gauge("warmpool_leases", "Requests that an instance is working on.", ["model"], registry=r)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def ttft_summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Model → tier found → `count`, `mean_s`, `p50_s` and `p95_s` of the time to the first byte, since the start.

        Quantiles are interpolated within the histogram's buckets, as Prometheus does it.
        """
        buckets: dict[tuple[str, str], list[tuple[float, float]]] = {}
        sums: dict[tuple[str, str], float] = {}
        for family in self.ttft.collect():
            for sample in family.samples:
                key = (sample.labels["model"], sample.labels["tier"])
                if sample.name.endswith("_bucket"):
                    buckets.setdefault(key, []).append((float(sample.labels["le"]), sample.value))
                elif sample.name.endswith("_sum"):
                    sums[key] = sample.value
        summary: dict[str, dict[str, dict[str, Any]]] = {}
        for (model, tier), counts in buckets.items():
            count = counts[-1][1]
            if count:
                summary.setdefault(model, {})[tier] = {
                    "count": int(count),
                    "mean_s": round(sums[model, tier] / count, 6),
                    "p50_s": round(quantile(counts, 0.5), 6),
                    "p95_s": round(quantile(counts, 0.95), 6),
                }
        return summary


def quantile(counts: Sequence[tuple[float, float]], q: float) -> float:
    """The `q`-quantile of a histogram given as (upper bound, cumulative count), the last bound infinite.

    Linear within a bucket; the largest finite bound where it lies beyond.
    """
    rank = q * counts[-1][1]
    below_bound, below_count = 0.0, 0.0
    for bound, count in counts:
        if count >= rank and count > below_count:
            if math.isinf(bound):
                return below_bound
            return below_bound + (bound - below_bound) * (rank - below_count) / (count - below_count)
        below_bound, below_count = bound, count
    return below_bound
