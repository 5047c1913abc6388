"""Cross-origin requests (Fetch Standard, 3.2): which web pages may use the API. Off unless origins are configured.

Keys travel in headers, never in cookies, so credentials are not allowed for; with "*" any page may ask, and still
needs a key. Admin routes answer no other site.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.server.auth.origins import Origins

if TYPE_CHECKING:
    from proxy.config.server import CorsSettings
    from proxy.server.http_request import Headers

_METHODS: Final = "GET, POST, DELETE, OPTIONS"
_EXPOSED: Final = (
    "retry-after, server-timing, x-request-id, x-warmpool-instance, x-warmpool-tier, x-ratelimit-limit-requests, "
    "x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


class Cors:
    """What is said to the pages of the settings."""

    def __init__(self, settings: CorsSettings) -> None:
        self._origins = Origins(settings.origins)
        self._any = self._origins.any
        self._max_age = str(int(settings.max_age))

    def _allows(self, headers: Headers, *, admin: bool) -> str | None:
        """What to say to the origin of a request; None: nothing."""
        origin: str | None = headers.get("Origin")
        if origin is None or admin:
            return None
        if self._any:
            return "*"
        return origin if self._origins.allow(origin) else None

    def preflight(self, headers: Headers, *, admin: bool) -> dict[str, str]:
        """The answer to a preflight, which brings no key."""
        if self._allows(headers, admin=admin) is None:
            return {}
        answer = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": self._max_age}
        if wanted := headers.get("Access-Control-Request-Headers"):
            answer["Access-Control-Allow-Headers"] = wanted
        return answer

    def fields(self, headers: Headers, *, admin: bool) -> list[tuple[bytes, bytes]]:
        """What every answer says."""
        fields = [] if self._any else [(b"Vary", b"Origin")]
        if (allowed := self._allows(headers, admin=admin)) is not None:
            fields.append((b"Access-Control-Allow-Origin", allowed.encode("utf-8", "surrogateescape")))
            fields.append((b"Access-Control-Expose-Headers", _EXPOSED.encode("ascii")))
        return fields
