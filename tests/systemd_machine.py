"""A real systemd, in a container made of this host's own files: no registry, no image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.podman_bench import podman
from tests.support import PATIENCE_S, PYTHON, ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

INIT = Path("/lib/systemd/systemd")
FROM_ETC = (
    "alternatives", "containers/policy.json", "containers/registries.conf", "group", "hosts", "iproute2",
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "login.defs", "nsswitch.conf", "os-release", "pam.d", "passwd",
    "protocols", "security", "services", "shadow", "ssl/openssl.cnf",
)  # fmt: skip
FOLDERS = ("dev", "etc/warmpool", "etc/containers", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "usr",
           "var/lib/containers", "var/log/journal", "var/tmp")  # fmt: skip
STORAGE = """
[storage]
driver = "overlay"
graphroot = "/var/lib/containers/storage"
runroot = "/run/containers/storage"
[storage.options]
additionalimagestores = ["/host-storage"]
"""


def why_no_machine() -> str | None:
    """None where a systemd can be started in a container, else the reason to skip."""
    if os.geteuid() != 0:
        return "starting systemd in a container needs root"
    if shutil.which("podman") is None:
        return "no podman in PATH (make host)"
    if not INIT.exists() or shutil.which("systemctl") is None:
        return "no systemd here (apt-get install systemd)"
    return None


class Machine:
    """One that runs until `close`. Its folders are this host's, read-only; /etc and /var are its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.name = f"warmpool-machine-{uuid.uuid4().hex[:8]}"
        self._make_root()
        mounted = {Path("/usr"), Path("/opt"), ROOT, Path(sys.prefix), Path(sys.base_prefix)}
        tops = [p for p in mounted if p.exists() and not any(p != q and p.is_relative_to(q) for q in mounted)]
        store = json.loads(podman("info", "--format", "json"))["store"]["graphRoot"]
        limits = [
            f"--ulimit={name}={os.sysconf('SC_OPEN_MAX') if name == 'nofile' else 4096}" for name in ("nofile", "nproc")
        ]
        # On cgroup v1 CRIU does not find its way in a cgroup namespace inside another one.
        unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        cgroups = (
            ["--cgroupns=private"] if unified else ["--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw"]
        )
        podman(
            "run", "--detach", "--name", self.name, "--privileged", "--systemd=always", "--network=none",
            *cgroups, "--pids-limit=-1", *limits, *(f"--volume={p}:{p}:ro" for p in tops),
            f"--volume={store}:/host-storage:ro", "--tmpfs=/var/lib/containers:rw,exec", "--rootfs", str(self.root),
            str(INIT),
        )  # fmt: skip

    def _make_root(self) -> None:
        for name in FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        for name in FROM_ETC:
            source, target = Path("/etc") / name, self.root / "etc" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            elif source.exists():
                shutil.copyfile(source, target)
        (self.root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")  # without one everything gets enabled
        (self.root / "etc/containers/storage.conf").write_text(STORAGE)

    def booted(self) -> str:
        """Its state (systemctl(1), is-system-running) once it has come up."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            state = self.run("systemctl", "is-system-running", "--wait", check=False)
            if ("\n" not in state and "Failed to connect" not in state) or time.monotonic() > deadline:
                return state
            time.sleep(0.1)  # nobody listens yet

    def run(self, *command: str, check: bool = True, timeout_s: float = 60.0) -> str:
        """What a command prints in there, errors too."""
        done = subprocess.run(
            ["podman", "--log-level=error", "exec", "--workdir", str(ROOT), self.name, *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=timeout_s,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout.strip()

    def fails(self, *command: str) -> str:
        """What a command prints that must fail."""
        done = subprocess.run(
            ["podman", "--log-level=error", "exec", self.name, *command], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0, done.stdout
        return done.stdout + done.stderr

    def inside(self, task: str, *arguments: str) -> Any:
        """What a task of tests/systemd_inside.py reports."""
        return json.loads(self.run(PYTHON, "-m", "tests.systemd_inside", task, *arguments).splitlines()[-1])

    def warmpool(self, *arguments: str) -> str:
        """What the command says."""
        return self.run(str(Path(PYTHON).parent / "warmpool"), *arguments)

    def property(self, unit: str, name: str) -> str:
        """Of a unit."""
        return self.run("systemctl", "show", "--property", name, "--value", unit)

    def journal(self, unit: str, *options: str) -> str:
        """Its lines."""
        return self.run("journalctl", "--unit", unit, "--no-pager", "--output=cat", *options)

    def write(self, path: str, text: str) -> None:
        """A file in there."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def close(self) -> None:
        """End it, whatever it does."""
        subprocess.run(["podman", "rm", "--force", "--time", "0", self.name], check=False, capture_output=True)


def engine(*options: str) -> Sequence[str]:
    """Arguments of a load-test engine."""
    return (
        "--host", "{host}", "--port", "{port}", "--model", "{model}", "--load-seconds", "0.5", "--memory", "8MiB",
        "--ttft", "0.001", "--tokens-per-second", "40", "--sleep-mode", *options,
    )  # fmt: skip
