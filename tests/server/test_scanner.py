"""Large bodies are read beside the event loop, and come to the same as small ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from proxy.config.settings import Settings
from proxy.errors import InvalidRequestError, NoCapacityError, RequestError
from proxy.server.forward import model_resolver, scanner
from proxy.server.forward.model_resolver import Addressing
from proxy.server.forward.routes import find
from proxy.server.forward.scanner import Scanner
from proxy.telemetry.loop_stalls import LoopStalls
from proxy.telemetry.metrics import Metrics
from tests.scripted import Scripted, answer_of, post
from tests.support import PATIENCE_S, engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SETTINGS: Final = Settings(
    models={
        "demo": engine_model(
            name="org/Demo", aliases=["alias"],
            parameters={"defaults": {"top_k": 4}, "caps": {"max_tokens": 100}, "remove": ["seed"]},
        ),
        "plain": engine_model(),
    },
)  # fmt: skip
FORM: Final = "multipart/form-data; boundary=b"


@pytest.fixture
async def reads() -> AsyncIterator[Scanner]:
    made = Scanner(limit_s=PATIENCE_S)
    yield made
    made.close()


def part(name: str, value: str) -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


JSON: Final[list[bytes]] = [
    b'{"model":"org/Demo","stream":true,"top_k":1}', b'{"model":"alias"}', b'{"model":"plain"}', b'{"model":"none"}',
    b'{"model":"org/Demo","max_tokens":1000,"seed":3,"big":123456789012345678901234567890}',
    b'{"model":"org/Demo","max_tokens":"x"}', b'{"model":"org/Demo","max_tokens":{}}', b'{"model":3}', b'{"model":""}',
    b'{"model":"alias","model":"plain"}', b'{"mod\\u0065l":"alias","model":"plain"}', b"{}", b"[]", b"{", b"",
    b"\xef\xbb\xbf" + b'{"model":"alias"}', b'{"model":"plain","x":{"model":"alias"}}', b'{"model":["alias"]}',
    b'{"model":"plain","x":' + b"[" * 2000 + b"]" * 2000 + b"}", b'{"model":"plain","previous_response_id":"resp_1"}',
    b'{"model":"alias",' + b",".join(b'"k%d":1' % n for n in range(6000)) + b"}",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
async def test_a_large_body_goes_where_a_small_one_would(
    reads: Scanner, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_resolver, "LARGE", -1)
    made_by = {"resp_1": ("plain", "plain-1")}.get
    addressing = Addressing(lambda: SETTINGS, made_by, reads)
    match = find("POST", path)
    for body in JSON:
        large = await outcome(addressing, match, "application/json", body)
        try:
            small: Any = addressing.find(match, "application/json", body)
        except RequestError as error:
            small = (type(error), error.message, error.param)
        else:
            small = (small.model, small.target, small.body, small.streams, small.instance)
        assert large == small, body


async def test_a_large_form_goes_where_a_small_one_would(reads: Scanner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_resolver, "LARGE", -1)
    addressing = Addressing(lambda: SETTINGS, None, reads)
    match = find("POST", "/v1/audio/transcriptions")
    for content_type, body in (
        (FORM, part("model", "alias") + part("stream", "true") + b"--b--\r\n"),
        (FORM, part("model", "plain") + b"--b--\r\n"), (FORM, part("model", "none") + b"--b--\r\n"),
        (FORM, part("model", "") + b"--b--\r\n"), (FORM, part("model", "plain") * 2 + b"--b--\r\n"),
        (FORM, part("model", "plain")), ("text/plain", b""),
    ):  # fmt: skip
        large = await outcome(addressing, match, content_type, body)
        try:
            small: Any = addressing.find(match, content_type, body)
        except RequestError as error:
            small = (type(error), error.message, error.param)
        else:
            small = (small.model, small.target, small.body, small.streams, small.instance)
        assert large == small, body


async def outcome(addressing: Addressing, match: Any, content_type: str, body: bytes) -> Any:
    try:
        got = await addressing.found(match, content_type, body)
    except RequestError as error:
        return (type(error), error.message, error.param)
    return (got.model, got.target, got.body, got.streams, got.instance)


SIZE: Final = 8 << 20
START: Final = b'{"model":"demo","x":'
SHAPES: Final[dict[str, bytes]] = {
    "deep arrays": START + b"[" + b",".join([b"[" * 900 + b"]" * 900] * (SIZE // 1801)) + b"]}",
    "small objects": START + b"[" + b'{"a":1},' * (SIZE // 8) + b"1]}",
    "a string with escapes": START + b'"' + b'\\n\\"' * (SIZE // 4) + b'"}',
    "many keys": b'{"model":"demo",' + b",".join(b'"k%d":%d' % (n, n) for n in range(SIZE // 20)) + b"}",
    "a name repeated": b"{" + b'"model":"demo",' * 4000 + b'"x":[' + b"1," * (SIZE // 2) + b"1]}",
    "a name in inner objects": START + b"[" + b'{"model":"b"},' * (SIZE // 14) + b"1]}",
    "unicode escapes": START + b'"' + b"\\u00e9" * (SIZE // 6) + b'"}',
    "letters as escapes": START + b'"' + b"\\u0041" * (SIZE // 6) + b'"}',
    "numbers": START + b"[" + b"1.5e10," * (SIZE // 7) + b"1]}",
    "a picture": START + b'"' + b"QUJD" * (SIZE // 4) + b'"}',
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_others_have_their_turns_while_a_large_body_is_read(reads: Scanner, shape: str) -> None:
    """Compared with a control: a job of the same process that only waits as long."""
    addressing = Addressing(lambda: Settings(models={"demo": engine_model()}), None, reads)
    match = find("POST", "/v1/chat/completions")
    await addressing.found(match, "", b" " * (scanner.LARGE + 1) + b'{"model":"demo"}')  # it has started
    turns = longest_s = 0.0
    loop = asyncio.get_running_loop()

    async def other() -> None:
        nonlocal turns, longest_s
        while True:
            before = loop.time()
            await asyncio.sleep(0)
            turns += 1
            longest_s = max(longest_s, loop.time() - before)

    began = loop.time()
    task = asyncio.create_task(other())
    found = await addressing.found(match, "", SHAPES[shape])
    took_s = loop.time() - began
    assert found.model == "demo"
    turns_with = turns
    await asyncio.sleep(took_s)
    task.cancel()
    control = turns - turns_with
    assert turns_with > control / 10, f"{turns_with} turns, {control} without it"


def scanning() -> set[psutil.Process]:
    found = set()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if "proxy.server.forward.scan_process" in process.cmdline():
                found.add(process)
    return found


async def test_a_large_body_goes_through_unchanged_and_the_process_ends_with_the_server() -> None:
    body, before = SHAPES["a picture"], scanning()
    async with Scripted() as proxy:
        status, *_ = answer_of(await proxy.ask(post(body, "Connection: close", path="/v1/completions")))
        assert status == 200
        assert proxy.peers[0].requests[0][1] == body
        [child] = scanning() - before
    async with asyncio.timeout(PATIENCE_S):
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.01)


def pid_of(reads: Scanner) -> int:
    assert reads._process is not None
    return reads._process.pid


async def test_a_process_that_ends_or_takes_too_long_is_replaced() -> None:
    reads = Scanner(limit_s=1.0)
    body, job = b'{"model":"demo"}', {"names": ["model"], "unified": []}
    try:
        assert (await reads.facts("read_json", body, **job))["fields"] == {"model": "demo"}
        first = pid_of(reads)
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(InvalidRequestError, match="within 1 s"):
            await reads.facts("read_json", body, **job)
        reads._limit_s = PATIENCE_S
        assert (await reads.facts("read_json", body, **job))["fields"] == {"model": "demo"}
        second = pid_of(reads)
        assert second != first
        os.kill(second, signal.SIGSTOP)
        waits = asyncio.create_task(reads.facts("read_json", body, **job))
        await asyncio.sleep(0.05)
        os.kill(second, signal.SIGKILL)
        with pytest.raises(NoCapacityError):
            await waits
        waits = asyncio.create_task(reads.facts("read_json", body, **job))
        await asyncio.sleep(0)
        waits.cancel()  # its client has left
        await asyncio.wait([waits])
        assert (await reads.facts("read_json", body, **job))["fields"] == {"model": "demo"}
    finally:
        reads.close()


async def test_too_many_large_bodies_are_refused(reads: Scanner) -> None:
    jobs = [
        asyncio.create_task(reads.facts("read_json", b'{"model":"demo"}', names=["model"], unified=[]))
        for _ in range(20)
    ]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    refused = [r for r in results if isinstance(r, NoCapacityError)]
    assert len(refused) == 4
    assert refused[0].headers()["Retry-After"] == "1"
    assert [r for r in results if not isinstance(r, Exception)] != []


async def test_a_stall_of_the_event_loop_is_measured() -> None:
    metrics = Metrics()
    observed: list[float] = []

    def observe(seconds: float) -> None:
        observed.append(seconds)
        metrics.loop_stalls.observe(seconds)

    stalls = LoopStalls(observe)
    stalls.start()
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.3
    while loop.time() < until:
        pass
    async with asyncio.timeout(PATIENCE_S):
        while not observed:
            await asyncio.sleep(0.001)
    stalls.stop()
    assert max(observed) >= 0.2
    name = "warmpool_event_loop_stall_seconds_count"
    assert metrics.registry.get_sample_value(name) == len(observed)
