"""An engine of which the configuration does not say what it is, and that does not look like vLLM.

It is asked for vLLM's endpoints, since what runs behind a script of the user's may be vLLM; nothing is added to its
command. How it is reseeded the configuration says, as of any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from proxy.engine.kinds import generic
from proxy.engine.kinds.vllm import VllmClient

if TYPE_CHECKING:
    from proxy.config.model import ModelSettings


class Unstated:
    """Reseeded as the configuration says, asked like vLLM."""

    name: Final = "unstated"
    spec: Final = ()
    inside: Final = None

    def connect(
        self,
        base_url: str,
        served_name: str,
        model: ModelSettings,
        *,
        instance: str,
        api_key: str | None,
        response_timeout_s: float | None = None,
    ) -> UnstatedClient:
        """A client of one engine."""
        return UnstatedClient(
            base_url, served_name, model, instance=instance, response_timeout_s=response_timeout_s, api_key=api_key
        )

    def reseed_gap(self, model: ModelSettings) -> str | None:
        """None where `reseed` names a way."""
        return generic.reseed_gap(model.reseed)

    def reseeds(self, model: ModelSettings) -> bool:
        """Whether `reseed` names something to ask."""
        return model.reseed.asks


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
