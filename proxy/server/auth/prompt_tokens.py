"""How many tokens a request may cost, before an engine has counted them: text by its length, the rest by its kind.

A picture in Base64 is megabytes of text, and to an engine a thousand tokens. The kinds are those of the parts of
messages in OpenAI's chat and responses APIs, in Anthropic's messages and in vLLM's own additions.
"""

from __future__ import annotations

from typing import Any, Final

BYTES_PER_TOKEN: Final = 4
IMAGE_TOKENS: Final = 1000
AUDIO_TOKENS: Final = 1000
FILE_TOKENS: Final = 4000
"""Documents and videos."""

_KINDS: Final[dict[str, int]] = {
    **dict.fromkeys(
        ("image_url", "input_image", "image", "image_pil", "image_embeds", "image_generation_call",
         "computer_screenshot"),
        IMAGE_TOKENS,
    ),
    **dict.fromkeys(("input_audio", "audio_url", "audio", "audio_embeds"), AUDIO_TOKENS),
    **dict.fromkeys(
        ("file", "input_file", "document", "video_url", "input_video", "video"), FILE_TOKENS
    ),
}  # fmt: skip
"""The `type` of a part."""
_MEDIA: Final = {"image": IMAGE_TOKENS, "audio": AUDIO_TOKENS}
"""The beginning of a `data:` URL's media type; every other one is a file."""
_EMBEDDED: Final = "prompt_embeds"
"""A prompt as vLLM takes it ready for the model: tensors in Base64, which count as a file."""
_MOST_STEPS: Final = 20_000
"""Each takes Python a moment, in which nobody else is served."""


class Tokens(int):
    """A request of which nothing is kept but how many tokens it may cost."""

    __slots__ = ()


def prompt_tokens(request: object) -> int:
    """Of a request as JSON has it; an estimate, as its engine's `usage` will say better.

    Of one with very many values the rest is left out.
    """
    if isinstance(request, Tokens):
        return int(request)
    tokens = length = 0
    rest: list[Any] = [request]
    for _ in range(_MOST_STEPS):
        if not rest:
            break
        value = rest.pop()
        if isinstance(value, str):
            if value.startswith("data:"):
                tokens += _MEDIA.get(value[5:10], FILE_TOKENS)
            else:
                length += len(value) if value.isascii() else len(value.encode())
        elif isinstance(value, dict):
            if (cost := _cost_of_part(value)) is not None:
                tokens += cost
            else:
                length += sum(map(len, value))
                rest += value.values() if _EMBEDDED not in value else [v for n, v in value.items() if n != _EMBEDDED]
                tokens += FILE_TOKENS * (_EMBEDDED in value)
        elif isinstance(value, list):
            if value and type(value[0]) is int:  # a prompt that is tokens already
                tokens += len(value)
            else:
                rest += value
    return tokens + length // BYTES_PER_TOKEN


def _cost_of_part(value: dict[str, Any]) -> int | None:
    kind = value.get("type")
    cost = _KINDS.get(kind) if isinstance(kind, str) else None
    source = value.get("source")
    if isinstance(source, dict) and source.get("type") in ("text", "content"):
        return None  # Anthropic's document that is nothing but text, or parts of its own
    return cost
