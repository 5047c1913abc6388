"""How many tokens an answer cost, read from its bytes as they pass.

Engines say it in an object `usage`: OpenAI's with `total_tokens`, Anthropic's with `input_tokens` and
`output_tokens`, in the answer or in an event of the stream. Where there is none (a stream without
`stream_options.include_usage`, an answer that was cut off) it is estimated: what was expected of the request, and a
token for each event of a stream that brings a piece of text, or for every four bytes of another answer.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.server.auth.prompt_tokens import BYTES_PER_TOKEN

_BEGIN = b'"usage"'
_WINDOW = 1024
"""How much of a usage object is looked at; its own figures come first."""
_FIGURE = re.compile(rb'"(total_tokens|input_tokens|output_tokens|prompt_tokens|completion_tokens)"\s*:\s*(\d{1,15})')
# A quote inside a JSON string is escaped, so generated text cannot look like this.
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_DATA: Final = b"\ndata:"
_DELTAS: Final = (b"event: content_block_delta\n", b".delta\n")
"""Where events have names: those that bring a piece of the answer (Anthropic's messages; OpenAI's responses)."""
_KEPT: Final = max(map(len, (_BEGIN, _DATA, *_DELTAS))) - 1


class Meter:
    """Counts one exchange."""

    __slots__ = ("_bytes", "_deltas", "_events", "_figures", "_tail", "prompt_tokens")

    def __init__(self, prompt_tokens: int = 0) -> None:
        self.prompt_tokens = prompt_tokens
        """What is expected of the request."""
        self._figures: dict[bytes, int] = {}
        self._events = 0
        self._deltas = 0
        self._bytes = 0
        self._tail = b"\n"

    def feed(self, chunk: bytes) -> None:
        """The next piece of the answer's body."""
        self._bytes += len(chunk)
        data = self._tail + chunk
        # What is split in this place is counted with its second part.
        self._events += data.count(_DATA) - self._tail.count(_DATA)
        for name in _DELTAS:
            self._deltas += data.count(name) - self._tail.count(name)
        begin = 0
        keep_from = len(data) - _KEPT
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
        if figures:  # Anthropic's say what the answer cost at its end only
            asked = max(figures.get(b"input_tokens", 0), figures.get(b"prompt_tokens", 0))
            answered = max(figures.get(b"output_tokens", 0), figures.get(b"completion_tokens", 0))
            return asked + max(answered, self._deltas)
        if self._bytes == 0:
            return 0
        # The last event of a stream without names, [DONE], is none.
        answer = self._deltas or (self._events - 1 if self._events else self._bytes // BYTES_PER_TOKEN)
        return self.prompt_tokens + answer
