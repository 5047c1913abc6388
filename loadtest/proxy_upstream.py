"""The cheapest engine there can be, so that a proxy in front of it is what is measured.

``python -m loadtest.proxy_upstream --port 8000``. One asyncio protocol on uvloop, answers made in advance. POST with
`"stream": true` is answered by server-sent events, one a chunk of the transfer coding, each stream at its own phase of
the period; any other POST by one short JSON answer. `GET /health` is refused until `--ready-file` exists.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import re
import struct
from pathlib import Path
from typing import Final, cast

import uvloop

EVENT: Final = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1764000000,'
    b'"model":"bench","choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null,'
    b'"token_ids":null}]}\n\n'
)
"""What vLLM says for one token, of its size."""
_LAST: Final = b"data: [DONE]\n\n"
ANSWER: Final = (
    b'{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","created":1764000000,"model":"bench",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":" a short answer","refusal":null},"logprobs":null,'
    b'"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":4,"total_tokens":8,"completion_tokens":4}}'
)
_MODELS: Final = b'{"object":"list","data":[{"id":"bench","object":"model","created":1764000000,"owned_by":"vllm"}]}'
_PHASES: Final = 200
_CLOCK_MONOTONIC: Final = 1
_MOST_BEHIND: Final = 40
_LARGE: Final = 1 << 20
"""Of a body that is larger only the beginning is kept: copying it would hold up the streams, and be measured."""
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_TOKENS: Final = re.compile(rb'"max_tokens": ?(\d+)')
_STREAM: Final = re.compile(rb'"stream": ?true')
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 24 Nov 2025 12:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    return (
        b"HTTP/1.1 %s\r\ndate: Mon, 24 Nov 2025 12:00:00 GMT\r\nserver: uvicorn\r\n"
        b"content-length: %d\r\ncontent-type: application/json\r\n\r\n%s" % (status, len(body), body)
    )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Clockwork:
    """Sends every open stream its next event once a period, the streams spread evenly over the period.

    The tokens of an engine's step leave its server one by one, some tens of microseconds apart; a proxy that is woken
    for each has more to do than one that finds them all at once. uvloop's timers count milliseconds, so this is a timer
    of the kernel's (timerfd_create(2); `os` has it from Python 3.13 on).
    """

    def __init__(self, period_s: float) -> None:
        self._step_ns = round(period_s / _PHASES * 1e9)
        self._phases: list[set[Connection]] = [set() for _ in range(_PHASES)]
        self._turn = 0
        self._next = 0
        self._event = _chunk(EVENT)
        self._timer = -1
        self._turns = False
        self.streams = 0

    def start(self) -> None:
        """Be ready to turn; once. It stands still as long as there are no streams."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._timer = libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._set_time = libc.timerfd_settime
        asyncio.get_running_loop().add_reader(self._timer, self._tick)

    def _turn_on(self, *, on: bool) -> None:
        self._turns = on
        every = divmod(self._step_ns if on else 0, 10**9)
        if self._set_time(self._timer, 0, struct.pack("qqqq", *every, *every), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def add(self, connection: Connection) -> None:
        """A stream that begins."""
        connection.phase = self._phases[self._next * 61 % _PHASES]  # 61: the first few are spread out too
        self._next += 1
        connection.phase.add(connection)
        self.streams += 1
        if not self._turns:
            self._turn_on(on=True)

    def remove(self, connection: Connection) -> None:
        """One that is over; it may be already."""
        if connection.phase is not None:
            connection.phase.discard(connection)
            connection.phase = None
            self.streams -= 1

    def _tick(self) -> None:
        if not self.streams:
            self._turn_on(on=False)
            return
        # A clock that cannot keep up goes slower: the client counts what came.
        for _ in range(min(_MOST_BEHIND, int.from_bytes(os.read(self._timer, 8), "little"))):
            phase = self._phases[self._turn % _PHASES]
            self._turn += 1
            for connection in [*phase] if phase else ():
                if not connection.paused:
                    connection.send_event(self._event)


class Connection(asyncio.Protocol):
    """One connection from a client or a proxy."""

    def __init__(self, clockwork: Clockwork, ready_file: Path | None) -> None:
        self._clockwork = clockwork
        self._ready_file = ready_file
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self.phase: set[Connection] | None = None
        self.paused = False
        self._left = 0
        self._skipped = 0
        """Bytes that are still to come of a large body and that nobody looks at."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing is said before a request."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _: Exception | None) -> None:
        """The stream, if there was one, is over."""
        self._end()
        self._transport = None

    def pause_writing(self) -> None:
        """Skip events until the peer reads."""
        self.paused = True

    def resume_writing(self) -> None:
        """Go on."""
        self.paused = False

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        if self._skipped:
            self._skipped -= len(data)
            if self._skipped > 0:
                return
            assert self._transport is not None
            request, self._received, data = self._received, b"", data[len(data) + self._skipped :]
            self._skipped = 0
            self._transport.write(self._reply(request, request.find(b"\r\n\r\n")))
        self._received = self._received + data if self._received else data
        while self._received and self._transport is not None:
            head_end = self._received.find(b"\r\n\r\n")
            if head_end < 0:
                return
            length = _LENGTH.search(self._received, 0, head_end)
            end = head_end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < end:
                if end - len(self._received) > _LARGE:
                    self._skipped = end - len(self._received)
                return
            request, self._received = self._received[:end], self._received[end:]
            self._transport.write(self._reply(request, head_end))

    def _reply(self, request: bytes, head_end: int) -> bytes:
        if request.startswith(b"POST "):
            if _STREAM.search(request, head_end) is None:
                return _SHORT
            tokens = _TOKENS.search(request, head_end)
            self._left = int(tokens[1]) if tokens else 16
            self._clockwork.add(self)
            return _HEAD + _chunk(EVENT)
        if request.startswith(b"GET /health"):
            ready = self._ready_file is None or self._ready_file.exists()
            return _answer(b"", b"200 OK" if ready else b"503 Service Unavailable")
        if request.startswith(b"GET /v1/models "):
            return _answer(_MODELS)
        return _answer(b"{}", b"404 Not Found")

    def send_event(self, event: bytes) -> None:
        """The next token, and the end after the last."""
        assert self._transport is not None
        self._left -= 1
        if self._left > 0:
            self._transport.write(event)
        else:
            self._transport.write(_chunk(_LAST) + b"0\r\n\r\n")
            self._end()

    def _end(self) -> None:
        self._clockwork.remove(self)


_SHORT: Final = _answer(ANSWER)


async def serve(host: str, port: int, tokens_per_second: float, ready_file: Path | None) -> None:
    """Serve until the process is ended."""
    clockwork = Clockwork(1 / tokens_per_second)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(clockwork, ready_file), host, port, backlog=16384
    )
    clockwork.start()
    await server.serve_forever()


def main() -> None:
    """Run the upstream."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.proxy_upstream", description=__doc__, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens-per-second", type=float, default=100.0, help="of each stream")
    parser.add_argument("--ready-file", type=Path, help="healthy once this file exists")
    options = parser.parse_args()
    uvloop.run(serve(options.host, options.port, options.tokens_per_second, options.ready_file))


if __name__ == "__main__":
    main()
