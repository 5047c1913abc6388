"""Ports for engines on loopback."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from proxy.errors import RuntimeFailure

if TYPE_CHECKING:
    from collections.abc import Container

LOOPBACK = "127.0.0.1"


def free(first: int, last: int, taken: Container[int]) -> int:
    """A port of the range that no instance has and nobody listens on. Raises RuntimeFailure when there is none."""
    for port in range(first, last + 1):
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                return port
    raise RuntimeFailure("start", f"no free port in {first}-{last}; widen the runtime's `ports`")
