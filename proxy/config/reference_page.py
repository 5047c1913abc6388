"""docs/reference.md: every key in tables, written from the settings themselves."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import BaseModel, BeforeValidator, ByteSize, PlainSerializer, SecretStr
from pydantic_core import PydanticUndefined

from proxy.config import diff
from proxy.config.settings import Settings
from proxy.config.values import parse_duration, parse_memory, parse_optional_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo

_HEAD = """\
# Every key

Written from the code by `warmpool config reference --format markdown`. Without `--format` the same is printed as a file
to start from ([config/reference.toml](../config/reference.toml)). [configuration.md](configuration.md) explains how
keys go together. NAME is the key of a model.

Durations have a unit (`500ms`, `90s`, `1m30s`, `2h`, `1d`), sizes are `16GiB` or bytes. By environment: `WARMPOOL_` and
the path joined by `__`, as in `WARMPOOL_SERVER__PORT=8081`. Keys with * take effect on a reload (SIGHUP); so does all
of a model, though some of its keys need new engines ([operations.md](operations.md#changing-the-configuration)).
"""
_NONE = "\N{EN DASH}"
_VALUES: Final[Mapping[Any, str]] = {
    parse_duration: "duration",
    parse_optional_duration: "duration or `never`",
    parse_size: "size",
    parse_memory: "size",
}


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *_section("", Settings)]).rstrip() + "\n"


def _section(path: str, section: type[BaseModel]) -> Iterator[str]:
    rows: list[str] = []
    below: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        here = f"{path}.{name}" if path else name
        inner = next(_sections(field.annotation), None)
        if inner is None:
            rows.append(_row(here, name, field))
            continue
        repeated = get_origin(field.annotation)
        ending = "[]" if repeated is list else ".NAME" if repeated is dict else ""
        below.append((here + ending, inner))
    if rows:
        title = f"`[[{path.removesuffix('[]')}]]`" if path.endswith("[]") else f"`[{path}]`" if path else "At the top"
        yield f"## {title}\n"
        yield f"{(section.__doc__ or '').strip().splitlines()[0]}\n"
        yield "| key | value | default | |"
        yield "|---|---|---|---|"
        yield from rows
        yield ""
    for named, inner in below:
        yield from _section(named, inner)


def _row(path: str, name: str, field: FieldInfo) -> str:
    live = "*" if path in diff.LIVE else ""
    default = "required" if field.is_required() else _default(field)
    return f"| `{name}`{live} | {_kind(field)} | {default} | {_cell(field.description or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "see there"
    value = field.get_default(call_default_factory=True)
    for serializer in field.metadata:
        if isinstance(serializer, PlainSerializer):
            value = serializer.func(value)  # type: ignore[call-arg]
    if value is None or value is PydanticUndefined or value in ([], {}):
        return _NONE
    if isinstance(value, bool | int | float | list | dict):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        if not isinstance(inner, str | int):
            yield from _sections(inner)


def _kind(field: FieldInfo) -> str:
    return _cell(_word(field.annotation, field.metadata))


def _word(annotation: Any, metadata: list[Any]) -> str:
    """What a value looks like, for people."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _word(arguments[0], [*arguments[1:]])
    for validator in metadata:
        if isinstance(validator, BeforeValidator):
            return _VALUES[validator.func]
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_word(a, metadata) for a in arguments if a is not type(None))
    if origin is list:
        return "list"
    if origin is dict:
        return "table"
    plain = {bool: "`true`, `false`", str: "text", SecretStr: "text", Path: "path", ByteSize: "size"}
    if annotation in plain:
        return plain[annotation]
    return f"number{_bounds(metadata)}"


def _bounds(metadata: list[Any]) -> str:
    low = next((m.ge for m in metadata if isinstance(m, Ge)), None)
    high = next((m.le for m in metadata if isinstance(m, Le)), None)
    if low is not None and high is not None:
        return f", {low:g} to {high:g}"
    return f" from {low}" if low is not None else ""
