"""Where the server listens: a TCP port, with TLS or without, and a unix socket for administration."""

from __future__ import annotations

import asyncio
import errno
import grp
import os
import socket
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from proxy.config.values import is_loopback
from proxy.errors import HostError
from proxy.host import owned
from proxy.runtime import port_owner

if TYPE_CHECKING:
    import ssl

    from proxy.config.fleet import FleetSettings
    from proxy.config.server import AdminSettings, LimitSettings, ServerSettings
    from proxy.server.service import Service

BACKLOG: Final = 4096
"""Connections that may wait to be accepted (net.core.somaxconn may allow fewer)."""


class Site:
    """A socket that is bound already; handshakes have a time limit."""

    def __init__(
        self,
        service: Service,
        bound: socket.socket,
        *,
        tls: ssl.SSLContext | None,
        handshake_s: float,
        url: str,
        for_peers: bool = False,
    ) -> None:
        """`for_peers`: other hosts of the fleet connect to it, and nobody else."""
        self._make = service.peer_connection if for_peers else service.connection
        self._service = service
        self._socket = bound
        self._tls = tls
        self._handshake_s = handshake_s if tls is not None else None
        self.name = url
        """What clients reach it by."""
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to accept."""
        self._service.sites.append(self)
        loop = asyncio.get_running_loop()
        make = self._make
        if self._socket.family == socket.AF_UNIX:
            self._server = await loop.create_unix_server(make, sock=self._socket, backlog=BACKLOG)
        else:
            self._server = await loop.create_server(
                make, sock=self._socket, ssl=self._tls, backlog=BACKLOG, ssl_handshake_timeout=self._handshake_s
            )

    def stop(self) -> None:
        """Accept no more; what was accepted goes on."""
        if self._server is not None:
            self._server.close()


def tcp_sockets(server: ServerSettings) -> list[socket.socket]:
    """The port of the settings, listening already: clients wait in it while the pool opens. Raises HostError."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        refuse_open(server, [str(address[0]) for *_, address in found])
        for family, _, _, _, address in dict.fromkeys(found):
            sock = socket.create_server(
                address[:2], family=family, backlog=BACKLOG, reuse_port=False, dualstack_ipv6=False
            )
            sock.setblocking(False)
            sockets.append(sock)
            if server.port == 0:
                break  # another family would get another port
    except OSError as error:
        for sock in sockets:
            sock.close()
        reason = error.strerror
        if error.errno == errno.EADDRINUSE:
            reason = f"the port is in use by {port_owner.owner(server.port)}"
        raise HostError(
            f"cannot listen on {server.host}:{server.port}: {reason}; set server.host and server.port"
        ) from error
    return sockets


def site(service: Service, sock: socket.socket, server: ServerSettings, tls: ssl.SSLContext | None) -> Site:
    """A place to accept on: with TLS where there is one, on a unix socket without."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Site(service, sock, tls=None, handshake_s=server.limits.head_timeout, url=f"unix:{name}")
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    scheme = "https" if tls is not None else "http"
    url = f"{scheme}://{host}:{name[1]}"
    return Site(service, sock, tls=tls, handshake_s=server.limits.head_timeout, url=url)


def peers_site(service: Service, fleet: FleetSettings, limits: LimitSettings, tls: ssl.SSLContext) -> Site:
    """Where other hosts of the fleet come in. Raises HostError."""
    assert fleet.url is not None  # noqa: S101 - else there is no fleet
    port = urlsplit(fleet.url).port or 0
    try:
        family = socket.AF_INET6 if ":" in fleet.listen else socket.AF_INET
        sock = socket.create_server((fleet.listen, port), family=family, backlog=BACKLOG, reuse_port=False)
    except OSError as error:
        raise HostError(
            f"cannot listen for other hosts on {fleet.listen}, port {port}: {error.strerror}; set fleet.listen and "
            "fleet.url"
        ) from error
    sock.setblocking(False)
    return Site(service, sock, tls=tls, handshake_s=limits.head_timeout, url=fleet.url, for_peers=True)


def addresses(site: Site, server: ServerSettings) -> str | None:
    """What clients and operators use of a site, as a line for the log; None for a unix socket."""
    if site.name.startswith("unix:"):
        return None
    page = f", status page: {site.name}/admin/" if server.admin.is_on_port else ""
    return f"OpenAI API: {site.name}/v1{page}"


def refuse_open(server: ServerSettings, addresses: list[str]) -> None:
    """Raises HostError where others could reach one of `addresses` without having to show who they are."""
    if server.authenticates_clients or server.allow_anyone:
        return
    if reachable := [address for address in addresses if not is_loopback(address)]:
        raise HostError(
            f"{', '.join(reachable)} can be reached by others, and there are no keys: set server.keys_file "
            "(`warmpool key new`) or server.tls.client_ca, or server.allow_anyone"
        )


def admin_socket(admin: AdminSettings) -> socket.socket:
    """The unix socket of the settings, which only its owner, and `socket_group`, can open. Raises HostError."""
    path = admin.socket
    assert path is not None  # noqa: S101 - only called where there is one
    try:
        group = grp.getgrnam(admin.socket_group).gr_gid if admin.socket_group is not None else None
    except KeyError:
        raise HostError(f"there is no group {admin.socket_group!r}; set server.admin.socket_group") from None
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        owned.clear_socket(path.absolute())
        before = os.umask(0o177)
        try:
            made.bind(str(path))
        finally:
            os.umask(before)
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise HostError(f"cannot listen on {path}: {error.strerror}; set server.admin.socket") from error
    made.setblocking(False)
    return made
