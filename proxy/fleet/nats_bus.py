"""The bus on NATS: its client from the extra `fleet`.

Every wait is bounded here. Nothing is sent while there is no connection: what was true then is said again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import ConfigError, HostError
from proxy.host import private_files

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from nats.aio.client import Client

    from proxy.config.fleet import NatsSettings
    from proxy.fleet.bus import Handler

log = logging.getLogger("warmpool.fleet")

_CONNECT_S: Final = 2
_ROUND_S: Final = 15.0
"""How long one try of all servers may take."""
_RETRY_S: Final = (0.5, 1.0, 2.0, 5.0)
_PING_S: Final = 2
_PUBLISH_S: Final = 2.0
_CLOSE_S: Final = 2.0
_PENDING_MESSAGES: Final = 4096
_PENDING_BYTES: Final = 16 << 20
"""What may wait to be taken in; more is dropped, and shows as a gap."""


class NatsBus:
    """A connection to the first server that answers."""

    def __init__(self, settings: NatsSettings, host: str, tls: ssl.SSLContext | None) -> None:
        """Reads the password. Raises ConfigError, and HostError where the extra is not installed."""
        try:
            import nats.aio.client
        except ImportError:
            raise HostError("[fleet] needs the extra fleet (make install EXTRAS=fleet)") from None
        self._make: Callable[[], Client] = nats.aio.client.Client
        self._settings = settings
        self._servers = settings.servers or []
        self._host = host
        self._tls = tls if any(server.startswith("tls://") for server in self._servers) else None
        self._password = _password(settings.password_file) if settings.password_file is not None else None
        self._client: Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._said: str | None = None

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    def open(self, handlers: Mapping[str, Handler], changed: Callable[[bool], None]) -> None:
        self._task = asyncio.create_task(self._stay_connected(handlers, changed), name="fleet: NATS")

    async def _stay_connected(self, handlers: Mapping[str, Handler], changed: Callable[[bool], None]) -> None:
        tries = 0
        while True:
            self._lost.clear()
            try:
                async with asyncio.timeout(_ROUND_S):
                    self._client = await self._connect(handlers)
            except Exception as error:  # noqa: BLE001 - whatever it was: it is tried again
                self._say(f"no NATS server can be used: {_reason(error)}")
                await self._drop()
                await asyncio.sleep(_RETRY_S[min(tries, len(_RETRY_S) - 1)])
                tries += 1
                continue
            tries, self._said = 0, None
            log.info("NATS: connected to %s", _shown(self._client))
            changed(True)
            await self._lost.wait()
            changed(False)
            await self._drop()

    async def _connect(self, handlers: Mapping[str, Handler]) -> Client:
        client = self._make()
        self._client = client

        async def lost() -> None:
            if client is self._client:
                self._say("the connection to NATS is lost: hosts are known by what they said last")
                self._lost.set()

        async def failed(error: Exception) -> None:
            self._say(f"NATS: {_reason(error)}")

        # Reconnecting is done here, where every wait has a bound; the client's own has none for a server that hangs.
        await client.connect(
            servers=self._servers, name=f"warmpool {self._host}", error_cb=failed, disconnected_cb=lost,
            closed_cb=lost, allow_reconnect=False, connect_timeout=_CONNECT_S, ping_interval=_PING_S,
            max_outstanding_pings=2, dont_randomize=True, no_echo=True, tls=self._tls,
            user=self._settings.user or self._host if self._password is not None else None, password=self._password,
        )  # fmt: skip
        for subject, handler in handlers.items():
            await client.subscribe(
                subject, cb=_receiver(handler), pending_msgs_limit=_PENDING_MESSAGES, pending_bytes_limit=_PENDING_BYTES
            )
        await client.flush(timeout=_CONNECT_S)
        return client

    async def publish(self, subject: str, data: bytes) -> bool:
        client = self._client
        if client is None or not client.is_connected or self._lost.is_set():
            return False
        try:
            async with asyncio.timeout(_PUBLISH_S):
                await client.publish(subject, data)
        except Exception as error:  # noqa: BLE001 - whatever it was: it is said again
            self._say(f"NATS: cannot publish: {_reason(error)}")
            return False
        return True

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CLOSE_S):
                    await client.close()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=_CLOSE_S)
        await self._drop()

    def _say(self, what: str) -> None:
        """Log a problem once, until it is another one."""
        if what != self._said:
            self._said = what
            log.warning("%s", what)


def _receiver(handler: Handler) -> Callable[[Any], Awaitable[None]]:
    async def receive(message: Any) -> None:
        handler(message.subject, message.data)

    return receive


def _password(path: Path) -> str:
    found = private_files.read(path, f"chmod 600 {path}").strip()
    if not found:
        raise ConfigError("fleet.nats", [f"{path} is empty"])
    return found


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _shown(client: Client) -> str:
    url = client.connected_url
    return url.netloc.rpartition("@")[2] if url is not None else "a server"
