"""`warmpool doctor`: each check on hosts made of files and canned answers, repairs, output, and this very machine."""

from __future__ import annotations

import asyncio
import io
import os
import shlex
import shutil
import stat
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from proxy.config.runtime import PodmanRuntimeSettings, ProcessRuntimeSettings
from proxy.config.settings import Settings
from proxy.doctor import examination, report, selftest, several_gpus
from proxy.doctor.containers import RUNTIME_CONF
from proxy.doctor.needs import Needs
from proxy.doctor.report import Check
from proxy.doctor.view import Host, Ran, Space
from proxy.errors import HostError, RuntimeFailure
from proxy.runtime.base import ImageFacts, Tiers
from proxy.runtime.ladder_probes import LadderProbes
from proxy.runtime.podman.runtime import PodmanRuntime
from proxy.runtime.process.runtime import ProcessRuntime
from proxy.tiers import Tier
from tests.support import examples, why_no_criu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from proxy.checkpoint.store import CheckpointStore
    from proxy.runtime.base import Runtime
    from proxy.runtime.state_dir import Claim
    from proxy.telemetry.stages import Stages

GIB = 1 << 30
HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
SHARED_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
IMAGES = "/mnt/checkpoint-ram"
NETAVARK = "/usr/lib/podman/netavark"
CAPABILITIES = "Name:\tx\nCapEff:\t000001ffffffffff\n"
FEWER_CAPABILITIES = "Name:\tx\nCapEff:\t000001fffeffffff\n"
NVIDIA_VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (nixbld@)\nGCC version:  gcc 15.3.0\n"
)
GPU_ROWS = "0, NVIDIA H100 80GB HBM3, {}, {}\n"
CDI = 'cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: "0"\n  containerEdits: {}\n- name: all\n'


class FakeHost(Host):
    """A host in good order, as root, without a GPU: a tree of files below `root` and answers by command line."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.programs = {"podman", "runc", "criu", "tar", "iptables", "nft"}
        self.user = 0
        self.sockets = {"/run/podman/podman.sock"}
        self.sizes: Space | None = Space(64 * GIB, 60 * GIB)
        self.bounds = {"nofile": (1 << 20, 1 << 20), "nproc": (1 << 16, 1 << 16), "memlock": (-1, -1)}
        self.ran: list[str] = []
        self.info: dict[str, Any] = {
            "host": {
                "cgroupVersion": "v2",
                "ociRuntime": {"name": "runc", "version": "runc version 1.1.5+ds1\nspec: 1.0.2-dev"},
                "security": {
                    "rootless": False,
                    "seccompEnabled": True,
                    "seccompProfilePath": "/usr/share/containers/seccomp.json",
                },
            },
            "version": {"Version": "5.4.2"},
        }
        self.answers: dict[str, tuple[int | None, str]] = {
            "podman image exists": (0, ""),
            "podman network exists": (0, ""),
            "criu --version": (0, "Version: 4.2.1\n"),
            "criu check": (0, "Looks good.\n"),
            "criu --help": (0, "  -L|--libdir   path to a plugin directory (by default /usr/lib/criu/)\n"),
            "iptables -t nat -S": (0, "-P PREROUTING ACCEPT\n"),
            "nft list tables": (0, "table ip nat\n"),
            NETAVARK: (0, '{"version": "1.14.0", "default_fw_driver": "nftables"}'),
            "tar --version": (0, "tar (GNU tar) 1.34\n"),
        }
        self.write("/proc/self/status", CAPABILITIES)
        self.write("/proc/meminfo", f"MemTotal:       {128 << 20} kB\nSwapTotal:      0 kB\n")
        self.write("/proc/self/mountinfo", MOUNTS)
        self.write(NETAVARK, "")
        self.write(HUGE_PAGES, "[always] madvise never\n")
        self.profile("/usr/share/containers/seccomp.json", [], "SCMP_ACT_ERRNO")
        self.folder(IMAGES)

    def write(self, path: str, text: str) -> None:
        """A file of this host."""
        here = self.path(path)
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_text(text)

    def folder(self, path: str, mode: int = 0o700) -> None:
        """A folder of this host."""
        here = self.path(path)
        here.mkdir(parents=True, exist_ok=True)
        here.chmod(mode)

    def profile(self, path: str, calls: list[dict[str, Any]], otherwise: str) -> None:
        """A seccomp profile."""
        self.write(path, orjson.dumps({"defaultAction": otherwise, "syscalls": calls}).decode())

    def crun(self, version: str, cgroup: str = "v2") -> None:
        """Another OCI runtime."""
        self.info["host"]["ociRuntime"] = {"name": "crun", "version": f"crun version {version}\nspec: 1.0.0"}
        self.info["host"]["cgroupVersion"] = cgroup

    def gpu(self, version: str = "580.159.04", persistence: str = "Enabled", mig: str = "Disabled") -> None:
        """An NVIDIA driver with a GPU."""
        self.write("/proc/driver/nvidia/version", NVIDIA_VERSION.format(version))
        self.write("/proc/driver/nvidia/gpus/0000:00:06.0/information", "Model: \t\t NVIDIA H100 80GB HBM3\n")
        self.programs.add("nvidia-smi")
        self.answers["nvidia-smi"] = (0, GPU_ROWS.format(persistence, mig))

    def which(self, program: str) -> str | None:
        if program.startswith("/"):
            return program if program in self.programs else None
        return f"/usr/bin/{program}" if program in self.programs else None

    def uid(self) -> int:
        return self.user

    def space(self, path: Path) -> Space | None:
        return self.sizes

    def limits(self) -> dict[str, tuple[int, int]]:
        return self.bounds

    async def listens(self, socket: Path) -> bool:
        return str(socket) in self.sockets

    async def run(self, *command: str, timeout_s: float = 0.0) -> Ran:
        line = " ".join(command)
        self.ran.append(line)
        if line.startswith("podman info") and "podman info" not in self.answers:
            return Ran(0, orjson.dumps(self.info).decode())
        known = max((c for c in self.answers if line.startswith(c)), key=len, default=None)
        return Ran(*self.answers[known]) if known is not None else Ran(None, f"{command[0]} cannot be run: ENOENT")


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:30 / /mnt/checkpoint-ram rw,nosuid - tmpfs tmpfs rw,size=67108864k,mode=700,huge=within_size
31 22 0:31 / /mnt/with\\040space rw - tmpfs tmpfs rw,huge=within_size
32 22 0:32 / /mnt/ramfs rw - ramfs ramfs rw
broken line
"""


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path / "host")


def settings_of(tmp_path: Path, *, pool: dict[str, Any] | None = None, **models: dict[str, Any]) -> Settings:
    """A configuration; folders are below the fake host."""
    return Settings.model_validate(
        {"pool": {"state_dir": "/var/lib/warmpool", **(pool or {})}, "models": models or {"demo": podman_model()}}
    )


def podman_model(**keys: Any) -> dict[str, Any]:
    return {"podman": {"image": "docker.io/vllm/vllm:1", "command": ["--port", "{port}"], **keys}}


def process_model(**keys: Any) -> dict[str, Any]:
    return {"process": {"command": ["serve", "{port}"]}, **keys}


async def rows(host: Host, settings: Settings | None) -> dict[str, Check]:
    checks = await examination.examine(settings, host)
    assert not [c for c in checks if "could not be examined" in c.found]
    assert all(c.found and "\n" not in c.found for c in checks)
    assert all((c.fix == "") == (c.status in ("ok", "skip")) for c in checks)
    named = {c.name: c for c in checks}
    assert len(named) == len(checks)
    return named


async def test_a_host_in_good_order(host: FakeHost, tmp_path: Path) -> None:
    host.folder("/var/lib/warmpool")
    found = await rows(host, settings_of(tmp_path))
    assert {c.status for c in found.values()} == {"ok", "skip"}
    assert [name for name, c in found.items() if c.status == "skip"] == ["pinned memory", "NVIDIA driver"]
    assert found["podman"].found == "5.4.2"
    assert found["runtime, cgroups"].found == "runc 1.1.5, cgroup v2"
    assert found["tmpfs"].found == "/mnt/checkpoint-ram: 64 GiB, 60 GiB free, huge=within_size"
    assert report.exit_status(found.values()) == 0


async def test_without_a_configuration_podman_is_what_is_looked_for(host: FakeHost) -> None:
    found = await rows(host, None)
    assert report.exit_status(found.values()) == 0
    assert "state_dir" not in found
    assert found["container images"].status == "skip"
    host.programs.clear()
    found = await rows(host, None)
    assert {n for n, c in found.items() if c.status == "fail"} == {"podman", "CRIU", "tar", "iptables, nft"}


async def test_what_is_not_needed_is_skipped(host: FakeHost, tmp_path: Path) -> None:
    host.programs.clear()
    host.answers.clear()
    never = {"checkpointed": "never", "archived": "never"}
    found = await rows(host, settings_of(tmp_path, demo=process_model(idle=never)))
    assert report.exit_status(found.values()) == 0
    for name in ("podman", "podman socket", "runtime, cgroups", "iptables, nft", "CRIU", "tmpfs", "huge pages"):
        assert found[name].status == "skip", name


async def test_processes_need_criu_but_not_podman(host: FakeHost, tmp_path: Path) -> None:
    host.programs = {"criu"}
    found = await rows(host, settings_of(tmp_path, demo=process_model()))
    assert report.exit_status(found.values()) == 0
    assert found["CRIU"].status == "ok"
    host.answers["criu check"] = (1, "Error (criu/x.c:1): no\nFeature lacks\n")
    found = await rows(host, settings_of(tmp_path, demo=process_model()))
    assert found["CRIU"].status == "fail"
    assert found["CRIU"].found.endswith("criu check fails: Feature lacks")


def allow_io_uring(path: str) -> Callable[[FakeHost], None]:
    calls = [{"names": ["read", "io_uring_setup"], "action": "SCMP_ACT_ALLOW"}]
    return lambda host: host.profile(path, calls, "SCMP_ACT_ERRNO")


def no_program(name: str) -> Callable[[FakeHost], None]:
    return lambda host: host.programs.remove(name)


def answer(command: str, status: int | None, output: str) -> Callable[[FakeHost], None]:
    return lambda host: host.answers.__setitem__(command, (status, output))


def text(path: str, content: str) -> Callable[[FakeHost], None]:
    return lambda host: host.write(path, content)


def both(*changes: Callable[[FakeHost], object]) -> Callable[[FakeHost], None]:
    def change(host: FakeHost) -> None:
        for one in changes:
            one(host)

    return change


def with_systemd(host: FakeHost) -> None:
    host.folder("/run/systemd/system")
    host.write("/usr/lib/systemd/system/podman.socket", "[Socket]\n")


def sizes(total: int, free: int) -> Callable[[FakeHost], None]:
    return lambda host: setattr(host, "sizes", Space(total, free))


def bound(name: str, soft: int, hard: int | None = None) -> Callable[[FakeHost], None]:
    return lambda host: host.bounds.__setitem__(name, (soft, soft if hard is None else hard))


MOUNT_FIX = (
    "mkdir -p /mnt/checkpoint-ram && mount -t tmpfs -o size=64G,mode=0700,huge=within_size tmpfs /mnt/checkpoint-ram\n"
    "echo 'tmpfs /mnt/checkpoint-ram tmpfs size=64G,mode=0700,huge=within_size 0 0' >> /etc/fstab"
)
NO_MODEL: dict[str, Any] = {}
SECCOMP = podman_model(seccomp="/etc/mine.json")
GPU = podman_model(devices=["nvidia.com/gpu=0"])
GPU_PATH = podman_model(devices=["/dev/nvidia0:/dev/nvidia0", "/dev/fuse"])
OWN_CRIU = podman_model(criu={"program": "/opt/criu"})
OLD_NETAVARK = answer(NETAVARK, 0, '{"version": "1.4.0"}')
CRIU_CONF = "/etc/criu/default.conf"

# fmt: off
CASES: list[tuple[Callable[[FakeHost], object], dict[str, Any], str, str, str, str]] = [
    # --- podman ---
    (lambda h: setattr(h, "user", 1000), NO_MODEL, "user", "fail", "user 1000", "as root"),
    (no_program("podman"), NO_MODEL, "podman", "fail", "no podman in PATH", "make host"),
    (no_program("podman"), podman_model(), "container images", "skip", "without podman", ""),
    (answer("podman info", 125, "x\nError: no\n"), NO_MODEL, "podman", "fail", "Error: no", "podman info"),
    (answer("podman info", None, "no answer after 30 s"), NO_MODEL, "podman", "fail", "no answer", "podman info"),
    (answer("podman info", 0, "{garbled"), NO_MODEL, "podman", "fail", "does not answer JSON", "podman info"),
    (answer("podman info", 0, "[]"), NO_MODEL, "podman", "fail", "version unknown", "4.3"),
    (answer("podman info", 0, '{"version": 7}'), NO_MODEL, "podman", "fail", "version unknown", "4.3"),
    (answer("podman info", 0, '{"version": 7}'), NO_MODEL, "runtime, cgroups", "fail", "does not say", "podman info"),
    (lambda h: h.info["version"].update(Version="3.0.1"), NO_MODEL, "podman", "fail", "3.0.1", "4.3 or later"),
    (lambda h: h.info["version"].update(Version="4.1.0"), NO_MODEL, "podman", "warn", "4.1.0", "4.3 or later"),
    (lambda h: h.info["host"]["security"].update(rootless=True), NO_MODEL, "podman", "fail", "rootless", "as root"),
    (lambda h: h.sockets.clear(), NO_MODEL, "podman socket", "ok", "starts the service itself", ""),
    (both(with_systemd, lambda h: h.sockets.clear()), NO_MODEL, "podman socket", "warn", "nobody listens",
     "systemctl enable --now podman.socket"),
    (with_systemd, OWN_CRIU, "podman socket", "ok", "a model has its own CRIU", ""),
    # --- runtime ---
    (lambda h: h.crun("1.21 +CRIU"), NO_MODEL, "runtime, cgroups", "ok", "crun 1.21, cgroup v2", ""),
    (lambda h: h.crun("1.21 +CRIU", "v1"), NO_MODEL, "runtime, cgroups", "fail", "refuses", 'runtime = "runc"'),
    (lambda h: h.crun("1.21"), NO_MODEL, "runtime, cgroups", "fail", "without CRIU", str(RUNTIME_CONF)),
    (lambda h: h.crun("1.27 +CRIU"), OWN_CRIU, "runtime, cgroups", "ok", "crun 1.27", ""),
    (both(no_program("runc"), lambda h: h.crun("1.21")), NO_MODEL, "runtime, cgroups", "fail", "without CRIU",
     "apt-get install runc"),
    (both(text(str(RUNTIME_CONF), "# mine"), lambda h: h.crun("1.21")), NO_MODEL, "runtime, cgroups", "fail",
     "without CRIU", f'set runtime = "runc" below [engine] in {RUNTIME_CONF}'),
    (lambda h: h.info["host"]["ociRuntime"].update(name="kata"), NO_MODEL, "runtime, cgroups", "fail", "kata", "runc"),
    (lambda h: h.info["host"].pop("cgroupVersion"), NO_MODEL, "runtime, cgroups", "ok", "version unknown", ""),
    # --- images, networks ---
    (answer("podman image exists", 1, ""), podman_model(), "container images", "fail", "missing: docker.io/vllm/vllm:1",
     "podman pull docker.io/vllm/vllm:1"),
    (answer("podman image exists", 1, ""), podman_model(image="localhost/x"), "container images", "fail",
     "missing: localhost/x", "build localhost/x, or correct models.demo.podman.image"),
    (answer("podman image exists", 125, "Error: db"), podman_model(), "container images", "warn", "db", "podman"),
    (no_program("iptables"), NO_MODEL, "iptables, nft", "ok", "netavark 1.14.0 sets networks up with nftables, wh", ""),
    (no_program("nft"), NO_MODEL, "iptables, nft", "fail", "with nftables: no nft", "apt-get install nftables"),
    (answer("nft list tables", 1, "x\nno kernel\n"), NO_MODEL, "iptables, nft", "fail", "no kernel", "nft list tables"),
    (OLD_NETAVARK, NO_MODEL, "iptables, nft", "ok", "netavark 1.4.0 sets networks up with iptables, which", ""),
    (both(OLD_NETAVARK, no_program("iptables")), NO_MODEL, "iptables, nft", "fail", "no iptables in PATH",
     "apt-get install iptables"),
    (answer(NETAVARK, 0, "netavark 1.0"), NO_MODEL, "iptables, nft", "ok", "netavark sets networks up with", ""),
    (lambda h: h.path(NETAVARK).unlink(), NO_MODEL, "iptables, nft", "ok", "netavark sets networks up with iptabl", ""),
    (
     both(text("/etc/containers/containers.conf", '[network]\nfirewall_driver = "nftables"\n'),
          text("/etc/containers/containers.conf.d/5.conf", '[network]\n  firewall_driver="iptables" # mine\n')),
     NO_MODEL, "iptables, nft", "ok", "netavark 1.14.0 sets networks up with iptables", ""),
    (both(text("/etc/containers/containers.conf", 'firewall_driver = "firewalld"'), lambda h: h.programs.clear()),
     NO_MODEL, "iptables, nft", "ok", "with firewalld", ""),
    (lambda h: h.info["host"].update(networkBackend="cni"), NO_MODEL, "iptables, nft", "ok",
     "CNI sets networks up with iptables", ""),
    (no_program("nft"), podman_model(network="host"), "iptables, nft", "skip", "host's network", ""),
    (no_program("iptables"), podman_model(network="host", criu={"network_lock": "iptables"}), "iptables, nft", "fail",
     'network_lock = "iptables": no iptables in PATH', "apt-get install iptables"),
    (answer("podman network exists", 1, ""), podman_model(network="engines"), "networks", "fail", "missing: engines",
     "podman network create engines"),
    (lambda h: None, podman_model(network="engines"), "networks", "ok", "engines", ""),
    # --- CRIU ---
    (no_program("criu"), NO_MODEL, "CRIU", "fail", "no program criu", "make host"),
    (no_program("criu"), NO_MODEL, "kernel features", "skip", "without CRIU", ""),
    (answer("criu --version", 0, "Version: 3.17.1\n"), NO_MODEL, "CRIU", "fail", "3.17.1", "make host"),
    (answer("criu --version", 127, "\x00\xff no such library"), NO_MODEL, "CRIU", "fail", "no such library", "make"),
    (answer("criu --version", 0, "Version: banana\n"), NO_MODEL, "CRIU", "fail", "banana", "make host"),
    (answer("criu check", 1, "Error: kcmp\n"), NO_MODEL, "CRIU", "fail", "fails: Error: kcmp", "criu check"),
    (lambda h: None, OWN_CRIU, "CRIU /opt/criu", "fail", "no program", "correct models.demo.podman.criu.program"),
    (both(lambda h: h.programs.add("/opt/criu"), answer("/opt/criu", 0, "Version: 4.3\n")), OWN_CRIU, "CRIU /opt/criu",
     "ok", "4.3, /opt/criu", ""),
    (answer("criu check --feature pagemap_scan", 1, ""), NO_MODEL, "kernel features", "warn",
     "no pagemap_scan: dumps are slower", "a kernel of 6.7 or later"),
    (answer("criu check --feature seccomp_filters", 1, ""), NO_MODEL, "kernel features", "fail", "no seccomp_filters",
     "a kernel of 4.4 or later"),
    (answer("criu check --feature pagemap_scan", 1, "Error: Unknown feature pagemap_scan"), NO_MODEL, "kernel features",
     "ok", "clone3_set_tid", ""),
    (answer("criu check --feature network_lock_nftables", 1, ""), podman_model(criu={"network_lock": "nftables"}),
     "kernel features", "fail", "network_lock_nftables", "kernel"),
    (text(CRIU_CONF, "# nothing\nlink-remap\n"), NO_MODEL, "CRIU configuration", "ok", "nothing in the way", ""),
    (text("/etc/criu/runc.conf", "ghost-limit 1m\n"), NO_MODEL, "CRIU configuration", "ok",
     "not read for warmpool's containers: /etc/criu/runc.conf", ""),
    (text(CRIU_CONF, "ghost-limit 256m\n"), NO_MODEL, "CRIU configuration", "warn", "ghost-limit 256m",
     "sed -i '1s/.*/ghost-limit 268435456/' /etc/criu/default.conf"),
    (both(lambda h: h.crun("1.21 +CRIU"), text(CRIU_CONF, "\nghost-limit=4g # big\n")), NO_MODEL, "CRIU configuration",
     "fail", "default.conf:2: ghost-limit 4g", "2s/.*/ghost-limit 4294967296/"),
    (text(CRIU_CONF, "ghost-limit 4G\n"), NO_MODEL, "CRIU configuration", "ok", "nothing in the way", ""),
    (text(CRIU_CONF, "ghost-limit much\n"), NO_MODEL, "CRIU configuration", "warn", "much", "ghost-limit 4294967296"),
    (text(CRIU_CONF, "leave-running\n"), podman_model(), "CRIU configuration", "fail", "default.conf:1: leave-running",
     "sed -i 1d /etc/criu/default.conf"),
    (text(CRIU_CONF, "auto-dedup\n"), podman_model(), "CRIU configuration", "ok", "nothing in the way", ""),
    (text(CRIU_CONF, "auto-dedup\n"), process_model(), "CRIU configuration", "fail", "emptied", "sed -i 1d"),
    (text("/root/.criu/default.conf", "tcp-close\n"), podman_model(criu={"tcp_established": True, "tcp_close": False}),
     "CRIU configuration", "warn", "contradicts tcp_established of models.demo", "sed -i 1d /root/.criu/default.conf"),
    (both(lambda h: h.crun("1.21 +CRIU"), text(CRIU_CONF, "tcp-close\n")), podman_model(), "CRIU configuration", "warn",
     "lacks file-locks, link-remap", "ghost-limit 4294967296"),
    (both(lambda h: h.crun("1.21 +CRIU"), text(CRIU_CONF, "tcp-established\n")), podman_model(), "CRIU configuration",
     "fail", "lacks tcp-close", "add to /etc/criu/default.conf"),
    (text("/x", ""), podman_model(criu={"action_scripts": {"pre-dump": "/none"}}), "files of engines", "fail",
     "models.demo.podman.criu.action_scripts.pre-dump: there is no /none", "correct models.demo.podman.criu"),
    (text("/script", ""), podman_model(criu={"action_scripts": {"pre-dump": "/script"}}), "files of engines", "fail",
     "/script is no program", "correct models.demo.podman.criu.action_scripts.pre-dump"),
    (text("/x", ""), podman_model(volumes=[{"source": "/none", "target": "/m"}]), "files of engines", "fail",
     "models.demo.podman.volumes: there is no /none", ""),
    (text("/x", ""), podman_model(), "files of engines", "ok", "all that models name are there", ""),
    (text("/x", ""), process_model(), "randomness", "warn", "models.demo: nothing is known of how to reseed",
     "models.demo.reseed"),
    (text("/x", ""), podman_model(entrypoint=["vllm", "serve"]), "randomness", "ok", "new random numbers", ""),
    (both(lambda h: h.crun("1.21 +CRIU"), text(CRIU_CONF, "# Written by warmpool; x\nleave-running\n")), podman_model(),
     "CRIU configuration", "ok", "nothing in the way", ""),
    (lambda h: h.folder(CRIU_CONF), NO_MODEL, "CRIU configuration", "warn", "cannot be read", "ls -l"),
    (no_program("tar"), NO_MODEL, "tar", "fail", "no tar", "install tar"),
    (answer("tar --version", 0, "BusyBox\n"), NO_MODEL, "tar", "fail", "BusyBox", "GNU tar"),
    # --- io_uring ---
    (allow_io_uring("/usr/share/containers/seccomp.json"), NO_MODEL, "io_uring blocked", "ok",
     "with a copy of /usr/share/containers/seccomp.json", ""),
    (
     both(allow_io_uring("/etc/containers/seccomp.json"),
          lambda h: h.info["host"]["security"].update(seccompProfilePath="/etc/containers/seccomp.json")),
     NO_MODEL, "io_uring blocked", "fail", "/etc/containers/seccomp.json allows it",
     "remove the three io_uring_ names from /etc/containers/seccomp.json"),
    (text("/usr/share/containers/seccomp.json", "{"), NO_MODEL, "io_uring blocked", "warn", "cannot be read",
     "seccomp.json"),
    (lambda h: h.info["host"]["security"].update(seccompProfilePath=""), NO_MODEL, "io_uring blocked", "warn",
     "names no profile", "restore /usr/share/containers/seccomp.json"),
    (lambda h: h.info["host"]["security"].update(seccompEnabled=False), NO_MODEL, "io_uring blocked", "fail",
     "without seccomp", "kernel.io_uring_disabled=2"),
    (both(text("/proc/sys/kernel/io_uring_disabled", "2\n"), text("/usr/share/containers/seccomp.json", "{")), NO_MODEL,
     "io_uring blocked", "ok", "for the whole host", ""),
    (lambda h: None, podman_model(privileged=True), "io_uring blocked", "ok", "for privileged containers", ""),
    (lambda h: None, process_model(), "io_uring blocked", "ok", "processes it starts", ""),
    (lambda h: None, SECCOMP, "io_uring blocked", "fail", "/etc/mine.json is missing", "write that file"),
    (text("/etc/mine.json", "?"), SECCOMP, "io_uring blocked", "fail", "mine.json is not a seccomp profile", "correct"),
    (text("/etc/mine.json", '{"syscalls": 3}'), SECCOMP, "io_uring blocked", "fail", "not a seccomp profile", "remove"),
    (allow_io_uring("/etc/mine.json"), SECCOMP, "io_uring blocked", "fail", "allows it", "models.demo.podman.seccomp"),
    (lambda h: h.profile("/etc/mine.json", [], "SCMP_ACT_ALLOW"), SECCOMP, "io_uring blocked", "fail", "allows it",
     "SCMP_ACT_ERRNO"),
    (lambda h: h.profile("/etc/mine.json", [{"names": ["io_uring_setup"], "action": "SCMP_ACT_KILL"}], "SCMP_ACT_LOG"),
     SECCOMP, "io_uring blocked", "ok", "by /etc/mine.json", ""),
    # --- memory ---
    (text("/proc/self/mountinfo", MOUNTS.splitlines()[0]), NO_MODEL, "tmpfs", "warn",
     "is on ext4: restores read from disk", MOUNT_FIX),
    (text("/proc/self/mountinfo", "\x00 garbled - x"), NO_MODEL, "tmpfs", "warn", "cannot be read", "mount -t tmpfs"),
    (lambda h: setattr(h, "sizes", None), NO_MODEL, "tmpfs", "warn", "cannot be read", "mount -t tmpfs"),
    (sizes(GIB, 1 << 20), NO_MODEL, "tmpfs", "fail", "1 MiB free, less than the reserve", "checkpoint_reserve"),
    (sizes(256 * GIB, 256 * GIB), NO_MODEL, "tmpfs", "warn", "more than there is RAM (128 GiB)",
     "mount -o remount,size=64G /mnt/checkpoint-ram"),
    (text("/proc/meminfo", "MemTotal: 134217728 kB\nSwapTotal: 1024 kB\n"), NO_MODEL, "tmpfs", "warn", "swap is on",
     "swapoff -a"),
    (text("/proc/meminfo", "garbled"), NO_MODEL, "tmpfs", "ok", "64 GiB", ""),
    (text(HUGE_PAGES, "always [madvise] never\n"), NO_MODEL, "huge pages", "warn", "madvise", "echo always > /"),
    (text(HUGE_PAGES, "?"), NO_MODEL, "huge pages", "warn", "unknown", "echo always"),
    (text(SHARED_HUGE_PAGES, "always [never]"), NO_MODEL, "pinned memory", "skip", "no model names a GPU", ""),
    (lambda h: None, GPU, "pinned memory", "skip", "no huge pages for shared memory", ""),
    (text(SHARED_HUGE_PAGES, "always [never] force"), GPU, "pinned memory", "warn", "never", "echo always > /"),
    (text(SHARED_HUGE_PAGES, "[always] never force"), GPU, "pinned memory", "ok", "always", ""),
    (text(SHARED_HUGE_PAGES, "?"), GPU, "pinned memory", "warn", "unknown", "echo always"),
    (lambda h: h.path(HUGE_PAGES).unlink(), NO_MODEL, "huge pages", "warn", "no transparent", "CONFIG_TRANSPARENT"),
    (lambda h: h.path(IMAGES).rmdir(), NO_MODEL, "checkpoint_dir", "ok", "not there yet; warmpool makes it", ""),
    (lambda h: h.folder(IMAGES, 0o755), NO_MODEL, "checkpoint_dir", "warn", "open to others (mode 0755)",
     "chmod 0700 /mnt/checkpoint-ram"),
    (text(f"{IMAGES}/mine.txt", ""), NO_MODEL, "checkpoint_dir", "fail", "holds files of others", "warmpool's own"),
    (both(text(f"{IMAGES}/mine.txt", ""), text(f"{IMAGES}/.lock", "")), NO_MODEL, "checkpoint_dir", "ok", "0700", ""),
    (text(f"{IMAGES}/demo/manifest.json", "{}"), NO_MODEL, "checkpoint_dir", "ok", "0700", ""),
    (lambda h: h.folder(IMAGES, 0o1777), NO_MODEL, "checkpoint_dir", "warn", "everybody's", "a folder below it"),
    (both(lambda h: h.path(IMAGES).rmdir(), text(IMAGES, "a file")), NO_MODEL, "checkpoint_dir", "fail",
     "is not a folder", "pool.checkpoint_dir"),
    (lambda h: os.chown(h.path(IMAGES), 1234, 1234) if os.geteuid() == 0 else setattr(h, "user", -1), NO_MODEL,
     "checkpoint_dir", "fail", "belongs to user", "chown root:root /mnt/checkpoint-ram"),
    # --- limits ---
    (bound("nofile", 1024), NO_MODEL, "limits", "warn", "nofile 1024", "ulimit -n 10512"),
    (bound("nofile", -1), NO_MODEL, "limits", "ok", "nofile unlimited", ""),
    (bound("nproc", 100), NO_MODEL, "limits", "warn", "nproc 100", "ulimit -u"),
    (bound("memlock", 8 << 20), NO_MODEL, "limits", "ok", "memlock 8 MiB", ""),
    (text("/proc/self/status", FEWER_CAPABILITIES), NO_MODEL, "limits", "ok", "no CAP_SYS_RESOURCE", ""),
    (text("/proc/self/status", "garbled"), NO_MODEL, "limits", "ok", "no CAP_SYS_RESOURCE", ""),
    (both(text("/proc/self/status", FEWER_CAPABILITIES), bound("memlock", 8 << 20)),
     podman_model(ulimits={"memlock": "-1:-1"}), "limits", "fail",
     "models.demo.podman.ulimits.memlock is above the hard limit", "CAP_SYS_RESOURCE"),
    # --- NVIDIA ---
    (lambda h: None, GPU, "NVIDIA driver", "fail", "models.demo needs one", "modprobe nvidia"),
    (lambda h: h.gpu(), NO_MODEL, "NVIDIA driver", "ok", "580.159.04: CUDA checkpoints, on any GPU", ""),
    (lambda h: h.gpu("575.1.2"), GPU, "NVIDIA driver", "ok", "each bound to its GPU; NVIDIA H100 80GB HBM3", ""),
    (lambda h: h.gpu("550.54.15"), GPU, "NVIDIA driver", "fail", "no CUDA checkpoints", "580 or later"),
    (lambda h: h.gpu("550.54.15"), NO_MODEL, "NVIDIA driver", "warn", "no CUDA checkpoints", "580 or later"),
    (lambda h: h.gpu("?"), GPU, "NVIDIA driver", "warn", "does not say which", "cat"),
    (lambda h: h.gpu(persistence="Disabled"), GPU, "persistence mode", "warn", "off for GPU 0", "nvidia-persistenced"),
    (lambda h: h.gpu(persistence="[N/A]"), GPU, "persistence mode", "warn", "[N/A]", "nvidia-smi"),
    (lambda h: h.gpu(), GPU, "persistence mode", "ok", "on", ""),
    (lambda h: h.gpu(mig="Enabled"), GPU, "MIG", "fail", "on for GPU 0", "nvidia-smi -i 0 -mig 0"),
    (lambda h: h.gpu(mig="Enabled"), NO_MODEL, "MIG", "warn", "on for GPU 0", "nvidia-smi -i 0 -mig 0"),
    (lambda h: h.gpu(mig="[N/A]"), GPU, "MIG", "ok", "off", ""),
    (both(lambda h: h.gpu(), no_program("nvidia-smi")), GPU, "NVIDIA settings", "warn", "no nvidia-smi", "PATH"),
    (both(lambda h: h.gpu(), answer("nvidia-smi", 9, "NVML")), GPU, "NVIDIA settings", "warn", "NVML", "nvidia-smi"),
    (both(lambda h: h.gpu(), answer("nvidia-smi", 0, "a,b")), GPU, "NVIDIA settings", "warn", "a,b", "nvidia-smi"),
    (lambda h: h.gpu(), GPU, "CRIU CUDA plugin", "ok", "none in /usr/lib/criu", ""),
    (both(lambda h: h.gpu(), text("/usr/lib/criu/cuda_plugin.so", "")), GPU, "CRIU CUDA plugin", "ok",
     "idle without cuda-checkpoint", ""),
    (
     both(lambda h: h.gpu(), text("/opt/p/cuda_plugin.so", ""), lambda h: h.programs.add("cuda-checkpoint"),
          answer("criu --help", 0, "path to a plugin directory (by default /opt/p)")),
     GPU, "CRIU CUDA plugin", "ok", "/opt/p/cuda_plugin.so with /usr/bin/cuda-checkpoint", ""),
    (lambda h: h.gpu(), GPU, "devices, CDI", "fail", "no CDI file for nvidia.com/gpu", "nvidia-ctk cdi generate"),
    (text("/etc/cdi/nvidia.yaml", CDI), GPU, "devices, CDI", "ok", "nvidia.com/gpu=0", ""),
    (text("/var/run/cdi/x.json", '{"kind": "nvidia.com/gpu", "devices": [{"name": "0"}]}'), GPU, "devices, CDI", "ok",
     "nvidia.com/gpu=0", ""),
    (text("/etc/cdi/nvidia.yaml", CDI), podman_model(devices=["nvidia.com/gpu=7"]), "devices, CDI", "fail",
     "CDI knows 0, all", "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"),
    (text("/etc/cdi/nvidia.yaml", "\x00garbled"), GPU, "devices, CDI", "fail", "no CDI file", "nvidia-ctk"),
    (text("/dev/nvidia0", ""), GPU_PATH, "devices, CDI", "fail", "no /dev/fuse", "models.demo.podman.devices"),
    (text("/dev/fuse", ""), GPU_PATH, "devices, CDI", "fail", "no /dev/nvidia0", "nvidia-modprobe -c 0 -u"),
]
# fmt: on


@pytest.mark.parametrize(("change", "model", "name", "status", "found", "fix"), CASES)
async def test_one_thing_that_is_different(
    host: FakeHost,
    tmp_path: Path,
    change: Callable[[FakeHost], object],
    model: dict[str, Any],
    name: str,
    status: str,
    found: str,
    fix: str,
) -> None:
    change(host)
    check = (await rows(host, settings_of(tmp_path, demo=model) if model else None))[name]
    assert check.status == status, check
    assert found in check.found
    assert fix in check.fix


async def test_models_that_differ_want_a_crun_that_can_tell_them_apart(host: FakeHost, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, one=podman_model(), two=podman_model(criu={"file_locks": False}))
    host.crun("1.21 +CRIU")
    assert (await rows(host, settings))["runtime, cgroups"].status == "warn"
    host.crun("1.26 +CRIU")
    assert (await rows(host, settings))["runtime, cgroups"].status == "ok"


WIDE = ["--tensor-parallel-size", "2", "--host={host}", "--port={port}"]


async def test_an_engine_on_several_gpus_and_what_came_of_its_trial(host: FakeHost, tmp_path: Path) -> None:
    assert "several GPUs" not in await rows(host, settings_of(tmp_path, demo=podman_model()))
    plain = settings_of(tmp_path, demo=podman_model(command=WIDE))
    row = (await rows(host, plain))["several GPUs"]
    assert row.status == "warn"
    assert "models.demo without VLLM_ALLREDUCE_USE_SYMM_MEM=0" in row.found
    assert "--disable-custom-all-reduce" in row.fix
    good = podman_model(command=[*WIDE, several_gpus.OPTION], env=several_gpus.ENVIRONMENT)
    row = (await rows(host, settings_of(tmp_path, demo=good)))["several GPUs"]
    assert (row.status, "models.demo on 2" in row.found) == ("ok", True)
    probes = LadderProbes(host.path("/var/lib/warmpool/gpu-probes.json"))
    await probes.note("demo", "engine", Tier.SUSPENDED, "CUDA_ERROR_NOT_SUPPORTED")
    for settings, fix in ((plain, "NCCL_P2P_DISABLE=1"), (settings_of(tmp_path, demo=good), "tries it again")):
        row = (await rows(host, settings))["several GPUs"]
        assert row.status == "warn"
        assert "without suspended, checkpointed, archived: CUDA_ERROR_NOT_SUPPORTED" in row.found
        assert fix in row.fix


async def test_ramfs_is_refused(host: FakeHost, tmp_path: Path) -> None:
    found = await rows(host, settings_of(tmp_path, pool={"checkpoint_dir": "/mnt/ramfs/images"}))
    assert found["tmpfs"].status == "fail"
    found = await rows(host, settings_of(tmp_path, pool={"checkpoint_dir": "/mnt/with space/images"}))
    assert found["tmpfs"].status == "ok"


async def test_the_archive_and_state_folders_are_looked_at_too(host: FakeHost, tmp_path: Path) -> None:
    host.folder("/archive", 0o750)
    found = await rows(host, settings_of(tmp_path, pool={"archive_dir": "/archive"}))
    assert found["archive_dir"].fix == "chmod 0700 /archive"
    assert found["state_dir"].found == "/var/lib/warmpool is not there yet; warmpool makes it"


async def test_a_check_that_breaks_is_a_row(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FakeHost) -> dict[str, tuple[int, int]]:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(FakeHost, "limits", broken)
    checks = await examination.examine(None, host)
    row = next(c for c in checks if c.name == "memory limits")
    assert row.status == "warn"
    assert row.found == "could not be examined: ZeroDivisionError('oh')"


FILES = (
    "/proc/self/status", "/proc/meminfo", "/proc/self/mountinfo", HUGE_PAGES, SHARED_HUGE_PAGES,
    "/etc/criu/default.conf",
    "/usr/share/containers/seccomp.json", "/etc/mine.json", "/etc/cdi/nvidia.yaml", "/proc/driver/nvidia/version",
    "/proc/driver/nvidia/gpus/0/information", "/proc/sys/kernel/io_uring_disabled",
)  # fmt: skip


@given(
    content=st.one_of(st.text(max_size=200), st.sampled_from(["[]", "{}", "null", '{"host": [1]}', "1.2.3", "\n- "]))
)
@hypothesis_settings(max_examples=examples(30), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbled_files_and_answers_become_rows(tmp_path: Path, content: str) -> None:
    host = FakeHost(tmp_path / uuid4().hex)
    host.programs |= {"nvidia-smi", "cuda-checkpoint", "/opt/criu"}
    for path in FILES:
        host.write(path, content.encode("utf-8", "replace").decode())
    for status in (0, 1):
        host.answers = dict.fromkeys(("podman info", NETAVARK, *host.programs), (status, content))
        models = {"a": SECCOMP, "b": GPU, "c": OWN_CRIU, "d": podman_model(network="x"), "e": process_model()}
        for settings in (None, settings_of(tmp_path, **models)):
            asyncio.run(rows_of_any(host, settings))


async def rows_of_any(host: Host, settings: Settings | None) -> None:
    checks = await examination.examine(settings, host)
    assert not [c for c in checks if "could not be examined" in c.found]


# --- repairs ---


async def mend(host: FakeHost, settings: Settings | None = None) -> list[str]:
    told: list[str] = []
    await examination.repair(await examination.examine(settings, host), told.append)
    return told


async def test_folders_are_made_and_closed(host: FakeHost, tmp_path: Path) -> None:
    host.folder(IMAGES, 0o755)
    settings = settings_of(tmp_path, pool={"archive_dir": "/deep/archive"})
    assert await mend(host, settings) == [
        "run: chmod 0700 /mnt/checkpoint-ram",
        "  done",
        "make the folder /deep/archive, mode 0700",
        "  done",
        "make the folder /var/lib/warmpool, mode 0700",
        "  done",
    ]
    for path in (IMAGES, "/deep/archive", "/var/lib/warmpool"):
        assert stat.S_IMODE(host.path(path).stat().st_mode) == 0o700
    assert await mend(host, settings) == []


async def test_a_folder_of_everybody_is_left_alone(host: FakeHost) -> None:
    host.folder(IMAGES, 0o1777)
    assert await mend(host) == []


async def test_huge_pages_are_switched_on(host: FakeHost) -> None:
    host.write(HUGE_PAGES, "always madvise [never]\n")
    assert await mend(host) == [f"run, until the next start: echo always > {HUGE_PAGES}", "  done"]
    assert host.text(HUGE_PAGES) == "always"


async def test_huge_pages_of_pinned_memory_are_switched_on(host: FakeHost, tmp_path: Path) -> None:
    host.write(SHARED_HUGE_PAGES, "always within_size advise [never] deny force\n")
    told = await mend(host, settings_of(tmp_path, demo=GPU))
    assert f"run, until the next start: echo always > {SHARED_HUGE_PAGES}" in told
    assert host.text(SHARED_HUGE_PAGES) == "always"


async def test_runc_is_chosen_where_nobody_chose(host: FakeHost) -> None:
    host.crun("1.14.1 +CRIU", "v1")
    told = await mend(host)
    written = host.text(RUNTIME_CONF)
    assert written is not None
    assert written.endswith('[engine]\nruntime = "runc"\n')
    assert told == [f"write {RUNTIME_CONF}:\n{written.rstrip()}", "  done"]


async def test_a_file_of_the_user_is_never_overwritten(host: FakeHost) -> None:
    host.crun("1.14.1 +CRIU", "v1")
    checks = await examination.examine(None, host)
    host.write(str(RUNTIME_CONF), "# mine\n")
    told: list[str] = []
    await examination.repair(checks, told.append)
    assert told[1].startswith("  failed: ")
    assert host.text(RUNTIME_CONF) == "# mine\n"
    assert await mend(host) == []


async def test_the_socket_is_enabled_by_systemd(host: FakeHost) -> None:
    with_systemd(host)
    host.sockets.clear()
    host.answers["systemctl"] = (0, "")
    assert await mend(host) == ["run: systemctl enable --now podman.socket", "  done"]
    assert host.ran[-1] == "systemctl enable --now podman.socket"
    host.answers["systemctl"] = (1, "Failed to connect to bus\n")
    assert (await mend(host))[-1] == "  failed: Failed to connect to bus"


async def test_what_is_changed_is_told_before_it_is_changed(host: FakeHost) -> None:
    host.folder(IMAGES, 0o755)
    modes = []
    checks = await examination.examine(None, host)
    await examination.repair(checks, lambda _: modes.append(stat.S_IMODE(host.path(IMAGES).stat().st_mode)))
    assert modes == [0o755, 0o700]


# --- the whole ---


def no_runtime(name: str, claim: Claim, store: CheckpointStore) -> Runtime:
    raise HostError(f"no runtime {name}")


async def diagnose(host: Host, settings: Settings | None = None, *, fix: bool = False) -> examination.Diagnosis:
    return await examination.diagnose(settings, host, no_runtime, fix=fix, tell=lambda _: None)


async def test_mended_rows_are_shown_mended(host: FakeHost) -> None:
    host.folder(IMAGES, 0o755)
    before = await diagnose(host)
    assert "checkpoint_dir" in [c.name for c in before.checks if c.status == "warn"]
    after = await diagnose(host, fix=True)
    assert "checkpoint_dir" in [c.name for c in after.checks if c.status == "ok"]


async def test_the_self_test_is_not_tried_in_vain(host: FakeHost, tmp_path: Path) -> None:
    diagnosis = await diagnose(host)
    assert (diagnosis.self_test.status, diagnosis.exit_status()) == ("fail", 1)
    host.programs.remove("criu")
    diagnosis = await diagnose(host)
    assert (diagnosis.self_test.status, diagnosis.exit_status()) == ("skip", 1)
    assert diagnosis.self_test.found == "not tried; fix first: CRIU"
    never = {"checkpointed": "never", "archived": "never"}
    diagnosis = await diagnose(host, settings_of(tmp_path, demo=process_model(idle=never)))
    assert (diagnosis.self_test.status, diagnosis.exit_status()) == ("skip", 0)


SELF_TEST = Check("self-test", "ok", "a container was checkpointed and restored", stages_s={"start": 0.25})
ROWS = [
    Check("podman", "ok", "4.3.1"),
    Check("tmpfs", "warn", "[bold]/x[/] is on ext4", "mount " + "-o very,long " * 12 + "/x\nsecond line"),
    Check("CRIU", "fail", "no program criu :smile:", "make host"),
    Check("NVIDIA driver", "skip", "no GPU here"),
]


def test_json_has_one_shape() -> None:
    answer = orjson.loads(report.as_json(ROWS, SELF_TEST))
    assert set(answer) == {"ok", "checks", "self_test"}
    assert answer["ok"] is False
    assert answer["checks"][2] == {
        "name": "CRIU",
        "status": "fail",
        "found": "no program criu :smile:",
        "fix": "make host",
    }
    assert answer["self_test"] == {
        "name": "self-test",
        "status": "ok",
        "found": "a container was checkpointed and restored",
        "fix": "",
        "stages_s": {"start": 0.25},
    }
    assert orjson.loads(report.as_json(ROWS[:2], SELF_TEST))["ok"] is True


def test_the_exit_status_is_that_of_failures() -> None:
    assert report.exit_status(ROWS) == 1
    assert report.exit_status(ROWS[:2]) == 0


def rendered(checks: list[Check], file: io.StringIO | None = None) -> str:
    out = file or io.StringIO()
    report.render(checks, SELF_TEST, out)
    return out.getvalue()


def test_the_table_is_plain_and_narrow_where_it_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    shown = rendered(ROWS)
    assert "\x1b" not in shown
    table, _, rest = shown.partition("\n\n")
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "[bold]/x[/] is on ext4" in table
    assert ":smile:" in table
    assert "start 0.25 s" in " ".join(table.split())
    commands = [line.strip() for line in rest.splitlines()]
    assert ROWS[1].fix.splitlines()[0].strip() in commands
    assert {"tmpfs:", "CRIU:", "make host", "second line"} <= set(commands)
    assert commands[-1] == "Checkpoints do not work here yet: CRIU."


def test_the_last_line_sums_it_up() -> None:
    assert rendered(ROWS[:2]).splitlines()[-1] == "Checkpoints work here; better fix: tmpfs."
    assert rendered(ROWS[:1]).splitlines()[-1] == "Everything needed is here."


def test_a_terminal_that_knows_no_unicode_gets_none() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", write_through=True) as out:
        report.render(ROWS, SELF_TEST, out)
        shown = raw.getvalue()
    assert b"podman" in shown


# --- the self-test with a runtime that only pretends ---


class PretendedRuntime:
    """Writes an engine's log as the self-test's engine would; `fault` says what goes wrong."""

    name = "process"
    shares_images = False

    def __init__(self, claim: Claim, fault: str) -> None:
        self.claim = claim
        self.fault = fault
        self.calls: list[str] = []
        self.run = str(uuid4())
        self.count = 0

    def _tick(self) -> None:
        with self.claim.log_path("selftest-1").open("a") as log:
            for _ in range(10):
                self.count += 1
                log.write(f"2026-11-24T19:00:00+00:00 stdout F tick {self.run} {self.count}\n")

    async def open(self) -> None:
        if self.fault == "open":
            raise HostError("another warmpool")
        self.claim.acquire()

    async def close(self) -> None:
        self.calls.append("close")
        self.claim.release()

    def tiers(self) -> Tiers:
        if self.fault == "tiers":
            return Tiers(frozenset(), {Tier.CHECKPOINTED: "no checkpoints here"})
        return Tiers(frozenset({Tier.CHECKPOINTED}))

    async def start(self, instance_id: str, key: str, model: object) -> PretendedRuntime:
        if self.fault == "silent":
            self.claim.log_path(instance_id).write_text("sh: not found\n")
        else:
            self._tick()
        return self

    async def checkpoint(self, facts: ImageFacts, stages: Stages) -> None:
        if self.fault == "checkpoint":
            raise RuntimeFailure("checkpoint", "CRIU: Error\nno", alive=True)

    async def restore(self, stages: Stages, gpus: Mapping[str, str] | None = None) -> None:
        if self.fault == "restore":
            self.run, self.count = str(uuid4()), 0
        if self.fault == "hang":
            await asyncio.Event().wait()
        self._tick()

    async def kill(self) -> None:
        self.calls.append("kill")

    @property
    def images(self) -> PretendedRuntime:
        return self

    async def discard(self, engine: object) -> None:
        self.calls.append("discard")

    async def remove(self) -> None:
        self.calls.append("remove")


async def pretend(host: FakeHost, tmp_path: Path, fault: str) -> tuple[Check, PretendedRuntime]:
    made: list[PretendedRuntime] = []

    def make(name: str, claim: Claim, store: CheckpointStore) -> Any:
        assert name == "process"
        assert claim.folder.is_relative_to(tmp_path)
        assert store.root.is_relative_to(tmp_path)
        made.append(PretendedRuntime(claim, fault))
        return made[0]

    settings = settings_of(tmp_path, pool={"checkpoint_dir": str(tmp_path)}, demo=process_model())
    check = await selftest.self_test(host, Needs.of(settings), make)
    assert not list(tmp_path.glob("*.partial"))
    return check, made[0]


async def test_an_engine_that_goes_on_passes(host: FakeHost, tmp_path: Path) -> None:
    check, runtime = await pretend(host, tmp_path, "")
    assert check.status == "ok"
    assert list(check.stages_s) == ["open", "start", "checkpoint", "restore", "remove"]
    assert runtime.calls == ["kill", "discard", "remove", "close"]


@pytest.mark.parametrize(
    ("fault", "found", "cleaned"),
    [
        ("open", "open: another warmpool", []),
        ("tiers", "open: no checkpoints here", ["close"]),
        ("checkpoint", "checkpoint: checkpoint: CRIU: Error no", ["kill", "discard", "remove", "close"]),
        ("restore", "restore: the engine started again instead of going on", ["kill", "discard", "remove", "close"]),
        ("silent", "start: the engine does not count; its log ends with: sh: not found", None),
        ("hang", "restore: no end after 0 s", ["kill", "discard", "remove", "close"]),
    ],
)
async def test_a_self_test_that_fails_says_where_and_leaves_nothing(
    host: FakeHost,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    found: str,
    cleaned: list[str] | None,
) -> None:
    monkeypatch.setattr(selftest, "_PATIENCE_S", 0.05)
    if fault == "hang":
        monkeypatch.setattr(selftest, "_TIMEOUT_S", 0.2)
    check, runtime = await pretend(host, tmp_path, fault)
    assert check.status == "fail"
    assert check.found == found
    assert check.fix
    assert cleaned is None or runtime.calls == cleaned


async def test_a_cancelled_self_test_cleans_up(host: FakeHost, tmp_path: Path) -> None:
    task = asyncio.create_task(pretend(host, tmp_path, "hang"))
    while not list(tmp_path.glob("*.partial/state/logs/*")):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("before", [None, "ghost-limit 1\n"])
async def test_the_host_s_criu_configuration_stays_as_it_was(
    host: FakeHost, tmp_path: Path, before: str | None
) -> None:
    if before is not None:
        host.write(CRIU_CONF, before)
    host.answers |= {"podman import": (0, ""), "podman ps": (0, "left\n"), "podman rm": (0, ""), "ldd": (1, "static")}
    host.programs |= {"sh"}

    def make(name: str, claim: Claim, store: CheckpointStore) -> Any:
        assert name == "podman"
        host.write(CRIU_CONF, "# Written by warmpool\n")
        return PretendedRuntime(claim, "")

    def which(program: str) -> str | None:
        return shutil.which(program) if program == "sh" else FakeHost.which(host, program)

    host.which = which  # type: ignore[method-assign]
    settings = settings_of(tmp_path, pool={"checkpoint_dir": str(tmp_path)})
    check = await selftest.self_test(host, Needs.of(settings), make)
    assert check.status == "ok", check
    assert host.text(CRIU_CONF) == before
    assert host.ran[-2:] == ["podman rm --force --time 0 left", host.ran[-1]]
    assert host.ran[-1].startswith("podman rmi --force localhost/warmpool-selftest:")


async def test_an_image_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    class NoImport(Host):
        async def run(self, *command: str, timeout_s: float = 10.0) -> Ran:
            return Ran(125, "Error: no space") if command[0] == "podman" else await super().run(*command)

    def make(name: str, claim: Claim, store: CheckpointStore) -> Any:
        return PretendedRuntime(claim, "")

    settings = settings_of(tmp_path, pool={"checkpoint_dir": str(tmp_path)})
    check = await selftest.self_test(NoImport(), Needs.of(settings), make)
    assert (check.status, check.found) == ("fail", "image: podman import: Error: no space")


# --- this machine ---


async def test_this_machine_is_examined_without_an_exception(tmp_path: Path) -> None:
    found = await rows(Host(), settings_of(tmp_path, pool={"checkpoint_dir": str(tmp_path)}))
    assert {"podman", "CRIU", "tmpfs", "limits", "huge pages"} <= set(found)
    assert str(tmp_path) in found["tmpfs"].found


async def test_containers_of_folders_that_nobody_holds_are_one_row(tmp_path: Path, host: FakeHost) -> None:
    entries = [
        {"Names": [f"c{n}"], "Labels": {"io.warmpool.owner": f"{n:012}", "io.warmpool.state-dir": f"{tmp_path}/{n}"}}
        for n in (1, 2)
    ]
    host.answers["podman ps --all --format json"] = (0, orjson.dumps(entries).decode())
    row = (await rows(host, None))["other containers"]
    assert row.status == "warn"
    assert f"1 container of state_dir {tmp_path}/2, which no warmpool holds: c2" in row.found
    assert row.fix.count("podman rm --force") == 2
    host.answers["podman ps --all --format json"] = (0, "[]")
    assert "other containers" not in await rows(host, None)


@pytest.mark.parametrize("held", [False, True])
async def test_a_bridge_whose_address_changes_is_said(tmp_path: Path, host: FakeHost, held: bool) -> None:
    device = host.path("/sys/class/net/podman0")
    (device / "bridge").mkdir(parents=True)
    (device / "addr_assign_type").write_text("3\n" if held else "1\n")
    inspected = [{"name": "podman", "driver": "bridge", "network_interface": "podman0"}]
    host.answers["podman network inspect podman"] = (0, orjson.dumps(inspected).decode())
    settings = settings_of(tmp_path, demo={"podman": {"image": "x", "command": ["{port}"]}})
    row = (await rows(host, settings))["bridge address"]
    assert row.status == ("ok" if held else "warn")
    assert held or row.fix == "ip link set dev podman0 address $(cat /sys/class/net/podman0/address)"


async def test_a_command_that_hangs_or_is_not_there_is_an_answer() -> None:
    ran = await Host().run("sleep", "60", timeout_s=0.05)
    assert ran.status is None
    assert "no answer" in ran.reason()
    ran = await Host().run("/no/such/program")
    assert ran.status is None
    assert (await Host().run("sh", "-c", "echo '\n last '; exit 3")) == Ran(3, "\n last \n")


async def test_a_socket_that_is_listened_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert not await Host().listens(path)
    server = await asyncio.start_unix_server(lambda _, writer: writer.close(), path)
    assert await Host().listens(path)
    server.close()
    await server.wait_closed()
    assert not await Host().listens(path)


def make_runtime(name: str, claim: Claim, store: CheckpointStore) -> Runtime:
    if name == "podman":
        return PodmanRuntime(PodmanRuntimeSettings(), claim=claim, store=store)
    return ProcessRuntime(ProcessRuntimeSettings(), claim=claim, store=store)


def why_no_podman() -> str | None:
    reason = why_no_criu()
    if reason is None and shutil.which("podman") is None:
        reason = "no podman in PATH (make host)"
    return reason


@pytest.mark.podman
async def test_a_real_container_is_checkpointed_and_restored(tmp_path: Path) -> None:
    if reason := why_no_podman():
        pytest.skip(reason)
    settings = settings_of(tmp_path, pool={"checkpoint_dir": str(tmp_path)})
    check = await selftest.self_test(Host(), Needs.of(settings), make_runtime)
    assert check.status == "ok", check
    assert list(check.stages_s) == ["image", "open", "start", "checkpoint", "restore", "remove"]
    assert not list(tmp_path.iterdir())
    for left in (["ps", "--all", "--format", "{{.Names}}"], ["images", "--format", "{{.Repository}}:{{.Tag}}"]):
        ran = await Host().run("podman", *left)
        assert "selftest" not in ran.output, shlex.join(left)


@pytest.mark.criu
async def test_a_real_process_is_checkpointed_and_restored(tmp_path: Path) -> None:
    if reason := why_no_criu():
        pytest.skip(reason)
    settings = settings_of(tmp_path, pool={"checkpoint_dir": str(tmp_path)}, demo=process_model())
    check = await selftest.self_test(Host(), Needs.of(settings), make_runtime)
    assert check.status == "ok", check
    assert not list(tmp_path.iterdir())
