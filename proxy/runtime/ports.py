"""Ports for engines on loopback."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from proxy.errors import RuntimeFailure

if TYPE_CHECKING:
    from collections.abc import Container

LOOPBACK = "127.0.0.1"


class Ports:
    """The ports of a range that the engines of one runtime have.

    Between the choice of a port and the engine that listens on it lie seconds, in which another warmpool may choose
    too. So each is held by an abstract unix socket of its name: those belong to the same network namespace as the
    port, there is one of each name, and the kernel lets go of it when this process ends, however that was.
    """

    def __init__(self, first: int, last: int) -> None:
        self._range = range(first, last + 1)
        self._held: dict[int, socket.socket] = {}

    def take(self, taken: Container[int] = ()) -> int:
        """Hold a port that no engine has and nobody listens on. Raises RuntimeFailure when there is none."""
        for port in self._range:
            if port in taken or port in self._held or not self.hold(port):
                continue
            if not listened_on(port):
                return port
            self.release(port)
        raise RuntimeFailure(
            "start", f"no free port in {self._range.start}-{self._range.stop - 1}; widen the runtime's `ports`"
        )

    def hold(self, port: int) -> bool:
        """Hold a port that an engine of ours has already, as in its image; False when another warmpool holds it."""
        if port not in self._held:
            mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                mark.bind(f"\0warmpool/port/{port}")
            except OSError:
                mark.close()
                return False
            self._held[port] = mark
        return True

    def taken_by_others(self, port: int) -> bool:
        """Whether the port of an engine of ours, which is not running, has gone to others meanwhile; held if not."""
        return not self.hold(port) or listened_on(port)

    def release(self, port: int) -> None:
        """Others may have it now."""
        if (mark := self._held.pop(port, None)) is not None:
            mark.close()

    def close(self) -> None:
        """Release all."""
        for port in [*self._held]:
            self.release(port)


def listened_on(port: int) -> bool:
    """Whether somebody has the port on loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return False
    return True
