"""The proxies that are compared, each on one core in front of an upstream of its own on the other.

nginx comes from apt (root on Debian) or from PATH, vLLM's router and LiteLLM from PyPI into virtual environments below
a folder; one that cannot be had is left out, with the reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
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
        """CPU time used so far, kernel and user; threads that have ended do not count."""
        return sum(_cpu_ns(thread) for p in self.processes for thread in Path(f"/proc/{p.pid}/task").iterdir()) / 1e9

    def memory_bytes(self) -> int:
        """What its processes have to themselves."""
        return sum(p.memory_full_info().uss for p in self.processes)


def _cpu_ns(thread: Path) -> int:
    """Of one thread, as the scheduler counts it (the times in `stat` are in hundredths of a second)."""
    try:
        return int((thread / "schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        return 0


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
def running(name: str, folder: Path, peers: Path, **warmpool: object) -> Iterator[Contender]:
    """A contender that answers, in a folder of its own. Raises UnavailableError.

    `warmpool`: settings of its model; with `release`, a file, the engine is not up before that exists, and not woken.
    """
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        up = free_port()
        upstream = None
        ready = "release" in warmpool  # its engine is not to be woken yet
        program, installed = name.removesuffix(INSTALLED), name.endswith(INSTALLED)
        if program != "warmpool":
            upstream = stack.enter_context(_process(upstream_command(str(up)), folder / "upstream.log"))
        if program == "direct":
            version, port, command = "", up, None
        elif program == "warmpool":
            version, port, command = _warmpool(folder, warmpool, installed=installed)
        elif program == "nginx":
            version, port, command = _nginx(folder, up)
        elif program == "vllm-router":
            version, port, command = _router(peers, up, installed=installed)
        else:
            version, port, command = _litellm(folder, peers, up)
        processes = []
        if command is not None:
            pinned = ["taskset", "--cpu-list", str(PROXY_CORE), *command]
            processes = [stack.enter_context(_process(pinned, folder / "proxy.log"))]
        began = time.monotonic()
        while not (ready and _accepts(port)) and not (not ready and answers(port)):
            if time.monotonic() - began > _START_S or any(not p.is_running() for p in processes):
                raise UnavailableError(f"{name} did not start: {(folder / 'proxy.log').read_text()[-500:]}")
            time.sleep(0.1)
        if command is not None and program != "warmpool":
            processes += processes[0].children(recursive=True)
        if program == "warmpool" and not ready:
            upstream = next(
                p for p in processes[0].children(recursive=True) if "loadtest.proxy_upstream" in p.cmdline()
            )
        yield Contender(name, version, port, processes, upstream)


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[psutil.Process]:
    environment = {**os.environ, **_LITELLM, "PYTHONPATH": str(ROOT)}
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
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


def _warmpool(folder: Path, model: dict[str, object], *, installed: bool) -> tuple[str, int, list[str]]:
    port = free_port()
    release = model.pop("release", None)
    command = upstream_command("{port}", "{python}")
    if release is not None:
        command += ["--ready-file", str(release)]
    settings = {
        "server": {"port": port},
        "pool": {
            "state_dir": str(folder / "state"),
            "checkpoint_dir": str(folder / "images"),
            "max_queue": 20_000,
        },
        "models": {
            "bench": {
                "process": {"command": command, "cwd": str(ROOT)},
                "warmup": {"requests": 0},
                "canary": "never",
                "max_concurrency": 2048,
                "max_queue": 20_000,
                "queue_timeout": "5m",
                "idle": {"sleeping": "never", "suspended": "never", "checkpointed": "never"},
                **model,
            }
        },
    }
    (folder / "warmpool.toml").write_text(tomli_w.dumps(settings))
    version = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    options = ["-c", str(folder / "warmpool.toml"), *([] if installed else ["--log-level", "warning"])]
    return version, port, [sys.executable, "-m", "proxy", "serve", *options]


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
