"""What a proxy says of itself while it is under load: the timeline of instances and queues."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loadtest.client import Client
    from loadtest.results import Writer

INTERVAL_S: Final = 0.1


def seen(status: dict[str, Any]) -> dict[str, Any]:
    """The part of `/admin/status` that a timeline shows."""
    return {
        key: {
            "queue": model["queue"],
            "leases": sum(instance["leases"] for instance in model["instances"]),
            "instances": {instance["id"]: instance["state"] for instance in model["instances"]},
        }
        for key, model in status["models"].items()
    }


@contextlib.asynccontextmanager
async def recorded_timeline(
    client: Client, writer: Writer, interval_s: float = INTERVAL_S
) -> AsyncIterator[dict[str, Any]]:
    """Write down the state whenever it has changed while the block lasts; yields the latest one, kept up to date."""
    latest: dict[str, Any] = {}

    async def watch() -> None:
        while True:
            status = await client.json("/admin/status")
            if status is not None and (now := seen(status)) != latest:
                latest.clear()
                latest.update(now)
                writer.state(now)
            await asyncio.sleep(interval_s)

    task = asyncio.create_task(watch())
    try:
        yield latest
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
