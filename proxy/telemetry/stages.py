"""How long the stages of a wake or a step down took."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class Stages:
    """Durations of named stages, in seconds, in the order in which they began."""

    seconds: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    """When each stage first began, in seconds after this was made; a stage may lie within another."""
    _origin: float = field(default_factory=time.perf_counter)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time the block takes to stage `name`, also when it fails."""
        self.seconds.setdefault(name, 0.0)
        began = time.perf_counter()
        self.starts.setdefault(name, began - self._origin)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def add(self, name: str, seconds: float, began: float) -> None:
        """Add a time that was measured elsewhere; `began` is a reading of `time.perf_counter`."""
        self.starts.setdefault(name, began - self._origin)
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def total_s(self) -> float:
        """The sum of all stages."""
        return sum(self.seconds.values())
