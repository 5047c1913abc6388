"""The load-test engine as a process, and what the pool says to an engine."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import psutil
import pytest

from loadtest import engine_text as text
from proxy.engine.connection import ExchangeError
from proxy.engine.kinds.vllm import VllmClient
from proxy.errors import EngineError
from proxy.telemetry.stages import Stages
from tests.asking import ask
from tests.forked import ENGINES, Forked
from tests.support import PATIENCE_S, get_json, until_healthy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from tests.asking import Answer


class Running:
    """An engine process."""

    def __init__(self, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        words = ["--port", str(port), "--ttft", "0.001", "--tokens-per-second", "1000", *options]
        with Path(os.devnull).open("wb") as log:
            self.process = Forked(ENGINES.start(words, os.environ, log.fileno()))

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session, session.post(self.url + path, json=body) as response:
            raw = await response.read()
            return response.status, orjson.loads(raw) if raw else None

    async def state(self) -> Any:
        return await get_json(f"{self.url}/debug/state")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_S)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Coroutine[Any, Any, Running]]]:
    """Starts engines and waits until they are healthy."""
    engines: list[Running] = []

    async def start_(*options: str, healthy: bool = True) -> Running:
        engine = Running(*options)
        engines.append(engine)
        if healthy:
            await until_healthy(engine.url)
        return engine

    yield start_
    for engine in engines:
        engine.end()


def client_of(engine: Running, name: str = "demo") -> VllmClient:
    return VllmClient(engine.url, name)


# --- the engine ---


async def test_health_is_503_until_loaded_and_no_request_is_taken(start: Any) -> None:
    engine = await start("--load-seconds", "1", healthy=False)
    statuses = set()
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        while 200 not in statuses:
            try:
                async with session.get(f"{engine.url}/health") as response:
                    statuses.add(response.status)
                if response.status == 503:
                    assert (await engine.post("/v1/completions", {"prompt": "x"}))[0] in (503, 200)
            except aiohttp.ClientError:
                await asyncio.sleep(0.01)
    assert statuses == {503, 200}


async def test_memory_is_resident_and_incompressible(start: Any) -> None:
    engine = await start("--memory", "64MiB", "--processes", "2")
    state = await engine.state()
    for pid in (state["pid"], *state["children"]):
        assert psutil.Process(pid).memory_info().rss > 32 << 20
    assert state["memory_bytes"] == 32 << 20


async def test_temperature_0_is_a_function_of_the_prompt_and_1_is_not(start: Any) -> None:
    one, two = await start(), await start()
    ask = {"prompt": "Hello", "max_tokens": 32, "temperature": 0}
    texts = {(await e.post("/v1/completions", ask))[1]["choices"][0]["text"] for e in (one, two, one)}
    assert len(texts) == 1
    assert (await one.post("/v1/completions", {**ask, "prompt": "Hello!"}))[1]["choices"][0]["text"] not in texts
    hot = {(await one.post("/v1/completions", {**ask, "temperature": 1}))[1]["choices"][0]["text"] for _ in range(3)}
    assert len(hot) == 3


async def test_streams_and_whole_answers_agree_for_n_choices_and_stops(start: Any) -> None:
    engine = await start()
    for body, path in (
        ({"prompt": "x", "n": 2, "seed": 1, "max_tokens": 12}, "/v1/completions"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": 0}, "/v1/chat/completions"),
        ({"prompt": "x", "temperature": 0, "stop": [" "], "max_tokens": 12}, "/v1/completions"),
    ):
        _, whole = await engine.post(path, body)
        wanted = [(c.get("text") or c["message"]["content"], c["finish_reason"]) for c in whole["choices"]]
        got = [("", None)] * len(wanted)
        usage = None
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                engine.url + path, json={**body, "stream": True, "stream_options": {"include_usage": True}}
            ) as response,
        ):
            events = [e.removeprefix("data: ") for e in (await response.text()).strip().split("\n\n")]
        assert events[-1] == "[DONE]"
        for event in map(orjson.loads, events[:-1]):
            usage = event.get("usage") or usage
            for c in event["choices"]:
                before, _ = got[c["index"]]
                piece = c["text"] if "text" in c else c["delta"]["content"]
                got[c["index"]] = (before + piece, c["finish_reason"])
        assert got == wanted
        assert usage == whole["usage"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400),
        ("/v1/completions", {"prompt": 3}, 400),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}, 400),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/embeddings", {"input": []}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/v1/completions", ["x"], 400),
        ("/sleep", None, 404),
    ],
)
async def test_bad_requests_are_refused_in_vllms_envelope(start: Any, path: str, body: Any, status: int) -> None:
    engine = await start()
    async with aiohttp.ClientSession() as session, session.post(engine.url + path, json=body) as response:
        assert response.status == status
        if path != "/sleep":
            error = (await response.json())["error"]
            assert set(error) == {"message", "type", "param", "code"}


async def test_it_stops_generating_when_the_client_leaves_and_counts_it(start: Any) -> None:
    engine = await start("--tokens-per-second", "20")
    async with aiohttp.ClientSession() as session:
        response = await session.post(
            engine.url + "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 4000, "ignore_eos": True}
        )
        await response.content.readany()
        response.close()
    async with asyncio.timeout(PATIENCE_S):
        while (await engine.state())["aborted"] == 0:
            await asyncio.sleep(0.01)
    state = await engine.state()
    assert (state["running"], state["waiting"], state["served"]) == (0, 0, 0)


async def test_the_concurrency_limit_makes_the_others_wait(start: Any) -> None:
    engine = await start("--max-num-seqs", "2", "--ttft", "0.3")
    requests = [asyncio.create_task(engine.post("/v1/completions", {"prompt": "x", "max_tokens": 1})) for _ in range(6)]
    async with asyncio.timeout(PATIENCE_S):
        while (await engine.state())["waiting"] < 4:
            await asyncio.sleep(0.005)
    assert (await engine.state())["running"] == 2
    assert {status for status, _ in await asyncio.gather(*requests)} == {200}
    async with aiohttp.ClientSession() as session, session.get(f"{engine.url}/metrics") as response:
        assert 'vllm:request_success_total{model_name="demo"} 6' in await response.text()


async def test_sleep_level_2_forgets_the_weights_until_they_are_reloaded(start: Any) -> None:
    engine = await start("--sleep-mode", "--memory", "8MiB")
    ask = {"prompt": "x", "temperature": 0, "max_tokens": 8}
    before = (await engine.post("/v1/completions", ask))[1]["choices"][0]["text"]
    await engine.post("/sleep?level=2")
    assert (await engine.state())["memory_bytes"] == 0
    assert (await engine.post("/v1/completions", ask))[0] == 503
    await engine.post("/wake_up")
    assert (await engine.post("/v1/completions", ask))[1]["choices"][0]["text"] != before
    await engine.post("/collective_rpc", {"method": "reload_weights"})
    assert (await engine.post("/v1/completions", ask))[1]["choices"][0]["text"] == before


@pytest.mark.parametrize("options", [["--fail-start"], ["--port", "1x"], ["--memory", "1 GB"], ["--ttft", "-1"]])
async def test_what_it_cannot_do_ends_it_with_a_status(start: Any, options: list[str]) -> None:
    engine = await start(*options, healthy=False)
    status = await asyncio.to_thread(engine.process.wait, PATIENCE_S)
    assert status == (3 if options == ["--fail-start"] else 2)


async def test_a_child_that_dies_ends_the_engine(start: Any) -> None:
    engine = await start("--processes", "2")
    os.kill((await engine.state())["children"][0], 9)
    assert await asyncio.to_thread(engine.process.wait, PATIENCE_S) == 4


async def test_faults_are_closed_unless_switched_on(start: Any) -> None:
    engine = await start()
    assert (await engine.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "vllm_xargs": {"fault": "error"}}))[
        0
    ] == 200
    armed = await start("--faults")
    assert (await armed.post("/debug/fault", {"kind": "error", "count": 2}))[1] == {"armed": 2}
    assert [(await armed.post("/v1/completions", {"prompt": "x"}))[0] for _ in range(3)] == [500, 500, 200]
    assert (await armed.post("/debug/fault", {"kind": "nonsense"}))[0] == 400


def test_tokens_give_the_text_back() -> None:
    for sample in ("", "Hello", "naïve 日本語 🙂", "a" * 1000):
        assert text.detokenize(text.tokenize(sample)) == sample
        assert len(text.tokenize(sample)) == text.token_count(sample)


# --- the client of the pool ---


async def test_the_client_sleeps_wakes_and_asks(start: Any) -> None:
    engine = await start("--sleep-mode", "--memory", "8MiB")
    client = client_of(engine)
    await client.wait_healthy("/health", 0.01)
    before = await client.canary()
    for level in (1, 2):
        assert await client.is_sleeping() is False
        await client.sleep(level)
        assert await client.is_sleeping() is True
        with pytest.raises(EngineError, match="canary: POST /v1/completions answered 503"):
            await client.canary()
        await client.wake_up(level, Stages())
        assert await client.canary() == before
    await client.disconnect()


async def test_the_client_has_weights_saved_and_brought_back(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMPOOL_WEIGHTS", str(tmp_path))
    engine = await start("--sleep-mode", "--worker-extension-cls", "proxy.engine.vllm_extension.warmpool_vllm.Worker")
    client = VllmClient(engine.url, "demo")
    before = await client.canary()
    stages = Stages()
    await client.sleep(2)
    assert not await client.wake_up(2, stages, copied=True), "there is no copy yet"
    assert await client.canary() == before, "loaded in the engine's own way instead"
    assert {"wake_up", "load_weights", "reload_weights"} == set(stages.seconds)
    assert await client.save_weights() == (256 << 10) + 17
    loads = (await engine.state())["loads"]
    stages = Stages()
    await client.sleep(2)
    assert await client.wake_up(2, stages, copied=True)
    assert await client.canary() == before
    assert {"wake_up", "load_weights"} == set(stages.seconds)
    assert (await engine.state())["loads"] == loads
    await client.disconnect()


async def test_an_engine_without_the_extension_says_so(
    start: Any,
) -> None:
    engine = await start("--sleep-mode")
    client = VllmClient(engine.url, "demo")
    with pytest.raises(EngineError, match="save_weights: POST /collective_rpc answered 400"):
        await client.save_weights()
    await client.sleep(2)
    assert not await client.wake_up(2, Stages(), copied=True)
    assert await client.canary() is not None
    await client.disconnect()


async def test_an_engine_without_sleep_mode_or_completions_is_known_as_such(start: Any) -> None:
    engine = await start()
    client = client_of(engine)
    assert await client.is_sleeping() is None
    with pytest.raises(EngineError, match=r"sleep: POST /sleep\?level=1 answered 404"):
        await client.sleep(1)
    other = client_of(engine, "other")
    assert await other.complete("warmup", "x", 1) is None
    await client.disconnect()
    await other.disconnect()


async def test_no_connection_is_left_after_disconnect(start: Any) -> None:
    engine = await start()
    client = client_of(engine)
    await client.canary()
    pid = engine.process.pid
    assert [c for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    await client.disconnect()
    async with asyncio.timeout(PATIENCE_S):
        while any(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(pid).net_connections("tcp")):
            await asyncio.sleep(0.01)


async def test_an_engine_that_is_gone_or_answers_garbage_is_an_error_with_its_stage(start: Any) -> None:
    engine = await start("--faults")
    client = client_of(engine)
    for fault in ("garbage_json", "garbage_http", "refuse", "error"):
        await engine.post("/debug/fault", {"kind": fault})
        with pytest.raises(EngineError, match=r"^canary: "):
            await client.canary()
    engine.end()
    assert await client.healthy("/health") is False
    with pytest.raises(EngineError, match=r"^wake_up: "):
        await client.wake_up(1, Stages())
    await client.disconnect()


async def test_disconnecting_fails_what_is_in_flight(start: Any) -> None:
    engine = await start("--faults", "--tokens-per-second", "1")
    client = client_of(engine)
    question = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}

    def post(**more: Any) -> Coroutine[Any, Any, Answer]:
        return ask(client.upstream, "POST", "/v1/completions", orjson.dumps({**question, **more}))

    answering = await post()
    await answering.came.wait()
    asking = await post(vllm_xargs={"fault": "hang"})
    async with asyncio.timeout(PATIENCE_S):
        while (await engine.state())["running"] < 2:
            await asyncio.sleep(0.01)
    await client.disconnect()
    for answer in (answering, asking):
        with pytest.raises(ExchangeError, match="disconnected"):
            await asyncio.wait_for(answer.ended, PATIENCE_S)
    assert client.upstream.connections == 0
    async with asyncio.timeout(PATIENCE_S):
        while (await engine.state())["running"]:
            await asyncio.sleep(0.01)


async def test_a_kept_connection_that_the_engine_closes_costs_no_request() -> None:
    """llama.cpp closes connections after a stream, in whatever moment the next request comes."""
    body = orjson.dumps({"choices": [{"text": "x"}]})
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    requests: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(requests)
        requests.append(0)
        while head := (await reader.readuntil(b"\r\n\r\n")).lower():
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            requests[number] += 1
            if requests[number] > 1:
                break
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = VllmClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "demo")
    assert [await client.canary() for _ in range(3)] == ["x"] * 3
    assert requests == [2, 2, 1]
    await client.disconnect()
    server.close()
