"""What warmpool knows of a kind of engine before one of it runs. Of one that runs, its `EngineClient` tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Unpack

    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient


class ClientOptions(TypedDict):
    """What a client of an engine is told beside where that is and what it calls its model."""

    instance: str
    api_key: str | None
    response_timeout_s: NotRequired[float | None]


class Inside(Protocol):
    """Code of warmpool's that is run inside engines of a kind."""

    def digest(self) -> str:
        """Of that code, which is in an engine's memory from its start on, and so in its checkpoint."""

    def folder(self, state: Path, /) -> Path:
        """A folder below `state` that holds the code; it stays as it is when warmpool is upgraded."""

    def arguments(self, model: ModelSettings, /) -> tuple[str, ...]:
        """What is added to an engine's command."""

    def environment(self, package: str, copies: str | None, given: Mapping[str, str], /) -> dict[str, str]:
        """The variables for an engine that finds the code in one folder, and keeps copies of weights in another."""


class EngineKind(Protocol):
    """One kind of engine."""

    @property
    def name(self) -> str:
        """What the configuration calls it."""

    @property
    def spec(self) -> tuple[str, ...]:
        """What it adds to the digest of all that shapes an engine: an image of another digest is of another engine."""

    @property
    def inside(self) -> Inside | None:
        """What is run inside its engines."""

    def connect(
        self, base_url: str, served_name: str, model: ModelSettings, **options: Unpack[ClientOptions]
    ) -> EngineClient:
        """A client of one engine, that of an instance."""

    def reseed_gap(self, model: ModelSettings) -> str | None:
        """Why engines repeat random numbers after a restore, as far as the configuration says it."""

    def reseeds(self, model: ModelSettings) -> bool:
        """Whether there is something that a restored engine can be asked for."""
