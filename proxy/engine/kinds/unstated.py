"""An engine of which the configuration does not say what it is, and that does not look like vLLM.

It is asked for vLLM's endpoints, since what runs behind a script of the user's may be vLLM; nothing is added to its
command. How it is reseeded the configuration says, as of any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxy.engine.kinds import generic
from proxy.engine.kinds.vllm import VllmClient

if TYPE_CHECKING:
    from typing import Unpack

    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient
    from proxy.engine.kinds.base import ClientOptions


class Unstated(generic.Generic):
    """Reseeded as the configuration says, asked like vLLM."""

    name = "unstated"

    def connect(
        self, base_url: str, served_name: str, model: ModelSettings, **options: Unpack[ClientOptions]
    ) -> EngineClient:
        """A client of one engine."""
        return UnstatedClient(base_url, served_name, model, **options)


class UnstatedClient(VllmClient):
    """A client of one."""

    def __init__(self, base_url: str, served_name: str, model: ModelSettings, **options: Any) -> None:
        super().__init__(base_url, served_name, **options)
        self._way = model.reseed

    async def reseed_gap(self) -> str | None:
        """As far as the configuration says it."""
        return generic.reseed_gap(self._way)

    async def reseed(self) -> str | None:
        """Begin its generators anew, in the way that `reseed` names."""
        return await generic.reseed(self, self._way)
