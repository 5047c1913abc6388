"""The load tests' client: what it takes from the wire, when it sends, what its times are worth."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import client_calibration
from loadtest.answer_parser import Answer, Events, WireError
from loadtest.client import Client, Outcome, Request, Target, TargetError
from loadtest.display import Display
from loadtest.precise_timer import PreciseTimer
from loadtest.results import Writer
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def event(text: str, **more: object) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "text": text}], **more}) + b"\n\n"


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    marks = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(marks) if a < b]


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 2000), max_size=12))
def test_a_body_is_the_same_however_it_was_cut(pieces: list[bytes], cuts: list[int]) -> None:
    data = HEAD + chunked(*pieces)
    answer = Answer()
    assert b"".join(answer.feed(part) for part in split(data, cuts)) == b"".join(pieces)
    assert answer.ended
    assert answer.status == 200
    assert answer.is_stream


@given(
    st.lists(st.text(max_size=12), min_size=1, max_size=8), st.lists(st.integers(0, 2000), max_size=12), st.booleans()
)
def test_tokens_are_counted_however_they_were_cut(words: list[str], cuts: list[int], keep: bool) -> None:
    words = ["first", *words]
    usage = b'data: {"choices":[],"usage":{"completion_tokens":77}}\n\n'
    data = b": a comment\n\n" + b"".join(event(word) for word in words) + usage + b"data: [DONE]\n\n"
    events = Events(keep_text=keep)
    assert sum(events.feed(part) for part in split(data, cuts)) == len(words)
    assert events.done
    assert events.usage == 77
    assert events.error is None
    if keep:
        assert "".join(events.text) == "".join(words)


def test_a_chat_begins_with_its_first_content_not_with_the_role() -> None:
    events = Events(keep_text=False)
    assert events.feed(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n') == 0
    assert events.feed(b'data: {"choices":[{"delta":{"content":"Hello"}}]}\n\n') == 1


def test_a_completion_begins_with_its_first_token_though_that_be_a_mark() -> None:
    events = Events(keep_text=True)
    assert events.feed(event("")) == 1
    assert events.feed(event("a")) == 1
    assert "".join(events.text) == "a"


def test_an_error_within_a_stream_is_seen() -> None:
    events = Events(keep_text=False)
    events.feed(event("a") + b'data: {"error": {"message": "gone"}}\n\n')
    assert "gone" in str(events.error)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        HEAD + b"zz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        Answer().feed(data)


@pytest.mark.parametrize(
    "data", [b"", b"HTTP/1.1 200", HEAD + b"5\r\nab", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"]
)
def test_an_answer_that_breaks_off_is_not_whole(data: bytes) -> None:
    answer = Answer()
    if data:
        answer.feed(data)
    with pytest.raises(WireError, match="ended before"):
        answer.feed(b"")


def test_other_forms_of_answers() -> None:
    answer = Answer()
    assert answer.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcde") == b"abc"
    assert answer.ended
    answer = Answer()
    assert answer.feed(b"HTTP/1.0 200 OK\r\n\r\nuntil") == b"until"
    assert [answer.ended, answer.feed(b""), answer.ended] == [False, b"", True]
    answer = Answer()
    answer.feed(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert answer.ended


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1:1", "127.0.0.1:80", "http://127.0.0.1/v1", "http://", "http://h:99999"]
)
def test_an_address_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(TargetError):
        Target.at(url)


async def test_an_alarm_rings_at_its_moment_and_never_before() -> None:
    with PreciseTimer() as timer:
        for wait_ns in (0, 300_000, 1_700_000):
            moment_ns = time.monotonic_ns() + wait_ns
            await timer.until(moment_ns)
            assert time.monotonic_ns() >= moment_ns


class Calibrated:
    """The calibrated server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process, self.url = process, url


@pytest.fixture
async def calibrated() -> AsyncIterator[Calibrated]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.calibration_server", "--ttft", "0.05", stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    yield Calibrated(process, (await process.stdout.readline()).decode().strip())
    process.kill()
    await process.communicate()


def ask(due_s: float, tokens: int = 3) -> Request:
    return Request(due_s, {"model": "m", "prompt": "x", "max_tokens": tokens, "stream": True}, series="all")


async def test_its_times_enclose_what_the_server_did(calibrated: Calibrated) -> None:
    outcomes: list[Outcome] = []
    async with Client(Target.at(calibrated.url)) as client:
        await client.run([ask(n / 200) for n in range(100)], outcomes.append)
        assert not client.open
    assert [o.error for o in outcomes] == [None] * 100
    for outcome in outcomes:
        assert outcome.connect_s is not None
        assert outcome.headers_s is not None
        assert outcome.ttft_s is not None
        assert outcome.read_s is not None
        assert outcome.end_s is not None
        assert 0 <= outcome.late_s <= outcome.connect_s <= outcome.headers_s <= outcome.ttft_s <= outcome.end_s
        # The kernel's time is never later than the time at which a program has read.
        assert outcome.ttft_s <= outcome.read_s
        # Nor can an answer be there before it was sent (the two clocks agree to some microseconds).
        assert client_calibration.error_s(outcome) > -0.0001
        assert len(outcome.token_s) == outcome.tokens == 3
        assert list(outcome.token_s) == sorted(outcome.token_s)


async def test_a_server_that_stalls_costs_every_request_that_was_due(calibrated: Calibrated) -> None:
    """No coordinated omission: requests go on, and their times count from when they should have been sent."""
    outcomes: list[Outcome] = []
    resumed_ns = 0

    async def stall() -> None:
        nonlocal resumed_ns
        await asyncio.sleep(0.2)
        os.kill(calibrated.process.pid, signal.SIGSTOP)
        await asyncio.sleep(0.5)
        resumed_ns = time.monotonic_ns()
        os.kill(calibrated.process.pid, signal.SIGCONT)

    async with Client(Target.at(calibrated.url)) as client:
        stalling = asyncio.create_task(stall())
        await client.run([ask(n / 100) for n in range(100)], outcomes.append)
        await stalling
    assert [o.error for o in outcomes] == [None] * 100
    # Those of the last 0.3 s before it went on could not be answered before.
    held = [o for o in outcomes if resumed_ns - 300_000_000 < o.due_ns < resumed_ns]
    assert len(held) >= 25
    for outcome in held:
        assert outcome.ttft_s is not None
        assert outcome.due_ns + outcome.ttft_s * 1e9 > resumed_ns


async def test_failures_are_outcomes(calibrated: Calibrated) -> None:
    closed = Target.at("http://127.0.0.1:1")
    async with Client(closed) as client:
        outcome = await client.ask(ask(0))
    assert outcome.error is not None
    assert "refused" in outcome.error
    async with Client(Target.at(calibrated.url), timeout_s=0.2) as client:
        outcome = await client.ask(ask(0, tokens=1000))
        assert outcome.error == "no whole answer in time"
        task = asyncio.create_task(client.ask(ask(0)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert not client.open


async def test_its_own_error_is_measured() -> None:
    load = client_calibration.Load(streams=150, per_second=150, ttft_s=0.1)
    with Writer(None, "calibrate", {}) as writer, Display("calibrate", enabled=False) as display:
        found = await client_calibration.measure(load, writer, display)
        result = writer.close()
    assert found.lost == 0
    assert found.most_open == 150
    assert len(result.values("client", "error_s")) == 150
    # What the kernel's clock is worth: without it, all of them would be further off.
    assert all(late >= 0 for late in found.read_late_s)
    assert sum(found.read_late_s) > 0
