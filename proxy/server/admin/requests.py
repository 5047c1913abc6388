"""`/admin/requests`: who asks, and what becomes of it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from proxy.errors import InvalidRequestError
from proxy.server.admin.commands import read_body
from proxy.server.request_history import KEPT, LIVE, STATES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.server.request_history import RequestHistory

_FIELDS: Final = ("model", "key", "host", "tier", "instance", "path", "id")
"""A request must have these values, where they are asked for."""
_MOST: Final = 10_000


class RequestHandlers:
    """The list, and what ends one of them."""

    def __init__(self, history: RequestHistory) -> None:
        self._history = history

    async def show(self, request: web.Request) -> web.StreamResponse:
        """Those that the query asks for."""
        wanted, limit = _filter(request.query)
        rows = (row for row in self._history.rows() if all(row[name] in values for name, values in wanted.items()))
        return _json({"requests": [*islice(rows, limit)]})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """End one: before its answer has begun with an error, within it by breaking the connection."""
        await read_body(request)
        self._history.cancel(request.match_info["id"])
        return _json({"id": request.match_info["id"], "command": "cancel", "done": True})


def _filter(query: Mapping[str, str]) -> tuple[dict[str, tuple[object, ...]], int]:
    """What rows must have, and how many. Raises InvalidRequestError."""
    wanted: dict[str, tuple[object, ...]] = {}
    limit = KEPT
    for name, value in query.items():
        if name == "state":
            if value not in (*STATES, "live"):
                raise InvalidRequestError(f"state is one of: live, {', '.join(STATES)}.", param="state")
            wanted[name] = LIVE if value == "live" else (value,)
        elif name in ("status", "limit"):
            if not value.isdecimal() or len(value) > 6:
                raise InvalidRequestError(f"{name} is a number.", param=name)
            if name == "limit":
                limit = min(int(value), _MOST)
            else:
                wanted[name] = (int(value),)
        elif name in _FIELDS:
            wanted[name] = (value,)
        else:
            raise InvalidRequestError(
                f"There is no filter {name!r}; there are: state, status, limit, {', '.join(_FIELDS)}.", param=name
            )
    return wanted, limit


def _json(value: dict[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
