"""After a start: checkpoints that are not on tmpfs, as after a reboot, are brought back in the background.

The models used most come first; one at a time; from the archive where they are, else by a cold start. Requests go
first, and nothing steps down for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from proxy.errors import RequestError, RuntimeFailure
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.pool import Pool
    from proxy.pool.usage import Usage

log = logging.getLogger("warmpool.rebuild")

SAVE_EVERY_S: Final = 60.0


async def rebuild(pool: Pool, usage: Usage) -> None:
    """Bring back the checkpoints of the `pool.prewarm` models used most, and all that were lost to an upgrade.

    Returns when that is done.
    """
    missing = set(pool.without_checkpoint())
    ranking, prewarm = usage.ranking(), pool.settings.pool.prewarm
    wanted = [key for key in ranking if key in missing][:prewarm]
    if prewarm:
        # An upgrade has made their checkpoints useless: nobody is to pay for that with a cold start.
        wanted += [key for key in dict.fromkeys((*ranking, *missing)) if key in pool.lost & missing - {*wanted}]
    if wanted:
        log.info("no checkpoint on tmpfs: bringing back %s", ", ".join(wanted))
    for key in wanted:
        await pool.until_room()
        if key not in pool.without_checkpoint():
            continue  # a request was faster
        try:
            if await pool.bring_back(key):
                log.info("%s: its checkpoint is back from the archive", key)
                continue
            await _make_anew(pool, usage, key)
        except (RequestError, RuntimeFailure) as error:
            log.warning("%s: its checkpoint cannot be brought back: %s", key, error)


async def _make_anew(pool: Pool, usage: Usage, key: str) -> None:
    before = usage.count(key)
    await pool.wake(key)
    if usage.count(key) > before:
        return  # it is in use, and is checkpointed when it has been idle
    for command in pool.step_down(key, Tier.CHECKPOINTED):
        await command.carried_out()
    log.info("%s: checkpointed again", key)


async def keep(usage: Usage, every_s: float = SAVE_EVERY_S) -> None:
    """Save the counts now and then, and when there is news, for ever; once more when cancelled."""
    try:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await usage.news.wait()
            usage.news.clear()
            await asyncio.to_thread(usage.save)
    finally:
        usage.save()
