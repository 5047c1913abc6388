"""Reads the settings: one TOML file, and the environment laid over it."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from proxy.config import impossible
from proxy.config.document import Document, KeyPath, prepare
from proxy.config.explain import Problem, explain, problem, suggestion
from proxy.config.masking import remember
from proxy.config.positions import Positions
from proxy.config.settings import ENV_DELIMITER, ENV_PREFIX, Settings
from proxy.errors import ConfigError
from proxy.host import owned

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

RESERVED_ENV: Final = frozenset({"WARMPOOL_CONFIG", "WARMPOOL_INSTANCE_ID", "WARMPOOL_URL", "WARMPOOL_TOKEN_FILE"})
"""Names with the prefix that are not keys: where the file is, the mark on every engine process, and where the commands
find a server."""
_LINE: Final = re.compile(r" \(at line (\d+), column (\d+)\)$")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and what came into them from the environment by `{env:NAME}`: key → the text as it was written."""

    settings: Settings
    references: dict[KeyPath, str]


def load(path: Path | None) -> Settings:
    """The settings of a TOML file (None: none) with the environment laid over it.

    Raises ConfigError with every problem found: the file's syntax, or each key that is unknown, missing or has a value
    that is not allowed, with its line.
    """
    return read(path).settings


def read(path: Path | None) -> Loaded:
    """As `load`, with what is not to be shown."""
    return parse(_text(path), str(path)) if path is not None else parse("", "environment")


def parse(text: str, source: str) -> Loaded:
    """The settings of a text, which came from `source`, with the environment laid over it. Raises ConfigError."""
    values = _values(text, source)
    document = Document({})

    class FileAndEnvironment(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return EnvSettingsSource(settings_cls), InitSettingsSource(settings_cls, init_kwargs=values)

        @model_validator(mode="before")
        @classmethod
        def _prepared(cls, merged: dict[str, Any]) -> dict[str, Any]:
            nonlocal document
            document = prepare(merged, os.environ)
            remember(document.secrets)
            return document.values

    found: list[Problem] = [Problem((), text) for text in _unknown_environment(Settings.model_fields)]
    settings: Settings | None = None
    try:
        settings = FileAndEnvironment()
    except ValidationError as error:
        unresolved = {path: problem(document.written_at(path), text) for path, text in document.problems.items()}
        # What is wrong with a value for want of a variable is the variable.
        found += [explain(e, document) for e in error.errors() if tuple(e["loc"]) not in unresolved]
        found += unresolved.values()
    except SettingsError as error:
        found.append(Problem((), f"environment: {_of_source(error)}"))
    else:
        found += [problem(document.written_at(path), text) for path, text in document.problems.items()]
        found += [problem(document.written_at(path), text) for path, text in impossible.found(settings)]
    found = list(dict.fromkeys(found))
    if found or settings is None:
        raise _error(source, found, Positions(text))
    return Loaded(settings, document.references)


def _error(source: str, found: Sequence[Problem], positions: Positions) -> ConfigError:
    placed = [(positions.line_of([str(part) for part in it.path]), it.text) for it in found]
    placed.sort(key=lambda entry: entry[0] or 0)
    return ConfigError(source, [text for _, text in placed], [line for line, _ in placed])


def _of_source(error: SettingsError) -> str:
    """pydantic-settings: `error parsing value for field "models" from source "EnvSettingsSource"`."""
    match = re.search(r'field "([^"]+)"', str(error))
    return f"the value for {match[1]} is not JSON" if match else str(error)


def _text(path: Path) -> str:
    try:
        with owned.open_plain(path, follow=True) as file:
            return file.read().decode()
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not TOML: not UTF-8, at byte {error.start}"]) from None


def _values(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = str(error)
        if (match := _LINE.search(said)) is None:
            raise ConfigError(source, [f"is not TOML: {said}"]) from None
        reason = f"is not TOML: {said[: match.start()]} (column {match[2]})"
        raise ConfigError(source, [reason], [int(match[1])]) from None


def _unknown_environment(fields: Iterable[str]) -> list[str]:
    known = {f"{ENV_PREFIX}{name.upper()}": name for name in fields}
    problems = []
    for name in sorted(os.environ):
        key = name.upper()
        if not key.startswith(ENV_PREFIX) or name in RESERVED_ENV:
            continue
        if not any(key == k or key.startswith(k + ENV_DELIMITER) for k in known):
            first = key.removeprefix(ENV_PREFIX).partition(ENV_DELIMITER)[0].lower()
            meant = suggestion(first, known.values())
            asked = f"; did you mean {ENV_PREFIX}{meant.upper()}?" if meant else ""
            problems.append(f"environment variable {name}: not a key; they begin with {', '.join(known)}{asked}")
        elif f"{ENV_DELIMITER}ENV{ENV_DELIMITER}" in key:
            table, _, variable = name.rpartition(ENV_DELIMITER)
            # pydantic-settings lower-cases names, which would change the engine's variable
            problems.append(f'environment variable {name}: set {table}=\'{{"{variable}": "…"}}\' instead')
    return problems
