"""What the parts of the pool have done by each other: one object for all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

    from proxy.pool.instance import Instance
    from proxy.pool.model import Model
    from proxy.pool.plan import StepDown


class Effects(Protocol):
    """Synchronous but for `last_look`: what takes time is begun as a task of the pool's."""

    def tick(self) -> None:
        """Decide anew and start what was decided."""

    def tick_soon(self) -> None:
        """Decide within a moment; requests that end one after the other are one reason, not many."""

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of the pool's; its end is a reason to decide anew."""

    def move(self, model: Model, instance: Instance, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have a task take an instance out of a moving state; whatever becomes of it, it does not stay there."""

    def step_down(self, action: StepDown) -> asyncio.Task[None]:
        """Begin to take an instance to a colder tier."""

    def remove(self, model: Model, instance: Instance, reason: str) -> None:
        """Begin to end an instance that rests."""

    def withdraw(self, key: str, reason: str) -> None:
        """End what is made ready for a model, if anything is; its outdated engines serve on."""

    def note_moved(self) -> None:
        """Something moved: memory is to be looked at."""

    async def last_look(self, model: Model, instance: Instance) -> None:
        """Ask an engine that is about to step down for its own metrics."""

    def image_written(self, model: Model, instance: Instance) -> None:
        """It has a new image."""

    def ended(self, model: Model, instance: Instance, watcher: asyncio.Task[str]) -> None:
        """The watcher of an engine says that it has ended."""

    def give_up(self, model: Model, instance: Instance) -> None:
        """The engine is of no use any more. During a move the move's own task finds out."""

    def give_up_stalled(self, model: Model, instance: Instance, reason: str) -> None:
        """An engine that stands still: its clients get an error, and the next request another engine."""
