"""What the log says of clients: methods, paths of the route table; nothing of what they sent, and not often."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

import pytest

from proxy.server.safe_logging import note_loop_error, silence_aiohttp, stack_of
from proxy.telemetry.refusals import Refusals
from tests.scripted import QUESTION, Peer, Scripted, post
from tests.served import Proxy
from tests.support import engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

KEY = "wp_abcdefgh_Zm9yYmlkZGVuLWtleQ"
PROMPT = "my-prompt-is-nobodys-business"
BODY = b'{"model": "demo", "prompt": "' + PROMPT.encode() + b'", "max_tokens": 2}'
BEARER = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
START = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
_SECRET = f"{KEY}-{PROMPT}".encode()

PROBES: dict[str, bytes] = {
    "a method": _SECRET + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a method that is none": b"P(" + _SECRET + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a method for a known path": KEY.encode().upper() + b" /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path": b"GET /" + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path without a slash": b"GET " + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path with a space": b"GET /" + _SECRET + b" " + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path with a NUL": b"GET /\x00" + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path with odd bytes": b"GET /\xff\xfe" + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a model's name": b"GET /v1/models/" + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an administrator's model": b"POST /admin/models/" + _SECRET + b"/wake HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    "a response's id": b"GET /v1/responses/" + KEY.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a query": b"GET /v1/models?" + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an odd query": b"GET /tokenizer_info?model=x\xff" + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a fragment": b"GET /v1/models#" + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an absolute URL": b"GET http://" + _SECRET + b"/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a URL with a bad port": b"GET http://a:" + _SECRET + b"/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a tunnel": b"CONNECT " + _SECRET + b":1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a version": b"GET / HTTP/" + _SECRET + b"\r\nHost: localhost\r\n\r\n",
    "a first line only": _SECRET + b"\r\n\r\n",
    "a key on the first line": BEARER + START + b"\r\n",
    "a body on the first line": BODY + b"\r\n\r\n",
    "a field without a colon": START + b"Authorization Bearer " + _SECRET + b"\r\n\r\n",
    "a field with a bad name": START + b"X(" + _SECRET + b": 1\r\n\r\n",
    "a field with a NUL": START + b"Authorization: Bearer \x00" + _SECRET + b"\r\n\r\n",
    "a field with odd bytes": START + b"Authorization: Bearer \xff" + _SECRET + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "a folded field": START + b"X: y\r\n " + _SECRET + b"\r\n\r\n",
    "a field that never ends": START + b"X: " + _SECRET * 400 + b"\r\n\r\n",
    "a host": b"GET /v1/models HTTP/1.1\r\nHost: " + _SECRET + b"\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: " + _SECRET + b"\r\n\r\n",
    "a length": START + b"Content-Length: " + _SECRET + b"\r\n\r\n",
    "two lengths": START + BEARER + LENGTH + b"Content-Length: 0\r\n\r\n" + BODY,
    "a coding": START + b"Transfer-Encoding: " + _SECRET + b"\r\n\r\n",
    "a length with a coding": START + BEARER + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + BODY,
    "the size of a chunk": START + b"Transfer-Encoding: chunked\r\n\r\n" + _SECRET + b"\r\n" + BODY + b"\r\n",
    "what comes after a chunk": START + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}" + _SECRET + b"\r\n0\r\n\r\n",
    "a trailer": START + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX(" + _SECRET + b": 1\r\n\r\n",
    "an expectation": START + b"Expect: " + _SECRET + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "an encoding": START + b"Content-Encoding: gzip\r\n" + LENGTH + b"\r\n" + BODY,
    "an unknown encoding": START + b"Content-Encoding: " + _SECRET + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "a body that is no JSON": START + LENGTH + b"\r\n" + BODY.replace(b"{", b"["),
    "a model in the body": START + LENGTH + b"\r\n" + BODY.replace(b"demo", KEY.encode()[:4]),
    "a form": START.replace(b"completions", b"audio/transcriptions")
    + b"Content-Type: multipart/form-data; boundary="
    + _SECRET
    + b"\r\n"
    + LENGTH
    + b"\r\n"
    + BODY,
    "a body after the body": START + LENGTH + b"\r\n" + BODY + BODY,
    "an upgrade": START + b"Connection: Upgrade\r\nUpgrade: " + _SECRET + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "a WebSocket": b"GET /v1/realtime?model=demo&x=" + _SECRET + b" HTTP/1.1\r\nHost: localhost\r\n"
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    + base64.b64encode(_SECRET[:16])
    + b"\r\nSec-WebSocket-Protocol: openai-insecure-api-key."
    + KEY.encode()
    + b"\r\n\r\n",
    "a bad WebSocket": b"GET /v1/realtime?model=demo HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: \xff" + _SECRET + b"\r\n\r\n",
    "a time to wait": START + b"X-Warmpool-Max-Wait: " + _SECRET + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "a key for an id": START + b"X-Request-Id: " + KEY.encode() + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "an administrator's key": b"GET /metrics HTTP/1.1\r\nHost: " + _SECRET + b"\r\n" + BEARER + b"\r\n",
    "an origin": START + b"Origin: https://" + _SECRET + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "TLS": b"\x16\x03\x01\x02\x00" + _SECRET,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SECRET,
}


@contextlib.asynccontextmanager
async def serving(folder: Path, *options: str) -> AsyncIterator[tuple[Proxy, int]]:
    """`warmpool serve` without keys, and its port; afterwards its log is whole."""
    proxy = await Proxy(folder / "it", *options, settings={"models": {"demo": engine_model()}}).listening()
    try:
        yield proxy, int(proxy.url.rpartition(":")[2])
    finally:
        proxy.process.send_signal(signal.SIGTERM)
        await proxy.ended()


async def send(port: int, data: bytes, *, reset: bool = False) -> bytes:
    """The beginning of the answer to these bytes, where there is one: some wait for a rest that does not come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if reset:
            writer.transport.abort()
        return await asyncio.wait_for(reader.read(100), 0.5)
    except (ConnectionError, TimeoutError):
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("level", ["info", "debug"])
async def test_no_malformed_request_brings_a_key_or_a_prompt_into_the_log(tmp_path: Path, level: str) -> None:
    refused = 0
    async with serving(tmp_path, "--log-level", level) as (proxy, port):
        for probe in PROBES.values():
            refused += b" 4" in (await send(port, probe))[:12]
            await send(port, probe, reset=True)
    assert refused > len(PROBES) / 2
    text = proxy.log.read_text()
    secrets = (KEY, KEY.upper(), PROMPT, base64.b64encode(_SECRET[:16]).decode(), "wp_a")
    assert [line for line in text.splitlines() if any(secret in line for secret in secrets)] == []
    assert [line for line in text.splitlines() if " ERROR " in line or "Traceback" in line] == []


async def test_refusals_of_one_address_are_summed_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as (proxy, port):
        for _ in range(50):
            await send(port, b"GET / HTTP/9\r\n\r\n")
            await send(port, START + b"Content-Length: 2\r\n\r\n[]")
    text = proxy.log.read_text()
    assert text.count("refused 127.0.0.1: a malformed request (400 bad_http, ") == 1
    assert text.count("status=400") == 1
    assert "refused 127.0.0.1 98 more times within 60 s: invalid_request 49, malformed 49" in text


async def test_peers_of_unix_sockets_are_one_address(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refusals = Refusals()
    for peer in (None, "", "/tmp/my-socket"):
        refusals.note(peer, "malformed", "text")
    refusals.sum_up()
    assert caplog.messages == [
        "refused a unix socket: text",
        "refused a unix socket 2 more times within 60 s: malformed 2",
    ]


async def test_a_table_of_addresses_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refusals = Refusals(most_addresses=3)
    for number in range(100):
        refusals.note(f"192.0.2.{number}", "malformed", "text")
        refusals.note(f"2001:db8::{number:x}", "malformed", "text")
    assert len(caplog.messages) == 4
    refusals.sum_up()
    assert caplog.messages[4:] == [
        "refused 2001:db8::/64 99 more times within 60 s: malformed 99",
        "refused other addresses 97 more times within 60 s: malformed 97",
    ]
    refusals.note("192.0.2.1", "malformed", "text")
    assert len(caplog.messages) == 7, "a new interval"
    refusals.sum_up()


def test_an_unforeseen_error_is_logged_without_its_text() -> None:
    try:
        try:
            dict[str, str]()[PROMPT]
        except KeyError as error:
            raise ValueError(KEY) from error
    except ValueError as error:
        said = stack_of(error)
    assert "ValueError" in said
    assert "because of KeyError" in said
    assert __file__ in said
    assert KEY not in said
    assert PROMPT not in said


@pytest.mark.parametrize(
    "answer",
    [
        b"%b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n%b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: %b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%b\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n%b\r\n\r\n",
    ],
)
async def test_nothing_of_a_broken_answer_is_logged(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with Scripted() as proxy:
        await proxy.ask(post(QUESTION, "Connection: close"), answer % PROMPT.encode(), Peer.close)
    assert "demo-1" in caplog.text
    assert PROMPT not in caplog.text


async def test_what_the_event_loop_and_aiohttp_say_of_an_error_quotes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    silence_aiohttp()
    loop = asyncio.get_running_loop()
    message = f"Exception in callback Client.data_received(b'{PROMPT}')"
    note_loop_error(loop, {"message": message, "exception": ValueError(KEY), "protocol": PROMPT})
    note_loop_error(loop, {"message": "Task was destroyed but it is pending!", "task": PROMPT})
    server = logging.getLogger("aiohttp.server")
    try:
        raise ValueError(KEY)
    except ValueError:
        server.exception("Error handling request from %s", PROMPT)
    assert "Exception in callback Client.data" in caplog.text
    assert caplog.text.count(": ValueError") == 2
    assert "Task was destroyed but it is pending" in caplog.text
    assert PROMPT not in caplog.text
    assert KEY not in caplog.text
