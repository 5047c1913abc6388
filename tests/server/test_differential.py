"""An engine asked directly and through warmpool: the same bytes, but for what warmpool adds and drops by contract.

Random requests (cut and paused anywhere, pipelined, chunked, compressed, with `Expect`, of HTTP/1.0) to an engine
whose answers are spelled, framed and cut at random, among clients that leave in every phase. `tests/random_engine.py`
answers with what it has seen of a request, so that equal answers mean equal requests.

DIFFERENTIAL_SECONDS (2) is how long; `make fuzz` runs longer. DIFFERENTIAL_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import random
import signal
import socket
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import h11
import orjson
import pytest
import zstandard

from tests.random_engine import BREAKS, RESET
from tests.served import Proxy
from tests.support import PATIENCE_S, ROOT, get_json

if TYPE_CHECKING:
    from pathlib import Path

SECONDS: Final = float(os.environ.get("DIFFERENTIAL_SECONDS", "2"))
SEED: Final = int(os.environ.get("DIFFERENTIAL_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
TOGETHER: Final = 12
"""Clients at a time; every fourth one only comes to leave."""
PHASES: Final = ("at once", "in the head", "in the body", "sent", "waiting", "in the answer")

ADDED: Final = frozenset(
    {b"date", b"server", b"server-timing", b"x-request-id", b"x-warmpool-instance", b"x-warmpool-tier"}
)
"""What warmpool says of itself, in every answer; what an engine says under these names is not passed on."""
FRAMING: Final = frozenset({b"connection", b"content-length", b"keep-alive", b"transfer-encoding"})
"""What belongs to one connection."""
LEFT_OUT: Final = frozenset({b"access-control-allow-origin", b"location", b"set-cookie", b"x-hop"})
"""What no client gets to see; `X-Hop` is named by the engine's `Connection`."""
OF_EVENTS: Final = {b"cache-control": b"no-cache", b"x-accel-buffering": b"no"}
"""For answers that are events and lack them."""
CONTAINED: Final = {b"x-content-type-options": b"nosniff", b"content-security-policy": b"sandbox; default-src 'none'"}
"""For answers that are neither JSON nor events, in place of what the engine says."""


@dataclass(frozen=True)
class Answer:
    """One as a client reads it: the coding of the transfer is taken off, nothing else."""

    status: int
    reason: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes
    trailers: list[tuple[bytes, bytes]]
    whole: bool


@dataclass(frozen=True)
class Question:
    """A request, and the answer that has to come."""

    head: bytes
    body: bytes
    old: bool
    waits: bool
    """Waits to be told to send the body."""
    breaks: bool

    @property
    def data(self) -> bytes:
        return self.head + self.body


# --- what is asked ---


def question(chance: random.Random, *, last: bool) -> Question:
    """A random one; the last of a connection ends it."""
    old = last and chance.random() < 0.15
    breaks = last and chance.random() < 0.1
    path, kind, body = _content(chance)
    if chance.random() < 0.1:
        path += "?a=b%20c"
    fields = [f"X-Seed: {chance.randrange(1 << 40)}", f"Content-Type: {kind}"]
    fields += chance.sample(["User-Agent: x y", "X-A:1", "X-B: \t two  words ", "X-Empty:", "Accept: */*"], 2)
    fields += chance.sample(["Authorization: Bearer none", "Cookie: a=b", "X-Forwarded-For: 10.0.0.1"], 1)
    if breaks:
        fields.append(f"{BREAKS}: 1")
    if last and not old:
        fields.append("Connection: close")
    if (coding := chance.choice((None, None, None, None, "gzip", "deflate", "zstd"))) is not None:
        body = _coded(coding, body)
        fields.append(f"Content-Encoding: {coding}")
    expects = not old and chance.random() < 0.15
    if expects:
        fields.append("Expect: 100-continue")
    if old or chance.random() < 0.7:
        fields.append(f"Content-Length: {len(body)}")
    else:
        fields.append("Transfer-Encoding: chunked")
        body = _chunked(chance, body)
    chance.shuffle(fields)
    names = chance.choice((str, str.lower, str.upper))
    lines = [f"{names(name)}:{value}" for name, _, value in (line.partition(":") for line in fields)]
    head = "\r\n".join([f"POST {path} HTTP/1.{0 if old else 1}", "Host: localhost", *lines, "", ""])
    return Question(head.encode(), body, old, expects, breaks)


def _content(chance: random.Random) -> tuple[str, str, bytes]:
    if chance.random() < 0.1:
        parts = [
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ndemo\r\n',
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
            + chance.randbytes(chance.randrange(3000)).replace(b"--b", b"")
            + b"\r\n",
        ]
        chance.shuffle(parts)
        return "/v1/audio/transcriptions", "multipart/form-data; boundary=b", b"".join(parts) + b"--b--\r\n"
    path = chance.choice(("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/embeddings"))
    values: list[tuple[str, Any]] = [("model", "demo"), ("max_tokens", chance.randrange(100)), ("stream", True)]
    values.append(("prompt", _text(chance)))
    values.append(("x", [[chance.random(), None, {"model": "other"}, _text(chance)]] * chance.randrange(4)))
    chance.shuffle(values)
    fields = (orjson.dumps(name) + chance.choice((b":", b" : ")) + orjson.dumps(value) for name, value in values)
    return (
        path,
        "application/json",
        b"{" + chance.choice((b",", b",\n ")).join(fields) + b"}" + b" " * chance.randrange(2),
    )


def _text(chance: random.Random) -> str:
    words = chance.choices(
        ["Hello", "äöü", "漢字", "😀", '"model": "other"', "\\", "\n", "\x00"], k=chance.randrange(20)
    )
    return " ".join(words) * chance.choice((1, 1, 1, 1, 1, 20, 3000))


def _coded(coding: str, body: bytes) -> bytes:
    match coding:
        case "gzip":
            return gzip.compress(body, 1)
        case "deflate":
            return zlib.compress(body)
        case _:
            return zstandard.ZstdCompressor().compress(body)


def _chunked(chance: random.Random, body: bytes) -> bytes:
    sizes = (b"%x", b"%X")
    pieces = [chance.choice(sizes) % len(piece) + b"\r\n" + piece + b"\r\n" for piece in cut(chance, body)]
    return b"".join(pieces) + b"0\r\n\r\n"


def cut(chance: random.Random, data: bytes) -> list[bytes]:
    """The same in a few pieces, none of them empty."""
    places = sorted({chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 1, 2, 6)))})
    return [part for a, b in zip([0, *places], [*places, len(data)], strict=True) if (part := data[a:b])]


# --- asking ---


async def asked(port: int, questions: list[Question], chance: random.Random) -> tuple[bytes, bool]:
    """All that comes back on one connection, and whether it came to an end in order."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    received, ended = b"", False
    try:
        async with asyncio.timeout(PATIENCE_S):
            if questions[0].waits and chance.random() < 0.7:
                await _send(writer, questions[0].head, chance)
                received = await reader.readuntil(b"\r\n\r\n")
                rest = questions[0].body
            else:
                rest = questions[0].data
            sending = asyncio.create_task(_send(writer, rest + b"".join(q.data for q in questions[1:]), chance))
            try:
                while data := await reader.read(1 << 16):
                    received += data
                ended = True
            finally:
                sending.cancel()
                with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                    await sending
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # a broken answer, by a reset
    finally:
        writer.close()
    return received, ended


async def _send(writer: asyncio.StreamWriter, data: bytes, chance: random.Random) -> None:
    for piece in cut(chance, data):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(chance.choice((0, 0, 0, 0.003)))


async def leave(port: int, questions: list[Question], chance: random.Random, phase: str) -> None:
    """Leave in this phase of a connection, by a reset or in order."""
    data = b"".join(q.data for q in questions)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    most = {"at once": 0, "in the head": len(questions[0].head) - 1, "in the body": len(data) - 1}.get(phase, len(data))
    least = len(questions[0].head) if phase == "in the body" else 0
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
        async with asyncio.timeout(1.0):
            await _send(writer, data[: chance.randint(min(least, most), most) if most < len(data) else most], chance)
            if phase == "waiting":
                await asyncio.sleep(chance.uniform(0, 0.02))
            elif phase == "in the answer":
                await reader.readexactly(chance.randrange(1, 2000))
    if chance.random() < 0.5 and not writer.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
    else:
        writer.close()


# --- what came ---


def answers(raw: bytes, count: int, *, ended: bool = True) -> list[Answer]:
    """Those that were begun, at most `count`, read by h11. `ended`: in order, so that a body may end by it."""
    found: list[Answer] = []
    peer = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    peer.receive_data(raw)
    if ended:
        peer.receive_data(b"")
    while len(found) < count:
        peer.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
        peer.send(h11.EndOfMessage())
        answer = _answer(peer)
        if answer is None:
            break
        found.append(answer)
        if not answer.whole or peer.their_state is not h11.DONE or peer.our_state is not h11.DONE:
            break
        peer.start_next_cycle()
    return found


def _answer(peer: h11.Connection) -> Answer | None:
    head: h11.Response | None = None
    body = b""
    try:
        while True:
            match event := peer.next_event():
                case h11.Response():
                    head = event
                case h11.Data():
                    body += bytes(event.data)
                case h11.EndOfMessage():
                    assert head is not None
                    return _made(head, body, [*event.headers.raw_items()], whole=True)
                case h11.ConnectionClosed():
                    return None
                case h11.NEED_DATA | h11.PAUSED:
                    return _made(head, body, [], whole=False) if head is not None else None
                case _:
                    pass  # interim answers are for who speaks to the engine
    except h11.RemoteProtocolError:
        return _made(head, body, [], whole=False) if head is not None else None


def _made(head: h11.Response, body: bytes, trailers: list[tuple[bytes, bytes]], *, whole: bool) -> Answer:
    fields = [(bytes(name), bytes(value)) for name, value in head.headers.raw_items()]
    return Answer(head.status_code, bytes(head.reason), fields, body, trailers, whole)


def by_contract(answer: Answer) -> tuple[int, bytes, list[tuple[bytes, bytes]], bytes, list[tuple[bytes, bytes]]]:
    """What a client of warmpool gets of an engine's answer, without `ADDED` and `FRAMING`."""
    kinds = [
        value.partition(b";")[0].strip().lower() for name, value in answer.fields if name.lower() == b"content-type"
    ]
    fields = _without(answer.fields, ADDED | FRAMING | LEFT_OUT)
    if kinds not in ([b"application/json"], [b"text/event-stream"]):
        fields = [*_without(fields, frozenset(CONTAINED)), *CONTAINED.items()]
    if kinds == [b"text/event-stream"]:
        names = {name.lower() for name, _ in fields}
        fields += [item for item in OF_EVENTS.items() if item[0] not in names]
    trailers = _without(answer.trailers, ADDED | FRAMING | LEFT_OUT)
    return answer.status, answer.reason, sorted(fields), answer.body, trailers


def as_it_came(answer: Answer) -> tuple[int, bytes, list[tuple[bytes, bytes]], bytes, list[tuple[bytes, bytes]]]:
    """The same of an answer that came through warmpool."""
    return (
        answer.status, answer.reason, sorted(_without(answer.fields, ADDED | FRAMING)), answer.body, answer.trailers
    )  # fmt: skip


def _without(fields: list[tuple[bytes, bytes]], names: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    return [field for field in fields if field[0].lower() not in names]


def differences(questions: list[Question], direct: list[Answer | None], through: list[Answer]) -> list[str]:
    """What is not as it has to be, in words."""
    found = []
    for number, (one, expected) in enumerate(zip(questions, direct, strict=True)):
        came = through[number] if number < len(through) else None
        if one.breaks:
            found += _broken(expected, came)
        elif came is None:
            found.append(f"no answer {number + 1} of {len(questions)}")
        elif expected is None or not expected.whole:
            found.append(f"the engine's own answer {number + 1} did not come whole")
        else:
            if not came.whole:
                found.append(f"answer {number + 1} broke off")
            wanted, got = by_contract(expected), as_it_came(came)
            if one.old:
                wanted = (*wanted[:4], got[4])  # no trailers where there are no chunks
                assert got[4] == []
            found += [
                f"answer {number + 1}: {w!r:.300} became {g!r:.300}" for w, g in zip(wanted, got, strict=True) if w != g
            ]
            missing = ADDED - {name.lower() for name, _ in came.fields}
            found += [f"answer {number + 1} lacks {missing}"] if missing else []
    return found


def _broken(expected: Answer | None, came: Answer | None) -> list[str]:
    """An answer that breaks off never looks complete; where nothing of it was out, it is a 502."""
    if came is None:
        return []
    if not came.whole:
        return (
            []
            if expected is None or came.body.startswith(expected.body) or expected.body.startswith(came.body)
            else [f"broken, and other bytes: {came.body!r:.200} for {expected.body!r:.200}"]
        )
    if came.status == 502 and b"upstream_failed" in came.body:
        return []
    return [f"a broken answer looks complete: {came!r:.300}"]


@pytest.mark.timeout(120 + 2 * SECONDS)
async def test_engine_and_warmpool_answer_alike(tmp_path: Path) -> None:
    model = {
        "process": {"command": ["{python}", "-m", "tests.random_engine", "{port}"], "cwd": str(ROOT)},
        "health": {"interval": "20ms"}, "warmup": {"requests": 0}, "canary": "never",
        "idle": {"sleeping": "never", "suspended": "never", "checkpointed": "never"},
    }  # fmt: skip
    proxy = await Proxy(tmp_path / "it", settings={"models": {"demo": model}}).listening()
    counts: Counter[str] = Counter()
    try:
        port = int(proxy.url.rpartition(":")[2])
        assert (await asked(port, [question(random.Random(0), last=True)], random.Random(0)))[0]
        engine = (await proxy.engine_state())["port"]
        loop = asyncio.get_running_loop()
        end = loop.time() + SECONDS

        async def worker(number: int) -> None:
            turn = 0
            while turn < len(PHASES) or loop.time() < end:
                phase = PHASES[turn % len(PHASES)]
                turn += 1
                name = f"{SEED} {number} {turn}"
                chance = random.Random(name)
                count = chance.choice((1, 1, 1, 2, 3, 5))
                questions = [question(chance, last=n == count - 1) for n in range(count)]
                while count > 1 and questions[-1].breaks and questions[-1].old:
                    # Ended by a reset, which takes along what a client has not read yet of the answers before.
                    questions[-1] = question(chance, last=True)
                if number % 4 == 0:
                    await leave(port, questions, chance, phase)
                    counts["left"] += 1
                    continue
                direct = [await _alone(engine, one, random.Random(f"{name} {n}")) for n, one in enumerate(questions)]
                raw, ended = await asked(port, questions, chance)
                found = differences(questions, direct, answers(raw, count, ended=ended))
                assert found == [], f"DIFFERENTIAL_SEED={SEED}, {name}: {found} after {[q.head for q in questions]}"
                counts["compared"] += count
                counts["whole"] += sum(not one.breaks for one in questions)

        async with asyncio.TaskGroup() as workers:
            for number in range(TOGETHER):
                workers.create_task(worker(number))
        async with asyncio.timeout(PATIENCE_S):
            while (await get_json(f"{proxy.url}/admin/status"))["leases"]:
                await asyncio.sleep(0.02)
            while (await proxy.engine_state())["running"]:
                await asyncio.sleep(0.02)
    finally:
        proxy.process.send_signal(signal.SIGTERM)
        await proxy.ended()
    log = proxy.log.read_text()
    print(f"DIFFERENTIAL_SEED={SEED}: {dict(counts)}")  # noqa: T201 - the figures, with `pytest -s`
    assert [line for line in log.splitlines() if "Traceback" in line or " ERROR " in line] == []


async def _alone(port: int, one: Question, chance: random.Random) -> Answer | None:
    """The engine's answer on a connection of its own, which it may end after any answer and has to end after this."""
    one = replace(one, head=one.head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
    raw, ended = await asked(port, [one], chance)
    return next(iter(answers(raw, 1, ended=ended)), None)


def test_a_difference_is_seen() -> None:
    """The comparison itself: each of these is one, and what the contract says is none."""
    raw = b"HTTP/1.1 200 OK\r\nX-One: 1\r\nServer: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    own = b"".join(b"%b: 1\r\n" % name for name in sorted(ADDED))
    through = raw.replace(b"Server: x\r\n", own)
    one = Question(b"", b"", old=False, waits=False, breaks=False)
    direct: list[Answer | None] = [*answers(raw, 1)]

    def found(came: bytes, *, breaks: bool = False) -> list[str]:
        questions = [Question(b"", b"", old=False, waits=False, breaks=True) if breaks else one]
        return differences(questions, direct, answers(came, 1))

    assert found(through) == []
    for a, b in [
        (b"200", b"201"), (b"OK", b"Ok"), (b"X-One", b"x-one"), (b"One: 1", b"One: 2"), (b"{}", b"[]"),
        (b"{}", b"{"),        (b"x-request-id: 1\r\n", b""), (b"X-One", b"Set-Cookie: a\r\nX-One"), (b"json", b"jsonl"),
    ]:  # fmt: skip
        assert found(through.replace(a, b)), (a, b)
    assert found(b"") == ["no answer 1 of 1"]
    assert found(through, breaks=True)
    assert found(through[:-1], breaks=True) == []
