"""Which weights the engine of a model reads, and where on this host it reads them from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from proxy.errors import WarmpoolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.config.model import ModelSettings

REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONTAINER_HOME: Final = "/root"


class UnknownWeightsError(WarmpoolError):
    """The configuration does not say which weights, or where they belong; the text says what to add."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A repository of Hugging Face and the folder for it: its files as they are, or a cache in the hub's own layout."""

    repo: str
    revision: str | None
    folder: Path
    is_cache: bool
    token: str | None


def weights_of(
    key: str, name: str, model: ModelSettings, *, repo: str | None = None, revision: str | None = None
) -> Weights:
    """What the engine of models.`key`, which clients call `name`, reads. Raises UnknownWeightsError.

    It is taken from the engine's command, as vLLM reads it: `serve MODEL`, `--model MODEL`, `--revision`. A path means
    the folder at that place, and the repository is then `repo`, or `name` where that looks like one.
    """
    command = [argument.replace("{model}", name) for argument in _command(model)]
    said = _option(command, "--model") or _served(command, starts=model.podman is not None)
    if said is None:
        raise UnknownWeightsError(
            f"models.{key}: the command names no model (`vllm serve MODEL` or `--model MODEL`), so there is nothing to "
            "fetch; --only image fetches the container image"
        )
    environment = _environment(model)
    is_path = said.startswith(("/", "./", "../", "~"))
    if not is_path and not REPOSITORY.fullmatch(said):
        raise UnknownWeightsError(f"models.{key}: {said!r} in its command is neither a path nor OWNER/NAME")
    wanted = repo or (name if is_path else said)
    if not REPOSITORY.fullmatch(wanted):
        raise UnknownWeightsError(f"models.{key}: {said} is a folder; say what belongs there: --repo OWNER/NAME")
    inside = said if is_path else _cache(model, environment)
    return Weights(
        repo=wanted,
        revision=revision or _option(command, "--revision"),
        folder=_on_host(key, model, inside),
        is_cache=not is_path,
        token=environment.get("HF_TOKEN") or os.environ.get("HF_TOKEN"),
    )


def _command(model: ModelSettings) -> Sequence[str]:
    if model.podman is not None:
        return [*(model.podman.entrypoint or ()), *model.podman.command]
    return model.process.command if model.process is not None else []


def _environment(model: ModelSettings) -> Mapping[str, str]:
    table = model.podman or model.process
    return {name: value.get_secret_value() for name, value in table.env.items()} if table is not None else {}


def _option(command: Sequence[str], name: str) -> str | None:
    for position, argument in enumerate(command):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
        if argument == name and position + 1 < len(command):
            return command[position + 1]
    return None


def _served(command: Sequence[str], *, starts: bool) -> str | None:
    """The argument without a name: behind `serve`, or the first one for an image whose entry point that is."""
    behind = command if starts else []
    if "serve" in command:
        behind = command[command.index("serve") + 1 :]
    return behind[0] if behind and not behind[0].startswith("-") else None


def _cache(model: ModelSettings, environment: Mapping[str, str]) -> str:
    """The folder where the engine's huggingface_hub looks (its constants.py)."""
    seen = environment if model.podman is not None else {**os.environ, **environment}
    home = _CONTAINER_HOME if model.podman is not None else str(Path.home())
    base = seen.get("HF_HOME") or str(PurePosixPath(seen.get("XDG_CACHE_HOME") or f"{home}/.cache") / "huggingface")
    return seen.get("HF_HUB_CACHE") or str(PurePosixPath(base) / "hub")


def _on_host(key: str, model: ModelSettings, inside: str) -> Path:
    """Where the engine's folder `inside` is here."""
    if model.podman is None:
        path = Path(inside).expanduser()
        return path if path.is_absolute() or model.process is None else (model.process.cwd or Path.cwd()) / path
    here = PurePosixPath(inside)
    volumes = [v for v in model.podman.volumes if here.is_relative_to(v.target)]
    if not volumes:
        raise UnknownWeightsError(
            f"models.{key}: no volume holds {inside} of the container, so what is fetched would be lost with it; add "
            f'one to models.{key}.podman.volumes: {{ source = "/srv/models", target = "{here.parent}" }}'
        )
    volume = max(volumes, key=lambda v: len(str(v.target)))
    if not volume.source.startswith("/"):
        raise UnknownWeightsError(
            f"models.{key}: {inside} is in {volume.source}, a volume of podman's; mount a folder of this host instead"
        )
    return Path(volume.source) / here.relative_to(str(volume.target))
