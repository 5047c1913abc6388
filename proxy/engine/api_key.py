"""The API key that an engine of the user's asks for, as vLLM with `--api-key` does."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Final

from proxy.errors import ConfigError
from proxy.host import private_files

if TYPE_CHECKING:
    from proxy.config.model import ModelSettings

log = logging.getLogger("warmpool.engine")

FORM: Final = re.compile(r"[!-~]{1,4096}")
"""One word that can stand in a header."""


def key_of(name: str, model: ModelSettings) -> str | None:
    """The key for the engines of `models.NAME`, if they ask for one; None too where its file is of no use.

    That is logged, and the engine's own refusal then says what is missing.
    """
    if model.api_key is not None:
        return model.api_key.get_secret_value()
    if (problem := problem_of(name, model)) is not None:
        log.error("%s", problem)
        return None
    return _read(model)


def problem_of(name: str, model: ModelSettings) -> str | None:
    """What is wrong with the file of the key."""
    if model.api_key is not None:
        return None
    try:
        _read(model)
    except ConfigError as error:
        return f"models.{name}.api_key_file: {error}"
    return None


def _read(model: ModelSettings) -> str | None:
    path = model.api_key_file
    if path is None:
        return None
    key = private_files.read(path, "set the mode with chmod 600").strip()
    if not FORM.fullmatch(key):
        raise ConfigError(str(path), ["must have one word of printable ASCII, at most 4096 characters"])
    return key
