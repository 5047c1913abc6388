"""Who may do what: API keys for clients, a token or this host for administration, limits by key.

Asked of every request before anything else, and closed by default: a path that is neither public nor administrative
needs a key as soon as there is a file of keys. A path counts letter by letter; what is spelled otherwise is a client's,
and leads nowhere.
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

from proxy.config.values import is_loopback
from proxy.errors import (
    AuthenticationError,
    BodyTooLargeError,
    BudgetError,
    ForbiddenError,
    ModelNotAllowedError,
    RateLimitError,
    RequestError,
    RouteNotFoundError,
)
from proxy.fleet.key_use import Use
from proxy.server.auth import api_keys
from proxy.server.auth.browser_origin import Pages, refuse_borrowed_loopback, refuse_other_sites
from proxy.server.auth.caller import KEY_FIELDS, KEY_PROTOCOL, keys_shown
from proxy.server.auth.prompt_tokens import prompt_tokens
from proxy.server.auth.rate_limit import Account
from proxy.server.auth.token_meter import Meter
from proxy.telemetry.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from proxy.config.settings import Settings
    from proxy.server.auth.api_keys import Entry, Keys
    from proxy.server.auth.browser_origin import WebRequest
    from proxy.server.auth.caller import Caller
    from proxy.server.http_request import Headers
    from proxy.server.key_usage.recorder import KeyUsage
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.auth")

PUBLIC: Final = frozenset({"/health", "/ready"})
"""For load balancers: they say one bit each."""
PAGE: Final = frozenset({"/admin", "/admin/"})
"""The status page, which holds no data; its script asks for the token."""
ADMIN: Final = re.compile(r"/(metrics|admin)(/|$)")
CHAT: Final = "/admin/chat/completions"
"""An engine's route for administrators, who need no key there."""

_REFUSED_AS: Final = {
    AuthenticationError: "key",
    BodyTooLargeError: "body",
    ModelNotAllowedError: "model",
    RateLimitError: "limit",
    BudgetError: "budget",
    ForbiddenError: "forbidden",
}


class Kind(Enum):
    """Whom a path is for."""

    PUBLIC = auto()
    PAGE = auto()
    ADMIN = auto()
    CLIENT = auto()


class Holder:
    """The holder of a key, in one request; a `proxy.server.auth.caller.Caller`."""

    __slots__ = ("_allowed", "_clock", "account", "meter", "name", "priority")

    def __init__(self, known: Known, clock: Callable[[], float]) -> None:
        self._allowed = known.models
        self._clock = clock
        self.account = known.account
        metered = known.account.tokens is not None or known.entry.tokens_per_day is not None
        self.meter = Meter() if metered else None
        self.name = known.entry.name
        self.priority = api_keys.PRIORITIES[known.entry.priority]

    def expect(self, request: object) -> None:
        """Count what a request, as JSON has it, may cost, where the key's tokens are limited; once."""
        if self.meter is not None and not self.meter.prompt_tokens:
            self.meter.prompt_tokens = prompt_tokens(request)
            self.account.expect(self.meter.prompt_tokens, self._clock())

    @property
    def metered(self) -> tuple[int, int] | None:
        """Where the key's tokens are limited: what was expected of the prompt, and what all of it cost."""
        return None if self.meter is None else (self.meter.prompt_tokens, self.meter.tokens())

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
    """The keys and the admin token in force.

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
        self._keys_file = server.keys_file
        self._admin = server.admin
        self.pages = Pages(server)
        self._token: bytes | None = None
        self.keys: Keys | None = None
        """Another object whenever they were read anew; None where none are needed."""
        self._usage: KeyUsage | None = None
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

    def keep_budgets(self, usage: KeyUsage) -> None:
        """Refuse those who have used up their day by this count."""
        self._usage = usage

    def budgets(self) -> dict[str, dict[str, int | None]]:
        """By the key's name: what it may use in a day, of those that are limited."""
        return {
            known.entry.name: {
                "tokens_per_day": known.entry.tokens_per_day,
                "gpu_seconds_per_day": known.entry.gpu_seconds_per_day,
            }
            for known in self._known.values()
            if known.entry.has_budget
        }

    # --- with other hosts of a fleet; `proxy.fleet.key_use.KeyLimits` ---

    def taken(self) -> dict[str, Use]:
        """What was used here since this was asked last, and what runs; of keys that are limited."""
        limited = {id_: known.account for id_, known in self._known.items() if known.account.is_limited}
        return {id_: Use(*account.told(), account.running) for id_, account in limited.items()}

    def used_elsewhere(self, uses: Mapping[str, Use]) -> None:
        """Count what was used on another host."""
        now = self._clock()
        for id_, use in uses.items():
            if (known := self._known.get(id_)) is not None:
                known.account.used_elsewhere(use.requests, use.tokens, now)

    def running_elsewhere(self, running: Mapping[str, int]) -> None:
        """How many requests of each key run on other hosts, all together."""
        for id_, known in self._known.items():
            known.account.elsewhere = running.get(id_, 0)

    def _models_of(self, entry: Entry) -> frozenset[str] | None:
        if entry.models is None:
            return None
        for name in entry.models:
            if name not in self._names:
                log.warning("API key %s names the model %r, which the configuration does not have", entry.name, name)
        return frozenset(self._names[name] for name in entry.models if name in self._names)

    # --- the check ---

    def kind_of(self, path: str) -> Kind:
        """Whom a path is for."""
        if path in PUBLIC:
            return Kind.PUBLIC
        if path in PAGE:
            return Kind.PAGE
        return Kind.ADMIN if ADMIN.match(path) else Kind.CLIENT

    def keys_shown_by(self, headers: Headers) -> tuple[str, ...]:
        """The keys that a request brings: as OpenAI's clients do, as Anthropic's, as Azure's, as those in browsers."""
        others = [value for name in KEY_FIELDS for value in headers.getall(name)]
        offered = [name.strip() for name in ",".join(headers.getall("Sec-WebSocket-Protocol")).split(",")]
        others += [name.removeprefix(KEY_PROTOCOL) for name in offered if name.startswith(KEY_PROTOCOL)]
        return keys_shown(headers.getall("Authorization"), others)

    def holder(self, known: Known) -> Holder:
        """Who only looks, and pays nothing."""
        return Holder(known, self._clock)

    def admit(self, known: Known) -> Admission:
        """Let in a request of a key's holder that is not only a look. Raises RateLimitError."""
        if self._usage is not None and known.entry.has_budget:
            _refuse_over_budget(known.entry, self._usage)
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

    def check_admin(self, request: WebRequest, path: str, *, page: bool) -> None:
        """Raises RequestError for a request that an operator would not make."""
        transport = request.transport
        local = transport.get_extra_info("sockname") if transport is not None else None
        if self._admin.socket is not None and local == str(self._admin.socket):
            return  # whoever may open it; another unix socket may be for everybody
        if self._token is not None:
            if not page and not _shows(request, self._token):
                raise AuthenticationError("The admin token is needed: `Authorization: Bearer TOKEN`.")
            refuse_other_sites(request, page=page)
            return
        if self._admin.socket is not None:
            raise RouteNotFoundError(f"There is no route {request.method} {path}.")
        peer = transport.get_extra_info("peername") if transport is not None else None
        if not isinstance(peer, tuple) or not is_loopback(peer[0]):
            raise ForbiddenError(
                "Only from this host, as long as there is no admin token; see server.admin.token_file."
            )
        refuse_borrowed_loopback(request)
        refuse_other_sites(request, page=page)

    def chat_refusal(self) -> str | None:
        """Why administrators cannot ask models by `CHAT`; None: they can.

        By loopback alone anybody on this host would be spared a key.
        """
        if self.keys is None or self._token is not None or self._admin.socket is not None:
            return None
        return "There are API keys, so asking a model takes a key, or an admin token: server.admin.token_file."

    def check_chat(self) -> None:
        """Raises ForbiddenError where administrators cannot ask models, after `check_admin`."""
        if (reason := self.chat_refusal()) is not None:
            raise ForbiddenError(reason)

    # --- what is said of it ---

    def note(self, address: str | None, error: RequestError, what: str) -> None:
        """Count a refusal; `what` was refused, in words that quote no client."""
        reason = _REFUSED_AS.get(type(error))
        if reason is None:
            return
        self._metrics.refused.labels(reason).inc()
        self.refusals.note(address, reason, f"{what}: {error.message}")

    def limits(self, caller: Caller | None) -> dict[str, str]:
        """Header fields: what is left of the caller's limits."""
        return caller.limits(self._clock()) if isinstance(caller, Holder) else {}


def refuse_expired(entry: Entry) -> None:
    """Raises AuthenticationError where a key's time is over."""
    if entry.expires is not None and entry.expires <= dt.datetime.now(dt.UTC):
        raise AuthenticationError("This API key has expired.")


def _refuse_over_budget(entry: Entry, usage: KeyUsage) -> None:
    """Raises BudgetError. As long as something is left a request may begin, and is finished."""
    used = usage.today(entry.name)
    for limit, amount, what in (
        (entry.tokens_per_day, used.tokens, "tokens"),
        (entry.gpu_seconds_per_day, used.gpu_seconds, "seconds of GPU time"),
    ):
        if limit is not None and amount >= limit:
            raise BudgetError(
                f"This API key has used up its {limit} {what} of today; a new day begins at midnight UTC.",
                retry_after_s=usage.seconds_to_midnight(),
                extra={},
            )


def _shows(request: WebRequest, token: bytes) -> bool:
    """Whether a request brings the token: as a bearer, or as a password."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    shown = b""
    if scheme.lower() == "bearer":
        shown = value.strip().encode("utf-8", "surrogateescape")
    elif scheme.lower() == "basic":
        try:
            shown = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    return hmac.compare_digest(shown, token)
