"""What differs between two configurations, and what of it can be had without a restart: a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import BaseModel

    from proxy.config.settings import Settings

LIVE: Final = frozenset(
    {"server.drain_timeout", "server.heartbeat", "server.default_model", "server.watch", "pool.max_awake",
     "pool.max_queue", "pool.engine_metrics", "pool.policy", "pool.quantum", "pool.switch_after", "pool.lru_ttl",
    "pool.priority_head_start", "pool.archive_copies", "pool.drill", "pool.drill_times"}
)  # fmt: skip
"""The keys beside those of models that take effect at once; the others are read at the start only."""

_ENGINE: Final = frozenset(
    {"name", "engine", "api_key", "api_key_file", "process", "podman", "weights_copy", "response_timeout"}
)
"""The keys of a model that shape its engines: other values need other engines."""


@dataclass(frozen=True, slots=True)
class Changes:
    """The keys of models that come, go, get other engines or are treated otherwise; other keys that wait."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    """Their engines are replaced."""
    adjusted: tuple[str, ...] = ()
    """Their engines stay."""
    pending: tuple[str, ...] = ()
    """Keys that take effect with the next start."""
    live: tuple[str, ...] = ()
    """Keys beside those of models that take effect now."""

    def __str__(self) -> str:
        parts = (
            ("added", self.added),
            ("removed", self.removed),
            ("new engines for", self.replaced),
            ("adjusted", self.adjusted),
            ("changed", self.live),
            ("after a restart only", self.pending),
        )
        return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names) or "nothing changed"


def compare(old: Settings, new: Settings) -> tuple[Changes, Settings]:
    """What differs, and the settings that can be in force without a restart.

    Raises ConfigError where part of a model needs a restart.
    """
    programs = {m.podman.criu.program for m in old.models.values() if m.podman is not None}
    unknown = [
        f"models.{key}.podman.criu.program: a program that no model had at the start needs a restart"
        for key, m in new.models.items()
        if m.podman is not None and m.podman.criu.program not in programs | {None}
    ]
    if unknown:
        raise ConfigError("reload", unknown)
    both = [key for key in new.models if key in old.models and old.models[key] != new.models[key]]
    replaced = [key for key in both if _differing(old.models[key], new.models[key]) & _ENGINE]
    other = [path for table in _tables(old) for path in _paths(table, getattr(old, table), getattr(new, table))]
    changes = Changes(
        added=tuple(key for key in new.models if key not in old.models),
        removed=tuple(key for key in old.models if key not in new.models),
        replaced=tuple(replaced),
        adjusted=tuple(key for key in both if key not in replaced),
        pending=tuple(path for path in other if path not in LIVE),
        live=tuple(path for path in other if path in LIVE),
    )
    return changes, _in_force(old, new, changes.live)


def _tables(settings: Settings) -> Iterator[str]:
    return (name for name in type(settings).model_fields if name != "models")


def _differing(old: BaseModel, new: BaseModel) -> set[str]:
    return {name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)}


def _paths(prefix: str, old: Any, new: Any) -> Iterator[str]:
    """The keys, as ``server.port``, in which two tables differ."""
    if old == new:
        return
    if not hasattr(type(old), "model_fields") or type(old) is not type(new):
        yield prefix
        return
    for name in type(old).model_fields:
        yield from _paths(f"{prefix}.{name}", getattr(old, name), getattr(new, name))


def _in_force(old: Settings, new: Settings, live: tuple[str, ...]) -> Settings:
    """The old settings with the new models and what else takes effect now."""
    update: dict[str, Any] = {"models": new.models}
    tables: dict[str, dict[str, Any]] = {}
    for path in live:
        table, _, name = path.partition(".")
        tables.setdefault(table, {})[name] = getattr(getattr(new, table), name)
    for table, values in tables.items():
        update[table] = _copied(getattr(old, table), values)
    # Not a copy, which would bring along what the old ones have computed from their models.
    return type(old).model_construct(**{name: getattr(old, name) for name in type(old).model_fields} | update)


def _copied(table: BaseModel, values: Mapping[str, Any]) -> BaseModel:
    return table.model_copy(update=dict(values))
