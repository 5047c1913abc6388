"""Checks of podman and of what its containers need."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.doctor.report import Check, Repair
from proxy.host import command
from proxy.runtime.podman import strays
from proxy.runtime.podman.container import LABEL
from proxy.runtime.state_dir import Claim

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from proxy.config.engine import PodmanEngineSettings
    from proxy.doctor.needs import Situation
    from proxy.doctor.view import Host

RUNTIME_CONF: Final = Path("/etc/containers/containers.conf.d/50-warmpool.conf")
_RUNTIME_CONF_TEXT: Final = """\
# Written by warmpool: crun refuses hybrid cgroups, runc works on both.
[engine]
runtime = "runc"
"""
_SYSTEMD: Final = Path("/run/systemd/system")
_SOCKET_UNITS: Final = tuple(f"{d}/systemd/system/podman.socket" for d in ("/etc", "/usr/lib", "/lib"))
_OLDEST_PODMAN: Final = (4, 3)
_CRUN_WITH_ANNOTATION: Final = (1, 26)
"""crun reads a container's own CRIU configuration from 1.26 (its NEWS)."""
_SECCOMP: Final = "/usr/share/containers/seccomp.json"
_REFUSALS: Final = frozenset(f"SCMP_ACT_{n}" for n in ("ERRNO", "KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP"))
_INSTALL: Final = "make host   # Debian 12 and 13; elsewhere as the distribution has it"
_NOT_USED: Final = "no model runs in podman"


def has_own_criu_config(it: Situation) -> bool:
    """Whether the OCI runtime reads the CRIU configuration that warmpool writes for each container."""
    return it.podman.runtime != "crun" or command.version_in(it.podman.runtime_version) >= _CRUN_WITH_ANNOTATION


async def podman(it: Situation) -> list[Check]:
    """podman itself, its version, and whether it is that of root."""
    name = "podman"
    if not it.needs.uses_podman:
        return [Check(name, "skip", _NOT_USED)]
    if it.host.which("podman") is None:
        return [Check(name, "fail", "no podman in PATH", _INSTALL)]
    facts = it.podman
    if facts.reason:
        return [Check(name, "fail", f"podman info fails: {facts.reason}", "podman info   # says more")]
    version = command.version_in(facts.version)
    if facts.rootless:
        return [Check(name, "fail", f"{facts.version}, rootless", "run warmpool and this command as root")]
    if version[:1] < (4,):
        return [Check(name, "fail", f"version {facts.version or 'unknown'}", "install podman 4.3 or later")]
    if version < _OLDEST_PODMAN:
        return [Check(name, "warn", f"{facts.version}, older than any that was tried", "install podman 4.3 or later")]
    return [Check(name, "ok", facts.version)]


async def socket(it: Situation) -> list[Check]:
    """podman's REST API."""
    name = "podman socket"
    if not it.needs.uses_podman:
        return [Check(name, "skip", _NOT_USED)]
    path = it.needs.runtime.podman.socket
    if any(engine.criu.program is not None for engine in it.needs.podman.values()):
        return [Check(name, "ok", "warmpool starts a service of its own, because a model has its own CRIU")]
    if await it.host.listens(path):
        return [Check(name, "ok", f"{path} answers")]
    found = f"nobody listens on {path}; warmpool starts the service itself"
    managed = it.host.exists(_SYSTEMD) and any(map(it.host.exists, _SOCKET_UNITS))
    if not managed or str(path) not in ("/run/podman/podman.sock", "/var/run/podman/podman.sock"):
        return [Check(name, "ok", found)]
    command = ("systemctl", "enable", "--now", "podman.socket")

    async def enable() -> None:
        ran = await it.host.run(*command)
        if ran.status != 0:
            raise OSError(ran.reason())

    fix = " ".join(command)
    return [Check(name, "warn", found, fix, Repair(f"run: {fix}", enable))]


async def runtime(it: Situation) -> list[Check]:
    """The OCI runtime and the cgroups it has to work with."""
    name = "runtime, cgroups"
    if not it.needs.uses_podman:
        return [Check(name, "skip", _NOT_USED)]
    facts = it.podman
    if facts.reason or it.host.which("podman") is None:
        return [Check(name, "skip", "cannot be asked for without podman")]
    if not facts.runtime:
        return [Check(name, "fail", "podman does not say which runtime it uses", "podman info   # says more")]
    version = ".".join(map(str, command.version_in(facts.runtime_version))) or "of unknown version"
    found = f"{facts.runtime} {version}, cgroup {facts.cgroup_version or 'version unknown'}"
    if facts.runtime not in ("runc", "crun"):
        return [Check(name, "fail", f"{found}: cannot be checkpointed", _use_runc(it.host), _write_runtime(it.host))]
    if facts.runtime == "crun":
        return [_crun(it, name, found)]
    return [Check(name, "ok", found)]


def _crun(it: Situation, name: str, found: str) -> Check:
    if it.podman.cgroup_version == "v1":
        text = f"{found} or hybrid, which crun refuses"
        return Check(name, "fail", text, _use_runc(it.host), _write_runtime(it.host))
    if "+CRIU" not in it.podman.runtime_version and it.needs.checkpoints:
        return Check(name, "fail", f"{found}: built without CRIU", _use_runc(it.host), _write_runtime(it.host))
    kinds = {engine.criu.model_dump_json() for engine in it.needs.podman.values()}
    if not has_own_criu_config(it) and len(kinds) > 1:
        text = f"{found}: one CRIU configuration for all models, and theirs differ"
        return Check(name, "warn", text, "install crun 1.26 or later, or give all models the same podman.criu")
    return Check(name, "ok", found)


def _use_runc(host: Host) -> str:
    install = [] if host.which("runc") else ["apt-get install runc"]
    if host.exists(RUNTIME_CONF):
        return "\n".join([*install, f'set runtime = "runc" below [engine] in {RUNTIME_CONF}'])
    write = f"printf '[engine]\\nruntime = \"runc\"\\n' > {RUNTIME_CONF}"
    return "\n".join([*install, f"mkdir -p {RUNTIME_CONF.parent} && {write}"])


def _write_runtime(host: Host) -> Repair | None:
    """The drop-in that chooses runc, where nobody wrote one."""
    if host.which("runc") is None or host.exists(RUNTIME_CONF):
        return None
    path = host.path(RUNTIME_CONF)

    def write() -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(_RUNTIME_CONF_TEXT)
        path.chmod(0o644)

    return Repair.of_files(f"write {RUNTIME_CONF}:\n{_RUNTIME_CONF_TEXT.rstrip()}", write)


async def images(it: Situation) -> list[Check]:
    """The container image of each model; warmpool pulls nothing."""
    name = "container images"
    wanted: dict[str, list[str]] = {}
    for key, engine in it.needs.podman.items():
        wanted.setdefault(engine.image, []).append(key)
    if not wanted:
        return [Check(name, "skip", _NOT_USED if it.needs.configured else "no model is configured")]
    if it.podman.reason or it.host.which("podman") is None:
        return [Check(name, "skip", "cannot be asked for without podman")]
    answers = await asyncio.gather(*(it.host.run("podman", "image", "exists", image) for image in wanted))
    missing, unknown = [], []
    for image, ran in zip(wanted, answers, strict=True):
        if ran.status == 1:
            missing.append(image)
        elif ran.status != 0:
            unknown.append(f"{image}: {ran.reason()}")
    if missing:
        fixes = [_get_image(image, wanted[image]) for image in missing]
        return [Check(name, "fail", f"missing: {', '.join(missing)}", "\n".join(fixes))]
    if unknown:
        return [Check(name, "warn", "; ".join(unknown), "podman images")]
    return [Check(name, "ok", ", ".join(wanted))]


def _get_image(image: str, keys: Iterable[str]) -> str:
    if image.startswith("localhost/"):
        return f"build {image}, or correct {', '.join(f'models.{key}.podman.image' for key in keys)}"
    return f"podman pull {image}"


async def others(it: Situation) -> list[Check]:
    """Containers of other state folders that no warmpool holds."""
    if not it.needs.uses_podman or it.podman.reason or it.host.which("podman") is None:
        return []
    ran = await it.host.run("podman", "ps", "--all", "--format", "json", "--filter", f"label={LABEL}owner")
    try:
        entries = orjson.loads(ran.output) if ran.status == 0 else []
        found = await asyncio.to_thread(strays.among, entries, Claim(it.needs.pool.state_dir).owner)
    except (orjson.JSONDecodeError, AttributeError, TypeError):
        return []
    if not found:
        return []
    lines = "; ".join(stray.found for stray in found)
    return [Check("other containers", "warn", lines, "\n".join(stray.removal for stray in found))]


async def io_uring(it: Situation) -> list[Check]:
    """Whether engines are kept from io_uring, which CRIU cannot dump."""
    name = "io_uring blocked"
    if not it.needs.checkpoints:
        return [Check(name, "skip", "no model is ever checkpointed")]
    if (it.host.text("/proc/sys/kernel/io_uring_disabled") or "").strip() == "2":
        return [Check(name, "ok", "switched off for the whole host (kernel.io_uring_disabled)")]
    if it.needs.runtime_name == "process":
        return [Check(name, "ok", "warmpool forbids it to the processes it starts")]
    if not it.podman.seccomp:
        return [Check(name, "fail", "podman was built without seccomp", "sysctl -w kernel.io_uring_disabled=2")]
    engines = {key: engine for key, engine in it.needs.podman.items() if it.needs.is_checkpointed(key)}
    usual = _usual_profile(it, engines)
    named = _named_profiles(it, engines)
    worst = [check for check in (*named, usual) if check is not None and check.status != "ok"]
    return [worst[0] if worst else usual or named[0]]


def _usual_profile(it: Situation, engines: Mapping[str, PodmanEngineSettings]) -> Check | None:
    """For engines without a profile of the user's; None where there are none such."""
    name = "io_uring blocked"
    plain = [key for key, engine in engines.items() if engine.seccomp is None and not engine.privileged]
    if engines and not plain:
        privileged = any(engine.seccomp is None for engine in engines.values())
        return (
            Check(name, "ok", "by the profile that warmpool writes for privileged containers") if privileged else None
        )
    if _blocks(it.host, _SECCOMP) is False:
        return Check(name, "ok", f"warmpool runs models with a copy of {_SECCOMP} that blocks it")
    path = it.podman.seccomp_profile
    blocks = _blocks(it.host, path) if path else None
    if blocks:
        return Check(name, "ok", f"by podman's profile {path}")
    fix = (
        f"remove the three io_uring_ names from {path}"
        if path
        else f"restore {_SECCOMP} (golang-github-containers-common)"
    )
    if blocks is None:
        where = f"podman's profile {path} cannot be read" if path else "podman names no profile"
        return Check(name, "warn", f"{where}: whether it blocks io_uring is not known", fix)
    return Check(name, "fail", f"podman's profile {path} allows it", fix)


def _named_profiles(it: Situation, engines: Mapping[str, PodmanEngineSettings]) -> list[Check]:
    """For engines with a profile of the user's."""
    name = "io_uring blocked"
    checks = []
    for key, engine in engines.items():
        if engine.seccomp is None:
            continue
        setting = f"models.{key}.podman.seccomp"
        if not it.host.exists(engine.seccomp):
            fix = f"write that file, or remove {setting}: warmpool has a profile of its own"
            checks.append(Check(name, "fail", f"{engine.seccomp} is missing ({setting})", fix))
            continue
        match _blocks(it.host, str(engine.seccomp)):
            case True:
                checks.append(Check(name, "ok", f"by {engine.seccomp}"))
            case False:
                fix = f"refuse io_uring_setup with SCMP_ACT_ERRNO there, or remove {setting}"
                checks.append(Check(name, "fail", f"{engine.seccomp} allows it ({setting})", fix))
            case None:
                fix = f"correct the file, or remove {setting}"
                checks.append(Check(name, "fail", f"{engine.seccomp} is not a seccomp profile ({setting})", fix))
    return checks


def _blocks(host: Host, path: str) -> bool | None:
    """Whether a seccomp profile refuses io_uring under all circumstances; None when it cannot be read."""
    with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return _refuses(orjson.loads(host.text(path) or ""), "io_uring_setup")
    return None


def _refuses(profile: Any, call: str) -> bool:
    actions = [entry["action"] for entry in profile["syscalls"] if call in entry.get("names", [entry.get("name")])]
    if any(action not in _REFUSALS for action in actions):
        return False
    return bool(actions) or profile["defaultAction"] in _REFUSALS
