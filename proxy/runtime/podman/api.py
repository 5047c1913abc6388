"""podman's REST API on its unix socket (docs.podman.io, libpod).

Where nobody listens on the configured socket, a service of our own is started (`podman_service`). A call that could not
be sent is tried again while the service comes back, and so is one that may be repeated; another one that broke on the
way is not, since nobody knows how far it came: the caller looks. Every call has a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson

from proxy.errors import HostError, WarmpoolError
from proxy.runtime.podman.service import PodmanService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

API: Final = "http://podman/v4.0.0/libpod"
"""Understood by podman 4 and 5."""
_PATIENCE_S: Final = 10.0
_RETRY_S: Final = 0.05


class PodmanError(WarmpoolError):
    """podman refused; `status` is that of HTTP, 0 when the service could not be reached or broke the connection."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class PodmanSilentError(PodmanError):
    """podman did not answer in time; whether it does what it was asked, nobody knows."""

    def __init__(self, call: str, limit_s: float) -> None:
        super().__init__(
            504,
            f"{call}: podman's service did not answer within {limit_s:.3g} s; see whether `podman ps` answers, "
            "and raise runtime.podman.timeout if it is only slow",
        )


class Podman:
    """Calls to podman's service. `open` before use."""

    def __init__(self, socket: Path, own_socket: Path, *, timeout_s: float, oci_runtime: Path | None = None) -> None:
        """`timeout_s`: how long an answer may take, beside the time that the work of a call takes.

        With an `oci_runtime`, which podman can only be told at its start, the service is always one of our own.
        """
        self._socket = socket
        self._own_socket = own_socket
        self._timeout_s = timeout_s
        self._oci_runtime = oci_runtime
        self._session: aiohttp.ClientSession | None = None
        self.service: PodmanService | None = None
        """The one of our own."""

    async def open(self) -> None:
        """Connect. Raises HostError when there is neither a service nor a podman to start one, or it says nothing."""
        socket = self._socket
        if self._oci_runtime is not None or not await _listens(socket, self._timeout_s):
            if shutil.which("podman") is None:
                raise HostError("podman is not installed (make host, or your distribution's package)")
            socket = self._own_socket
            self.service = PodmanService(socket.absolute(), silent_s=self._timeout_s, oci_runtime=self._oci_runtime)
            self.service.start()
        self._session = aiohttp.ClientSession(
            # A kept connection would break with a service that was restarted; a new one waits for it.
            connector=aiohttp.UnixConnector(str(socket), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),  # each call has its own
        )
        try:
            await self.get("/_ping", raw=True)
        except PodmanError as error:
            await self.close()
            raise HostError(f"podman's service on {socket}: {error}") from error

    async def close(self) -> None:
        """Disconnect, and end the service if we started it."""
        service, self.service = self.service, None
        session, self._session = self._session, None
        if service is not None:
            await service.close()
        if session is not None:
            await session.close()

    async def get(self, path: str, *, raw: bool = False, **query: str) -> Any:
        """A GET; the answer as JSON, or as bytes."""
        return await self._call("GET", path, query, None, raw=raw, repeatable=True)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        repeatable: bool = False,
        work_s: float = 0.0,
        **query: str,
    ) -> Any:
        """A POST; the answer as JSON, None without one.

        `repeatable`: sent again when the service broke off. `work_s`: what the work may take, beside the answer.
        """
        return await self._call("POST", path, query, body, repeatable=repeatable, work_s=work_s)

    async def delete(self, path: str, **query: str) -> Any:
        """A DELETE."""
        return await self._call("DELETE", path, query, None, repeatable=True)

    async def lines(self, url: str, *, silence_s: float, **query: str) -> AsyncIterator[dict[str, Any]]:
        """The objects that a POST answers with, a line each, as they come. Raises PodmanError.

        `url`: whole, since those of podman's Docker-compatible calls are not below `API`. `silence_s`: how long it may
        say nothing.
        """
        if self._session is None:
            raise PodmanError(0, f"POST {url}: not connected to podman's service any more")
        timeout = aiohttp.ClientTimeout(total=None, sock_read=silence_s)
        try:
            async with self._session.post(url, params=query, timeout=timeout) as response:
                if response.status >= 400:
                    raise PodmanError(response.status, _message(await response.read()))
                async for line in response.content:
                    if line.strip():
                        yield _object(line)
        except TimeoutError:
            raise PodmanSilentError(f"POST {url}", silence_s) from None
        except aiohttp.ClientError as error:
            raise PodmanError(0, f"POST {url}: the service broke off: {error}") from error

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        *,
        repeatable: bool,
        work_s: float = 0.0,
        raw: bool = False,
    ) -> Any:
        """Raises PodmanError. 304, which says that it is so already, is no error."""
        limit_s = self._timeout_s + work_s
        try:
            async with asyncio.timeout(limit_s):
                status, content = await self._sent(method, path, query, body, repeatable=repeatable)
        except TimeoutError:
            raise PodmanSilentError(f"{method} {path}", limit_s) from None
        if status >= 400:
            raise PodmanError(status, _message(content))
        if raw:
            return content
        try:
            return orjson.loads(content) if content.strip() else None
        except orjson.JSONDecodeError as error:
            raise PodmanError(0, f"{method} {path}: the answer is not JSON: {error}") from error

    async def _sent(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None, *, repeatable: bool
    ) -> tuple[int, bytes]:
        """Status and content of the answer, tried again where that does no harm."""
        if self._session is None:
            raise PodmanError(0, f"{method} {path}: not connected to podman's service any more")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE_S
        data = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        while True:
            try:
                async with self._session.request(
                    method, API + path, params=query, data=data, headers=headers
                ) as response:
                    return response.status, await response.read()
            except aiohttp.ClientConnectorError as error:
                if loop.time() > deadline:
                    raise PodmanError(0, f"nobody listens: {error}") from error
            except aiohttp.ClientError as error:
                if not repeatable or loop.time() > deadline:
                    raise PodmanError(0, f"{method} {path}: the service broke off: {error}") from error
            await asyncio.sleep(_RETRY_S)


async def _listens(socket: Path, limit_s: float) -> bool:
    """Whether somebody does; one with whom no connection comes about in time does too, and will say nothing."""
    try:
        async with asyncio.timeout(limit_s):
            _, writer = await asyncio.open_unix_connection(str(socket))
    except TimeoutError:
        return True
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise PodmanError(0, f"the answer is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _message(content: bytes) -> str:
    """podman's own words, in one line."""
    try:
        answer = orjson.loads(content)
        text = answer["message"] if isinstance(answer, dict) else content
    except (orjson.JSONDecodeError, KeyError):
        text = content
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return " ".join(text.split())[:1000] or "no message"
