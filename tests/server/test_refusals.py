"""What refusals carry (RFC 9110), when a client is asked for its body, and whose envelope an error has."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from proxy.errors import DrainingError, MaxWaitError, NoCapacityError, NoMemoryError, QueueFullError, WakeFailedError
from tests.server.test_edge import exchange, post
from tests.server.test_http import ASK, CHAT, error_of
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from pathlib import Path

    from tests.front import Front

BODY = orjson.dumps(ASK)
LENGTH = f"Content-Length: {len(BODY)}"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    "error", [QueueFullError, NoCapacityError, NoMemoryError, MaxWaitError, WakeFailedError, DrainingError]
)
def test_what_may_be_tried_again_always_says_when(error: Any) -> None:
    assert error("x").headers() == {"Retry-After": "1"}
    assert error("x", retry_after_s=2.1).headers() == {"Retry-After": "3"}


async def test_a_method_that_is_not_taken_is_told_which_are(front: Front) -> None:
    for path, allowed in (
        ("/v1/completions", {"POST"}), ("/v1/models", {"GET", "HEAD"}), ("/v1/responses/resp_1/cancel", {"POST"}),
        ("/admin/drain", {"POST"}),
    ):  # fmt: skip
        async with front.session.delete(path) as response:
            assert response.status == 405
            assert {name.strip() for name in response.headers["Allow"].split(",")} == allowed
            assert error_of(await response.read())["code"] == "method_not_allowed"


async def test_no_websocket_without_a_handshake(front: Front) -> None:
    wrong = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    for headers in ({}, {**wrong, "Sec-WebSocket-Version": "12"}):
        async with front.session.get("/v1/realtime?model=demo", headers=headers) as response:
            assert (response.status, response.headers["Upgrade"]) == (426, "websocket")
            assert response.headers["Sec-WebSocket-Version"] == "13"
            assert error_of(await response.read())["code"] == "upgrade_required"


async def test_probes_say_when_to_ask_again(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(front.pool), "ready", False)
    for path in ("/ready", "/ping"):
        async with front.session.get(path) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")


async def test_errors_of_the_parser_are_in_http_1_1(front: Front) -> None:
    for request in (b"GARBAGE\r\n\r\n", post("Content-Length: x"), b"GET / HTTP/1.1\r\nHost: x\r\nX-A : 1\r\n\r\n"):
        raw = await exchange(front, request)
        head, _, body = raw.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n"), raw
        assert b"\r\nConnection: close" in head
        assert b"\r\nDate: " in head
        assert b"\r\nContent-Length: %d\r\n" % len(body) in head + b"\r\n"
        assert error_of(body)["code"] == "bad_http"


# --- Expect: 100-continue ---


async def test_a_client_is_asked_for_its_body_when_it_will_be_read(front: Front) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    for path, body, asked in (
        ("/v1/completions", BODY, True), ("/v1/completions", BODY, False), ("/admin/undrain", b"{}", True),
    ):  # fmt: skip
        head = post(
            "Expect: 100-continue", "Content-Type: application/json", f"Content-Length: {len(body)}",
            body=b"", line=f"POST {path} HTTP/1.1",
        ).replace(b"Host: x", b"Host: localhost")  # fmt: skip
        async with asyncio.timeout(PATIENCE_S):
            writer.write(head if asked else head + body)
            if asked:
                assert await reader.readexactly(len(CONTINUE)) == CONTINUE
                writer.write(body)
            got = await reader.readuntil(b"\r\n\r\n")
            assert got.startswith(b"HTTP/1.1 200"), "the answer; nothing before it where the body came unasked"
            length = next(line for line in got.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
    writer.close()


@pytest.mark.parametrize(
    ("line", "fields", "status"),
    [
        ("POST /v1/nothing HTTP/1.1", [LENGTH], 404),
        ("DELETE /v1/completions HTTP/1.1", [LENGTH], 405),
        ("POST /v1%2Fcompletions HTTP/1.1", [LENGTH], 404),
        ("POST /v1/completions HTTP/1.1", ["Content-Length: 99999999"], 413),
        ("POST /v1/completions HTTP/1.1", [LENGTH, "Origin: https://elsewhere.example"], 403),
        ("POST /admin/drain HTTP/1.1", [LENGTH, "Content-Type: application/json", "Via: 1.1 x"], 403),
    ],
)
async def test_nobody_is_asked_for_a_body_that_is_refused(
    front: Front, line: str, fields: list[str], status: int
) -> None:
    raw = await exchange(front, post("Expect: 100-continue", *fields, body=b"", line=line))
    assert raw.startswith(b"HTTP/1.1 %d " % status), raw
    assert b"connection: close" in raw.lower()


async def test_nobody_without_a_key_is_asked_for_a_body(front_of: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text("")
    (tmp_path / "keys.toml").chmod(0o600)
    front: Front = await front_of(server={"keys_file": str(tmp_path / "keys.toml")})
    raw = await exchange(front, post("Expect: 100-continue", LENGTH, body=b""))
    assert raw.startswith(b"HTTP/1.1 401 "), raw
    assert b"\r\nWWW-Authenticate: Bearer" in raw


# --- Anthropic's envelope ---


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_errors_on_anthropics_routes_have_its_envelope(front: Front, path: str) -> None:
    for body, status, type_ in (
        ({**CHAT, "model": "other"}, 404, "not_found_error"),
        (b"{", 400, "invalid_request_error"),
        (b" " * (1 << 20) + b"{}", 413, "request_too_large"),
    ):
        response, answer = await front.post(path, body)
        assert response.status == status
        envelope = orjson.loads(answer)
        assert (envelope["type"], envelope["error"]["type"]) == ("error", type_)
        assert envelope["error"]["message"]
    front.pool.drain("demo")
    response, answer = await front.post(path, CHAT)
    assert (response.status, orjson.loads(answer)["error"]["type"]) == (503, "overloaded_error")
    async with front.session.get(path) as response:
        assert orjson.loads(await response.read())["error"]["type"] == "invalid_request_error"


async def test_an_error_within_a_stream_of_anthropics_is_its_event(front_of: Any, tmp_path: Path) -> None:
    import anthropic

    marker = tmp_path / "fail"
    marker.touch()
    front: Front = await front_of("--fail-file", str(marker), "--load-seconds", "1", server={"heartbeat": "100ms"})
    response, answer = await front.post("/v1/messages", {**CHAT, "stream": True})
    assert response.status == 200
    name, data = answer.split(b"event: ", 1)[1].rstrip().split(b"\ndata: ")
    event = orjson.loads(data)
    assert (name, event["type"], event["error"]["type"]) == (b"error", "error", "overloaded_error")
    assert event["error"]["code"] == "wake_failed"
    front.pool.undrain("demo")
    async with anthropic.AsyncAnthropic(base_url=front.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.APIStatusError, match="could not be started"):
            stream = await client.messages.create(
                model="demo", max_tokens=4, messages=[{"role": "user", "content": "Hello"}], stream=True
            )
            async for _ in stream:
                pass
