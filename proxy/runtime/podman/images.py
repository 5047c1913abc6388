"""The images of containers: golden checkpoints, each for any number of containers of its model."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from proxy.checkpoint.errors import StoreError
from proxy.errors import HostError
from proxy.runtime.image_store import CONTAINER_IMAGE, ImageStore
from proxy.runtime.podman import bundle, container
from proxy.runtime.podman.api import PodmanError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.checkpoint.manifest import Manifest
    from proxy.checkpoint.store import CheckpointStore
    from proxy.config.model import ModelSettings
    from proxy.runtime.base import EngineProcess
    from proxy.runtime.podman.containers import ContainerRecord
    from proxy.runtime.podman.engine import PodmanEngine
    from proxy.runtime.podman.host import PodmanHost


class PodmanImages(ImageStore):
    """See `proxy.runtime.base.Images`."""

    def __init__(
        self, store: CheckpointStore, runtime: str, host: PodmanHost, engines: Mapping[str, PodmanEngine]
    ) -> None:
        super().__init__(store, runtime, shared=True)
        self._host, self._engines = host, engines

    async def unarchive(self, engine: EngineProcess) -> None:
        """See `Images.unarchive`."""
        await super().unarchive(engine)
        for other in list(self._engines.values()):
            if other.image == engine.image and other.it is not None and other.it.pid is None:
                await self.reset_rootfs(other.it, engine.image)

    async def reset_rootfs(self, it: ContainerRecord, image: str) -> None:
        """Make a stopped container's own files those of the image: CRIU refuses a file that has grown since."""
        if it.upper is not None and not container.engine_of(it.model).criu.ignore_rootfs:
            await bundle.reset_rootfs(it.upper, self.store.path(image))

    async def socket_names(self, left_out: str | None = None) -> list[str]:
        """Of the abstract unix sockets on the host's network in the images there are, on tmpfs and archived."""
        names: list[str] = []
        for image in {*self.store.names(), *self.store.archived()} - {left_out}:
            with contextlib.suppress(StoreError):
                manifest = await self.manifest(image)
                names += manifest.private.get("abstract_sockets", [])
        return names

    def host_port(self, image: str) -> int | None:
        """The port of the host's that an image was taken with."""
        with contextlib.suppress(StoreError):
            port = self.store.load(image).private.get("host_port")
            return port if isinstance(port, int) else None
        return None

    async def refusal(self, manifest: Manifest, models: Mapping[str, ModelSettings]) -> str | None:
        """See `Images.refusal`. Raises HostError when podman cannot be asked."""
        try:
            return await super().refusal(manifest, models)
        except PodmanError as error:
            raise HostError(str(error)) from error

    async def _facts_for(self, model: ModelSettings, manifest: Manifest) -> dict[str, str]:
        """The host, and the container image that the engine was started from, while podman has it."""
        facts = self._host.facts(model)
        made_from = manifest.facts.get(CONTAINER_IMAGE, "")
        if made_from and not await self._host.is_missing(f"/images/{made_from}/exists"):
            facts[CONTAINER_IMAGE] = made_from
        return facts

    async def _moved(self, model: ModelSettings, image_id: str) -> str | None:
        """Whether the configuration's name for the container image means another one than this by now."""
        now = await self._host.image_now(model)
        if image_id == now:
            return None
        what = f"is {now[:12]} now" if now is not None else "is not there any more"
        name = container.engine_of(model).image
        return f"the container image {name} {what}, the engine was started from {image_id[:12]}"

    def _digest(self, key: str, model: ModelSettings) -> str:
        return container.spec_digest(key, model)
