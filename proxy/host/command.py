"""Commands of the host, run to their end."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


async def run(
    program: str, *arguments: str, given: bytes | None = None, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status, and what it printed, errors too; `given` is its input, `environment` instead of ours.

    Cancelling kills it. Raises OSError when it cannot be run.
    """
    process = await asyncio.create_subprocess_exec(
        program, *arguments,
        stdin=asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment,
    )  # fmt: skip
    try:
        output, _ = await process.communicate(given)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    return process.returncode or 0, output.decode("utf-8", "replace")


async def checked(program: str, *arguments: str) -> None:
    """`run`; raises OSError with what it said when it fails."""
    status, output = await run(program, *arguments)
    if status:
        said = output.strip().splitlines() or ["no word on why"]
        raise OSError(f"{program}: {said[0]}")


async def quietly(program: str, *arguments: str) -> None:
    """`run`, whatever comes of it."""
    with contextlib.suppress(OSError):
        await run(program, *arguments)


def version_in(text: str) -> tuple[int, ...]:
    """The first dotted number in what a program says: (1, 1, 5) of ``"runc version 1.1.5+ds1"``; () without one."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
