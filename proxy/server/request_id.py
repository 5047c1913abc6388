"""`x-request-id`: taken from the client or made, in every answer, in the log, and sent to the engine."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiohttp import web

HEADER: Final = "X-Request-Id"
_VALID: Final = re.compile(r"[A-Za-z0-9._:/=+@-]{1,128}")
_KEY_LIKE: Final = re.compile(r"wp_|(?<![A-Za-z0-9])(?:sk|pk|rk|hf|ghp|api|key)[-_.]")
"""Ids are logged: none that may be a key of warmpool's or of somebody else's."""


def of(request: web.BaseRequest) -> str:
    """The id of a request to aiohttp's server, which gets it as a field."""
    return request.headers.get(HEADER, "")


def usable(given: str) -> bool:
    """Whether a client's id is taken."""
    return _VALID.fullmatch(given) is not None and _KEY_LIKE.search(given) is None


class _Random:
    digits = ""
    at = 0


def new() -> str:
    """One that nobody else has: 128 random bits, in 32 digits. The kernel is asked for many at once."""
    at = _Random.at
    digits = _Random.digits[at : at + 32]
    _Random.at = at + 32
    if not digits:
        _Random.digits, _Random.at = os.urandom(16 * 256).hex(), 32
        digits = _Random.digits[:32]
    return digits
