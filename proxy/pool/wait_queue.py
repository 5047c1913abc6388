"""The queue of those who wait, by rank: the next one is found, and anybody leaves, without looking at the others."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from proxy.pool.lease import Lease
    from proxy.tiers import Tier

T = TypeVar("T")


class WaitQueue(Generic[T]):
    """Everybody once, with a rank; the lowest rank is next, and of equal ones who came first."""

    __slots__ = ("_entries", "_ranks", "_serial", "on_count")

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, T]] = []
        self._ranks: dict[T, tuple[float, int]] = {}
        self._serial = itertools.count()
        self.on_count: Callable[[int], object] | None = None
        """Called with how many more there are."""

    def __len__(self) -> int:
        return len(self._entries)

    def _counted(self, more: int) -> None:
        if more and self.on_count is not None:
            self.on_count(more)

    def __contains__(self, member: T) -> bool:
        return member in self._ranks

    def __iter__(self) -> Iterator[T]:
        """In order; nobody may come or leave meanwhile."""
        return (member for _, _, member in self._entries)

    def add(self, member: T, rank: float) -> None:
        """It must not be there yet."""
        place = self._ranks[member] = rank, next(self._serial)
        insort(self._entries, (*place, member))
        self._counted(1)

    def first(self) -> T | None:
        """Who is next; None when nobody waits."""
        return self._entries[0][2] if self._entries else None

    def discard(self, member: T) -> None:
        """It waits no more; it may be gone already."""
        place = self._ranks.pop(member, None)
        if place is not None:
            del self._entries[bisect_left(self._entries, place)]
            self._counted(-1)

    def clear(self) -> None:
        """Nobody waits."""
        count = len(self)
        self._entries.clear()
        self._ranks.clear()
        self._counted(-count)


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a lease."""

    granted: asyncio.Future[Lease]
    since: float
    found: Tier
    """What it found when it came."""
    preferred: str | None
    """The only instance that it is to have, as long as that holds its engine."""
    near: bytes | None = None
    """What it has in common with others; see `instance.pick`."""
    head_start_s: float = 0.0
    """How much earlier than it came it counts, for its priority; later for its length."""
    streams: bool = False
    """Its answer comes token by token."""

    def hand_on(self) -> None:
        """Give back a lease that was granted in the moment it was cancelled."""
        granted = self.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result().release()
