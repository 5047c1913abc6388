"""A middleware of vLLM's API server that answers one path, and passes everything else on.

`GET /warmpool/reseed` says whether the workers can be reseeded: `{"reason": null}`, or why not. `POST`, with
hexadecimal digits as its body, does it: here and in all workers. Who asks does not choose the numbers: what the kernel
has to say goes in too. vLLM's own `/collective_rpc` would need its development mode, and does not reach this process.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from .randomness import reseed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Scope = dict[str, Any]
    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]

PATH = "/warmpool/reseed"
_MAX_BYTES = 1024
_EXTENSION = "warmpool_vllm.Worker"


class Frontend:
    """The middleware (asgi.readthedocs.io)."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        try:
            status, answer = await _asked(scope["method"], scope["app"].state, receive)
        except Exception as error:  # noqa: BLE001 - whatever it was, who asks must know
            status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _asked(method: str, state: Any, receive: Receive) -> tuple[int, dict[str, Any]]:
    reason = _why_not(state)
    if method == "GET":
        return 200, {"reason": reason}
    if method != "POST":
        return 405, {"error": "GET or POST"}
    entropy = f"{await _body(receive)} {os.urandom(32).hex()}"
    done = reseed(f"{entropy} API server")
    results = [] if reason else await state.engine_client.collective_rpc("warmpool_reseed", args=(entropy,))
    if failed := [result for result in results if not isinstance(result, dict) or "error" in result]:
        return 500, {"error": f"a worker: {failed[0]}"}
    return 200, {"reason": reason, "frontend": done, "workers": [result["reseeded"] for result in results]}


def _why_not(state: Any) -> str | None:
    """Why the workers cannot be reseeded."""
    parallel = getattr(getattr(state, "vllm_config", None), "parallel_config", None)
    extension = getattr(parallel or getattr(state, "args", None), "worker_extension_cls", None)
    if extension != _EXTENSION:
        return f"its workers have the extension {extension or 'none'}, not warmpool's"
    return None


async def _body(receive: Receive) -> str:
    body = bytearray()
    while len(body) <= _MAX_BYTES:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return str(body, "ascii")
    raise ValueError(f"more than {_MAX_BYTES} bytes")
