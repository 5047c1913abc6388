"""A registry of container images with one image, for tests: as much of the OCI distribution API as a pull needs."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import tarfile
from typing import Final

from aiohttp import web

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Registry:
    """Serves one image under every name and tag of `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.blobs: dict[str, bytes] = {}
        self.manifest = b""
        self.pause_s = 0.0
        """In the middle of the layer."""
        self.renew()

    def renew(self) -> None:
        """Let the name mean another image, of one layer that nobody has."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            entry = tarfile.TarInfo("etc/made")
            content = os.urandom(200_000)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        layer = gzip.compress(packed.getvalue())
        config = json.dumps(
            {
                "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/true"]},
                "rootfs": {"type": "layers", "diff_ids": [digest(packed.getvalue())]},
            }
        ).encode()  # fmt: skip
        self.blobs = {digest(layer): layer, digest(config): config}
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": _described("application/vnd.oci.image.config.v1+json", config),
                "layers": [_described("application/vnd.oci.image.layer.v1.tar+gzip", layer)],
            }
        ).encode()
        self.blobs[digest(self.manifest)] = self.manifest

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v2/", self._here)
        app.router.add_get(f"/v2/{self.name}/manifests/{{reference}}", self._manifest)
        app.router.add_get(f"/v2/{self.name}/blobs/{{digest}}", self._blob)
        return app

    async def _here(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def _manifest(self, request: web.Request) -> web.Response:
        if request.match_info["reference"] not in ("latest", digest(self.manifest)):
            raise web.HTTPNotFound
        headers = {"Content-Type": MANIFEST, "Docker-Content-Digest": digest(self.manifest)}
        return web.Response(body=self.manifest, headers=headers)

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        content = self.blobs.get(request.match_info["digest"])
        if content is None:
            raise web.HTTPNotFound
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        if len(content) > 100_000:
            await asyncio.sleep(self.pause_s)
        await response.write(content[len(content) // 2 :])
        return response


def _described(kind: str, content: bytes) -> dict[str, str | int]:
    return {"mediaType": kind, "digest": digest(content), "size": len(content)}
