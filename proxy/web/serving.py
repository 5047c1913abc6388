"""Serving: from the listening socket to the last byte of the last answer, and the signals in between.

A restart loses nothing. Nobody is accepted before the pool is open; at the end accepting stops first, then whatever
was accepted is answered, within `server.drain_timeout`. Where the socket is the service manager's, connections made
in between wait in it for the next process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from typing import TYPE_CHECKING, Final

from aiohttp import web

from proxy import service
from proxy.errors import ConfigError, HostError, RequestError
from proxy.web import app

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from proxy.config import ServerSettings, Settings
    from proxy.metrics import Metrics
    from proxy.pool import Pool
    from proxy.service import Manager

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("warmpool")

BACKLOG: Final = 4096
"""Connections that may wait to be accepted (net.core.somaxconn may allow fewer)."""
_CLEANUP_S: Final = 2.0
_LINGER_S: Final = 0.25
"""How long, at the end, a connection that is open already may still bring a request."""
_STOP_RESERVE_S: Final = 60.0
"""What ending engines and runtimes may take beyond `drain_timeout`."""


class Traffic:
    """The requests in flight, and what happens to their connections once we are stopping."""

    def __init__(self) -> None:
        self._open = 0
        self._stopping = False
        self._quiet, self._busy = asyncio.Event(), asyncio.Event()
        self._quiet.set()

    def attach(self, application: web.Application) -> None:
        """Count the requests of an application that is not started yet."""
        application.middlewares.insert(0, self._count)
        application.on_response_prepare.append(self._close_when_stopping)

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._open += 1
        self._busy.set()
        self._quiet.clear()
        try:
            return await handler(request)
        finally:
            self._open -= 1
            if self._open == 0:
                self._busy.clear()
                self._quiet.set()

    async def _close_when_stopping(self, _: web.Request, response: web.StreamResponse) -> None:
        if self._stopping:
            response.force_close()
            response.headers["Connection"] = "close"

    def stop(self) -> None:
        """From now on an answer is the last one of its connection."""
        self._stopping = True

    async def ended(self, linger_s: float) -> None:
        """Return when no request has been in flight for a while."""
        while True:
            await self._quiet.wait()
            try:
                async with asyncio.timeout(linger_s):
                    await self._busy.wait()
            except TimeoutError:
                return


class Reloader:
    """Takes another configuration on at SIGHUP, one at a time; a bad one changes nothing.

    `load` reads the configuration anew; `also` are told to read what else they have from files.
    """

    def __init__(
        self, pool: Pool, manager: Manager, load: Callable[[], Settings], also: Sequence[Callable[[], None]] = ()
    ) -> None:
        self._pool = pool
        self._manager = manager
        self._load = load
        self._also = also
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def request(self) -> None:
        """Begin, after the one under way."""
        task = asyncio.create_task(self._reload(), name="reload")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self) -> None:
        async with self._turn:
            self._manager.reloading()
            said = f"serving {len(self._pool.settings.models)} models"
            try:
                settings = await asyncio.to_thread(self._load)
                changes = await self._pool.reconfigure(settings)
                for read in self._also:
                    read()
            except (ConfigError, HostError, RequestError) as error:
                for line in str(error).splitlines():
                    log.error("reload: nothing was changed: %s", line)
                said += f"; the last reload failed: {error}"
            except Exception as error:
                log.exception("reload failed")
                said += f"; the last reload failed: {error!r}"
            else:
                log.info("reload: %s", changes)
                if changes.pending:
                    log.warning("reload: takes effect after a restart only: %s", ", ".join(changes.pending))
                said = f"serving {len(self._pool.settings.models)} models; reloaded: {changes}"
            self._manager.ready(said)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def serve(
    pool: Pool,
    settings: Settings,
    metrics: Metrics,
    *,
    load: Callable[[], Settings] | None = None,
    manager: Manager | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish within `drain_timeout`.

    A second signal ends at once. SIGHUP: the configuration is read again with `load`. `manager` holds the sockets and
    hears of our state; None: that of the environment.

    Raises HostError when the address cannot be had or a runtime cannot work.
    """
    manager = manager if manager is not None else service.from_environment()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    # Until there is something to reload, SIGHUP must not end us.
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    reloader = Reloader(pool, manager, load or (lambda: settings))
    traffic = Traffic()
    application = app.build(pool, settings, metrics)
    traffic.attach(application)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=_CLEANUP_S)
    await runner.setup()
    watchdog = asyncio.create_task(manager.feed_watchdog(), name="watchdog")
    sockets: Sequence[socket.socket] = ()
    try:
        sockets = manager.sockets or _listen(settings.server)
        manager.status("adopting what an earlier process left")
        await pool.open()
        sites = [web.SockSite(runner, sock, backlog=BACKLOG) for sock in sockets]
        for site in sites:
            await site.start()
        for address in runner.addresses:
            log.info("listening on http://%s, models: %s", _shown(address), ", ".join(settings.names()))
        manager.ready(f"serving {len(settings.models)} models")
        loop.add_signal_handler(signal.SIGHUP, reloader.request)
        await stop.wait()
        await reloader.close()
        limit_s = pool.settings.server.drain_timeout
        log.info("stopping: up to %g s for running requests, once more to stop at once", limit_s)
        manager.stopping(limit_s + _STOP_RESERVE_S)
        for site in sites:
            await site.stop()
        traffic.stop()
        pool.begin_stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await _first(_all(traffic.ended(_LINGER_S), pool.settled()), hurry.wait())
    finally:
        watchdog.cancel()
        await reloader.close()
        await pool.close()
        await runner.cleanup()
        for sock in sockets:
            sock.close()
        log.info("stopped")


def _listen(settings: ServerSettings) -> list[socket.socket]:
    """A socket of our own, listening already: clients wait in it while the pool opens."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets: list[socket.socket] = []
        for family, _, _, _, address in dict.fromkeys(found):
            sock = socket.create_server(
                address[:2], family=family, backlog=BACKLOG, reuse_port=False, dualstack_ipv6=False
            )
            sock.setblocking(False)
            sockets.append(sock)
            if settings.port == 0:
                break  # another family would get another port
        return sockets
    except OSError as error:
        raise HostError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; set server.host and server.port"
        ) from error


def _shown(address: Sequence[object]) -> str:
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


async def _all(*waits: Awaitable[object]) -> None:
    await asyncio.gather(*waits)


async def _first(*waits: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
