"""podman's REST API on its unix socket (docs.podman.io, libpod), and the service behind it.

Where nobody listens on the configured socket, `podman system service` is started for us, on a socket of our own, and
started again when it ends. A call that could not be sent is tried again while the service comes back, and so is one
that may be repeated; another one that broke on the way is not, since nobody knows how far it came: the caller looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson

from proxy import owned
from proxy.errors import HostError, WarmpoolError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

log = logging.getLogger("warmpool.podman")

API: Final = "http://podman/v4.0.0/libpod"
"""Understood by podman 4 and 5."""
_PATIENCE_S: Final = 10.0
_RETRY_S: Final = 0.05


class PodmanError(WarmpoolError):
    """podman refused; `status` is that of HTTP, 0 when the service could not be reached or broke the connection."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Podman:
    """Calls to podman's service. `open` before use."""

    def __init__(self, socket: Path, own_socket: Path, *, oci_runtime: Path | None = None) -> None:
        """With an `oci_runtime`, which podman can only be told at its start, the service is always one of our own."""
        self._socket = socket
        self._own_socket = own_socket
        self._oci_runtime = oci_runtime
        self._session: aiohttp.ClientSession | None = None
        self._service: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect. Raises HostError when there is neither a service nor a podman to start one."""
        socket = self._socket
        if self._oci_runtime is not None or not await _listens(socket):
            if shutil.which("podman") is None:
                raise HostError("podman is not installed (make host, or your distribution's package)")
            socket = self._own_socket
            owned.clear_socket(socket.absolute(), even_if_heard=True)
            self._supervisor = asyncio.create_task(self._supervise(socket), name="podman service")
        self._session = aiohttp.ClientSession(
            # A kept connection would break with a service that was restarted; a new one waits for it.
            connector=aiohttp.UnixConnector(str(socket), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        try:
            await self.get("/_ping", raw=True)
        except PodmanError as error:
            await self.close()
            raise HostError(f"podman's service on {socket}: {error}") from error

    async def close(self) -> None:
        """Disconnect, and end the service if we started it."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _supervise(self, socket: Path) -> None:
        """Keep a service running; it ends with us, however we end (PR_SET_PDEATHSIG)."""
        tied = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
        options = ("--runtime", str(self._oci_runtime)) if self._oci_runtime is not None else ()
        while True:
            service = await asyncio.create_subprocess_exec(
                *tied, "podman", "--log-level", "error", *options, "system", "service", "--time", "0", f"unix://{socket}",
                stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._service = service
            try:
                status = await service.wait()
            except asyncio.CancelledError:
                with contextlib.suppress(ProcessLookupError):
                    service.terminate()
                await service.wait()
                raise
            log.warning("podman's service ended with status %s; it is started again", status)
            await asyncio.sleep(_RETRY_S)

    async def get(self, path: str, *, raw: bool = False, **query: str) -> Any:
        """A GET; the answer as JSON, or as bytes."""
        return await self._call("GET", path, query, None, raw=raw, repeatable=True)

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, repeatable: bool = False, **query: str
    ) -> Any:
        """A POST; the answer as JSON, None without one. `repeatable`: sent again when the service broke off."""
        return await self._call("POST", path, query, body, repeatable=repeatable)

    async def delete(self, path: str, **query: str) -> Any:
        """A DELETE."""
        return await self._call("DELETE", path, query, None, repeatable=True)

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        *,
        repeatable: bool,
        raw: bool = False,
    ) -> Any:
        """Raises PodmanError. 304, which says that it is so already, is no error."""
        assert self._session is not None  # noqa: S101 - opened before
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE_S
        data = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        while True:
            try:
                async with self._session.request(
                    method, API + path, params=query, data=data, headers=headers
                ) as response:
                    content = await response.read()
                    break
            except aiohttp.ClientConnectorError as error:
                if loop.time() > deadline:
                    raise PodmanError(0, f"nobody listens: {error}") from error
                await asyncio.sleep(_RETRY_S)
            except aiohttp.ClientError as error:
                if not repeatable or loop.time() > deadline:
                    raise PodmanError(0, f"{method} {path}: the service broke off: {error}") from error
                await asyncio.sleep(_RETRY_S)
        if response.status >= 400:
            raise PodmanError(response.status, _message(content))
        if raw:
            return content
        try:
            return orjson.loads(content) if content.strip() else None
        except orjson.JSONDecodeError as error:
            raise PodmanError(0, f"{method} {path}: the answer is not JSON: {error}") from error


async def _listens(socket: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _message(content: bytes) -> str:
    """podman's own words, in one line."""
    try:
        answer = orjson.loads(content)
        text = answer["message"] if isinstance(answer, dict) else content
    except (orjson.JSONDecodeError, KeyError):
        text = content
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return " ".join(text.split())[:1000] or "no message"
