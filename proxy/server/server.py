"""Serving: from the listening socket to the last byte of the last answer, and the signals in between.

A restart loses nothing. Nobody is accepted before the pool is open; at the end accepting stops first, then whatever
was accepted is answered, within `server.drain_timeout`. Where the socket is the service manager's, connections made
in between wait in it for the next process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from proxy.doctor import preflight
from proxy.doctor.view import Host
from proxy.errors import ConfigError, HostError, RequestError
from proxy.host import daemon_thread
from proxy.pool import drill, renewal_schedule
from proxy.server import app, config_watch, listeners, safe_logging
from proxy.server.auth import api_keys
from proxy.server.auth.authorization import Auth
from proxy.server.tls import Tls
from proxy.systemd import notify

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from pathlib import Path

    from proxy.config.server import ServerSettings
    from proxy.config.settings import Settings
    from proxy.pool.pool import Pool
    from proxy.pool.usage import Usage
    from proxy.server.forced_exit import ForcedExit
    from proxy.systemd.notify import Manager
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool")

T = TypeVar("T")

_CLEANUP_S: Final = 2.0
_READ_S: Final = 10.0
_LINGER_S: Final = 0.25
"""How long, at the end, a connection that is open already may still bring a request."""
_STOP_RESERVE_S: Final = 10.0
"""What ending engines and runtimes may take beyond `drain_timeout`; the process ends after it, whatever hangs."""
_CLOSE_S: Final = 60.0
"""The same when no signal ended the server, but an error."""
_HURRY_S: Final = 1.0
"""The same after a second signal."""
_CLEANUP_RESERVE_S: Final = _CLEANUP_S + 0.5
"""What is left of any of them for connections."""


class Reloader:
    """Takes another configuration on at SIGHUP, one at a time; a bad one changes nothing.

    `load` reads the configuration anew; `also` read what else comes from files, whether it was good or not, so that a
    key is revoked all the same, and return what they could not read. No file is waited for longer than `_READ_S`.
    `changed` is called after a good one.
    """

    def __init__(
        self,
        pool: Pool,
        manager: Manager,
        load: Callable[[], Settings],
        also: Sequence[Callable[[], Awaitable[str]]] = (),
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._manager = manager
        self._load = load
        self._also = also
        self._changed = changed
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
                settings = await _read("the configuration", self._load)
                changes = await self._pool.reconfigure(settings)
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
                self._changed()
            unread = [await read() for read in self._also]
            self._manager.ready("; ".join((said, *filter(None, unread))))

    async def close(self) -> None:
        """Give up what is under way."""
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Preflight:
    """Says what would keep checkpoints from being written, before an engine has been started for one."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look, in the background, instead of a look that is under way."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._look(), name="preflight")

    async def _look(self) -> None:
        for problem in await preflight.problems(self._pool.settings, Host()):
            log.error("checkpoints will fail: %s", problem)

    async def close(self) -> None:
        """No more of it."""
        await _ended([self._task] if self._task is not None else [])


class _End:
    """The signals that end the server, and the time that is left then."""

    def __init__(self, pool: Pool, forced_exit: ForcedExit | None) -> None:
        self._pool = pool
        self._forced_exit = forced_exit
        self._serves = False
        self._end = math.inf
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()

    def on_signal(self) -> None:
        """The first or another signal to end came."""
        if self.stop.is_set():
            self.hurry.set()
            self._limit(_HURRY_S)
        else:
            drain_s = self._pool.settings.server.drain_timeout if self._serves else 0.0
            self._limit(drain_s + _STOP_RESERVE_S)
        self.stop.set()

    def _limit(self, limit_s: float) -> None:
        self._end = min(self._end, time.monotonic() + limit_s)
        if self._forced_exit is not None:
            self._forced_exit.within(limit_s)

    def left_s(self) -> float:
        """How long closing the pool may take."""
        left_s = min(self._end - time.monotonic(), _CLOSE_S)
        return max(left_s - _CLEANUP_RESERVE_S, left_s / 2)

    async def unless_stopped(self, opening: Coroutine[Any, Any, None]) -> bool:
        """Whether it came to its end before a signal to stop did. Raises what it raises."""
        task = asyncio.create_task(opening, name="open")
        await _first(asyncio.wait([task]), self.stop.wait())
        if not task.done():
            log.info("stopping before the start has ended")
            task.cancel()
            return False
        await task
        self._serves = True
        return True


async def serve(
    pool: Pool,
    settings: Settings,
    metrics: Metrics,
    *,
    load: Callable[[], Settings] | None = None,
    file: Path | None = None,
    manager: Manager | None = None,
    usage: Usage | None = None,
    forced_exit: ForcedExit | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish within `drain_timeout`.

    A second signal ends at once. `forced_exit` ends the process when it has not ended 10 s after `drain_timeout`, 1 s
    after a second signal. SIGHUP: the configuration is read again with `load`, and keys, admin token and
    certificates; where `server.watch` says so, also when `file` is another one. `manager` holds the sockets and hears
    of our state; None: that of the environment. `usage` is the pool's, read before and kept, and with it what keys
    have used; None: neither is.

    Raises ConfigError when one of these files cannot be used, HostError when the address cannot be had or a runtime
    cannot work.
    """
    manager = manager if manager is not None else notify.from_environment()
    end = _End(pool, forced_exit)
    seen = await config_watch.facts(file) if file is not None else None
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(safe_logging.note_loop_error)
    # Before the handlers: while files are read here, which may hang, signals end the process as they do by default.
    auth = Auth(settings, metrics)
    tls = Tls(settings.server.tls) if settings.server.tls.certificate is not None else None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.on_signal)
    # Until there is something to reload, SIGHUP must not end us.
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    files: list[Callable[[], Awaitable[str]]] = [
        partial(_read_again, "keys and admin token", auth.read, lambda found: auth.take(found, pool.settings.names()))
    ]
    if tls is not None:
        files.append(partial(_read_again, "certificates", tls.read, tls.take))
    peers_tls = Tls(settings.fleet.tls) if settings.fleet.host is not None else None
    if peers_tls is not None:
        files.append(partial(_read_again, "certificates of the fleet", peers_tls.read, peers_tls.take))
    in_the_way = _Preflight(pool)

    def changed() -> None:
        service.request_heads.forget()
        in_the_way.begin()

    reloader = Reloader(pool, manager, load or (lambda: settings), files, changed)
    usage_folder = settings.pool.state_dir.absolute() / "usage" if usage is not None else None
    service = app.build(pool, settings, metrics, auth, usage_folder=usage_folder)
    await service.open()
    watchdog = asyncio.create_task(manager.feed_watchdog(), name="watchdog")
    background: list[asyncio.Task[None]] = []
    sockets: Sequence[socket.socket] = ()
    sites: list[listeners.Site] = []
    try:
        sockets = _sockets(manager, settings.server)
        if settings.server.admin.socket is not None:
            sockets = [*sockets, listeners.admin_socket(settings.server.admin)]
        manager.status("adopting what an earlier process left")
        if not await end.unless_stopped(pool.open()):
            return
        context = tls.context if tls is not None else None
        sites += [listeners.site(service, sock, settings.server, context) for sock in sockets]
        if peers_tls is not None:
            peers = listeners.peers_site(service, settings.fleet, settings.server.limits, peers_tls.context)
            await peers.start()
            log.info("listening for other hosts on %s", peers.name)
        for site in sites:
            await site.start()
            log.info("listening on %s, models: %s", site.name, ", ".join(settings.names()))
            if usable := listeners.addresses(site, settings.server):
                log.info(usable)
        manager.ready(f"serving {len(settings.models)} models")
        loop.add_signal_handler(signal.SIGHUP, reloader.request)
        in_the_way.begin()
        if file is not None:
            watched = config_watch.watch(file, seen, lambda: pool.settings.server.watch, reloader.request)
            background.append(asyncio.create_task(watched, name="watch the configuration"))
        if usage is not None:
            background += [asyncio.create_task(usage.keep_saved()), asyncio.create_task(pool.prewarm(usage))]
            background.append(asyncio.create_task(renewal_schedule.keep_current(pool, usage)))
            background.append(asyncio.create_task(drill.keep_drilled(pool)))
        await end.stop.wait()
        await reloader.close()
        await in_the_way.close()
        await _ended(background)
        limit_s = pool.settings.server.drain_timeout
        log.info("stopping: running requests have up to %g s; a second signal stops at once", limit_s)
        manager.stopping(limit_s + _STOP_RESERVE_S)
        for site in sites:
            site.stop()
        service.traffic.stop()
        pool.begin_stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await _first(_all(service.traffic.ended(_LINGER_S), pool.settled()), end.hurry.wait())
    finally:
        await _ended([watchdog, *background])
        await reloader.close()
        await in_the_way.close()
        await pool.close(end.left_s())
        await service.close(_CLEANUP_S)
        for sock in sockets:
            sock.close()
        if sites or end.stop.is_set():  # else it has never begun
            log.info("stopped")


def _sockets(manager: Manager, server: ServerSettings) -> list[socket.socket]:
    """Those the service manager hands over, or our own. Raises HostError."""
    if not manager.sockets:
        return listeners.tcp_sockets(server)
    named = [sock.getsockname()[0] for sock in manager.sockets if sock.family != socket.AF_UNIX]
    listeners.refuse_open(server, named)
    return [*manager.sockets]


def check_files(server: ServerSettings) -> None:
    """Whether keys, admin token and certificates can be used. Raises ConfigError with every problem."""
    reads: list[Callable[[], object]] = []
    if server.keys_file is not None:
        reads.append(partial(api_keys.read, server.keys_file))
    if server.admin.token_file is not None:
        reads.append(partial(api_keys.read_token, server.admin.token_file))
    if server.tls.certificate is not None:
        reads.append(partial(Tls, server.tls))
    problems: list[str] = []
    for read in reads:
        try:
            read()
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError("server", problems)


async def _read(what: str, read: Callable[[], T]) -> T:
    """What a file says. Raises ConfigError, also where it does not come."""
    try:
        return await daemon_thread.run(read, _READ_S, f"read {what}")
    except TimeoutError:
        raise ConfigError(what, [f"cannot be read within {_READ_S:g} s: its file system does not answer"]) from None


async def _read_again(what: str, read: Callable[[], T], take: Callable[[T], None]) -> str:
    """Read files again; what cannot be used is logged and returned, and the old ones stay in force."""
    try:
        take(await _read(what, read))
    except ConfigError as error:
        log.error("%s are not read again: %s", what, error)
        return f"{what} are not read again: {error}"
    return ""


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            log.error("a task in the background failed: %r", result, exc_info=result)


async def _all(*waits: Awaitable[object]) -> None:
    await asyncio.gather(*waits)


async def _first(*waits: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
