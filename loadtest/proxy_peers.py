"""The proxies that are compared, each on one core in front of an upstream of its own on the other.

nginx comes from apt (root on Debian) or from PATH, vLLM's router and LiteLLM from PyPI into virtual environments below
a folder; one that cannot be had is left out, with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil
import tomli_w

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parent.parent
PROXY_CORE: Final = 0
OTHER_CORE: Final = 1
PATH: Final = "/v1/chat/completions"
QUESTION: Final = b'{"model":"bench","messages":[{"role":"user","content":"Say something."}],"max_tokens":4}'
PEERS: Final = ("direct", "warmpool", "warmpool-installed", "nginx", "vllm-router", "vllm-router-installed", "litellm")
INSTALLED: Final = "-installed"
"""Behind a name: with the settings it comes with. Without: no line in its log for a request, and what is cheapest."""
_START_S: Final = 120.0
_LITELLM: Final = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would ask the network for one
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # no proxy here asks for keys
}


class UnavailableError(Exception):
    """A peer cannot be had here; says why."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A working copy of warmpool's repository, and the Python of its own environment."""

    root: Path
    python: str

    @classmethod
    def at(cls, folder: Path, python: Path | None) -> Checkout:
        """One in another folder, as a rule with its own `.venv`. Raises UnavailableError."""
        root = folder.absolute()
        if not (root / "proxy" / "__main__.py").is_file():
            raise UnavailableError(f"{root} is no checkout of warmpool: there is no proxy/__main__.py")
        # Not resolved: that would lead out of the environment.
        chosen = root / ".venv" / "bin" / "python" if python is None else python.absolute()
        if not chosen.is_file():
            raise UnavailableError(f"there is no {chosen}: make it (make .venv/.run), or name one with --beside-python")
        return cls(root, str(chosen))

    def version(self) -> str:
        """The commit, "-dirty" where files were changed."""
        return _output("git", "-C", str(self.root), "describe", "--always", "--dirty")

    def keys(self) -> frozenset[str]:
        """The keys that its configuration knows, as `pool.max_queue` and `models.*.canary`. Raises UnavailableError."""
        command = [self.python, "-m", "proxy", "config", "reference"]
        done = subprocess.run(
            command, cwd=self.root, env=self.environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UnavailableError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
        found, section = set(), ""
        for line in done.stdout.splitlines():
            if header := _SECTION(line):
                section = re.sub(r"^models\.\w+", "models.*", header[1])
            elif key := _KEY(line):
                found.add(f"{section}.{key[1]}")
        return frozenset(found)

    def environment(self) -> dict[str, str]:
        """That of its processes: its own modules come first."""
        return {**os.environ, "PYTHONPATH": str(self.root)}


_SECTION: Final = re.compile(r"#? ?\[+([\w.]+)\]+$").match
_KEY: Final = re.compile(r"#? ?([a-z_0-9]+) = ").match
HERE: Final = Checkout(ROOT, sys.executable)


@dataclass(slots=True)
class Contender:
    """A proxy that runs."""

    name: str
    version: str
    port: int
    processes: list[psutil.Process]
    """Those of the proxy, without its engines."""
    upstream: psutil.Process | None = None

    def cpu_s(self) -> float:
        """CPU time used so far, in the kernel and outside."""
        return sum(_cpu_s(process.pid) for process in self.processes)

    def memory_bytes(self) -> int:
        """What its processes have to themselves."""
        return sum(p.memory_full_info().uss for p in self.processes)

    def cpu_share(self, seconds: float) -> float:
        """How much of a core it uses, looked at for so long."""
        before, began = self.cpu_s(), time.monotonic()
        time.sleep(seconds)
        return (self.cpu_s() - before) / (time.monotonic() - began)

    def until_quiet(self, timeout_s: float = 60.0) -> None:
        """Return when it has hardly used CPU for a while: all that was sent to it has come to rest.

        That needs no name in an answer of it. A health check of an engine that starts takes far less.
        """
        deadline = time.monotonic() + timeout_s
        quiet = 0
        while quiet < _QUIET and time.monotonic() < deadline:
            quiet = quiet + 1 if self.cpu_share(_LOOK_S) < _QUIET_SHARE else 0


_LOOK_S: Final = 0.2
_QUIET: Final = 4
_QUIET_SHARE: Final = 0.1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def _cpu_s(pid: int) -> float:
    """utime + stime of a process with all its threads, those that have ended too.

    The figures of /proc/PID/stat, from the clock of the process: nanoseconds instead of hundredths of a second
    (clock_getcpuclockid(3)). 0 where there is no such process.
    """
    clock = ctypes.c_int()
    if _LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)):
        return 0.0
    try:
        return time.clock_gettime(clock.value)
    except OSError:  # ended meanwhile
        return 0.0


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def upstream_command(port: str, python: str = sys.executable) -> list[str]:
    """The upstream on its core."""
    return [
        "taskset", "--cpu-list", str(OTHER_CORE), python, "-m", "loadtest.proxy_upstream", "--port", port,
    ]  # fmt: skip


def answers(port: int) -> bool:
    """Whether a question is answered with 200."""
    question = Request(
        f"http://127.0.0.1:{port}{PATH}", QUESTION, {"Content-Type": "application/json", "Authorization": "Bearer none"}
    )
    try:
        with urlopen(question, timeout=60) as response:
            return bool(response.status == 200 and response.read())
    except (URLError, OSError):
        return False


@contextlib.contextmanager
def running(
    name: str, folder: Path, peers: Path, *, checkout: Checkout = HERE, release: Path | None = None
) -> Iterator[Contender]:
    """A contender that answers, in a folder of its own. Raises UnavailableError.

    `checkout`: whose warmpool. With `release` its engine is not up before that file exists, and not woken.
    """
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        up = free_port()
        upstream = None
        program, installed = name.removesuffix(INSTALLED), name.endswith(INSTALLED)
        if program != "warmpool":
            upstream = stack.enter_context(_process(upstream_command(str(up)), folder / "upstream.log"))
        if program == "direct":
            version, port, command = "", up, None
        elif program == "warmpool":
            version, port, command = _warmpool(folder, checkout, release, installed=installed)
        elif program == "nginx":
            version, port, command = _nginx(folder, up)
        elif program == "vllm-router":
            version, port, command = _router(peers, up, installed=installed)
        else:
            version, port, command = _litellm(folder, peers, up)
        processes = []
        if command is not None:
            pinned = ["taskset", "--cpu-list", str(PROXY_CORE), *command]
            processes = [stack.enter_context(_process(pinned, folder / "proxy.log", checkout))]
        began = time.monotonic()
        started = answers if release is None else _accepts
        while not started(port):
            if time.monotonic() - began > _START_S or any(p.status() == psutil.STATUS_ZOMBIE for p in processes):
                raise UnavailableError(f"{name} did not start: {(folder / 'proxy.log').read_text()[-500:]}")
            time.sleep(0.1)
        if command is not None and program != "warmpool":
            processes += processes[0].children(recursive=True)
        if program == "warmpool" and release is None:
            upstream = next(
                p for p in processes[0].children(recursive=True) if "loadtest.proxy_upstream" in p.cmdline()
            )
        yield Contender(name, version, port, processes, upstream)


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[int]:
    """One that is behind no proxy; its port. Raises UnavailableError."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with _process(upstream_command(str(port)), folder / "engine.log"):
        began = time.monotonic()
        while not answers(port):
            if time.monotonic() - began > _START_S:
                raise UnavailableError(f"the engine did not start: {(folder / 'engine.log').read_text()[-500:]}")
            time.sleep(0.1)
        yield port


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def _process(command: list[str], log: Path, checkout: Checkout = HERE) -> Iterator[psutil.Process]:
    environment = {**checkout.environment(), **_LITELLM}
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=checkout.root, env=environment, stdout=output, stderr=output)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def _warmpool(folder: Path, checkout: Checkout, release: Path | None, *, installed: bool) -> tuple[str, int, list[str]]:
    port = free_port()
    engine = upstream_command("{port}")  # the same for every checkout
    if release is not None:
        engine += ["--ready-file", str(release)]
    settings = {
        "server": {"port": port, "body_limit": "64MiB"},
        "pool": {
            "state_dir": str(folder / "state"),
            "checkpoint_dir": str(folder / "images"),
            "max_queue": 20_000,
        },
        "models": {
            "bench": {
                "process": {"command": engine, "cwd": str(ROOT)},
                "warmup": {"requests": 0},
                "canary": "never",
                "max_concurrency": 2048,
                "max_queue": 20_000,
                "queue_timeout": "5m",
                "idle": {"sleeping": "never", "suspended": "never", "checkpointed": "never"},
            }
        },
    }
    if checkout != HERE:
        settings, unknown = known_settings(settings, checkout.keys())
        if needed := sorted(_NEEDED.intersection(unknown)):
            raise UnavailableError(f"the configuration of {checkout.root} knows no {', '.join(needed)}")
    (folder / "warmpool.toml").write_text(tomli_w.dumps(settings))
    options = ["-c", str(folder / "warmpool.toml"), *([] if installed else ["--log-level", "warning"])]
    return checkout.version(), port, [checkout.python, "-m", "proxy", "serve", *options]


_NEEDED: Final = frozenset({"server.port", "models.*.process.command", "models.*.process.cwd"})
"""What another checkout has to know; what else it does not is left to its defaults."""


def known_settings(settings: dict[str, Any], known: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """Those that are known, and the others as `Checkout.keys` writes them."""
    unknown: list[str] = []

    def kept(table: dict[str, Any], path: str) -> dict[str, Any]:
        made = {}
        for name, value in table.items():
            where = "models.*" if path == "models" else f"{path}.{name}".lstrip(".")
            if isinstance(value, dict):
                made[name] = kept(value, where)
            elif where in known:
                made[name] = value
            else:
                unknown.append(where)
        return made

    return kept(settings, ""), unknown


_NGINX_CONF: Final = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream engine {{ server 127.0.0.1:{up}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=16384;
    keepalive_requests 1000000000;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


def _nginx(folder: Path, up: int) -> tuple[str, int, list[str]]:
    binary = _from_apt("nginx", "nginx-light")
    port = free_port()
    folder.chmod(0o755)
    (folder / "nginx.conf").write_text(_NGINX_CONF.format(folder=folder, up=up, port=port))
    return _output(binary, "-v").rsplit("/", 1)[-1], port, [binary, "-c", str(folder / "nginx.conf"), "-p", str(folder)]


def _router(peers: Path, up: int, *, installed: bool) -> tuple[str, int, list[str]]:
    environment = _from_pypi(peers, "vllm-router")
    port = free_port()
    command = [
        str(environment / "bin" / "vllm-router"), "--worker-urls", f"http://127.0.0.1:{up}",
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    if not installed:
        command += ["--policy", "round_robin", "--log-level", "warning"]
    return _version(environment, "vllm-router"), port, command


def _litellm(folder: Path, peers: Path, up: int) -> tuple[str, int, list[str]]:
    environment = _from_pypi(peers, "litellm[proxy]")
    port = free_port()
    (folder / "litellm.yaml").write_text(
        "model_list:\n- model_name: bench\n  litellm_params:\n    model: openai/bench\n"
        f"    api_base: http://127.0.0.1:{up}/v1\n    api_key: none\n"
    )
    command = [
        str(environment / "bin" / "litellm"), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1",
        "--port", str(port), "--num_workers", "1",
    ]  # fmt: skip
    return _version(environment, "litellm"), port, command


def _version(environment: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return _output(str(environment / "bin" / "python"), "-c", code)


def _from_pypi(peers: Path, package: str) -> Path:
    environment = peers / package.split("[")[0]
    done = environment / ".installed"
    if not done.exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(environment)],
            [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", package],
        ):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                raise UnavailableError(f"{package} cannot be installed: {made.stderr.strip()[-300:]}")
        done.touch()
    return environment


def _from_apt(program: str, package: str) -> str:
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package],
        ):
            subprocess.run(command, capture_output=True, check=False, env=environment)
        found = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None:
        raise UnavailableError(f"there is no {program} (apt install {package})")
    return found


def wrk() -> str:
    """The load generator for short answers. Raises UnavailableError."""
    return _from_apt("wrk", "wrk")
