"""What no policy can beat: the least that the slowest hundredth of requests waits, and the fewest that are late.

A GPU that reads prompts at its best and does nothing else: no change from one model to another, no token of an answer.
It may leave out whichever requests it likes. Then the fewest are late by Moore and Hodgson's rule: take them in the
order of their deadlines, and whenever one would be late, leave out the longest so far.
"""

from __future__ import annotations

import heapq
from operator import itemgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.simulate_engine import Speed
    from loadtest.trace import Row

_CLOSE_S: Final = 0.01


def fewest_late(rows: Sequence[Row], factor: float, speed: Speed, limit_s: float) -> int:
    """How many get their first token more than `limit_s` later than from an engine of their own, at least."""
    jobs = sorted(((r.at_s / factor + speed.alone_s(r.prompt_tokens), r) for r in rows), key=itemgetter(0))
    late, until, taken = 0, 0.0, list[float]()
    for alone, row in jobs:
        at = row.at_s / factor
        if until <= at:
            # Those that come from now on are taken to be there already: that can only help.
            until, taken = at, []
        work_s = row.prompt_tokens * (1 / speed.prompt_tokens_per_s + speed.step_s / speed.chunk_tokens)
        until += work_s
        heapq.heappush(taken, -work_s)
        if until > alone + limit_s:
            until += heapq.heappop(taken)
            late += 1
    return late


def least_p99_s(rows: Sequence[Row], factor: float, speed: Speed) -> float:
    """What the slowest hundredth waits beyond an engine of its own, at least; in seconds."""
    low, high = 0.0, _CLOSE_S
    while fewest_late(rows, factor, speed, high) > len(rows) / 100:
        low, high = high, high * 2
    while high - low > _CLOSE_S:
        middle = (low + high) / 2
        if fewest_late(rows, factor, speed, middle) > len(rows) / 100:
            low = middle
        else:
            high = middle
    return high
