"""A client that sends no more: still there, or gone? FIN says both, and who has left needs no answer."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final

from proxy.server.auth.authorization import Kind
from proxy.server.http_answer import CONTINUE

if TYPE_CHECKING:
    from proxy.server.connection import ClientConnection
    from proxy.server.forward.cycle import RequestCycle

_LOOKS_S: Final = (0.1, 0.05, 0.1, 0.2, 0.5, 1.0)
"""When to look whether a client is still there that sends no more; then every second."""
_TCP_CLOSE: Final = 7
"""`tcpi_state` of a connection that was reset (linux/tcp_states.h)."""


def may_wait(connection: ClientConnection, request: RequestCycle) -> bool:
    """Whether a client that sends no more may still wait for the answer to its request.

    Within an answer it has left: nothing can be sent there that would tell, and its engine may work for long.
    """
    if connection.transport is None or connection.host is None:
        return False
    if request.has_begun_to_answer or (request.head.is_for_aiohttp and request.head.kind is Kind.CLIENT):
        return False  # the second is a WebSocket
    return connection.transport.get_extra_info("sslcontext") is None  # TLS ends as a whole


class HalfClosed:
    """Looks after one of which that is not known, and ends its connection when it has left.

    A host whose program has closed the connection answers what is sent with a reset, which ends it here too. What can
    be sent before an answer is an interim one, which every client reads over (RFC 9110, 15.2): once.
    """

    __slots__ = ("_asked", "_connection", "_loop", "_transport")

    def __init__(self, connection: ClientConnection, transport: asyncio.Transport) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._transport = transport
        self._asked = False
        self._loop.call_later(_LOOKS_S[0], self._look, 0)

    def _look(self, looks: int) -> None:
        transport = self._transport
        if transport.is_closing():
            return
        if transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            transport.abort()
            return
        if not self._asked and self._may_ask():
            self._asked = True
            transport.write(CONTINUE)
        looks = min(looks + 1, len(_LOOKS_S) - 1)
        self._loop.call_later(_LOOKS_S[looks], self._look, looks)

    def _may_ask(self) -> bool:
        request = self._connection.cycle
        if request is None or request.head.is_for_aiohttp:
            return False
        return request.head.http11 and not request.has_begun_to_answer
