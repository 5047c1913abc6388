"""The edge on raw sockets: what is not HTTP as others read it, what is too large, too slow or too many, and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import orjson
import pytest

from proxy.cli.control_client import Address, Control, ControlError, address_of
from proxy.config.server import AdminSettings, LimitSettings, ServerSettings, TlsSettings
from proxy.errors import ConfigError, HostError
from proxy.host import private_files
from proxy.server import listeners
from proxy.server import server as serving
from proxy.server.connection_limits import ConnectionLimits, counted_by
from proxy.server.tls import Tls
from proxy.systemd.notify import Manager
from tests.front import Front
from tests.served import Proxy
from tests.server.test_http import ASK, error_of
from tests.support import PATIENCE_S, ROOT, engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

BODY = orjson.dumps(ASK)


@pytest.fixture
def edge_of(front_of: Any) -> Callable[..., Coroutine[Any, Any, Front]]:
    """Makes proxies whose engine is never started unless a test asks it something."""
    return lambda **server: front_of(server=server)


@pytest.fixture
async def edge(edge_of: Any) -> Front:
    made: Front = await edge_of()
    return made


async def exchange(front: Front, data: bytes) -> bytes:
    """Everything the server says to some bytes until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    try:
        writer.write(data)
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def post(*headers: str, body: bytes = BODY, line: str = "POST /v1/completions HTTP/1.1") -> bytes:
    return "\r\n".join([line, "Host: x", *headers, "", ""]).encode("latin-1") + body


LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLED = b"GET /admin/status HTTP/1.1\r\nHost: x\r\n\r\n"

SHAPES = {
    "CL and TE": post(LENGTH, CHUNKED, body=CHUNKS),
    "TE and CL": post(CHUNKED, "Content-Length: 3", body=CHUNKS),
    "two CLs that differ": post(LENGTH, "Content-Length: 3"),
    "two CLs alike": post(LENGTH, LENGTH),
    "a list of CLs": post(f"Content-Length: {len(BODY)}, {len(BODY)}"),
    "a signed CL": post(f"Content-Length: +{len(BODY)}"),
    "a negative CL": post("Content-Length: -1"),
    "a hexadecimal CL": post("Content-Length: 0x10"),
    "an empty CL": post("Content-Length: "),
    "a huge CL": post("Content-Length: 99999999999999999999999"),
    "two TEs": post(CHUNKED, CHUNKED, body=CHUNKS),
    "TE chunked twice": post("Transfer-Encoding: chunked, chunked", body=CHUNKS),
    "TE gzip": post("Transfer-Encoding: gzip"),
    "TE gzip, chunked": post("Transfer-Encoding: gzip, chunked", body=CHUNKS),
    "TE chunked, gzip": post("Transfer-Encoding: chunked, gzip", body=CHUNKS),
    "TE identity": post("Transfer-Encoding: identity", LENGTH),
    "TE xchunked": post("Transfer-Encoding: xchunked", body=CHUNKS),
    "TE in quotes": post('Transfer-Encoding: "chunked"', body=CHUNKS),
    "TE with a vertical tab": post("Transfer-Encoding: \x0bchunked", body=CHUNKS),
    "TE with HTTP/1.0": post(CHUNKED, body=CHUNKS, line="POST /v1/completions HTTP/1.0"),
    "a space before the colon": post(f"Content-Length : {len(BODY)}"),
    "a space before the colon of TE": post("Transfer-Encoding : chunked", body=CHUNKS),
    "a space before the name": post(f" Content-Length: {len(BODY)}"),
    "a folded header": post("X-A: 1\r\n 2", LENGTH),
    "a folded TE": post("Transfer-Encoding:\r\n chunked", body=CHUNKS),
    "a header without a colon": post("X-A", LENGTH),
    "a header without a name": post(": 1", LENGTH),
    "a NUL in a value": post("X-A: 1\x002", LENGTH),
    "a NUL in a name": post("X\x00A: 1", LENGTH),
    "a control character in a value": post("X-A: 1\x012", LENGTH),
    "a bare CR in a value": post("X-A: 1\rX-B: 2", LENGTH),
    "bare LFs": post(LENGTH).replace(b"\r\n", b"\n"),
    "a bare LF after a header": post("X-A: 1\nX-B: 2", LENGTH),
    "two Hosts": post("Host: y", LENGTH),
    "no Host": post(LENGTH).replace(b"Host: x\r\n", b""),
    "an absolute URL": post(LENGTH, line="POST http://x/v1/completions HTTP/1.1"),
    "an absolute URL elsewhere": post(LENGTH, line="POST http://elsewhere/admin/status HTTP/1.1"),
    "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT to a path": b"CONNECT /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "HTTP/2.0": post(LENGTH, line="POST /v1/completions HTTP/2.0"),
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": post(LENGTH, line="POST /v1/completions HTTP/1.2"),
    "HTTP/11": post(LENGTH, line="POST /v1/completions HTTP/11"),
    "another protocol": post(LENGTH, line="POST /v1/completions FTP/1.1"),
    "a tab in the request line": post(LENGTH, line="POST\t/v1/completions HTTP/1.1"),
    "a NUL in the path": post(LENGTH, line="POST /v1/comp\x00letions HTTP/1.1"),
    "an unknown method": post(LENGTH, line="SMUGGLE /v1/completions HTTP/1.1"),
    "a TLS handshake": bytes.fromhex("16030100c8010000c40303") + b"\x00" * 50,
    "chunk size with a sign": post(CHUNKED, body=b"+5\r\nhello\r\n0\r\n\r\n"),
    "chunk size with 0x": post(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n"),
    "chunk size that is no number": post(CHUNKED, body=b"zz\r\nhello\r\n0\r\n\r\n"),
    "chunk size that overflows": post(CHUNKED, body=b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
    "chunk size too small": post(CHUNKED, body=b"2\r\nhello\r\n0\r\n\r\n"),
    "chunk with bare LFs": post(CHUNKED, body=b"5\nhello\n0\n\n"),
    "chunk size with a space": post(CHUNKED, body=b"5 \r\nhello\r\n0\r\n\r\n"),
    "no chunk size": post(CHUNKED, body=b"\r\nhello\r\n0\r\n\r\n"),
}


async def test_what_servers_read_differently_is_refused_and_the_connection_ends(edge: Front) -> None:
    for shape, request in SHAPES.items():
        answer = await exchange(edge, request + SMUGGLED)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head[9:12] in (b"400", b"405"), (shape, answer)
        assert answer.count(b"HTTP/1.") == 1, (shape, "what follows is no request")
        assert error_of(body)["type"] == "invalid_request_error", shape
        assert b"admin" not in body, shape
    assert edge.pool.status()["models"]["demo"]["instances"] == [], "nothing was woken"


async def test_what_is_refused_is_counted_and_logged_in_one_line(edge: Front, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "warmpool")
    await exchange(edge, SHAPES["a NUL in a value"])
    assert edge.sample("warmpool_refused_total", reason="malformed") == 1
    lines = [r for r in caplog.records if r.name == "warmpool.limits"]
    assert len(lines) == 1
    assert lines[0].exc_info is None
    assert "\n" not in lines[0].getMessage()


async def test_what_comes_behind_a_declined_upgrade_is_looked_at_too(edge: Front) -> None:
    upgrade = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    for shape in ("an absolute URL", "TE gzip, chunked", "TE with HTTP/1.0", "CONNECT", "two CLs that differ"):
        answer = await exchange(edge, upgrade + SHAPES[shape] + SMUGGLED)
        assert answer.startswith(b"HTTP/1.1 200"), shape
        assert re.search(rb"}HTTP/1\.[01] 400", answer), (shape, answer)
        assert len(re.findall(rb"HTTP/1\.[01] \d", answer)) == 2, shape
    fine = post(LENGTH, "Connection: close", body=BODY)
    assert (await exchange(edge, upgrade + fine)).count(b"HTTP/1.1 200") == 2


async def test_a_path_cannot_forge_a_line_of_the_log(edge: Front, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "warmpool")
    target = "/v1/responses/resp_1%0a12:00:00%20ERROR%20forged%0d%00"
    await exchange(edge, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    page = "Connection: close\r\nOrigin: https://evil.example"
    await exchange(edge, f"GET {target} HTTP/1.1\r\nHost: x\r\n{page}\r\n\r\n".encode())
    await exchange(edge, b"GET /metrics?%0a HTTP/1.1\r\nHost: evil%0a\r\nConnection: close\r\n\r\n")
    assert caplog.records
    assert not [m for m in caplog.messages if set(m) & set("\n\r\0")]


@pytest.mark.parametrize("garbage", [b"zz\r\n", b"\x00", b"5\nhello\n", b"GET / HTTP/1.1\r\n\r\n"])
async def test_garbage_behind_a_good_chunk_is_refused_at_once(edge_of: Any, garbage: bytes) -> None:
    """Not by the time limit for uploads, which is longer than this test waits."""
    edge: Front = await edge_of(limits={"upload_timeout": "1h"})
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(post(CHUNKED, body=b'5\r\n{"a":\r\n'))
    await asyncio.sleep(0.05)  # the handler has begun to read
    writer.write(garbage)
    async with asyncio.timeout(PATIENCE_S):
        raw = await reader.read()
    writer.close()
    assert raw.startswith(b"HTTP/1.1 400"), raw
    assert raw.count(b"HTTP/1.") == 1, "one answer, and the end"
    assert edge.sample("warmpool_refused_total", reason="malformed") == 1


async def test_a_proper_request_passes_with_length_and_in_chunks(edge: Front) -> None:
    for request in (post(LENGTH, "Connection: close"), post(CHUNKED, "Connection: close", body=CHUNKS)):
        assert (await exchange(edge, request)).startswith(b"HTTP/1.1 200")


async def test_pipelined_requests_are_answered_in_order(edge: Front) -> None:
    first = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = await exchange(edge, first * 40 + last)
    assert answer.count(b"HTTP/1.1 200") == 40
    assert answer.count(b"HTTP/1.1 404") == 1


# --- too large ---


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (post(line="GET /v1/models?" + "x" * 600 + " HTTP/1.1", body=b""), 414, "url_too_long"),
        (post("X-A: " + "x" * 1100, body=b""), 431, "headers_too_large"),
        (post("X" * 1100 + ": 1", body=b""), 431, "headers_too_large"),
        (post(*(f"X-{n}: 1" for n in range(12)), body=b""), 431, "headers_too_large"),
        (post("Content-Length: 2000000", body=b""), 413, "request_too_large"),
        (post(CHUNKED, body=b"200000\r\n" + b"x" * 0x200000 + b"\r\n0\r\n\r\n"), 413, "request_too_large"),
    ],
    ids=["url", "value", "name", "headers", "length", "chunked"],
)
async def test_what_is_too_large_is_refused(edge_of: Any, request_: bytes, status: int, code: str) -> None:
    front: Front = await edge_of(limits={"url": 512, "header": "1KiB", "headers": 10, "head": "4KiB"})
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(request_)
    async with asyncio.timeout(PATIENCE_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
    writer.close()
    assert head[9:12] == b"%d" % status
    assert error_of(body)["code"] == code


async def test_headers_that_trickle_in_have_a_bound_together(edge_of: Any) -> None:
    front: Front = await edge_of(limits={"headers": 1000, "head": "9KiB"})
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
    with contextlib.suppress(ConnectionError):
        for number in range(1000):
            writer.write(b"X-%d: %s\r\n" % (number, b"x" * 100))
            await writer.drain()
            await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionResetError):
            assert (await reader.read()).startswith(b"HTTP/1.1 431")
    assert front.sample("warmpool_refused_total", reason="head") == 1
    writer.close()


# --- too slow ---


async def test_headers_that_take_too_long_end_the_connection_and_others_go_on(edge_of: Any) -> None:
    front: Front = await edge_of(limits={"head_timeout": "300ms"})
    slow = [await asyncio.open_connection("127.0.0.1", front.port) for _ in range(20)]
    for _, writer in slow:
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost:")

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        # A byte each time, so that no read ever waits long.
        async with asyncio.timeout(PATIENCE_S):
            answer = asyncio.create_task(reader.read())
            while not answer.done():
                writer.write(b"x")
                await asyncio.sleep(0.02)
            with contextlib.suppress(ConnectionError):
                return await answer
            return b""

    tasks = [asyncio.create_task(trickle(*pair)) for pair in slow]
    async with front.session.get("/v1/models") as response:
        assert response.status == 200
    answers = await asyncio.gather(*tasks)
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers if answer)
    assert front.sample("warmpool_refused_total", reason="slow_headers") == 20
    for _, writer in slow:
        writer.close()


async def test_an_idle_connection_is_kept_for_its_time_and_no_longer(edge_of: Any) -> None:
    front: Front = await edge_of(limits={"idle_timeout": "500ms", "head_timeout": "100ms"})
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    for _ in range(3):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n\r\n")  # and a stray empty line
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.2)  # longer than headers may take
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.read() == b""
    writer.close()
    assert front.sample("warmpool_refused_total", reason="slow_headers") == 0


async def test_a_body_that_takes_too_long_is_given_up(edge_of: Any) -> None:
    front: Front = await edge_of(limits={"upload_timeout": "300ms", "upload_rate": "1KiB"})
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(post("Content-Length: 1000", body=b"{"))
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"Connection: close" in head
    assert error_of(body)["code"] == "upload_too_slow"
    assert front.sample("warmpool_refused_total", reason="slow_body") == 1
    assert front.pool.status()["leases"] == 0


async def test_a_large_body_gets_time_by_its_size(edge_of: Any) -> None:
    front: Front = await edge_of(limits={"upload_timeout": "200ms", "upload_rate": "1KiB"})
    await front.post("/v1/completions", ASK)
    body = orjson.dumps({**ASK, "prompt": "word " * 4})
    padding = b" " * (16 << 10)
    _, writer = pair = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(post(f"Content-Length: {len(body) + len(padding)}", "Connection: close", body=padding))
    await asyncio.sleep(0.6)  # the 16 KiB give it 16 s
    writer.write(body)
    async with asyncio.timeout(PATIENCE_S):
        assert (await pair[0].read()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_client_that_takes_nothing_of_its_answer_is_dropped(edge_of: Any) -> None:
    front: Front = await edge_of(limits={"stall_timeout": "500ms"})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", front.port))
        body = orjson.dumps({**ASK, "stream": True, "max_tokens": 3000, "n": 64, "ignore_eos": True})
        await loop.sock_sendall(client, post(f"Content-Length: {len(body)}", body=body))
        async with asyncio.timeout(PATIENCE_S):
            while not front.sample("warmpool_refused_total", reason="stalled"):
                await asyncio.sleep(0.05)
            while front.pool.status()["leases"]:
                await asyncio.sleep(0.05)


# --- too many ---


async def test_no_more_connections_than_the_limit(edge_of: Any) -> None:
    front: Front = await edge_of(limits={"connections": 16})
    pairs = [await asyncio.open_connection("127.0.0.1", front.port) for _ in range(16)]
    for _, writer in pairs:
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    for reader, _ in pairs:
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
    answer = await exchange(front, b"")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert b"Retry-After" in head
    assert error_of(body)["code"] == "too_many_connections"
    pairs.pop()[1].close()
    async with asyncio.timeout(PATIENCE_S):
        while not (await exchange(front, b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 200"):
            await asyncio.sleep(0.02)
    for _, writer in pairs:
        writer.close()


def test_connections_are_counted_by_address_and_come_off_again() -> None:
    limits = ConnectionLimits(LimitSettings(connections=10, connections_per_address=2))
    assert [limits.enter("a"), limits.enter("a"), limits.enter("a")] == [None, None, "connections_per_address"]
    assert [limits.enter("b"), limits.enter(None), limits.enter(None), limits.enter(None)] == [None] * 4
    limits.leave("a")
    assert limits.enter("a") is None
    for address in ("a", "a", "b", None, None, None):
        limits.leave(address)
    assert limits.open == 0
    assert not limits._by_address


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("127.0.0.1", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_what_counts_as_one_address(host: str, counted: str | None) -> None:
    assert counted_by(host) == counted


# --- where it listens ---


async def test_a_name_that_is_not_loopback_is_refused_without_keys(edge: Front) -> None:
    with pytest.raises(HostError, match="can be reached by others"):
        listeners.refuse_open(edge.settings.server, ["127.0.0.1", "192.0.2.1"])
    listeners.refuse_open(edge.settings.server, ["127.0.0.1", "::1"])


def test_sockets_of_a_service_manager_are_looked_at_too() -> None:
    server = ServerSettings()
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        with pytest.raises(HostError, match=r"0\.0\.0\.0 can be reached by others"):
            serving._sockets(Manager((here, everywhere)), server)
        assert serving._sockets(Manager((here,)), server) == [here]


def test_there_are_no_more_connections_than_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    limit = ConnectionLimits(LimitSettings(connections=10_000))
    limit.fit_to_host(engine_connections=256)
    assert limits["now"] == (4096, 4096), "as far as it may"
    assert limit.most == 4096 - 256 - 256
    limits["now"] = (1024, 1 << 20)
    limit = ConnectionLimits(LimitSettings(connections=10_000))
    limit.fit_to_host(engine_connections=256)
    assert (limit.most, limits["now"][0]) == (10_000, 10_000 + 256 + 256)


async def test_the_admin_socket_needs_no_token_and_only_its_owner_opens_it(edge_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    front: Front = await edge_of(admin={"socket": str(path)})
    assert path.stat().st_mode & 0o777 == 0o600
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        for route in ("/metrics", "/admin/status", "/health"):
            async with session.get(f"http://localhost{route}") as response:
                assert response.status == 200, route
    async with front.session.get("/admin/status") as response:
        assert response.status == 404, "not by the port as well"
    with pytest.raises(HostError, match="Address already in use"):
        listeners.admin_socket(front.settings.server.admin)


async def test_a_unix_socket_for_clients_is_not_for_administration(edge: Front, tmp_path: Path) -> None:
    """One that a service manager made may be open to everybody, or have another proxy behind it."""
    path = tmp_path / "clients.sock"
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.setblocking(False)
    await listeners.site(edge.service, made, edge.settings.server, None).start()
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        for route, status in (("/v1/models", 200), ("/admin/status", 403), ("/metrics", 403)):
            async with session.get(f"http://localhost{route}") as response:
                assert response.status == status, route


async def test_a_socket_left_behind_is_taken_over_and_another_file_is_not(edge_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    await edge_of(admin={"socket": str(path)})
    other = tmp_path / "file"
    other.write_text("precious")
    with pytest.raises(HostError, match="no socket"):
        listeners.admin_socket(AdminSettings(socket=other))
    assert other.read_text() == "precious"


# --- TLS ---


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.certificate, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-keyout", str(self.key), "-out", str(self.certificate),
        )  # fmt: skip

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)

    def issue(self, name: str, usage: str) -> tuple[Path, Path]:
        """Certificate and key for `name`, for 127.0.0.1."""
        key, request, certificate = (self.folder / f"{name}.{end}" for end in ("key", "csr", "pem"))
        extensions = self.folder / f"{name}.cnf"
        extensions.write_text(f"subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage={usage}\n")
        self._openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", str(key), "-out", str(request),
        )  # fmt: skip
        self._openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self.key),
            "-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", str(certificate),
        )  # fmt: skip
        return certificate, key

    def context(self, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
        """A client's that trusts this authority."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl in PATH to make certificates with")
    return Authority(tmp_path, "first")


async def get(front: Front, context: ssl.SSLContext, path: str = "/health") -> int:
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(connector=connector) as session, session.get(front.url + path) as response:
        return response.status


async def test_https_only_of_a_version_that_is_allowed(edge_of: Any, authority: Authority) -> None:
    certificate, key = authority.issue("server", "serverAuth")
    front: Front = await edge_of(tls={"certificate": str(certificate), "key": str(key), "minimum_version": "1.3"})
    assert front.url.startswith("https://")
    assert await get(front, authority.context()) == 200
    old = authority.context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(aiohttp.ClientConnectionError):
        await get(front, old)
    assert await exchange(front, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") == b"", "no plain HTTP"


async def test_a_new_certificate_is_for_new_connections_and_open_ones_stay(edge_of: Any, authority: Authority) -> None:
    certificate, key = authority.issue("server", "serverAuth")
    front: Front = await edge_of(tls={"certificate": str(certificate), "key": str(key)})
    assert front.tls is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port, ssl=authority.context())

    async def ask() -> bytes:
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        return await reader.readuntil(b"}")

    assert b"200 OK" in await ask()
    second = Authority(authority.folder, "second")
    for new, old in zip(second.issue("next", "serverAuth"), (certificate, key), strict=True):
        new.replace(old)
    front.tls.reload()
    assert await get(front, second.context()) == 200
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await get(front, authority.context())
    assert b"200 OK" in await ask(), "the connection of before"
    _, named = await asyncio.open_connection(
        "127.0.0.1", front.port, ssl=second.context(), server_hostname="localhost"
    )  # with a name in the handshake, as above without
    named.close()
    key.write_text("broken")
    with pytest.raises(ConfigError, match="server.tls: .*cannot be used"):
        front.tls.reload()
    assert await get(front, second.context()) == 200, "a bad file changes nothing"
    writer.close()


async def test_clients_need_a_certificate_where_an_authority_is_named(edge_of: Any, authority: Authority) -> None:
    server, client = authority.issue("server", "serverAuth"), authority.issue("client", "clientAuth")
    clients = authority.folder / "clients.pem"
    clients.write_bytes(authority.certificate.read_bytes())
    front: Front = await edge_of(tls={"certificate": str(server[0]), "key": str(server[1]), "client_ca": str(clients)})
    assert front.tls is not None
    assert await get(front, authority.context(*client)) == 200
    with pytest.raises(aiohttp.ClientError):
        await get(front, authority.context())
    second = Authority(authority.folder, "second")
    with pytest.raises(aiohttp.ClientError):
        await get(front, authority.context(*second.issue("stranger", "clientAuth")))
    clients.write_bytes(second.certificate.read_bytes())
    front.tls.reload()
    assert await get(front, authority.context(*second.issue("welcome", "clientAuth"))) == 200
    with pytest.raises(aiohttp.ClientError):
        await get(front, authority.context(*client))


def test_a_private_key_that_others_read_is_refused(authority: Authority) -> None:
    certificate, key = authority.issue("server", "serverAuth")
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        Tls(TlsSettings(certificate=certificate, key=key))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Tls(TlsSettings(certificate=certificate, key=key.with_name("missing")))


# --- the command line comes in by the same doors ---


async def test_the_commands_use_the_socket_or_the_token_with_the_servers_own_certificate(
    edge_of: Any, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("server", "serverAuth")
    tls = {"certificate": str(certificate), "key": str(key)}
    token = tmp_path / "token"
    private_files.write(token, "t" * 40)
    path = tmp_path / "admin.sock"
    for admin in ({"socket": str(path)}, {"token_file": str(token)}):
        front: Front = await edge_of(tls=tls, admin=admin)
        server = front.settings.server.model_copy(update={"port": front.port})
        async with Control(address_of(server)) as control:
            assert (await control.status())["ready"] is True
    private_files.write(token, "u" * 40)
    async with Control(address_of(server)) as control:
        with pytest.raises(ControlError, match="admin token is needed"):
            await control.status()
    other = server.model_copy(update={"tls": TlsSettings(certificate=authority.issue("b", "serverAuth")[0], key=key)})
    async with Control(address_of(other)) as control:
        with pytest.raises(HostError, match="no warmpool answers"):
            await control.status()


# --- what reaches the engine, and what comes back ---


@pytest.fixture
async def mirror(tmp_path: Path) -> AsyncIterator[Front]:
    """A front whose engine says what it got."""
    command = ["{python}", "-m", "tests.mirror_engine", "{port}"]
    model = {
        "process": {"command": command, "cwd": str(ROOT)}, "health": {"interval": "20ms"}, "warmup": {"requests": 0},
        "canary": "never",
    }  # fmt: skip
    front = Front(tmp_path, {"demo": model}, cors={"origins": [KEPT_BACK["Origin"]]})
    await front.open()
    yield front
    await front.close()


KEPT_BACK = {
    "Authorization": "Bearer secret", "X-Api-Key": "secret", "api-key": "secret", "Cookie": "a=secret",
    "Proxy-Authorization": "Basic secret", "X-Foo": "secret", "X-Bar": "secret", "TE": "trailers",
    "Keep-Alive": "timeout=5", "Proxy-Connection": "keep-alive", "Upgrade": "h2c", "Trailer": "X-T",
    "Forwarded": "for=192.0.2.1", "X-Forwarded-For": "192.0.2.1", "X-Forwarded-Host": "evil",
    "X-Forwarded-Proto": "https",
    "X-Real-IP": "192.0.2.1", "Via": "1.1 evil", "Origin": "https://page.example", "Referer": "https://page.example/x",
}  # fmt: skip


async def test_what_is_for_this_hop_or_for_the_proxy_stays_here(mirror: Front) -> None:
    headers = [f"{name}: {value}" for name, value in KEPT_BACK.items()]
    request = post(
        "Connection: close, X-Foo", "Connection: x-bar", "X-Kept: 1", "Content-Type: application/json", LENGTH, *headers
    )
    head, _, body = (await exchange(mirror, request)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    got = orjson.loads(body)
    names = {name.lower() for name, _ in got["headers"]}
    assert "x-kept" in names
    assert not names & {name.lower() for name in KEPT_BACK}
    assert "secret" not in body.decode()


async def test_what_an_engine_says_of_itself_stays_here(mirror: Front) -> None:
    response, answer = await mirror.post("/v1/completions", ASK)
    assert response.headers["Server"] == "warmpool"
    assert response.headers["X-Fine"] == "1"
    for name in ("Location", "Set-Cookie", "X-Hop", "Access-Control-Allow-Origin", "Keep-Alive"):
        assert name not in response.headers, name
    assert orjson.loads(answer)["line"].startswith("POST /v1/completions")


@pytest.mark.parametrize("size", [10, 5000, 100_000])
async def test_an_engines_error_shows_neither_its_address_nor_a_stack(mirror: Front, size: int) -> None:
    await mirror.post("/v1/completions", ASK)
    address = (await mirror.engine()).removeprefix("http://")
    padding = "x" * size
    for secret in (
        f"cannot reach {address}",
        'Traceback (most recent call last):\n  File "/opt/vllm/engine.py", line 1',
    ):
        response, answer = await mirror.post("/v1/completions", {**ASK, "fail": {"error": f"{secret} {padding}"}})
        assert (response.status, error_of(answer)["code"]) == (500, "engine_error")
        assert secret.encode() not in answer
    plain = {"error": {"message": f"out of memory {padding}"}}
    response, answer = await mirror.post("/v1/completions", {**ASK, "fail": plain})
    assert response.status == 500
    assert orjson.loads(answer) == plain, "what is harmless passes unchanged, however large"
    assert mirror.pool.status()["models"]["demo"]["instances"][0]["state"] == "ready"


# --- the same with the event loop of `warmpool serve` ---


async def test_a_server_of_its_own_with_tls_limits_and_a_socket(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue("server", "serverAuth")
    path = tmp_path / "run" / "admin.sock"
    limits = {
        "head_timeout": "1s", "upload_timeout": "1s", "upload_rate": "1MiB", "stall_timeout": "1s", "connections": 50,
    }  # fmt: skip
    server = {
        "tls": {"certificate": str(certificate), "key": str(key)}, "admin": {"socket": str(path)}, "limits": limits,
        "hosts": ["x"],
    }  # fmt: skip
    proxy = Proxy(tmp_path / "w", settings={"server": server, "models": {"demo": engine_model()}})
    async with asyncio.timeout(PATIENCE_S):
        while not (found := re.findall(r"listening on https://127.0.0.1:(\d+)", proxy.log.read_text())):
            assert proxy.process.poll() is None, proxy.log.read_text()
            await asyncio.sleep(0.02)
    port = int(found[0])
    proxy.session = aiohttp.ClientSession()

    pairs: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def connected(context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        pairs.append(await asyncio.open_connection("127.0.0.1", port, ssl=context))
        return pairs[-1]

    async def healthy(pair: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bool:
        pair[1].write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        return b"200 OK" in await pair[0].readuntil(b"}")

    try:
        kept = await connected(authority.context())
        assert await healthy(kept)
        for pieces, status in ((post("X-A:", body=b""), b"408"), (post("Content-Length: 100", body=b"{"), b"408")):
            pair = await connected(authority.context())
            pair[1].write(pieces[:-4] if b"X-A" in pieces else pieces)
            async with asyncio.timeout(PATIENCE_S):
                assert (await pair[0].read())[9:12] == status
        silent = await asyncio.open_connection("127.0.0.1", port)  # no TLS handshake
        pairs.append(silent)
        async with asyncio.timeout(PATIENCE_S):
            assert await silent[0].read() == b""
        stalled = await connected(authority.context())
        body = orjson.dumps({**ASK, "stream": True, "max_tokens": 3000, "n": 64, "ignore_eos": True})
        cast("asyncio.Transport", stalled[1].transport).pause_reading()
        stalled[1].write(post(f"Content-Length: {len(body)}", body=body))
        second = Authority(tmp_path, "second")
        for new, old in zip(second.issue("next", "serverAuth"), (certificate, key), strict=True):
            new.replace(old)
        proxy.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(ssl.SSLError, OSError):
                    assert await healthy(await connected(second.context()))
                    break
                await asyncio.sleep(0.02)
        assert await healthy(kept), "the connection of before"
        assert path.stat().st_mode & 0o777 == 0o600
        async with Control(Address("http://localhost", socket=path)) as control, asyncio.timeout(PATIENCE_S):
            while "takes nothing of its answer" not in proxy.log.read_text():
                await asyncio.sleep(0.02)
            while (await control.status())["leases"]:
                await asyncio.sleep(0.02)
        for _ in range(50):
            if not await healthy(await connected(second.context())):
                break
        assert "over server.limits.connections" in proxy.log.read_text()
    finally:
        for _, writer in pairs:
            writer.transport.abort()
        proxy.process.terminate()
        assert await proxy.ended() == 0
