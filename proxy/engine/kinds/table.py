"""The kinds of engines there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.engine.kinds.generic import Generic
from proxy.engine.kinds.unstated import Unstated
from proxy.engine.kinds.vllm import Vllm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.config.model import ModelSettings
    from proxy.engine.kinds.base import EngineKind

KINDS: Final[Mapping[str, EngineKind]] = {kind.name: kind for kind in (Vllm(), Generic(), Unstated())}


def of(model: ModelSettings) -> EngineKind:
    """The kind of a model's engines."""
    return KINDS[model.engine_kind]


def extension(model: ModelSettings) -> str | None:
    """The digest of the code that engines of a model are given, and that is in their memory from then on."""
    inside = of(model).inside
    return None if inside is None else inside.digest()


def upgraded(model: ModelSettings, has: str | None) -> str | None:
    """Whether an engine that was given the code of that digest would be given other code now, in words."""
    return None if has == extension(model) else "it has in it what another version of warmpool runs inside vLLM"
