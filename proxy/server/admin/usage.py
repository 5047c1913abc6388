"""`/admin/usage`: what the holders of keys have used, by day, key and model, and what they may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.errors import InvalidRequestError
from proxy.server.admin import pieces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import web

    from proxy.server.auth.authorization import Auth
    from proxy.server.key_usage.recorder import KeyUsage

_MOST_DAYS: Final = 3660


class UsageHandlers:
    """The answer."""

    def __init__(self, usage: KeyUsage, auth: Auth) -> None:
        self._usage, self._auth = usage, auth

    async def show(self, request: web.Request) -> web.StreamResponse:
        """Of the last days that the query asks for, today by default; days begin at midnight UTC."""
        days, key = _asked(request.query)
        body = orjson.dumps(await self.read(days, key))
        return await pieces.answer(request, body, {"Content-Type": "application/json"})

    async def read(self, days: int = 1, key: str | None = None) -> dict[str, Any]:
        """What it says."""
        rows = [row for row in await self._usage.rows(days) if key is None or row["key"] == key]
        budgets = {name: entry for name, entry in self._auth.budgets().items() if key is None or name == key}
        return {
            "days": days,
            "next_day_in_s": round(self._usage.seconds_to_midnight(), 1),
            "rows": rows,
            "budgets": {name: self._budget(name, limits) for name, limits in budgets.items()},
        }

    def _budget(self, name: str, limits: Mapping[str, int | None]) -> dict[str, Any]:
        used = self._usage.today(name)
        return {**limits, "tokens_today": used.tokens, "gpu_seconds_today": round(used.gpu_seconds, 3)}


def _asked(query: Mapping[str, str]) -> tuple[int, str | None]:
    """How many days, and of which key. Raises InvalidRequestError."""
    for name in query:
        if name not in ("days", "key"):
            raise InvalidRequestError(f"There is no filter {name!r}; there are: days, key.", param=name)
    days = query.get("days", "1")
    if not days.isdecimal() or len(days) > 4 or not 1 <= int(days) <= _MOST_DAYS:
        raise InvalidRequestError(f"days is a number from 1 to {_MOST_DAYS}.", param="days")
    return int(days), query.get("key")
