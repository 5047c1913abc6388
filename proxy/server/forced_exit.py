"""The end of the process, when the event loop, a thread or a child would not let it come to its own."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from typing import Final

log = logging.getLogger("warmpool")

_LOG_S: Final = 0.3
"""How long the last words may take: whoever reads the log may hang too."""


class ForcedExit:
    """Ends the process at a time that can only come nearer, from a thread that nothing waits for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._end = math.inf
        self._status, self._message = 1, "not ended in time: ended by force; the next start clears up what is left"

    def within(self, limit_s: float, status: int | None = None, message: str | None = None) -> None:
        """End after `limit_s` at the latest, with this exit status and this as the last line of the log."""
        with self._changed:
            if math.isinf(self._end):
                threading.Thread(target=self._wait, name="last resort", daemon=True).start()
            self._end = min(self._end, time.monotonic() + limit_s)
            self._status = self._status if status is None else status
            self._message = self._message if message is None else message
            self._changed.notify()

    def _wait(self) -> None:
        with self._changed:
            while (left_s := self._end - time.monotonic()) > 0:
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
        saying = threading.Thread(target=self._say, name="last words", daemon=True)
        saying.start()
        saying.join(_LOG_S)
        os._exit(self._status)

    def _say(self) -> None:
        log.error("%s", self._message)
        logging.shutdown()
