"""Where in a TOML file its keys are, for messages: tomllib does not say."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_NAME: Final = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)"""
_PATH: Final = rf"{_NAME}(?:[ \t]*\.[ \t]*{_NAME})*"
_TABLE: Final = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_PATH})[ \t]*\]\]?[ \t]*(?:#.*)?")
_KEY: Final = re.compile(rf"[ \t]*({_PATH})[ \t]*=(?!=)")
_QUOTES: Final = re.compile(r'"""|\'\'\'')

Path = tuple[str, ...]


class Positions:
    """The lines, from 1, of the tables and keys of a text that is TOML."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Path, int] = {}
        within: dict[Path, int] = {}
        for path, line in _keys(text):
            self._lines.setdefault(path, line)
            for length in range(1, len(path)):
                within.setdefault(path[:length], line)
        # A table that has no line of its own is where the first of what is in it is.
        self._lines = within | self._lines

    def line_of(self, path: Sequence[str]) -> int | None:
        """The line of the key, or of the nearest one above it that has a line."""
        for length in range(len(path), 0, -1):
            if (line := self._lines.get(tuple(path[:length]))) is not None:
                return line
        return None


def _keys(text: str) -> Iterator[tuple[Path, int]]:
    table: Path = ()
    counts: dict[Path, int] = {}
    quote = ""
    for number, line in enumerate(text.splitlines(), 1):
        outside = not quote
        for found in _QUOTES.findall(line):  # a text of several lines begins or ends
            quote = found if not quote else "" if quote == found else quote
        if not outside:
            continue
        if match := _TABLE.fullmatch(line):
            table = _parts(match[2])
            if match[1] == "[[":
                index = counts[table] = counts.get(table, -1) + 1
                table = (*table, str(index))
            yield table, number
        elif match := _KEY.match(line):
            path = (*table, *_parts(match[1]))
            for length in range(len(table) + 1, len(path) + 1):
                yield path[:length], number


def _parts(dotted: str) -> Path:
    """The names in `a."b.c".d`."""
    here: Mapping[str, object] | object = tomllib.loads(f"{dotted} = 0")
    parts: list[str] = []
    while isinstance(here, dict):
        ((name, here),) = here.items()
        parts.append(name)
    return tuple(parts)
