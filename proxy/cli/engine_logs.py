"""The log files of a model's engines, printed as they grow; those that are yet to come too."""

from __future__ import annotations

import contextlib
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final, Self

import aiofiles
import aiofiles.os
import click

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aiofiles.threadpool.binary import AsyncBufferedReader

_TAIL_BYTES_A_LINE: Final = 400


class EngineLogs:
    """The files of one model, or of one instance of it; `async with` it."""

    def __init__(self, folder: Path, key: str, instance: str | None) -> None:
        self._folder = folder
        self._key = key
        self._instance = instance
        self._open: dict[str, AsyncBufferedReader] = {}
        self._rest: dict[str, bytes] = {}
        self._last = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        async with AsyncExitStack() as closing:
            for file in self._open.values():
                closing.push_async_callback(file.close)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self._folder.glob(f"{self._key}-*.log")):
            name = path.stem
            if name.rpartition("-")[0] == self._key and self._instance in (None, name):
                yield name, path

    async def begin(self, lines: int) -> bool:
        """Print the last `lines` of each; whether there was a file."""
        for name, path in self._files():
            file = self._open[name] = await aiofiles.open(path, "rb")
            size = await file.seek(0, os.SEEK_END)
            await file.seek(max(0, size - lines * _TAIL_BYTES_A_LINE - 1))
            ends = (await file.read()).splitlines(keepends=True)
            self._print(name, b"".join(ends[-lines:]) if lines else b"")
        return bool(self._open)

    async def go_on(self) -> None:
        """Print what was added since, from the start where a file was begun anew."""
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
                self._print(name, await file.read())

    def _print(self, name: str, text: bytes) -> None:
        """Whole lines, and a heading wherever another file goes on."""
        text = self._rest.pop(name, b"") + text
        whole, newline, rest = text.rpartition(b"\n")
        if rest:
            self._rest[name] = rest
        if not newline:
            return
        if name != self._last:
            click.echo(click.style(f"==> {name} <==", bold=True), err=True)
            self._last = name
        click.echo(whole.decode("utf-8", "replace"))
