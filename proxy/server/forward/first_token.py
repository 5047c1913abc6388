"""Sees the first token of a stream of events: the first event that brings a piece of the answer.

What comes before is a role, an id, the beginning of a block. Looked at only until it is found.
"""

from __future__ import annotations

import re
from typing import Final

_CHAT: Final = rb'"(?:content|reasoning|reasoning_content|refusal)"\s*:\s*"[^"]|"tool_calls"\s*:\s*\[\s*\{'
_TEXT: Final = rb'"text"\s*:\s*"[^"]'
_BLOCK: Final = rb'"type"\s*:\s*"content_block_delta"'
_DELTA: Final = rb'"type"\s*:\s*"[a-z_.]+\.delta"'
_BY_GROUP: Final = {
    "chat": re.compile(_CHAT),
    "completions": re.compile(_TEXT),
    "messages": re.compile(_BLOCK),
    "responses": re.compile(_DELTA),
}
"""By the group of the route. A quote inside a JSON string is escaped, so generated text cannot look like this."""
_ANY: Final = re.compile(b"|".join((_CHAT, _TEXT, _BLOCK, _DELTA)))
_KEPT: Final = 64
"""What may be cut by the end of a piece is shorter."""


class FirstToken:
    """Is shown a stream, without the framing of the transfer, until it has seen the first token."""

    __slots__ = ("_pattern", "_tail")

    def __init__(self, group: str) -> None:
        self._pattern = _BY_GROUP.get(group, _ANY)
        self._tail = b""

    def feed(self, data: bytes) -> bool:
        """The next piece; whether the first token is in it."""
        data = self._tail + data
        self._tail = data[-_KEPT:]
        return self._pattern.search(data) is not None
