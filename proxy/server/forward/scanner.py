"""Large bodies are read in a process beside: a second of Python's or orjson's work would let every stream wait.

A thread would not do, as both hold the interpreter's lock; it only moves the bytes. One process, started when it is
needed first and ended when nobody has needed it for a while; one job after the other; those that wait are bounded, and
so is each job's time. A process that takes too long, breaks, or whose client has left is ended, and the next is new.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from typing import Any, Final

import orjson

from proxy.errors import InvalidRequestError, NoCapacityError
from proxy.host import daemon_thread
from proxy.server.forward.scan_process import MESSAGE_BYTES, received_body, sent_body

LARGE: Final = 1 << 20
"""Smaller bodies are read at once: at most some milliseconds."""
_MOST_WAITING: Final = 16
_LIMIT_S: Final = 30.0
_IDLE_S: Final = 60.0
_NICENESS: Final = 3
"""Streams go first, and on a host where all cores are wanted it still gets half of a process's share."""


class Scanner:
    """Carries out jobs of `proxy.server.forward.scan_process`. Belongs to one event loop."""

    def __init__(self, *, limit_s: float = _LIMIT_S, idle_s: float = _IDLE_S) -> None:
        self._limit_s = limit_s
        self._idle_s = idle_s
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def facts(self, job: str, body: bytes, **options: Any) -> dict[str, Any]:
        """What a job finds. Raises InvalidRequestError, or NoCapacityError where too many wait."""
        facts, _ = await self._done({"job": job, **options}, body)
        return facts

    async def changed(self, job: str, body: bytes, **options: Any) -> bytes:
        """The body as a job makes it. Raises as `facts` does."""
        _, new = await self._done({"job": job, **options}, body)
        assert new is not None  # noqa: S101 - jobs of this kind return one
        return new

    def close(self) -> None:
        """End the process."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        process, self._process = self._process, None
        peer, self._socket = self._socket, None
        if peer is not None:
            peer.close()
        if process is not None:
            process.kill()
            # It may take its time to give up its memory.
            threading.Thread(target=process.wait, name="end of a scan", daemon=True).start()

    async def _done(self, job: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes | None]:
        if self._waiting >= _MOST_WAITING:
            raise NoCapacityError("Too many large bodies are being read; try again later.", retry_after_s=1.0)
        self._waiting += 1
        try:
            async with self._turn:
                facts, new = await self._carried_out(job, body)
        finally:
            self._waiting -= 1
        if "refused" in facts:
            raise InvalidRequestError(facts["refused"], param=facts["param"])
        return facts, new

    async def _carried_out(self, job: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes | None]:
        peer, ended = self._started(), False
        try:
            result = await daemon_thread.run(partial(_exchange, peer, job, body), self._limit_s, "scan a body")
            ended = True
        except TimeoutError:
            raise InvalidRequestError(f"The body cannot be read within {self._limit_s:g} s.") from None
        except (OSError, EOFError):
            raise NoCapacityError("The body could not be read; try again later.", retry_after_s=1.0) from None
        finally:
            if not ended:  # something of it is under way still
                self.close()
        self._timer = asyncio.get_running_loop().call_later(self._idle_s, self.close)
        return result

    def _started(self) -> socket.socket:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is None or self._process is None or self._process.poll() is not None:
            self.close()
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "proxy.server.forward.scan_process"],
                    # No session of its own: where the kernel shares out by sessions, a priority counts within one.
                    stdin=theirs.fileno(), stdout=subprocess.DEVNULL, process_group=0,
                )  # fmt: skip
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)
        return self._socket


def _exchange(peer: socket.socket, job: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes | None]:
    """In a thread. Raises OSError, or EOFError where the process has ended."""
    file = sent_body(body)
    try:
        socket.send_fds(peer, [orjson.dumps(job)], [file])
    finally:
        os.close(file)
    message, files, _, _ = socket.recv_fds(peer, MESSAGE_BYTES, 1)
    if not message:
        raise EOFError
    return orjson.loads(message), received_body(files[0]) if files else None
