"""The body of a request: read in its framing, and decoded, within the limit at every moment.

Content codings (RFC 9110, 8.4) are decoded in steps between which others are served.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING, Final

import zstandard

from proxy.engine import http1
from proxy.errors import BodyTooLargeError, ContentCodingError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STEP: Final = 256 << 10
"""How much is decoded before others are served: about a millisecond's work."""
_WINDOW: Final = 8 << 20
"""zstd in HTTP needs no larger one (RFC 9659)."""
_CODINGS: Final = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate", "zstd": "zstd"}
NOT_AS_SAID: Final = "The body is not what its Content-Encoding or Transfer-Encoding says."


class RequestBody:
    """A body that does not come whole with its head."""

    __slots__ = ("_pieces", "_reader", "_wanted", "began")

    def __init__(self, length: int, now: float) -> None:
        """`length` as in `RequestHead`."""
        self._reader: http1.Body = (
            http1.StrictChunks(length, framed=False) if length < 0 else http1.SizedBody(length, framed=False)
        )
        self._pieces: list[bytes] = []
        self._wanted = True
        self.began = now

    @property
    def size(self) -> int:
        """How much has come."""
        return self._reader.payload_bytes

    @property
    def done(self) -> bool:
        """It is whole."""
        return self._reader.done

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to it; the rest is returned. Raises `http1.ProtocolError`."""
        piece = self._reader.feed(data)
        if self._wanted and piece:
            self._pieces.append(piece)
        excess = self._reader.excess
        return data[len(data) - excess :] if excess else b""

    def drop(self, now: float) -> None:
        """Nobody wants it any more: what comes is read over, from `now` on."""
        self._wanted, self.began = False, now
        self._pieces.clear()

    def pieces(self) -> list[bytes]:
        """All of it. To put a large one together would hold the event loop for some milliseconds: see `joined`."""
        return self._pieces


def coding_of(values: Iterable[str]) -> str | None:
    """The coding that `Content-Encoding` names; None where it names none. Raises ContentCodingError."""
    names = [name for value in values for part in value.split(",") if (name := part.strip().lower())]
    names = [name for name in names if name != "identity"]
    if not names:
        return None
    if len(names) > 1 or names[0] not in _CODINGS:
        raise ContentCodingError(_CODINGS)
    return _CODINGS[names[0]]


async def decoded(data: bytes, coding: str, limit: int) -> bytes:
    """The data out of "gzip", "deflate" or "zstd". Raises BodyTooLargeError or InvalidRequestError."""
    pieces, size = list[bytes](), 0
    try:
        for piece in _from_zstd(data) if coding == "zstd" else _from_zlib(data, coding):
            size += len(piece)
            if size > limit:
                raise too_large(limit)
            pieces.append(piece)
            await asyncio.sleep(0)
        return await joined(pieces)
    except (zlib.error, zstandard.ZstdError, EOFError):
        raise InvalidRequestError(NOT_AS_SAID) from None


async def joined(pieces: list[bytes]) -> bytes:
    """A large body in one piece, put together by a thread: that leaves the interpreter to others meanwhile."""
    return pieces[0] if len(pieces) == 1 else await asyncio.to_thread(b"".join, pieces)


def _from_zlib(data: bytes, coding: str) -> Iterator[bytes]:
    """Raises zlib.error or EOFError."""
    if coding == "gzip":
        bits = 16 + zlib.MAX_WBITS
    else:  # "deflate" has a zlib header (RFC 1950), which some clients leave out
        bits = zlib.MAX_WBITS if data[0] & 0xF == zlib.DEFLATED else -zlib.MAX_WBITS
    while data:
        decoder = zlib.decompressobj(bits)
        while not decoder.eof:
            yield (piece := decoder.decompress(data, _STEP))
            data = decoder.unconsumed_tail
            if not piece and not data and not decoder.eof:
                raise EOFError
        data = decoder.unused_data  # another member of gzip
        if data and coding != "gzip":
            raise EOFError


def _from_zstd(data: bytes) -> Iterator[bytes]:
    """Raises ZstdError. One that ends too soon is as far as it goes; whoever reads it sees that its end is missing."""
    decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    with decoder.stream_reader(data, read_across_frames=True) as reader:
        while piece := reader.read(_STEP):
            yield piece


def too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is over the limit of {limit} bytes.")
