"""What would make a checkpoint fail, looked for before an engine is started for it: the start may take minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.doctor import containers, dumps, examination, memory
from proxy.doctor.named_files import named_files, programs

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from proxy.config.settings import Settings
    from proxy.doctor.examination import Examine
    from proxy.doctor.report import Check
    from proxy.doctor.view import Host

_CHECKS: Final[tuple[Examine, ...]] = (named_files, dumps.configuration, dumps.tools, memory.images)
"""Beside what a runtime finds out when it is opened."""
_NAMED: Final[tuple[Examine, ...]] = (programs, named_files, containers.images)


async def problems(settings: Settings, host: Host, key: str | None = None) -> list[str]:
    """What is in the way, in words, with what to do; for one model, or for all that are ever checkpointed."""
    if key is not None:
        settings = settings.model_copy(update={"models": {key: settings.models[key]}})
    return _said(await examination.examine(settings, host, _CHECKS), {"fail"})


async def missing(settings: Settings, host: Host) -> list[str]:
    """The programs, files, folders and container images that models name and that are not here, with what to do."""
    return _said(await examination.examine(settings, host, _NAMED), {"fail", "warn"})


def _said(rows: Iterable[Check], statuses: Container[str]) -> list[str]:
    return [
        f"{row.name}: {row.found} ({'; '.join(row.fix.splitlines())})" if row.fix else f"{row.name}: {row.found}"
        for row in rows
        if row.status in statuses
    ]
