"""The service manager's side of a service: sockets it holds for us, and what it wants to hear.

systemd's protocols: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3). Without a service manager there are no
sockets and nobody listens. The variables are taken out of the environment, so that no engine inherits them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from proxy.errors import HostError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

log = logging.getLogger("warmpool.service")

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START


@dataclass(frozen=True, slots=True)
class Manager:
    """What the service manager gave and wants. `from_environment` makes one."""

    sockets: tuple[socket.socket, ...] = ()
    """Listening sockets that outlive this process: connections wait in them while nobody accepts."""
    address: str | None = None
    """Of its datagram socket for notifications; a name that begins with @ is an abstract one."""
    watchdog_s: float | None = None
    """It wants to hear of us at least this often."""

    def notify(self, **fields: str | int) -> None:
        """Tell it `READY=1` and the like (sd_notify(3)); it may have gone, which is no failure of ours."""
        if self.address is None:
            return
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.connect(address)
                sock.sendall(text.encode())
            except OSError as error:
                log.warning("the service manager cannot be reached: %s", error)

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows."""
        self.notify(STATUS=text.replace("\n", "; "))

    def ready(self, text: str) -> None:
        """We serve (again)."""
        self.notify(READY=1, STATUS=text.replace("\n", "; "))

    def reloading(self) -> None:
        """The configuration is being read; `ready` ends it."""
        self.notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def stopping(self, at_most_s: float) -> None:
        """We end, and that may take this long, whatever time-out the unit has."""
        self.notify(STOPPING=1, EXTEND_TIMEOUT_USEC=int(at_most_s * 1e6), STATUS="finishing running requests")

    async def feed_watchdog(self) -> None:
        """Say that the event loop turns, for ever, at half the interval; return at once where nobody asks."""
        while self.watchdog_s is not None:
            self.notify(WATCHDOG=1)
            await asyncio.sleep(self.watchdog_s / 2)


def from_environment(environ: MutableMapping[str, str] = os.environ) -> Manager:
    """What this process was given; the variables are removed. Raises HostError when a descriptor is not usable."""
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
    given = {name: environ.pop(name, "") for name in names}
    us = str(os.getpid())
    sockets: tuple[socket.socket, ...] = ()
    if given["LISTEN_PID"] == us and given["LISTEN_FDS"].isdigit():
        sockets = tuple(_socket(fd) for fd in range(_FIRST_FD, _FIRST_FD + int(given["LISTEN_FDS"])))
    watched = given["WATCHDOG_PID"] in ("", us) and given["WATCHDOG_USEC"].isdigit()
    return Manager(sockets, given["NOTIFY_SOCKET"] or None, int(given["WATCHDOG_USEC"]) / 1e6 if watched else None)


def _socket(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise HostError(f"descriptor {fd} of the service manager is no socket: {error.strerror}") from error
    if not listens or sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise HostError(f"descriptor {fd} of the service manager is no listening TCP socket; fix the .socket unit")
    sock.setblocking(False)
    return sock
