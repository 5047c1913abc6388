"""While serving: models whose engines are outdated get new ones in the background.

A container image's name that means another one, an edited file: the pool finds that out (`Pool.look_for_changes`), and
switches a model once a new engine has proven good (`Pool.renew`). Here is only when: the models used most first, one at
a time, where there is room with nobody stepping down, and less and less often where it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.pool.pool import Pool
    from proxy.pool.usage import Usage

log = logging.getLogger("warmpool.renewal")

LOOK_EVERY_S: Final = 60.0
_ROOM_EVERY_S: Final = 5.0
"""Between two looks for room."""
_RETRY_S: Final = (10.0, 60.0, 300.0, 1800.0)
"""Between two tries that failed, or gave way."""


async def keep_current(
    pool: Pool, usage: Usage, *, look_every_s: float = LOOK_EVERY_S, clock: Callable[[], float] = time.monotonic
) -> None:
    """Look for what is outdated, and renew it, for ever."""
    tries = _Tries(clock)
    look_at = clock()
    while True:
        if clock() >= look_at:
            await pool.look_for_changes()
            look_at = clock() + look_every_s
        pool.changed.clear()
        outdated = pool.outdated()
        tries.forget_unless(outdated)
        rank = {key: place for place, key in enumerate(usage.ranking())}
        for key in sorted(outdated, key=lambda k: rank.get(k, len(rank))):
            await _renew(pool, key, outdated[key], tries)
        limit_s = max(0.0, look_at - clock())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(limit_s, _ROOM_EVERY_S) if pool.outdated() else limit_s):
                await pool.changed.wait()


async def _renew(pool: Pool, key: str, reason: str, tries: _Tries) -> None:
    if pool.outdated().get(key) != reason or not tries.due(key, reason) or not await pool.room_beside(key):
        return
    if not await pool.renew(key):
        tries.failed(key, reason)


class _Tries:
    """When to try again what failed; another change is another thing to try."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failed: dict[tuple[str, str], tuple[int, float]] = {}

    def due(self, key: str, reason: str) -> bool:
        return self._clock() >= self._failed.get((key, reason), (0, 0.0))[1]

    def failed(self, key: str, reason: str) -> None:
        count = self._failed.get((key, reason), (0, 0.0))[0]
        delay_s = _RETRY_S[min(count, len(_RETRY_S) - 1)]
        self._failed[key, reason] = count + 1, self._clock() + delay_s
        log.info("%s: a new engine is tried again in %g s", key, delay_s)

    def forget_unless(self, outdated: dict[str, str]) -> None:
        self._failed = {entry: v for entry, v in self._failed.items() if outdated.get(entry[0]) == entry[1]}
