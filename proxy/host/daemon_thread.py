"""Work that may hang, as reading a file of a network file system, in a thread that nothing waits for at the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def run(work: Callable[[], T], limit_s: float, name: str) -> T:
    """The result of `work`, in a thread of its own. Raises TimeoutError, and leaves it alone then."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: Exception | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def carry_out() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as problem:  # noqa: BLE001 - whoever asked gets it
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=carry_out, name=name, daemon=True).start()
    async with asyncio.timeout(limit_s):
        return await result
