"""What hosts say to one another: each its own state, again and again; nobody keeps anything for another.

`PREFIX.state.HOST`: what it offers, every two seconds, when somebody asks for it, and what changes at most every 0.2 s.
`PREFIX.use.HOST`: what the holders of keys have used there. `PREFIX.again.HOST` asks that host to say everything again,
`PREFIX.hello` all hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final

from proxy.fleet import record
from proxy.fleet.key_use import KeyUses
from proxy.fleet.record import RecordError
from proxy.fleet.table import Taken

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from proxy.fleet.bus import Bus
    from proxy.fleet.key_use import KeyLimits
    from proxy.fleet.own_record import OwnRecord
    from proxy.fleet.record import Offer
    from proxy.fleet.table import Table

log = logging.getLogger("warmpool.fleet")

FULL_S: Final = 2.0
COALESCE_S: Final = 0.2
_USE_S: Final = 1.0
_ASK_S: Final = 1.0
"""A host is asked to say everything again at most this often."""
_WARN_S: Final = 60.0


class Directory:
    """Publishes what this host offers, and fills the table with what the others do.

    `offers` reads this host's, `aliases` other names of its models, `draining` whether it takes no requests; `count`
    is told what became of each record.
    """

    def __init__(
        self,
        prefix: str,
        own: OwnRecord,
        table: Table,
        bus: Bus,
        *,
        offers: Callable[[], Awaitable[Mapping[str, Offer]]],
        draining: Callable[[], bool],
        aliases: Callable[[], Mapping[str, str]] = dict,
        count: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefix = prefix
        self._own = own
        self._table = table
        self._bus = bus
        self._offers = offers
        self._draining = draining
        self._aliases = aliases
        self._count = count
        self._clock = clock
        self._changed = asyncio.Event()
        self._full_wanted = True
        self._asked: dict[str, float] = {}
        self._warned: dict[str, float] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._uses: KeyUses | None = None
        self._uses_loop: asyncio.Task[None] | None = None

    def share_limits(self, limits: KeyLimits) -> None:
        """Have the limits of keys hold for all hosts together; before it is opened."""
        self._uses = KeyUses(self._own.host, self._own.boot, limits, self._clock)

    def open(self) -> None:
        """Begin."""
        self._bus.open(
            {
                f"{self._prefix}.state.*": self._heard,
                f"{self._prefix}.again.{self._own.host}": self._asked_again,
                f"{self._prefix}.hello": self._asked_again,
                f"{self._prefix}.use.*": self._used,
            },
            self._connection_changed,
        )
        self._table.deaf()
        self._loop = asyncio.create_task(self._publish_always(), name="fleet: publish")
        self._uses_loop = asyncio.create_task(self._publish_uses(), name="fleet: use of keys")

    async def close(self) -> None:
        """Say that nothing is offered any more, and end."""
        loop, self._loop = self._loop, None
        if self._uses_loop is not None:
            self._uses_loop.cancel()
        if loop is not None:
            loop.cancel()
            await asyncio.wait([loop])
            last = self._own.everything({}, drain=True)
            await self._bus.publish(self._subject, last.encoded())
        for task in [*self._tasks]:
            task.cancel()
        await self._bus.close()

    def note_change(self) -> None:
        """What this host offers may have changed."""
        self._changed.set()

    @property
    def connected(self) -> bool:
        """Whether the bus is."""
        return self._bus.connected

    # --- saying ---

    @property
    def _subject(self) -> str:
        return f"{self._prefix}.state.{self._own.host}"

    async def _publish_always(self) -> None:
        next_full = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, next_full - self._clock())):
                    await self._changed.wait()
            self._changed.clear()
            began = self._clock()
            full = self._full_wanted or began >= next_full
            if full:
                next_full = began + FULL_S
            try:
                await self._publish(full=full)
            except Exception:
                log.exception("cannot publish what this host offers")
            self._table.forget_old()
            await asyncio.sleep(COALESCE_S)

    async def _publish(self, *, full: bool) -> None:
        if not self._bus.connected:
            return
        offers, drain = await self._offers(), self._draining()
        if full:
            self._full_wanted = False
            said = self._own.everything(offers, drain=drain, aliases=self._aliases())
        else:
            changes = self._own.changes(offers, drain=drain)
            if changes is None:
                return
            said = changes
        data = said.encoded()
        if len(data) > record.MOST_BYTES:
            self._warn(
                "size", f"what this host offers takes {len(data)} bytes, over {record.MOST_BYTES}: not published"
            )
        elif not await self._bus.publish(self._subject, data):
            self._full_wanted = True

    async def _publish_uses(self) -> None:
        while self._uses is not None:
            await asyncio.sleep(_USE_S)
            if self._bus.connected and (message := self._uses.message()) is not None:
                await self._bus.publish(f"{self._prefix}.use.{self._own.host}", message)

    def _asked_again(self, _subject: str, _data: bytes) -> None:
        self._full_wanted = True
        self._changed.set()

    def _connection_changed(self, connected: bool) -> None:
        if connected:
            self._table.hears()
            self._asked.clear()
            self._asked_again("", b"")
            self._send(f"{self._prefix}.hello")
        else:
            self._table.deaf()

    def _send(self, subject: str) -> None:
        task = asyncio.create_task(self._bus.publish(subject, b""))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- hearing ---

    def _used(self, subject: str, data: bytes) -> None:
        host = subject.rpartition(".")[2]
        if self._uses is None or host == self._own.host:
            return
        try:
            self._uses.take(host, data)
        except RecordError as error:
            self._count("unreadable")
            self._warn("use", f"what keys have used on another host is ignored: {error}")

    def _heard(self, subject: str, data: bytes) -> None:
        host = subject.rpartition(".")[2]
        try:
            said = record.parse(data)
            if said.host != host:
                self._count("forged")
                self._warn("forged", "a record was published under another host's name, and is ignored")
                return
            if host == self._own.host:
                if said.boot != self._own.boot:
                    self._count("twice")
                    self._warn("own", f"another process publishes as {host}, which is this host's name")
                return
            taken = self._table.take(said)
        except RecordError as error:
            self._count("unreadable")
            known = self._table.hosts.get(host)
            self._warn("unreadable", f"a record of {known.name if known is not None else 'a host'} is ignored: {error}")
            return
        self._count(taken.name.lower())
        if taken is Taken.GAP:
            self._ask(host)
        elif taken is Taken.TWICE:
            self._warn(f"twice {host}", f"two processes publish as {host}: each host needs a name of its own")
        elif taken is Taken.NEWER_VERSION:
            self._warn(f"version {host}", f"{host} speaks version {said.version}, which is not known here: not used")

    def _ask(self, host: str) -> None:
        now = self._clock()
        if now >= self._asked.get(host, 0.0) + _ASK_S:
            self._asked[host] = now
            self._send(f"{self._prefix}.again.{host}")

    def _warn(self, about: str, what: str) -> None:
        now = self._clock()
        if now >= self._warned.get(about, -_WARN_S) + _WARN_S:
            if len(self._warned) > 1000:  # anybody on the bus may choose names
                self._warned.clear()
            self._warned[about] = now
            log.warning("%s", what)
