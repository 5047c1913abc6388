"""Web pages: what the browser of somebody who reaches this server may be made to do by the pages that it shows.

A browser sends what any page asks it to, and says in `Origin` and `Sec-Fetch-Site` (Fetch Metadata, 2.1) where that
page is from. Only of a page whose own name was made to point here (DNS rebinding) it says that it is of the same
origin: so without keys, by loopback, a request must also come by a name that nobody else can give to this host.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Final, Protocol

from proxy.config.values import is_loopback
from proxy.errors import ForbiddenError
from proxy.server.auth.origins import Origins

if TYPE_CHECKING:
    import asyncio

    from proxy.config.server import ServerSettings
    from proxy.server.http_request import Headers

_SITE: Final = "Sec-Fetch-Site"
_LOOKS: Final = ("GET", "HEAD")
_HARMLESS: Final = frozenset({b"application/json", b"text/event-stream"})
_CONTAINED: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"sandbox; default-src 'none'"),
)
_PROXIES: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


class WebRequest(Protocol):
    """What is looked at of a request."""

    @property
    def method(self) -> str:
        """GET, POST, …"""

    @property
    def headers(self) -> Headers:
        """Its header fields."""

    @property
    def transport(self) -> asyncio.BaseTransport | None:
        """Its connection, as long as there is one."""


class Pages:
    """What pages may do with models, by the settings of the server."""

    def __init__(self, server: ServerSettings) -> None:
        self._origins = Origins(server.cors.origins)
        self._hosts = frozenset(host.lower() for host in server.hosts)
        self._needs_keys = server.keys_file is not None
        self._open = not server.authenticates_clients and not server.allow_anyone

    def knows(self, transport: asyncio.BaseTransport | None, host: str) -> bool:
        """Whether a connection may use models by this name (`Host`, "" where there is none)."""
        if not self._open or transport is None:
            return True
        local = transport.get_extra_info("sockname")
        if not isinstance(local, tuple) or not is_loopback(local[0]):
            return True
        name = _host_of(host.lower())
        return not name or name == "localhost" or name in self._hosts or _is_address(name)

    def check(self, request: WebRequest) -> None:
        """Raises ForbiddenError for a request of a client that a page must not make."""
        if not all(self.knows(request.transport, host) for host in request.headers.getall("Host")):
            raise ForbiddenError(
                "Only by an address, by localhost or by a name in server.hosts, as long as there are no API keys."
            )
        if "Origin" in request.headers:
            self._check_origin(request, request.headers["Origin"].lower())
        elif not self._needs_keys and _is_foreign(request):
            raise ForbiddenError("A page of another site may not do this; server.cors.origins names those that may.")

    def _check_origin(self, request: WebRequest, origin: str) -> None:
        """A page may use models without a key, or open a WebSocket, only if its origin is configured.

        CORS is not enough: it lets every page send simple requests, and open WebSockets and read what comes.
        """
        if self._origins.allow(origin):
            return
        if self._needs_keys:
            if request.headers.get("Upgrade", "").lower() == "websocket":
                _refuse_foreign(request, origin)
            return
        page_host = _host_of(origin.partition("://")[2])
        if not is_loopback(page_host) and page_host not in self._hosts:
            raise ForbiddenError("Pages of this origin may not do this; server.cors.origins names those that may.")


def contained(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The header fields of an engine's answer, so that it runs nothing in a browser: it shares the admin page's origin.

    What says that it is JSON or events is taken for nothing else, and stays as it is.
    """
    kinds = [value.partition(b";")[0].strip().lower() for name, value in fields if name.lower() == b"content-type"]
    if len(kinds) == 1 and kinds[0] in _HARMLESS:
        return fields
    names = {name for name, _ in _CONTAINED}
    return [field for field in fields if field[0].lower() not in names] + [*_CONTAINED]


def refuse_other_sites(request: WebRequest, *, page: bool) -> None:
    """For administration: a browser knows the token and is on this host, so other sites' pages must not have it act.

    `page`: what is asked for is a page, to which another one may lead.
    """
    site = request.headers.get(_SITE, "same-origin")
    if request.method in _LOOKS:
        if site == "cross-site" and not (page and _leads_here(request)):
            raise ForbiddenError("A page of another site may not do this.")
        return
    if site not in ("same-origin", "none"):
        raise ForbiddenError("A page of another site may not do this.")
    if (origin := request.headers.get("Origin")) is not None:
        _refuse_foreign(request, origin)


def refuse_borrowed_loopback(request: WebRequest) -> None:
    """By loopback come other machines too: through a proxy on this host, or a name that a web page points here."""
    if any(name in request.headers for name in _PROXIES):
        raise ForbiddenError("Not through another proxy, as long as there is no admin token.")
    if not is_loopback(_host_of(request.headers.get("Host", "").lower())):
        raise ForbiddenError("Only by the name localhost or a loopback address, as long as there is no admin token.")


def _is_foreign(request: WebRequest) -> bool:
    """Whether a page of another site has the browser send this, by what the browser says."""
    site = request.headers.get(_SITE, "none")
    if site == "same-site":  # by loopback: another port of this host
        return not is_loopback(_host_of(request.headers.get("Host", "").lower()))
    return site not in ("same-origin", "none")


def _leads_here(request: WebRequest) -> bool:
    """Whether somebody follows a link: the answer takes the other page's place, and no page can read it."""
    return request.headers.get("Sec-Fetch-Mode") == "navigate" and request.headers.get("Sec-Fetch-Dest") == "document"


def _refuse_foreign(request: WebRequest, origin: str) -> None:
    if origin.partition("://")[2].lower() != request.headers.get("Host", "").lower():
        raise ForbiddenError("A page of another site may not do this.")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_of(authority: str) -> str:
    """Without port and brackets."""
    name = authority.rpartition(":")[0] if re.search(r":\d+$", authority) else authority
    return name.strip("[]")
