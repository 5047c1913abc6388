"""Reads the settings: one TOML file, and the environment laid over it."""

from __future__ import annotations

import os
import tomllib
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from proxy.config.explain import explain
from proxy.config.settings import ENV_DELIMITER, ENV_PREFIX, Settings
from proxy.errors import ConfigError
from proxy.host import owned

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

RESERVED_ENV = frozenset({"WARMPOOL_CONFIG", "WARMPOOL_INSTANCE_ID", "WARMPOOL_URL", "WARMPOOL_TOKEN_FILE"})
"""Names with the prefix that are not keys: where the file is, the mark on every engine process, and where the commands
find a server."""


def load(path: Path | None) -> Settings:
    """The settings of a TOML file (None: none) with the environment laid over it.

    Raises ConfigError with every problem found: the file's syntax, or each key that is unknown, missing or has a value
    that is not allowed.
    """
    source = str(path) if path is not None else "environment"
    document = _document(path) if path is not None else {}

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
            return EnvSettingsSource(settings_cls), InitSettingsSource(settings_cls, init_kwargs=document)

    unknown = _unknown_environment(Settings.model_fields)
    try:
        settings = FileAndEnvironment()
    except ValidationError as error:
        raise ConfigError(source, [*unknown, *(explain(e) for e in error.errors())]) from None
    except SettingsError as error:
        raise ConfigError(source, [*unknown, f"environment: {error}"]) from None
    if unknown:
        raise ConfigError(source, unknown)
    return settings


def _document(path: Path) -> dict[str, Any]:
    try:
        with owned.open_plain(path, follow=True) as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not TOML: {error}"]) from None


def _unknown_environment(fields: Iterable[str]) -> list[str]:
    known = tuple(f"{ENV_PREFIX}{name.upper()}" for name in fields)
    problems = []
    for name in sorted(os.environ):
        key = name.upper()
        if not key.startswith(ENV_PREFIX) or name in RESERVED_ENV:
            continue
        if not any(key == k or key.startswith(k + ENV_DELIMITER) for k in known):
            problems.append(f"environment variable {name}: not a key; they begin with {', '.join(known)}")
        elif f"{ENV_DELIMITER}ENV{ENV_DELIMITER}" in key:
            table, _, variable = name.rpartition(ENV_DELIMITER)
            # pydantic-settings lower-cases names, which would change the engine's variable
            problems.append(f'environment variable {name}: set {table}=\'{{"{variable}": "…"}}\' instead')
    return problems
