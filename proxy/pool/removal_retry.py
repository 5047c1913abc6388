"""Instances that could not be ended in time: nothing waits for them any more, and they are ended when that works."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from proxy.pool.model import engine_of

if TYPE_CHECKING:
    from proxy.pool.instance import Instance
    from proxy.pool.model import Model
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.pool")

_RETRY_S: Final = (5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class _Entry:
    model: str
    reason: str
    since_unix_s: float
    task: asyncio.Task[None]


class RemovalRetries:
    """Each goes on being removed until it is; the next start of warmpool does so too."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._entries

    def add(self, model: Model, instance: Instance, reason: str) -> None:
        """Take an instance that is no more the pool's, and has an engine."""
        instance_id = instance.id
        log.error(
            "%s is written off: %s; it is removed as soon as that works, or by the next start", instance_id, reason
        )
        task = asyncio.create_task(self._remove(model, instance), name=f"remove {instance_id}, written off")
        self._entries[instance_id] = _Entry(model.key, reason, time.time(), task)
        self._metrics.written_off.labels(model.key).inc()

    async def _remove(self, model: Model, instance: Instance) -> None:
        instance_id = instance.id
        for delay_s in itertools.chain(_RETRY_S, itertools.repeat(_RETRY_S[-1])):
            await asyncio.sleep(delay_s)
            try:
                await engine_of(instance).remove()
            except Exception as error:  # noqa: BLE001 - whatever it was, it may work later
                log.warning("%s, written off, cannot be removed yet: %r", instance_id, error)
            else:
                break
        del self._entries[instance_id]
        self._metrics.written_off.labels(model.key).dec()
        log.info("%s, written off, is removed", instance_id)

    def close(self) -> None:
        """No more tries."""
        for entry in self._entries.values():
            entry.task.cancel()

    def status(self) -> list[dict[str, Any]]:
        """For `/admin/status`."""
        return [
            {"id": instance_id, "model": e.model, "reason": e.reason, "since_unix_s": e.since_unix_s}
            for instance_id, e in self._entries.items()
        ]
