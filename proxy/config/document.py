"""What is done to a configuration before it is validated: `[defaults]` into the models, `{env:NAME}` replaced."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

ENGINE_TABLES: Final = ("process", "podman")
"""The tables of a model that say what its engine is; each is the name of a runtime."""
OF_ONE_MODEL: Final = ("name", "aliases", "adapters")
"""The keys that no two models can share."""
_REFERENCE: Final = re.compile(r"\{env:([^{}]*)\}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

KeyPath = tuple[str | int, ...]


@dataclass(slots=True)
class Document:
    """Plain values that are ready to be validated, and what they were made of."""

    values: dict[str, Any]
    references: dict[KeyPath, str] = field(default_factory=dict)
    """Key → its text with `{env:NAME}` as it was written; what came of it may be a secret."""
    secrets: set[str] = field(default_factory=set)
    """The values of the variables."""
    problems: dict[KeyPath, str] = field(default_factory=dict)
    """Key → what is wrong with its references."""
    _own: Mapping[str, Any] = field(default_factory=dict)
    _defaults: Mapping[str, Any] = field(default_factory=dict)

    def written_at(self, path: KeyPath) -> KeyPath:
        """Where a key of a model was written: in its own table or in `[defaults]`."""
        if len(path) < 3 or path[0] != "models":
            return path
        own = self._own.get(str(path[1]))
        if not _has(own, path[2:]) and _has(self._defaults, path[2:]):
            return ("defaults", *path[2:])
        return path

    def without_values(self, text: str) -> str:
        """The text with what came of references as references again."""
        for path, written in self.references.items():
            value = _at(self.values, path)
            if isinstance(value, str) and value and value != written:
                text = text.replace(value, written)
        return text


def prepare(values: Mapping[str, Any], environment: Mapping[str, str]) -> Document:
    """The values of a file, with references and defaults resolved."""
    defaults = values.get("defaults")
    models = values.get("models")
    document = Document(
        with_defaults(values),
        _own=models if isinstance(models, dict) else {},
        _defaults=defaults if isinstance(defaults, dict) else {},
    )
    for name in OF_ONE_MODEL:
        if name in document._defaults:
            document.problems["defaults", name] = "cannot be that of all models; set it in [models.NAME]"
    document.values = _resolved(document.values, (), document, environment)
    return document


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the table `defaults` merged into every model, which wins; tables key by key, lists whole.

    An engine table of the defaults is left out where the model has the other one.
    """
    merged = copy.deepcopy(dict(values))
    defaults, models = merged.pop("defaults", None), merged.get("models")
    if isinstance(defaults, dict) and isinstance(models, dict):
        merged["models"] = {
            key: _merged(_fitting(defaults, model), model) if isinstance(model, dict) else model
            for key, model in models.items()
        }
    elif defaults is not None and not isinstance(defaults, dict):
        merged["defaults"] = defaults  # for the validation to refuse
    return merged


def _fitting(defaults: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    own = [name for name in ENGINE_TABLES if name in model]
    left_out = {*OF_ONE_MODEL, *(ENGINE_TABLES if own else ())} - set(own)
    return {name: value for name, value in defaults.items() if name not in left_out}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(below))
    for name, value in above.items():
        under = result.get(name)
        result[name] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return result


def _resolved(value: Any, path: KeyPath, document: Document, environment: Mapping[str, str]) -> Any:
    match value:
        case str():
            return _text(value, path, document, environment) if "{env:" in value else value
        case dict():
            return {key: _resolved(item, (*path, key), document, environment) for key, item in value.items()}
        case list():
            return [_resolved(item, (*path, index), document, environment) for index, item in enumerate(value)]
    return value


def _text(written: str, path: KeyPath, document: Document, environment: Mapping[str, str]) -> str:
    problems: list[str] = []

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if not _VARIABLE.fullmatch(name):
            problems.append(f"{match[0]} names no environment variable: write {{env:NAME}}")
        elif name not in environment:
            problems.append(f"{match[0]}: the environment variable {name} is not set")
        value = environment.get(name, "")
        document.secrets.add(value)
        return value

    value = _REFERENCE.sub(value_of, written)
    document.references[path] = written
    if problems:
        document.problems[path] = "; ".join(problems)
    return value


def _has(table: Any, path: KeyPath) -> bool:
    for part in path:
        if isinstance(table, dict) and part in table:
            table = table[part]
        else:
            return isinstance(table, list)  # which is written in one place
    return True


def _at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values
