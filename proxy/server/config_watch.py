"""Notices that the file of the configuration is another one, for `server.watch`.

By asking for its facts once a second, not by inotify: editors rename, a symbolic link is moved (as for a mounted
ConfigMap), network file systems say nothing, and all that looks the same here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final

from proxy.host import daemon_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("warmpool")

INTERVAL_S: Final = 1.0
_STAT_S: Final = 10.0

Facts = tuple[int, int, int, int]


async def watch(
    path: Path,
    known: Facts | None,
    wanted: Callable[[], bool],
    changed: Callable[[], None],
    interval_s: float = INTERVAL_S,
) -> None:
    """Call `changed` each time the file is another one and has been so for an interval, until it is cancelled.

    `known`: what it was when it was read. A file that is just being written has time to be whole; while it is away
    nothing happens. `wanted` is asked each time.
    """
    before = known
    away = False
    while True:
        await asyncio.sleep(interval_s)
        if not wanted():
            known = before = await facts(path)
            continue
        now = await facts(path)
        if now is None:
            if not away:
                log.warning("%s is gone: its configuration stays in force", path)
        elif now != known and now == before:
            known = now
            changed()
        away, before = now is None, now


async def facts(path: Path) -> Facts | None:
    """What tells one state of a file from another; None where it is not there, or its file system does not answer."""

    def look() -> Facts:
        found = os.stat(path)  # noqa: PTH116 - follows links, as reading does
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    try:
        return await daemon_thread.run(look, _STAT_S, "watch the configuration")
    except (OSError, TimeoutError):
        return None
