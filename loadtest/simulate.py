"""`simulate`: warmpool's own scheduling over a trace, in virtual time, one policy beside the other.

Everything is a function of the trace, the figures of the engines and a seed: the same command prints the same numbers.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from loadtest.simulate_engine import Speed
from loadtest.simulate_pool import Ask, Ladder, Served, SimulatedPool
from loadtest.stats import percentile
from loadtest.trace import Row, TraceError
from proxy.pool.model_view import PolicyName, Rules
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SPEEDS: Final[Mapping[str, Speed]] = {
    "1.5B": Speed(step_s=0.003, stream_s=0.00002, prompt_tokens_per_s=100_000),
    "7B": Speed(step_s=0.007, stream_s=0.00003, prompt_tokens_per_s=30_000),
    "engine": Speed(step_s=0.01, stream_s=0.0, prompt_tokens_per_s=1e6, shares=False),
}
"""Tokens of models of that size on an H200; `engine`: the load-test engine."""

LADDERS: Final[Mapping[str, Ladder]] = {
    "1.5B": Ladder(
        {Tier.SLEEPING: 0.17, Tier.SUSPENDED: 0.45, Tier.CHECKPOINTED: 1.54, Tier.STOPPED: 65.0},
        {Tier.SLEEPING: 0.08, Tier.SUSPENDED: 0.5, Tier.CHECKPOINTED: 0.5, Tier.STOPPED: 0.5},
        pause_s=0.25,
        unpause_s=0.25,
    ),
    "7B": Ladder(
        {Tier.SLEEPING: 0.3, Tier.SUSPENDED: 0.77, Tier.CHECKPOINTED: 1.89, Tier.STOPPED: 115.0},
        {Tier.SLEEPING: 0.08, Tier.SUSPENDED: 0.8, Tier.CHECKPOINTED: 0.5, Tier.STOPPED: 0.5},
        pause_s=0.6,
        unpause_s=0.8,
    ),
    "engine": Ladder(
        {Tier.SLEEPING: 0.02, Tier.SUSPENDED: 0.05, Tier.CHECKPOINTED: 0.4, Tier.STOPPED: 2.4},
        {Tier.SLEEPING: 0.02, Tier.SUSPENDED: 0.05, Tier.CHECKPOINTED: 0.3, Tier.STOPPED: 0.3},
        pause_s=0.05,
        unpause_s=0.05,
    ),
}
"""What moves took on an H200 (docs/benchmarks.md), and of the load-test engine."""

TIMETABLE: Final[Mapping[Tier, float]] = {Tier.SLEEPING: 30.0, Tier.SUSPENDED: 120.0, Tier.CHECKPOINTED: 600.0}


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated, beside the policy."""

    models: int
    fits: int = 1
    """How many of them fit at once; they share the GPU's time."""
    speed: Speed = SPEEDS["7B"]
    ladder: Ladder = LADDERS["7B"]
    skew: float = 1.0
    seed: int = 0
    max_wait_s: float = 60.0
    timetable: Mapping[Tier, float] = field(default_factory=lambda: TIMETABLE)
    cold: bool = False
    """No engine was ever started; otherwise each has a checkpoint."""


def capacity_factor(rows: Sequence[Row], speed: Speed, share: float) -> float:
    """How many times as fast a trace has to come to be that share of what one full engine could serve."""
    work_s = sum(speed.work_s(row.prompt_tokens, row.tokens) for row in rows)
    if rows[-1].at_s <= 0:
        raise TraceError("the trace is a single moment: its load cannot be set")
    return share * rows[-1].at_s / work_s


def asks(rows: Sequence[Row], factor: float, scenario: Scenario) -> Iterator[tuple[str, Ask]]:
    """The requests, with their models: the trace's own, or drawn by Zipf's law with the seed."""
    names = [name for name, _ in Counter(row.model for row in rows if row.model).most_common()]
    keys = [f"model_{n}" for n in range(1, scenario.models + 1)]
    if names:
        if len(names) > len(keys):
            raise TraceError(f"the trace names {len(names)} models, {len(keys)} are simulated: --models {len(names)}")
        by_name = dict(zip(names, keys, strict=False))
        chosen = [by_name.get(row.model, keys[0]) for row in rows]
    else:
        weights = [1 / number**scenario.skew for number in range(1, len(keys) + 1)]
        chosen = random.Random(scenario.seed).choices(keys, weights=weights, k=len(rows))
    for row, key in zip(rows, chosen, strict=True):
        yield key, Ask(row.at_s / factor, max(1, row.prompt_tokens), max(1, row.tokens))


def simulate(rows: Sequence[Row], factor: float, scenario: Scenario, rules: Rules) -> dict[str, Any]:
    """Run one policy; what came out, in plain values."""
    limited = replace(rules, max_awake=scenario.fits)
    models = [
        Served(
            f"model_{n}", scenario.speed, scenario.ladder, scenario.timetable, scenario.max_wait_s, scenario.max_wait_s
        )
        for n in range(1, scenario.models + 1)
    ]
    pool = SimulatedPool(models, limited, cold=scenario.cold)
    pool.run(asks(rows, factor, scenario))
    return _report(pool, rows[-1].at_s / factor, rules)


def _report(pool: SimulatedPool, length_s: float, rules: Rules) -> dict[str, Any]:
    ttft, above, gaps = array("d"), array("d"), sorted(pool.gaps_s)
    by_model = {}
    for model in pool.models.values():
        tally = model.tally
        ttft.extend(tally.ttft_s)
        above.extend(tally.above_s)
        if tally.asked:
            by_model[model.key] = {
                "requests": tally.asked,
                "refused": tally.refused,
                "warm": tally.warm / tally.asked,
                **_percentiles("ttft", sorted(tally.ttft_s)),
            }
    tallies = [model.tally for model in pool.models.values()]
    asked = sum(t.asked for t in tallies)
    took_s = max(length_s, pool.now)
    return {
        "policy": rules.policy,
        "ttl_s": rules.ttl_s if rules.policy == "lru" else None,
        "quantum_s": rules.quantum_s if rules.policy == "turns" else None,
        "requests": asked,
        "refused": sum(t.refused for t in tallies),
        **_percentiles("ttft", sorted(ttft)),
        **_percentiles("above_unloaded", sorted(above)),
        "longest_wait_s": max(t.longest_wait_s for t in tallies),
        "warm": sum(t.warm for t in tallies) / max(1, asked),
        "switches": pool.switches,
        "wakes": pool.wakes,
        "pauses": pool.pauses,
        "gap_p50_s": percentile(gaps, 50) if gaps else 0.0,
        "gap_p99_s": percentile(gaps, 99) if gaps else 0.0,
        "longest_pause_s": gaps[-1] if gaps else 0.0,
        "gpu_busy": sum(e.batch.busy_s for m in pool.models.values() for e in m.engines.values()) / took_s,
        "tokens_per_s": sum(t.tokens for t in tallies) / took_s,
        "decisions": pool.decisions,
        "took_s": took_s,
        "by_model": by_model,
    }


def _percentiles(name: str, ordered: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{p}_s": percentile(ordered, p) if ordered else 0.0 for p in (50, 90, 99)}


def policies(names: Sequence[PolicyName], ttls_s: Sequence[float], quantum_s: float) -> list[Rules]:
    """The rules to compare: `lru` once for each time to live."""
    found = []
    for name in names:
        if name == "lru":
            found += [Rules("lru", ttl_s=ttl_s) for ttl_s in ttls_s]
        else:
            found.append(Rules(name, quantum_s=quantum_s))
    return found
