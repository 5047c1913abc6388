"""Secrets in what is shown of a configuration: passwords in URLs, values of options that are named as secrets are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from proxy.config.document import KeyPath

MASK: Final = "*" * 10
"""As pydantic shows a SecretStr."""

# A path of pathlib has one slash only.
_USER: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^/\s@?#]+@")
_QUERY: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?#'\"]*\?)[^\s#'\"]+")
_SECRET_OPTION: Final = re.compile(r"(--?(?:[\w.-]*[-_.])?(?:key|token|secret|password|passwd|credentials?))(=.*)?")


_remembered: set[str] = set()
_SHORTEST_SECRET: Final = 6


def remember(values: Iterable[str]) -> None:
    """Mask these from now on, wherever they come: what `{env:NAME}` stands for, which may be a secret."""
    _remembered.update(value for value in values if len(value) >= _SHORTEST_SECRET)


def mask_urls(text: str) -> str:
    """The text without users, passwords and queries of URLs, and without what is remembered as a secret."""
    for value in _remembered:
        text = text.replace(value, MASK)
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text))


def _masked_arguments(arguments: Sequence[str]) -> Iterator[str]:
    hidden = False
    for argument in arguments:
        if (option := _SECRET_OPTION.fullmatch(argument)) is not None:
            hidden = option[2] is None
            yield argument if hidden else f"{option[1]}={MASK}"
            continue
        hidden = hidden and not argument.startswith("-")
        yield MASK if hidden else mask_urls(argument)


def masked(value: Any) -> Any:
    """Plain values with their secrets masked, and without the keys that are not set, which TOML cannot express."""
    match value:
        case str():
            return mask_urls(value)
        case dict():
            return {mask_urls(str(key)): masked(item) for key, item in value.items() if item is not None}
        case list() if all(isinstance(item, str) for item in value):
            return list(_masked_arguments(value))
        case list():
            return [masked(item) for item in value]
    return value


def with_references(values: Any, references: Mapping[KeyPath, str]) -> Any:
    """Plain values with the texts that had `{env:NAME}` in them as they were written."""
    for path, written in references.items():
        *above, last = path
        table = values
        for part in above:
            table = table[part]
        table[last] = written
    return values
