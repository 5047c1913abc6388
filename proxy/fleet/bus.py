"""How hosts hear of each other: messages by subject, to whoever listens; none is kept for later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Handler: TypeAlias = Callable[[str, bytes], None]
    """Gets the subject and what was sent; must not raise."""


class Bus(Protocol):
    """One connection to it, which is made again when it is lost."""

    @property
    def connected(self) -> bool:
        """Whether messages come and go just now."""

    def open(self, handlers: Mapping[str, Handler], changed: Callable[[bool], None]) -> None:
        """Begin to connect, and to listen to these subjects, where * is any one word; `changed`: connected, or not."""

    async def publish(self, subject: str, data: bytes) -> bool:
        """Send a message to all who listen now; whether it could be sent. Returns within two seconds."""

    async def close(self) -> None:
        """No more of it. Returns within a few seconds."""
