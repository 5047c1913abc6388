"""On which GPUs an image is restored: pairs of GPUs as it was made with and as it is to have.

The driver takes UUIDs of old and new GPUs, of the same chip and as much memory, for every GPU that the process sees
(`cuCheckpointProcessRestore`, driver 580).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.errors import WarmpoolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.gpu.nvml import GpuMemory


class PlacementError(WarmpoolError):
    """The host has no GPU for an image."""


@dataclass(frozen=True, slots=True)
class ImageGpu:
    """A GPU of the host that an image was made on."""

    uuid: str
    name: str
    total_bytes: int
    used: bool
    """The engine held memory of it."""


def equal(one: ImageGpu | GpuMemory, other: ImageGpu | GpuMemory) -> bool:
    """Whether what was on one can go on on the other."""
    return one.name == other.name and one.total_bytes == other.total_bytes


def pairs(image: Sequence[ImageGpu], wanted: Mapping[str, str], here: Sequence[GpuMemory]) -> dict[str, str]:
    """UUIDs, old → new, of every GPU of the image; empty where all stay as they are.

    `wanted`: those that are decided; of the others each stays where it is if nobody else comes there. Raises
    PlacementError.
    """
    by_uuid = {gpu.uuid: gpu for gpu in here}
    found: dict[str, str] = {}
    for old in image:
        if old.uuid in wanted:
            new = by_uuid.get(wanted[old.uuid])
            if new is None or not equal(old, new) or new.uuid in found.values():
                raise PlacementError(f"it cannot go from GPU {old.uuid} ({old.name}) to {wanted[old.uuid]}")
            found[old.uuid] = new.uuid
    for old in sorted(image, key=lambda gpu: (gpu.uuid not in by_uuid, not gpu.used)):
        if old.uuid in found:
            continue
        free = [gpu for gpu in here if gpu.uuid not in found.values() and equal(old, gpu)]
        if not free and old.used:
            raise PlacementError(f"it was made on {old.name}, of which there is no free one here")
        if free:
            new = next((gpu for gpu in free if gpu.uuid == old.uuid), free[0])
            found[old.uuid] = new.uuid
    return found if any(old != new for old, new in found.items()) else {}


def roomy(used: Mapping[str, int], here: Sequence[GpuMemory], free: Mapping[str, int]) -> dict[str, str]:
    """Where what an engine takes (`used`, by UUID) has room: UUIDs, old → new; empty where it is, or nowhere.

    It stays where it is if that has room, else each part goes to the equal GPU with most free memory.
    """
    if all(free.get(uuid, 0) >= count for uuid, count in used.items()):
        return {}
    by_uuid = {gpu.uuid: gpu for gpu in here}
    found: dict[str, str] = {}
    for uuid, count in sorted(used.items(), key=lambda entry: -entry[1]):
        old = by_uuid.get(uuid)
        options = [
            gpu
            for gpu in here
            if old is not None and equal(old, gpu) and gpu.uuid not in found.values() and free.get(gpu.uuid, 0) >= count
        ]
        if not options:
            return {}
        found[uuid] = max(options, key=lambda gpu: (gpu.uuid == uuid, free.get(gpu.uuid, 0))).uuid
    return found
