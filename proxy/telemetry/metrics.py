"""The Prometheus registry and every metric in it.

Labels are bounded: `model` is a configured model's key (or "unknown"), `tier`, `state`, `stage` and `reason` are
words of this project. Each `Metrics` has a registry of its own, so that two proxies in one process do not meet.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from proxy import __version__
from proxy.host.turns import in_turns
from proxy.telemetry.engine_metrics import EngineMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

UNKNOWN_MODEL = "unknown"
REFUSALS = (
    "key", "model", "limit", "budget", "forbidden", "body", "malformed", "head", "slow_headers", "slow_body", "stalled",
    "connections", "connections_per_address",
)  # fmt: skip
"""Why a request or a connection is refused at the edge; docs/api.md explains them."""
RECENT = 256
"""How many times to the first token are kept for each model and tier, beside the histogram."""

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


_TURN = 10
"""How many models, or times of one, are looked at in one turn of the event loop while the metrics are read."""


class _Whole(Collector):
    """All metrics, after everything was brought up to date that nobody sets in between."""

    def __init__(self, metrics: CollectorRegistry) -> None:
        self._metrics = metrics
        self.refreshes: list[Callable[[], Iterable[None]]] = []

    def collect(self) -> Iterable[Metric]:
        for refresh in self.refreshes:
            for _ in refresh():
                pass
        yield from self._metrics.collect()


_STALLS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """All metrics of one proxy."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        r = CollectorRegistry()
        self._whole = _Whole(r)
        self._as_they_are = r
        self.registry = CollectorRegistry()
        """For whoever reads them in one piece; `scrape` does not hold the event loop."""
        self.registry.register(self._whole)
        # Requests have no time for locks and labels: what they count is given to the registry when it is read.
        self._counted: dict[tuple[str, int], int] = {}
        self._first_tokens: dict[tuple[str, str], _Times] = {}
        self._first_bytes: dict[tuple[str, str], _Times] = {}
        self._before_reading: list[Callable[[], None]] = []
        self.before_collecting(self._give_counts)
        self.requests = Counter(
            "warmpool_requests",
            "Requests answered, by model and HTTP status.",
            ["model", "status"],
            registry=r,
        )
        r.register(
            _TimesByTier(
                "warmpool_ttft_seconds",
                "Of answers that are streams: from the request's arrival to the first token, by the tier it found.",
                self._first_tokens,
            )
        )
        r.register(
            _TimesByTier(
                "warmpool_time_to_first_byte_seconds",
                "From a request's arrival to the first byte of the engine's answer, by the tier it found.",
                self._first_bytes,
            )
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
            "Tiers that failed to wake, by model and tier.",
            ["model", "tier"],
            registry=r,
        )
        self.drills = Counter(
            "warmpool_drills",
            "Idle checkpoints that were restored and asked for their canary, by model and result: passed, failed.",
            ["model", "result"],
            registry=r,
        )
        self.pauses = Counter(
            "warmpool_pauses",
            "Instances whose running requests were made to stand still.",
            ["model"],
            registry=r,
        )
        self.pause = Histogram(
            "warmpool_pause_seconds",
            "How long it took until they stood still and the GPU's memory was free.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.unpause = Histogram(
            "warmpool_unpause_seconds",
            "How long it took until they went on.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.paused = Histogram(
            "warmpool_paused_seconds",
            "How long they stood still.",
            ["model"],
            buckets=_SECONDS,
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
        self.engine_stalls = Counter(
            "warmpool_engine_stalls", "Engines that stood still with requests and were replaced.", ["model"], registry=r
        )
        self.quarantines = Counter(
            "warmpool_quarantined_checkpoints",
            "Checkpoints set aside: damaged, or evidence against them twice in a row.",
            ["model"],
            registry=r,
        )
        self.overdue = Counter(
            "warmpool_overdue_operations",
            "Operations outside of warmpool, as of podman, that gave no result in their time.",
            ["operation"],
            registry=r,
        )
        self.hanging = Gauge(
            "warmpool_hanging_operations",
            "Overdue operations that did not end when they were given up, and hang still.",
            ["operation"],
            registry=r,
        )
        self.written_off = Gauge(
            "warmpool_written_off_instances",
            "Instances that could not be ended in time and are still to be cleaned up.",
            ["model"],
            registry=r,
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
        self.host_memory = Gauge(
            "warmpool_host_memory_bytes",
            "Memory of the host, or of the smallest cgroup that engines are in, in bytes: total, available.",
            ["kind"],
            registry=r,
        )
        self.instance_host = Gauge(
            "warmpool_instance_host_bytes",
            "Host memory that the processes of a model's instances hold, in bytes.",
            ["model"],
            registry=r,
        )
        self.gpu_leaks = Counter(
            "warmpool_gpu_leaks", "Instances that kept GPU memory which should have come free.", ["model"], registry=r
        )
        self.refused = Counter(
            "warmpool_refused", "Requests and connections refused at the edge, by reason.", ["reason"], registry=r
        )
        self.fallbacks = Counter(
            "warmpool_fallbacks", "Requests that another model answered, by the model that was asked for.", ["model"],
            registry=r,
        )  # fmt: skip
        for reason in REFUSALS:
            self.refused.labels(reason)
        self.engines = EngineMetrics()
        """Engines' own."""
        r.register(self.engines)
        self.engine_scrape_failures = Counter(
            "warmpool_engine_scrape_failures",
            "Awake engines that did not give their own metrics when they were asked, or none that can be used.",
            ["model"],
            registry=r,
        )
        self.tokens = Counter(
            "warmpool_tokens",
            "Tokens by model, kind (prompt, completion; cached: of the prompt's) and key's name.",
            ["model", "kind", "key"],
            registry=r,
        )
        self.gpu_seconds = Counter(
            "warmpool_gpu_seconds",
            "Who had GPUs, for how long: busy, divided among the requests that ran, by key's name; or idle.",
            ["model", "kind", "key"],
            registry=r,
        )
        self.instances = Gauge("warmpool_instances", "Instances by state.", ["model", "state"], registry=r)
        self.queue_depth = Gauge("warmpool_queue_depth", "Requests waiting for an instance.", ["model"], registry=r)
        self.running_requests = Gauge(
            "warmpool_running_requests", "Requests that an instance is working on.", ["model"], registry=r
        )

        self.checkpoint_dir_size = Gauge(
            "warmpool_checkpoint_dir_size_bytes", "Size of the filesystem that checkpoints are on.", registry=r
        )
        self.checkpoint_dir_free = Gauge(
            "warmpool_checkpoint_dir_free_bytes", "Free space on it; the reserve is part of it.", registry=r
        )
        self.fleet_records = Counter(
            "warmpool_fleet_records",
            "What became of the records of other hosts: new, old, gap, forged, unreadable, newer_version, twice.",
            ["result"],
            registry=r,
        )
        self.fleet_forwarded = Counter(
            "warmpool_forwarded_requests",
            "Requests that were sent to another host: answered, refused (it would have had to wait too long), failed.",
            ["host", "outcome"],
            registry=r,
        )
        self.loop_stalls = Histogram(
            "warmpool_event_loop_stall_seconds",
            "By how much a timer of the event loop was late.",
            buckets=_STALLS_S,
            registry=r,
        )
        Info("warmpool_build", "The running version.", registry=r).info({"version": __version__})
        ProcessCollector(registry=r)

    def expect(self, models: Iterable[str], tiers: Iterable[str]) -> None:
        """Let counters of what seldom happens begin at 0, so that the first time is seen as an increase."""
        tiers = [*tiers]
        for model in models:
            self.engine_exits.labels(model)
            self.engine_stalls.labels(model)
            self.engine_scrape_failures.labels(model)
            self.quarantines.labels(model)
            for pauses in (self.pauses, self.pause, self.unpause, self.paused):
                pauses.labels(model)
            for tier in tiers:
                self.wake_failures.labels(model, tier)
            for result in ("passed", "failed"):
                self.drills.labels(model, result)

    def forget(self, model: str) -> None:
        """Let go of the gauges and recent times of a model that is gone; what was counted stays."""
        self._bring_up_to_date()
        for (name, _), times in [*self._first_tokens.items(), *self._first_bytes.items()]:
            if name == model:
                times.forget()
        for gauge in (self.instances, self.queue_depth, self.running_requests, self.instance_gpu, self.instance_host):
            for sample in [s for family in gauge.collect() for s in family.samples]:
                if sample.labels["model"] == model:
                    gauge.remove(*sample.labels.values())

    def count_request(self, model: str, status: int, count: int = 1) -> None:
        """So many requests more answered."""
        key = model, status
        self._counted[key] = self._counted.get(key, 0) + count

    def before_reading(self, bring: Callable[[], None]) -> None:
        """Have `bring` called before anything is read of what is counted: it counts what was not yet."""
        self._before_reading.append(bring)

    def _bring_up_to_date(self) -> None:
        for bring in self._before_reading:
            bring()

    def _give_counts(self) -> Iterable[None]:
        self._bring_up_to_date()
        counted, self._counted = self._counted, {}
        for (model, status), count in counted.items():
            self.requests.labels(model, str(status)).inc(count)
            yield

    def observe_first_bytes(self, model: str, tier: str, seconds: Sequence[float]) -> None:
        """Note times from a request's arrival to the first byte of its answer."""
        key = model, tier
        times = self._first_bytes.get(key)
        if times is None:
            times = self._first_bytes[key] = _Times()
        times.note(seconds)

    def observe_ttft(self, model: str, tier: str, seconds: float) -> None:
        """Note the time from a request's arrival to the first token of its stream."""
        key = model, tier
        times = self._first_tokens.get(key)
        if times is None:
            times = self._first_tokens[key] = _Times()
        times.note((seconds,))

    def before_collecting(self, refresh: Callable[[], Iterable[None]]) -> None:
        """Have `refresh` called each time the metrics are read, before they are; it yields after each small step."""
        self._whole.refreshes.append(refresh)

    async def scrape(self) -> bytes:
        """Everything in Prometheus' text format 0.0.4.

        The event loop is not held: metrics are brought up to date in turns, and written down by another thread.

        Python lets threads take turns too (5 ms, `sys.getswitchinterval`).
        """
        for refresh in self._whole.refreshes:
            async for _ in in_turns(refresh(), _TURN):
                pass
        return await asyncio.to_thread(generate_latest, self._as_they_are)

    async def ttft_summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Model → tier found → `count` of all, and `p50_s`, `p95_s` and `max_s` of the last RECENT times."""
        self._bring_up_to_date()
        summary: dict[str, dict[str, dict[str, Any]]] = {}
        async for (model, tier), times in in_turns([*self._first_tokens.items()], _TURN):
            if not times.recent:
                continue
            ordered = sorted(times.recent)
            summary.setdefault(model, {})[tier] = {
                "count": times.count - times.forgotten,
                "p50_s": round(nearest_rank(ordered, 0.5), 6),
                "p95_s": round(nearest_rank(ordered, 0.95), 6),
                "max_s": round(ordered[-1], 6),
            }
        return summary


@dataclass(slots=True)
class _Times:
    """Times to the first token or byte, for one model and tier."""

    count: int = 0
    forgotten: int = 0
    """Of them, those before the model was forgotten."""
    total_s: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    """How many up to each bound and above the one before, and above all."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def note(self, seconds: Sequence[float]) -> None:
        self.count += len(seconds)
        self.total_s += sum(seconds)
        self.recent.extend(seconds)
        ordered, at = sorted(seconds), 0
        for index, bound in enumerate(_SECONDS):
            end = bisect_right(ordered, bound, at)
            self.buckets[index] += end - at
            at = end
        self.buckets[-1] += len(ordered) - at

    def forget(self) -> None:
        self.forgotten = self.count
        self.recent.clear()


class _TimesByTier(Collector):
    """The times as a histogram."""

    def __init__(self, name: str, documentation: str, times: Mapping[tuple[str, str], _Times]) -> None:
        self._name = name
        self._documentation = documentation
        self._times = times

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model", "tier"])
        bounds = [*map(repr, _SECONDS), "+Inf"]
        for labels, times in [*self._times.items()]:  # a copy at once: it may be another thread that asks
            buckets = list(zip(bounds, accumulate(times.buckets), strict=True))
            family.add_metric(labels, buckets, times.total_s)
        return (family,)


def nearest_rank(ordered: Sequence[float], q: float) -> float:
    """The `q`-quantile of values in order: the smallest that a share of `q` does not exceed."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
