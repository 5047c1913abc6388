"""Another configuration, taken on while serving."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from proxy.config import diff
from proxy.errors import DrainingError
from proxy.pool.command import Command
from proxy.pool.instance import DESCENDING
from proxy.pool.model import image_of
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.config.diff import Changes
    from proxy.config.settings import Settings
    from proxy.pool.effects import Effects
    from proxy.pool.engine_renewal import Renewals
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.runtime.base import ImageFacts


class Reconfiguration:
    """Switches models over, one reconfiguration at a time."""

    def __init__(self, state: PoolState, effects: Effects, renewals: Renewals) -> None:
        self._state, self._effects, self._renewals = state, effects, renewals
        self._reconfiguring = asyncio.Lock()

    async def reconfigure(self, wanted: Settings) -> Changes:
        """Take another configuration on, as far as it can be had without a restart; what came of it.

        Models that did not change notice nothing. Where the engine of one changed, its instances take no new requests
        and go after their last one, while those who wait are served by new engines; so do those of a removed model,
        where those who wait are told that there is none.
        Raises ConfigError, HostError (a runtime that is needed now cannot work) or DrainingError, with nothing changed.
        """
        async with self._reconfiguring:
            changes, settings = diff.compare(self._state.settings, wanted)
            for name in {settings.models[key].runtime for key in (*changes.added, *changes.replaced)}:
                if name not in self._state.runtimes:
                    await self._state.open_runtime(self._state.all_runtimes[name])
                    self._state.runtimes[name] = self._state.all_runtimes[name]
                    await self._state.runtimes[name].recover({})
            going = [self._state.models[key] for key in (*changes.removed, *changes.replaced)]
            while True:
                await self._at_rest(going)
                images = await self._images_for(settings, (*changes.added, *changes.replaced))
                if not any(map(_on_its_way_down, going)):
                    break
            if self._state.stopping:
                raise DrainingError("The server is shutting down.", retry_after_s=1.0)
            self._switch(changes, settings, images)
        self._effects.spawn("look for changes", self._renewals.look_for_changes())
        self._effects.tick()
        return changes

    async def _at_rest(self, models: Sequence[Model]) -> None:
        """Return when nothing is being written of an engine that will be gone."""
        while moves := [
            instance.task
            for model in models
            for instance in model.instances.values()
            if instance.state in DESCENDING and instance.task is not None
        ]:
            await asyncio.wait(moves)

    async def _images_for(self, settings: Settings, keys: Sequence[str]) -> dict[str, ImageFacts]:
        """The golden checkpoints that fit the engines of these models already."""
        images: dict[str, ImageFacts] = {}
        for name in {settings.models[key].runtime for key in keys}:
            models = {key: m for key, m in settings.models.items() if m.runtime == name}
            found = await self._state.runtimes[name].images.fitting(models)
            images |= {key: facts for key, facts in found.items() if key in keys}
        return images

    def _switch(self, changes: Changes, settings: Settings, images: Mapping[str, ImageFacts]) -> None:
        before, self._state.settings = self._state.models, settings
        self._state.models = {}
        for key in (*changes.removed, *changes.replaced):
            self._effects.withdraw(key, "the configuration has changed")
        for key, coming in self._state.coming.items():
            coming.settings = settings.models[key]
        for key, entry in settings.models.items():
            old = before.get(key)
            if old is not None and key not in changes.replaced:
                old.settings = entry
                old.end_back_off()
                self._state.models[key] = old
                self._shrink(old)
                continue
            model = self._state.new_model(key, entry)
            if key in images:
                model.image = image_of(images[key])
            self._state.models[key] = model
            if old is not None:
                model.queue, old.queue = old.queue, model.queue
                model.draining = old.draining
                self._state.observe(old)
            self._state.observe(model)
        for key in (*changes.removed, *changes.replaced):
            self._state.gpu_accounting.unlearn(key)
            self._state.memory_accounting.unlearn(key)
            self._state.send_away(before[key])
        for key, facts in images.items():
            self._state.gpu_accounting.learn(key, facts.details.get("gpu"))
            self._state.models[key].learn(facts.details)
        self._state.configure_accounts()
        self._state.metrics.expect(changes.added, [tier.label for tier in Tier])

    def _shrink(self, model: Model) -> None:
        """Fewer instances than there are: the coldest go, one that answers after its last request."""
        surplus = max(0, len(model.instances) - model.settings.max_instances)
        for instance in sorted(model.instances.values(), key=lambda s: (-s.tier, s.leases))[:surplus]:
            instance.give(Command(instance.id, instance.tier, Tier.STOPPED))


def _on_its_way_down(model: Model) -> bool:
    return any(i.state in DESCENDING for i in model.instances.values())
