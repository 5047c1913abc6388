"""`Expect: 100-continue` (RFC 9110, 10.1.1): a client that sends its body only when it is told to.

It is told as late as possible, by whoever reads the body: what is refused before costs nobody an upload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import aiohttp

if TYPE_CHECKING:
    from aiohttp.web import BaseRequest

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


def waits_with_body(request: BaseRequest) -> bool:
    """Whether the client waits to be told to send the body."""
    content = request.content
    if content.is_eof() or content.total_bytes or request.version < aiohttp.HttpVersion11:
        return False
    return any(name.lower() == b"expect" for name, _ in request.raw_headers)


def ask_for_body(request: BaseRequest) -> None:
    """Tell a client that waits to send the body."""
    transport = request.transport
    if transport is not None and not transport.is_closing() and waits_with_body(request):
        transport.write(_CONTINUE)
