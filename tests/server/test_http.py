"""The HTTP front with a real engine behind it: what clients get, byte for byte, and what they get when things break."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest

from proxy.engine.connection import Connection
from proxy.host import private_files
from proxy.server.auth import api_keys
from tests.support import PATIENCE_S, get_json

if TYPE_CHECKING:
    from pathlib import Path

    from tests.front import Front


ASK = {"model": "demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
HELD = {**ASK, "stream": True, "vllm_xargs": {"fault": "hold_mid_stream"}}
"""Asks for a stream that stands still after three tokens, until `Front.release`."""
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}


def error_of(answer: bytes) -> dict[str, Any]:
    """The error envelope, checked for its shape."""
    error = orjson.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["type"], str)
    return dict(error)


# --- what goes through ---


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", ASK),
        ("/v1/chat/completions", CHAT),
        ("/v1/embeddings", {"model": "demo", "input": ["a", "b"]}),
        ("/tokenize", {"model": "demo", "prompt": "Hello there"}),
        ("/detokenize", {"model": "demo", "tokens": [(1 << 24) + 65, (1 << 24) + 66]}),
    ],
)
async def test_the_answer_is_the_engines(front: Front, path: str, body: dict[str, Any]) -> None:
    response, answer = await front.post(path, body)
    assert response.status == 200
    async with aiohttp.ClientSession() as session, session.post((await front.engine()) + path, json=body) as direct:
        expected = orjson.loads(await direct.read())
    got = orjson.loads(answer)
    for volatile in ("id", "created"):
        got.pop(volatile, None), expected.pop(volatile, None)
    assert got == expected


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", ASK), ("/v1/chat/completions", CHAT)])
async def test_a_stream_comes_through_as_it_is_made(front_of: Any, path: str, body: dict[str, Any]) -> None:
    front: Front = await front_of("--tokens-per-second", "20", "--ttft", "0.05")
    await front.post("/tokenize", {"model": "demo", "prompt": "wake"})
    moments, received = [], b""
    loop = asyncio.get_running_loop()
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with front.session.post(path, json=request) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        async for chunk in response.content.iter_any():
            moments.append(loop.time())
            received += chunk
    assert len(moments) >= 6, "tokens arrive one by one, not at the end"
    assert moments[-1] - moments[0] > 0.2
    events = [line[6:] for line in received.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert orjson.loads(events[-2])["usage"]["completion_tokens"] == 8


async def test_a_large_body_reaches_the_engine_whole(front_of: Any) -> None:
    front: Front = await front_of("--max-model-len", "1000000", server={"body_limit": "8MiB"})
    response, answer = await front.post("/tokenize", {"model": "demo", "prompt": "word " * (1 << 19)})
    assert response.status == 200
    assert orjson.loads(answer)["count"] >= 1 << 19


async def test_a_body_may_come_in_one_piece_behind_its_headers(front: Front) -> None:
    """Before the handler has begun, which is one turn of the loop after the headers were there."""
    body = orjson.dumps({**ASK, "user": "x" * 200_000})
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    await front.post("/v1/completions", ASK)
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body))
        await asyncio.sleep(0)
        writer.write(body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_engine_errors_pass_through_unchanged(front: Front) -> None:
    response, answer = await front.post("/v1/completions", {**ASK, "max_tokens": 0})
    assert response.status == 400
    assert orjson.loads(answer)["error"]["type"] == "BadRequestError"


async def test_the_body_reaches_the_engine_untouched_but_for_an_alias(front_of: Any) -> None:
    front: Front = await front_of(name="org/Demo", aliases=["gpt-4"])
    for name in ("org/Demo", "gpt-4"):
        response, answer = await front.post("/v1/completions", {**ASK, "model": name})
        assert (response.status, orjson.loads(answer)["model"]) == (200, "org/Demo")


async def test_credentials_stay_here_and_hop_by_hop_headers_too(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    await front.post("/v1/completions", ASK)
    original = Connection.begin

    def spy(self: Connection, receiver: Any, message: bytes, body: bytes = b"") -> None:
        lines = message.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
        seen.append({name.lower(): value for name, value in (line.split(": ", 1) for line in lines)})
        original(self, receiver, message, body)

    monkeypatch.setattr(Connection, "begin", spy)
    headers = {
        "Authorization": "Bearer sk-secret",
        "X-Api-Key": "sk-secret",
        "Cookie": "a=b",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "X-Request-Id": "abc",
    }
    response, _ = await front.post("/v1/completions", ASK, headers=headers)
    assert response.status == 200
    assert "sk-secret" not in str(seen)
    assert not {"cookie", "connection", "x-hop"} & set(seen[0])
    assert seen[0]["x-request-id"] == "abc"


async def test_headers_say_what_the_request_found_and_what_it_took(front: Front) -> None:
    first, _ = await front.post("/v1/completions", ASK)
    assert first.headers["x-warmpool-tier"] == "stopped"
    assert first.headers["x-warmpool-instance"] == "demo-1"
    timing = dict(part.split(";dur=") for part in first.headers["server-timing"].split(", "))
    assert {"queue", "wake", "start", "load", "warmup"} <= set(timing)
    assert float(timing["wake"]) >= float(timing["load"]) > 0
    second, _ = await front.post("/v1/completions", ASK)
    assert second.headers["x-warmpool-tier"] == "ready"
    assert second.headers["server-timing"].startswith("queue;dur=")
    assert "wake" not in second.headers["server-timing"]
    assert first.headers["Server"] == "warmpool"


# --- what is answered here ---


async def test_models_are_listed_without_waking_any(front_of: Any) -> None:
    front: Front = await front_of(name="org/Demo", aliases=["gpt-4"])
    listed = await get_json(f"{front.url}/v1/models")
    assert [m["id"] for m in listed["data"]] == ["org/Demo", "gpt-4"]
    assert (await get_json(f"{front.url}/v1/models/org/Demo"))["object"] == "model"
    async with front.session.get("/v1/models/none") as response:
        assert response.status == 404
        assert error_of(await response.read())["code"] == "model_not_found"
    assert front.pool.status()["models"]["demo"]["instances"] == []


async def test_a_browser_is_led_from_the_root_to_the_status_page_and_a_program_is_not(
    front_of: Any, tmp_path: Path
) -> None:
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    keys = tmp_path / "keys.toml"
    with api_keys.changing(keys):
        pass
    token = tmp_path / "token"
    private_files.write(token, "t" * 40)
    by_token = {"keys_file": keys, "admin": {"token_file": token}}
    by_socket = {"admin": {"socket": tmp_path / "admin.sock"}}
    for server, led, else_ in ((None, 302, 404), (by_token, 302, 401), (by_socket, 404, 404)):
        front: Front = await front_of(server=server)
        async with front.session.get("/", headers=browser, allow_redirects=False) as response:
            assert (response.status, response.headers.get("Location")) == (led, "admin/" if led == 302 else None)
        if led == 302:
            async with front.session.get("/", headers=browser) as response:
                assert (response.status, "<title>" in await response.text()) == (200, True)
        for method, headers in (("GET", {}), ("POST", browser)):
            async with front.session.request(method, "/", headers=headers, allow_redirects=False) as response:
                assert response.status == else_
                error_of(await response.read())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/unknown", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/sleep", 404, "not_found"),
        ("POST", "/sleep?level=1", 404, "not_found"),
        ("POST", "/wake_up", 404, "not_found"),
        ("POST", "/collective_rpc", 404, "not_found"),
        ("GET", "/debug/state", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("POST", "/v1//completions", 404, "not_found"),
        ("POST", "/v1/%2e%2e/sleep", 404, "not_found"),
    ],
)
async def test_everything_else_is_refused(front: Front, method: str, path: str, status: int, code: str) -> None:
    async with front.session.request(method, path, json=ASK) as response:
        assert response.status == status
        assert error_of(await response.read())["code"] == code
    assert front.pool.status()["models"]["demo"]["instances"] == []


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_request", None),
        (b"", 400, "invalid_request", None),
        (b"\xff", 400, "invalid_request", None),
        (b"[]", 400, "invalid_request", None),
        (b"{}", 400, "invalid_request", "model"),
        (b'{"model": 3}', 400, "invalid_request", "model"),
        (b'{"model": ""}', 400, "invalid_request", "model"),
        (b'{"model": "other"}', 404, "model_not_found", "model"),
        (b" " * (1 << 20) + b"{}", 413, "request_too_large", None),
    ],
)
async def test_a_request_that_cannot_be_placed(
    front: Front, body: bytes, status: int, code: str, param: str | None
) -> None:
    response, answer = await front.post("/v1/completions", body)
    assert response.status == status
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param)
    assert front.pool.status()["models"]["demo"]["instances"] == []


_CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nX-Request-Id: r1\r\n"
_GZIPPED = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 30


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ([_CHUNKED + b"\r\n200000\r\n", b"x" * 0x200000 + b"\r\n0\r\n\r\n"], 413),
        ([_CHUNKED + b"Content-Encoding: gzip\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(_GZIPPED), _GZIPPED)], 400),
        ([_CHUNKED + b"Content-Encoding: gzip\r\n\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(_GZIPPED), _GZIPPED)], 400),
        ([_CHUNKED + b"\r\n2\r\n{}\r\n0\r\n\r\n"], 400),
        ([_CHUNKED + b"\r\n%x\r\n" % len(orjson.dumps(ASK)), orjson.dumps(ASK) + b"\r\n0\r\n\r\n"], 500),
    ],
    ids=["too large", "no gzip", "no gzip, behind its head", "no model", "an unforeseen error"],
)
async def test_what_the_client_is_told_is_what_is_logged_and_counted(
    front: Front, request_: list[bytes], status: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "warmpool.request")

    async def fails(*_: object, **__: object) -> None:
        raise LookupError

    monkeypatch.setattr(front.pool, "lease", fails)
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    for piece in request_:
        writer.write(piece)
        await asyncio.sleep(0.05)
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readline()).split()[1] == b"%d" % status
        while not (lines := [m for m in caplog.messages if "request_id=r1 " in m]):
            await asyncio.sleep(0.01)
    writer.close()
    assert [f"status={status} " in line for line in lines] == [True]
    counted = {
        s.labels["status"]: s.value
        for family in front.metrics.registry.collect()
        for s in family.samples
        if s.name == "warmpool_requests_total"
    }
    assert counted == {str(status): 1.0}


async def test_health_ready_metrics_status(front: Front) -> None:
    assert await get_json(f"{front.url}/health") == {"status": "ok"}
    assert await get_json(f"{front.url}/ready") == {"ready": True}
    await asyncio.gather(front.post("/v1/completions", ASK), front.post("/v1/completions", {**ASK, "stream": True}))
    status = await get_json(f"{front.url}/admin/status")
    demo = status["models"]["demo"]
    assert (demo["tier"], demo["queue"]) == ("ready", 0)
    instance = demo["instances"][0]
    assert (instance["id"], instance["state"], instance["leases"]) == ("demo-1", "ready", 0)
    assert instance["last_wake"]["found"] == "stopped"
    assert "load" in instance["last_wake"]["stages"]
    async with front.session.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    for line in (
        'warmpool_requests_total{model="demo",status="200"} 2.0',
        'warmpool_time_to_first_byte_seconds_count{model="demo",tier="stopped"} 2.0',
        'warmpool_ttft_seconds_count{model="demo",tier="stopped"} 1.0',
        'warmpool_wake_seconds_count{model="demo",stage="load",tier="stopped"} 1.0',
        'warmpool_instances{model="demo",state="ready"} 1.0',
        'warmpool_queue_depth{model="demo"} 0.0',
        'warmpool_running_requests{model="demo"} 0.0',
    ):
        assert line in text
    front.pool.drain()
    async with front.session.get("/ready") as response:
        assert response.status == 503
    response, answer = await front.post("/v1/completions", ASK)
    assert (response.status, error_of(answer)["code"]) == (503, "draining")
    assert int(response.headers["Retry-After"]) >= 1


# --- limits ---


async def test_a_full_queue_and_no_capacity_say_when_to_come_back(front_of: Any) -> None:
    front: Front = await front_of("--hang-start", max_queue=1, queue_timeout="1s", start_timeout="30s")
    first = asyncio.create_task(front.post("/v1/completions", ASK))
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["models"]["demo"]["queue"] == 0:
            await asyncio.sleep(0.005)
    response, answer = await front.post("/v1/completions", ASK)
    assert (response.status, error_of(answer)["type"], error_of(answer)["code"]) == (
        429,
        "rate_limit_error",
        "queue_full",
    )
    assert int(response.headers["Retry-After"]) >= 1
    response, answer = await first
    assert (response.status, error_of(answer)["code"]) == (503, "no_capacity")
    assert int(response.headers["Retry-After"]) >= 1


async def test_a_failed_wake_says_so_and_the_next_request_tries_again(front_of: Any, tmp_path: Path) -> None:
    marker = tmp_path / "fail"
    marker.touch()
    front: Front = await front_of("--fail-file", str(marker))
    answers = await asyncio.gather(*(front.post("/v1/completions", ASK) for _ in range(10)))
    for response, answer in answers:
        assert response.status == 503
        error = error_of(answer)
        assert error["code"] == "wake_failed"
        assert error["message"].startswith("The model 'demo' could not be started (tried: stopped). It is tried again")
        assert "Retry-After" in response.headers
    marker.unlink()
    async with asyncio.timeout(PATIENCE_S):
        while (response := (await front.post("/v1/completions", ASK))[0]).status == 503:
            await asyncio.sleep(int(response.headers["Retry-After"]))
    assert response.status == 200


# --- clients that leave, engines that break ---


async def until_engine(front: Front, **wanted: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = await front.engine_state()
            if all(state[name] == value for name, value in wanted.items()):
                return
            await asyncio.sleep(0.01)


async def test_a_client_that_leaves_mid_stream_ends_the_engines_work(front_of: Any) -> None:
    front: Front = await front_of("--tokens-per-second", "10")
    body = {**ASK, "stream": True, "max_tokens": 1000, "ignore_eos": True}
    async with front.session.post("/v1/completions", json=body) as response:
        await response.content.readany()
        assert front.pool.status()["leases"] == 1
        response.close()
    await until_engine(front, running=0, aborted=1)
    assert front.pool.status()["leases"] == 0


async def test_a_client_that_leaves_before_the_answer_ends_it_too(front_of: Any) -> None:
    front: Front = await front_of("--ttft", "30", warmup={"requests": 0}, canary="never")
    request = asyncio.create_task(front.post("/v1/completions", ASK))
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["leases"] == 0:
            await asyncio.sleep(0.01)
    await until_engine(front, running=1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    await until_engine(front, running=0, aborted=1)
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["leases"]:
            await asyncio.sleep(0.01)
        while not front.sample("warmpool_requests_total", model="demo", status="499"):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_dies_mid_stream_breaks_the_answer_and_the_next_request_works(
    front: Front, stream: bool
) -> None:
    await front.post("/v1/completions", ASK)
    body = {**ASK, "stream": True, "max_tokens": 1000, "ignore_eos": True}
    body |= {"vllm_xargs": {"fault": "die_mid_stream", "after_tokens": 3}}
    with pytest.raises(aiohttp.ClientPayloadError):
        await front.post("/v1/completions", body)
    response, _ = await front.post("/v1/completions", {**ASK, "stream": stream})
    assert response.status == 200
    assert response.headers["x-warmpool-tier"] in ("stopped", "ready"), "ready: it came before the end was noticed"


async def test_http_1_0_clients_see_the_break_as_a_reset(front: Front) -> None:
    body = orjson.dumps(
        {**ASK, "stream": True, "max_tokens": 1000, "ignore_eos": True, "vllm_xargs": {"fault": "die_mid_stream"}}
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with pytest.raises(ConnectionResetError):
        while await reader.read(1000):
            pass
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_an_engine_that_refuses_is_asked_once_more(front: Front) -> None:
    await front.post("/v1/completions", ASK)
    body = {**ASK, "vllm_xargs": {"fault": "refuse"}}
    response, answer = await front.post("/v1/completions", body)
    assert (response.status, error_of(answer)["code"]) == (502, "upstream_failed")
    async with front.session.post(f"{await front.engine()}/debug/fault", json={"kind": "refuse"}) as armed:
        assert armed.status == 200
    response, _ = await front.post("/v1/completions", ASK)
    assert response.status == 200, "one refusal is made good"
    assert (await front.engine_state())["loads"] == 1, "the engine answered /health, so it was kept"


async def test_an_answer_that_is_not_http_is_an_error(front: Front) -> None:
    response, answer = await front.post("/v1/completions", {**ASK, "vllm_xargs": {"fault": "garbage_http"}})
    assert (response.status, error_of(answer)["code"]) == (502, "upstream_failed")


async def test_garbage_in_a_body_is_the_engines_answer_and_passes(front: Front) -> None:
    response, answer = await front.post("/v1/completions", {**ASK, "vllm_xargs": {"fault": "garbage_json"}})
    assert (response.status, answer) == (200, b'{"id": "cmpl-broken", "choices": [')


@pytest.mark.parametrize("fault", ["hang", "hang_mid_stream"])
async def test_an_engine_that_falls_silent_is_given_up_after_response_timeout(front_of: Any, fault: str) -> None:
    front: Front = await front_of(response_timeout="500ms")
    body = {**ASK, "stream": True, "max_tokens": 100, "ignore_eos": True, "vllm_xargs": {"fault": fault}}
    if fault == "hang":
        response, answer = await front.post("/v1/completions", body)
        assert (response.status, error_of(answer)["code"]) == (502, "upstream_failed")
    else:
        with pytest.raises(aiohttp.ClientPayloadError):
            await front.post("/v1/completions", body)
    assert (await front.post("/v1/completions", ASK))[0].status == 200


async def test_200_requests_at_once_cause_one_start_and_half_may_leave(front_of: Any) -> None:
    front: Front = await front_of("--load-seconds", "1")
    requests = [asyncio.create_task(front.post("/v1/completions", ASK)) for _ in range(200)]
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["models"]["demo"]["queue"] < 100:
            await asyncio.sleep(0.01)
    for request in requests[::2]:
        request.cancel()
    results = await asyncio.gather(*requests, return_exceptions=True)
    answered = [r for r in results if not isinstance(r, BaseException)]
    assert len(answered) == 100
    assert {response.status for response, _ in answered} == {200}
    assert len({answer_text(answer) for _, answer in answered}) == 1
    assert (await front.engine_state())["loads"] == 1
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["leases"] or front.pool.status()["models"]["demo"]["queue"]:
            await asyncio.sleep(0.01)


def answer_text(answer: bytes) -> str:
    return str(orjson.loads(answer)["choices"][0]["text"])


async def test_a_log_line_for_each_request_without_its_text(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "warmpool")
    await front.post("/v1/completions", {**ASK, "prompt": "my secret prompt"}, headers={"Authorization": "Bearer k3y"})
    lines = [r.getMessage() for r in caplog.records if r.name == "warmpool.request"]
    assert len(lines) == 1
    for part in ("method=POST", "path=/v1/completions", "model=demo", "status=200", "tier=stopped", "first_byte_ms="):
        assert part in lines[0]
    assert "secret" not in caplog.text
    assert "k3y" not in caplog.text
