"""Errors of validation as sentences: what is wrong, in words of this program, and where."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ByteSize, SecretStr

from proxy.config.document import ENGINE_TABLES
from proxy.config.masking import mask_urls
from proxy.config.model import ModelSettings
from proxy.config.settings import ENV_DELIMITER, ENV_PREFIX, Settings
from proxy.config.values import format_duration, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic.fields import FieldInfo

    from proxy.config.document import Document, KeyPath

_VARIABLE: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_LONGEST_SHOWN: Final = 60
_TABLE_WANTED: Final = frozenset({"model_type", "model_attributes_type", "dict_type", "dict_attributes_type"})
_TIME: Final = "a time with its zone, such as 2030-01-31T12:00:00Z"
_WANTED: Final[Mapping[str, str]] = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "string_unicode": "text in quotes",
    "path_type": "a path in quotes",
    "list_type": "a list",
    "datetime_type": _TIME,
    "datetime_parsing": _TIME,
    "datetime_from_date_parsing": _TIME,
    "timezone_aware": _TIME,
}
PATTERNS: Final[Mapping[str, str]] = {
    r"^/[!-~]*$": "must be a path that begins with /, without spaces",
    r"^(0|[1-9]\d*(KiB|MiB|GiB)|[1-9]\d?%|100%)$": 'must be a size ("200GiB"), a share of the memory ("50%") or "0"',
    r"^[a-z][a-z0-9-]*( [^\n]*)?$": "must be an option of CRIU's, without its dashes, and its value",
    r"^(/[^/]*)*$": 'must be a JSON pointer, such as "/data/0/embedding", or "" for all of it',
    r"^[A-Za-z_:][A-Za-z0-9_:]*$": "must be the name of a metric",
    r"^[a-zA-Z_:][a-zA-Z0-9_:]{0,99}$": "must be the name of a metric, 100 characters at most",
    r"^[a-z]+$": 'must be the name of a resource limit, such as "nofile"',
    r"^-?\d+(:-?\d+)?$": 'must be SOFT:HARD, such as "65536:65536"',
    r"^(label|apparmor|no-new-privileges|mask|unmask)([=:].*)?$": (
        "must begin with label, apparmor, no-new-privileges, mask or unmask; a seccomp profile has a key of its own, "
        "seccomp"
    ),
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "must be the name of a network of podman's",
    r"^\d{1,5}-\d{1,5}$": "must be FIRST-LAST",
    r"^(\*|[a-z][a-z0-9+.-]*://[^/ ]+)$": 'must be an origin, such as "https://chat.example.org", or "*"',
    r"^[0-9A-Za-z]([0-9A-Za-z.-]{0,252})$": "must be a host name",
    r"^https?://[!-~]+$": 'must be a URL, such as "http://127.0.0.1:4318/v1/traces"',
    r"^(nats|tls)://[0-9A-Za-z.:\[\]-]+:[0-9]+$": "must be nats://HOST:PORT or tls://HOST:PORT",
    r"^[0-9A-Za-z_-]{1,64}$": "must be a word of letters, digits, _ and -, 64 characters at most",
    r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$": "must be a name of lower-case letters, digits and -, 63 at most",
    r"^[a-z][a-z0-9_]{0,47}$": (
        "a model's key has lower-case letters, digits and _, and begins with a letter (48 at most); set `name` to what "
        "clients say"
    ),
}
"""Pattern of a key → what it asks for."""
_OF_KEYS_FILE: Final[Mapping[str, str]] = {
    r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$": "must be a name of letters, digits and _.@-, 64 characters at most",
    r"^[0-9a-f]{32}$": "must be 32 hexadecimal digits, as `warmpool key new` writes them",
    r"^[0-9a-f]{64}$": "must be 64 hexadecimal digits, as `warmpool key new` writes them",
    r"^[a-z2-7]{8}$": "must be an id, as `warmpool key new` makes it",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a configuration; `path`: the key that it was written at, empty for the whole of it."""

    path: KeyPath
    text: str
    """With the key, and with the environment variable that it came from."""


def explain(error: Mapping[str, Any], document: Document | None = None) -> Problem:
    """One of pydantic's errors; `document` tells defaults and references from what they became."""
    place = _Place.of(error["loc"])
    message = _message(error, place)
    written = place.path
    if document is not None:
        message = document.without_values(message)
        written = document.written_at(place.path)
    return problem(written, message)


def sentence(error: Mapping[str, Any]) -> str:
    """What is wrong by one of pydantic's errors, of any class, without what was given, which may be a secret."""
    place = _Place(tuple(error["loc"]), None, None, error["loc"][-1:] == ("[key]",), secret=True)
    return "unknown key" if error["type"] == "extra_forbidden" else _message(error, place)


def problem(path: KeyPath, message: str) -> Problem:
    """What is wrong with a key."""
    names = [str(part) for part in path]
    variable = ENV_PREFIX + ENV_DELIMITER.join(names).upper()
    origin = f" (from environment variable {variable})" if names and variable in os.environ else ""
    key = ".".join(_without_secrets(names)) or "(whole file)"
    return Problem(path, mask_urls(f"{key}: {message}{origin}"))


def suggestion(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that was probably meant."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(known), n=1, cutoff=0.7)
    return close[0] if close else None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an error is: the key's path without what pydantic adds to it, and what is known of the key."""

    path: KeyPath
    field: FieldInfo | None
    section: type[BaseModel] | None
    """The table that the key is in."""
    of_key: bool
    """Whether the name itself is wrong, not its value."""
    secret: bool

    @classmethod
    def of(cls, loc: tuple[str | int, ...]) -> _Place:
        section: type[BaseModel] | None = Settings
        before: type[BaseModel] | None = None
        found: FieldInfo | None = None
        path: list[str | int] = []
        free = False
        for part in loc:
            if part == "[key]":
                continue
            if found is not None and section is None:
                # Of a list or a table of the user's own: one element's index or key; what follows tells unions apart.
                if free or not (isinstance(part, int) or _is_table(found)):
                    break
                free = True
                path.append(part)
                continue
            path.append(part)
            if section is None or isinstance(part, int) or (section is ModelSettings and path[:-1] == ["models"]):
                continue
            before, found = section, section.model_fields.get(part)
            section = ModelSettings if before is Settings and part == "models" else _section_of(found)
        secret = found is not None and SecretStr in _types(found.annotation)
        return cls(tuple(path), found, before, loc[-1:] == ("[key]",), secret)


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _types(inner)


def _is_table(found: FieldInfo) -> bool:
    return getattr(found.annotation, "__origin__", None) is dict


def _section_of(found: FieldInfo | None) -> type[BaseModel] | None:
    if found is None:
        return None
    return next((c for c in _types(found.annotation) if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _message(error: Mapping[str, Any], place: _Place) -> str:
    kind, context = str(error["type"]), error.get("ctx", {})
    if kind in _TABLE_WANTED:
        return "must be a table"
    if kind in _WANTED and error["loc"][-1] in ("int", "float"):  # of a union, which has an error for each
        return f"must be a number{_not(error, place)}"
    if kind in _WANTED:
        return f"must be {_WANTED[kind]}{_not(error, place)}"
    match kind:
        case "value_error" | "assertion_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case "extra_forbidden":
            return _unknown(str(place.path[-1]), place.section)
        case "missing":
            return "is required"
        case "literal_error":
            return _not_a_choice(error, place)
        case "string_pattern_mismatch":
            words = {**PATTERNS, **_OF_KEYS_FILE}.get(context["pattern"], "cannot be used")
            return words if place.of_key else f"{words}{_not(error, place)}"
        case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
            return f"must be {_bound(kind, context, place)}{_not(error, place)}"
        case "string_too_short":
            return "must not be empty"
        case "string_too_long":
            return f"may have {context['max_length']} characters at most"
        case "too_short":
            least = context["min_length"]
            return "there must be one at least" if least == 1 else f"there must be {least} at least"
        case "too_long":
            return f"there may be {context['max_length']} at most"
    return f"cannot be used{_not(error, place)}"


def _unknown(name: str, section: type[BaseModel] | None) -> str:
    known = sorted(section.model_fields) if section is not None else []
    if section is not None and (tables := _tables_with(name, section)):
        return f"unknown key; it belongs in the table {' or '.join(tables)}"
    if meant := suggestion(name, known):
        return f"unknown key; did you mean {meant}?"
    return f"unknown key; allowed here: {', '.join(known)}"


def _tables_with(name: str, section: type[BaseModel]) -> list[str]:
    """The tables in this one that have a key of this name."""
    found = [
        table for table, entry in section.model_fields.items()
        if (inner := _section_of(entry)) is not None and inner is not ModelSettings and name in inner.model_fields
    ]  # fmt: skip
    return [table for table in found if table in ENGINE_TABLES] or found


def _not_a_choice(error: Mapping[str, Any], place: _Place) -> str:
    expected = str(error.get("ctx", {}).get("expected", "")).replace("'", '"').replace(" or ", ", ")
    choices = [choice.strip('"') for choice in expected.split(", ")]
    given = error.get("input")
    meant = suggestion(given, choices) if isinstance(given, str) and given[:1].isalpha() else None
    asked = f'; did you mean "{meant}"?' if meant else ""
    return f"must be one of {expected}{_not(error, place)}{asked}"


def _bound(kind: str, context: Mapping[str, Any], place: _Place) -> str:
    (limit,) = (context[name] for name in ("ge", "gt", "le", "lt") if name in context)
    found = place.field
    if found is not None and ByteSize in _types(found.annotation):
        limit = format_size(int(limit))
    elif found is not None and any(getattr(m, "func", None) is format_duration for m in found.metadata):
        limit = format_duration(float(limit))
    elif isinstance(limit, float):
        limit = f"{limit:g}"
    return {
        "greater_than_equal": f"{limit} at least",
        "greater_than": f"more than {limit}",
        "less_than_equal": f"{limit} at most",
        "less_than": f"less than {limit}",
    }[kind]


def _not(error: Mapping[str, Any], place: _Place) -> str:
    """What it is instead, where that is short and no secret."""
    given = error.get("input")
    if place.secret or not isinstance(given, str | int | float):
        return ""
    if isinstance(given, bool):
        return f", not {str(given).lower()}"
    shown = f'"{given}"' if isinstance(given, str) else str(given)
    return f", not {shown}" if len(shown) <= _LONGEST_SHOWN and shown.isprintable() else ""


def _without_secrets(path: list[str]) -> Iterable[str]:
    """The parts of a key's path; where a variable of an engine should be named, only what looks like a name."""
    for before, part in zip([None, *path], path, strict=False):
        yield "…" if before == "env" and not _VARIABLE.fullmatch(part) else part
