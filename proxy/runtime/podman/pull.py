"""A container image fetched by podman, with what is known of its progress.

By podman's Docker-compatible call, since only that one tells bytes (docs.podman.io, ImageCreate): a JSON object a line,
with `status`, `id` (a layer) and `progressDetail`, or with `error`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from proxy.runtime.podman.api import Podman, PodmanError

if TYPE_CHECKING:
    from collections.abc import Callable

_CREATE: Final = "http://podman/v1.40/images/create"
_SILENCE_S: Final = 300.0
"""podman tells of a layer that comes in every second or so, but says nothing while it unpacks a large one."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """The image that the name means now, and whether it meant another one, or none, before."""

    image_id: str
    is_new: bool


async def pull_image(podman: Podman, name: str, progress: Callable[[int, int | None], None]) -> Pulled:
    """Fetch the image `name`; `progress` gets the bytes that have come and, as far as it is known, those of all layers.

    Raises PodmanError with podman's own reason, also where it says nothing for five minutes.
    """
    before = await _id_of(podman, name)
    layers: dict[str, tuple[int, int]] = {}
    async for line in podman.lines(_CREATE, silence_s=_SILENCE_S, fromImage=name):
        if "error" in line:
            raise PodmanError(500, " ".join(str(line["error"]).split()))
        detail = line.get("progressDetail")
        if isinstance(detail, dict) and isinstance(line.get("id"), str):
            layers[line["id"]] = _number(detail.get("current")), _number(detail.get("total"))
            total = sum(t for _, t in layers.values())
            progress(sum(c for c, _ in layers.values()), total or None)
    after = await _id_of(podman, name)
    if after is None:
        raise PodmanError(404, "podman fetched it, and does not know it by this name: write its registry, too")
    return Pulled(after, after != before)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


async def _id_of(podman: Podman, name: str) -> str | None:
    try:
        return str((await podman.get(f"/images/{name}/json"))["Id"])
    except PodmanError as error:
        if error.status != 404:
            raise
        return None
