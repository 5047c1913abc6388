"""The log files of a model's engines, read as they grow; those that are yet to come too."""

from __future__ import annotations

import contextlib
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final, Self

import aiofiles
import aiofiles.os

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aiofiles.threadpool.binary import AsyncBufferedReader

    Piece = tuple[str, bytes]
    """The instance, and whole lines of its."""

_TAIL_BYTES_A_LINE: Final = 400
_MOST_BYTES: Final = 1 << 20
"""Of one file at once."""


class LogFiles:
    """The files of one model, or of one instance of it; `async with` it."""

    def __init__(self, folder: Path, key: str, instance: str | None = None) -> None:
        self._folder = folder
        self._key = key
        self._instance = instance
        self._open: dict[str, AsyncBufferedReader] = {}
        self._rest: dict[str, bytes] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        async with AsyncExitStack() as closing:
            for file in self._open.values():
                closing.push_async_callback(file.close)

    @property
    def found(self) -> bool:
        """Whether there was a file."""
        return bool(self._open)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self._folder.glob(f"{self._key}-*.log")):
            name = path.stem
            if name.rpartition("-")[0] == self._key and self._instance in (None, name):
                yield name, path

    async def begin(self, lines: int) -> list[Piece]:
        """The last `lines` of each."""
        pieces: list[Piece] = []
        for name, path in self._files():
            file = self._open[name] = await aiofiles.open(path, "rb")
            size = await file.seek(0, os.SEEK_END)
            await file.seek(max(0, size - min(lines * _TAIL_BYTES_A_LINE + 1, _MOST_BYTES)))
            ends = (await file.read(_MOST_BYTES)).splitlines(keepends=True)
            pieces += self._whole(name, b"".join(ends[-lines:]) if lines else b"")
        return pieces

    async def go_on(self) -> list[Piece]:
        """What was added since, from the start where a file was begun anew."""
        pieces: list[Piece] = []
        for name, path in self._files():
            file = self._open.get(name)
            with contextlib.suppress(OSError):
                there = await aiofiles.os.stat(path)
                if file is None or os.fstat(file.fileno()).st_ino != there.st_ino:
                    anew = await aiofiles.open(path, "rb")
                    if file is not None:
                        await file.close()
                    file = self._open[name] = anew
                elif there.st_size < await file.tell():
                    await file.seek(0)
            if file is not None:
                pieces += self._whole(name, await file.read(_MOST_BYTES))
        return pieces

    def _whole(self, name: str, text: bytes) -> Iterator[Piece]:
        """Whole lines; a part of one is kept until the rest of it is there."""
        text = self._rest.pop(name, b"") + text
        whole, newline, rest = text.rpartition(b"\n")
        if len(rest) >= _MOST_BYTES:
            whole, newline, rest = text, b"\n", b""
        if rest:
            self._rest[name] = rest
        if newline:
            yield name, whole + newline
