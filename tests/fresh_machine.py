"""Every documented way to install, command by command, on an empty Debian: ``python -m tests.fresh_machine``.

Root; needs podman, debootstrap and the mirror it takes by itself. A new system is made by debootstrap and booted with
its own systemd in a container. What runs in there are the commands of README and docs/installation.md, as they stand,
in their order, and one question at the end of each way whose answer has to be streamed to its last event.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support import ROOT
from tests.test_doc_blocks import commands
from tests.test_docs import FENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PACKAGES: Final = "systemd,systemd-sysv,dbus"
SOURCES: Final = "/srv/warmpool.git"
"""What REPOSITORY is, in there."""
SUBNET: Final = f"10.211.{os.getpid() % 250}.0/24"
STEP_S: Final = 1200.0
TRUSTED: Final = "/etc/host-certificates.crt"
"""What pip trusts on this host, in there."""
NOT_IN_THE_BASE: Final = (
    "proc", "sys", "srv", "root", "opt", "usr/local/src", "var/lib/containers", "var/lib/warmpool", "tmp", "var/tmp",
)  # fmt: skip
LIMITS: Final = ("nofile", "nproc")
LEFT: Final = (
    "root/warmpool", "usr/local/src/warmpool", "opt/warmpool", "srv/warmpool", "etc/warmpool", "var/lib/warmpool",
    "var/lib/containers", SOURCES.lstrip("/"),
)  # fmt: skip
CURL: Final = re.compile(r"\A(?:LANG=\S+ )?curl -sN ")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def section(page: str, heading: str) -> Iterator[str]:
    """The commands of a section's blocks, in their order."""
    text = (ROOT / page).read_text()
    begin = re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)
    assert begin is not None, f"{page} has no section {heading}"
    end = re.search(r"^#+ ", FENCE.sub(lambda m: " " * len(m[0]), text)[begin.end() :], re.MULTILINE)
    for match in FENCE.finditer(text[begin.end() : begin.end() + end.start() if end else None]):
        if match[2] in ("", "sh", "console"):
            for command in commands(match[3]):
                if re.match(r"[\w./]", command) and not re.match(r"\d\d:|HTTP/", command):
                    yield command


class Machine:
    """A Debian that has just been installed, and runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = f"warmpool-fresh-{uuid.uuid4().hex[:8]}"

    def boot(self) -> None:
        """With its own systemd, on a bridge of podman's."""
        unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        cgroups = (
            ["--cgroupns=private"] if unified else ["--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw"]
        )
        limits = [f"--ulimit={name}={_limit(name)}" for name in LIMITS]
        if not _may_raise_limits():
            # The podman inside would set its own, which are higher, and fail.
            conf = self.root / "etc" / "containers" / "containers.conf.d" / "10-limits.conf"
            conf.parent.mkdir(parents=True, exist_ok=True)
            pairs = ", ".join(f'"{name}={_limit(name)}:{_limit(name)}"' for name in LIMITS)
            conf.write_text(f"[containers]\ndefault_ulimits = [{pairs}]\n")
        # Not podman's own addresses, which the podman inside takes.
        network = ["podman", "network", "create", "--disable-dns", "--subnet", SUBNET, self.name]
        subprocess.run(network, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            ["podman", "run", "--detach", "--name", self.name, "--network", self.name, "--privileged",
             "--systemd=always", *cgroups, *limits,
             "--pids-limit=-1", "--rootfs", str(self.root), "/lib/systemd/systemd"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.run("systemctl is-system-running --wait || true")

    def run(self, script: str, *, cwd: str = "/root") -> str:
        """What a script prints; raises SystemExit with it when it fails."""
        command = [
            "podman",
            "exec",
            "--workdir",
            cwd,
            *_environment(),
            self.name,
            "bash",
            "-eo",
            "pipefail",
            "-c",
            script,
        ]
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=STEP_S
        )
        if done.returncode:
            sys.exit(f"exit status {done.returncode}: {script}\n{done.stdout[-4000:]}")
        return done.stdout

    def close(self) -> None:
        for command in (["rm", "--force", "--time", "5"], ["network", "rm", "--force"]):
            subprocess.run(["podman", *command, self.name], check=False, capture_output=True)


def _limit(name: str) -> int:
    return os.sysconf("SC_OPEN_MAX") if name == "nofile" else 4096


def _may_raise_limits() -> bool:
    """Whether this process has CAP_SYS_RESOURCE."""
    (effective,) = re.findall(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(int(effective, 16) >> 24 & 1)


def _environment() -> list[str]:
    """pip trusts what it trusts on this host, where that is set."""
    return [f"--env=PIP_CERT={TRUSTED}"] if "PIP_CERT" in os.environ else []


def make(release: str, root: Path) -> None:
    """An empty system with the sources at `SOURCES`."""
    if not (root / "etc" / "debian_version").exists():
        say(f"debootstrap {release} into {root}")
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, str(root)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    repository = root / SOURCES.lstrip("/")
    # Of an earlier run in the same folder.
    for left in LEFT:
        shutil.rmtree(root / left, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", "--no-hardlinks", str(ROOT), str(repository)], check=True)
    if "PIP_CERT" in os.environ:
        shutil.copyfile(os.environ["PIP_CERT"], root / TRUSTED.lstrip("/"))


def streamed(machine: Machine, tier: str | None = None) -> None:
    """The question of README's first block: its answer is a stream that comes to its end, from an engine on `tier`."""
    (question,) = (c for c in section("README.md", "Try it") if CURL.match(c))
    answer = machine.run(question)
    if "data: [DONE]" not in answer:
        sys.exit(f"no stream to its end:\n{answer[-2000:]}")
    tiers = re.findall(r"x-warmpool-tier: (\S+)", answer)
    if tier is not None and tiers != [tier]:
        sys.exit(f"it was to come from an engine that is {tier}:\n{answer[:2000]}")
    say(f"  streamed: {answer.count('data: ')} events, from {', '.join(tiers)}")


def script(found: Sequence[str]) -> str:
    return "\n".join(command.replace("REPOSITORY", SOURCES) for command in found)


def steps(machine: Machine, found: Sequence[str], cwd: str = "/root") -> str:
    for command in found:
        say(f"  $ {command.splitlines()[0][:150]}")
    return machine.run(script(found), cwd=cwd)


def served(machine: Machine, command: str, cwd: str) -> None:
    """Run what does not end beside, until it answers; ask it; end it."""
    say(f"  $ {command}")
    unit = f"way-{uuid.uuid4().hex[:6]}"
    set_ = " ".join(e.replace("--env=", "--setenv=") for e in _environment())
    machine.run(f"systemd-run --quiet --unit {unit} {set_} --working-directory {cwd} bash -c '{command}'")
    machine.run(
        "for i in $(seq 600); do curl -sf http://127.0.0.1:8080/ready && exit; "
        f"systemctl is-active --quiet {unit} || break; sleep 1; done; journalctl -o cat -n 40 -u {unit}; exit 1"
    )
    streamed(machine)
    machine.run(f"systemctl stop {unit}")


def by_make_run(machine: Machine) -> None:
    """The first thing that README says."""
    found = [c for c in section("README.md", "Try it") if not re.match(r"curl|make run|pip|\S*warmpool ", c)]
    cwd = "/root/warmpool"
    steps(
        machine, [*(c for c in section("docs/installation.md", "Debian 12 and 13") if c.startswith("apt-get")), *found]
    )
    served(machine, "make run", cwd)


def as_a_service(machine: Machine) -> None:
    """docs/installation.md, from its first command to the answer of a restored engine."""
    out = steps(machine, [*section("docs/installation.md", "Debian 12 and 13")])
    tiers = re.findall(r"x-warmpool-tier: (\S+)", out)
    say(f"  the last answer came from: {tiers}")
    if tiers[-1:] != ["checkpointed"]:
        sys.exit(f"it was to come from a checkpoint:\n{out[-4000:]}")
    streamed(machine)
    manual = machine.run("apt-get install -y man-db >/dev/null; PATH=/opt/warmpool/current/bin:$PATH man -w warmpool")
    say(f"  man warmpool: {manual.split()[-1]}")
    steps(machine, [c for c in section("docs/installation.md", "Upgrading") if "ln -sfn" not in c])
    streamed(machine)
    steps(machine, [*section("docs/installation.md", "Removing it")])
    # The outer podman may have said something too.
    if left := re.findall(r"^[0-9a-f]{12}$", machine.run("podman ps --all --quiet"), re.MULTILINE):
        sys.exit(f"containers are left: {left}")


def from_a_wheel(machine: Machine) -> None:
    """Built in the sources, installed elsewhere."""
    build, *install, serve = section("docs/installation.md", "From a wheel")
    _sources(machine)
    steps(machine, [build, *install], cwd="/usr/local/src/warmpool")
    served(machine, serve, "/srv")


def in_a_container(machine: Machine) -> None:
    """The proxy in a container, its engines beside it."""
    cwd = "/usr/local/src/warmpool"
    _sources(machine)
    found = [*section("docs/installation.md", "In a container")]
    first = next(i for i, command in enumerate(found) if command.startswith("podman build"))
    steps(machine, found[:first], cwd=cwd)
    # A base image without a registry: this very system. pip in the build trusts what it trusts.
    folders = " ".join(f"--exclude='./{folder}/*'" for folder in NOT_IN_THE_BASE)
    machine.run(f"tar -C / --one-file-system {folders} -c . | podman import - localhost/base")
    options = "--build-arg BASE=localhost/base"
    if "PIP_CERT" in os.environ:
        options += f" --volume {TRUSTED}:{TRUSTED}:ro --env PIP_CERT={TRUSTED}"
    steps(machine, [c.replace("podman build ", f"podman build {options} ", 1) for c in found[first:]], cwd=cwd)
    machine.run("for i in $(seq 120); do curl -sf http://127.0.0.1:8080/ready && exit; sleep 1; done; exit 1")
    streamed(machine)
    machine.run(
        "for i in $(seq 120); do curl -s http://127.0.0.1:8080/admin/status | "
        """grep -qE '"state": ?"checkpointed"' && exit; sleep 1; done; podman logs warmpool; exit 1"""
    )
    streamed(machine, "checkpointed")
    say("  " + machine.run("podman logs warmpool 2>&1 | grep -E 'ready from|checkpointed' | tail -4").strip())
    machine.run("podman stop -t 45 warmpool; podman rm warmpool")


def _sources(machine: Machine) -> None:
    wanted = [*section("docs/installation.md", "Debian 12 and 13")][:3]
    if not (machine.root / "usr/local/src/warmpool").exists():
        steps(machine, wanted)


WAYS: Final[dict[str, Callable[[Machine], None]]] = {
    "run": by_make_run, "service": as_a_service, "wheel": from_a_wheel, "container": in_a_container,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", default=[*WAYS], metavar="WAY", help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument("--release", default="bookworm", help="of Debian: bookworm, trixie")
    parser.add_argument(
        "--root", type=Path, help="folder for the system; default: a new one below /var/tmp, removed after"
    )
    options = parser.parse_args()
    if unknown := {*options.ways} - WAYS.keys():
        parser.error(f"no such way: {', '.join(unknown)}")
    if os.geteuid() != 0:
        parser.error("run as root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # and clean up
    root = options.root or Path(f"/var/tmp/warmpool-fresh-{options.release}-{os.getpid()}")
    make(options.release, root)
    machine = Machine(root)
    try:
        machine.boot()
        for way in options.ways:
            began = time.monotonic()
            say(f"{options.release}: {way}")
            WAYS[way](machine)
            say(f"{options.release}: {way}: {time.monotonic() - began:.0f} s")
    finally:
        machine.close()
        if options.root is None:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
