"""After a start: checkpoints that are not on tmpfs, as after a reboot, are brought back in the background.

The models used most come first; one at a time; from the archive where they are, else by a cold start. Requests go
first, and nothing steps down for it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from proxy.errors import RequestError, RuntimeFailure
from proxy.pool.instance import AWAKE, State
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.commands import Commands
    from proxy.pool.instance_moves import Moves
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.pool.usage import Usage

log = logging.getLogger("warmpool.prewarm")


class Prewarm:
    """Finds the models that lack a checkpoint, and brings it back as an operator would."""

    def __init__(self, state: PoolState, moves: Moves, commands: Commands) -> None:
        self._state, self._effects, self._steps, self._commands = state, moves, moves.steps, commands

    async def prewarm(self, usage: Usage) -> None:
        """Bring back the checkpoints of the `pool.prewarm` models used most, and all that were lost to an upgrade.

        Returns when that is done.
        """
        missing = set(self._without_checkpoint())
        ranking, prewarm = usage.ranking(), self._state.settings.pool.prewarm
        wanted = [key for key in ranking if key in missing][:prewarm]
        if prewarm:
            # An upgrade has made their checkpoints useless: nobody is to pay for that with a cold start.
            lost = self._state.lost & missing - {*wanted}
            wanted += [key for key in dict.fromkeys((*ranking, *missing)) if key in lost]
        if wanted:
            log.info("no checkpoint on tmpfs: bringing back %s", ", ".join(wanted))
        for key in wanted:
            await self._until_room()
            if key not in self._without_checkpoint():
                continue  # a request was faster
            try:
                if await self._unarchive(self._state.models[key]):
                    log.info("%s: its checkpoint is back from the archive", key)
                    continue
                await self._make_anew(usage, key)
            except (RequestError, RuntimeFailure) as error:
                log.warning("%s: its checkpoint cannot be brought back: %s", key, error)

    def _without_checkpoint(self) -> list[str]:
        """The models that are to be checkpointed when idle, and have neither a checkpoint on tmpfs nor an engine."""
        return [key for key, model in self._state.models.items() if _lacks_checkpoint(model)]

    async def _until_room(self) -> None:
        """Return when no request waits for an engine, and one that is started would not make others step down."""
        changed = asyncio.Event()
        silence = self._state.listen(changed.set)
        try:
            while any(m.queue for m in self._state.models.values()) or self._is_tight():
                changed.clear()
                await changed.wait()
        finally:
            silence()

    def _is_tight(self) -> bool:
        limited = bool(self._state.settings.pool.max_awake or self._state.gpu_accounting.gpus)
        return limited and any(i.state in AWAKE for m in self._state.everyone() for i in m.instances.values())

    async def _unarchive(self, model: Model) -> bool:
        """Bring a model's image from the archive to tmpfs; whether there was one. Raises RuntimeFailure."""
        instance = next((i for i in model.instances.values() if i.state is State.ARCHIVED), None)
        if instance is None:
            return False
        await self._steps.unarchive(model, instance, Stages())
        for same in model.instances.values():
            if same.image is instance.image and same.state is State.ARCHIVED:
                same.rest(Tier.CHECKPOINTED, self._state.clock())
        self._effects.tick()
        return True

    async def _make_anew(self, usage: Usage, key: str) -> None:
        before = usage.count(key)
        await self._commands.wake(key)
        if usage.count(key) > before:
            return  # it is in use, and is checkpointed when it has been idle
        for command in self._commands.step_down(key, Tier.CHECKPOINTED):
            await command.carried_out()
        log.info("%s: checkpointed again", key)


def _lacks_checkpoint(model: Model) -> bool:
    if Tier.CHECKPOINTED not in model.tiers().offered or Tier.CHECKPOINTED not in model.timetable:
        return False
    if model.settings.min_ready or model.draining:
        return False
    on_tmpfs = model.runtime.shares_images and model.image.present and not model.image.archived
    return not on_tmpfs and all(i.state is State.ARCHIVED for i in model.instances.values())
