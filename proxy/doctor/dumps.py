"""Checks of CRIU: the programs, the kernel under them, the configuration files they read."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from proxy.doctor.containers import has_own_criu_config
from proxy.doctor.report import Check
from proxy.runtime import criu
from proxy.runtime.podman import container

if TYPE_CHECKING:
    from collections.abc import Iterable

    from proxy.doctor.needs import Situation
    from proxy.doctor.report import Status

_INSTALL: Final = "make host   # Debian 12 and 13; elsewhere install CRIU 4.2 or later"
_NEVER: Final = "no model is ever checkpointed"


class _Feature(NamedTuple):
    """Something that CRIU asks of the kernel (`criu check --feature`)."""

    name: str
    needed: bool
    kernel: str
    without: str


_FEATURES: Final = (
    _Feature("seccomp_suspend", True, "4.3", "containers with a seccomp filter cannot be dumped"),
    _Feature("seccomp_filters", True, "4.4", "containers with a seccomp filter cannot be dumped"),
    _Feature("clone3_set_tid", False, "5.5", "restore is slower"),
    _Feature("get_rseq_conf", False, "5.13", "restored programs lose their restartable sequences"),
    _Feature("move_mount_set_group", False, "5.15", "restore mounts the old way"),
    _Feature("pagemap_scan", False, "6.7", "dumps are slower"),
)
_LOCK_FEATURE: Final = _Feature("network_lock_nftables", True, "3.13", 'network_lock = "nftables" cannot work')


async def programs(it: Situation) -> list[Check]:
    """Each CRIU that is used: found, recent enough, and content with the kernel."""
    wanted = it.needs.criu_programs()
    if not wanted:
        return [Check("CRIU", "skip", _NEVER)]
    return list(await asyncio.gather(*(_program(it, program, keys) for program, keys in wanted.items())))


async def _program(it: Situation, program: str, keys: Iterable[str]) -> Check:
    name = "CRIU" if program == "criu" else f"CRIU {program}"
    path = it.host.which(program)
    if path is None:
        settings = ", ".join(f"models.{key}.podman.criu.program" for key in keys)
        return Check(name, "fail", f"no program {program}", f"correct {settings}" if settings else _INSTALL)
    ran = await it.host.run(program, "--version")
    found = criu.version_in(ran.output)
    if not found:
        return Check(name, "fail", f"{path} does not say its version: {ran.reason()}", _INSTALL)
    if not criu.is_recent(found):
        return Check(name, "fail", f"{found}, {path}: too old for current kernels", _INSTALL)
    checked = await it.host.run(program, "check")
    if checked.status != 0:
        fix = "criu check" if it.host.uid() == 0 else "run as root"
        return Check(name, "fail", f"{found}, {path}; criu check fails: {checked.reason()}", fix)
    return Check(name, "ok", f"{found}, {path}; criu check passes")


async def kernel(it: Situation) -> list[Check]:
    """What CRIU can make use of beyond the least it needs."""
    name = "kernel features"
    usable = [program for program in it.needs.criu_programs() if it.host.which(program)]
    if not it.needs.checkpoints:
        return [Check(name, "skip", _NEVER)]
    if not usable:
        return [Check(name, "skip", "cannot be asked for without CRIU")]
    locks = {engine.criu.network_lock for engine in it.needs.podman.values()}
    features = [*_FEATURES, *([_LOCK_FEATURE] if "nftables" in locks else [])]
    answers = await asyncio.gather(*(it.host.run(usable[0], "check", "--feature", f.name) for f in features))
    lacking = [
        feature
        for feature, ran in zip(features, answers, strict=True)
        if ran.status != 0 and "Unknown feature" not in ran.output
    ]
    if not lacking:
        return [Check(name, "ok", ", ".join(feature.name for feature in features))]
    status: Status = "fail" if any(feature.needed for feature in lacking) else "warn"
    newest = max(lacking, key=lambda feature: [int(n) for n in feature.kernel.split(".")]).kernel
    text = "; ".join(f"no {feature.name}: {feature.without}" for feature in lacking)
    fix = f"run a kernel of {newest} or later, with CONFIG_CHECKPOINT_RESTORE; see: criu check --all"
    return [Check(name, status, text, fix)]


# --- configuration files (criu.org/Configuration_files) ---

_READ: Final = (Path("/etc/criu/default.conf"), Path("/root/.criu/default.conf"))
_UNREAD: Final = (Path("/etc/criu/runc.conf"), Path("/etc/criu/crun.conf"))
"""Not read for a container that names a file of its own, nor by a crun that does not know of such files."""
_HARMFUL: Final = {
    "leave-running": (False, "an engine goes on after its dump"),
    "leave-stopped": (False, "the processes of a dumped engine stay"),
    "auto-dedup": (True, "an image is emptied while it is restored"),
    "lazy-pages": (True, "a restore waits for a daemon that nobody started"),
}
"""Options that warmpool does not take back: whether runc does (criu_linux.go), and what they do."""
_SIZE: Final = re.compile(r"[\"']?(\d+)\s*([A-Za-z]*)[\"']?")
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class _Problem(NamedTuple):
    status: Status
    found: str
    fix: str


async def configuration(it: Situation) -> list[Check]:
    """The files that CRIU or the OCI runtime read besides the one that warmpool writes for each model."""
    name = "CRIU configuration"
    if not it.needs.checkpoints:
        return [Check(name, "skip", _NEVER)]
    files = [path for path in _READ if it.host.exists(path)]
    problems = [problem for path in files for problem in _in_file(it, path)]
    if not problems:
        found = f"{', '.join(map(str, files))}: nothing in the way" if files else f"no {_READ[0]}"
        if unread := [str(path) for path in _UNREAD if it.host.exists(path)]:
            found += f"; not read for warmpool's containers: {', '.join(unread)}"
        return [Check(name, "ok", found)]
    status: Status = "fail" if any(problem.status == "fail" for problem in problems) else "warn"
    found = "; ".join(problem.found for problem in problems)
    return [Check(name, status, found, "\n".join(dict.fromkeys(problem.fix for problem in problems)))]


def _in_file(it: Situation, path: Path) -> list[_Problem]:
    text = it.host.text(path)
    if text is None:
        return [_Problem("warn", f"{path} cannot be read", f"ls -l {path}")]
    if text.startswith("# Written by warmpool"):
        return []
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        option, _, value = line.partition("#")[0].strip().replace("=", " ", 1).partition(" ")
        delete = f"sed -i {number}d {path}"
        if option in _HARMFUL and not (_HARMFUL[option][0] and _is_all_runc(it)):
            problems.append(_Problem("fail", f"{path}:{number}: {option}: {_HARMFUL[option][1]}", delete))
        elif option == "ghost-limit":
            problems += _ghost_limit(it, path, number, value.strip())
        elif option == "tcp-close":
            problems += _tcp_close(it, f"{path}:{number}: {option}", delete)
    return problems + _lacking(it, path, text)


def _is_all_runc(it: Situation) -> bool:
    return it.podman.runtime == "runc" and len(it.needs.podman) == len(it.needs.models)


def _ghost_limit(it: Situation, path: Path, number: int, value: str) -> list[_Problem]:
    """CRIU knows K, M and G only, in capitals: 256m are 256 bytes to it (parse_size in its config.c)."""
    found = _SIZE.fullmatch(value)
    if found is not None and (not found[2] or set("KMG") & set(found[2])):
        return []
    text = f"{path}:{number}: ghost-limit {value} is not the size it looks like to CRIU"
    size = int(found[1]) * _UNITS.get(found[2][:1].lower(), 1) if found is not None else 4 << 30
    status: Status = "fail" if it.needs.uses_podman and not has_own_criu_config(it) else "warn"
    return [_Problem(status, text, f"sed -i '{number}s/.*/ghost-limit {size}/' {path}")]


def _tcp_close(it: Situation, where: str, fix: str) -> list[_Problem]:
    keeping = [key for key, engine in it.needs.podman.items() if engine.criu.tcp_established]
    if not keeping:
        return []
    return [_Problem("warn", f"{where}: contradicts tcp_established of models.{keeping[0]}.podman.criu", fix)]


def _lacking(it: Situation, path: Path, text: str) -> list[_Problem]:
    """What models ask for and the host's file lacks, where the OCI runtime reads nothing else."""
    if path != _READ[0] or has_own_criu_config(it):
        return []
    lines = {line.strip() for line in text.splitlines()}
    wanted = {
        line: None
        for engine in it.needs.podman.values()
        for line in container.criu_options(engine.criu, None).splitlines()
        if line and not line.startswith("#") and line not in lines
    }
    if not wanted:
        return []
    fix = f"add to {path}, or install crun 1.26 or later: {'; '.join(wanted)}"
    # Without it, one connection that is open is enough for a dump to fail.
    status: Status = "fail" if {"tcp-close", "tcp-established"} & {*wanted} else "warn"
    return [_Problem(status, f"{path} is not warmpool's and lacks {', '.join(wanted)}", fix)]


async def tools(it: Situation) -> list[Check]:
    """Other programs that podman's checkpoints need."""
    if not (it.needs.checkpoints and it.needs.uses_podman):
        return []
    if it.host.which("tar") is None:
        return [Check("tar", "fail", "no tar in PATH", "apt-get install tar")]
    ran = await it.host.run("tar", "--version")
    if "GNU tar" not in ran.output:
        return [Check("tar", "fail", f"not GNU tar: {ran.reason()}", "install GNU tar")]
    return [Check("tar", "ok", ran.output.splitlines()[0])]
