"""What web pages may do with a server that asks for no keys, and what of an engine's answers a browser may run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest

from tests.scripted import QUESTION, Scripted, answer_of, post
from tests.server.test_http import ASK, error_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.front import Front

IMAGE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
CHAT = "https://chat.example.org"


async def raw(front: Front, method: str, target: str, *fields: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of the answer to a request in which every letter counts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    lines = [f"{method} {target} HTTP/1.1", *fields, f"Content-Length: {len(body)}", "Connection: close", "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head[9:12]), answer


def woken(front: Front) -> int:
    return len(front.pool.status()["models"]["demo"]["instances"])


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
async def test_a_page_of_another_site_wakes_no_engine_whatever_the_method(front: Front, method: str) -> None:
    for path in ("/tokenizer_info?model=demo", "/v1/completions", "/v1/models", "/nowhere"):
        async with front.session.request(method, path, headers=IMAGE, data=orjson.dumps(ASK)) as response:
            assert response.status == 403, path
            if method != "HEAD":
                assert "server.cors.origins" in error_of(await response.read())["message"]
    async with front.session.get("/tokenizer_info?model=demo", headers=LINK) as response:
        assert response.status == 403, "a link is followed to pages only"
    assert woken(front) == 0
    assert front.sample("warmpool_refused_total", reason="forbidden") == 5


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
async def test_pages_of_this_host_may(front: Front, site: str) -> None:
    async with front.session.get("/v1/models", headers={"Sec-Fetch-Site": site}) as response:
        assert response.status == 200
    response, _ = await front.post("/v1/completions", ASK, headers={"Sec-Fetch-Site": site})
    assert response.status == 200


async def test_a_sibling_of_a_configured_name_is_another_site(front: Front) -> None:
    async with front.session.get("/v1/models", headers={"Sec-Fetch-Site": "same-site", "Host": "proxy"}) as response:
        assert response.status == 403


async def test_a_page_of_a_configured_origin_may(front_of: Any) -> None:
    front: Front = await front_of(server={"cors": {"origins": [CHAT]}})
    for origin, status in ((CHAT, 200), ("https://evil.example", 403)):
        headers = {**IMAGE, "Sec-Fetch-Mode": "cors", "Origin": origin}
        async with front.session.get("/v1/models", headers=headers) as response:
            assert response.status == status
    async with front.session.get("/v1/models", headers=IMAGE) as response:
        assert response.status == 403, "without an origin nobody knows which page it was"


async def test_a_page_at_a_configured_name_is_of_this_server(front_of: Any) -> None:
    front: Front = await front_of(server={"hosts": ["llm.example.org"]})
    for origin, status in (("https://llm.example.org", 200), ("https://x.llm.example.org", 403)):
        headers = {"Host": "llm.example.org", "Origin": origin}
        response, _ = await front.post("/v1/completions", ASK, headers=headers)
        assert response.status == status


async def test_another_site_may_lead_to_the_admin_page_and_ask_for_nothing_else(front: Front) -> None:
    async with front.session.get("/admin/", headers=LINK) as response:
        assert response.status == 200
    for path, headers in (("/admin/", IMAGE), ("/metrics", IMAGE), ("/admin/status", LINK), ("/admin/events", IMAGE)):
        async with front.session.get(path, headers=headers) as response:
            assert response.status == 403, path
    async with front.session.get("/health", headers=IMAGE) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.nip.io", "q"]
)
async def test_a_name_that_was_made_to_point_here_reads_and_wakes_nothing(front: Front, host: str) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/tokenizer_info?model=demo")):
        status, answer = await raw(front, method, path, f"Host: {host}", body=QUESTION if method == "POST" else b"")
        assert status == 403, path
        assert "server.hosts" in error_of(answer)["message"]
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await front.session.ws_connect("/v1/realtime?model=demo", headers={"Host": host})
    assert refused.value.status == 403
    status, _ = await raw(front, "GET", "/admin/status", f"Host: {host}")
    assert status == 403
    assert woken(front) == 0
    status, _ = await raw(front, "GET", "/health", f"Host: {host}")
    assert status == 200


async def test_addresses_localhost_and_configured_names_may(front_of: Callable[..., Any]) -> None:
    front: Front = await front_of(server={"hosts": ["LLM.example.org"]})
    for host in (
        "127.0.0.1",
        "127.0.0.1:80",
        "[::1]:80",
        "192.0.2.1",
        "localhost",
        "LocalHost:1",
        "llm.example.org:443",
    ):
        status, _ = await raw(front, "GET", "/v1/models", f"Host: {host}")
        assert status == 200, host
        fields = (f"Host: {host}", "Content-Type: application/json")
        status, _ = await raw(front, "POST", "/v1/completions", *fields, body=orjson.dumps(ASK))
        assert status == 200, host
    status, _ = await raw(front, "GET", "/admin/status", "Host: llm.example.org")
    assert status == 403, "the name is for clients: a proxy passes it on for everybody"


# --- paths in their exact spelling ---


@pytest.mark.parametrize(
    "target",
    [
        "/v1/model%73", "/%761/models", "/v1%2Fmodels", "/healt%68", "/%72eady", "/versio%6e", "/%70ing", "/metric%73",
        "/admin%2Fstatus", "/adm%69n/", "/admin/statu%73", "/v1/models%2Fdemo", "/v1/model%73/demo",
    ],
)  # fmt: skip
async def test_another_spelling_of_an_own_path_is_another_path(front: Front, target: str) -> None:
    status, answer = await raw(front, "GET", target, "Host: localhost")
    assert (status, error_of(answer)["code"]) == (404, "not_found")


async def test_a_command_is_spelled_out_and_a_models_name_may_be_encoded(front_of: Any) -> None:
    front: Front = await front_of(name="org/Demo")
    fields = ("Host: localhost", "Content-Type: application/json")
    for command, expected in (("dra%69n", 404), ("drain", 200), ("undrain", 200)):
        status, answer = await raw(front, "POST", f"/admin/models/org%2FDemo/{command}", *fields, body=b"{}")
        assert status == expected, (command, answer)
    for name in ("org/Demo", "org%2FDemo", "%6frg/Demo"):
        status, answer = await raw(front, "GET", f"/v1/models/{name}", "Host: localhost")
        assert (status, orjson.loads(answer)["id"]) == (200, "org/Demo")


@pytest.mark.parametrize(
    "target", ["/health#x", "/v1/models#", "/admin/#/x", "/v1/completions#", "/v1/models?a#b", "/#"]
)
async def test_a_target_with_a_fragment_is_no_http(front: Front, target: str) -> None:
    status, answer = await raw(front, "GET", target, "Host: localhost")
    assert (status, error_of(answer)["code"]) == (400, "bad_http")


# --- what engines answer ---


@pytest.mark.parametrize(
    "kind", [b"text/html", b"Text/HTML; charset=utf-8", b"image/svg+xml", b"application/xhtml+xml", b"text/plain", None]
)
@pytest.mark.parametrize(
    "framing", [b"content-length: 4\r\n\r\n<b/>", b"transfer-encoding: chunked\r\n\r\n4\r\n<b/>\r\n0\r\n\r\n"]
)
async def test_what_an_engine_answers_runs_nothing_in_a_browser(kind: bytes | None, framing: bytes) -> None:
    fields = b"content-type: %b\r\ncontent-security-policy: script-src *\r\n" % kind if kind is not None else b""
    async with Scripted() as proxy:
        said = await proxy.ask(post(QUESTION, "Connection: close"), b"HTTP/1.1 200 OK\r\n" + fields + framing)
    _, headers, body, _ = answer_of(said)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert body == b"<b/>"


async def test_json_and_events_pass_as_they_are() -> None:
    async with Scripted() as proxy:
        for kind in (b"application/json", b"application/json; charset=utf-8", b"text/event-stream"):
            answer = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: 2\r\n\r\n{}" % kind
            _, headers, _, _ = answer_of(await proxy.ask(post(QUESTION, "Connection: close"), answer))
            assert "content-security-policy" not in headers
