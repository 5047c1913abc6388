"""A client of a running warmpool's control API, for the command line.

The address comes from the same configuration that the server uses, or from `--url`.
"""

from __future__ import annotations

import os
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote

import aiohttp
import orjson

from proxy.config.masking import mask_urls
from proxy.errors import HostError, WarmpoolError
from proxy.server.auth import api_keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from proxy.config.server import ServerSettings

_CONNECT_S: Final = 5.0
_SILENCE_S: Final = 45.0
"""Events come every 15 s at least, if only to say that the server is there."""
_LONGEST_EVENT_BYTES: Final = 16 << 20
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - to be reached, not to listen


class ControlError(WarmpoolError):
    """The server refused what was asked of it; the text is its own."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and what shows it that we may give commands."""

    url: str
    token: str | None = None
    socket: Path | None = None
    """The unix socket to go by instead of the network."""
    certificate: Path | None = None
    """The server's own, which is the one to trust."""

    @property
    def shown(self) -> str:
        """For people."""
        return str(self.socket) if self.socket is not None else mask_urls(self.url)


def address_of(server: ServerSettings) -> Address:
    """Where the server of a configuration listens, and how to come in: by its admin socket, or with its admin token.

    Raises HostError where the configuration does not say, ConfigError where the token cannot be read.
    """
    if server.admin.socket is not None:
        return Address("http://localhost", socket=server.admin.socket)
    if server.port == 0:
        raise HostError("server.port is 0, so that any port may be the server's: name it with --url")
    host = _EVERYWHERE.get(server.host, server.host)
    scheme = "https" if server.tls.certificate is not None else "http"
    token = api_keys.read_token(server.admin.token_file).decode() if server.admin.token_file is not None else None
    url = f"{scheme}://[{host}]:{server.port}" if ":" in host else f"{scheme}://{host}:{server.port}"
    return Address(url, token, certificate=server.tls.certificate)


class Control:
    """A connection to one server; `async with` it.

    Methods raise HostError when nobody answers and ControlError when the server refuses.
    """

    def __init__(self, address: Address) -> None:
        self._address = address

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._address.token}"} if self._address.token else {}
        self._session = aiohttp.ClientSession(
            connector=self._connector(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            read_bufsize=_LONGEST_EVENT_BYTES,
        )
        return self

    def _connector(self) -> aiohttp.BaseConnector:
        if self._address.socket is not None:
            return aiohttp.UnixConnector(str(self._address.socket))
        if self._address.certificate is None:
            return aiohttp.TCPConnector()
        # It is the very certificate that counts, whatever name it was made for and whoever signed it.
        context = ssl.create_default_context(cafile=str(self._address.certificate))
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return aiohttp.TCPConnector(ssl=context)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def status(self) -> dict[str, Any]:
        """What `/admin/status` says."""
        async with self._request("GET", "/admin/status") as response:
            return await _object(response)

    async def command(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Give a command, such as `models/demo/wake`; the server's answer to it."""
        async with self._request("POST", f"/admin/{path}", json=body) as response:
            return await _object(response)

    async def requests(self, filters: Mapping[str, str]) -> dict[str, Any]:
        """What `/admin/requests` says of those that have these values."""
        async with self._request("GET", "/admin/requests", params=dict(filters)) as response:
            return await _object(response)

    async def fleet(self) -> dict[str, Any]:
        """What `/admin/fleet` says."""
        async with self._request("GET", "/admin/fleet") as response:
            return await _object(response)

    async def usage(self, days: int, key: str | None) -> dict[str, Any]:
        """What `/admin/usage` says."""
        query = {"days": str(days)} | ({} if key is None else {"key": key})
        async with self._request("GET", "/admin/usage", params=query) as response:
            return await _object(response)

    async def cancel(self, request_id: str) -> None:
        """End a request."""
        await self.command(f"requests/{quote(request_id, safe='')}/cancel", {})

    async def statuses(self) -> AsyncIterator[dict[str, Any]]:
        """The status now, and after each change, until the server ends."""
        status: dict[str, Any] = {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        async with self._request("GET", "/admin/events", timeout=timeout) as response:
            name = ""
            async for line in response.content:
                field, _, value = line.rstrip(b"\n").partition(b": ")
                if field == b"event":
                    name = value.decode()
                elif field == b"data":
                    data = orjson.loads(value)
                    status = data if name == "snapshot" else apply_patch(status, data)
                    yield status

    @asynccontextmanager
    async def _request(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.request(method, self._address.url + path, **options) as response:
                if response.status >= 400:
                    raise ControlError(_reason(response.status, await response.read()))
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
            plain = os.strerror(cause.errno) if isinstance(cause, ConnectionError) and cause.errno else None
            reason = plain or str(error) or type(error).__name__
            raise HostError(
                f"no warmpool answers at {self._address.shown} ({reason}). Start it with `warmpool serve`, or name "
                "another one with --config or --url"
            ) from error


async def _object(response: aiohttp.ClientResponse) -> dict[str, Any]:
    try:
        answer = orjson.loads(await response.read())
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        raise ControlError(f"{mask_urls(str(response.url))} answered something that is not of warmpool")
    return answer


def _reason(status: int, body: bytes) -> str:
    """What an error envelope says, or at least the status."""
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"the server answered {status} without saying why"


def apply_patch(old: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`old` with a JSON merge patch (RFC 7386) applied; `old` stays as it is."""
    new = dict(old)
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        elif isinstance(value, dict):
            before = new.get(name)
            new[name] = apply_patch(before if isinstance(before, dict) else {}, value)
        else:
            new[name] = value
    return new
