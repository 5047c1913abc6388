"""The body of a request: asked for, read and decoded, within the limit at every moment.

`Expect: 100-continue` (RFC 9110, 10.1.1) is answered as late as possible, by whoever reads the body: what is refused
before costs nobody an upload. Content codings (RFC 9110, 8.4) are decoded in steps between which others are served.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING, Final

import aiohttp
import zstandard
from aiohttp import hdrs, web

from proxy.errors import BodyTooLargeError, ContentCodingError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_READ_AT_ONCE: Final = 32 << 10
_STEP: Final = 256 << 10
"""How much is decoded before others are served: about a millisecond's work."""
_WINDOW: Final = 8 << 20
"""zstd in HTTP needs no larger one (RFC 9659)."""
_CODINGS: Final = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate", "zstd": "zstd"}
_NOT_AS_SAID: Final = "The body is not what its Content-Encoding or Transfer-Encoding says."


def waits_with_body(request: web.BaseRequest) -> bool:
    """Whether the client waits to be told to send the body."""
    content = request.content
    if content.is_eof() or content.total_bytes or request.version < aiohttp.HttpVersion11:
        return False
    return any(name.lower() == b"expect" for name, _ in request.raw_headers)


async def body_of(request: web.BaseRequest, limit: int) -> bytes:
    """All of it, decoded.

    Raises BodyTooLargeError, ContentCodingError, or InvalidRequestError for one that is not coded as its fields say.
    """
    coding = _coding_of(request.headers.getall(hdrs.CONTENT_ENCODING, ()))
    content = request.content
    try:
        # Nearly every body has come with its head.
        if content.is_eof() and content.total_bytes <= min(_READ_AT_ONCE, limit):
            data = content.read_nowait()
        else:
            _ask_for_body(request)
            data = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except web.RequestPayloadError:
        raise InvalidRequestError(_NOT_AS_SAID) from None
    return await decoded(data, coding, limit) if coding is not None and data else data


def _ask_for_body(request: web.BaseRequest) -> None:
    transport = request.transport
    if transport is not None and not transport.is_closing() and waits_with_body(request):
        transport.write(CONTINUE)


def _coding_of(values: Iterable[str]) -> str | None:
    """The one coding of a body; None where it has none. Raises ContentCodingError."""
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
                raise _too_large(limit)
            pieces.append(piece)
            await asyncio.sleep(0)
    except (zlib.error, zstandard.ZstdError, EOFError):
        raise InvalidRequestError(_NOT_AS_SAID) from None
    return b"".join(pieces)


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


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is over the limit of {limit} bytes.")
