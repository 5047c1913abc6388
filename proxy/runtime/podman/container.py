"""What podman is told of an engine's container: the specification, and the files that go with it.

The specification is podman's SpecGenerator (pkg/specgen/specgen.go); what podman cannot pass to CRIU goes into a
configuration file that the container names by annotation (runc, and crun from 1.26).
"""

from __future__ import annotations

import hashlib
import re
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.engine import kinds
from proxy.host import capabilities
from proxy.host.files import write_if_other
from proxy.runtime.ports import LOOPBACK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from proxy.config.engine import CriuSettings, PodmanEngineSettings
    from proxy.config.model import ModelSettings

LABEL: Final = "io.warmpool."
CRIU_CONFIG: Final = "org.criu.config"
IO_URING: Final = ("io_uring_setup", "io_uring_enter", "io_uring_register")
_ENOSYS: Final = 38
_PID_MAX: Final = Path("/proc/sys/kernel/pid_max")
DEFAULT_SECCOMP: Final = Path("/usr/share/containers/seccomp.json")

NO_IO_URING: Final[Mapping[str, Any]] = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
    "syscalls": [{"names": [*IO_URING], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS}],
}
"""The profile for privileged containers: uvloop opens an io_uring wherever it can, and CRIU cannot dump one."""


_CGROUPS: Final = {"systemd": "machine.slice", "cgroupfs": "libpod_parent"}
"""Manager → the cgroup below which podman makes those of root's containers (pkg/cgroups, libpod's defaults)."""


def cgroup_of_all(host: Mapping[str, Any]) -> str | None:
    """The cgroup that all containers are in, by what podman says of its host; None where that is not known.

    Without root they are in the user's own, as this process is.
    """
    if host.get("security", {}).get("rootless"):
        return None
    return _CGROUPS.get(str(host.get("cgroupManager")))


def spec_digest(key: str, model: ModelSettings) -> str:
    """A digest of all that shapes an engine; an image of another digest is of another engine."""
    engine = engine_of(model)
    plain = engine.model_dump(mode="json", exclude={"env", "criu"})
    for volume in plain["volumes"]:
        if not volume["options"]:
            del volume["options"]  # images are older than the key
    environment = {name: value.get_secret_value() for name, value in engine.env.items()}
    parts = [key, model.name, plain, environment, *(["weights_copy"] * model.weights_copy)]
    parts += kinds.of(model).spec
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def specification(
    *,
    name: str,
    image: str,
    key: str,
    model: ModelSettings,
    host_port: int | None,
    labels: Mapping[str, str],
    environment: Mapping[str, str],
    criu_config: Path,
    seccomp: Path | None,
    log: Path,
    log_size: int,
    mounts: Iterable[tuple[str, str, bool]] = (),
    arguments: Iterable[str] = (),
) -> dict[str, Any]:
    """The body of `POST /libpod/containers/create`; `host_port` for a container on the host's network.

    `image`: the id of the container image; its name may mean another one by the time podman looks.

    `environment`, `mounts` (source, target, writable) and `arguments` of the command are added to the model's own.

    No port is published: an engine is reached at its address on podman's bridge, which only this host has a route to.
    """
    engine = engine_of(model)
    on_host = engine.network == "host"
    values = {
        "host": LOOPBACK if on_host else "0.0.0.0",  # noqa: S104 - inside its own network namespace
        "port": str(host_port if host_port is not None else engine.container_port),
        "model": model.name or key,
    }
    spec: dict[str, Any] = {
        "name": name,
        "image": image,
        "command": [*(_fill(argument, values) for argument in engine.command), *arguments],
        "env": {n: v.get_secret_value() for n, v in engine.env.items()} | dict(environment),
        "labels": {LABEL + n: v for n, v in labels.items()},
        "annotations": {CRIU_CONFIG: str(criu_config)},
        "mounts": [
            *(_mount(v.source, v.target, v.writable, v.options) for v in engine.volumes if v.source.startswith("/")),
            *(_mount(source, Path(target), writable) for source, target, writable in mounts),
        ],
        "volumes": [
            {"Name": v.source, "Dest": str(v.target), "Options": ["rw" if v.writable else "ro", *v.options]}
            for v in engine.volumes
            if not v.source.startswith("/")
        ],
        "devices": [{"path": device} for device in engine.devices],
        "shm_size": int(engine.shm_size),
        "r_limits": _ulimits(engine.ulimits),
        "resource_limits": {"pids": {"limit": engine.pids_limit}},
        "privileged": engine.privileged,
        "log_configuration": {"driver": "k8s-file", "path": str(log), "size": log_size},
        "healthconfig": {"Test": ["NONE"]},
        "restart_policy": "no",
    }
    if engine.entrypoint is not None:
        spec["entrypoint"] = engine.entrypoint
    if engine.memory_limit is not None:
        spec["resource_limits"]["memory"] = {"limit": int(engine.memory_limit)}
    if seccomp is not None:
        spec["seccomp_profile_path"] = str(seccomp)
    if on_host:
        spec["netns"] = {"nsmode": "host"}
    else:
        spec["netns"] = {"nsmode": "bridge"}
        # A restored engine has the hostname of the one whose image it is; podman writes it to each one's /etc/hosts.
        spec["hostname"] = hostname(key)
        if engine.network != "bridge":
            spec["Networks"] = {engine.network: {}}
    for option in engine.security_options:
        _apply_security(spec, option)
    return spec


def criu_options(settings: CriuSettings, action_script: Path | None) -> str:
    """The text of the CRIU configuration file of a model's containers (criu.org/Configuration_files)."""
    lines = [
        name
        for name, wanted in (
            ("tcp-established", settings.tcp_established),
            ("tcp-close", settings.tcp_close),
            ("file-locks", settings.file_locks),
            ("link-remap", settings.link_remap),
        )
        if wanted
    ]
    # In plain bytes: CRIU misreads suffixes here.
    lines += [f"ghost-limit {int(settings.ghost_limit)}", f"network-lock {settings.network_lock}"]
    if action_script is not None:
        lines.append(f"action-script {action_script}")
    return "\n".join(["# Written by warmpool; overwritten when a container is made.", *lines, *settings.options, ""])


def action_dispatcher(scripts: Mapping[Any, Path]) -> str:
    """A program that CRIU calls at every point, and that runs the script for the one it is at."""
    cases = "".join(f"  {name}) exec {_quoted(str(path))} ;;\n" for name, path in sorted(scripts.items()))
    return f'#!/bin/sh\n# Written by warmpool.\ncase "$CRTOOLS_SCRIPT_ACTION" in\n{cases}esac\n'


def runtime_wrapper(program: str, folder: Path) -> str:
    """An OCI runtime that finds the CRIU which `FOLDER/CONTAINER-ID/criu` is, where there is one.

    runc and crun take the one in PATH, and podman has no setting for it.
    """
    return (
        "#!/bin/sh\n# Written by warmpool.\nfor id; do :; done\nmine="
        f'{_quoted(str(folder))}/"$id"\n[ -e "$mine/criu" ] && PATH="$mine:$PATH"\nexec {_quoted(program)} "$@"\n'
    )


def seccomp_profile(engine: PodmanEngineSettings, folder: Path, default: Path) -> Path | None:
    """The profile to name, written to `folder` if it is ours; None where podman's `default` does."""
    if engine.seccomp is not None:
        return engine.seccomp
    if engine.privileged:
        return write_if_other(folder / "no-io-uring.json", orjson.dumps(NO_IO_URING, option=orjson.OPT_INDENT_2))
    try:
        profile = orjson.loads(default.read_bytes())
        allowed = [c for c in profile["syscalls"] if c["action"] == "SCMP_ACT_ALLOW" and {*IO_URING} & {*c["names"]}]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
    if not allowed:
        return None
    for call in allowed:
        call["names"] = [name for name in call["names"] if name not in IO_URING]
    profile["syscalls"].append({"names": [*IO_URING], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    return write_if_other(folder / "seccomp.json", orjson.dumps(profile))


def engine_of(model: ModelSettings) -> PodmanEngineSettings:
    """The `podman` table of a model that has one."""
    assert model.podman is not None  # noqa: S101 - the configuration says which runtime a model has
    return model.podman


def hostname(key: str) -> str:
    """The same for all engines of a model: letters, digits and hyphens (RFC 1123)."""
    return re.sub("[^a-z0-9-]+", "-", f"warmpool-{key.lower()}")[:63].strip("-")


def _mount(source: str, target: Path, writable: bool, further: Iterable[str] = ()) -> dict[str, Any]:
    options = ["rbind", "rw" if writable else "ro", *further]
    return {"Type": "bind", "Source": source, "Destination": str(target), "Options": options}


def _ulimits(wanted: Mapping[str, str]) -> list[dict[str, Any]]:
    limits = {name: tuple(int(n) for n in value.split(":")) for name, value in wanted.items()}
    if not capabilities.has(capabilities.CAP_SYS_RESOURCE):
        # podman's own defaults would be refused by the kernel; and it lowers its processes to the number of pids.
        files, processes = (resource.getrlimit(k)[1] for k in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        pids = int(_PID_MAX.read_text())
        limits.setdefault("nofile", (files, files))
        limits.setdefault("nproc", (min(processes, pids),) * 2 if processes != resource.RLIM_INFINITY else (pids, pids))
    return [{"type": name, "soft": pair[0], "hard": pair[-1]} for name, pair in sorted(limits.items())]


def _apply_security(spec: dict[str, Any], option: str) -> None:
    name, value = [*re.split("[=:]", option, maxsplit=1), ""][:2]
    match name:
        case "label":
            spec.setdefault("selinux_opts", []).append(value)
        case "apparmor":
            spec["apparmor_profile"] = value
        case "no-new-privileges":
            spec["no_new_privileges"] = value != "false"
        case "mask" | "unmask":
            spec.setdefault(name, []).extend(value.split(":"))


def _fill(argument: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace("{" + name + "}", value)
    return argument


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
