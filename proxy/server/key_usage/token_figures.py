"""What an engine says in `usage` of the tokens of a request and its answer."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

_FIGURE: Final = re.compile(
    rb'"(prompt_tokens|input_tokens|completion_tokens|output_tokens|cached_tokens|cache_read_input_tokens)"'
    rb"\s*:\s*(\d{1,15})"
)
# A quote inside a JSON string is escaped, so generated text cannot look like this.
_ASKED: Final = frozenset({b"prompt_tokens", b"input_tokens"})
_ANSWERED: Final = frozenset({b"completion_tokens", b"output_tokens"})


class Said(NamedTuple):
    """None where it does not say."""

    prompt: int | None
    completion: int | None
    cached: int | None
    """Of the prompt's, those in its prefix cache."""


@lru_cache(maxsize=1024)
def said(usage: bytes) -> Said:
    """What the piece of an answer says that begins with `"usage"`; of figures that come twice the larger."""
    asked = answered = cached = None
    for name, digits in _FIGURE.findall(usage):
        count = int(digits)
        if name in _ASKED:
            asked = max(count, asked or 0)
        elif name in _ANSWERED:
            answered = max(count, answered or 0)
        else:
            cached = max(count, cached or 0)
    return Said(asked, answered, cached)
