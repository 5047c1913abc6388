"""Who asks by way of another host, which has checked the key already."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from aiohttp import web

from proxy.errors import ForbiddenError, InvalidRequestError
from proxy.server.auth.api_keys import PRIORITIES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_NAME: Final = re.compile(r"[A-Za-z0-9()][A-Za-z0-9_.@()-]{0,63}")
_COUNT: Final = re.compile(r"[0-9]{1,9}")


FROM_PEER: web.RequestKey[bool] = web.RequestKey("from_peer", bool)
"""Whether a request came from another host."""


class PeerCaller:
    """May do here what was found there; a `proxy.server.auth.caller.Caller`."""

    __slots__ = ("name", "priority")
    meter = None
    metered = None

    def __init__(self, name: str, priority: int) -> None:
        self.name = name
        self.priority = priority

    def expect(self, request: object) -> None:
        """It is limited where it came from."""

    def may_use(self, model: str) -> bool:  # noqa: ARG002 - as of a key
        """It was asked there."""
        return True

    def check_model(self, model: str) -> None:
        """It was asked there."""


def caller_by_peer(headers: Mapping[str, str], peers: Collection[str]) -> PeerCaller | None:
    """Who asks, as a host says whose certificate has the names `peers`; None where no keys are needed there.

    Raises ForbiddenError and InvalidRequestError.
    """
    source, hop = headers.get("x-warmpool-from"), headers.get("x-warmpool-hop")
    if source is None or source not in peers:
        raise ForbiddenError("The certificate is not that of the host that this says to come from.")
    if hop != "1":
        raise InvalidRequestError("A request goes to one other host, and no further.")
    expected = headers.get("x-warmpool-expected-wait")
    if expected is not None and not _COUNT.fullmatch(expected):
        raise InvalidRequestError("x-warmpool-expected-wait is milliseconds.")
    name, priority = headers.get("x-warmpool-key"), headers.get("x-warmpool-priority", "0")
    if name is None:
        return None
    if not _NAME.fullmatch(name) or priority not in _PRIORITIES:
        raise InvalidRequestError("There is no such key or priority.")
    return PeerCaller(name, int(priority))


_PRIORITIES: Final = frozenset(str(value) for value in PRIORITIES.values())
