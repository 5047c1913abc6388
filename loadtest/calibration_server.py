"""A server that knows when it did what: the measure for the load-test client itself.

``python -m loadtest.calibration_server [--port N] [--ttft S] [--tokens-per-second N]``. Answers `POST /v1/completions`
with a stream of `max_tokens` events, the first after `ttft` (spread over a tenth of a second, as no two requests are
alike). The first event says, in nanoseconds of this host's monotonic clock, when the request had come in and when the
event went out, each taken next to the system call, so that neither is a promise. What a client measures beyond the
difference is its own error (and the way of the bytes).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
import time
from typing import Final

import orjson

from loadtest.client import TIMESTAMPNS, make_room_for_files, receive, undisturbed

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_SPREAD_S: Final = 0.1


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


_EVENT: Final = b'data: {"object": "text_completion", "choices": [{"index": 0, "text": "%b"}]}\n\n'
_WORD: Final = _chunk(_EVENT % b" word")
_END: Final = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Server:
    """Accepts connections, each for one request."""

    def __init__(self, port: int, ttft_s: float, tokens_per_second: float) -> None:
        self.ttft_s, self.step_s = ttft_s, 1 / tokens_per_second
        self.loop = asyncio.get_running_loop()
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self.loop.add_reader(self._listener.fileno(), self._accept)
        self.port: int = self._listener.getsockname()[1]

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                self.accepted += 1
                _Answering(self, connection, self.accepted)


class _Answering:
    """One request and its answer."""

    __slots__ = ("_came_ns", "_left", "_next_s", "_number", "_read", "_server", "_socket")

    def __init__(self, server: Server, connection: socket.socket, number: int) -> None:
        self._server, self._socket, self._number = server, connection, number
        self._read = b""
        self._came_ns = self._left = 0
        self._next_s = 0.0
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, TIMESTAMPNS, 1)
        server.loop.add_reader(connection.fileno(), self._readable)

    def _readable(self) -> None:
        """Wait for the whole request, then begin to answer it."""
        data, waited_ns = receive(self._socket)
        self._came_ns = time.monotonic_ns() - waited_ns
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if data and (not found or (length is not None and len(body) < int(length[1]))):
            return
        self._server.loop.remove_reader(self._socket.fileno())
        if not data:
            self._socket.close()
            return
        self._left = int(orjson.loads(body).get("max_tokens", 16))
        # The golden ratio's multiples never bunch: requests that come together are answered apart.
        spread_s = self._number * 0.6180339887 % 1.0 * _SPREAD_S
        self._next_s = self._server.loop.time() + self._server.ttft_s + spread_s
        self._server.loop.call_at(self._next_s, self._first)

    def _first(self) -> None:
        self._write(_HEAD + _chunk(_EVENT % b"%d %d" % (self._came_ns, time.monotonic_ns())))

    def _next(self) -> None:
        self._write(_WORD)

    def _write(self, data: bytes) -> None:
        self._left -= 1
        if self._left <= 0:
            data += _END
        try:
            self._socket.send(data)
        except OSError:  # the client has left
            self._left = 0
        if self._left <= 0:
            self._socket.close()
            return
        self._next_s += self._server.step_s
        self._server.loop.call_at(self._next_s, self._next)


async def serve(port: int, ttft_s: float, tokens_per_second: float) -> None:
    """Serve until cancelled; says where on standard output."""
    make_room_for_files()
    server = Server(port, ttft_s, tokens_per_second)
    print(f"http://127.0.0.1:{server.port}", flush=True)
    with undisturbed():
        await asyncio.Event().wait()


def main() -> None:
    """Run the server."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.calibration_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft", type=float, default=0.3, help="seconds")
    parser.add_argument("--tokens-per-second", type=float, default=10.0)
    options = parser.parse_args()
    asyncio.run(serve(options.port, options.ttft, options.tokens_per_second))


if __name__ == "__main__":
    main()
