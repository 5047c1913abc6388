"""`/admin/events`: the status as server-sent events, a snapshot first and then what changes.

Changes are JSON merge patches (RFC 7386) to the snapshot. One task makes them for all listeners, and only while there
are any. Each listener has a bounded queue: one that reads too slowly gets a new snapshot instead of what it missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from proxy.errors import DrainingError, QueueFullError
from proxy.host.turns import in_turns
from proxy.server.admin import pieces

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger("warmpool.admin")

QUEUE_LENGTH: Final = 32
MAX_LISTENERS: Final = 64
HEARTBEAT_S: Final = 15.0
_PAUSE_S: Final = 0.2
"""Between two changes, however fast things change."""
_TURN: Final = 10
"""How many models are compared in one turn of the event loop."""
_REFRESH_S: Final = 5.0
"""How often is looked at what changes without a word, as memory does."""


class Events:
    """Tells listeners of changes to a status.

    `read` gives it as JSON-like data; `listen` calls back when it may have changed and returns what ends that; once
    `over` says so, every stream ends.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[dict[str, Any]]],
        listen: Callable[[Callable[[], None]], Callable[[], None]],
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._read = read
        self._over = over
        self._listen = listen
        self._queues: set[asyncio.Queue[bytes | None]] = set()
        self._last: dict[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Answer with events until the client leaves or the server ends."""
        if self._closed or self._over():
            raise DrainingError("The server is shutting down.")
        if len(self._queues) >= MAX_LISTENERS:
            raise QueueFullError(f"{MAX_LISTENERS} listeners are connected already.", retry_after_s=_REFRESH_S)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_LENGTH)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        try:
            self._queues.add(queue)
            if self._last is not None:
                queue.put_nowait(_event("snapshot", self._last | {"now_unix_s": time.time()}))
            elif self._task is None:
                self._task = asyncio.create_task(self._watch(), name="admin events")
            await response.prepare(request)
            await self._pass_on(queue, response)
        except ConnectionError:
            pass  # the client left
        finally:
            self._queues.discard(queue)
        return response

    async def _pass_on(self, queue: asyncio.Queue[bytes | None], response: web.StreamResponse) -> None:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    event = await queue.get()
            except TimeoutError:
                event = b": still here\n\n"
            if event is None:
                return
            await pieces.write(response, event)

    async def _watch(self) -> None:
        """Compare and tell until nobody listens any more."""
        changed = asyncio.Event()
        silence = self._listen(changed.set)
        try:
            while self._queues and not self._over():
                changed.clear()
                now = await self._read()
                if self._last is None:
                    self._send(_event("snapshot", now | {"now_unix_s": time.time()}))
                elif patch := await patch_in_turns(self._last, now):
                    self._send(_event("change", patch), or_else=now)
                self._last = now
                await asyncio.sleep(_PAUSE_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REFRESH_S):
                        await changed.wait()
        except Exception:
            log.exception("the status cannot be told")
        finally:
            silence()
            self._last = self._task = None
            self._end()  # over, or failed: then clients come again

    def _send(self, event: bytes, or_else: dict[str, Any] | None = None) -> None:
        """Put an event into every queue; into a full one, a new snapshot instead of all that is in it."""
        snapshot: bytes | None = None
        for queue in self._queues:
            if queue.full():
                snapshot = snapshot or _event("snapshot", (or_else or {}) | {"now_unix_s": time.time()})
                _empty(queue)
                queue.put_nowait(snapshot)
            else:
                queue.put_nowait(event)

    def _end(self) -> None:
        for queue in self._queues:
            if queue.full():
                _empty(queue)
            queue.put_nowait(None)

    async def close(self, _: object = None) -> None:
        """End every stream; for `on_shutdown`."""
        self._closed = True
        self._end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


def _empty(queue: asyncio.Queue[bytes | None]) -> None:
    while not queue.empty():
        queue.get_nowait()


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(data))


def merge_patch(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What turns `old` into `new` (RFC 7386): new values, and null for what is gone; lists are replaced whole."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := merge_patch(before, value):
                patch[name] = inner
        elif name not in old or before != value:
            patch[name] = value
    return patch


async def patch_in_turns(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """As `merge_patch`, for what holds many objects: a few of them in one turn of the event loop."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if not (isinstance(value, dict) and isinstance(before, dict)):
            patch |= merge_patch({name: before} if name in old else {}, {name: value})
            continue
        inner: dict[str, Any] = {each: None for each in before if each not in value}
        async for each in in_turns(value, _TURN):
            was = {each: before[each]} if each in before else {}
            inner |= merge_patch(was, {each: value[each]})
        if inner:
            patch[name] = inner
    return patch
