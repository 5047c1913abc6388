"""HTTP/1.1 answers and server-sent events taken apart as they come, for a client that must not lose time on it."""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

MOST_HEADER_BYTES: Final = 1 << 16
_SIZE_LINE, _CHUNK_END, _TRAILERS = -1, -2, -3
"""Where a chunked body is while it is not within a chunk."""


class WireError(Exception):
    """What came is not HTTP/1.1, or it ended too early; the text says which."""


class Answer:
    """One answer. `feed` its bytes; the fields say how far it is."""

    __slots__ = ("_body_left", "_chunk_left", "_chunked", "_head", "_rest", "ended", "headers", "is_stream", "status")

    def __init__(self) -> None:
        self.status = 0
        """0 until the headers are there."""
        self.headers: dict[str, str] = {}
        """By lower-case name."""
        self.is_stream = False
        """Whether the body is a stream of events."""
        self.ended = False
        self._head = b""
        self._chunked = False
        self._chunk_left = _SIZE_LINE
        self._body_left: int | None = None  # None: until the connection closes
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Take what was read - `b""` is the end of the connection - and return what is body of it. Raises WireError."""
        if not self.status:
            return self._feed_head(data)
        if not data:
            if not self.ended and (self._chunked or self._body_left is not None):
                raise WireError("the connection ended before the answer did")
            self.ended = True
            return b""
        if self._chunked:
            return self._feed_chunks(data)
        if self._body_left is not None:
            data = data[: self._body_left]
            self._body_left -= len(data)
            self.ended = not self._body_left
        return data

    def _feed_head(self, data: bytes) -> bytes:
        if not data:
            raise WireError("the connection ended before the answer began")
        self._head += data
        head, found, rest = self._head.partition(b"\r\n\r\n")
        if not found:
            if len(head) > MOST_HEADER_BYTES:
                raise WireError("no end of the headers")
            return b""
        self._parse_head(head)
        self._head = b""
        # Without a status it was a 1xx, and the real one follows.
        return self.feed(rest) if rest else b""

    def _parse_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise WireError(f"not an answer of HTTP/1.1: {first[:60]!r}")
        status = int(rest[:3])
        if 100 <= status < 200:
            return
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.status = status
        self.is_stream = self.headers.get("content-type", "").startswith("text/event-stream")
        self._chunked = self.headers.get("transfer-encoding", "").lower().endswith("chunked")
        length = self.headers.get("content-length", "")
        if status in (204, 304):
            self._body_left = 0
        elif not self._chunked and length:
            if not length.isdecimal():
                raise WireError(f"not a length: {length[:20]!r}")
            self._body_left = int(length)
        self.ended = self._body_left == 0

    def _feed_chunks(self, data: bytes) -> bytes:
        if self._chunk_left == _SIZE_LINE and not self._rest:
            # What nearly every read of a stream is: one whole chunk.
            line_end = data.find(b"\r\n", 0, 18)
            if line_end > 0:
                size = _size(data[:line_end])
                if size and line_end + size + 4 == len(data):
                    return data[line_end + 2 : -2]
        elif self._rest:
            data, self._rest = self._rest + data, b""
        pieces: list[bytes] = []
        at, count = 0, len(data)
        while at < count and not self.ended:
            if self._chunk_left > 0:
                piece = data[at : at + self._chunk_left]
                pieces.append(piece)
                self._chunk_left = self._chunk_left - len(piece) or _CHUNK_END
                at += len(piece)
                continue
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            if self._chunk_left == _SIZE_LINE:
                self._chunk_left = _size(data[at:line_end]) or _TRAILERS
            elif self._chunk_left == _CHUNK_END:
                self._chunk_left = _SIZE_LINE
            else:
                self.ended = line_end == at
            at = line_end + 2
        self._rest = data[at:]
        return b"".join(pieces)


def _size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise WireError(f"not the size of a chunk: {line[:20]!r}") from None


_ONE_TOKEN: Final = re.compile(rb'data: \{(?:(?!\n|"error"|"choices":\[\]).)*\}\n\n', re.DOTALL).fullmatch
"""What nearly every read of a stream is: one whole event, neither an error nor the account at the end."""


class Events:
    """Completions as server-sent events: counts tokens, and keeps their text where that is wanted."""

    __slots__ = ("_keep", "_rest", "done", "error", "text", "tokens", "usage")

    def __init__(self, *, keep_text: bool) -> None:
        self._keep = keep_text
        self._rest = b""
        self.tokens = 0
        """Events with content so far."""
        self.text: list[str] = []
        """The first token, and all others where that was asked for."""
        self.usage: int | None = None
        """The engine's own count of tokens, where it gave one: an event may carry several."""
        self.done = False
        """`[DONE]` came: the answer is whole."""
        self.error: str | None = None
        """An error that came as an event."""

    def feed(self, data: bytes) -> int:
        """Take bytes of the body; how many tokens came with them."""
        if self.tokens and not (self._keep or self._rest) and _ONE_TOKEN(data):
            self.tokens += 1
            return 1
        before = self.tokens
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            payload = b"\n".join(line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:"))
            if not payload:
                continue  # a comment
            if payload == b"[DONE]":
                self.done = True
            else:
                self._look_into(payload)
        return self.tokens - before

    def _look_into(self, payload: bytes) -> None:
        try:
            fields: Any = orjson.loads(payload)
        except orjson.JSONDecodeError:
            self.error = f"an event that is not JSON: {payload[:60]!r}"
            return
        if not isinstance(fields, dict):
            self.error = f"an event that is not an object: {payload[:60]!r}"
            return
        if "error" in fields:
            self.error = str(fields["error"])[:300]
            return
        usage = fields.get("usage")
        if isinstance(usage, dict):
            self.usage = usage.get("completion_tokens")
        said, counts = "", bool(self.tokens)
        for choice in fields.get("choices", ()):
            said += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            # A completion's event is a token though its text be empty: a mark, or half of a character. A chat's first
            # token is the first with content, for it begins with an event that only names the role.
            counts = counts or "text" in choice
        if said or counts:
            self.tokens += bool(fields.get("choices"))
        if said and (self._keep or not self.text):
            self.text.append(said)
