"""What the log says of requests and of errors in serving them: nothing that a client sent.

A client chooses its method, path, fields and body, and an exception's text may quote any of it, as the parser's does.
So the log has a request's method and path only where they are known ones, and of an unforeseen error its type and its
stack.
"""

from __future__ import annotations

import logging
import re
import traceback
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from proxy.errors import RequestError, WarmpoolError

if TYPE_CHECKING:
    import asyncio

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNKNOWN_METHOD: Final = "(unknown method)"
UNKNOWN_PATH: Final = "(unknown path)"

log = logging.getLogger("warmpool")

_WORDS: Final = re.compile(r"[A-Za-z' .]*")


def method_of(method: str) -> str:
    """A request's method, for the log."""
    return method if method in METHODS else UNKNOWN_METHOD


def path_of(request: web.Request) -> str:
    """The path of a request to aiohttp's server, as the route table has it: `/admin/models/{model}/{order}`."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else UNKNOWN_PATH


def stack_of(error: BaseException) -> str:
    """Type and stack of an error and of those behind it; the text only of those that quote no client."""
    parts: list[str] = []
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        stack = "".join(traceback.format_tb(one.__traceback__))
        parts.append(f"{_named(one)}\n{stack}".rstrip())
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "\nbecause of ".join(parts)


def _named(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} {error.errno} ({error.strerror})"
    if isinstance(error, WarmpoolError) and not isinstance(error, RequestError):
        return f"{name}: {error}"
    return name


class _WithoutText(logging.Filter):
    """Drops what is a client's fault, and takes the text from the other errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        refused = isinstance(error, HttpProcessingError) and error.code < 500
        if refused or isinstance(error, web.RequestPayloadError):
            return False
        record.msg, record.args = "a request failed: %s", (stack_of(error),)
        record.exc_info = record.exc_text = None
        return True


_FILTER: Final = _WithoutText()


def silence_aiohttp() -> None:
    """Keep what clients sent out of aiohttp's lines; any number of times."""
    logging.getLogger("aiohttp.server").addFilter(_FILTER)
    for name in ("aiohttp.websocket", "aiohttp.internal"):  # their warnings quote subprotocols and cookies
        logging.getLogger(name).setLevel(logging.ERROR)


def note_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's exception handler: its own would show what a callback was called with."""
    words = _WORDS.match(str(context.get("message", "")))
    error = context.get("exception")
    log.error(
        "in the event loop: %s: %s",
        words[0].strip() if words is not None else "",
        stack_of(error) if isinstance(error, BaseException) else "no exception",
    )
