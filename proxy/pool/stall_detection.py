"""Engines that stand still: they have requests, send nothing, and still answer `/health`.

Silence alone is no fault: a long answer in one piece and a full batch are silent too. So a silent engine is looked at,
from outside and by asking it, and given up only when everything says the same.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from proxy.errors import RuntimeFailure
from proxy.pool.instance import Instance, State
from proxy.pool.model import client_of, engine_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.config.model import ModelSettings
    from proxy.pool.effects import Effects
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.runtime.base import Vitals

log = logging.getLogger("warmpool.pool")

_EVERY_S: Final = 1.0
_STOPPED_AGAIN_S: Final = 2.0
"""An engine that is stopped is looked at once more after so long: somebody may have stopped it for a moment."""
STILL_S: Final = 0.1
STILL_SHARE: Final = 0.02
"""Up to so much CPU time, and so much of a core, an engine stands still: it answers `/health` and `/metrics`."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at an engine."""

    at: float
    """By the event loop's clock, in seconds."""
    progress: Mapping[str, str]
    """What the engine counts of its work; empty where that is not known."""
    vitals: Vitals


def stands_still(before: Reading, after: Reading) -> bool:
    """Whether an engine did nothing between two looks, as far as they show."""
    if before.progress and after.progress and before.progress != after.progress:
        return False
    was, now = before.vitals.cpu_s, after.vitals.cpu_s
    if was.keys() != now.keys():
        return False  # it starts or ends processes
    used_s = sum(now.values()) - sum(was.values())
    return used_s <= STILL_S + STILL_SHARE * (after.at - before.at)


def look_due(settings: ModelSettings, silent_s: float) -> bool:
    """Whether an engine has been silent long enough to see whether somebody stopped it."""
    return settings.stall_after is not None and silent_s >= min(settings.stall_after, settings.wake_timeout)


def is_stalled_long(settings: ModelSettings, silent_s: float) -> bool:
    """Whether it has been silent so long that it has to show that it works."""
    return settings.stall_after is not None and silent_s >= settings.stall_after


class StallDetection:
    """Looks after silent engines, and gives up those that stand still."""

    def __init__(self, state: PoolState, effects: Effects) -> None:
        self._state, self._effects = state, effects
        self._watcher: asyncio.Task[None] | None = None
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._next: dict[str, float] = {}
        """Instance → when it may be looked at again."""

    def start(self) -> None:
        """Look from now on."""
        self._watcher = asyncio.create_task(self._watch(), name="look for engines that stand still")

    async def stop(self) -> None:
        """No more looks."""
        tasks = [task for task in (self._watcher, *self._looks.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_EVERY_S)
            for model in self._state.everyone():
                for instance in model.instances.values():
                    self._consider(model, instance, loop.time())

    def _consider(self, model: Model, instance: Instance, now: float) -> None:
        id_ = instance.id
        silent_s = instance.client.silent_s if instance.client is not None and _should_run(instance) else 0.0
        if not look_due(model.settings, silent_s):
            self._next.pop(id_, None)
        elif id_ not in self._looks and now >= self._next.get(id_, now):
            task = self._looks[id_] = asyncio.create_task(self._look(model, instance), name=f"look at {id_}")
            task.add_done_callback(lambda done: self._looked(id_, done))

    def _looked(self, id_: str, task: asyncio.Task[None]) -> None:
        del self._looks[id_]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s could not be looked at: %r", id_, error, exc_info=error)

    async def _look(self, model: Model, instance: Instance) -> None:
        generation = instance.generation
        try:
            reason = await self._reason(model, instance)
        except RuntimeFailure as error:
            log.warning("%s could not be looked at: %s", instance.id, error)
            reason = None
        if reason is not None and instance.generation == generation and _should_run(instance):
            self._effects.give_up_stalled(model, instance, reason)
            return
        settings = model.settings
        rest_s = min(settings.stall_after or settings.wake_timeout, settings.wake_timeout)
        self._next[instance.id] = asyncio.get_running_loop().time() + rest_s

    async def _reason(self, model: Model, instance: Instance) -> str | None:
        """Why an engine is to be given up; None while anything speaks for it."""
        before = await self._read(instance)
        if before.vitals.stopped:
            await asyncio.sleep(_STOPPED_AGAIN_S)
            stopped = (await engine_of(instance).vitals()).stopped
            return "its processes were stopped, or its container paused, by hand" if stopped else None
        client = client_of(instance)
        if not is_stalled_long(model.settings, client.silent_s) or await self._generates(model, instance, before.at):
            return None
        after = await self._read(instance)
        if not is_stalled_long(model.settings, client.silent_s) or not stands_still(before, after):
            return None
        return (
            f"no byte for {client.silent_s:.0f} s, no answer to a request for one token within "
            f"{model.settings.wake_timeout:g} s, and its token counters and CPU time stand still"
        )

    async def _generates(self, model: Model, instance: Instance, began: float) -> bool:
        """Ask for one token; where there is none, the whole time is given before anything is concluded."""
        ends = began + model.settings.wake_timeout
        try:
            async with asyncio.timeout_at(ends):
                if await client_of(instance).generates():
                    return True
        except TimeoutError:
            return False
        await asyncio.sleep(max(0.0, ends - asyncio.get_running_loop().time()))
        return False

    async def _read(self, instance: Instance) -> Reading:
        vitals = await engine_of(instance).vitals()
        progress = {} if vitals.stopped else await client_of(instance).progress()
        return Reading(asyncio.get_running_loop().time(), progress, vitals)


def _should_run(instance: Instance) -> bool:
    return instance.state in (State.READY, State.RETIRING) and instance.engine is not None
