"""Requests that aiohttp refuses or cannot read to their end: it would log a stack for each, which anybody can cause."""

from __future__ import annotations

import logging
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError


class _ClientFaults(logging.Filter):
    """Lets pass what is not a client's fault; the rest becomes one line at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        refused = isinstance(error, HttpProcessingError) and error.code < 500
        if refused or isinstance(error, web.RequestPayloadError):
            logging.getLogger("warmpool").debug("refused a request: %s", " ".join(str(error).split())[:200])
            return False
        return True


_FILTER: Final = _ClientFaults()


def quieten() -> None:
    """Keep clients' faults out of the log; any number of times."""
    logging.getLogger("aiohttp.server").addFilter(_FILTER)
