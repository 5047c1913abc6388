"""The logs of engines have a bound: what is older goes when one has grown past it.

The engine keeps its descriptor, opened with O_APPEND, so the file is cut in place. CRIU does not look at the size of
such a file when it restores (criu/files-reg.c, should_check_size). What is written while it is cut is lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final

from proxy.host import owned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

log = logging.getLogger("warmpool.runtime")

_LOOK_EVERY_S: Final = 5.0


async def keep_small(paths: Callable[[], Iterable[Path]], limit_bytes: int) -> None:
    """Cut those of the logs that are over the limit, now and again, for ever."""
    while True:
        for path in paths():
            try:
                if await asyncio.to_thread(cut, path, limit_bytes):
                    log.info("%s was over %d MiB: its older half is gone", path, limit_bytes >> 20)
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("%s: %s", path, error.strerror)
        await asyncio.sleep(_LOOK_EVERY_S)


def cut(path: Path, limit_bytes: int) -> bool:
    """Keep the last half of the limit, from the beginning of a line, of a log that is over it. Raises OSError.

    In one go, in one thread: what the engine writes between the reading and the cut is lost.
    """
    if path.stat().st_size <= limit_bytes:
        return False
    descriptor = owned.open_file(path, os.O_RDWR)
    with os.fdopen(descriptor, "r+b") as file:
        kept = limit_bytes // 2
        file.seek(-kept, os.SEEK_END)
        content = file.read(kept)
        newline = content.find(b"\n")
        file.seek(0)
        file.truncate()
        file.write(content[newline + 1 :])
    return True
