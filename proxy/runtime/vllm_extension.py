"""Giving vLLM what runs inside it (proxy/engine/vllm_extension): fresh randomness, and the copy of its weights."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from proxy.engine.vllm_extension import warmpool_vllm
from proxy.engine.vllm_extension.warmpool_vllm import weights
from proxy.host.files import write_if_other

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.config.model import ModelSettings

_WORKER: Final = ("--worker-extension-cls", "warmpool_vllm.Worker")
_FRONTEND: Final = ("--middleware", "warmpool_vllm.Frontend")
_SOURCE: Final = Path(warmpool_vllm.__file__).parent


def arguments(model: ModelSettings) -> tuple[str, ...]:
    """What the command of a vLLM engine needs; a worker extension of the user's own stays the only one."""
    return _FRONTEND if model.own_worker_extension else (*_FRONTEND, *_WORKER)


def extension(model: ModelSettings) -> str | None:
    """The digest of the code that engines of a model are given, and that is in their memory from then on."""
    return digest() if model.is_vllm else None


def upgraded(model: ModelSettings, has: str | None) -> str | None:
    """Whether an engine that was given the code of that digest would be given other code now, in words."""
    return None if has == extension(model) else "it has in it what another version of warmpool runs inside vLLM"


@cache
def digest() -> str:
    """Of the code that runs inside vLLM."""
    total = hashlib.sha256()
    for path in _files():
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()


def folder(state: Path) -> Path:
    """A folder that holds the package; it stays as it is when warmpool is upgraded: restored engines mount it."""
    target = state / "inside" / digest()[:16]
    for path in _files():
        package = target / _SOURCE.name
        package.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_if_other(package / path.name, path.read_bytes(), mode=0o644, folder_mode=0o755)
    return target


def _files() -> list[Path]:
    return sorted(_SOURCE.glob("*.py"))


def environment(package: str, copies: str | None, given: Mapping[str, str]) -> dict[str, str]:
    """The variables for an engine that finds the package in one folder, and keeps copies of weights in another."""
    path = given.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{package}:{path}" if path else package,
        **({weights.FOLDER: copies} if copies is not None else {}),
    }
