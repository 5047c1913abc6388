"""The load-test engine's API server as a middleware of vLLM's sees it: an ASGI application, with nothing behind it.

With `--middleware MODULE.CLASS` what such a class answers by itself is answered below `/warmpool/`, as by vLLM.
"""

from __future__ import annotations

import asyncio
import importlib
import types
from typing import TYPE_CHECKING, Any

from aiohttp import web

from loadtest.engine_wire import ApiError

if TYPE_CHECKING:
    from loadtest.engine_weights import Worker


class Frontend:
    """A middleware by its qualified name, before an application that knows no path."""

    def __init__(self, middleware: str, worker: Worker | None, extension: str | None) -> None:
        module, _, name = middleware.rpartition(".")
        self._middleware = getattr(importlib.import_module(module), name)(self._nothing)
        self._worker = worker
        parallel = types.SimpleNamespace(worker_extension_cls=extension)
        config = types.SimpleNamespace(parallel_config=parallel)
        state = types.SimpleNamespace(engine_client=self, vllm_config=config)
        self._app = types.SimpleNamespace(state=state)

    async def collective_rpc(self, method: str, *, args: tuple[str, ...] = ()) -> list[Any]:
        """As vLLM's engine client: what each worker answers."""
        assert self._worker is not None, "no worker has such a method"
        return [await asyncio.to_thread(self._worker.call, method, *args)]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """What the middleware answers."""
        sent: list[dict[str, Any]] = []
        body = await request.read()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": request.method, "path": request.path, "app": self._app}
        await self._middleware(scope, receive, send)
        head, tail = sent
        return web.Response(status=head["status"], body=tail["body"], content_type="application/json")

    @staticmethod
    async def _nothing(*_: object) -> None:
        raise ApiError(404, "NotFoundError", "Not Found")
