"""Cross-origin requests (Fetch Standard, 3.2): which web pages may use the API. Off unless origins are configured.

Keys travel in headers, never in cookies, so credentials are not allowed for; with "*" any page may ask, and still
needs a key. Admin routes answer no other site.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiohttp import web

from proxy.server.auth.middleware import ADMIN

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.config.server import CorsSettings

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_METHODS: Final = "GET, POST, DELETE, OPTIONS"
_EXPOSED: Final = (
    "retry-after, server-timing, x-request-id, x-warmpool-instance, x-warmpool-tier, x-ratelimit-limit-requests, "
    "x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


class Cors:
    """The middleware that answers preflights, and the signal that marks answers."""

    def __init__(self, settings: CorsSettings) -> None:
        self._origins = frozenset(origin.lower() for origin in settings.origins)
        self._any = "*" in self._origins
        self._max_age = str(int(settings.max_age))

    def _allows(self, request: web.Request) -> str | None:
        """What to say to the origin of a request; None: nothing."""
        origin = request.headers.get("Origin")
        if origin is None or ADMIN.match(request.path):
            return None
        if self._any:
            return "*"
        return origin if origin.lower() in self._origins else None

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a preflight, which brings no key."""
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return await handler(request)
        headers = {}
        if self._allows(request) is not None:
            wanted = request.headers.get("Access-Control-Request-Headers")
            headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": self._max_age}
            if wanted:
                headers["Access-Control-Allow-Headers"] = wanted
        return web.Response(status=204, headers=headers)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """A signal before an answer's headers go out."""
        if not self._any:
            response.headers.add("Vary", "Origin")
        if (allowed := self._allows(request)) is not None:
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
