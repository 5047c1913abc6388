"""When a client's bytes are taken, and when they have to wait in the kernel."""

from __future__ import annotations

import asyncio
from typing import Final

STEP: Final = 128 << 10
"""After so much in one piece others are served first. More of it is there already, as of a large body, and libuv would
read it up to 32 times before anybody else's: some milliseconds."""


class ReadFlow:
    """Of one connection."""

    __slots__ = ("_gives_way", "_transport", "is_held")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._gives_way = False
        self.is_held = False
        """Nothing is read until `release`."""

    def hold(self) -> None:
        """Read no more."""
        if not self.is_held:
            self.is_held = True
            self._transport.pause_reading()

    def release(self) -> None:
        """Read on."""
        self.is_held = False
        self._read_on()

    def give_way(self) -> None:
        """Read on in the next turn of the event loop."""
        if not self._gives_way and not self.is_held:
            self._gives_way = True
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._take_up)

    def _take_up(self) -> None:
        self._gives_way = False
        self._read_on()

    def _read_on(self) -> None:
        if not self.is_held and not self._gives_way and not self._transport.is_closing():
            self._transport.resume_reading()
