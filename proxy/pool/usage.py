"""How often each model is asked for: a count that halves every week, kept over restarts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final

import orjson

from proxy.host import owned

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("warmpool.usage")

_LIMIT_BYTES: Final = 16 << 20
HALF_LIFE_S: Final = 7 * 86400.0
SAVE_EVERY_S: Final = 60.0
_AT_ONCE_S: Final = 1.0
"""Requests within so short a time count as if they had come together: they differ by a millionth."""


class Usage:
    """The counts, in memory; `load` and `save` are for a file, if there is one. `clock` is Unix time, in seconds."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._counts: dict[str, tuple[float, float]] = {}
        """Model → its count, and when that was right."""
        self._saved: dict[str, tuple[float, float]] = {}
        self.news = asyncio.Event()
        """A model was asked for that never was before: worth saving at once."""

    def note(self, model: str, count: int = 1) -> None:
        """So many requests more."""
        now = self._clock()
        known = self._counts.get(model)
        if known is None:
            self.news.set()
            self._counts[model] = float(count), now
        elif 0.0 <= now - known[1] < _AT_ONCE_S:
            self._counts[model] = known[0] + count, known[1]
        else:
            self._counts[model] = _decayed(*known, now) + count, now

    def count(self, model: str) -> float:
        """As of now."""
        known = self._counts.get(model)
        return _decayed(*known, self._clock()) if known is not None else 0.0

    def ranking(self) -> list[str]:
        """The models that were ever asked for, the one asked for most first."""
        return sorted(self._counts, key=lambda model: (-self.count(model), model))

    def load(self) -> None:
        """Take over what was saved; a file that is damaged counts as none."""
        if self._path is None:
            return
        try:
            found = orjson.loads(owned.read_plain(self._path, _LIMIT_BYTES))
            self._counts = {str(model): (float(entry[0]), float(entry[1])) for model, entry in found.items()}
        except FileNotFoundError:
            return
        except (OSError, orjson.JSONDecodeError, AttributeError, TypeError, ValueError, LookupError) as error:
            log.warning("%s: %s; counting begins anew", self._path, error)
            self._counts = {}
        self._saved = dict(self._counts)

    def save(self) -> None:
        """Write the counts beside, sync and rename, if there is something new; a failure is logged."""
        if self._path is None or self._counts == self._saved:
            return
        counts = dict(self._counts)
        try:
            if not self._path.parent.is_dir():
                owned.claim(self._path.parent)  # a cleaner removed it
            with owned.replacing(self._path) as file:
                file.write(orjson.dumps(counts))
        except OSError as error:
            log.warning("%s: %s", self._path, error.strerror)
            return
        self._saved = counts

    async def keep_saved(self, every_s: float = SAVE_EVERY_S) -> None:
        """Save now and then, and when there is news, for ever; once more when cancelled."""
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(every_s):
                        await self.news.wait()
                self.news.clear()
                await asyncio.to_thread(self.save)
        finally:
            self.save()


def _decayed(count: float, since: float, now: float) -> float:
    return float(count * 0.5 ** (max(0.0, now - since) / HALF_LIFE_S))
