"""The types that keys have, and what every section of the settings is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from proxy.config.values import (
    checked_times_of_day,
    format_duration,
    format_optional_duration,
    format_size,
    parse_duration,
    parse_memory,
    parse_optional_duration,
    parse_size,
)


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} is not an absolute path")
    return path


_DURATION_PATTERN = r"([0-9]+(\.[0-9]+)? ?(ms|s|m|h|d) *)+"
_SIZE_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? *([kKmMgGtTpPeE]i?)?[bB]?$"},
            {"type": "integer", "minimum": 0},
        ]
    }
)

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration),
    WithJsonSchema({"type": "string", "pattern": f"^{_DURATION_PATTERN}$"}),
]
OptionalDuration = Annotated[
    float | None,
    BeforeValidator(parse_optional_duration),
    PlainSerializer(format_optional_duration),
    WithJsonSchema({"type": "string", "pattern": f"^({_DURATION_PATTERN}|never|off)$"}),
]
Size = Annotated[ByteSize, BeforeValidator(parse_size), PlainSerializer(format_size), _SIZE_SCHEMA]
"""Of what may be a few bytes."""
Memory = Annotated[ByteSize, BeforeValidator(parse_memory), PlainSerializer(format_size), _SIZE_SCHEMA]
"""Of what is never a few bytes: a small number without a unit is refused."""
TimesOfDay = Annotated[str, AfterValidator(checked_times_of_day)]
"""From one minute of the day to another one, by the host's clock: "22:00-06:30"."""
Port = Annotated[int, Field(ge=1, le=65535)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
ModelKey = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
ArgumentList = Annotated[list[str], Field(min_length=1)]


class Section(BaseModel):
    """A table of the configuration: no unknown keys, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
