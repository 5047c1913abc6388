"""Fields of either side, however they are spelled, whatever stands around their values, whatever bytes they are."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.server.auth import api_keys
from tests.scripted import QUESTION, Scripted, answer_of, post
from tests.support import PATIENCE_S, examples

if TYPE_CHECKING:
    from pathlib import Path

    from tests.front import Front

BODY = b'{"text":"as the engine sent it"}'
STREAM = b"data: 1\n\n", b"data: 2\n\n"


def spelled(name: str, value: str) -> st.SearchStrategy[bytes]:
    """A field in one of all the ways to write it (RFC 9110, 5.1 and 5.5)."""
    letters = st.tuples(*(st.sampled_from([c.lower(), c.upper()]) for c in name)).map("".join)
    space = st.text(st.sampled_from(" \t"), max_size=3)
    return st.builds(lambda n, a, b: f"{n}:{a}{value}{b}\r\n".encode(), letters, space, space)


def heads(first: bytes, *fields: tuple[str, str]) -> st.SearchStrategy[bytes]:
    """The first line and the fields, in any order."""
    return (
        st.tuples(*(spelled(*field) for field in fields))
        .flatmap(st.permutations)
        .map(lambda lines: b"".join([first, *lines, b"\r\n"]))
    )


REQUESTS = heads(
    b"POST /v1/completions HTTP/1.1\r\n",
    ("host", "proxy"), ("content-length", str(len(QUESTION))), ("content-type", "application/json"),
    ("connection", "close"), ("x-request-id", "r-1"), ("cookie", "kept=here"), ("x-goes-on", "a b"),
    ("authorization", "Bearer kept-here"),
).map(lambda head: head + QUESTION)  # fmt: skip
USUAL = post(
    QUESTION, "Content-Type: application/json", "Connection: close", "X-Request-Id: r-1", "Cookie: kept=here",
    "X-Goes-On: a b", "Authorization: Bearer kept-here",
)  # fmt: skip
SIZED = heads(
    b"HTTP/1.1 200 OK\r\n",
    ("content-length", str(len(BODY))), ("content-type", "application/json"), ("set-cookie", "kept=here"),
    ("x-goes-on", "a b"),
).map(lambda head: head + BODY)  # fmt: skip
CHUNKED = heads(
    b"HTTP/1.1 200 OK\r\n",
    ("transfer-encoding", "chunked"), ("content-type", "text/event-stream"), ("set-cookie", "kept=here"),
    ("x-goes-on", "a b"),
).map(lambda head: head + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in STREAM) + b"0\r\n\r\n")  # fmt: skip


def test_fields_of_both_sides_are_known_however_they_are_spelled() -> None:
    """Nothing is lost, nothing is added, and what stays here stays here."""

    async def exchanged(pairs: list[tuple[bytes, bytes]]) -> None:
        async with Scripted() as proxy:
            for request, answer in pairs:
                status, fields, body, _ = answer_of(await proxy.ask(request, answer))
                whole = BODY if answer.endswith(BODY) else b"".join(STREAM)
                assert (status, body) == (200, whole), answer
                assert (fields["x-goes-on"], fields["x-request-id"]) == ("a b", "r-1")
                assert "set-cookie" not in fields
                assert (fields.get("content-length"), fields.get("transfer-encoding")) in (
                    (str(len(whole)), None),
                    (None, "chunked"),
                )
                head, asked = next(peer.requests[-1] for peer in reversed(proxy.peers) if peer.requests)
                assert asked == QUESTION
                assert b"kept" not in head
                assert b"a b\r\n" in head
                await proxy.idle()

    @settings(max_examples=examples(12))
    @given(st.lists(st.tuples(REQUESTS | st.just(USUAL), SIZED | CHUNKED), min_size=8, max_size=8))
    def always(pairs: list[tuple[bytes, bytes]]) -> None:
        asyncio.run(exchanged(pairs))

    always()


@pytest.mark.parametrize("spelling", [b"Content-length: %d", b"CONTENT-LENGTH:%d", b"content-length:\t%d"])
async def test_an_answers_length_is_its_length_each_time(spelling: bytes) -> None:
    async with Scripted() as proxy:
        for size in (30, 30, 7, 0):
            answer = b"HTTP/1.1 200 OK\r\n" + spelling % size + b"\r\n\r\n" + b"x" * size
            status, fields, body, _ = answer_of(await proxy.ask(USUAL, answer))
            assert (status, fields["content-length"], body) == (200, str(size), b"x" * size)


# --- bytes that are no text ---

ODD = [b"\xff", "٣".encode()]
"""No UTF-8, and a digit that is none in HTTP."""
HANDSHAKE = {
    "Connection": b"Upgrade", "Upgrade": b"websocket", "Sec-WebSocket-Version": b"13",
    "Sec-WebSocket-Key": b"dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip
BEGINNINGS = {
    "Authorization": b"Bearer ", "Content-Type": b"application/json; charset=", "Host": b"localhost",
    "Origin": b"http://localhost", "Sec-WebSocket-Protocol": b"realtime, ", "x-warmpool-max-wait": b"3", **HANDSHAKE,
}  # fmt: skip
FIELDS = [
    *BEGINNINGS, "x-api-key", "Cookie", "User-Agent", "Accept", "Accept-Encoding", "Accept-Language", "Expect",
    "Content-Encoding", "Transfer-Encoding", "Content-Length", "Sec-WebSocket-Extensions", "x-request-id",
    "traceparent", "tracestate", "Access-Control-Request-Method", "Access-Control-Request-Headers",
    "Forwarded", "X-Forwarded-For", "Sec-Fetch-Site", "HTTP2-Settings", "Range", "X-Other",
]  # fmt: skip
FORM = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ndemo\r\n--x--\r\n'
ROUTES: list[tuple[bytes, dict[str, bytes], bytes]] = [
    (b"POST /v1/completions", {"Content-Type": b"application/json"}, QUESTION),
    (b"POST /v1/audio/transcriptions", {"Content-Type": b"multipart/form-data; boundary=x"}, FORM),
    (b"GET /v1/models", {}, b""),
    (b"GET /admin", {}, b""),
    (b"GET /admin/status", {}, b""),
    (b"OPTIONS /v1/completions", {"Access-Control-Request-Method": b"POST"}, b""),
    (b"GET /v1/realtime?model=demo", HANDSHAKE, b""),
]


def odd_requests(usual: dict[str, bytes]) -> list[bytes]:
    """Every field with every odd byte on every route."""
    found = []
    for line, more, body in ROUTES:
        for name in FIELDS:
            for odd in ODD:
                fields = {
                    "Host": b"localhost",
                    **usual,
                    "Connection": b"close",
                    **more,
                    "Content-Length": b"%d" % len(body),
                }
                fields[name] = BEGINNINGS.get(name, b"a") + odd
                lines = [b"%b: %b\r\n" % (n.encode(), value) for n, value in fields.items()]
                found.append(line + b" HTTP/1.1\r\n" + b"".join(lines) + b"\r\n" + body)
    return found


async def first_line(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(PATIENCE_S):
            return await reader.readline()
    finally:
        writer.close()


@pytest.mark.parametrize("server", ["plain", "with keys", "with origins", "with a token"])
async def test_no_byte_of_a_field_is_an_error_of_the_server(
    server: str, front_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    _, key, entry = api_keys.generate("a")
    with api_keys.changing(tmp_path / "keys.toml") as entries:
        entries["a" * 8] = entry
    token = tmp_path / "token"
    token.write_text("x" * 40)
    token.chmod(0o600)
    options: dict[str, Any] = {
        "plain": {}, "with keys": {"keys_file": str(tmp_path / "keys.toml")},
        "with origins": {"cors": {"origins": ["*"]}}, "with a token": {"admin": {"token_file": str(token)}},
    }  # fmt: skip
    more: dict[str, dict[str, bytes]] = {
        "with keys": {"Authorization": b"Bearer " + key.encode()}, "with origins": {"Origin": b"http://elsewhere"},
        "with a token": {"Authorization": b"Bearer " + b"x" * 40},
    }  # fmt: skip
    front: Front = await front_of(server=options[server])
    for request in odd_requests(more.get(server, {})):
        answer = await first_line(front.port, request)
        assert b" 500" not in answer, request
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info]


async def test_a_key_among_the_subprotocols_is_not_logged(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"Host": b"localhost", **HANDSHAKE, "Sec-WebSocket-Protocol": b"realtime, openai-insecure-api-key.secret"}
    lines = [b"%b: %b\r\n" % (name.encode(), value) for name, value in fields.items()]
    request = b"GET /v1/realtime?model=demo HTTP/1.1\r\n" + b"".join(lines) + b"\r\n"
    assert b" 101 " in await first_line(front.port, request)
    assert "secret" not in caplog.text


async def test_an_error_is_readable_whatever_was_asked_for(front: Front) -> None:
    for path in (b"/v1/models/%ff", b"/v1/models/%ed%a0%80", b"/tokenizer_info?model=%ff", b"/admin/models/%ff/wake"):
        for method in (b"GET", b"POST"):
            request = (
                method + b" " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n"
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(request + b"Content-Type: application/json\r\n\r\n{}")
            async with asyncio.timeout(PATIENCE_S):
                status, _, body, _ = answer_of(await reader.read())
            writer.close()
            assert status in (400, 404, 405)
            assert orjson.loads(body)["error"]["message"]
