"""The JSON Schema of the configuration, by which editors complete and check it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, PlainSerializer

from proxy.config.document import OF_ONE_MODEL
from proxy.config.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

_REFERENCE: Final = {"type": "string", "pattern": r"\{env:[A-Za-z_][A-Za-z0-9_]*\}"}
"""What may stand for a number, a choice or a switch."""
_VOLUME: Final = "VolumeSettings"
_AS_PODMAN_WRITES_IT: Final = {"type": "string", "pattern": "^[^:]+:/[^:]*(:[A-Za-z,]*)?$"}


def schema() -> dict[str, Any]:
    """It says a little less than the validation: what keys have to do with one another is not in it."""
    found = Settings.model_json_schema()
    definitions: dict[str, Any] = found.pop("$defs")
    sections = {section.__name__: section for section in _sections(Settings)}
    tables = {Settings.__name__: found, **definitions}
    for name, table in tables.items():
        if name != _VOLUME:
            table.pop("required", None)  # the defaults or the environment may have it
        table.pop("title", None)
        for key, node in table["properties"].items():
            table["properties"][key] = _key(node, sections[name].model_fields[key])
    volume = definitions[_VOLUME]
    definitions[_VOLUME] = {"description": volume.pop("description"), "anyOf": [_AS_PODMAN_WRITES_IT, volume]}
    model = definitions["ModelSettings"]
    shared = {name: key for name, key in model["properties"].items() if name not in OF_ONE_MODEL}
    definitions["Defaults"] = {**model, "properties": shared}
    meaning = found["properties"]["defaults"]["description"]
    found["properties"]["defaults"] = {"$ref": "#/$defs/Defaults", "description": meaning}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "warmpool.toml",
        **found,
        "description": "The configuration of warmpool.",
        "$defs": definitions,
    }


def _sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for inner in _classes(field.annotation):
            yield from _sections(inner)


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _classes(inner)


def _key(node: dict[str, Any], field: FieldInfo) -> dict[str, Any]:
    """What is known of a key: without null, which TOML does not have, and with its default as it is written."""
    default = node.pop("default", None)
    node.pop("title", None)
    kept: dict[str, Any] = {name: node.pop(name) for name in ("description", "examples") if name in node}
    for serializer in field.metadata:
        if isinstance(serializer, PlainSerializer) and default is not None:
            default = serializer.func(field.default)  # type: ignore[call-arg]
    if default not in (None, {}, []) and not isinstance(default, dict):
        kept["default"] = default
    return kept | _value(node)


def _value(node: dict[str, Any]) -> dict[str, Any]:
    options: list[dict[str, Any]] = [option for option in node.get("anyOf", [node]) if option.get("type") != "null"]
    if "$ref" in options[0]:
        return options[0]
    for option in options:
        for name in ("items", "additionalProperties"):
            if isinstance(option.get(name), dict):
                option[name] = _value(option[name])
    if any(_is_closed(option) for option in options):
        options.append(_REFERENCE)
    return options[0] if len(options) == 1 else {"anyOf": options}


def _is_closed(option: dict[str, Any]) -> bool:
    return option.get("type") in ("integer", "number", "boolean") or "enum" in option or "pattern" in option
