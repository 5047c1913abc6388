"""Counts what was used: takes what requests left behind at their end, and who had the GPU, and adds it up by day.

A request leaves a tuple; what it says of tokens is read here, a moment later. So usage is up to a second old, but for
those who ask: they read on first.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from proxy.host import daemon_thread
from proxy.host.turns import in_turns
from proxy.server.key_usage.figures import NO_KEY, Day, Figures
from proxy.server.key_usage.token_figures import said
from proxy.telemetry.metrics import UNKNOWN_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from proxy.pool.gpu_time import Taken
    from proxy.server.key_usage.files import UsageFiles
    from proxy.server.request_history import Ended
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.usage")

T = TypeVar("T")

SAVE_EVERY_S: Final = 10.0
"""What a process counts that is killed is lost for so long at most."""
_FILES_S: Final = 5.0
_MOST_DAYS_UNSAVED: Final = 7
_COUNT_EVERY_S: Final = 1.0
_GPU_TIME_EVERY_S: Final = 0.25
"""For the budget of a key, that is asked for with its every request."""
_REQUESTS_A_STEP: Final = 50
_STEPS_A_TURN: Final = 4


class KeyUsage:
    """The usage of today, in memory, and of the days before, in `files`.

    `ended` gives the next so many requests that have ended, `gpu_time` who had the GPU since it was last called. Files
    of the last `kept_days` days stay; 0, or without files: nothing is written. `clock` is Unix time, in seconds.
    """

    def __init__(
        self,
        metrics: Metrics,
        ended: Callable[[int], Sequence[Ended]],
        gpu_time: Callable[[], Iterable[tuple[str, Taken]]],
        files: UsageFiles | None,
        kept_days: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics, self._ended, self._gpu_time = metrics, ended, gpu_time
        self._files, self._kept_days, self._clock = files, kept_days, clock
        self._today = Day(self._date())
        self._by_key: dict[str, Figures] = {}
        """Of today, over all models."""
        self._gpu_time_at = 0.0
        self._unsaved = False
        self._over: list[Day] = []
        """Days that have ended and are not on disk yet."""
        self._saving = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        metrics.before_collecting(self._counted)

    def _date(self) -> dt.date:
        return dt.datetime.fromtimestamp(self._clock(), dt.UTC).date()

    # --- counting ---

    def count(self) -> None:
        """Read on, to now."""
        for _ in self._counted():
            pass

    def _counted(self) -> Iterator[None]:
        while self._count_requests():
            yield
        self._count_gpu_time()
        yield

    def _count_requests(self) -> bool:
        self._turn_the_day()
        found: dict[tuple[str, str], Figures] = {}
        for entry in (entries := self._ended(_REQUESTS_A_STEP)):
            _count(entry, found)
        self._add(found)
        return bool(entries)

    def _count_gpu_time(self) -> None:
        self._turn_the_day()
        self._gpu_time_at = self._clock()
        found: dict[tuple[str, str], Figures] = {}
        for model, taken in self._gpu_time():
            _at(found, NO_KEY, model).idle_gpu_seconds += taken.idle_s
            _at(found, NO_KEY, model).gpu_seconds += taken.unnamed_s
            for key, seconds in taken.by_key.items():
                _at(found, key, model).gpu_seconds += seconds
        self._add(found)

    def _add(self, found: Mapping[tuple[str, str], Figures]) -> None:
        for (key, model), figures in found.items():
            if figures != _NOTHING:
                self._add_one(key, model, figures)

    def _add_one(self, key: str, model: str, figures: Figures) -> None:
        self._today.at(key, model).add(figures)
        self._by_key.setdefault(key, Figures()).add(figures)
        self._unsaved = True
        for kind, tokens in (
            ("prompt", figures.prompt_tokens), ("completion", figures.completion_tokens),
            ("cached", figures.cached_tokens),
        ):  # fmt: skip
            if tokens:
                self._metrics.tokens.labels(model, kind, key).inc(tokens)
        if figures.gpu_seconds:
            self._metrics.gpu_seconds.labels(model, "busy", key).inc(figures.gpu_seconds)
        if figures.idle_gpu_seconds:
            self._metrics.gpu_seconds.labels(model, "idle", NO_KEY).inc(figures.idle_gpu_seconds)

    def _turn_the_day(self) -> None:
        date = self._date()
        # A clock that is set back by a little goes on with the day that it was.
        if date > self._today.date or self._today.date - date > dt.timedelta(days=1):
            if self._unsaved:
                self._over.append(self._today)
            self._today, self._by_key, self._unsaved = Day(date), {}, False

    # --- asking ---

    def today(self, key: str) -> Figures:
        """What a key has used since midnight UTC, by its name."""
        while self._count_requests():
            pass
        if not 0.0 <= self._clock() - self._gpu_time_at < _GPU_TIME_EVERY_S:
            self._count_gpu_time()
        return self._by_key.get(key, _NOTHING)

    def seconds_to_midnight(self) -> float:
        """Until a new day begins, UTC."""
        return 86400.0 - self._clock() % 86400.0

    async def rows(self, days: int) -> list[dict[str, Any]]:
        """By day, key and model, of the last so many days, today first."""
        self.count()
        rows = self._today.as_rows()
        earlier = self._today.date - dt.timedelta(days=days - 1)
        waiting: Mapping[dt.date, Day] = {day.date: day for day in self._over}
        there: set[dt.date] = set(waiting)
        files = self._files
        if days > 1 and files is not None:
            there.update(await self._in_thread(lambda: [*files.dates()]) or ())
        for date in sorted((d for d in there if earlier <= d < self._today.date), reverse=True):
            day = waiting.get(date)
            if day is None and files is not None:
                day = await self._in_thread(partial(files.read, date))
            rows += day.as_rows() if day is not None else []
        return rows

    # --- keeping ---

    async def open(self) -> None:
        """Go on with what was counted today before a restart, and count from now on."""
        await self._add_what_is_there(self._today)
        self._task = asyncio.create_task(self._keep(), name="usage of keys")

    async def _keep(self) -> None:
        saved_at = time.monotonic()
        while True:
            await asyncio.sleep(_COUNT_EVERY_S)
            async for _ in in_turns(self._counted(), _STEPS_A_TURN):
                pass
            if time.monotonic() - saved_at >= SAVE_EVERY_S:
                await self.save()
                saved_at = time.monotonic()

    async def save(self) -> None:
        """Write down what is new."""
        async with self._saving:
            while self._over and await self._write(self._over[0]):
                await self._in_thread(self._forget_old)
                self._over.pop(0)
            del self._over[:-_MOST_DAYS_UNSAVED]
            if self._unsaved:
                self._unsaved = False
                self._unsaved = not await self._write(self._today) or self._unsaved

    async def _write(self, day: Day) -> bool:
        if self._files is None or not self._kept_days:
            return True
        await self._add_what_is_there(day)
        # What it had before must not be lost because it cannot be read just now.
        return day.complete and bool(await self._in_thread(partial(self._files.write, day.date, day.dump())))

    async def _add_what_is_there(self, day: Day) -> None:
        """What an earlier process counted of a day, or this one before its clock was set back; once."""
        if day.complete or self._files is None or not self._kept_days:
            return
        before = await self._in_thread(partial(self._files.read, day.date))
        if before is None or day.complete:
            return
        day.complete = True
        for (key, model), figures in before.rows.items():
            day.at(key, model).add(figures)
            if day is self._today:
                self._by_key.setdefault(key, Figures()).add(figures)

    async def _in_thread(self, work: Callable[[], T]) -> T | None:
        """What it gives, or None where the file system does not; why is logged."""
        try:
            return await daemon_thread.run(work, _FILES_S, "usage of keys")
        except TimeoutError:
            log.error("usage of keys: the file system does not answer within %g s", _FILES_S)
        except OSError as error:
            log.error("usage of keys: %s: %s", error.filename, error.strerror)
        return None

    def _forget_old(self) -> None:
        assert self._files is not None  # noqa: S101 - it has just written one
        self._files.forget_before(self._today.date - dt.timedelta(days=self._kept_days - 1))

    async def close(self) -> None:
        """Count and save what is left."""
        if self._task is not None:
            self._task.cancel()
            (result,) = await asyncio.gather(self._task, return_exceptions=True)
            if isinstance(result, Exception):
                log.error("usage was counted only when it was asked for: %r", result, exc_info=result)
            self.count()
            await self.save()


def _count(entry: Ended, found: dict[tuple[str, str], Figures]) -> None:
    model, key, status, usage, events, metered = entry
    if model == UNKNOWN_MODEL:
        return
    figures = found.get((key or NO_KEY, model)) or _at(found, key or NO_KEY, model)
    figures.requests += 1
    if status >= 400:
        return
    prompt, completion, cached = said(usage) if usage else _UNSAID
    if metered is not None:
        expected, total = metered
        prompt = expected if prompt is None else prompt
        # Of an answer that was cut off an engine may have said less than came.
        completion = max(completion or 0, total - prompt)
    elif completion is None:
        completion = events
    figures.prompt_tokens += prompt or 0
    figures.completion_tokens += completion
    figures.cached_tokens += cached or 0


def _at(found: dict[tuple[str, str], Figures], key: str, model: str) -> Figures:
    figures = found.get((key, model))
    if figures is None:
        figures = found[key, model] = Figures()
    return figures


_NOTHING: Final = Figures()
_UNSAID: Final = said(b"")
