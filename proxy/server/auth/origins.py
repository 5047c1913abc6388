"""Origins of web pages (RFC 6454), as `server.cors.origins` names them: single ones, all of a scheme, any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

ANY: Final = "*"
_ALL_OF_SCHEME: Final = "://*"


class Origins:
    """Those that may use the API."""

    def __init__(self, names: Iterable[str]) -> None:
        lowered = {name.lower() for name in names}
        self.any = ANY in lowered
        self._schemes = frozenset(name.removesuffix(ANY) for name in lowered if name.endswith(_ALL_OF_SCHEME))
        self._single = frozenset(lowered)

    def allow(self, origin: str) -> bool:
        """Whether a page of this origin is among them."""
        origin = origin.lower()
        if self.any or origin in self._single:
            return True
        scheme, separator, rest = origin.partition("://")
        return bool(rest) and scheme + separator in self._schemes
