"""What was measured on: no figure means anything without it."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

from proxy import __version__

ROOT: Final = Path(__file__).parent.parent
HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PACKAGES: Final = ("aiohttp", "uvloop", "orjson", "hdrhistogram")


@functools.cache
def printed(*command: str) -> str:
    """The first line that a command prints; empty when it cannot be run."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0].strip()


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
        "gpu": printed("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "huge pages": huge_pages(),
        "load when it began": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    return {name: value for name, value in found.items() if value}


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
