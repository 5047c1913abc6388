"""Load-test engines that are forked from one process which has imported what they need.

Nine tenths of what an engine's start costs is Python's own start and the imports. So where a test is not about starting
engines, one process of this session forks them: twice, so that the engine becomes a child of the test's process, with a
session, a log and an environment of its own, as if the runtime had started it. It ends with the test's process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.host import processes
from proxy.runtime import criu
from proxy.runtime.process import launch
from proxy.runtime.process.runtime import ProcessRuntime
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from proxy.config.model import ModelSettings
    from proxy.runtime.base import Handle

_MODULE: Final = "loadtest.engine"
_MESSAGE_BYTES: Final = 1 << 18
_ROOM: Final = "_" * (32 << 10)
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class Engines:
    """The process that engines are forked from, as the test's process sees it; started when it is first needed."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, words: Sequence[str], folder: str, environment: dict[str, str], log: int) -> int:
        """The pid of an engine."""
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            processes.become_subreaper()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_engines", str(theirs.fileno())],
                cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True, env={**os.environ, "ROOM": _ROOM},
            )  # fmt: skip
            theirs.close()
        message = orjson.dumps({"words": words, "folder": folder, "environment": environment})
        socket.send_fds(self._socket, [message], [log])
        return int(self._socket.recv(64))

    def close(self) -> None:
        """No more engines."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()
            self._socket = self._process = None

    @contextlib.contextmanager
    def spawning(self) -> Iterator[None]:
        """Have `os.posix_spawn` come here for load-test engines."""
        spawn = os.posix_spawn

        def fork_or_spawn(path: Any, argv: Sequence[Any], env: Any, **options: Any) -> int:
            # As the runtime starts an engine: python -I -S launch.py FOLDER COMMAND...
            if argv[3] == launch.__file__ and argv[5:8] == [sys.executable, "-m", _MODULE]:
                (log,) = {action[1] for action in options["file_actions"] if action[0] == os.POSIX_SPAWN_DUP2}
                return self.start(argv[8:], argv[4], dict(env), log)
            return spawn(path, argv, env, **options)

        os.posix_spawn = fork_or_spawn
        try:
            yield
        finally:
            os.posix_spawn = spawn


ENGINES: Final = Engines()


class _NoReaper:
    """Forked engines end with the test's process by themselves."""

    def open(self, mark: str) -> None:
        pass

    def note(self, *, gone: int | None, runs: int | None) -> None:
        pass

    async def close(self) -> None:
        pass


_WHY_NOT: Final = criu.why_not
_known: dict[str, tuple[str, str | None]] = {}


async def _why_not(program: str) -> tuple[str, str | None]:
    """As `criu.why_not`, asked once a session."""
    if program not in _known:
        _known[program] = await _WHY_NOT(program)
    return _known[program]


class ForkingRuntime(ProcessRuntime):
    """The runtime `process`, with load-test engines that are forked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._reaper: Any = _NoReaper()

    async def open(self) -> None:
        """As ever, but that CRIU is looked at once a session."""
        criu.why_not = _why_not
        try:
            await super().open()
        finally:
            criu.why_not = _WHY_NOT

    async def start(self, instance_id: str, key: str, model: ModelSettings, *, beside: bool = False) -> Handle:
        """As ever, but for the process."""
        with ENGINES.spawning():
            return await super().start(instance_id, key, model, beside=beside)


# --- the process that is forked ---


def _show_environment(environment: dict[str, str]) -> None:
    """Write it to where the kernel shows it from (proc(5), environ): where that of this program was when it began."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[47]), int(fields[48])  # env_start and env_end, the 50th and the 51st
    shown = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    if len(shown) <= end - begin:
        ctypes.memmove(begin, shown.ljust(end - begin, b"\0"), end - begin)


def _become_engine(test: int, words: list[str], folder: str, environment: dict[str, str], log: int) -> None:
    os.setsid()
    while os.getppid() != test:
        time.sleep(0.001)  # the process between is about to end
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 1 << 16)
    os.chdir(folder)
    launch.forbid_io_uring()
    os.environ.clear()
    os.environ.update(environment)
    _show_environment(environment)
    random.seed()
    from loadtest import engine

    sys.argv = [engine.__file__, *words]
    engine.main()


def _fork(connection: socket.socket, request: dict[str, Any], log: int) -> None:
    """Fork an engine whose parent ends at once, and say its pid when it has another one."""
    reading, writing = os.pipe()
    test = os.getppid()
    between = os.fork()
    if between == 0:
        engine = os.fork()
        if engine == 0:
            status = 1
            try:
                _become_engine(test, **request, log=log)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:  # noqa: BLE001 - it goes to the engine's log
                traceback.print_exc()
            finally:
                os._exit(status)
        os.write(writing, b"%d" % engine)
        os._exit(0)
    os.waitpid(between, 0)
    connection.send(os.read(reading, 64))
    for descriptor in (reading, writing, log):
        os.close(descriptor)


def main() -> None:
    """Fork engines until the test's process is gone."""
    from loadtest import engine as _imported  # noqa: F401 - that is the point

    connection = socket.socket(fileno=int(sys.argv[1]))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
        if not message:
            return
        _fork(connection, orjson.loads(message), descriptors[0])


if __name__ == "__main__":
    main()
