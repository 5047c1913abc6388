"""What a request has in common with those before it, so that it goes to the instance that has it in its prefix cache.

`x-session-id` says so; else the head of the prompt does. Only looked at where a model may have several instances.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD: Final = 1024
"""Characters of each text that count."""
_MESSAGES: Final = 2
"""Of a conversation: its system prompt, and how it began."""
_PARTS: Final = 8
"""Of a message."""
_LARGE_HEAD: Final = 4096
"""Bytes of a body that was not read here."""


def key_of(session: str | None, asked: object, body: bytes) -> bytes | None:
    """The same for requests that begin alike; None where nothing tells."""
    if session:
        text = session
    elif isinstance(asked, dict):
        text = "\0".join(_heads(asked))
    else:
        return _digest(body[:_LARGE_HEAD]) if body else None
    return _digest(text.encode("utf-8", "surrogatepass")) if text else None


def _digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=16).digest()


def _heads(asked: dict[str, Any]) -> Iterator[str]:
    for name in ("system", "instructions"):
        yield from _text(asked.get(name))
    messages = asked.get("messages")
    if isinstance(messages, list):
        for message in messages[:_MESSAGES]:
            if isinstance(message, dict):
                yield from _text(message.get("content"))
    for name in ("prompt", "input"):
        yield from _text(asked.get(name))


def _text(value: object) -> Iterator[str]:
    """The beginning of a text, of the first part that is one, or of token ids."""
    if isinstance(value, str):
        yield value[:_HEAD]
    elif isinstance(value, list) and value:
        first = value[0]
        if isinstance(first, int):
            yield ",".join(map(str, value[:_HEAD]))
        elif isinstance(first, str):
            yield first[:_HEAD]
        elif isinstance(first, dict):
            for part in value[:_PARTS]:
                text = (part.get("text") or part.get("content")) if isinstance(part, dict) else None
                if isinstance(text, str):
                    yield text[:_HEAD]
