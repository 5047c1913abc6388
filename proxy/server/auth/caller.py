"""Who a request comes from, as far as it was asked: attached by `middleware`, used by whoever answers.

Whatever forwards a request has four duties towards its caller: `check_model` once the model is known, `expect` once the
request is read, `priority` for the lease, and the `meter` to be fed with every piece of the answer's body. Without keys
there is no caller, and nothing to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiohttp.web import BaseRequest


class Feed(Protocol):
    """Whoever wants to see an answer's body."""

    def feed(self, data: bytes, /) -> object:
        """The next piece of it, without the framing of the transfer."""


class Caller(Protocol):
    """The holder of an API key, in one request."""

    @property
    def name(self) -> str:
        """For the log; never the key."""

    @property
    def priority(self) -> int:
        """For `Pool.lease`."""

    @property
    def meter(self) -> Feed | None:
        """Counts the answer, where the key's tokens are limited."""

    @property
    def metered(self) -> tuple[int, int] | None:
        """Where the key's tokens are limited: what was expected of the prompt, and what all of it cost."""

    def expect(self, request: object) -> None:
        """Count what a request, as JSON has it, may cost, where the key's tokens are limited; once."""

    def may_use(self, model: str) -> bool:
        """Whether the key is good for a model, by the model's key."""

    def check_model(self, model: str) -> None:
        """Raises ModelNotAllowedError unless `may_use`."""


KEY_PROTOCOL: Final = "openai-insecure-api-key."
"""How OpenAI's clients in browsers send a key with a WebSocket: as a subprotocol, since they cannot send headers."""
KEY_FIELDS: Final = ("x-api-key", "api-key")
"""Where clients send a key, beside `Authorization`: Anthropic's in the first, Azure's in the second."""
_MOST_KEYS: Final = 8
"""Each is compared by its digest."""
CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)


def keys_shown(authorization: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The keys that a request shows, in the values of `Authorization` and of the other fields; any of them may count.

    Clients and what is between fill in more than one: a placeholder in the one, the key in the other.
    """
    found: list[str] = []
    for value in authorization:
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            found.append(key.strip())
    found += others
    return tuple(dict.fromkeys(found))[:_MOST_KEYS]


def caller_of(request: BaseRequest) -> Caller | None:
    """Who asks, or None where no keys are needed."""
    return request.get(CALLER)
