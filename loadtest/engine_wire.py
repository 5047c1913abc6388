"""How the load-test engine reads requests and answers errors: vLLM's envelope."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web


class ApiError(Exception):
    """An answer in vLLM's error envelope."""

    def __init__(self, status: int, type_: str, message: str, param: str | None = None) -> None:
        self.status, self.type, self.message, self.param = status, type_, message, param
        super().__init__(message)

    def response(self) -> web.Response:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return answer({"error": error}, self.status)


def bad(message: str, param: str | None = None) -> ApiError:
    """A request that cannot be answered."""
    return ApiError(400, "BadRequestError", message, param)


def answer(value: Any, status: int = 200) -> web.Response:
    """JSON."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name is not None else b""
    return head + b"data: " + orjson.dumps(value) + b"\n\n"


async def begin_stream(request: web.Request) -> web.StreamResponse:
    """The headers of a stream of events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


async def body_of(request: web.Request) -> Any:
    """The JSON of a body."""
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise bad(f"the body is not JSON: {error}") from error


async def object_of(request: web.Request) -> dict[str, Any]:
    """The JSON object of a body."""
    body = await body_of(request)
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object")
    return body
