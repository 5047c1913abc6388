"""Giving vLLM the extension that keeps a copy of its weights (proxy/inside/warmpool_vllm.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from proxy.inside import warmpool_vllm
from proxy.runtime.files import write_if_other

if TYPE_CHECKING:
    from collections.abc import Mapping

ARGUMENTS: Final = ("--worker-extension-cls", "warmpool_vllm.Weights")
"""What vLLM's command needs."""


def folder(state: Path) -> Path:
    """A folder that holds the extension, and stays where it is when warmpool is upgraded: restored engines mount it."""
    source = Path(warmpool_vllm.__file__)
    target = state / "inside" / source.name
    return write_if_other(target, source.read_bytes(), mode=0o644, folder_mode=0o755).parent


def environment(extension: str, copies: str, given: Mapping[str, str]) -> dict[str, str]:
    """The variables for an engine that finds the extension in one folder and keeps copies in the other."""
    path = given.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{extension}:{path}" if path else extension,
        warmpool_vllm.FOLDER: copies,
    }
