"""A request that was begun below aiohttp's server and is gone on with above it: what is under way already.

`proxy.server.front` begins what is ordinary. Where such a request turns out not to be, it is parsed by aiohttp as if it
had just come, and whoever would have begun something finds here that it is begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aiohttp import web

    from proxy.engine.connection import Exchange
    from proxy.pool.lease import Lease
    from proxy.server.auth.caller import Caller


class Admitted(Protocol):
    """What the guard let in, where there are keys."""

    @property
    def holder(self) -> Caller:
        """Whose key it was."""

    def end(self, status: int) -> None:
        """It was answered, or left by its client (status 0)."""

    def undo(self) -> None:
        """It did not begin."""


@dataclass(slots=True)
class Begun:
    """A lease, and the request on its way to the engine or failed. Whoever takes it ends both."""

    lease: Lease
    upstream: Exchange
    began: float
    """By `time.perf_counter`."""


@dataclass(slots=True)
class Handed:
    """What is under way for a request; each part is taken once, and None from then on."""

    request_id: str
    begun: Begun | None
    admitted: Admitted | None

    def close(self) -> None:
        """Let go of what nobody took."""
        begun, self.begun = self.begun, None
        if begun is not None:
            begun.upstream.close()
            begun.lease.release()
        admitted, self.admitted = self.admitted, None
        if admitted is not None:
            admitted.undo()


def handed_of(request: web.BaseRequest) -> Handed | None:
    """What was handed on with a request, if anything was."""
    return getattr(request.protocol, "handed", None)


def take_begun(request: web.BaseRequest) -> Begun | None:
    """The lease and the exchange, for the one who asks first."""
    handed = handed_of(request)
    if handed is None:
        return None
    begun, handed.begun = handed.begun, None
    return begun


def take_admitted(request: web.BaseRequest) -> Admitted | None:
    """The guard's leave, for the one who asks first."""
    handed = handed_of(request)
    if handed is None:
        return None
    admitted, handed.admitted = handed.admitted, None
    return admitted
