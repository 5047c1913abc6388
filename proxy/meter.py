"""How many tokens an answer cost, read from its bytes as they pass.

Engines say it in an object `usage`: OpenAI's with `total_tokens`, Anthropic's with `input_tokens` and
`output_tokens`, in the answer or in an event of the stream. Where there is none (a stream without
`stream_options.include_usage`, an answer that was cut off) it is estimated: a token for every four bytes of a JSON
request, and one for each event of a stream or for every four bytes of another answer.
"""

from __future__ import annotations

import re
from typing import Final

BYTES_PER_TOKEN: Final = 4
_BEGIN = b'"usage"'
_WINDOW = 1024
"""How much of a usage object is looked at; its own figures come first."""
_FIGURE = re.compile(rb'"(total_tokens|input_tokens|output_tokens|prompt_tokens|completion_tokens)"\s*:\s*(\d{1,15})')
# A quote inside a JSON string is escaped, so generated text cannot look like this.
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')


class Meter:
    """Counts one exchange."""

    __slots__ = ("_bytes", "_events", "_figures", "_tail", "prompt_tokens")

    def __init__(self, request_bytes: int) -> None:
        self.prompt_tokens = request_bytes // BYTES_PER_TOKEN
        """Estimated."""
        self._figures: dict[bytes, int] = {}
        self._events = 0
        self._bytes = 0
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """The next piece of the answer's body."""
        self._bytes += len(chunk)
        data = self._tail + chunk
        # An event that is split in this place is counted with its second part.
        self._events += data.count(b"data:") - self._tail.count(b"data:")
        begin = 0
        keep_from = len(data) - len(_BEGIN) + 1
        while (found := data.find(_BEGIN, begin)) >= 0:
            window = data[found : found + _WINDOW]
            if _USAGE.match(window):
                self._read(window)
            if len(window) < _WINDOW:
                keep_from = min(keep_from, found)  # there may be more of it to come
            begin = found + len(_BEGIN)
        self._tail = data[max(0, keep_from) :]

    def _read(self, window: bytes) -> None:
        for name, value in _FIGURE.findall(window):
            self._figures[name] = max(self._figures.get(name, 0), int(value))

    def tokens(self) -> int:
        """What the exchange cost, said or estimated; 0 when nothing was answered."""
        figures = self._figures
        if total := figures.get(b"total_tokens"):
            return total
        if figures:
            return sum(figures.values())
        if self._bytes == 0:
            return 0
        # The last event of a stream, [DONE], is none.
        answer = self._events - 1 if self._events else self._bytes // BYTES_PER_TOKEN
        return self.prompt_tokens + answer
