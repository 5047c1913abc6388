"""Which instance made which response: a later request for it, by its id, has to go to the same one.

The ids are the engines' own, read from the first bytes of an answer as it passes. What is remembered is lost with the
process; what is forgotten, or was made by an engine that is gone, the engine that is asked answers with 404.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final

_ID: Final = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9][A-Za-z0-9_-]{0,199})"')
_LOOK_BYTES: Final = 4096
_MOST: Final = 10_000


class ResponseIds:
    """Response id → name of the model and id of the instance; the last ten thousand."""

    def __init__(self) -> None:
        self._made: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def made_by(self, response_id: str) -> tuple[str, str] | None:
        """Who made a response, as far as it is remembered."""
        return self._made.get(response_id)

    def reader(self, model: str, instance: str) -> Reader:
        """Notes the id in an answer that this instance gives."""
        return Reader(self, model, instance)

    def note(self, response_id: str, model: str, instance: str) -> None:
        """Remember one."""
        self._made[response_id] = (model, instance)
        self._made.move_to_end(response_id)
        while len(self._made) > _MOST:
            self._made.popitem(last=False)


class Reader:
    """Is shown an answer as it passes, until it has seen the id: the first one in the object or in the first event."""

    def __init__(self, ids: ResponseIds, model: str, instance: str) -> None:
        self._ids = ids
        self._made_by = model, instance
        self._seen = b""
        self._done = False

    def feed(self, chunk: bytes) -> bool:
        """Look at the next bytes; True: no more need be shown."""
        if self._done:
            return True
        self._seen += chunk[: _LOOK_BYTES - len(self._seen)]
        if (found := _ID.search(self._seen)) is not None:
            self._ids.note(found[1].decode(), *self._made_by)
        self._done = found is not None or len(self._seen) >= _LOOK_BYTES
        return self._done
