"""A bus within one process, which loses, repeats and holds back what a test says."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from proxy.fleet.bus import Handler


class Exchange:
    """What the buses of a test are connected to."""

    def __init__(self) -> None:
        self.buses: list[MemoryBus] = []
        self.sent: list[tuple[str, bytes]] = []
        self.lose: Callable[[str, bytes], bool] = lambda _subject, _data: False

    def deliver(self, source: MemoryBus | None, subject: str, data: bytes) -> None:
        self.sent.append((subject, data))
        if self.lose(subject, data):
            return
        for bus in self.buses:
            if bus is not source and bus.connected:
                bus.get(subject, data)


class MemoryBus:
    """One host's."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._handlers: Mapping[str, Handler] = {}
        self._changed: Callable[[bool], None] = lambda _: None
        self.connected = False

    def open(self, handlers: Mapping[str, Handler], changed: Callable[[bool], None]) -> None:
        self._handlers, self._changed = handlers, changed
        self._exchange.buses.append(self)
        asyncio.get_running_loop().call_soon(self.connect)

    def connect(self) -> None:
        self.connected = True
        self._changed(True)

    def disconnect(self) -> None:
        self.connected = False
        self._changed(False)

    def get(self, subject: str, data: bytes) -> None:
        for pattern, handler in self._handlers.items():
            if pattern == subject or (pattern.endswith(".*") and subject.startswith(pattern[:-1])):
                handler(subject, data)

    async def publish(self, subject: str, data: bytes) -> bool:
        if self.connected:
            self._exchange.deliver(self, subject, data)
        return self.connected

    async def close(self) -> None:
        self.connected = False
        if self in self._exchange.buses:
            self._exchange.buses.remove(self)
