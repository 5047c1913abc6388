"""Errors of validation as sentences."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from proxy.config.masking import mask_urls
from proxy.config.model import ModelSettings
from proxy.config.settings import ENV_DELIMITER, ENV_PREFIX, Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


def explain(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: the key, what is wrong, where it was set if not in the file."""
    path = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(_without_secrets(path)) or "(whole file)"
    variable = ENV_PREFIX + ENV_DELIMITER.join(path).upper()
    origin = f" (from environment variable {variable})" if path and variable in os.environ else ""
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            allowed = ", ".join(sorted(_fields_at(path[:-1])))
            message = f"unknown key; allowed here: {allowed}"
        case "missing":
            message = "is required"
        case "string_pattern_mismatch" if error["loc"][-1] == "[key]":
            message = (
                "a model's key has lower-case letters, digits and _, and begins with a letter (48 at most); "
                "set `name` to what clients say"
            )
    return mask_urls(f"{key}: {message}{origin}")


def _without_secrets(path: list[str]) -> Iterable[str]:
    """The parts of a key's path; where a variable of an engine should be named, only what looks like a name."""
    for before, part in zip([None, *path], path, strict=False):
        yield "…" if before == "env" and not _VARIABLE.fullmatch(part) else part


def _fields_at(path: list[str]) -> Iterable[str]:
    """The names of the keys that the table at `path` knows."""
    section: Any = Settings
    parts = iter(path)
    for part in parts:
        if section is Settings and part == "models":
            section = ModelSettings
            next(parts, None)
            continue
        if part.isdecimal():
            continue  # of a list, whose elements' class is there already
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
