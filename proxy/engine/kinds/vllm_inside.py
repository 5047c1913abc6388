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


class VllmInside:
    """See `proxy.engine.kinds.base.Inside`."""

    def arguments(self, model: ModelSettings) -> tuple[str, ...]:
        """What is added to an engine's command; a worker extension of the user's own stays the only one."""
        return _FRONTEND if model.own_worker_extension else (*_FRONTEND, *_WORKER)

    def digest(self) -> str:
        """Of the code that runs inside vLLM."""
        return _digest()

    def folder(self, state: Path) -> Path:
        """A folder that holds the package; it stays as it is when warmpool is upgraded: restored engines mount it."""
        target = state / "inside" / _digest()[:16]
        for path in _files():
            package = target / _SOURCE.name
            package.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_if_other(package / path.name, path.read_bytes(), mode=0o644, folder_mode=0o755)
        return target

    def environment(self, package: str, copies: str | None, given: Mapping[str, str]) -> dict[str, str]:
        """The variables for an engine that finds the package in one folder, and keeps copies of weights in another."""
        path = given.get("PYTHONPATH")
        return {
            "PYTHONPATH": f"{package}:{path}" if path else package,
            **({weights.FOLDER: copies} if copies is not None else {}),
        }


@cache
def _digest() -> str:
    total = hashlib.sha256()
    for path in _files():
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()


def _files() -> list[Path]:
    return sorted(_SOURCE.glob("*.py"))
