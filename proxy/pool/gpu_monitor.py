"""GPU memory as it is: measured after every move and now and then, and looked after when others make room."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from proxy.pool import gpu_accounting
from proxy.pool.instance import RESTING, Instance, State
from proxy.pool.model import engine_of
from proxy.pool.model_view import may_suspend, view_of
from proxy.pool.plan import StepDown
from proxy.telemetry.overdue import GIVE_UP_S
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.gpu.cuda import Gpus
    from proxy.gpu.nvml import GpuMemory
    from proxy.pool.effects import Effects
    from proxy.pool.gpu_accounting import Bytes
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState
    from proxy.pool.waking import Evictions

log = logging.getLogger("warmpool.pool")

_LOOK_S = 30.0
"""How long NVML may take."""
_MAKE_SURE_S = 120.0
"""How long a wake may wait for memory that does not come free."""
_MEASURE_EVERY_S = 5.0
"""How often GPU memory is looked at when nothing moves: other programs come and go, engines grow."""


class GpuMonitor:
    """Feeds the accounting. `gpus`: None where there is nothing to measure."""

    def __init__(self, gpus: Gpus | None, state: PoolState, effects: Effects) -> None:
        self._gpus, self._state, self._effects = gpus, state, effects
        self._accounting, self._metrics = state.gpu_accounting, state.metrics
        self.due = asyncio.Event()
        """Set when something moved."""
        self._measuring: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Measure, and go on measuring; nothing where NVML cannot be asked."""
        if self._gpus is not None and self._gpus.measurable:
            self._accounting.suspending_frees = self._gpus.usable
            self._accounting.can_move = self._gpus.can_move
            await self.measure()
            self._measuring = asyncio.create_task(self._keep_measuring(), name="measure")

    async def stop(self) -> None:
        """No more measuring."""
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.wait([self._measuring], timeout=GIVE_UP_S)

    async def _keep_measuring(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_MEASURE_EVERY_S):
                    await self.due.wait()
            self.due.clear()
            await self.measure()
            self._effects.tick()

    async def measure(self) -> None:
        """Write down what the GPUs and our engines hold; nothing where that cannot be learned."""
        try:
            if self._gpus is not None:
                async with asyncio.timeout(_LOOK_S):
                    await self._measure_all(self._gpus)
        except Exception:
            log.exception("GPU memory could not be measured")

    async def _measure_all(self, gpus: Gpus) -> None:
        seen = [(m, s, s.state, s.generation) for m, s in self._live()]
        readings = asyncio.gather(*(engine_of(s).gpu_bytes() for m, s, _, _ in seen))
        memory, held = await asyncio.gather(gpus.memory(), readings)
        if not memory:
            return
        settled = [s for _, s in self._live()] == [s for _, s, _, _ in seen]
        for (model, instance, state, generation), count in zip(seen, held, strict=True):
            same = instance.state is state and instance.generation == generation and instance.id in model.instances
            settled = settled and same and (state in RESTING or state in (State.RETIRING, State.PAUSED))
            if same:
                self._accounting.record(instance, count, outgoing=model.leaving)
                self._tell_if_grown(instance)
        ours = [(instance, count) for (_, instance, _, _), count in zip(seen, held, strict=True)]
        self._accounting.read(memory, ours, settled=settled)
        self._publish_gpus()

    def _live(self) -> list[tuple[Model, Instance]]:
        """The instances that have processes."""
        return [
            (m, s)
            for m in self._state.everyone()
            for s in m.instances.values()
            if s.engine is not None and s.state not in gpu_accounting.HOLDS_NOTHING
        ]

    def _tell_if_grown(self, instance: Instance) -> None:
        if self._accounting.newly_grown(instance):
            log.warning(
                "%s holds %d MiB more of the GPU than at first, after %d cycles: %s",
                instance.id,
                self._accounting.growth_bytes(instance) >> 20,
                self._accounting.cycles(instance),
                "it is replaced from its checkpoint when it is idle" if instance.renewable else "it has no checkpoint",
            )

    async def measure_once(self, model: Model, instance: Instance, kind: str) -> None:
        """Learn what a model holds awake or asleep in passing, where that was never seen."""
        if self._gpus is not None and not model.leaving and not self._accounting.knows(model.key, kind):
            self._accounting.learn(model.key, {kind: dict(await engine_of(instance).gpu_bytes())})

    def has_room(self, instance: Instance) -> bool:
        """Whether what its model needs awake is free beside all others, as far as is known."""
        need = self._accounting.need_of(instance)
        if not need:
            return True
        load = self._accounting.load(s for m in self._state.everyone() for s in m.instances.values())
        for other in load.now.keys() - {instance.id}:
            # What comes free when a move ends is not free yet.
            now, after = load.now[other], load.after[other]
            need = gpu_accounting.plus(need, gpu_accounting.plus(now, gpu_accounting.beyond(after, now)))
        return not gpu_accounting.beyond(need, load.capacity)

    async def make_sure(self, evictions: Evictions) -> None:
        """See that what the victims held came free; stop those that keep it. A failure to see is not one to wake."""
        try:
            if evictions.needed:
                async with asyncio.timeout(_MAKE_SURE_S):
                    if await self._lacking(evictions.needed):
                        await self._find_room(evictions)
        except Exception:
            log.exception("GPU memory could not be looked at")

    async def _find_room(self, evictions: Evictions) -> None:
        # One that fell asleep would go off the GPU behind the wake: now, so that there may be enough.
        instances = {s.id: (m, s) for m, s in self._live() if s.id in evictions.expected}
        victims = [instances[i] for i in evictions.tasks if i in instances]
        for model, instance in victims:
            if may_suspend(view_of(instance), model.view(), self._state.clock()):
                self._effects.step_down(StepDown(view_of(instance), Tier.SUSPENDED, "evict"))
        leaving = [s.task for _, s in victims if s.state is State.SUSPENDING and s.task is not None]
        if leaving:
            await asyncio.wait(leaving)
        await self.measure()
        if not await self._lacking(evictions.needed):
            return
        stopping = []
        for instance_id, (model, instance) in instances.items():
            if instance.state not in (State.SLEEPING, State.SUSPENDED):
                continue
            leaked = self._accounting.leaked_bytes(instance, evictions.expected[instance_id])
            if leaked:
                log.error("%s holds %d MiB more of the GPU than expected: stopped", instance_id, leaked >> 20)
                self._metrics.gpu_leaks.labels(model.key).inc()
                self._effects.give_up(model, instance)
                stopping += [instance.task] if instance.task is not None else []
        if stopping:
            await asyncio.wait(stopping)
        if lacking := await self._lacking(evictions.needed):
            log.warning("%d MiB of GPU memory are still missing for the next wake", sum(lacking.values()) >> 20)

    async def _lacking(self, needed: Bytes) -> dict[str, int]:
        """What is not free of what is needed; nothing where NVML does not answer."""
        memory: list[GpuMemory] = await self._gpus.memory() if self._gpus is not None else []
        return gpu_accounting.beyond(needed, {g.uuid: g.free_bytes for g in memory}) if memory else {}

    def _publish_gpus(self) -> None:
        for gpu in self.status():
            for kind in ("total", "used", "foreign", "charged"):
                self._metrics.gpu_memory.labels(str(gpu["index"]), kind).set(gpu[f"{kind}_bytes"])
        for model in self._state.everyone():
            if not model.leaving:
                held = sum(self._accounting.charged(model.instances.values()).values())
                self._metrics.instance_gpu.labels(model.key).set(held)

    def status(self) -> list[dict[str, Any]]:
        """For `/admin/status`: every GPU, and whose its memory is."""
        charged = self._accounting.charged(i for m in self._state.everyone() for i in m.instances.values())
        return [
            {
                "index": gpu.index,
                "name": gpu.name,
                "uuid": gpu.uuid,
                "total_bytes": gpu.total_bytes,
                "used_bytes": gpu.used_bytes,
                "foreign_bytes": self._accounting.foreign.get(gpu.uuid, 0),
                "charged_bytes": charged.get(gpu.uuid, 0),
            }
            for gpu in self._accounting.gpus
        ]
