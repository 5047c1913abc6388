"""Where the time of a request went: its time to the first token, divided among the stages that the proxy names.

The parts of a request add up to its time to the first token. One that joined a wake under way waited for the end of it
only: the stages that were over before it came are not counted for it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from loadtest.results import TTFT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_WITHIN: Final = {"restore": ("podman", "criu", "cuda")}
"""Stages that `server-timing` names beside the one they are part of."""
ORDER: Final = (
    "client", "queue", "evict", "unarchive", "start", "load", "warmup", "resume", "podman", "criu", "cuda", "restore",
    "health", "wake_up", "load_weights", "reload_weights", "canary", "wake", "first token",
)  # fmt: skip
LABELS: Final = {
    "client": "the client: sent late, connecting",
    "queue": "waiting for room",
    "evict": "making room",
    "unarchive": "unpacking the archive",
    "start": "starting the container",
    "load": "loading the model",
    "warmup": "warming up",
    "resume": "resuming",
    "podman": "podman",
    "criu": "CRIU",
    "cuda": "CUDA",
    "restore": "else of the restore",
    "health": "until healthy",
    "wake_up": "wake_up",
    "load_weights": "weights back, from their copy",
    "reload_weights": "weights back",
    "canary": "the known answer",
    "wake": "else of the wake",
    "first token": "engine and proxy, to the first token",
}


def stages(given: Mapping[str, float]) -> list[tuple[str, float]]:
    """The stages of a wake one after the other, in seconds, without those that contain others."""
    found: list[tuple[str, float]] = []
    for name, seconds in given.items():
        if name in ("queue", "wake") or any(name in inner for inner in _WITHIN.values()):
            continue
        inner = [(n, given[n]) for n in _WITHIN.get(name, ()) if n in given]
        found += inner
        found.append((name, max(0.0, seconds - sum(s for _, s in inner))))
    if "wake" in given:
        found.append(("wake", max(0.0, given["wake"] - sum(s for _, s in found))))
    return found


def parts(sample: Mapping[str, Any], first_token_s: float) -> dict[str, float]:
    """Part → seconds of a request's time to the first token; `first_token_s` is that of a ready engine."""
    values, given = sample["values"], sample.get("stages_s", {})
    left = values[TTFT]
    made = {"client": min(left, values.get("connect_s", values.get("late_s", 0.0)))}
    left -= made["client"]
    made["queue"] = min(left, given.get("queue", 0.0))
    left -= made["queue"]
    if "wake" in given:
        waited_s = max(0.0, left - first_token_s) if given["wake"] > left - first_token_s else given["wake"]
        over_s = max(0.0, given["wake"] - waited_s)
        for name, seconds in stages(given):
            mine = max(0.0, seconds - over_s)
            over_s = max(0.0, over_s - seconds)
            made[name] = made.get(name, 0.0) + min(left, mine)
            left -= min(left, mine)
    made["first token"] = left
    return {name: made[name] for name in (*ORDER, *(n for n in made if n not in ORDER)) if made.get(name, 0.0) > 0}


def ready_s(samples: Iterable[Mapping[str, Any]]) -> float:
    """The median time to the first token, less client and queue, of requests that waited for no wake; 0 without any."""
    found = [
        s["values"][TTFT] - s["values"].get("connect_s", 0.0) - s.get("stages_s", {}).get("queue", 0.0)
        for s in samples
        if TTFT in s["values"] and "wake" not in s.get("stages_s", {})
    ]
    return max(0.0, statistics.median(found)) if found else 0.0


def where(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Tier found → part → seconds, all its requests together."""
    answered = [s for s in samples if TTFT in s["values"]]
    first_token_s = ready_s(answered)
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for sample in answered:
        for name, seconds in parts(sample, first_token_s).items():
            total[sample.get("tier", "")][name] += seconds
    return {tier: dict(found) for tier, found in total.items()}


def median_stages(samples: Iterable[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """A typical wake: the median of each part, in order; of the requests that waited for a whole one."""
    answered = [s for s in samples if TTFT in s["values"]]
    first_token_s = ready_s(answered)
    found: dict[str, list[float]] = defaultdict(list)
    for sample in answered:
        for name, seconds in parts(sample, first_token_s).items():
            found[name].append(seconds)
    names = [*ORDER, *(name for name in found if name not in ORDER)]
    return [(name, statistics.median(found[name])) for name in names if name in found]
