"""A service of podman's that warmpool runs itself, on a socket of its own.

It is watched from outside: its process, its socket file, and whether it answers. When one of these is gone, another
service takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
from typing import TYPE_CHECKING, Final

from proxy.host import owned

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("warmpool.podman")

_LOOK_EVERY_S: Final = 1.0
_ASK_EVERY_S: Final = 5.0
_RETRY_S: Final = 0.05
_TO_END_S: Final = 2.0
"""Between SIGTERM and SIGKILL, and how long the end is waited for after that."""


class PodmanService:
    """`podman system service`, from `start` to `close`."""

    def __init__(self, socket: Path, *, silent_s: float, oci_runtime: Path | None = None) -> None:
        """One that answers nothing for `silent_s` is replaced."""
        self._socket = socket
        self._silent_s = silent_s
        self._oci_runtime = oci_runtime
        self._supervisor: asyncio.Task[None] | None = None
        self.process: asyncio.subprocess.Process | None = None
        """The one that runs, or ran last."""

    def start(self) -> None:
        """Keep a service running from now on."""
        self._supervisor = asyncio.create_task(self._supervise(), name="podman service")

    async def close(self) -> None:
        """End it, politely or not; returns within seconds."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait([supervisor], timeout=2 * _TO_END_S)

    async def _supervise(self) -> None:
        """It ends with us, however we end (PR_SET_PDEATHSIG)."""
        tied = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
        options = ("--runtime", str(self._oci_runtime)) if self._oci_runtime is not None else ()
        while True:
            try:
                owned.clear_socket(self._socket, even_if_heard=True)
            except OSError as error:
                log.error("podman's service cannot have its socket %s: %s", self._socket, error.strerror)
                await asyncio.sleep(_LOOK_EVERY_S)
                continue
            process = await asyncio.create_subprocess_exec(
                *tied, "podman", "--log-level", "error", *options,
                "system", "service", "--time", "0", f"unix://{self._socket}",
                stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self.process = process
            try:
                reason = await self._until_useless(process)
            finally:
                await _end(process)
            log.warning("podman's service %s; it is started again", reason)
            await asyncio.sleep(_RETRY_S)

    async def _until_useless(self, process: asyncio.subprocess.Process) -> str:
        """Return, with a word on it, when the service is good for nothing any more."""
        watches = [
            asyncio.create_task(watch) for watch in (_ended(process), self._lost_its_socket(), self._answers_nothing())
        ]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.wait(watches)

    async def _lost_its_socket(self) -> str:
        """The socket file is gone, or another one."""
        mine = None
        while True:
            inode = _inode(self._socket)
            if mine is not None and inode != mine:
                return f"has lost its socket {self._socket}"
            mine = inode
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _answers_nothing(self) -> str:
        loop = asyncio.get_running_loop()
        answered = loop.time()
        while loop.time() - answered < self._silent_s:
            if await answers(self._socket, self._silent_s):
                answered = loop.time()
            await asyncio.sleep(min(_ASK_EVERY_S, self._silent_s / 2))
        return f"has not answered for {self._silent_s:g} s"


async def answers(socket: Path, limit_s: float) -> bool:
    """Whether a service says anything to a ping in time."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(b"GET /_ping HTTP/1.1\r\nHost: podman\r\nConnection: close\r\n\r\n")
                return bool(await reader.read(1))
            finally:
                writer.close()
    return False


async def _ended(process: asyncio.subprocess.Process) -> str:
    return f"ended with status {await process.wait()}"


async def _end(process: asyncio.subprocess.Process) -> None:
    # One that was stopped takes note of SIGTERM only when it goes on.
    for signals in ((signal.SIGTERM, signal.SIGCONT), (signal.SIGKILL,)):
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TO_END_S):
                await process.wait()
                return


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
