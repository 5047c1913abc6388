"""An engine whose answers are spelled, framed and cut at random, by the seed that a request carries in `X-Seed`.

``python -m tests.random_engine PORT``. The same request gets the same answer, whoever brings it. What the answer says
is what the engine has seen of the request, so that whoever compares two answers compares two requests as well.
`GET /debug/state` says where it listens and how many requests are under way.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import random
import socket
import struct
import sys
import zlib
from dataclasses import dataclass, field

import orjson
import zstandard

SEEN = ("accept", "content-type", "user-agent", "x-a", "x-b", "x-empty", "x-seed")
"""The fields of a request that are nobody's but the client's and the engine's."""
BREAKS = "x-break"
"""A field of a request whose answer is to break off."""
STATUSES = (200, 200, 200, 200, 201, 204, 304, 400, 404, 413, 422, 429, 500, 503)
REASONS = (b" OK", b" Made Well", b" ", b"", b" \xfcber alles")
KINDS = (
    b"application/json", b"application/json; charset=utf-8", b"text/event-stream", b"text/event-stream; charset=utf-8",
    b"Text/Plain", b"audio/wav", b"",
)  # fmt: skip
OTHERS = (
    b"X-One: 1", b"x-two:2", b"X-Spaced: \t a  b \t", b"X-Empty:", b"X-Latin: \xe4\xff", b"X-Twice: 1", b"x-twice: 2",
    b"Retry-After: 7", b"X-Process-Time: 0.1", b"Vary: Accept", b"Cache-Control: private", b"X-Accel-Buffering: yes",
    b"X-Content-Type-Options: no", b"ETag: W/\"1\"",
    # What no client gets to see.
    b"Server: uvicorn", b"Date: Mon, 24 Nov 2025 12:00:00 GMT", b"Set-Cookie: a=b", b"Location: http://127.0.0.1:9/",
    b"X-Request-Id: of-the-engine", b"Keep-Alive: timeout=5", b"Access-Control-Allow-Origin: *", b"X-Warmpool-Tier: x",
    b"Connection: X-Hop\r\nX-Hop: 1",
)  # fmt: skip
TRAILERS = (b"X-Sum: 7", b"x-late:1", b"Set-Cookie: late=1", b"X-Empty: ")
INTERIM = (
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\nX-A: 1\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 5\r\n\r\n",
)  # fmt: skip
EXTENSIONS = (b"", b"", b";a", b";a=b", b'; a="x y"', b";a=1;b=2")
RESET = struct.pack("ii", 1, 0)


@dataclass
class Asked:
    """A request as it came."""

    method: str
    target: str
    old: bool
    fields: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""

    def get(self, name: str) -> str:
        """The value of a field, "" where there is none."""
        return next((value for known, value in self.fields if known == name), "")


def seen(asked: Asked) -> bytes:
    """What the engine says of a request."""
    fields = sorted(item for item in asked.fields if item[0] in SEEN)
    return orjson.dumps([asked.method, asked.target, fields, len(asked.body), hashlib.sha256(asked.body).hexdigest()])


@dataclass(frozen=True)
class Reply:
    """Bytes in pieces, and how the connection ends after them: "" (it is kept), "close" or "reset"."""

    pieces: list[bytes]
    end: str


def reply(asked: Asked) -> Reply:
    """The answer to a request, by its seed. What it says is the same in any framing."""
    chance, framing = random.Random(asked.get("x-seed")), _Framing(asked)
    status = chance.choice(STATUSES)
    first = b"HTTP/1.%d %d%b" % (0 if framing.old else 1, status, chance.choice(REASONS))
    fields = [b"Content-Type: " + kind] if (kind := chance.choice(KINDS)) else []
    fields += chance.sample(OTHERS, chance.randrange(6))
    fields = [_spelled(chance, line) for line in fields]
    data = framing.framed(first, fields, _payload(chance, asked), bodiless=status in (204, 304))
    if not asked.get(BREAKS):
        return Reply(_cut(chance, data), "" if framing.kept else "close")
    # Where the body ends by an end of the connection, only a reset is a break.
    end = "reset" if framing.kind == "close" else chance.choice(("close", "reset"))
    return Reply(_cut(chance, data[: chance.randrange(len(data))]), end)


class _Framing:
    """How the end of a body is said, and what stands before the head."""

    def __init__(self, asked: Asked) -> None:
        self._chance = random.Random(asked.get("x-seed") + " framing")
        self.old = self._chance.random() < 0.1
        kinds = ("length", "close") if asked.old or self.old else ("length", "chunked", "chunked", "close")
        self.kind = self._chance.choice(kinds)
        self.kept = self.kind != "close" and not asked.old and not self.old and self._chance.random() < 0.8
        self._interim = not asked.old

    def framed(self, first: bytes, fields: list[bytes], payload: bytes, *, bodiless: bool) -> bytes:
        """The whole answer."""
        chance, body, own = self._chance, payload, list[bytes]()
        if bodiless:
            body = b""
        elif self.kind == "chunked":
            own.append(b"Transfer-Encoding: " + chance.choice((b"chunked", b"Chunked")))
            body = _chunked(chance, payload)
        elif self.kind == "length":
            own.append(b"Content-Length: %d" % len(payload))
        if not self.kept:
            fields = [line for line in fields if not line.lower().startswith(b"connection")]
            own.append(b"Connection: close")
        lines = [*fields, *(_spelled(chance, line) for line in own)]
        chance.shuffle(lines)
        interim = b"".join(chance.sample(INTERIM, chance.choice((0, 0, 0, 1, 2)))) if self._interim else b""
        return interim + b"\r\n".join([first, *lines, b"", b""]) + body


def _payload(chance: random.Random, asked: Asked) -> bytes:
    said = seen(asked)
    match chance.randrange(4):
        case 0:
            return said
        case 1:
            return said + chance.randbytes(chance.randrange(3000))
        case 2:
            return b"data: " + said + b"\n\n" + b'data: {"text":"x"}\n\n' * chance.randrange(40) + b"data: [DONE]\n\n"
        case _:
            return said + b"0123456789abcdef" * chance.randrange(12_000)


def _spelled(chance: random.Random, line: bytes) -> bytes:
    name, _, value = line.partition(b":")
    how = chance.randrange(4)
    return (name.lower() if how == 0 else name.upper() if how == 1 else name) + b":" + value


def _chunked(chance: random.Random, payload: bytes) -> bytes:
    made = []
    for piece in _cut(chance, payload):
        size = b"%X" % len(piece) if chance.random() < 0.5 else b"%x" % len(piece)
        made.append(size + chance.choice(EXTENSIONS) + b"\r\n" + piece + b"\r\n")
    trailers = chance.sample(TRAILERS, chance.choice((0, 0, 1, 2)))
    return b"".join(made) + b"\r\n".join([b"0" + chance.choice(EXTENSIONS), *trailers, b"", b""])


def _cut(chance: random.Random, data: bytes) -> list[bytes]:
    places = sorted({chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 1, 3, 8)))})
    return [part for a, b in zip([0, *places], [*places, len(data)], strict=True) if (part := data[a:b])]


class Engine:
    """Serves connections one request after the other."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.running = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while (asked := await _request(reader, writer)) is not None:
                self.running += 1
                try:
                    if await self._answer(asked, writer):
                        return
                finally:
                    self.running -= 1
        except (OSError, asyncio.IncompleteReadError):
            pass  # who asked has left
        finally:
            writer.close()

    async def _answer(self, asked: Asked, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection ended with it."""
        if asked.method == "GET":
            state = orjson.dumps({"port": self.port, "running": self.running - 1})
            body = state if asked.target == "/debug/state" else b"{}"
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            return False
        made = reply(asked)
        chance = random.Random(asked.get("x-seed"))
        for piece in made.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(chance.choice((0, 0, 0, 0.002)))
        if made.end == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()
        return bool(made.end) or asked.old or asked.get("connection") == "close"


async def _request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, version = first.split(" ")
    asked = Asked(method, target, old=version == "HTTP/1.0")
    for line in lines:
        name, _, value = line.partition(":")
        asked.fields.append((name.lower(), value.strip(" \t")))
    if asked.get("expect"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if asked.get("transfer-encoding"):
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            asked.body += (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
    elif length := asked.get("content-length"):
        asked.body = await reader.readexactly(int(length))
    asked.body = _decoded(asked.body, asked.get("content-encoding").lower())
    return asked


def _decoded(body: bytes, coding: str) -> bytes:
    match coding:
        case "gzip":
            return gzip.decompress(body)
        case "deflate":
            return zlib.decompress(body)
        case "zstd":
            return zstandard.ZstdDecompressor().decompressobj().decompress(body)
        case _:
            return body


async def main() -> None:
    """Serve until the process is ended."""
    port = int(sys.argv[1])
    server = await asyncio.start_server(Engine(port).serve, "127.0.0.1", port, limit=1 << 20, backlog=4096)
    sys.stdout.write(f"listening on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
