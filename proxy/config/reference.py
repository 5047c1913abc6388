"""The commented reference of all keys, written from the settings themselves, so that it cannot be incomplete."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from pydantic import BaseModel

from proxy.config.engine import PodmanEngineSettings, ProcessEngineSettings, VolumeSettings
from proxy.config.extra_routes import ExtraRouteSettings
from proxy.config.model import ModelSettings
from proxy.config.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HEAD = """\
Every key of warmpool's configuration, with its default. Written by `warmpool config reference`.

Only a model with an engine is needed; everything else may be left out. Keys that begin with # have no default.
Durations have a unit: "500ms", "90s", "1m30s", "2h", "1d"; "never" where a key may be without one. Sizes too: "16GiB".
In texts {env:NAME} is replaced by the environment variable NAME. `warmpool config schema` is for editors.
Each key can be set by environment as well, which wins over the file: WARMPOOL_SERVER__PORT=8081,
WARMPOOL_MODELS__DEMO__IDLE__SLEEPING=10s; tables and lists as JSON."""

_PROCESS = ModelSettings(
    process=ProcessEngineSettings(
        command=[
            "{python}", "-m", "loadtest.engine",
            "--host", "{host}", "--port", "{port}", "--model", "{model}", "--sleep-mode",
        ]
    ),
    extra_routes=[ExtraRouteSettings(path="/v1/audio/speech")],
)  # fmt: skip
_PODMAN = PodmanEngineSettings(
    image="docker.io/vllm/vllm-openai:latest",
    command=["--model", "org/Model-7B", "--host", "{host}", "--port", "{port}", "--enable-sleep-mode"],
    volumes=[VolumeSettings(source="/srv/models", target=Path("/root/.cache/huggingface"))],
)


def reference() -> str:
    """A TOML file with every key, its meaning and its default; it loads."""
    settings = Settings.model_construct(models={"demo": _PROCESS})
    head = (type(_PODMAN).__doc__ or "").rstrip(".")
    lines = [*_comment(_HEAD), *_section("", settings), ""]
    lines += _comment(f"{head}; all other keys of a model are as above.")
    lines += ["[models.contained.podman]", *_section("models.contained.podman", _PODMAN)]
    return "\n".join(lines).rstrip() + "\n"


def _section(path: str, section: BaseModel) -> Iterator[str]:
    plain = section.model_dump(mode="json")
    tables: list[tuple[str, BaseModel]] = []
    lists: list[tuple[str, str, BaseModel]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        here = f"{path}.{name}" if path else name
        if _is_table(field.annotation) and value is None:
            continue
        if isinstance(value, BaseModel):
            tables.append((here, value))
        elif isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
            tables += [(f"{here}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list) and any(isinstance(v, BaseModel) for v in value):
            lists += [(here, field.description or "", item) for item in value]
        else:
            yield from _comment(field.description or "")
            # What depends on the host is no value to write down.
            value = None if field.default_factory is not None else plain.get(name, {})
            yield from _key(name, value, field.examples or [])
    for here, table in tables:
        body = [*_section(here, table)]
        if body[0]:  # else it has tables only
            yield ""
            yield from _comment((type(table).__doc__ or "").split("\n\n")[0])
            yield f"[{here}]"
        yield from body

    for here, description, item in lists:
        yield ""
        yield from _comment(description)
        yield f"[[{here}]]"
        yield from _section(here, item)


def _is_table(annotation: Any) -> bool:
    return any(isinstance(c, type) and issubclass(c, BaseModel) for c in getattr(annotation, "__args__", ()))


def _key(name: str, value: Any, examples: Sequence[Any]) -> Iterator[str]:
    if value is None:
        yield f"# {name} = {json.dumps(examples[0])}"  # TOML too, on one line
    elif value == {}:
        yield f"{name} = {{}}"
    else:
        yield from tomli_w.dumps({name: value}).splitlines()


def _comment(text: str) -> Iterator[str]:
    for paragraph in text.split("\n"):
        for line in textwrap.wrap(paragraph, 116) or [""]:
            yield f"# {line}".rstrip()
