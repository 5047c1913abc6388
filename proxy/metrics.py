"""The Prometheus registry and every metric in it.

Labels are bounded: `model` is a configured model's key (or "unknown"), `tier`, `state`, `stage` and `reason` are
words of this project. Each `Metrics` has a registry of its own, so that two proxies in one process do not meet.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from proxy import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prometheus_client.metrics_core import Metric

UNKNOWN_MODEL = "unknown"
REFUSALS = (
    "key", "model", "limit", "forbidden", "body", "malformed", "head", "slow_headers", "slow_body", "stalled",
    "connections", "connections_per_address",
)  # fmt: skip
"""Why a request or a connection is refused at the edge; docs/api.md explains them."""
RECENT = 256
"""How many times to the first byte are kept for each model and tier, beside the histogram."""

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


class _Refresh(Collector):
    """Collected first, and has nothing to tell: it brings the gauges up to date that nobody sets in between."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []

    def collect(self) -> Iterable[Metric]:
        for callback in self.callbacks:
            callback()
        return ()


class Metrics:
    """All metrics of one proxy."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # Looking a child up by its labels takes longer than counting.
        self._requests: dict[tuple[str, int], Counter] = {}
        self._ttft: dict[tuple[str, str], Histogram] = {}
        self._refresh = _Refresh()
        self.registry.register(self._refresh)
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
        self._recent: dict[tuple[str, str], _Recent] = {}
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
        self.gpu_memory = Gauge(
            "warmpool_gpu_memory_bytes",
            "Memory of a GPU (index), in bytes: total, used, foreign (held by none of ours), charged (held by ours).",
            ["gpu", "kind"],
            registry=r,
        )
        self.instance_gpu = Gauge(
            "warmpool_instance_gpu_bytes",
            "GPU memory that the instances of a model hold, in bytes, over all GPUs.",
            ["model"],
            registry=r,
        )
        self.gpu_leaks = Counter(
            "warmpool_gpu_leaks", "Instances that kept GPU memory which should have come free.", ["model"], registry=r
        )
        self.refused = Counter(
            "warmpool_refused", "Requests and connections refused at the edge, by reason.", ["reason"], registry=r
        )
        for reason in REFUSALS:
            self.refused.labels(reason)
        self.instances = Gauge("warmpool_instances", "Instances by state.", ["model", "state"], registry=r)
        self.queue_depth = Gauge("warmpool_queue_depth", "Requests waiting for an instance.", ["model"], registry=r)
        self.leases = Gauge("warmpool_leases", "Requests that an instance is working on.", ["model"], registry=r)

        self.checkpoint_dir_size = Gauge(
            "warmpool_checkpoint_dir_size_bytes", "Size of the filesystem that checkpoints are on.", registry=r
        )
        self.checkpoint_dir_free = Gauge(
            "warmpool_checkpoint_dir_free_bytes", "Free space on it; the reserve is part of it.", registry=r
        )
        Info("warmpool_build", "The running version.", registry=r).info({"version": __version__})
        ProcessCollector(registry=r)

    def expect(self, models: Iterable[str], tiers: Iterable[str]) -> None:
        """Let counters of what seldom happens begin at 0, so that the first time is seen as an increase."""
        tiers = [*tiers]
        for model in models:
            self.engine_exits.labels(model)
            self.quarantines.labels(model)
            for tier in tiers:
                self.wake_failures.labels(model, tier)

    def forget(self, model: str) -> None:
        """Let go of the gauges and recent times of a model that is gone; what was counted stays."""
        self._recent = {key: recent for key, recent in self._recent.items() if key[0] != model}
        for gauge in (self.instances, self.queue_depth, self.leases, self.instance_gpu):
            for sample in [s for family in gauge.collect() for s in family.samples]:
                if sample.labels["model"] == model:
                    gauge.remove(*sample.labels.values())

    def count_request(self, model: str, status: int) -> None:
        """One more request answered."""
        child = self._requests.get((model, status))
        if child is None:
            child = self._requests[model, status] = self.requests.labels(model, str(status))
        child.inc()

    def observe_ttft(self, model: str, tier: str, seconds: float) -> None:
        """Note the time from a request's arrival to the first byte of its answer."""
        child = self._ttft.get((model, tier))
        if child is None:
            child = self._ttft[model, tier] = self.ttft.labels(model, tier)
        child.observe(seconds)
        recent = self._recent.get((model, tier))
        if recent is None:
            recent = self._recent[model, tier] = _Recent()
        recent.count += 1
        recent.seconds.append(seconds)

    def before_collecting(self, refresh: Callable[[], None]) -> None:
        """Have `refresh` called each time the metrics are read, before they are."""
        self._refresh.callbacks.append(refresh)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def ttft_summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Model → tier found → `count` of all, and `p50_s`, `p95_s` and `max_s` of the last RECENT times."""
        summary: dict[str, dict[str, dict[str, Any]]] = {}
        for (model, tier), recent in self._recent.items():
            ordered = sorted(recent.seconds)
            summary.setdefault(model, {})[tier] = {
                "count": recent.count,
                "p50_s": round(nearest_rank(ordered, 0.5), 6),
                "p95_s": round(nearest_rank(ordered, 0.95), 6),
                "max_s": round(ordered[-1], 6),
            }
        return summary


@dataclass(slots=True)
class _Recent:
    count: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))


def nearest_rank(ordered: Sequence[float], q: float) -> float:
    """The `q`-quantile of values in order: the smallest that a share of `q` does not exceed."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
