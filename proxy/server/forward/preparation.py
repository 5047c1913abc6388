"""What is found out about the head of a request once, however many requests come with the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.errors import BodyTooLargeError, ForbiddenError, MediaTypeError, RequestError
from proxy.server.auth.administrator import ADMINISTRATOR
from proxy.server.auth.authorization import CHAT, Kind, refuse_expired
from proxy.server.auth.peer_caller import caller_by_peer
from proxy.server.forward import routes
from proxy.server.forward.fields import NOT_TO_ENGINE, keep_alive_s, max_wait_s, passed_on
from proxy.server.forward.tracing import CONTEXT_FIELDS
from proxy.server.request_body import coding_of

if TYPE_CHECKING:
    from proxy.server.forward.cycle import RequestCycle
    from proxy.server.http_request import RequestHead
    from proxy.server.own_routes import Answer
    from proxy.server.service import Service

_LOOKS: Final = ("GET", "HEAD")
_CLIENT: Final = Kind.CLIENT
_CHAT_OF_ENGINE: Final = "/v1/chat/completions"


def answered_at_once(request: RequestCycle, service: Service) -> Answer | None:
    """What is answered here, if it is; else the engine's route that it asks for is found. Raises RequestError."""
    head = request.head
    if not head.prepared:
        prepare(request, service)
    if head.is_preflight:
        return 204, preflight(head, service), b""
    check_caller(request, service)
    if head.match is not None or head.is_for_aiohttp:
        return None
    if (answer := service.own_routes.answer(head, request.caller)) is not None:
        return answer
    try:
        find_route(head, service)
    except RequestError:
        # What is refused of an engine's route is one of its requests.
        request.counts = head.route is not None
        raise
    return None


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
        head.is_for_aiohttp = _is_admin(head) and head.path != CHAT
        if head.is_for_aiohttp:
            head.coding = coding_of(headers.getall("Content-Encoding"))
        if head.kind is Kind.CLIENT and request.connection.peers is None:
            auth.pages.check(request)
    head.prepared = True


def check_caller(request: RequestCycle, service: Service) -> None:
    """Find out who asks, whether he may, and whether that much. Raises RequestError."""
    head, auth = request.head, service.auth
    if (peers := request.connection.peers) is not None:
        if head.kind is not _CLIENT:
            raise ForbiddenError("Other hosts ask for models, and nothing else.")
        request.caller = caller_by_peer(head.headers, peers)
        _check_length(request, service)
        return
    if head.kind is not _CLIENT:
        if head.kind is not Kind.PUBLIC:
            auth.check_admin(request, head.path, page=head.kind is Kind.PAGE)
        if head.path == CHAT:
            auth.check_chat()
            request.caller = ADMINISTRATOR
    elif auth.keys is not None:
        if head.known is None or head.known_of is not auth.keys:
            head.known, head.known_of = auth.identify(head.keys), auth.keys
        refuse_expired(head.known.entry)
        _check_length(request, service)
        if head.only_looks:
            request.caller = auth.holder(head.known)
        else:
            request.admission = auth.admit(head.known)
            request.caller = request.admission.holder
        return
    else:
        head.asks_nobody = True
    _check_length(request, service)


def _check_length(request: RequestCycle, service: Service) -> None:
    # Before any of it is read; what has no length is counted while it is read.
    limit = service.pool.settings.server.body_limit
    if request.length > limit:
        raise BodyTooLargeError(f"The body has {request.length} bytes; the limit is {limit}.")


def find_route(head: RequestHead, service: Service) -> None:
    """The engine's route that it asks for. Raises RequestError."""
    settings = service.pool.settings
    asks_as_admin = head.path == CHAT
    path = _CHAT_OF_ENGINE if asks_as_admin else head.path
    match = routes.find(head.method, path, head.query, azure=settings.server.azure_paths, extra=settings.extra_routes)
    if asks_as_admin and head.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        # As for a command: a form of another site's page cannot have this type.
        raise MediaTypeError("This needs the header `Content-Type: application/json`.")
    head.path_for_log = match.route.path
    if match.route.websocket:
        head.is_for_aiohttp = True
        return
    head.route = match.route
    head.coding = coding_of(head.headers.getall("Content-Encoding"))
    head.max_wait_s, head.keep_s = max_wait_s(head.headers), keep_alive_s(head.headers)
    head.session = head.headers.get("x-session-id")
    head.makes_response = match.route.path == "/v1/responses"
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
