"""How long the stages of a wake or a step down took."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(slots=True)
class Stages:
    """Durations of named stages, in seconds, in the order in which they began."""

    seconds: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    """When each stage first began, in seconds after this was made; a stage may lie within another."""
    on_begin: Callable[[], None] | None = None
    """Called whenever a stage begins."""
    _origin: float = field(default_factory=time.perf_counter)
    _running: dict[str, None] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time the block takes to stage `name`, also when it fails."""
        self.seconds.setdefault(name, 0.0)
        began = time.perf_counter()
        self.starts.setdefault(name, began - self._origin)
        self._running[name] = None
        if self.on_begin is not None:
            self.on_begin()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began
            self._running.pop(name, None)

    def add(self, name: str, seconds: float, began: float) -> None:
        """Add a time that was measured elsewhere; `began` is a reading of `time.perf_counter`."""
        self.starts.setdefault(name, began - self._origin)
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def so_far(self) -> list[tuple[str, float, float | None]]:
        """Name, start and duration of each; no duration as long as it goes on."""
        return [(name, at, None if name in self._running else self.seconds[name]) for name, at in self.starts.items()]

    def total_s(self) -> float:
        """The sum of all stages."""
        return sum(self.seconds.values())
