"""What was measured on: no figure means anything without it."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import re
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil

from proxy import __version__
from proxy.host import facts, processes

ROOT: Final = Path(__file__).parent.parent
HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PACKAGES: Final = ("aiohttp", "uvloop", "orjson", "hdrhistogram")


@functools.cache
def output(*command: str) -> str:
    """What a command prints; empty when it cannot be run."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def printed(*command: str) -> str:
    """The first line of it."""
    return (output(*command).splitlines() or [""])[0].strip()


def huge_pages() -> str:
    """The setting of transparent huge pages that is in effect; empty where there is none."""
    try:
        return "".join(re.findall(r"\[(\w+)\]", HUGE_PAGES.read_text()))
    except OSError:
        return ""


def machine() -> dict[str, str]:
    """Processor, memory, system, and how busy it was when the run began."""
    try:
        named = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = []
    found = {
        "processor": named[0] if named else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "kernel": platform.release(),
        **gpus(),
        "huge pages": huge_pages(),
        "load when it began": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    return {name: value for name, value in found.items() if value}


def gpus() -> dict[str, str]:
    """NVIDIA's GPUs, their driver, and the newest CUDA that it can do; nothing without one.

    From NVML where it can be had (the extra `gpu`), else from nvidia-smi, else from the driver's own files, which say
    less.
    """
    listed = _by_nvml() or _by_nvidia_smi()
    known = facts.gpu_facts()
    if not listed and known:
        listed = {"gpu": known["GPU"], "NVIDIA driver": known["NVIDIA driver"]}
    return listed


def _by_nvml() -> dict[str, str]:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - no GPU, no driver, no binding: each has an exception of its own
        return {}
    try:
        cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = [
            f"{_text(nvml.nvmlDeviceGetName(c))}, {nvml.nvmlDeviceGetMemoryInfo(c).total >> 20} MiB" for c in cards
        ]
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        return _of_gpus(names, _text(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}")
    except nvml.NVMLError:
        return {}
    finally:
        nvml.nvmlShutdown()


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _by_nvidia_smi() -> dict[str, str]:
    rows = output("nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader").splitlines()
    cards = [row.split(", ", 1) for row in rows if row.count(", ") == 2]
    cuda = re.search(r"CUDA Version\s*: ([\d.]+)", output("nvidia-smi", "--query")) if cards else None
    return _of_gpus([name for _, name in cards], cards[0][0], cuda[1] if cuda else "") if cards else {}


def _of_gpus(cards: list[str], driver: str, cuda: str) -> dict[str, str]:
    counted = Counter(cards)
    names = "; ".join(name if count == 1 else f"{count} x {name}" for name, count in counted.items())
    found = {"gpu": names, "NVIDIA driver": driver, "CUDA of the driver": cuda}
    return {name: value for name, value in found.items() if value}


ENGINE_PACKAGES: Final = {"vllm": "vllm/_version.py", "torch": "torch/version.py"}
"""Package → the file of it that says its version."""
_VERSION: Final = re.compile(r"^__version__(?:: \w+)? = (?:version = )?['\"]([^'\"]+)", re.MULTILINE)
_CUDA: Final = re.compile(r"^cuda(?:: [\w\[\]]+)? = ['\"]([\d.]+)", re.MULTILINE)


def engine_versions(owner: str) -> dict[str, str]:
    """vLLM, PyTorch and its CUDA, as an engine that runs has them loaded; nothing where that cannot be seen.

    `owner`: whose engines (see `proxy.runtime.state_dir.Claim`). Needs to be allowed to look into them, as root may.
    """
    roots = [pid for mark in (f"{owner}:", f"podman:{owner}:") for pid in processes.marked(mark)]
    found: dict[str, str] = {}
    for pid in {pid for root in roots for pid in processes.tree(root)}:
        try:
            mapped = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        found |= {name: text for name, text in loaded(mapped, Path(f"/proc/{pid}/root")).items() if name not in found}
    return found


def loaded(mapped: str, root: Path) -> dict[str, str]:
    """Of `ENGINE_PACKAGES`, those of which a process has a library mapped: `mapped` is its maps (proc(5))."""
    found = {}
    for package, says in ENGINE_PACKAGES.items():
        for folder in dict.fromkeys(re.findall(rf" (/\S*)/{package}/\S+\.so", mapped)):
            try:
                text = (root / f"{folder}/{says}".lstrip("/")).read_text()
            except OSError:
                continue
            if version := _VERSION.search(text):
                found[package] = version[1]
            if package == "torch" and (cuda := _CUDA.search(text)):
                found["CUDA of torch"] = cuda[1]
    return found


def versions() -> dict[str, str]:
    """Of warmpool and of what it works with."""
    found = {
        "warmpool": __version__,
        "commit": printed("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "podman": printed("podman", "--version").removeprefix("podman version "),
        "criu": printed("criu", "--version").removeprefix("Version: "),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {name: value for name, value in found.items() if value}
