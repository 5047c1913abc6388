"""An image as the pool knows it: where it is, what it holds, and what its restores say of it."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proxy.pool.observed import Observed

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.telemetry.engine_metrics import Series


class Place(enum.Enum):
    """Where an image is."""

    NOWHERE = enum.auto()
    """It was never written, or is gone."""
    TMPFS = enum.auto()
    ARCHIVE = enum.auto()
    """It has to be brought back to tmpfs before it can be restored."""


@dataclass(slots=True, eq=False)
class Image(Observed):
    """One for all instances of a model where the runtime shares them, else one an instance."""

    place: Place = Place.NOWHERE
    failures: int = 0
    """Restores that failed, in a row."""
    sleep_level: int = 0
    canary: str | None = None
    canary_checked: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever writes it or moves it."""
    copying: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever writes the copy of the weights."""
    verification: asyncio.Task[None] | None = None
    """Its files are read after a restore that failed."""
    counted: dict[Series, float] | None = None
    """What an engine that is restored from it has counted in its own metrics, as far as that is known."""
    on_change: Callable[[], object] | None = None

    @property
    def present(self) -> bool:
        """Whether there is one, on tmpfs or in the archive."""
        return self.place is not Place.NOWHERE

    @property
    def archived(self) -> bool:
        """Whether it is in the archive."""
        return self.place is Place.ARCHIVE

    def written(self, sleep_level: int, canary: str | None) -> None:
        """A new one is on tmpfs."""
        self.place, self.failures, self.counted = Place.TMPFS, 0, None
        self.sleep_level, self.canary, self.canary_checked = sleep_level, canary, False

    def restored(self) -> None:
        """An engine was restored from it, and serves."""
        self.failures = 0

    def canary_repeated(self) -> None:
        """An engine that was restored from it has given the answer that it is known by."""
        self.canary_checked = True

    def expect_canary(self) -> None:
        """The next engine that is restored from it has to give that answer again."""
        self.canary_checked = False

    def restore_failed(self, *, counts: bool) -> None:
        """No engine came of it; `counts`: which says something about it."""
        self.failures += counts

    def verified_by(self, task: asyncio.Task[None]) -> None:
        """This task reads its files."""
        self.verification = task

    def moved(self, place: Place) -> None:
        """It is somewhere else now."""
        self.place = place

    def copied_back(self, canary: str | None) -> None:
        """It was damaged; its copy in the archive takes its place."""
        self.place, self.canary = Place.ARCHIVE, canary

    def gone(self) -> None:
        """There is no image any more."""
        self.place, self.failures = Place.NOWHERE, 0
        self.canary, self.canary_checked = None, False
