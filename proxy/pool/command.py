"""What an operator asks of an instance: to go down to a tier."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from proxy.errors import CommandFailedError

if TYPE_CHECKING:
    from proxy.tiers import Tier


class Command:
    """Open until it comes true, or cannot. It is kept by the instance that it was given to."""

    __slots__ = ("_ended", "found", "instance_id", "to")

    def __init__(self, instance_id: str, found: Tier, to: Tier) -> None:
        self.instance_id = instance_id
        self.found = found
        """Where the instance was when the command came; ready, if it was being woken."""
        self.to = to
        self._ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    @property
    def open(self) -> bool:
        """Whether it has still to come true."""
        return not self._ended.done()

    def end(self, failure: str | None = None) -> None:
        """It came true, or could not."""
        if self.open:
            self._ended.set_result(failure)

    async def carried_out(self) -> None:
        """Return when the instance is there. Raises CommandFailedError; cancelling does not take it back."""
        failure = await asyncio.shield(self._ended)
        if failure is not None:
            raise CommandFailedError(f"{self.instance_id} did not get to {self.to.label}: {failure}")
