"""Answers in HTTP/1.1, and the bodies of requests, read strictly and without I/O.

What RFC 9112 lets a recipient mend is refused here: bare CR or LF, folded lines, blanks before a colon, two lengths, a
length beside a transfer coding. An engine that sends such a thing is broken, and a client that got it could be made to
see another answer than this proxy saw.
"""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    Fields = list[tuple[bytes, bytes]]

HEAD_LIMIT: Final = 64 << 10
"""Bytes that the head of an answer may have, and its trailers."""
_LINE_LIMIT: Final = 4 << 10

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?\r\n")
_FIELD: Final = re.compile(
    rb"(" + _TOKEN + rb"):[ \t]*((?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?)[ \t]*\r\n"
)
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_SIZES: Final = {b"%x" % size: size for size in range(1, 0x1000)}
"""What the size lines of events say: looked up faster than read."""
LENGTHS: Final = {b"%d" % length: length for length in range(0x4000)}
"""What the lengths of small bodies say; likewise."""
_SIZE_EXTENDED: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?\r\n")

CHUNKED: Final = -1
UNTIL_CLOSE: Final = -2
LAST_CHUNK: Final = b"0\r\n\r\n"


class ProtocolError(Exception):
    """The peer broke the protocol; the text says how."""


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer."""

    status: int
    reason: bytes
    fields: Fields
    """Header fields in order, names as they came."""
    length: int
    """Bytes of the body, or CHUNKED, or UNTIL_CLOSE."""
    keeps_alive: bool
    """Whether the peer lets the connection serve again, if the body has an end of its own."""


def head_end(data: bytes | bytearray) -> int:
    """Where the head that `data` begins with ends; -1 when it is not there yet. Raises ProtocolError when too long."""
    end = data.find(b"\r\n\r\n", 0, HEAD_LIMIT)
    if end >= 0:
        return end + 4
    if len(data) >= HEAD_LIMIT:
        raise ProtocolError(f"no end of the header within {HEAD_LIMIT} bytes")
    return -1


def parse_head(head: bytes, method: str) -> Head:
    """The head of an answer to `method`: everything up to and with the empty line. Raises ProtocolError."""
    status_line = _STATUS.match(head)
    if status_line is None:
        raise ProtocolError("no status line")
    minor, status, reason = status_line.group(1), int(status_line.group(2)), status_line.group(3) or b""
    fields = _fields(head, status_line.end(), len(head) - 2)
    length = coding = None
    keeps_alive = minor == b"1"
    for name, value in fields:
        if len(name) not in _FRAMING_LENGTHS:
            continue
        lower = name.lower()
        if lower == b"content-length":
            if length is not None or not _LENGTH.fullmatch(value):
                raise ProtocolError("more than one content-length" if length is not None else "a bad content-length")
            length = int(value)
        elif lower == b"transfer-encoding":
            if coding is not None or value.lower() != b"chunked" or minor == b"0":
                raise ProtocolError("a transfer-encoding that is not chunked alone")
            coding = value
        elif lower == b"connection":
            options = connection_options(fields)
            keeps_alive = b"close" not in options and (minor == b"1" or b"keep-alive" in options)
    if length is not None and coding is not None:
        raise ProtocolError("content-length beside transfer-encoding")
    if bodiless(method, status):
        return Head(status, reason, fields, 0, keeps_alive)
    if coding is not None:
        return Head(status, reason, fields, CHUNKED, keeps_alive)
    if length is not None:
        return Head(status, reason, fields, length, keeps_alive)
    return Head(status, reason, fields, UNTIL_CLOSE, keeps_alive=False)


_FRAMING_LENGTHS: Final = frozenset(map(len, (b"content-length", b"transfer-encoding", b"connection")))


def bodiless(method: str, status: int) -> bool:
    """Whether an answer has no body, whatever its header says (RFC 9110, 6.4.1)."""
    return method == "HEAD" or status in {204, 304} or status < 200


def _fields(head: bytes, at: int, end: int) -> Fields:
    fields = []
    match = _FIELD.match
    while at < end:
        field = match(head, at)
        if field is None:
            raise ProtocolError(f"no header field at byte {at}")
        fields.append(field.groups())
        at = field.end()
    if at != end:
        raise ProtocolError("a header field without an end")
    return fields  # type: ignore[return-value]  # two groups each


def connection_options(fields: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """The names that `Connection` fields list, in lower case: what they name belongs to one hop."""
    found: list[bytes] = []
    for name, value in fields:
        if len(name) == 10 and name.lower() == b"connection":
            found += (option.strip().lower() for option in value.split(b","))
    return frozenset(found)


def serialized(first_line: bytes, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A head. The fields are taken as they are."""
    lines = [first_line]
    lines += [b"%b: %b" % field for field in fields]
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


class Body(abc.ABC):
    """The body of one answer, fed as it comes, given on as the other side is to get it.

    `framed`: what is returned is in the chunked coding; else it is the payload. `drop_trailer` says of a trailer
    field's name, in lower case, that it is not to go on.
    """

    __slots__ = (
        "_at_end", "_between", "_drop_trailer", "_framed", "_left", "_line", "_trailer_bytes", "_trailers", "done",
        "excess", "payload_bytes",
    )  # fmt: skip

    def __init__(self, length: int, *, framed: bool, drop_trailer: frozenset[bytes] = frozenset()) -> None:
        self._framed = framed
        self._drop_trailer = drop_trailer
        self._left = max(0, length)
        self._line = b""
        self._trailers: list[bytes] = []
        self._trailer_bytes = 0
        self._at_end = False
        self._between = True
        self.payload_bytes = 0
        self.done = length == 0
        self.excess = 0
        """How many bytes came, at the end of what was fed last, that do not belong to it."""

    def begin(self) -> bytes:
        """What is to be given on before anything was fed: the end of a body that is empty."""
        return LAST_CHUNK if self.done and self._framed else b""

    @property
    def between(self) -> bool:
        """Whether what was given on ends between chunks, and another one may be put in before the next."""
        return self._between and not self.done

    @abc.abstractmethod
    def feed(self, data: bytes) -> bytes:
        """What to give on of it. Raises ProtocolError."""

    def close(self) -> bytes:
        """The connection ended in order; what to give on. Raises ProtocolError when the body had not come whole."""
        raise ProtocolError(f"the connection ended within the body, after {self.payload_bytes} bytes")


class SizedBody(Body):
    """One with a length."""

    __slots__ = ()

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._left:
            self.excess = len(data) - self._left
            data = data[: self._left]
        self._left -= len(data)
        self.payload_bytes += len(data)
        self.done = self._left == 0
        if not self._framed or not data:
            return data
        return chunk(data) + LAST_CHUNK if self.done else chunk(data)


class EndlessBody(Body):
    """One that ends with its connection."""

    __slots__ = ()

    def feed(self, data: bytes) -> bytes:
        self.payload_bytes += len(data)
        return chunk(data) if self._framed and data else data

    def close(self) -> bytes:
        self.done = True
        return LAST_CHUNK if self._framed else b""


class ChunkedBody(Body):
    """One in the chunked coding. Chunks go on as they are, but for their extensions."""

    __slots__ = ()
    _size_line: ClassVar = _SIZE_EXTENDED

    def feed(self, data: bytes) -> bytes:
        # Nearly always one whole chunk, an event of a stream.
        if self._between:
            at = data.find(b"\r\n", 0, 5)
            size = _SIZES.get(data[:at])
            if size is not None and len(data) == at + size + 4 and data.endswith(b"\r\n"):
                self.payload_bytes += size
                return data if self._framed else data[at + 2 : -2]
        out = self._feed(data)
        self._between = not (self._left or self._line or self._at_end)
        return out

    # `_between`: at the beginning of a chunk; `_left`: bytes of a chunk that are still to come, its CRLF among them;
    # `_line`: the beginning of a line; `_at_end`: the last chunk was there, lines are trailers.

    def _feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        if self._line:
            data, self._line = self._line + data, b""
        at, end = 0, len(data)
        while at < end:
            if self.done:
                self.excess = end - at
                break
            if self._left:
                at = self._take(data, at, out)
                continue
            line_end = data.find(b"\n", at) + 1
            if not line_end:
                self._line = data[at:]
                if len(self._line) > _LINE_LIMIT:
                    raise ProtocolError("a line within the body is too long")
                break
            if self._at_end:
                self._trailer(data[at:line_end], out)
            else:
                self._size(data[at:line_end], out)
            at = line_end
        return b"".join(out)

    def _take(self, data: bytes, at: int, out: list[bytes]) -> int:
        piece = data[at : at + self._left]
        payload = max(0, min(len(piece), self._left - 2))
        if payload:
            self.payload_bytes += payload
            out.append(piece[:payload])
        rest = piece[payload:]
        if rest != b"\r\n"[2 - (self._left - payload) :][: len(rest)]:
            raise ProtocolError("a chunk that is not as long as it said")
        if self._framed and rest:
            out.append(rest)
        self._left -= len(piece)
        return at + len(piece)

    def _size(self, line: bytes, out: list[bytes]) -> None:
        size_line = self._size_line.fullmatch(line) if len(line) <= _LINE_LIMIT else None
        if size_line is None:
            raise ProtocolError(f"{len(line)} bytes where the size of a chunk belongs")
        size = int(size_line.group(1), 16)
        if size:
            self._left = size + 2
            if self._framed:
                out.append(b"%x\r\n" % size)
        else:
            self._at_end = True

    def _trailer(self, line: bytes, out: list[bytes]) -> None:
        if line == b"\r\n":
            self.done = True
            if self._framed:
                out += [b"0\r\n", *self._trailers, line]
            return
        field = _FIELD.fullmatch(line)
        self._trailer_bytes += len(line)
        if field is None or self._trailer_bytes > HEAD_LIMIT:
            raise ProtocolError(f"{len(line)} bytes where a trailer field belongs")
        if field.group(1).lower() not in self._drop_trailer:
            self._trailers.append(b"%b: %b\r\n" % field.groups())


class StrictChunks(ChunkedBody):
    """The same of a client: no blanks beside a size, and what cannot become a size is refused before its line ends."""

    __slots__ = ()
    _size_line: ClassVar = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t -~\x80-\xff]*)?\r\n")
    _size_begins: ClassVar = re.compile(rb"[0-9A-Fa-f]{1,15}(?:;[\t -~\x80-\xff]*)?\r?")

    def feed(self, data: bytes) -> bytes:
        out = super().feed(data)
        if self._line and not self._at_end and not self._size_begins.fullmatch(self._line):
            raise ProtocolError(f"{len(self._line)} bytes where the size of a chunk belongs")
        return out


def chunk(data: bytes) -> bytes:
    """Data, not empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def body_of(head: Head, *, framed: bool, drop_trailer: frozenset[bytes] = frozenset()) -> Body:
    """What reads the body that follows a head."""
    kind: type[Body] = SizedBody
    if head.length < 0:
        kind = ChunkedBody if head.length == CHUNKED else EndlessBody
    return kind(head.length, framed=framed, drop_trailer=drop_trailer)
