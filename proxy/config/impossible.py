"""Settings that are each allowed and together can never work: a pure function."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from proxy.config.document import KeyPath
    from proxy.config.model import ModelSettings
    from proxy.config.pool import PoolSettings
    from proxy.config.settings import Settings


def found(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    """Key, and why it cannot work and what to do."""
    yield from _ready_at_once(settings)
    yield from _folders(settings.pool)
    for key, model in settings.models.items():
        for path, text in _of_model(settings, model):
            yield ("models", key, *path), text


def _ready_at_once(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    most = settings.pool.max_awake
    kept = {key: model.min_ready for key, model in settings.models.items() if model.min_ready}
    if most and sum(kept.values()) > most:
        named = ", ".join(f"models.{key} ({count})" for key, count in kept.items())
        yield (
            ("pool", "max_awake"),
            f"{most} may be awake, and min_ready asks for {sum(kept.values())}: {named}; raise one or lower the other",
        )
        return
    stay = {
        key: model.max_instances if model.never_evictable else model.min_ready for key, model in settings.models.items()
    }
    for key in settings.models if most else ():
        others = {other: count for other, count in stay.items() if count and other != key}
        if sum(others.values()) >= most:
            named = ", ".join(f"models.{other} ({count})" for other, count in others.items())
            yield (
                ("pool", "max_awake"),
                (
                    f"models.{key} could never run: {most} may be awake, and so many stay so by min_ready or "
                    f"evictable: {named}; raise it, or keep fewer"
                ),
            )
            return


def _folders(pool: PoolSettings) -> Iterator[tuple[KeyPath, str]]:
    """warmpool deletes what it does not know in the folders of images."""
    named: dict[str, Path] = {"checkpoint_dir": pool.checkpoint_dir, "state_dir": pool.state_dir}
    if pool.archive_dir is not None:
        named["archive_dir"] = pool.archive_dir
    for inner, path in named.items():
        for outer, folder in named.items():
            if outer == "checkpoint_dir" != inner and path.absolute().is_relative_to(folder.absolute()):
                yield (
                    ("pool", inner),
                    f"{path} lies in pool.checkpoint_dir, which is for checkpoints alone: name another",
                )
    if pool.archive_dir is not None and pool.archive_dir.absolute() == pool.state_dir.absolute():
        yield ("pool", "archive_dir"), f"{pool.archive_dir} is pool.state_dir too; name a folder of its own"


def _of_model(settings: Settings, model: ModelSettings) -> Iterator[tuple[KeyPath, str]]:
    if model.idle.archived is not None and settings.pool.archive_dir is None:
        yield ("idle", "archived"), "there is no archive: set pool.archive_dir, or remove this"
    for name in ("start_timeout", "wake_timeout", "checkpoint_timeout", "response_timeout", "stall_after"):
        if getattr(model, name) == 0:
            yield (name,), "must be more than 0s: nothing is done in no time"
    if model.health.interval == 0:
        yield ("health", "interval"), "must be more than 0s: the engine would be asked without a pause"
    if model.fallback is not None:
        other = model.fallback if model.fallback in settings.models else settings.names().get(model.fallback)
        if other is None:
            yield ("fallback",), f"there is no model {model.fallback!r}; name one of: {', '.join(settings.models)}"
        elif settings.models[other] is model:
            yield ("fallback",), "is the model itself: name another one"
    elif model.fallback_wait is not None:
        yield ("fallback_wait",), "needs fallback: name a model that answers instead, or remove this"
    yield from _of_engine(settings, model)


def _of_engine(settings: Settings, model: ModelSettings) -> Iterator[tuple[KeyPath, str]]:
    if model.process is not None or (model.podman is not None and model.podman.network == "host"):
        runtime = settings.runtime.process if model.process is not None else settings.runtime.podman
        first, last = runtime.port_range()
        if model.max_instances > last - first + 1:
            ports = f"runtime.{model.runtime}.ports ({runtime.ports}) has {last - first + 1}"
            yield ("max_instances",), f"{model.max_instances} engines need as many ports, and {ports}; widen it"
    engine = model.podman
    if engine is not None and engine.memory_limit is not None and (model.host_memory or 0) > engine.memory_limit:
        yield ("host_memory",), "is more than podman.memory_limit allows the engine; raise the limit or lower this"
    if model.weights_copy and model.lacks_sleep_mode:
        yield (
            ("weights_copy",),
            "needs the engine's sleep mode: add --enable-sleep-mode to its command, or remove weights_copy",
        )
