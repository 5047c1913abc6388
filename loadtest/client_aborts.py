"""Clients that go away: in each phase of a request, by a reset or a plain close, with plain and chunked bodies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from enum import Enum
from typing import TYPE_CHECKING, Final

from loadtest.client import message

if TYPE_CHECKING:
    import random

    from loadtest.client import Request, Target

_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: on, for no time; the close is a reset (socket(7))."""
_AT_ONCE_S: Final = 0.05
_LATER_S: Final = 3.0
"""Longer than any wake but a cold start takes here."""
_READ_BYTES: Final = 512


class Phase(Enum):
    """How far a client comes before it leaves."""

    CONNECTED = "connected"
    HEAD = "in the head"
    BODY = "in the body"
    SENT = "just sent"
    WAITING = "while it waits"
    ANSWERED = "in the answer"


async def leave(target: Target, request: Request, phase: Phase, draw: random.Random) -> None:
    """Send a request as far as `phase`, and go."""
    reader, writer = await asyncio.open_connection(*target.address[:2], family=target.family)
    try:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await _go_as_far_as(reader, writer, message(target, request), phase, draw)
    finally:
        if draw.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort() if draw.random() < 0.5 else writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _go_as_far_as(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, phase: Phase, draw: random.Random
) -> None:
    head = data.index(b"\r\n\r\n") + 4
    match phase:
        case Phase.CONNECTED:
            sent = 0
        case Phase.HEAD:
            sent = draw.randrange(1, head)
        case Phase.BODY:
            sent = draw.randrange(head, len(data))
        case _:
            sent = len(data)
    cut = draw.randrange(sent + 1)
    for part in (data[:cut], data[cut:sent]):
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0)
    match phase:
        case Phase.SENT:
            await asyncio.sleep(draw.uniform(0.0, _AT_ONCE_S))
        case Phase.WAITING:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.uniform(0.0, _LATER_S)):
                    await reader.readexactly(1)
        case Phase.ANSWERED:
            await reader.readexactly(draw.randrange(1, _READ_BYTES))
        case _:
            await asyncio.sleep(draw.uniform(0.0, _AT_ONCE_S))
