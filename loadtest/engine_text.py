"""What the load-test engine says: a reversible tokenizer and deterministic text."""

from __future__ import annotations

import base64
import hashlib
import random
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS = (
    "amber basin cedar delta ember fjord grove harbor island jade kelp lagoon maple north ocean pine quartz river "
    "slate tide umber valley willow xenon yarrow zephyr brook cliff dune estuary fern glacier heath inlet juniper "
    "knoll lake meadow nectar orchard prairie quarry ridge spring thicket upland vista wetland"
).split()

_BYTES_PER_TOKEN = 3
MAX_TOKEN_ID = (_BYTES_PER_TOKEN << 24) | 0xFFFFFF


def tokenize(text: str) -> list[int]:
    """Token ids: up to three bytes of UTF-8 each, with their count above them, so that any text comes back."""
    raw = text.encode("utf-8", "surrogatepass")
    chunks = (raw[i : i + _BYTES_PER_TOKEN] for i in range(0, len(raw), _BYTES_PER_TOKEN))
    return [(len(chunk) << 24) | int.from_bytes(chunk, "big") for chunk in chunks]


def detokenize(tokens: Sequence[int]) -> str:
    """The text of `tokenize`'s ids. Raises ValueError for an id that it never gives."""
    raw = bytearray()
    for token in tokens:
        length, value = token >> 24, token & 0xFFFFFF
        if not 1 <= length <= _BYTES_PER_TOKEN or value >= 1 << (8 * length):
            raise ValueError(f"token id {token} is out of vocabulary")
        raw += value.to_bytes(length, "big")
    return raw.decode("utf-8", "replace")


def token_count(text: str) -> int:
    """How many tokens `tokenize` makes of a text."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)


def _seed(*parts: bytes | str) -> int:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<Q", len(raw)) + raw)
    return int.from_bytes(digest.digest(), "big")


def generate(seed_parts: Sequence[bytes | str], limit: int, *, ignore_eos: bool) -> tuple[list[str], str]:
    """Tokens (at most `limit`) and vLLM's finish reason, a pure function of the arguments.

    The text ends by itself after 8 to 71 tokens unless `ignore_eos`.
    """
    source = random.Random(_seed(*seed_parts))
    natural = 8 + source.randrange(64)
    count = limit if ignore_eos else min(limit, natural)
    tokens = [(" " if i else "") + WORDS[source.randrange(len(WORDS))] for i in range(count)]
    return tokens, "length" if ignore_eos or natural > limit else "stop"


def cut_at_stop(tokens: list[str], reason: str, stops: Sequence[str]) -> tuple[list[str], str]:
    """The tokens before the first stop sequence; the last one may be cut within."""
    text = "".join(tokens)
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if not ends:
        return tokens, reason
    left, kept = min(ends), []
    for token in tokens:
        if left <= 0:
            break
        kept.append(token[:left])
        left -= len(token)
    return kept, "stop"


def embed(model: str, text: str, dimensions: int) -> list[float]:
    """A unit vector for a text, the same each time."""
    source = random.Random(_seed("embedding", model, text))
    vector = [source.gauss(0.0, 1.0) for _ in range(dimensions)]
    norm = sum(x * x for x in vector) ** 0.5
    return [x / norm for x in vector]


def pack_embedding(vector: Sequence[float]) -> str:
    """OpenAI's `encoding_format: base64`: little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
