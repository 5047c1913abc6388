"""Commands of the host, run to their end."""

from __future__ import annotations

import asyncio
import contextlib


async def run(program: str, *arguments: str, given: bytes | None = None) -> tuple[int, str]:
    """Exit status, and what it printed, errors too; `given` is its input. Cancelling kills it.

    Raises OSError when it cannot be run.
    """
    process = await asyncio.create_subprocess_exec(
        program, *arguments,
        stdin=asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
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
