"""The status page at `/admin/`: one document with its style and script, and a policy that allows nothing else.

The page holds no data: its script asks `/admin/events` for it, with the admin token where there is one.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Final

from aiohttp import web


def _part(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


_SCRIPTS: Final = (
    "elements",
    "server",
    "commands",
    "models",
    "logs",
    "wakes",
    "chat",
    "requests",
    "usage",
    "memory",
    "problems",
    "start",
)
"""The parts of the script, in the order in which they run; they share one scope."""
_STYLE: Final = _part("page.css")
_SCRIPT: Final = "\n".join(_part(f"script/{name}.js") for name in _SCRIPTS)
PAGE: Final = _part("page.html").replace("/*STYLE*/", _STYLE).replace("/*SCRIPT*/", _SCRIPT)
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_digest(_STYLE)}",
        f"script-src {_digest(_SCRIPT)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""The content security policy: this very style and script, and requests to this server."""
_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


async def page(_: web.Request) -> web.StreamResponse:
    """The page."""
    return web.Response(text=PAGE, content_type="text/html", charset="utf-8", headers=_HEADERS)


async def to_page(_: web.Request) -> web.StreamResponse:
    """`/admin` → `/admin/`, from where the page's addresses are relative."""
    return web.Response(status=308, headers={"Location": "admin/"})
