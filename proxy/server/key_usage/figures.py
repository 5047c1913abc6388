"""What was used, as values: by day (UTC), key and model; and how a day is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    import datetime as dt

NO_KEY: Final = ""
"""Of requests without a key; no key has this name."""
_MOST_ROWS: Final = 200_000
_Count = Annotated[int, Field(ge=0, le=10**18)]
_Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


@dataclass(slots=True)
class Figures:
    """What was used; they add up."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts' tokens, those that the engine had in its prefix cache, where it says so."""
    gpu_seconds: float = 0.0
    idle_gpu_seconds: float = 0.0
    """While no request ran, beside the others; nobody's."""

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, other: Figures) -> None:
        """Count these too."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens
        self.gpu_seconds += other.gpu_seconds
        self.idle_gpu_seconds += other.idle_gpu_seconds


@dataclass
class Day:
    """All of one day."""

    date: dt.date
    rows: dict[tuple[str, str], Figures] = field(default_factory=dict)
    """By the key's name (or `NO_KEY`) and the model's key."""
    complete: bool = False
    """What its file had before is in it."""

    def at(self, key: str, model: str) -> Figures:
        """Those of a key and a model, to add to."""
        found = self.rows.get((key, model))
        if found is None:
            found = self.rows[key, model] = Figures()
        return found

    def of_keys(self) -> dict[str, Figures]:
        """By the key's name, over all models."""
        totals: dict[str, Figures] = {}
        for (key, _), figures in self.rows.items():
            totals.setdefault(key, Figures()).add(figures)
        return totals

    def as_rows(self) -> list[dict[str, Any]]:
        """For people and programs: one for each key and model."""
        return [
            {
                "day": self.date.isoformat(),
                "key": key or None,
                "model": model,
                "requests": f.requests,
                "prompt_tokens": f.prompt_tokens,
                "completion_tokens": f.completion_tokens,
                "cached_tokens": f.cached_tokens,
                "gpu_seconds": round(f.gpu_seconds, 3),
                "idle_gpu_seconds": round(f.idle_gpu_seconds, 3),
            }
            for (key, model), f in self.rows.items()
        ]

    def dump(self) -> bytes:
        """As a file has it."""
        return orjson.dumps({"version": 1, "rows": self.as_rows()})


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    key: Annotated[str, Field(min_length=1, max_length=64)] | None
    model: Annotated[str, Field(min_length=1, max_length=256)]
    requests: _Count
    prompt_tokens: _Count
    completion_tokens: _Count
    cached_tokens: _Count
    gpu_seconds: _Seconds
    idle_gpu_seconds: _Seconds


class _File(BaseModel):
    version: Annotated[int, Field(ge=1, le=1)]
    rows: Annotated[list[_Row], Field(max_length=_MOST_ROWS)]


def parse(date: dt.date, content: bytes) -> Day:
    """What a file has of a day. Raises ValueError, in words."""
    try:
        found = _File.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None
    day = Day(date)
    for row in found.rows:
        figures = row.model_dump(exclude={"key", "model"})
        day.at(row.key or NO_KEY, row.model).add(Figures(**figures))
    return day
