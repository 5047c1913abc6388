"""What is found out about the head of a request once, however many requests come with the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.server.auth.authorization import Kind
from proxy.server.forward import routes
from proxy.server.forward.fields import NOT_TO_ENGINE, max_wait_s, passed_on
from proxy.server.forward.tracing import CONTEXT_FIELDS
from proxy.server.request_body import coding_of

if TYPE_CHECKING:
    from proxy.server.forward.cycle import RequestCycle
    from proxy.server.http_request import RequestHead
    from proxy.server.service import Service

_LOOKS: Final = ("GET", "HEAD")


def prepare(request: RequestCycle, service: Service) -> None:
    """Whom it is for and what it brings, which depends on it and on its connection. Raises ForbiddenError."""
    head, auth = request.head, service.auth
    headers = head.headers
    # The way to the status page is no secret; the page itself is for those who may see it.
    head.kind = Kind.PUBLIC if service.own_routes.leads_to_page(head) else auth.kind_of(head.path)
    head.path_for_log = service.own_routes.path_for_log(head.path)
    if service.cors is not None:
        head.cors = service.cors.fields(headers, admin=_is_admin(head))
        head.is_preflight = head.method == "OPTIONS" and "Access-Control-Request-Method" in headers
    if not head.is_preflight:
        head.keys = auth.keys_shown_by(headers)
        head.only_looks = head.method in _LOOKS and "Upgrade" not in headers
        head.is_for_aiohttp = _is_admin(head)
        if head.is_for_aiohttp:
            head.coding = coding_of(headers.getall("Content-Encoding"))
        if head.kind is Kind.CLIENT:
            auth.pages.check(request)
    head.prepared = True


def find_route(head: RequestHead, service: Service) -> None:
    """The engine's route that it asks for. Raises RequestError."""
    match = routes.find(head.method, head.path, head.query)
    head.path_for_log = match.route.path
    if match.route.websocket:
        head.is_for_aiohttp = True
        return
    head.route = match.route
    head.coding = coding_of(head.headers.getall("Content-Encoding"))
    head.max_wait_s = max_wait_s(head.headers)
    head.content_type = head.headers.get("Content-Type", "")
    head.request_line = f"{head.method} {match.target} HTTP/1.1\r\n".encode("ascii")
    left_out = NOT_TO_ENGINE if service.traces is None else NOT_TO_ENGINE | CONTEXT_FIELDS
    fields = passed_on(head.fields, left_out)
    head.engine_fields = b"".join([b"%b: %b\r\n" % field for field in fields]) + b"X-Request-Id: "
    head.match = match


def preflight(head: RequestHead, service: Service) -> dict[str, str]:
    """What a page is told that asks whether it may (CORS)."""
    assert service.cors is not None  # noqa: S101 - else there are none
    return service.cors.preflight(head.headers, admin=_is_admin(head))


def _is_admin(head: RequestHead) -> bool:
    return head.kind is Kind.ADMIN or head.kind is Kind.PAGE
