"""A multipart form (RFC 7578) whose text fields can be read and replaced without touching its other bytes.

The parser is python-multipart, which vLLM's web framework uses too, so both find the same parts. A form in which a
field could be read in two ways is refused; what old clients add without a meaning (RFC 7578, 4.7) is not: empty lines
around the form, a `charset` of the whole, `Content-Transfer-Encoding: 8bit`.
"""

from __future__ import annotations

import codecs
import re
from typing import Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from proxy.errors import InvalidRequestError

_MAX_PARTS: Final = 1000
"""As in Starlette."""
_CHARSETS: Final = re.compile(r"utf-?8|(us-)?ascii|latin-?1|iso-?8859-?\d{1,2}|(windows-|cp)125\d")
"""Those in which ASCII is itself, and a byte a letter: read in the way that Starlette does."""
_AS_IT_IS: Final = frozenset({b"7bit", b"8bit", b"binary"})
"""Values of `Content-Transfer-Encoding` that say that there is none (RFC 2045, 6.2)."""


class Form:
    """The parts of a body. Raises InvalidRequestError for one that is not a well-formed multipart form."""

    def __init__(self, content_type: str, body: bytes) -> None:
        if not content_type.isascii():
            raise InvalidRequestError("Content-Type has characters that are not ASCII.")
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequestError("The body must be a form: Content-Type: multipart/form-data; boundary=….")
        if content_type.lower().count("boundary=") > 1:
            raise InvalidRequestError("Content-Type names more than one boundary.")
        self._charset = _charset(options.get(b"charset", b"utf-8"))
        self._body = body
        self._boundary = boundary
        self._begins = _begin_of(body, boundary)
        self._parts = _Reader(boundary, body, self._begins, self._charset).parts()

    def text(self, name: str) -> str | None:
        """The value of a text field, or None where there is none."""
        part = self._one(name)
        if part is None:
            return None
        try:
            return self._body[part.begins : part.ends].decode(self._charset)
        except UnicodeDecodeError:
            raise InvalidRequestError(f"The field `{name}` is not in {self._charset}.", param=name) from None

    def with_text(self, name: str, value: str) -> bytes:
        """The body with the field's value replaced, or the field put first where there is none."""
        part = self._one(name)
        try:
            text = value.encode(self._charset)
        except UnicodeEncodeError:
            raise InvalidRequestError(
                f"The form's charset, {self._charset}, lacks letters of the model's name."
            ) from None
        body, begins = self._body, self._begins
        if part is not None:
            return body[: part.begins] + text + body[part.ends :]
        head = b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        return body[:begins] + head % (self._boundary, name.encode(), text) + body[begins:]

    def _one(self, name: str) -> _Part | None:
        parts = self._parts.get(name, [])
        if len(parts) > 1:
            raise InvalidRequestError(f"The form has more than one field `{name}`.", param=name)
        if parts and not parts[0].plain:
            raise InvalidRequestError(f"The field `{name}` must be plain text.", param=name)
        return parts[0] if parts else None


def _charset(given: bytes) -> str:
    charset = given.decode("ascii").strip().lower()
    try:
        if _CHARSETS.fullmatch(charset):
            codecs.lookup(charset)
            return charset
    except LookupError:
        pass
    raise InvalidRequestError("The form's charset must be UTF-8, ASCII, ISO-8859 or Windows-125x.")


def _begin_of(body: bytes, boundary: bytes) -> int:
    """Where the first boundary is; before it may be empty lines."""
    begins = len(body) - len(body.lstrip(b"\r\n"))
    if body.startswith(b"--" + boundary, begins) and body[:begins] == b"\r\n" * (begins // 2):
        return begins
    raise InvalidRequestError("The form does not begin with its boundary.")


class _Part:
    """Where the content of a part lies in the body."""

    __slots__ = ("begins", "ends", "plain")

    def __init__(self) -> None:
        self.begins = self.ends = 0
        self.plain = True
        """No file, and its bytes are what it says."""


class _Reader:
    """python-multipart's callbacks. The body is given to it in one piece, so its offsets are the body's."""

    def __init__(self, boundary: bytes, body: bytes, begins: int, charset: str) -> None:
        self._boundary = boundary
        self._body = body
        self._begins = begins
        self._charset = charset
        self._found: dict[str, list[_Part]] = {}
        self._part = _Part()
        self._count = 0
        self._ended = False
        self._name = self._value = b""
        self._headers: dict[bytes, list[bytes]] = {}

    def parts(self) -> dict[str, list[_Part]]:
        """The parts by name."""
        self._check_boundaries()
        try:
            MultipartParser(
                self._boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_name,
                    "on_header_value": self._on_value,
                    "on_header_end": self._header_ended,
                    "on_headers_finished": self._headers_ended,
                    "on_part_data": self._data,
                    "on_end": self._all_ended,
                },
            ).write(self._body)
        except FormParserError as error:
            raise InvalidRequestError(f"The form is malformed: {error}.") from error
        if not self._ended:
            raise InvalidRequestError("The form is not complete: its last boundary is missing.")
        return self._found

    def _check_boundaries(self) -> None:
        """Refuse what parsers do not agree about: a preamble, more than the dashes and a line end after a boundary."""
        line = b"--" + self._boundary
        at = self._body.find(b"\r\n" + line, self._begins)
        while at >= 0:
            rest = at + 2 + len(line)
            if self._body.startswith(b"--", rest):
                if self._body[rest + 2 :].strip(b"\r\n"):
                    raise InvalidRequestError("The form goes on after its last boundary.")
            elif not self._body.startswith(b"\r\n", rest):
                raise InvalidRequestError("The form is malformed: a line begins with the boundary and is none.")
            at = self._body.find(b"\r\n" + line, rest)

    def _begin(self) -> None:
        self._count += 1
        if self._count > _MAX_PARTS:
            raise InvalidRequestError(f"The form has more than {_MAX_PARTS} parts.")
        self._part, self._headers = _Part(), {}

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ended(self) -> None:
        self._headers.setdefault(self._name.lower(), []).append(self._value)
        self._name = self._value = b""

    def _headers_ended(self) -> None:
        dispositions = self._headers.get(b"content-disposition", [])
        kind, options = parse_options_header(dispositions[0] if len(dispositions) == 1 else None)
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequestError("Each part of the form needs one Content-Disposition: form-data; name=….")
        try:
            name = options[b"name"].decode(self._charset)
        except UnicodeDecodeError:
            raise InvalidRequestError(f"The name of a part is not in {self._charset}.") from None
        codings = {value.strip().lower() for value in self._headers.get(b"content-transfer-encoding", [])}
        self._part.plain = b"filename" not in options and codings <= _AS_IT_IS
        self._found.setdefault(name, []).append(self._part)

    def _data(self, _: bytes, start: int, end: int) -> None:
        self._part.begins = self._part.begins or start
        self._part.ends = end

    def _all_ended(self) -> None:
        self._ended = True
