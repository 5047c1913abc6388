"""An administrator who asks a model: what `/admin/chat/completions` takes the right of a key for."""

from __future__ import annotations

from typing import Final

NAME: Final = "(administrator)"
"""Among the names of keys, none of which can be this."""


class Administrator:
    """May use every model, without limits; a `proxy.server.auth.caller.Caller`."""

    __slots__ = ()
    name = NAME
    priority = 0
    meter = None
    metered = None

    def expect(self, request: object) -> None:
        """Nothing is limited."""

    def may_use(self, model: str) -> bool:  # noqa: ARG002 - as of a key
        """Every model."""
        return True

    def check_model(self, model: str) -> None:
        """Every model."""


ADMINISTRATOR: Final = Administrator()
