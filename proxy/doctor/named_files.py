"""Check of the files and folders that a model's engine names, some of which are only read at its checkpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from proxy.doctor.report import Check

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from proxy.config.model import ModelSettings
    from proxy.doctor.needs import Situation

NAME: Final = "files of engines"


async def named_files(it: Situation) -> list[Check]:
    """Whether they are there, and programs can be run."""
    if not it.needs.models:
        return [Check(NAME, "skip", "no model names any")]
    problems = [problem for key, model in it.needs.models.items() for problem in _problems(it, key, model)]
    if not problems:
        return [Check(NAME, "ok", "all that models name are there")]
    fix = "\n".join(f"make it, or correct {setting}" for setting in dict.fromkeys(setting for setting, _ in problems))
    needed = any(not setting.endswith(".weights") for setting, _ in problems)
    found = "; ".join(f"{setting}: {what}" for setting, what in problems)
    return [Check(NAME, "fail" if needed else "warn", found, fix)]


async def programs(it: Situation) -> list[Check]:
    """Whether engines that are local processes have their program and their working directory."""
    name = "programs of engines"
    rows = []
    for key, model in it.needs.models.items():
        engine = model.process
        if engine is None:
            continue
        program = engine.command[0]
        known = "{" not in program and (program.startswith("/") or "/" not in program)
        if known and it.host.which(program) is None:
            what = f"models.{key}.process.command: there is no program {program}"
            rows.append(Check(name, "fail", what, "install it, or write its whole path"))
        if engine.cwd is not None and not it.host.path(engine.cwd.absolute()).is_dir():
            what = f"models.{key}.process.cwd: there is no folder {engine.cwd}"
            rows.append(Check(name, "fail", what, "make it, or correct it"))
    return rows


def _problems(it: Situation, key: str, model: ModelSettings) -> Iterator[tuple[str, str]]:
    for setting, path, runs in _named(f"models.{key}", model):
        here = it.host.path(path)
        if not here.exists():
            yield setting, f"there is no {path}"
        elif runs and not (here.is_file() and os.access(here, os.X_OK)):
            yield setting, f"{path} is no program"


def _named(where: str, model: ModelSettings) -> Iterator[tuple[str, Path | str, bool]]:
    """Setting, path, and whether it is run."""
    if model.api_key is None and model.api_key_file is not None:
        yield f"{where}.api_key_file", model.api_key_file, False
    for path in model.weights:
        yield f"{where}.weights", path, False
    for name in ("reseed", "health", "sleep", "wake_up", "asleep", "canary_request", "tokens"):
        words = getattr(model, name).command
        if words and words[0].startswith("/"):
            yield f"{where}.{name}.command", words[0], True
    engine = model.podman
    if engine is None:
        return
    for volume in engine.volumes:
        if volume.source.startswith("/"):
            yield f"{where}.podman.volumes", volume.source, False
    if engine.seccomp is not None:
        yield f"{where}.podman.seccomp", engine.seccomp, False
    for point, script in engine.criu.action_scripts.items():
        yield f"{where}.podman.criu.action_scripts.{point}", script, True
