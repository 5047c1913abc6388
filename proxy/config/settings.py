"""The whole configuration: one TOML file, every key overridable by environment, validated before anything starts.

allowed. Durations are text with a unit (``"90s"``, ``"1m30s"``, ``"500ms"``) and become seconds; sizes are text with a
unit (``"16GiB"``) or bytes. Environment names are ``WARMPOOL_`` and the path of the key joined by ``__``
(``WARMPOOL_MODELS__DEMO__IDLE__SLEEPING=10s``); they win over the file.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError
from pydantic_settings import BaseSettings, SettingsConfigDict

from proxy.config.document import OF_ONE_MODEL, with_defaults
from proxy.config.extra_routes import Offered, offered
from proxy.config.fleet import FleetSettings
from proxy.config.model import ModelSettings
from proxy.config.pool import PoolSettings
from proxy.config.runtime import RuntimeSettings
from proxy.config.server import ServerSettings
from proxy.config.tracing import TracingSettings
from proxy.errors import ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

ENV_PREFIX = "WARMPOOL_"
ENV_DELIMITER = "__"
ModelKey = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]


class Settings(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
    )

    server: ServerSettings = ServerSettings()
    pool: PoolSettings = PoolSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    tracing: TracingSettings = TracingSettings()
    fleet: FleetSettings = FleetSettings()
    defaults: dict[str, Any] = Field(
        default={},
        exclude=True,
        description="Keys of models, for all that do not say otherwise: tables are merged key by key, lists replaced.",
    )
    models: dict[ModelKey, ModelSettings] = Field(
        description="The models, by key; none only where fleet.host is set: such a host is a gateway to the others."
    )

    @field_validator("models")
    @classmethod
    def _models_unless_gateway(cls, models: dict[str, ModelSettings], info: ValidationInfo) -> dict[str, ModelSettings]:
        fleet = info.data.get("fleet")
        if not models and (fleet is None or fleet.host is None):
            raise PydanticKnownError("too_short", {"field_type": "Dictionary", "min_length": 1, "actual_length": 0})
        return models

    @model_validator(mode="before")
    @classmethod
    def _models_have_the_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("defaults"), dict):
            if own := [name for name in OF_ONE_MODEL if name in values["defaults"]]:
                raise ValueError(f"defaults: {', '.join(own)} cannot be that of all models; set it in [models.NAME]")
            return with_defaults(values)
        return values

    @model_validator(mode="after")
    def _names_are_unique(self) -> Settings:
        owner: dict[str, str] = {}
        for key, model in self.models.items():
            for name in (model.name or key, *model.aliases, *model.adapters):
                if name in owner:
                    raise ValueError(f"models.{key}: the name {name!r} belongs to models.{owner[name]} already")
                owner[name] = key
        default = self.server.default_model
        if default is not None and default not in owner:
            raise ValueError(f"server.default_model: there is no model {default!r}; there are {', '.join(owner)}")
        return self

    @model_validator(mode="after")
    def _extra_routes_agree(self) -> Settings:
        offered(self.models)
        return self

    @cached_property
    def extra_routes(self) -> Mapping[tuple[str, str], Offered]:
        """(method, path) → the routes that models offer beside warmpool's list, and which models."""
        return offered(self.models)

    @cached_property
    def _keys(self) -> Mapping[str, str]:
        return {
            name: key
            for key, model in self.models.items()
            for name in (self.served_name(key), *model.aliases, *model.adapters)
        }

    def names(self) -> Mapping[str, str]:
        """Every name a client may use → the model's key."""
        return self._keys

    def key_of(self, name: str) -> str:
        """The key of the model that clients call `name`. Raises ModelNotFoundError."""
        try:
            return self._keys[name]
        except KeyError:
            raise ModelNotFoundError(name) from None

    def served_name(self, key: str) -> str:
        """The name that models.`key` is listed under and that its engine knows."""
        return self.models[key].name or key
