"""What applications ask of a server and what is answered here, so that no engine is woken for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

import proxy
from proxy.errors import RETRY, ModelNotFoundError
from proxy.server.auth.caller import caller_of

if TYPE_CHECKING:
    from proxy.pool.pool import Pool


class Local:
    """`/v1/models`, `/version` and `/ping`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._created = int(time.time())

    async def models(self, request: web.Request) -> web.StreamResponse:
        """Every name that the client may use."""
        caller, settings = caller_of(request), self._pool.settings
        models = {key: self._state(key) for key in settings.models if caller is None or caller.may_use(key)}
        names = settings.names().items()
        return _json(
            {"object": "list", "data": [self._model(n, key, models[key]) for n, key in names if key in models]}
        )

    async def model(self, request: web.Request) -> web.StreamResponse:
        """One of them."""
        name, caller = request.match_info["id"], caller_of(request)
        key = self._pool.settings.key_of(name)
        if caller is not None and not caller.may_use(key):
            raise ModelNotFoundError(name)
        return _json(self._model(name, key, self._state(key)))

    def _state(self, key: str) -> dict[str, Any]:
        return {"tier": self._pool.tier(key).label, "expected_wait_s": round(self._pool.estimate_s(key), 3)}

    def _model(self, name: str, key: str, state: dict[str, Any]) -> dict[str, Any]:
        settings = self._pool.settings
        served = settings.served_name(key)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "warmpool",
            "root": served,
            "parent": served if name in settings.models[key].adapters else None,
            **state,
        }

    async def version(self, _: web.Request) -> web.StreamResponse:
        """Of warmpool: engines may be of several versions, and asleep."""
        return _json({"version": proxy.__version__})

    async def ping(self, _: web.Request) -> web.StreamResponse:
        """200 when requests are admitted, as SageMaker asks for it; engines are woken by requests, not by questions."""
        ready = self._pool.ready
        return web.Response(status=200 if ready else 503, headers=None if ready else RETRY)


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
