"""Any other engine: it has what its model's configuration names, and nothing else."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

from proxy.engine.client import DIGITS, EngineClient
from proxy.errors import EngineError
from proxy.host import command

if TYPE_CHECKING:
    from proxy.config.engine import ReseedSettings
    from proxy.config.model import ModelSettings
    from proxy.engine.client import Place

_UNKNOWN: Final = "nothing is known of how to reseed this engine: set engine or reseed"


class Generic:
    """An engine of which the configuration says everything."""

    name: Final = "generic"
    spec: Final = ()
    inside: Final = None

    def connect(
        self,
        base_url: str,
        served_name: str,
        model: ModelSettings,
        *,
        api_key: str | None,
        response_timeout_s: float | None = None,
    ) -> GenericClient:
        """A client of one engine."""
        return GenericClient(base_url, served_name, model, response_timeout_s=response_timeout_s, api_key=api_key)

    def reseed_gap(self, model: ModelSettings) -> str | None:
        """None where `reseed` names a way."""
        return reseed_gap(model.reseed)

    def reseeds(self, model: ModelSettings) -> bool:
        """Whether `reseed` names a way."""
        return model.reseed.present


class GenericClient(EngineClient):
    """A client of one."""

    def __init__(self, base_url: str, served_name: str, model: ModelSettings, **options: Any) -> None:
        super().__init__(base_url, served_name, **options)
        self._model = model

    async def reseed_gap(self) -> str | None:
        """As far as the configuration says it."""
        return reseed_gap(self._model.reseed)

    async def reseed(self, place: Place) -> str | None:
        """Begin its generators anew, in the way that `reseed` names."""
        return await reseed(self, self._model.reseed, place)


def reseed_gap(way: ReseedSettings) -> str | None:
    """Why engines repeat random numbers after a restore."""
    return None if way.present else _UNKNOWN


async def reseed(client: EngineClient, way: ReseedSettings, place: Place) -> str | None:
    """Begin the generators of an engine anew; why that could not be had, where that is so. Raises EngineError."""
    digits = secrets.token_hex(DIGITS)
    if way.path is not None:
        async with client.limit("reseed", way.timeout):
            status, _ = await client.ask_json("reseed", "POST", way.path, digits.encode())
        if status == 404:
            return f"it has no {way.path} (reseed.path)"
        if status not in (200, 204):
            raise EngineError("reseed", f"POST {way.path} answered {status}")
    if way.command is not None:
        async with client.limit("reseed", way.timeout):
            await run("reseed", way.command, place, digits.encode())
    return reseed_gap(way)


async def run(stage: str, words: list[str], place: Place, given: bytes = b"") -> str:
    """What a command of the user's prints, run for an engine. Raises EngineError where it fails."""
    values = {"host": place.host, "port": str(place.port), "model": place.model, "instance": place.instance}
    try:
        status, output = await command.run(*[_filled(word, values) for word in words], given=given)
    except OSError as error:
        raise EngineError(stage, f"{stage}.command: {words[0]}: {error.strerror or error}") from error
    if status:
        said = output.strip().splitlines() or ["no word on why"]
        raise EngineError(stage, f"{stage}.command ended with status {status}: {said[-1][:300]}")
    return output


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word
