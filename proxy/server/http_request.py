"""Heads of requests: parsed by llhttp (httptools), and then held to what other servers may read otherwise.

What is refused here beyond llhttp (RFC 9112, 11.2): odd characters, absolute targets, a missing or second `Host`, any
transfer coding but one `chunked`, lengths that are not plain numbers, and fields twice that have one value by nature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import httptools

from proxy.engine import http1
from proxy.errors import envelope
from proxy.server import request_id
from proxy.server.safe_logging import UNKNOWN_PATH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from proxy.config.server import LimitSettings
    from proxy.server.auth.authorization import Kind, Known
    from proxy.server.forward.routes import Match, Route

_LINES: Final = re.compile(rb"[!-~][ -~]*\r\n(?:[!-9;-~]+:[\t -~\x80-\xff]*\r\n)*\r\n")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_ONCE: Final = frozenset(
    b"content-length content-location content-range content-type etag host max-forwards server transfer-encoding "
    b"user-agent expect".split()
)
"""Fields with one value by nature (RFC 9110, 5.3)."""
_ZERO: Final = ord("0")
_DIGITS: Final = 12
"""A length with more of them is none of the usual ones."""
_KNOWN: Final = 256
_KNOWN_BYTES: Final = 4 << 10
"""Heads that are remembered, and how long each may be."""


class BadRequestError(Exception):
    """The head is no request, or too large; `reason` is the one in metrics. The text quotes nothing."""

    def __init__(self, message: str, *, status: int = 400, code: str = "bad_http", reason: str = "malformed") -> None:
        self.message = message
        self.status = status
        self.code = code
        self.reason = reason
        super().__init__(message)

    def body(self) -> bytes:
        """The envelope."""
        return envelope(self.message, type_="invalid_request_error", code=self.code)


class Headers(Mapping[str, str]):
    """Header fields by name, in any case: the first value as text, with surrogates for what is not UTF-8."""

    __slots__ = ("_values",)

    def __init__(self, fields: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in fields:
            self._values.setdefault(name.lower().decode("ascii"), []).append(value.decode("utf-8", "surrogateescape"))

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def getall(self, name: str) -> Sequence[str]:
        """All values."""
        return self._values.get(name.lower(), ())


class RequestHead:
    """What the head of a request says, the usual length left out; shared by requests that differ in nothing else.

    They came to the same address of this host, too: what a web page may do depends on that.
    """

    __slots__ = (
        "asks_nobody", "before", "behind", "closes", "coding", "content_type", "cors", "engine_fields", "expects",
        "fields", "headers", "http11", "is_for_aiohttp", "is_preflight", "keep_s", "keys", "kind", "known", "known_of",
        "length", "makes_response", "match", "max_wait_s", "method", "only_looks", "path", "path_for_log", "prepared",
        "query", "request_id", "request_line", "route", "session", "target",
    )  # fmt: skip

    def __init__(
        self, method: str, target: str, fields: Sequence[tuple[bytes, bytes]], *, http11: bool, length: int
    ) -> None:
        self.method = method
        self.target = target
        self.path, _, self.query = target.partition("?")
        self.fields = fields
        self.headers = Headers(fields)
        self.http11 = http11
        self.length = length
        """Bytes of the body, or `http1.CHUNKED`."""
        options = http1.connection_options(fields)
        self.closes = b"close" in options or not (http11 or b"keep-alive" in options)
        """It is the last request of its connection."""
        self.expects = http11 and "expect" in self.headers
        given = self.headers.getall(request_id.HEADER)
        self.request_id = given[0] if len(given) == 1 and request_id.usable(given[0]) else None
        """The client's own, where it can be used."""
        self.before = self.behind = b""
        """The head as it came, on either side of its length; nothing where that is not said in the usual way."""
        # What is found out about it for the first request that has it (`proxy.server.forward.preparation`):
        self.prepared = False
        self.kind: Kind | None = None
        self.path_for_log = UNKNOWN_PATH
        self.cors: Sequence[tuple[bytes, bytes]] = ()
        self.is_preflight = False
        self.keys: Sequence[str] = ()
        """The API keys that it shows."""
        self.known: Known | None = None
        """Whose key it is, as long as `known_of` are the keys in force."""
        self.known_of: object = None
        self.asks_nobody = False
        """Who it is from does not matter, as long as there are no keys in force."""
        self.only_looks = False
        self.is_for_aiohttp = False
        self.route: Route | None = None
        self.match: Match | None = None
        """The engine's route that it is for, once everything about it is found good."""
        self.makes_response = False
        """Later requests may refer to its answer."""
        self.coding: str | None = None
        self.max_wait_s: float | None = None
        self.keep_s: float | None = None
        self.session: str | None = None
        self.content_type = ""
        self.request_line = b""
        self.engine_fields = b""
        """Those for the engine, and the beginning of the request's id."""

    def again(self, data: bytes, at: int) -> tuple[int, int] | None:
        """Where the body begins, and its length, if the head that begins at `at` is this one but for its length."""
        before, behind = self.before, self.behind
        if not before or not data.startswith(before, at):
            return None
        at += len(before)
        stop = data.find(b"\r\n", at, at + _DIGITS + 2)
        length = http1.LENGTHS.get(data[at:stop])
        if length is None or not data.startswith(behind, stop):
            return None
        return stop + len(behind), length


def usual_parts(data: bytes, at: int, most: int) -> tuple[bytes, int, int] | None:
    """For a head that begins at `at`: a key that is the same for all heads that differ in `Content-Length` only, where
    its body begins, and its length (-1: the head says it in another way, or not at all).

    None where the head has no end within `most` bytes. Of the rest nothing is said.
    """
    end = data.find(b"\r\n\r\n", at, at + most)
    if end < 0:
        return None
    found = _usual_length(data, at, end)
    if found is None:
        return data[at : end + 4], end + 4, -1
    begin, stop = found
    return data[at : begin - 18] + data[stop : end + 2], end + 4, int(data[begin:stop])


def _usual_length(data: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Where the number in `Content-Length` is, in a head from `at` to `end`; None where it is not said like that."""
    begin = data.find(b"\r\nContent-Length: ", at, end)
    if begin < 0:
        begin = data.find(b"\r\ncontent-length: ", at, end)
        if begin < 0:
            return None
    stop = data.find(b"\r\n", begin + 18)
    digits = data[begin + 18 : stop]
    if not digits.isdigit() or len(digits) > _DIGITS or (digits[0] == _ZERO and len(digits) > 1):
        return None
    return begin + 18, stop


class HeadReader:
    """Reads one head, which may come in pieces. Raises BadRequestError."""

    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._complete = False
        self._fed = 0
        """How much of the head was fed."""
        self._parser = httptools.HttpRequestParser(self)

    # httptools' callbacks

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self._complete = True

    def feed_part(self, data: bytes, at: int) -> None:
        """All of it that is there, from `at` on, but for the end: a line end that is cut waits for what follows."""
        end = len(data) - 3
        if end - at > self._fed:
            self._feed(data[at + self._fed : end])
            self._fed = end - at

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError as error:
            words = str(error)
            said = f": {words}" if words.isascii() and words.isprintable() else ""
            raise BadRequestError(f"This is no valid HTTP request{said}.") from None

    def head(self, whole: bytes) -> RequestHead:
        """What it says; `whole` is all of it."""
        self._feed(whole[self._fed :])
        self._check_sizes()
        if not self._complete or not _LINES.fullmatch(whole):
            raise _bad("a character that does not belong there")
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise _bad("its version is not spoken here")
        method = self._parser.get_method().decode("ascii")
        target = self._url.decode("ascii")
        _check_target(method, target)
        length = self._length(http11=version == "1.1")
        return RequestHead(method, target, self._fields, http11=version == "1.1", length=length)

    def _check_sizes(self) -> None:
        limits = self._limits
        if len(self._url) > limits.url:
            raise BadRequestError(
                f"The request's URL is longer than {limits.url} bytes.", status=414, code="url_too_long"
            )
        if len(self._fields) > limits.headers:
            raise _too_large("The request has too many headers.")
        if any(len(name) > limits.header or len(value) > limits.header for name, value in self._fields):
            raise _too_large(f"A header of the request is longer than {limits.header} bytes.")

    def _length(self, *, http11: bool) -> int:
        """How long the body is, where the fields can be read in one way only."""
        found: dict[bytes, bytes] = {}
        for name, value in self._fields:
            if (lower := name.lower()) in _ONCE:
                if lower in found:
                    raise _bad("a field twice that may be there once")
                found[lower] = value
        if http11 and b"host" not in found:
            raise _bad("no Host")
        if found.get(b"expect", b"100-continue").lower() != b"100-continue":
            raise _bad("the only expectation is 100-continue")
        coding, length = found.get(b"transfer-encoding"), found.get(b"content-length")
        if coding is not None:
            if coding.lower() != b"chunked":
                raise _bad("the only transfer coding is chunked")
            if not http11 or length is not None:
                raise _bad("Transfer-Encoding beside Content-Length, or of an older version")
            return http1.CHUNKED
        if length is None:
            return 0
        if not _LENGTH.fullmatch(length):
            raise _bad("a Content-Length that is no number")
        return int(length)


class RequestHeads:
    """Reads the heads of requests; those that come again, on whatever connection, once."""

    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self._known: dict[tuple[object, bytes], RequestHead] = {}

    def forget(self) -> None:
        """The configuration is another one: which route a head asks for is found anew."""
        self._known.clear()

    def read(self, place: object, key: bytes, reader: HeadReader | None, whole: bytes) -> RequestHead:
        """What a head says of the `key` that `usual_parts` found, which came to the address `place`.

        `reader` is that of a head which came in pieces. Raises BadRequestError.
        """
        head = self._known.get((place, key))
        if head is None:
            head = (reader or HeadReader(self._limits)).head(whole)
            if len(key) <= min(_KNOWN_BYTES, self._limits.head - _DIGITS):
                if (length := _usual_length(whole, 0, len(whole) - 4)) is not None:
                    head.before, head.behind = whole[: length[0]], whole[length[1] :]
                if len(self._known) >= _KNOWN:
                    self._known.clear()
                self._known[place, key] = head
        return head


def too_large_together() -> BadRequestError:
    """For a head over the limit of all its bytes."""
    return _too_large("The request's headers are too large together.", reason="head")


def _check_target(method: str, target: str) -> None:
    if method == "CONNECT":
        raise _bad("this is no tunnel")
    if not target.startswith("/") and not (target == "*" and method == "OPTIONS"):
        raise _bad("the request target must be a path")
    if "#" in target:
        raise _bad("the request target has a fragment")


def _bad(what: str) -> BadRequestError:
    return BadRequestError(f"This is no valid HTTP request: {what}.")


def _too_large(message: str, reason: str = "malformed") -> BadRequestError:
    return BadRequestError(message, status=431, code="headers_too_large", reason=reason)
