"""Checks of NVIDIA's driver and devices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from proxy.doctor.report import Check
from proxy.host import facts as facts

if TYPE_CHECKING:
    from proxy.doctor.needs import Situation
    from proxy.doctor.report import Status
    from proxy.doctor.view import Host

_CHECKPOINT_DRIVER: Final = 570
"""The first with cuCheckpointProcess* in the driver API."""
_REMAP_DRIVER: Final = 580
"""The first that restores on another GPU of the same kind."""
_CDI_FOLDERS: Final = ("/etc/cdi", "/var/run/cdi", "/run/cdi")
_CDI_FIX: Final = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
_QUERY: Final = ("nvidia-smi", "--query-gpu=index,name,persistence_mode,mig.mode.current", "--format=csv,noheader")


class _Gpu(NamedTuple):
    number: str
    name: str
    persistence: str
    mig: str


async def nvidia(it: Situation) -> list[Check]:
    """Everything about GPUs; one row that nothing is needed, where there is none and no model names one."""
    wanted = it.needs.gpu_models()
    present = it.host.exists(facts.NVIDIA)
    if not present and not wanted:
        return [Check("NVIDIA driver", "skip", "no GPU here, and no model names one")]
    needed = bool(wanted) and it.needs.checkpoints
    checks = [_driver(it.host, present, needed, next(iter(wanted), ""))]
    if present:
        checks += [*await _settings(it.host, needed), await _plugin(it)]
    return [*checks, *_devices(it)]


def _driver(host: Host, present: bool, needed: bool, model: str) -> Check:
    name, bad = "NVIDIA driver", _bad(needed)
    install = "install NVIDIA's driver 580 or later (570 is the oldest that can checkpoint)"
    if not present:
        return Check(
            name, "fail", f"no driver is loaded; models.{model} needs one", f"{install}, then: modprobe nvidia"
        )
    version = facts.nvidia_driver(host.path(facts.NVIDIA))
    if not version:
        return Check(name, "warn", f"{facts.NVIDIA}/version does not say which", "cat /proc/driver/nvidia/version")
    major = int(version.split(".")[0])
    models = ", ".join(dict.fromkeys(facts.gpus(host.path(facts.NVIDIA)))) or "no GPU"
    if major < _CHECKPOINT_DRIVER:
        return Check(name, bad, f"{version}: no CUDA checkpoints; {models}", install)
    if major < _REMAP_DRIVER:
        return Check(name, "ok", f"{version}: CUDA checkpoints, each bound to its GPU; {models}")
    return Check(name, "ok", f"{version}: CUDA checkpoints, on any GPU of the same kind; {models}")


def _bad(needed: bool) -> Status:
    return "fail" if needed else "warn"


async def _settings(host: Host, needed: bool) -> list[Check]:
    """Persistence mode and MIG, from nvidia-smi."""
    if host.which("nvidia-smi") is None:
        found = "no nvidia-smi in PATH: persistence mode and MIG are not known"
        return [Check("NVIDIA settings", "warn", found, "add the folder of nvidia-smi to PATH, or install it")]
    ran = await host.run(*_QUERY)
    rows = [[field.strip() for field in line.split(",")] for line in ran.output.splitlines() if line.strip()]
    gpus = [_Gpu(*row) for row in rows if len(row) == len(_Gpu._fields)]
    if ran.status != 0 or not gpus:
        return [Check("NVIDIA settings", "warn", f"nvidia-smi fails: {ran.reason()}", "nvidia-smi   # says more")]
    return [_persistence(gpus), _mig(gpus, needed)]


def _persistence(gpus: list[_Gpu]) -> Check:
    name = "persistence mode"
    off = [gpu.number for gpu in gpus if gpu.persistence == "Disabled"]
    if off:
        fix = "systemctl enable --now nvidia-persistenced   # or until the next start: nvidia-smi -pm 1"
        return Check(name, "warn", f"off for GPU {', '.join(off)}: the first use after a pause takes seconds", fix)
    unknown = [gpu.persistence for gpu in gpus if gpu.persistence != "Enabled"]
    if unknown:
        return Check(name, "warn", f"nvidia-smi says {unknown[0]!r}", "nvidia-smi -q -d PERFORMANCE")
    return Check(name, "ok", "on")


def _mig(gpus: list[_Gpu], needed: bool) -> Check:
    on = [gpu.number for gpu in gpus if gpu.mig == "Enabled"]
    if on:
        fix = "\n".join(f"nvidia-smi -i {index} -mig 0" for index in on)
        return Check("MIG", _bad(needed), f"on for GPU {', '.join(on)}: CUDA checkpoints do not support it", fix)
    return Check("MIG", "ok", "off")


async def _plugin(it: Situation) -> Check:
    """CRIU's own CUDA plugin, which does nothing without NVIDIA's cuda-checkpoint in PATH (its cuda_plugin.c)."""
    name = "CRIU CUDA plugin"
    program = next(iter(it.needs.criu_programs()), "criu")
    ran = await it.host.run(program, "--help")
    told = re.search(r"plugin directory \(by default ([^)\s]+)\)", ran.output)
    folder = Path(told[1] if told else "/usr/lib/criu/")
    if not it.host.exists(folder / "cuda_plugin.so"):
        return Check(name, "ok", f"none in {folder}: GPU memory is left to warmpool")
    tool = it.host.which("cuda-checkpoint")
    if tool is None:
        return Check(name, "ok", f"{folder}/cuda_plugin.so, idle without cuda-checkpoint in PATH")
    return Check(name, "ok", f"{folder}/cuda_plugin.so with {tool}: CRIU saves GPU memory itself")


def _devices(it: Situation) -> list[Check]:
    """The devices that models name, by CDI name or by path."""
    problems: dict[str, str] = {}
    seen = []
    for key, engine in it.needs.podman.items():
        for device in engine.devices:
            seen.append(device)
            if "=" in device and not device.startswith("/"):
                problem = _cdi(it.host, device)
            else:
                problem = _path(it.host, device, key)
            if problem is not None:
                problems[problem[0]] = problem[1]
    if not seen:
        return []
    if problems:
        return [Check("devices, CDI", "fail", "; ".join(problems), "\n".join(dict.fromkeys(problems.values())))]
    return [Check("devices, CDI", "ok", ", ".join(dict.fromkeys(seen)))]


def _cdi(host: Host, device: str) -> tuple[str, str] | None:
    """What is wrong with a CDI name ``VENDOR/CLASS=NAME``, and its fix (SPEC.md of container-device-interface)."""
    kind, _, wanted = device.partition("=")
    names: set[str] = set()
    for folder in _CDI_FOLDERS:
        for path in host.files(folder):
            text = host.text(path) or ""
            if path.suffix in (".yaml", ".json") and re.search(rf"\bkind[\"']?\s*:\s*[\"']?{re.escape(kind)}\b", text):
                names |= set(re.findall(r"\bname[\"']?\s*:\s*[\"']?([\w.:-]+)", text))
    fix = _CDI_FIX if kind == "nvidia.com/gpu" else f"write a CDI file for {kind} to /etc/cdi"
    if not names:
        return f"no CDI file for {kind} in {' or '.join(_CDI_FOLDERS[:2])}", fix
    if wanted not in names:
        return f"{device}: CDI knows {', '.join(sorted(names))}", fix
    return None


def _path(host: Host, device: str, key: str) -> tuple[str, str] | None:
    path = device.partition(":")[0]
    if host.exists(path):
        return None
    fix = "nvidia-modprobe -c 0 -u" if path.startswith("/dev/nvidia") else f"correct models.{key}.podman.devices"
    return f"no {path}", fix
