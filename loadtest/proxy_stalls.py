"""Whether large bodies hold up streams: gaps between the chunks of other streams while bodies of 32 MiB are posted.

A proxy with one event loop that reads a body in one go serves nobody meanwhile. Ten shapes of a body are posted, one
after the other, by a process of its own; before each comes a time without, the control. Both are times of one run on
one machine, and what is counted is their difference. What sending and taking so much costs the machine by itself is
seen by posting the same bodies past the proxy, to an engine of their own.

Other than in the rest of the bench the proxy may use all cores, for it may have such bodies read by another process.
"""

from __future__ import annotations

import base64
import multiprocessing
import os
import random
import socket
import time
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import zstandard
from rich.table import Table

from loadtest import proxy_load as load
from loadtest import proxy_peers as peers
from loadtest.client import undisturbed
from loadtest.proxy_figures import ENDLESS
from loadtest.proxy_upstream import EVENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from multiprocessing.connection import Connection
    from pathlib import Path

    from loadtest.proxy_peers import Contender

SIZE: Final = 32 << 20
STREAMS: Final = 32
MOST_MS: Final = 10.0
"""What the 99th percentile may be above that of the control."""
CONTROL_S: Final = 1.0
POSTS: Final = 2
"""Of each shape."""
_AFTER_S: Final = 0.2
"""What a body did to the loop may show a moment after its answer."""
_POST_S: Final = 60.0
_MARK: Final = EVENT[:6]
_COMPLETIONS: Final = "/v1/completions"
_BEGIN: Final = b'{"model":"bench","max_tokens":4,'
_CHUNK: Final = 4096


def _filled(begin: bytes, item: bytes, end: bytes, size: int) -> bytes:
    return begin + item * ((size - len(begin) - len(end)) // len(item)) + end


def _deep(size: int) -> bytes:
    depth = (size - len(_BEGIN) - 16) // 2
    return _BEGIN + b'"prompt":' + b"[" * depth + b"]" * depth + b"}"


def _many_keys(size: int) -> bytes:
    made, left = [], size - len(_BEGIN) - 16
    for number in count():
        made.append(b'"k%d":%d' % (number, number))
        left -= len(made[-1]) + 1
        if left < 0:
            return _BEGIN + b",".join(made) + b"}"
    raise AssertionError


def _unpredictable(size: int) -> bytes:
    text = base64.b64encode(random.Random(7).randbytes(size * 3 // 4 - 64))
    return _BEGIN + b'"prompt":"' + text + b'"}'


JSON: Final[Mapping[str, Callable[[int], bytes]]] = {
    "deep arrays": _deep,
    "one long string": lambda size: _filled(_BEGIN + b'"prompt":"', b"Say something, please. ", b'"}', size),
    "many keys": _many_keys,
    "a second model at the end": lambda size: _filled(
        b'{"model":"other","prompt":"', b"Say something, please. ", b'","model":"bench"}', size
    ),
    "numbers": lambda size: _filled(_BEGIN + b'"prompt":[1', b",12345,-0.5e-3", b"]}", size),
    "escapes": lambda size: _filled(_BEGIN + b'"prompt":"', rb"\u00e4\n\"\\\ud83d\ude00", b'"}', size),
    "unicode": lambda size: _filled(_BEGIN + b'"prompt":"', "äé漢字😀".encode(), b'"}', size),
}
SHAPES: Final = (*JSON, "multipart", "chunked", "zstd")


def message(shape: str, size: int) -> bytes:
    """A whole request with a body of about this size."""
    if shape in JSON:
        return load.request(_COMPLETIONS, JSON[shape](size))
    if shape == "multipart":
        begin = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        end = b'\r\n--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nbench\r\n--b--\r\n'
        body = begin + random.Random(7).randbytes(size - len(begin) - len(end)) + end
        return _headed(
            "/v1/audio/transcriptions", f"Content-Length: {len(body)}", body, "multipart/form-data; boundary=b"
        )
    body = _unpredictable(size)
    if shape == "zstd":
        packed = zstandard.ZstdCompressor(level=1).compress(body)
        return _headed(_COMPLETIONS, f"Content-Encoding: zstd\r\nContent-Length: {len(packed)}", packed)
    pieces = (body[at : at + _CHUNK] for at in range(0, len(body), _CHUNK))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return _headed(_COMPLETIONS, "Transfer-Encoding: chunked", chunks + b"0\r\n\r\n")


def _headed(path: str, fields: str, body: bytes, kind: str = "application/json") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n{fields}\r\n\r\n".encode() + body


def _post_from_elsewhere(size: int, pipe: Connection) -> None:
    """A shape comes, "ready" goes; then each port that comes is answered with a status and its seconds."""
    os.nice(10)  # the client that measures goes first
    data = b""
    while True:
        asked = pipe.recv()
        if isinstance(asked, int):
            pipe.send(_posted(asked, data))
        else:
            data = message(asked, size)
            pipe.send("ready")


def _posted(port: int, data: bytes) -> tuple[str, float]:
    began = time.perf_counter()
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_POST_S) as wire:
            wire.sendall(data)
            while not load.whole(answer) and (piece := wire.recv(1 << 16)):
                answer += piece
        status = answer[9:12].decode("latin-1") or "nothing"
    except OSError as error:  # one that is refused may be reset before its answer is read
        status = answer[9:12].decode("latin-1") or type(error).__name__
    return status, round(time.perf_counter() - began, 3)


@contextmanager
def _poster(size: int) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_post_from_elsewhere, args=(size, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


class _Gaps:
    """Streams that run, and the time between what comes on each."""

    def __init__(self, port: int, streams: int) -> None:
        self.wires = load.Wires(port, streams)
        request = load.request(peers.PATH, ENDLESS)
        for wire in self.wires.sockets.values():
            wire.send(request)
        self._last = dict.fromkeys(self.wires.sockets, time.perf_counter())
        self.ended = 0

    def during(self, seconds: float, over: Callable[[], bool] = lambda: True) -> list[float]:
        """The gaps in seconds that end within this time, and until it is over."""
        gaps: list[float] = []
        end = time.perf_counter() + seconds
        while (now := time.perf_counter()) < end or not over():
            for number, data in self.wires.readable(0.01):
                now = time.perf_counter()
                if not data:
                    self.ended += 1
                    self.wires.drop(number)
                elif _MARK in data:
                    gaps.append(now - self._last[number])
                    self._last[number] = now
        return gaps

    def while_posted(self, poster: Connection, port: int) -> tuple[list[float], tuple[str, float]]:
        """The gaps while the poster's body is under way and a moment longer, and its status and seconds."""
        poster.send(port)
        gaps = self.during(0.0, poster.poll)
        answer: tuple[str, float] = poster.recv()
        return gaps + self.during(_AFTER_S), answer


def measure(contender: Contender, folder: Path, *, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Percentiles of the gaps with and without bodies, each shape's too, in milliseconds."""
    size, posts = (1 << 20, 1) if quick else (SIZE, POSTS)
    found: dict[str, Any] = {"mib": size >> 20, "streams": STREAMS, "shapes": {}}
    gaps: dict[str, list[float]] = {"loaded": [], "past": [], "control": []}
    for process in contender.processes:
        process.cpu_affinity([])  # all
    streams = _Gaps(contender.port, STREAMS)
    try:
        with _poster(size) as poster, peers.engine(folder) as elsewhere, undisturbed():
            streams.during(1.0)  # until all run
            for shape in SHAPES:
                poster.send(shape)
                streams.during(0.0, poster.poll)
                poster.recv()
                gaps["control"] += streams.during(0.2 if quick else CONTROL_S)
                if shape != "chunked":  # which the bare engine does not know
                    gaps["past"] += streams.while_posted(poster, elsewhere)[0]
                answers, own = [], list[float]()
                for _ in range(posts):
                    more, answer = streams.while_posted(poster, contender.port)
                    answers.append(answer)
                    own += more
                gaps["loaded"] += own
                figures = found["shapes"][shape] = {
                    "statuses": sorted({status for status, _ in answers}),
                    "seconds": max(seconds for _, seconds in answers),
                    **_percentiles(own),
                }
                say(f"{contender.name}: {shape}: p99 gap {figures['p99_ms']} ms")
    finally:
        streams.wires.close()
    found |= {"ended": streams.ended} | {name: _percentiles(values) for name, values in gaps.items()}
    found["p99_above_ms"] = round(found["loaded"]["p99_ms"] - found["control"]["p99_ms"], 2)
    return found


def _percentiles(gaps_s: list[float]) -> dict[str, Any]:
    values = sorted(gaps_s) or [0.0]
    return {
        "p50_ms": round(values[len(values) // 2] * 1e3, 2),
        "p99_ms": round(values[len(values) * 99 // 100] * 1e3, 2),
        "most_ms": round(values[-1] * 1e3, 2),
        "n": len(gaps_s),
    }


_TOGETHER: Final = {"loaded": "all shapes", "past": "posted past the proxy", "control": "control, without"}


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each shape, columns for each proxy; then all together, the control, and what is above it."""
    first = next(iter(results.values()))
    shown = Table(
        title=f"gaps between chunks of {first['streams']} streams while {first['mib']} MiB are posted, p99 (most), ms"
    )
    shown.add_column("")
    for name in results:
        shown.add_column(name, justify="right")
        shown.add_column("answers, s", justify="right")
    for shape in first["shapes"]:
        cells: list[str] = []
        for one in results.values():
            figures = one["shapes"][shape]
            cells += [_cell(figures), f"{' '.join(figures['statuses'])}, {figures['seconds']:.2f}"]
        shown.add_row(shape, *cells)
    for name, title in _TOGETHER.items():
        cells = [cell for one in results.values() for cell in (_cell(one[name]), "")]
        shown.add_row(title, *cells)
    above = []
    for one in results.values():
        kept = "kept" if one["p99_above_ms"] <= MOST_MS else "missed"
        above += [f"{one['p99_above_ms']:.1f}: {kept}", f"{one['ended']} streams broke" if one["ended"] else ""]
    shown.add_row(f"p99 above the control (at most {MOST_MS:g})", *above)
    return shown


def _cell(figures: Mapping[str, Any]) -> str:
    return f"{figures['p99_ms']:.1f} ({figures['most_ms']:.0f})"
