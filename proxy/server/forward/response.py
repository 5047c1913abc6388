"""An answer that goes to the client as bytes: its head is put together here, its body comes framed from the upstream.

aiohttp's own responses cost a task switch and several copies for each event of a stream. This one writes to the
client's transport directly, and tells aiohttp only that it is done.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from email.utils import formatdate
from typing import TYPE_CHECKING, Final

import aiohttp
from aiohttp import web

from proxy.engine import http1

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


_OF_STREAMS: Final = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


def is_event_stream(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether an answer with these fields is server-sent events."""
    kinds = [value for name, value in fields if name.lower() == b"content-type"]
    return [kind.partition(b";")[0].strip().lower() for kind in kinds] == [b"text/event-stream"]


def unbuffered(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The fields, for events with those that keep what is between from storing them or holding them back."""
    if not is_event_stream(fields):
        return fields
    names = {name.lower() for name, _ in fields}
    return fields + [field for field in _OF_STREAMS if field[0] not in names]


class _Clock:
    second = 0
    text = b""


def date() -> bytes:
    """The `Date` of an answer, made once a second."""
    second = int(time.time())
    if second != _Clock.second:
        _Clock.second, _Clock.text = second, formatdate(second, usegmt=True).encode("ascii")
    return _Clock.text


class Answer(web.StreamResponse):
    """The answer to one request; `headers` are this proxy's own fields, and count more than the engine's.

    First of all comes `begin`.
    """

    def __init__(self, request: web.Request) -> None:
        super().__init__()
        self._request = request
        self._protocol = request.protocol
        self._client: asyncio.Transport
        self._head = b""
        """Not sent yet."""
        self._framed = False
        self._stays = False
        self.first_byte_at: float | None = None
        """When the first byte of the body was written, by `time.perf_counter`."""

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection serves another request afterwards."""
        return self._stays

    def framed(self, length: int) -> bool:
        """Whether a body of this length (or `http1.CHUNKED`, `http1.UNTIL_CLOSE`) is sent in the chunked coding."""
        return length < 0 and self._request.version >= aiohttp.HttpVersion11

    async def begin(self, status: int, reason: bytes, fields: Iterable[tuple[bytes, bytes]], length: int) -> None:
        """Put the head together; it goes out with what is written next, or with `flush`.

        `fields` are passed on as they are, but for those that `headers` has too. `length` as in `http1.Head`.
        """
        request = self._request
        framed = self.framed(length)
        self.set_status(status)
        self._stays = request.keep_alive and (framed or length >= 0)
        await request._prepare_hook(self)  # what `on_response_prepare` adds
        if super().keep_alive is False:  # by force_close()
            self._stays = False
        self.headers.popall("Connection", None)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        own = [(name.lower().encode("ascii"), _safe(value)) for name, value in self.headers.items()]
        if own:
            names = {name for name, _ in own}
            fields = [field for field in fields if field[0].lower() not in names]
        sent = [*fields, *own, (b"date", date())]
        if framed:
            sent.append((b"transfer-encoding", b"chunked"))
        elif length >= 0 and not http1.bodiless(request.method, status):
            sent.append((b"content-length", b"%d" % length))
        if request.version < aiohttp.HttpVersion11:
            if self._stays:
                sent.append((b"connection", b"keep-alive"))
        elif not self._stays:
            sent.append((b"connection", b"close"))
        first_line = b"HTTP/%d.%d %d %b" % (*request.version, status, reason)
        self._client = transport
        # Says that a head is out: after an error aiohttp must not send another one.
        request.writer.output_size += 1
        self._framed = framed
        self._head = http1.serialized(first_line, sent)

    def flush(self) -> None:
        """Send the head if it was not yet."""
        if self._head:
            head, self._head = self._head, b""
            self._write(head)

    def write_now(self, data: bytes) -> bool:
        """Send framed bytes of the engine's body; True when the client has enough for now: `drain` before the next."""
        if self.first_byte_at is None:
            self.first_byte_at = time.perf_counter()
        if self._head:
            data, self._head = self._head + data, b""
        self._write(data)
        return self._protocol.writing_paused

    def _write(self, data: bytes) -> None:
        # Between a reset and the word of it the transport is closed, and uvloop's raises.
        if not self._client.is_closing():
            self._client.write(data)

    async def send(self, payload: bytes) -> None:
        """Send a piece of a body that is made here, framed as it has to be."""
        self.flush()
        self._write(http1.chunk(payload) if self._framed else payload)
        await self.drain()

    def comment(self, payload: bytes) -> None:
        """Send a piece that is made here, unless the client has enough to read as it is."""
        if not self._protocol.writing_paused:
            self.flush()
            self._write(http1.chunk(payload) if self._framed else payload)

    def end(self) -> None:
        """End a body that was made here."""
        self.flush()
        if self._framed:
            self._write(http1.LAST_CHUNK)

    async def drain(self) -> None:
        """Return when the client has read so much that more may be sent."""
        await self._request.writer.drain()

    def break_off(self) -> None:
        """End the connection so that the client cannot take what it has for the whole answer."""
        self._stays = False
        transport = self._client
        if self._request.version >= aiohttp.HttpVersion11:
            transport.close()  # what was written still goes out; the missing last chunk or bytes tell the rest
            return
        # HTTP/1.0 ends a body by closing, so only a reset is a failure; lingering for 0 s makes one (socket(7)).
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.fileno() >= 0:  # -1: the client has left
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    # --- what aiohttp's server asks of a response ---

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to prepare."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Everything was written."""


def _safe(value: str) -> bytes:
    if _FORBIDDEN.search(value):
        raise ValueError("a control character in a header's value")
    return value.encode("utf-8", "surrogateescape")
