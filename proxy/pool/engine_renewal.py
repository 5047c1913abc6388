"""Outdated engines, and those that are made ready beside them to take their place."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from proxy.errors import OverdueError, RuntimeFailure
from proxy.host import facts as host
from proxy.pool import policy
from proxy.pool.command import Command
from proxy.pool.instance import DESCENDING, Event, Instance, State
from proxy.pool.model import engine_of, note_unexpected
from proxy.pool.transitions import DEEPEST_SLEEP
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.instance_moves import Moves
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.runtime.base import Outdated

log = logging.getLogger("warmpool.pool")


class Renewals:
    """Finds what is outdated and switches models over to new engines."""

    def __init__(self, state: PoolState, moves: Moves) -> None:
        self._state, self._effects = state, moves
        self._steps, self._wakes, self._faults = moves.steps, moves.wakes, moves.faults
        self.changed = asyncio.Event()
        """Set when a model is found to be outdated."""

    async def look_for_changes(self) -> None:
        """Find the models whose engines are not what their configuration resolves to now."""
        before = dict(self._state.models)
        for name, runtime in [*self._state.runtimes.items()]:
            mine = {key: m.settings for key, m in before.items() if m.settings.runtime == name}
            try:
                found = await runtime.outdated(mine, {i for key in mine for i in before[key].instances})
            except RuntimeFailure as error:
                log.warning("whether engines are outdated is not known: %s", error)
                continue
            for key in mine:
                if self._state.models.get(key) is before[key]:
                    self._note_outdated(before[key], found.get(key))
        self._effects.tick()

    def _note_outdated(self, model: Model, outdated: Outdated | None) -> None:
        known = model.outdated
        if outdated is None:
            # One that was lost is missed until there is an engine again.
            if known is not None and (known.usable or model.instances):
                self._effects.withdraw(model.key, "what had changed was undone")
                model.outdated = None
            return
        if known is not None and known.reason == outdated.reason:
            return
        log.warning("%s is outdated: %s", model.key, outdated.reason)
        model.outdated, model.renewal = outdated, ""
        self._effects.withdraw(model.key, "more has changed")
        if not outdated.usable:
            self._faults.forget_all(model, "its checkpoint does not fit any more")
            self._keep_from_reloading(model)
        self.changed.set()

    def _keep_from_reloading(self, model: Model) -> None:
        """Engines that would load their weights again at their wake go now; the others do not drop them any more."""
        for instance in model.instances.values():
            if instance.state in (State.SLEEPING, State.SUSPENDED) and instance.sleep_level == DEEPEST_SLEEP:
                instance.give(Command(instance.id, instance.tier, Tier.STOPPED))
            else:
                instance.bar(Tier.SLEEPING)

    def outdated(self) -> dict[str, str]:
        """Key → in which way; of those models that nothing is made for yet."""
        missing = self._state.models.keys() - self._state.coming.keys()
        return {key: o.reason for key in missing if (o := self._state.models[key].outdated) is not None}

    async def room_beside(self, key: str) -> bool:
        """Whether an engine can be started beside those of a model, with nobody stepping down for it."""
        model = self._state.models[key]
        if not self._state.ready or model.draining:
            return False
        if policy.has_room(self._state.view(), key) and not await self._lacks_memory(model, engine=True):
            return True
        model.renewal = "waits for room beside the engines that are awake"
        return False

    async def _lacks_memory(self, model: Model, *, engine: bool) -> bool:
        """Whether there is too little host memory for another engine, or on tmpfs for an image, or none can say."""
        try:
            print_ = await model.runtime.images.footprint(model.key)
        except OverdueError as error:
            log.warning("%s: how much memory it needs is not known: %s", model.key, error)
            return True
        if print_ is None:
            return False
        if engine:
            return print_.engine > (self._state.memory_accounting.memory or host.memory()).available_bytes
        return print_.image > min(print_.free, host.available_bytes())

    async def renew(self, key: str) -> bool:
        """Start, warm up, checkpoint and prove an engine beside a model's outdated ones, which serve meanwhile.

        Then the model is switched: new requests are for the new engine, the old ones go after their last request.
        False where that did not come about: it failed, or a request needed the place; the status says which.
        """
        old = self._state.models[key]
        new = self._state.new_model(key, old.settings, coming=True)
        self._state.coming[key] = new
        instance = self._state.new_instance(new, self._state.free_id(new))
        instance.begin_wake(Tier.STOPPED, self._state.clock())
        old.renewal = f"{instance.id} is being made ready"
        log.info("%s is started beside the outdated engines of %s", instance.id, key)
        await asyncio.wait([self._effects.move(new, instance, "renew", self._prepare(new, instance))])
        return self._state.models.get(key) is new

    async def _prepare(self, new: Model, instance: Instance) -> None:
        stages, began = Stages(), self._state.clock()
        try:
            origin = await self._make_ready(new, instance, stages)
            while moves := self._moves_of(self._state.models[new.key]):
                await asyncio.wait(moves)
            engine_of(instance).promote()
        except Exception as error:  # noqa: BLE001 - whatever it was, the outdated engines serve on
            note_unexpected(instance, error)
            self._effects.withdraw(new.key, f"failed: {str(error) or 'no result in time'}")
            return
        self._take_over(new, instance)
        self._wakes.woken(new, instance, Tier.STOPPED, origin, began, stages, whole=False)

    def _moves_of(self, model: Model) -> list[asyncio.Task[None]]:
        """What may read the model's image, or write it."""
        instances = model.instances.values()
        return [s.task for s in instances if s.task is not None and s.state in (*DESCENDING, State.WAKING)]

    async def _make_ready(self, new: Model, instance: Instance, stages: Stages) -> Tier:
        """From nothing to an engine that serves, by its own checkpoint where there is to be one."""
        await self._steps.climb(new, instance, Tier.STOPPED, stages)
        wanted = Tier.CHECKPOINTED in new.tiers().offered and Tier.CHECKPOINTED in new.timetable
        if not wanted or await self._lacks_memory(new, engine=False):
            return Tier.STOPPED  # it is warm, and writes its checkpoint when it is idle
        # In one step: nobody is to see it ready.
        instance.apply(Event.AT_READY)
        instance.apply(Event.CHECKPOINT)
        with stages.measure("checkpoint"):
            async with asyncio.timeout(new.settings.checkpoint_timeout):
                await self._steps.go_down(new, instance, Tier.READY, Tier.CHECKPOINTED)
        self._state.gpu_accounting.arrived(instance, Tier.CHECKPOINTED)
        instance.apply(Event.AT_CHECKPOINTED)
        instance.begin_wake(Tier.CHECKPOINTED, instance.wake_began)
        await self._steps.climb(new, instance, Tier.CHECKPOINTED, stages)
        return Tier.CHECKPOINTED

    def _take_over(self, new: Model, instance: Instance) -> None:
        """Have a model that was made ready take the place of the one of the same key."""
        old = self._state.models[new.key]
        del self._state.coming[new.key]
        new.coming = False
        self._state.models[new.key] = new
        new.queue, old.queue = old.queue, new.queue
        self._state.observe(new)
        self._state.observe(old)
        new.draining = old.draining
        log.info("%s: new requests go to %s", new.key, instance.id)
        if new.image.present or instance.image.present:
            self._steps.keep_copy(new, instance)
        self._state.send_away(old)
