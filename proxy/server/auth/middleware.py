"""Who may do what: API keys for clients, a token or this host for administration, limits by key.

One middleware in front of every route, closed by default: a route that is neither public nor administrative needs a
key as soon as there is a file of keys. Which of the three a request is for is taken from the route that was found,
never from the text of the path.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hmac
import logging
import re
import time
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from aiohttp import hdrs, web

from proxy.config.values import is_loopback
from proxy.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ForbiddenError,
    ModelNotAllowedError,
    RateLimitError,
    RequestError,
    RouteNotFoundError,
)
from proxy.server.auth import api_keys
from proxy.server.auth.browser_origin import Pages, refuse_borrowed_loopback, refuse_other_sites
from proxy.server.auth.caller import CALLER, KEY_FIELDS, KEY_PROTOCOL, keys_shown
from proxy.server.auth.prompt_tokens import prompt_tokens
from proxy.server.auth.rate_limit import Account
from proxy.server.auth.token_meter import Meter
from proxy.server.forward.handed import take_admitted
from proxy.server.forward.routes import spelled_as
from proxy.server.safe_logging import method_of, path_of
from proxy.telemetry.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from proxy.config.settings import Settings
    from proxy.server.auth.api_keys import Entry, Keys
    from proxy.telemetry.metrics import Metrics

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("warmpool.auth")

PASSED: web.RequestKey[bool] = web.RequestKey("passed", bool)
"""Of a request that may pass: what became of it is for its handler to say."""
PUBLIC: Final = frozenset({"/health", "/ready"})
"""For load balancers: they say one bit each."""
PAGE: Final = frozenset({"/admin", "/admin/"})
"""The status page, which holds no data; its script asks for the token."""
ADMIN: Final = re.compile(r"/(metrics|admin)(/|$)")

_REFUSED_AS: Final = {
    AuthenticationError: "key",
    BodyTooLargeError: "body",
    ModelNotAllowedError: "model",
    RateLimitError: "limit",
    ForbiddenError: "forbidden",
}


class _Kind(Enum):
    """Whom a route is for."""

    PUBLIC = auto()
    PAGE = auto()
    ADMIN = auto()
    CLIENT = auto()


async def _no_route(request: web.Request) -> web.StreamResponse:
    spelled = request.raw_path.partition("?")[0]
    raise RouteNotFoundError(f"There is no route {request.method} {spelled}; a path counts in its exact spelling.")


def _kind_of(resource: web.AbstractResource | None) -> _Kind:
    pattern = resource.canonical if resource is not None else ""
    if pattern in PUBLIC:
        return _Kind.PUBLIC
    if pattern in PAGE:
        return _Kind.PAGE
    return _Kind.ADMIN if ADMIN.match(pattern) else _Kind.CLIENT


class Holder:
    """The holder of a key, in one request; a `proxy.server.auth.caller.Caller`."""

    __slots__ = ("_allowed", "_clock", "account", "meter", "name", "priority")

    def __init__(self, known: Known, clock: Callable[[], float]) -> None:
        self._allowed = known.models
        self._clock = clock
        self.account = known.account
        self.meter = Meter() if known.account.tokens is not None else None
        self.name = known.entry.name
        self.priority = api_keys.PRIORITIES[known.entry.priority]

    def expect(self, request: object) -> None:
        """Count what a request, as JSON has it, may cost, where the key's tokens are limited; once."""
        if self.meter is not None and not self.meter.prompt_tokens:
            self.meter.prompt_tokens = prompt_tokens(request)
            self.account.expect(self.meter.prompt_tokens, self._clock())

    def may_use(self, model: str) -> bool:
        """Whether the key is good for a model, by the model's key."""
        return self._allowed is None or model in self._allowed

    def limits(self, now: float) -> dict[str, str]:
        """Header fields: what is left of the key's limits, where there are any."""
        return self.account.headers(now) if self.account.requests or self.account.tokens else {}

    def check_model(self, model: str) -> None:
        """Raises ModelNotAllowedError unless `may_use`."""
        if not self.may_use(model):
            raise ModelNotAllowedError(
                "This API key is not good for that model. GET /v1/models lists those that it is good for.",
                param="model",
            )


class Known:
    """A key of the file with what the server keeps for it."""

    __slots__ = ("account", "entry", "models")

    def __init__(self, entry: Entry, models: frozenset[str] | None, account: Account) -> None:
        self.entry = entry
        self.models = models
        """Keys of models; None: all."""
        self.account = account


class Admission:
    """A request of a key's holder that was let in. `end` or `undo` it, once."""

    __slots__ = ("_account", "_clock", "holder")

    def __init__(self, holder: Holder, clock: Callable[[], float]) -> None:
        self.holder = holder
        self._account = holder.account
        self._clock = clock

    def end(self, status: int) -> None:
        """It was answered, or left by its client (status 0)."""
        # An answer that says what is wrong costs no tokens; one that a client left does.
        used = self.holder.meter.tokens() if self.holder.meter is not None and status < 400 else 0
        self._account.end(self._expected, used, self._clock())

    @property
    def _expected(self) -> int:
        return self.holder.meter.prompt_tokens if self.holder.meter is not None else 0

    def limits(self) -> dict[str, str]:
        """Header fields: what is left of the key's limits."""
        return self.holder.limits(self._clock())

    def undo(self) -> None:
        """It did not begin."""
        self._account.undo(self._expected, self._clock())


class Auth:
    """The keys and the admin token in force, and the middleware that asks for them.

    `clock` is monotonic, in seconds.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the files. Raises ConfigError."""
        server = settings.server
        self._names = settings.names()
        self._metrics = metrics
        self._clock = clock
        self.refusals = Refusals()
        """What the log says of them."""
        self._body_limit = server.body_limit
        self._keys_file = server.keys_file
        self._admin = server.admin
        self.pages = Pages(server)
        self._kinds: dict[web.AbstractResource | None, _Kind] = {}
        self._token: bytes | None = None
        self.keys: Keys | None = None
        """Another object whenever they were read anew; None where none are needed."""
        self._known: dict[str, Known] = {}
        self.reload()

    # --- the files ---

    def reload(self, settings: Settings | None = None) -> None:
        """Read keys and token again; what is in use stays counted. Raises ConfigError and changes nothing.

        `settings`: where the models have changed too. Which files there are stays as it was.
        """
        self.take(self.read(), self._names if settings is None else settings.names())

    def read(self) -> tuple[bytes | None, api_keys.Keys | None]:
        """What token and keys the files have, in any thread. Raises ConfigError."""
        token = api_keys.read_token(self._admin.token_file) if self._admin.token_file is not None else None
        found = api_keys.read(self._keys_file) if self._keys_file is not None else None
        return token, found

    def take(self, read: tuple[bytes | None, api_keys.Keys | None], names: Mapping[str, str]) -> None:
        """Have what was read in force; what is in use stays counted. `names`: of the models there are now."""
        self._names = names
        self._token, found = read
        if found is None:
            return
        now = self._clock()
        known = {}
        for id_, entry in found.entries().items():
            account = self._known[id_].account if id_ in self._known else Account()
            account.set_limits(entry.requests_per_minute, entry.tokens_per_minute, entry.concurrency, now)
            known[id_] = Known(entry, self._models_of(entry), account)
        self.keys, self._known = found, known
        log.info("%d API keys in force", len(known))

    def _models_of(self, entry: Entry) -> frozenset[str] | None:
        if entry.models is None:
            return None
        for name in entry.models:
            if name not in self._names:
                log.warning("API key %s names the model %r, which the configuration does not have", entry.name, name)
        return frozenset(self._names[name] for name in entry.models if name in self._names)

    # --- the check ---

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let a request through that may pass. Raises RequestError for one that may not."""
        resource = request.match_info.route.resource
        kind = self._kinds.get(resource)
        if kind is None:
            kind = self._kinds[resource] = _kind_of(resource)
        if not spelled_as(resource, request.raw_path):
            kind, handler = _Kind.CLIENT, _no_route
        try:
            if kind is _Kind.CLIENT:
                self.pages.check(request)
            if kind is _Kind.ADMIN or kind is _Kind.PAGE:
                self._check_admin(request, kind)
            elif self.keys is not None and kind is _Kind.CLIENT:
                return await self._as_holder(request, handler)
            self._check_length(request)
        except RequestError as error:
            self._note(request, error)
            raise
        request[PASSED] = True
        return await handler(request)

    def _check_length(self, request: web.Request) -> None:
        # Before any of it is read; what has no length is counted while it is read.
        text = request.headers.get(hdrs.CONTENT_LENGTH)
        if text is not None and int(text) > self._body_limit:
            raise BodyTooLargeError(f"The body has {text} bytes; the limit is {self._body_limit}.")

    async def _as_holder(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        known = self.identify(_shown(request))
        self._check_length(request)
        # Those who only look pay nothing; a WebSocket is more than a look.
        if request.method in ("GET", "HEAD") and hdrs.UPGRADE not in request.headers:
            request[CALLER] = Holder(known, self._clock)
            request[PASSED] = True
            return await handler(request)
        admission = take_admitted(request) or self.admit(known)
        status = 0
        try:
            request[CALLER] = admission.holder
            request[PASSED] = True
            response = await handler(request)
            status = response.status
            return response
        finally:
            admission.end(status)

    def admit(self, known: Known) -> Admission:
        """Let in a request of a key's holder that is not only a look. Raises RateLimitError."""
        now = self._clock()
        refusal = known.account.begin(now)
        if refusal is not None:
            raise RateLimitError(
                f"This API key is limited to {refusal.limit} {refusal.what}.",
                retry_after_s=refusal.retry_after_s if refusal.retry_after_s is not None else 1.0,
                extra=known.account.headers(now),
            )
        return Admission(Holder(known, self._clock), self._clock)

    def identify(self, shown: Sequence[str]) -> Known:
        """What is known of the first key that is good, of those that a request shows. Raises AuthenticationError."""
        if not shown:
            raise AuthenticationError("No API key. Send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`.")
        assert self.keys is not None  # noqa: S101 - asked before
        refusal = AuthenticationError("Incorrect API key.")
        for key in shown:
            found = self.keys.find(key)
            if found is None:
                continue
            id_, entry = found
            try:
                refuse_expired(entry)
            except AuthenticationError as error:
                refusal = error
                continue
            return self._known[id_]
        raise refusal

    # --- administration ---

    def _check_admin(self, request: web.Request, kind: _Kind) -> None:
        transport = request.transport
        local = transport.get_extra_info("sockname") if transport is not None else None
        if self._admin.socket is not None and local == str(self._admin.socket):
            return  # whoever may open it; another unix socket may be for everybody
        if self._token is not None:
            if kind is not _Kind.PAGE and not _shows(request, self._token):
                raise AuthenticationError("The admin token is needed: `Authorization: Bearer TOKEN`.")
            refuse_other_sites(request, page=kind is _Kind.PAGE)
            return
        if self._admin.socket is not None:
            raise RouteNotFoundError(f"There is no route {request.method} {request.path}.")
        peer = transport.get_extra_info("peername") if transport is not None else None
        if not isinstance(peer, tuple) or not is_loopback(peer[0]):
            raise ForbiddenError(
                "Only from this host, as long as there is no admin token; see server.admin.token_file."
            )
        refuse_borrowed_loopback(request)
        refuse_other_sites(request, page=kind is _Kind.PAGE)

    def _note(self, request: web.Request, error: RequestError) -> None:
        reason = _REFUSED_AS.get(type(error))
        if reason is None:
            return
        self._metrics.refused.labels(reason).inc()
        self.refusals.note(request.remote, reason, f"{method_of(request)} {path_of(request)}: {error.message}")

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """A signal before an answer's headers go out: what is left of the key's limits."""
        holder = request.get(CALLER)
        if isinstance(holder, Holder):
            response.headers.update(holder.limits(self._clock()))


def refuse_expired(entry: Entry) -> None:
    """Raises AuthenticationError where a key's time is over."""
    if entry.expires is not None and entry.expires <= dt.datetime.now(dt.UTC):
        raise AuthenticationError("This API key has expired.")


def _shown(request: web.Request) -> tuple[str, ...]:
    """The keys that a request brings, as OpenAI's clients do, as Anthropic's, as Azure's, or as those in browsers."""
    headers = request.headers
    others = [value for name in KEY_FIELDS for value in headers.getall(name, ())]
    offered = [name.strip() for name in ",".join(headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ())).split(",")]
    others += [name.removeprefix(KEY_PROTOCOL) for name in offered if name.startswith(KEY_PROTOCOL)]
    return keys_shown(headers.getall(hdrs.AUTHORIZATION, ()), others)


def _shows(request: web.Request, token: bytes) -> bool:
    """Whether a request brings the token: as a bearer, or as a password."""
    scheme, _, value = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    shown = b""
    if scheme.lower() == "bearer":
        shown = value.strip().encode("utf-8", "surrogateescape")
    elif scheme.lower() == "basic":
        try:
            shown = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    return hmac.compare_digest(shown, token)
