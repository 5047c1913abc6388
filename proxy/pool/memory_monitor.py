"""Host memory as it is: read now and then, and oftener while something moves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from proxy.pool.gpu_accounting import HOLDS_NOTHING
from proxy.pool.model import engine_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.host.facts import Memory
    from proxy.pool.effects import Effects
    from proxy.pool.instance import Instance
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState

log = logging.getLogger("warmpool.pool")

_LOOK_EVERY_S: Final = 1.0
"""How often the host is asked what is free."""
_LOOKS: Final = 5
"""So many of these, and all engines are asked what they hold; at once when something moved."""


class MemoryMonitor:
    """Feeds the accounting. `read`: None where host memory plays no part."""

    def __init__(self, read: Callable[[], Memory] | None, state: PoolState, effects: Effects) -> None:
        self._read, self._state, self._effects = read, state, effects
        self._accounting, self._metrics = state.memory_accounting, state.metrics
        self.due = asyncio.Event()
        """Set when something moved."""
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read, and go on reading."""
        if self._read is not None:
            await self.measure()
            self._watcher = asyncio.create_task(self._keep_measuring(), name="measure host memory")

    async def stop(self) -> None:
        """No more readings."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    async def _keep_measuring(self) -> None:
        looks = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self.due.wait()
            looks = 0 if self.due.is_set() else (looks + 1) % _LOOKS
            self.due.clear()
            if looks:
                await self._look()
            else:
                await self.measure()
            if not looks or self._accounting.is_short:
                self._effects.tick()

    async def _look(self) -> None:
        """Only what is free."""
        try:
            if self._read is not None:
                memory = await asyncio.to_thread(self._read)
                self._accounting.read(memory, sum(self._accounting.held(s) for _, s in self._live()))
        except Exception:
            log.exception("host memory could not be read")

    async def measure(self) -> None:
        """Write down what there is and what our engines hold; nothing where that cannot be learned."""
        try:
            if self._read is not None:
                await self._measure_all(self._read)
        except Exception:
            log.exception("host memory could not be read")

    async def _measure_all(self, read: Callable[[], Memory]) -> None:
        seen = [(m, s, s.state, s.generation) for m, s in self._live()]
        # In this order: what an engine takes in between is within the reserve, and must not count twice.
        memory = await asyncio.to_thread(read)
        held = await asyncio.gather(*(engine_of(s).host_bytes() for m, s, _, _ in seen))
        self._accounting.read(memory, sum(held))
        for (model, instance, state, generation), count in zip(seen, held, strict=True):
            if instance.state is state and instance.generation == generation and instance.id in model.instances:
                self._accounting.record(instance, count, outgoing=model.leaving)
        for model in self._state.everyone():
            if not self._accounting.knows_image(model.key) and any(s.image.present for s in model.instances.values()):
                found = await model.runtime.images.footprint(model.key)
                if found is not None:
                    self._accounting.learn(model.key, found.engine, found.image)
        self._publish()

    def _live(self) -> list[tuple[Model, Instance]]:
        return [
            (m, s)
            for m in self._state.everyone()
            for s in m.instances.values()
            if s.engine is not None and s.state not in HOLDS_NOTHING
        ]

    def _publish(self) -> None:
        if (memory := self._accounting.memory) is None:
            return
        self._metrics.host_memory.labels("total").set(memory.total_bytes)
        self._metrics.host_memory.labels("available").set(memory.available_bytes)
        for model in self._state.everyone():
            if not model.leaving:
                self._metrics.instance_host.labels(model.key).set(
                    sum(map(self._accounting.held, model.instances.values()))
                )
