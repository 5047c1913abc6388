"""What would make a checkpoint fail, looked for before an engine is started for it: the start may take minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.doctor import dumps, examination, memory
from proxy.doctor.named_files import named_files

if TYPE_CHECKING:
    from proxy.config.settings import Settings
    from proxy.doctor.examination import Examine
    from proxy.doctor.view import Host

_CHECKS: Final[tuple[Examine, ...]] = (named_files, dumps.configuration, dumps.tools, memory.images)
"""Beside what a runtime finds out when it is opened."""


async def problems(settings: Settings, host: Host, key: str | None = None) -> list[str]:
    """What is in the way, in words, with what to do; for one model, or for all that are ever checkpointed."""
    if key is not None:
        settings = settings.model_copy(update={"models": {key: settings.models[key]}})
    rows = await examination.examine(settings, host, _CHECKS)
    return [f"{row.name}: {row.found} ({row.fix})" if row.fix else f"{row.name}: {row.found}" for row in rows
            if row.status == "fail"]  # fmt: skip
