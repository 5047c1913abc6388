"""Asks engines for their own metrics: those that are awake, never one that would have to be woken."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from proxy.errors import EngineError
from proxy.pool.instance import State
from proxy.pool.model import client_of
from proxy.telemetry.engine_metrics import MOST_BYTES, EngineCounts, Scrape, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.pool.instance import Instance
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState

log = logging.getLogger("warmpool.pool")

_LIMIT_S: Final = 2.0
_LAST_LIMIT_S: Final = 0.5
"""Before an engine steps down."""
_FRESH_S: Final = 1.0
"""Whoever asks again so soon gets what is known."""
_AT_ONCE: Final = 16
_AWAKE: Final = frozenset({State.READY, State.RETIRING})


class EngineScrape:
    """Keeps what engines say in `PoolState.metrics`."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._locks: dict[str, asyncio.Lock] = {}
        self._running: asyncio.Task[None] | None = None
        self._at = -_FRESH_S
        self._prefixes: Sequence[str] = state.settings.pool.engine_metrics

    async def scrape(self) -> None:
        """Ask all that are awake, at once; those who come meanwhile wait for the same answers."""
        if self._running is None or self._running.done():
            if time.monotonic() - self._at < _FRESH_S:
                return
            self._running = asyncio.create_task(self._scrape(), name="engines' metrics")
        await asyncio.shield(self._running)

    async def _scrape(self) -> None:
        known = self._state.metrics.engines
        prefixes = self._state.settings.pool.engine_metrics
        known.keep_only(self._state.models if prefixes == self._prefixes else ())
        self._prefixes = prefixes
        everyone = [(model, i) for model in self._state.models.values() for i in model.instances.values()]
        awake = {i.id for _, i in everyone if i.state in _AWAKE}
        for (_, instance_id), counts in known.instances.items():
            if instance_id not in awake:
                counts.stands_still()
        self._locks = {name: lock for name, lock in self._locks.items() if name in awake}
        turns = asyncio.Semaphore(_AT_ONCE)

        async def ask(model: Model, instance: Instance) -> None:
            async with turns, self._lock(instance):
                # Of one that is on its way down by now every connection has to be closed.
                if instance.state in _AWAKE:
                    await self._ask(model, instance, _LIMIT_S)

        if prefixes:
            await asyncio.gather(*(ask(model, i) for model, i in everyone if i.state in _AWAKE))
        self._at = time.monotonic()

    async def last_look(self, model: Model, instance: Instance) -> None:
        """Ask an engine that is about to step down, and has nobody who waits for that."""
        if self._state.settings.pool.engine_metrics and model.key in self._state.models:
            async with self._lock(instance):
                await self._ask(model, instance, _LAST_LIMIT_S)

    def image_written(self, model: Model, instance: Instance) -> None:
        """What its engine said last is what those that are restored from its checkpoint begin with."""
        counts = self._state.metrics.engines.instances.get((model.key, instance.id))
        instance.image.counted = counts.last_of(instance.run) if counts is not None else None

    def _lock(self, instance: Instance) -> asyncio.Lock:
        """Held by who asks it, so that no answer comes after a later one."""
        return self._locks.setdefault(instance.id, asyncio.Lock())

    async def _ask(self, model: Model, instance: Instance, limit_s: float) -> None:
        run, generation, client = instance.run, instance.generation, client_of(instance)
        counts = self._state.metrics.engines.of(model.key, instance.id)
        try:
            async with asyncio.timeout(limit_s):
                body = await client.metrics(MOST_BYTES)
                prefixes = self._state.settings.pool.engine_metrics
                scrape = await asyncio.to_thread(parse, body, prefixes) if body is not None else Scrape()
        except (EngineError, TimeoutError, ValueError) as error:
            if instance.generation == generation and instance.state in _AWAKE:  # else it has only left meanwhile
                counts.stands_still()
                self._state.metrics.engine_scrape_failures.labels(model.key).inc()
                log.debug("%s: no metrics: %s", instance.id, str(error) or "no answer in time")
            return
        if instance.run == run:
            self._take(instance, counts, scrape)

    def _take(self, instance: Instance, counts: EngineCounts, scrape: Scrape) -> None:
        began_with = {}
        if instance.from_image and counts.last_of(instance.run) is None:
            # Of an image that another process wrote it is not known: what the first engine says counts as that.
            image, now = instance.image, scrape.accumulated
            known = now if image.counted is None else image.counted
            began_with = image.counted = {series: min(value, now.get(series, value)) for series, value in known.items()}
        counts.take(instance.run, scrape, began_with)
