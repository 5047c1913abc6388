"""Checkpoints that nobody has needed for a while are restored at a quiet time and asked for their canary.

So that one that has gone bad, by a flipped bit or an upgrade that nobody thought of, is found before a request needs
it: it is set aside, and a new one is made. Only a checkpoint on tmpfs of a model of which nothing is awake is tried,
with nobody stepping down for it; a request that comes meanwhile is served by what the drill has woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final, Literal

from proxy.config.values import lies_in
from proxy.errors import RequestError, WakeFailedError
from proxy.pool.instance import State
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.commands import Commands
    from proxy.pool.engine_renewal import Renewals
    from proxy.pool.image import Image
    from proxy.pool.image_faults import ImageFaults
    from proxy.pool.instance import Instance
    from proxy.pool.model import Model
    from proxy.pool.pool import Pool
    from proxy.pool.state import PoolState

log = logging.getLogger("warmpool.drill")

_LOOK_EVERY_S: Final = 60.0


class Drills:
    """Knows when each checkpoint was last tried, and tries it."""

    def __init__(self, state: PoolState, commands: Commands, renewals: Renewals, faults: ImageFaults) -> None:
        self._state, self._commands, self._renewals, self._faults = state, commands, renewals, faults
        self._tried: dict[str, float] = {}
        """Model → when, by the pool's clock: its last drill, or when its checkpoint was first seen."""

    async def drill_due(self) -> None:
        """Try the checkpoints that are due, one after the other, as long as it is quiet."""
        every_s = self._state.settings.pool.drill
        now = self._state.clock()
        self._tried = {key: at for key, at in self._tried.items() if key in self._state.models}
        for key in [*self._state.models]:
            last = self._tried.setdefault(key, now)
            if every_s is None or self._state.clock() - last < every_s or not self._is_quiet():
                continue
            if key in self._state.models and await self._renewals.room_beside(key):
                await self.drill(key)

    def _is_quiet(self) -> bool:
        """Whether no request runs or waits, at a time of the day at which there may be drills."""
        times = self._state.settings.pool.drill_times
        at = time.localtime(self._state.unix_s())
        due = not times or any(lies_in(span, at.tm_hour * 60 + at.tm_min) for span in times)
        return due and self._state.ready and self._commands.unused()

    async def drill(self, key: str) -> Literal["passed", "failed", "not tried"]:
        """Restore a model's checkpoint, compare the canary, and put it back; a new one if that failed.

        "not tried" where there is none that rests on tmpfs, or something came between.
        """
        model = self._state.models[key]
        resting = _resting(model)
        if resting is None:
            return "not tried"
        image, uses = resting.image, self._state.usage.count(key)
        image.expect_canary()
        self._tried[key] = self._state.clock()
        try:
            _, _, record = await self._commands.wake(key)
        except WakeFailedError as error:
            log.error("%s: its checkpoint failed its drill, and nothing else starts: %s", key, error)
            return self._count(key, "failed")
        except RequestError as error:
            log.info("%s: no drill: %s", key, error)
            return "not tried"
        if record is None or record.found is not Tier.CHECKPOINTED:
            return "not tried"
        good = record.reached_from is Tier.CHECKPOINTED
        if good:
            log.info("%s: its checkpoint passed its drill in %.2f s", key, record.seconds)
        else:
            log.error("%s: its checkpoint failed its drill; it came up from %s", key, record.reached_from.label)
            await self._set_aside(model, image)
        if self._state.usage.count(key) <= uses:  # else it is in use, and goes down when it has been idle
            await self._put_back(key)
        return self._count(key, "passed" if good else "failed")

    def _count(self, key: str, result: Literal["passed", "failed"]) -> Literal["passed", "failed"]:
        self._state.metrics.drills.labels(key, result).inc()
        return result

    async def _set_aside(self, model: Model, image: Image) -> None:
        """An image that there is evidence against goes now, so that a new one is written."""
        instance = next((i for i in model.instances.values() if i.image is image), None)
        if instance is not None and image.present and image.failures:
            await self._faults.quarantine(model, instance, "it failed its drill", damaged=False)

    async def _put_back(self, key: str) -> None:
        with contextlib.suppress(RequestError):  # a request has come
            for command in self._commands.step_down(key, Tier.CHECKPOINTED):
                await command.carried_out()


def _resting(model: Model) -> Instance | None:
    """An instance to try the model's checkpoint with, if there is one on tmpfs and nothing of the model is awake."""
    instances = model.instances.values()
    if model.draining or model.settings.min_ready or model.outdated is not None or not instances:
        return None
    if any(i.state not in (State.CHECKPOINTED, State.ARCHIVED) for i in instances):
        return None
    return next((i for i in instances if i.state is State.CHECKPOINTED), None)


async def keep_drilled(pool: Pool) -> None:
    """Look for checkpoints that are due, for ever."""
    while True:
        every_s = pool.settings.pool.drill
        await asyncio.sleep(_LOOK_EVERY_S if every_s is None else min(_LOOK_EVERY_S, every_s / 10))
        await pool.drill_due()
