"""Facts about this host that a checkpoint depends on: kernel and GPU, as the kernel and NVIDIA's driver show them."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from proxy.host import cgroups, mounts

if TYPE_CHECKING:
    from collections.abc import Iterable

NVIDIA: Final = Path("/proc/driver/nvidia")


def kernel() -> str:
    """The kernel's release."""
    return platform.release()


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of this host, or what the smallest cgroup leaves of it, in bytes."""

    total_bytes: int
    available_bytes: int
    """What can be had without swapping, and before the OOM killer comes."""


def memory(cgroup: str | None = None) -> Memory:
    """As it is now for this process, or in another cgroup; all cgroups from there up count."""
    whole, limits = psutil.virtual_memory(), cgroups.memory_limits(of=cgroup)
    return Memory(
        min([int(whole.total), *(limit.limit_bytes for limit in limits)]),
        min([int(whole.available), *(limit.available_bytes for limit in limits)]),
    )


def least(found: Iterable[Memory]) -> Memory:
    """What several places together leave, each of which counts; this process's, where there are none."""
    places = [*found] or [memory()]
    return Memory(min(p.total_bytes for p in places), min(p.available_bytes for p in places))


def available_bytes() -> int:
    """The memory that can be had now."""
    return memory().available_bytes


def nvidia_driver(proc: Path = NVIDIA) -> str:
    """The version of NVIDIA's kernel module; empty without one."""
    try:
        text = (proc / "version").read_text()
    except OSError:
        return ""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found.group(1) if found else ""


def gpus(proc: Path = NVIDIA) -> list[str]:
    """The model of each NVIDIA GPU, in the order of their bus addresses."""
    models = []
    for information in sorted(proc.glob("gpus/*/information")):
        text = information.read_text()
        models += [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model:")]
    return models


def huge_pages_of(path: Path, mountinfo: Path = mounts.MOUNTINFO) -> str:
    """When the tmpfs that a path is on takes huge pages: "never", "always", "within_size" or "advise".

    Empty where it is on something else (the kernel's tmpfs documentation).
    """
    mount = mounts.holding(path, mounts.parse(mountinfo.read_text()))
    return mount.option("huge") or "never" if mount is not None and mount.kind == "tmpfs" else ""


def gpu_facts(proc: Path = NVIDIA) -> dict[str, str]:
    """Driver and GPUs, for a manifest; nothing on a host without."""
    driver = nvidia_driver(proc)
    return {"NVIDIA driver": driver, "GPU": ", ".join(gpus(proc))} if driver else {}
