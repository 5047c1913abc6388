"""The commented reference of all keys, written from the settings themselves, so that it cannot be incomplete."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import tomli_w
from pydantic import BaseModel

from proxy.config import ModelSettings, ProcessEngineSettings, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HEAD = """\
Every key of warmpool's configuration, with its default. Written by `warmpool config reference`.

Only a model with an engine is needed; everything else may be left out. Keys that begin with # have no default.
Durations have a unit: "500ms", "90s", "1m30s", "2h", "1d"; "never" where a key may be without one. Sizes too: "16GiB".
Each key can be set by environment as well, which wins over the file: WARMPOOL_SERVER__PORT=8081,
WARMPOOL_MODELS__DEMO__IDLE__SLEEPING=10s; tables and lists as JSON."""

_EXAMPLE = ModelSettings(
    process=ProcessEngineSettings(
        command=[
            "{python}", "-m", "loadtest.engine",
            "--host", "{host}", "--port", "{port}", "--model", "{model}", "--sleep-mode",
        ]
    )
)  # fmt: skip


def reference() -> str:
    """A TOML file with every key, its meaning and its default; it loads."""
    settings = Settings.model_construct(models={"demo": _EXAMPLE})
    lines = [*_comment(_HEAD), *_section("", settings)]
    return "\n".join(lines).rstrip() + "\n"


def _section(path: str, section: BaseModel) -> Iterator[str]:
    plain = section.model_dump(mode="json")
    tables: list[tuple[str, BaseModel]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        here = f"{path}.{name}" if path else name
        if isinstance(value, BaseModel):
            tables.append((here, value))
        elif isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
            tables += [(f"{here}.{key}", item) for key, item in value.items()]
        else:
            yield from _comment(field.description or "")
            yield from _key(name, plain[name], field.examples or [])
    for here, table in tables:
        body = [*_section(here, table)]
        if body[0]:  # else it has tables only
            yield ""
            yield from _comment((type(table).__doc__ or "").split("\n\n")[0])
            yield f"[{here}]"
        yield from body


def _key(name: str, value: Any, examples: Sequence[Any]) -> Iterator[str]:
    if value is None:
        yield f"# {tomli_w.dumps({name: examples[0]}).strip()}"
    elif value == {}:
        yield f"{name} = {{}}"
    else:
        yield from tomli_w.dumps({name: value}).splitlines()


def _comment(text: str) -> Iterator[str]:
    for paragraph in text.split("\n"):
        for line in textwrap.wrap(paragraph, 116) or [""]:
            yield f"# {line}".rstrip()
