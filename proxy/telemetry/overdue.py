"""Time limits for whatever is outside of warmpool's own memory: what hangs is named, counted, and waited for no longer.

asyncio's time-outs cancel and then wait for as long as the cancelled one likes, which may be for ever where it clears
up after itself with the help of what hangs. `Overdue.within` waits for that too, but not longer than `GIVE_UP_S`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from proxy.errors import OverdueError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.overdue")

T = TypeVar("T")

GIVE_UP_S: Final = 5.0
"""How long an operation that was given up may take to end."""


@dataclass(frozen=True, slots=True)
class Hanging:
    """An operation that was given up and has not ended."""

    operation: str
    subject: str
    since_unix_s: float


class Overdue:
    """Runs operations, and knows those that hang. `subject`: what an operation is about, as an instance's id."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._hanging: dict[asyncio.Task[Any], Hanging] = {}

    def hanging(self, subject: str | None = None) -> list[Hanging]:
        """Those that hang, of one subject or all."""
        return [h for h in self._hanging.values() if subject in (None, h.subject)]

    def status(self) -> list[dict[str, Any]]:
        """For `/admin/status`."""
        return [asdict(hanging) for hanging in self._hanging.values()]

    async def within(self, limit_s: float | None, operation: str, subject: str, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises OverdueError where there is none in `limit_s` (None: the caller has a limit).

        Then, and when this is cancelled, `work` is cancelled, and left alone if that does not end it in time.
        """
        task = asyncio.create_task(work, name=f"{operation} {subject}")
        try:
            await asyncio.wait([task], timeout=limit_s)
        except asyncio.CancelledError:
            await self._give_up(task, operation, subject)
            raise
        if not task.done():
            await self._give_up(task, operation, subject)
            if not task.done() or task.cancelled():
                reason = f"no result within {limit_s:g} s"
                raise OverdueError(operation, reason, hangs=not task.done())
        return task.result()

    async def _give_up(self, task: asyncio.Task[Any], operation: str, subject: str) -> None:
        task.cancel()
        self._metrics.overdue.labels(operation).inc()
        try:
            await asyncio.wait([task], timeout=GIVE_UP_S)
        finally:
            if not task.done():
                self._note_hanging(task, Hanging(operation, subject, time.time()))
            elif not task.cancelled():
                task.exception()  # whatever it was: nobody asks any more

    def _note_hanging(self, task: asyncio.Task[Any], hanging: Hanging) -> None:
        log.error("%s of %s hangs: it is left alone", hanging.operation, hanging.subject)
        self._hanging[task] = hanging
        self._metrics.hanging.labels(hanging.operation).inc()
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        hanging = self._hanging.pop(task)
        self._metrics.hanging.labels(hanging.operation).dec()
        error = None if task.cancelled() else task.exception()
        log.info(
            "%s of %s, which hung, has ended after %.1f s%s", hanging.operation, hanging.subject,
            time.time() - hanging.since_unix_s, f": {error}" if error is not None else "",
        )  # fmt: skip
