"""`/admin/models/{model}/logs`: what a model's engines wrote, and go on to write."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aiohttp import web

from proxy.errors import InstanceNotFoundError, InvalidRequestError, QueueFullError
from proxy.runtime.log_files import LogFiles

if TYPE_CHECKING:
    from proxy.pool.pool import Pool

_LOOK_S: Final = 0.5
"""How often is looked for more."""
_SILENCE_S: Final = 15.0
"""After so long an empty line goes out, so that a client that has left is found."""
_MOST_LINES: Final = 10_000
_MOST_FOLLOWERS: Final = 32
_HEADERS: Final = {
    "Content-Type": "text/plain; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


class EngineLogHandlers:
    """Reads the files in the state folder, as `warmpool logs` does."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._followers = 0

    async def show(self, request: web.Request) -> web.StreamResponse:
        """The last lines; with `follow=1` what is added too, until the client leaves or the server ends."""
        key = self._pool.find(request.match_info["model"])
        lines, follow, instance = _wanted(request)
        if follow and self._followers >= _MOST_FOLLOWERS:
            raise QueueFullError(f"{_MOST_FOLLOWERS} clients follow logs already.", retry_after_s=5.0)
        folder = self._pool.settings.pool.state_dir.absolute() / "logs"
        async with LogFiles(folder, key, instance) as files:
            pieces = await files.begin(lines)
            if instance is not None and not files.found and not follow:
                raise InstanceNotFoundError(f"There is no log of an instance {instance!r} of {key!r}.")
            response = web.StreamResponse(headers=_HEADERS)
            await response.prepare(request)
            self._followers += follow
            try:
                await self._tell(response, files, pieces, follow=follow)
            except ConnectionError:
                pass  # the client has left
            finally:
                self._followers -= follow
        return response

    async def _tell(
        self, response: web.StreamResponse, files: LogFiles, pieces: list[tuple[str, bytes]], *, follow: bool
    ) -> None:
        last, silent_s = "", 0.0
        while True:
            for name, text in pieces:
                heading = b"" if name == last else b"==> %b <==\n" % name.encode()
                await response.write(heading + text.decode("utf-8", "replace").encode())
                last, silent_s = name, 0.0
            if not follow or self._pool.stopping:
                break
            await asyncio.sleep(_LOOK_S)
            silent_s += _LOOK_S
            if silent_s >= _SILENCE_S:
                await response.write(b"\n")
                silent_s = 0.0
            pieces = await files.go_on()
        await response.write_eof()


def _wanted(request: web.Request) -> tuple[int, bool, str | None]:
    """How many lines, whether to follow, of which instance. Raises InvalidRequestError."""
    query = request.query
    if unknown := [name for name in query if name not in ("lines", "follow", "instance")]:
        raise InvalidRequestError(
            f"There is no parameter {unknown[0]!r}; there are: lines, follow, instance.", param=unknown[0]
        )
    lines, follow = query.get("lines", "100"), query.get("follow", "0")
    if not lines.isdecimal() or len(lines) > 6:
        raise InvalidRequestError("lines is a number.", param="lines")
    if follow not in ("0", "1"):
        raise InvalidRequestError("follow is 0 or 1.", param="follow")
    return min(int(lines), _MOST_LINES), follow == "1", query.get("instance")
