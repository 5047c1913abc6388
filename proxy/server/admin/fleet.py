"""`/admin/fleet`: what this host knows of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from proxy.errors import ConflictError

if TYPE_CHECKING:
    from proxy.fleet.fleet import Fleet


class FleetHandlers:
    """The table; refused where this host stands alone."""

    def __init__(self, fleet: Fleet | None) -> None:
        self._fleet = fleet

    async def show(self, _: web.Request) -> web.StreamResponse:
        """This host, and all others that were heard of."""
        if self._fleet is None:
            raise ConflictError("This host stands alone: there is no fleet.host in its configuration.")
        return web.Response(body=orjson.dumps(self._fleet.status()), content_type="application/json")
