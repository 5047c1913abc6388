"""The format of CRIU's image files, read and written without CRIU.

A file is a head of two magic numbers, then messages in protobuf's wire format with their length before them
(criu.org/Images). What the fields mean is in CRIU's images/*.proto.
"""

from __future__ import annotations

import struct
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

COMMON_MAGIC: Final = 0x54564319
FILES_MAGIC: Final = 0x56303138
MM_MAGIC: Final = 0x57492820
PAGEMAP_MAGIC: Final = 0x56084025

_WIDTHS: Final = {1: 8, 2: None, 5: 4}
"""Of a value by its wire type; None: it says so itself."""


class UnknownFormatError(Exception):
    """A file is not what is known here."""


def read(path: Path, magic: int) -> list[bytes]:
    """The messages of a file of this kind, at least one. Raises UnknownFormatError, also where nothing can be read."""
    try:
        data = path.read_bytes()
    except OSError:
        raise UnknownFormatError from None
    if data[:8] != struct.pack("<II", COMMON_MAGIC, magic):
        raise UnknownFormatError
    found, at = [], 8
    while at < len(data):
        if at + 4 > len(data):
            raise UnknownFormatError
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise UnknownFormatError
        found.append(data[at : at + size])
        at += size
    if not found:
        raise UnknownFormatError
    return found


def write(file: IO[bytes], magic: int, messages: Iterable[bytes]) -> None:
    """Write what a file of this kind consists of. Raises OSError."""
    file.write(struct.pack("<II", COMMON_MAGIC, magic) + b"".join(struct.pack("<I", len(m)) + m for m in messages))


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields; those of a fixed width as bytes. Raises UnknownFormatError."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        if key & 7 == 0:
            value, at = _read_varint(message, at)
            yield key >> 3, value
        elif key & 7 in _WIDTHS:
            size = _WIDTHS[key & 7]
            if size is None:
                size, at = _read_varint(message, at)
            if at + size > len(message):
                raise UnknownFormatError
            yield key >> 3, message[at : at + size]
            at += size
        else:
            raise UnknownFormatError


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise UnknownFormatError
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at


def encoded(values: Iterable[tuple[int, int]]) -> bytes:
    """A message of numbers, by field."""
    return b"".join(_varint(number << 3) + _varint(value) for number, value in values)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
