"""Programs of this project that are forked from a process which has imported what they need.

Nine tenths of what the start of a load-test engine costs, and most of that of `warmpool serve`, are Python's own start
and the imports. So a process of this session forks them: twice, so that the program becomes a child of the test's
process, with a session, a log and an environment of its own, as if that had started it. It ends with the test's
process. Tests of what a start does start programs as users do.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.host import processes
from proxy.runtime import criu
from proxy.runtime.process import launch
from proxy.runtime.process.engine import ProcessEngine
from proxy.runtime.process.runtime import ProcessRuntime
from tests.support import PATIENCE_S, ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MESSAGE_BYTES: Final = 1 << 18
_ROOM: Final = "_" * (32 << 10)
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_LISTEN_FD: Final = 3  # sd_listen_fds(3)


class Forks:
    """Programs with the function `main` of a module; the process that they are forked from starts with the first."""

    def __init__(self, module: str, *needs: str) -> None:
        self.modules = (module, *needs)
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        log: int,
        *,
        folder: str = str(ROOT),
        errors: int | None = None,
        listening: int | None = None,
    ) -> int:
        """The pid of a program with these arguments.

        `log` gets what it prints, `errors`, if given, its standard error; `listening`: a socket that systemd would hand
        to it.
        """
        message = orjson.dumps({"words": [*words], "folder": folder, "environment": {**environment}})
        descriptors = [log, log if errors is None else errors, *([] if listening is None else [listening])]
        with self._lock:
            connection = self._connected()
            socket.send_fds(connection, [message], descriptors)
            return int(connection.recv(64))

    def run(
        self, words: Sequence[str], environment: Mapping[str, str] | None = None, *, timeout_s: float = 2 * PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with its output as text; whatever is still running after `timeout_s` is killed."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            program = Forked(self.start(words, environment or os.environ, out.fileno(), errors=err.fileno()))
            try:
                status = program.wait(timeout_s)
            finally:
                program.kill()
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess([*words], status, out.read().decode(), err.read().decode())

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            processes.become_subreaper()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno()), *self.modules],
                cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True, env={**os.environ, "ROOM": _ROOM},
            )  # fmt: skip
            theirs.close()
        return self._socket

    def close(self) -> None:
        """No more of them."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()
            self._socket = self._process = None


ENGINES: Final = Forks("loadtest.engine")
PROXIES: Final = Forks(
    "proxy.cli.main", "proxy.cli.run_server", "proxy.cli.checkpoint_commands", "proxy.cli.control_commands",
    "proxy.cli.model_commands", "proxy.cli.pull_commands",
)  # fmt: skip
"""`warmpool` with any command."""
LOADTESTS: Final = Forks("loadtest.commands")


class Forked:
    """A child that was forked, as `subprocess.Popen` shows one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ended = os.pidfd_open(self.pid)
            try:
                select.select([ended], [], [], timeout)
            finally:
                os.close(ended)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- engines of a runtime in the test's process ---


class _NoReaper:
    """What is forked ends with the test's process by itself."""

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


class _ForkedEngine(ProcessEngine):
    def _spawned(self, directory: str, words: Sequence[str], environment: Mapping[str, str]) -> int:
        if [*words[:3]] != [sys.executable, "-m", *ENGINES.modules]:
            return super()._spawned(directory, words, environment)
        log = self._log("start")
        try:
            return ENGINES.start(words[3:], environment, log, folder=directory)
        finally:
            os.close(log)


class ForkingRuntime(ProcessRuntime):
    """The runtime `process`, with load-test engines that are forked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        reaper: Any = _NoReaper()
        self._parts.reaper = reaper

    async def open(self) -> None:
        """As ever, but that CRIU is looked at once a session."""
        criu.why_not = _why_not
        try:
            await super().open()
        finally:
            criu.why_not = _WHY_NOT

    def engine(self, instance_id: str, key: str) -> ProcessEngine:
        """As ever, but for how its process is made."""
        if instance_id not in self.engines:
            self.engines[instance_id] = _ForkedEngine(instance_id, key, self._parts)
        return self.engines[instance_id]


# --- the process that is forked ---


def _show_environment(environment: dict[str, str]) -> None:
    """Write it to where the kernel shows it from (proc(5), environ): where that of this program was when it began."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[47]), int(fields[48])  # env_start and env_end, the 50th and the 51st
    shown = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    if len(shown) <= end - begin:
        ctypes.memmove(begin, shown.ljust(end - begin, b"\0"), end - begin)


def _become(
    module: str, test: int, descriptors: Sequence[int], *, words: list[str], folder: str, environment: dict[str, str]
) -> None:
    os.setsid()
    while os.getppid() != test:
        time.sleep(0.001)  # the process between is about to end
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    out, errors, *listening = descriptors
    os.dup2(out, 1)
    os.dup2(errors, 2)
    for descriptor in listening:
        os.dup2(descriptor, _LISTEN_FD)
        environment["LISTEN_PID"] = str(os.getpid())
    os.closerange(_LISTEN_FD + len(listening), 1 << 16)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    _show_environment(environment)
    random.seed()
    program = importlib.import_module(module)
    if module == ENGINES.modules[0]:
        launch.forbid_io_uring()
    sys.argv = [str(program.__file__), *words]
    program.main()


def _fork(connection: socket.socket, module: str, request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Fork a program whose parent ends at once, and say its pid when it has another one."""
    reading, writing = os.pipe()
    test = os.getppid()
    between = os.fork()
    if between == 0:
        program = os.fork()
        if program == 0:
            status = 0
            try:
                _become(module, test, descriptors, **request)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:  # noqa: BLE001 - it goes to the program's log
                status = 1
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError):
                        stream.flush()
                os._exit(status)
        os.write(writing, b"%d" % program)
        os._exit(0)
    os.waitpid(between, 0)
    connection.send(os.read(reading, 64))
    for descriptor in (reading, writing, *descriptors):
        os.close(descriptor)


def main() -> None:
    """Fork programs until the test's process is gone."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    modules = sys.argv[2:]
    for module in modules:
        importlib.import_module(module)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
        if not message:
            return
        _fork(connection, modules[0], orjson.loads(message), descriptors)


if __name__ == "__main__":
    main()
