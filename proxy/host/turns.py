"""Long work in the event loop's own thread, without holding it: others have their turn in between."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

T = TypeVar("T")


async def in_turns(items: Iterable[T], most: int) -> AsyncIterator[T]:
    """Each of the items, `most` of them in one turn of the event loop. They must not change meanwhile."""
    for number, item in enumerate(items, 1):
        yield item
        if number % most == 0:
            await asyncio.sleep(0)
