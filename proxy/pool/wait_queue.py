"""The queue of those who wait, by class: the next one is found, and anybody leaves, without looking at the others."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from proxy.pool.lease import Lease
    from proxy.tiers import Tier

T = TypeVar("T")


class WaitQueue(Generic[T]):
    """Everybody once, with a rank; the lowest rank is next. Within a class ranks must come in ascending order."""

    __slots__ = ("_classes", "_count", "on_count")

    def __init__(self) -> None:
        self._classes: dict[int, OrderedDict[T, float]] = {}
        self._count = 0
        self.on_count: Callable[[int], object] | None = None
        """Called with how many more there are."""

    def __len__(self) -> int:
        return self._count

    def _counted(self, more: int) -> None:
        self._count += more
        if more and self.on_count is not None:
            self.on_count(more)

    def __iter__(self) -> Iterator[T]:
        """In order; nobody may come or leave meanwhile."""
        members = [members.items() for members in self._classes.values()]
        return (member for member, _ in heapq.merge(*members, key=itemgetter(1)))

    def members(self) -> Iterator[T]:
        """In any order, which is quicker; nobody may come or leave meanwhile."""
        return itertools.chain.from_iterable(self._classes.values())

    def add(self, member: T, class_: int, rank: float) -> None:
        """At the end of its class."""
        self._classes.setdefault(class_, OrderedDict())[member] = rank
        self._counted(1)

    def first(self) -> T | None:
        """Who is next; None when nobody waits."""
        heads = [next(iter(members.items())) for members in self._classes.values() if members]
        return min(heads, key=lambda head: head[1])[0] if heads else None

    def discard(self, member: T) -> None:
        """It waits no more; it may be gone already."""
        for members in self._classes.values():
            if members.pop(member, None) is not None:
                self._counted(-1)

    def clear(self) -> None:
        """Nobody waits."""
        self._classes.clear()
        self._counted(-self._count)


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
    """How much earlier than it came it counts, for its priority."""

    def hand_on(self) -> None:
        """Give back a lease that was granted in the moment it was cancelled."""
        granted = self.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result().release()
