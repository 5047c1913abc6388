"""Answers that are made here, as bytes; and the fields that every answer has."""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from proxy.engine import http1

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON: Final = {"Content-Type": "application/json"}
_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class _Clock:
    second = 0
    text = b""


def date() -> bytes:
    """The `Date` of an answer, made once a second."""
    second = int(time.time())
    if second != _Clock.second:
        _Clock.second, _Clock.text = second, formatdate(second, usegmt=True).encode("ascii")
    return _Clock.text


def fields_of(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Header fields as bytes. Raises ValueError for a value with a control character."""
    return [(name.encode("ascii"), _safe(value)) for name, value in headers.items()]


def whole_answer(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    more: Iterable[tuple[bytes, bytes]] = (),
    http11: bool = True,
    closes: bool = True,
    head_only: bool = False,
) -> bytes:
    """One with its length; `head_only` for HEAD. `more`: further fields as bytes."""
    first_line = b"HTTP/1.%d %d %b" % (http11, status, HTTPStatus(status).phrase.encode("ascii"))
    fields = [*fields_of(headers), (b"Server", b"warmpool"), *more, (b"Date", date())]
    if not http1.bodiless("GET", status):
        fields.append((b"Content-Length", b"%d" % len(body)))
    if closes == http11:  # each version has its default
        fields.append((b"Connection", b"close" if closes else b"keep-alive"))
    head = http1.serialized(first_line, fields)
    return head if head_only else head + body


def _safe(value: str) -> bytes:
    if _FORBIDDEN.search(value):
        raise ValueError("a control character in a header's value")
    return value.encode("utf-8", "surrogateescape")
