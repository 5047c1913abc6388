"""Objects that say so when they change: so that a decision need not look at those that did not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Observed:
    """Calls `on_change` after each store to one of its fields; what is changed in place calls it too."""

    __slots__ = ()

    on_change: Callable[[], object] | None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if (changed := getattr(self, "on_change", None)) is not None:
            changed()

    def observed_by(self, on_change: Callable[[], object]) -> None:
        """Call this whenever it changes."""
        self.on_change = on_change

    def note_change(self) -> None:
        """Something in it was changed in place."""
        if self.on_change is not None:
            self.on_change()
