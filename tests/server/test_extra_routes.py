"""Routes of the configuration's: what may be one, and which model and which bytes a request for one goes to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.config.extra_routes import LISTED, MANAGEMENT, OWN
from proxy.config.model import ModelSettings
from proxy.config.settings import Settings
from proxy.errors import InvalidRequestError, MethodNotAllowedError, RouteNotFoundError
from proxy.server.forward.model_resolver import Addressing
from proxy.server.forward.routes import ROUTES, find
from tests.scripted import Scripted, post
from tests.server.test_routes import FORBIDDEN, TRICKS
from tests.support import PATIENCE_S

PROCESS = {"process": {"command": ["engine", "{port}"]}}
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
    b"%b--x--\r\n"
)  # fmt: skip
NAMED = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n'


def model(*routes: dict[str, Any], **entry: Any) -> dict[str, Any]:
    return {**PROCESS, "extra_routes": list(routes), **entry}


def settings(default: str | None = None, **models: dict[str, Any]) -> Settings:
    return Settings(models=models, server={"default_model": default})


def addressed(it: Settings, path: str, body: bytes = b"{}", query: str = "", content_type: str = "", **how: Any) -> Any:
    """The model's key and the body that its engine gets."""
    match = find(how.get("method", "POST"), path, query, extra=it.extra_routes)
    found = Addressing(lambda: it).find(match, content_type, body)
    return found.model, found.target, found.body


SPEECH = {"path": "/v1/audio/speech"}
IMAGES = {"path": "/v1/images/*"}
INFILL = {"path": "/infill", "streams": True}
WHISPER = {"path": "/inference", "model_in": "nothing"}
EDITS = {"path": "/v1/edits", "model_in": "form"}


def test_the_model_is_the_one_that_the_body_names() -> None:
    it = settings(a=model(SPEECH, name="org/A", aliases=["other"]), b=model(SPEECH), c=model())
    assert addressed(it, "/v1/audio/speech", b'{"model": "b", "input": "x"}') == (
        "b", "/v1/audio/speech", b'{"model": "b", "input": "x"}',
    )  # fmt: skip
    assert addressed(it, "/v1/audio/speech", b'{"input": "x", "model":"other"}')[2] == (
        b'{"input": "x", "model":"org/A"}'
    ), "an alias becomes the name that the engine knows"
    with pytest.raises(RouteNotFoundError, match="'c' does not offer POST /v1/audio/speech"):
        addressed(it, "/v1/audio/speech", b'{"model": "c"}')
    with pytest.raises(InvalidRequestError, match="must name a model"):
        addressed(it, "/v1/audio/speech", b"{}")
    with pytest.raises(InvalidRequestError, match="must be a string"):
        addressed(it, "/v1/audio/speech", b'{"model": 1}')


def test_one_that_names_none_is_for_the_only_model_that_offers_it_and_goes_on_as_it_came() -> None:
    it = settings(a=model(INFILL), b=model(SPEECH), c=model())
    body = b'{"input_prefix": "def ", "input_suffix": "x"}'
    assert addressed(it, "/infill", body) == ("a", "/infill", body)
    assert addressed(it, "/v1/audio/speech", b'{"input": "x"}')[0] == "b"
    both = settings("b", a=model(INFILL), b=model(INFILL))
    assert addressed(both, "/infill", body)[0] == "b", "server.default_model"
    with pytest.raises(RouteNotFoundError):
        addressed(settings("c", a=model(INFILL), b=model(INFILL), c=model()), "/infill", body)


def test_a_body_that_is_not_looked_at_is_any_bytes() -> None:
    it = settings(a=model(WHISPER), b=model())
    assert addressed(it, "/inference", b"\x00RIFF") == ("a", "/inference", b"\x00RIFF")
    assert addressed(it, "/inference", b'{"model": "b"}') == ("a", "/inference", b'{"model": "b"}')


def test_forms_and_queries_name_models_too() -> None:
    it = settings(a=model(EDITS, {"path": "/voices", "method": "GET", "model_in": "query"}, name="org/A"), b=model())
    form = "multipart/form-data; boundary=x"
    assert addressed(it, "/v1/edits", FORM % b"", content_type=form)[::2] == ("a", FORM % b"")
    assert addressed(it, "/v1/edits", FORM % NAMED % b"org/A", content_type=form)[0] == "a"
    assert addressed(it, "/voices", b"", "model=org%2FA", method="GET")[:2] == ("a", "/voices?model=org%2FA")
    assert addressed(it, "/voices", b"", method="GET")[0] == "a"


def test_a_star_is_one_segment() -> None:
    it = settings(a=model(IMAGES))
    for last in ("generations", "edits", "a.b", "_x"):
        assert addressed(it, f"/v1/images/{last}")[1] == f"/v1/images/{last}"
    for path in (
        "/v1/images", "/v1/images/", "/v1/images/a/b", "/v1/images/..", "/v1/images/.a", "/v1/images/*",
        "/v1/images/%2e%2e", "/v1/images/a%2fb", "/v1/images//a", "/V1/images/a", "/v1/images/a;b",
        "/v1/images/../infill",
    ):  # fmt: skip
        with pytest.raises(RouteNotFoundError):
            addressed(it, path)
    with pytest.raises(MethodNotAllowedError):
        addressed(it, "/v1/images/a", method="GET")


def test_what_else_is_offered_does_not_open_another_spelling() -> None:
    it = settings(a=model(IMAGES, INFILL, SPEECH, WHISPER))
    for path in (*FORBIDDEN, *TRICKS):
        for method in ("GET", "POST"):
            with pytest.raises((RouteNotFoundError, MethodNotAllowedError, InvalidRequestError)):
                find(method, path, extra=it.extra_routes)


@pytest.mark.parametrize(
    "path",
    [
        *sorted(OWN), *sorted(LISTED), *sorted(name for names in MANAGEMENT.values() for name in names),
        "/admin/status", "/v1/models/x", "/v1/models/*", "/metrics/x", "/sleep/now", "/SLEEP", "/Admin", "/v1/*",
        "/v1/audio/*", "/v1/responses/*", "/fault_tolerance/*", "/*", "/", "", "*", "infill", "/infill/", "//infill",
        "/a//b", "/../sleep", "/a/../sleep", "/a/./b", "/.hidden", "/a%2e", "/a?b", "/a#b", "/a b", "/a/*/b", "/a*",
        "/a\r\nb", "http://elsewhere/x", "/{id}", "/é", "/" + "a" * 200,
    ],
)  # fmt: skip
def test_what_must_not_be_one_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"warmpool's own|management|no path|every route"):
        ModelSettings(**model({"path": path}))


def test_how_warmpool_asks_the_engine_is_not_for_clients() -> None:
    calls: dict[str, Any] = {"sleep": {"path": "/memory/off?level={level}"}, "wake_up": {"path": "/memory/on"}}
    for path in ("/memory/off", "/memory/*"):
        with pytest.raises(ValueError, match="is how warmpool asks the engine"):
            ModelSettings(**model({"path": path}, **calls))
    ModelSettings(**model({"path": "/memory/size"}, **calls))


def test_models_agree_on_what_a_route_is() -> None:
    with pytest.raises(ValueError, match=r"differs from that of models\.a in model_in or streams"):
        settings(a=model(INFILL), b=model({**INFILL, "streams": False}))
    with pytest.raises(ValueError, match=r"/v1/images/edits is among those of /v1/images/\*"):
        settings(a=model(IMAGES), b=model({"path": "/v1/images/edits"}))
    settings(a=model(IMAGES), b=model({"path": "/v1/images/edits", "method": "GET"}))


def test_the_lists_of_what_is_taken_are_whole() -> None:
    assert {route.path for route in ROUTES} == LISTED
    for path in FORBIDDEN:
        with pytest.raises(ValueError, match="management"):
            ModelSettings(**model({"path": path}))


async def said(proxy: Scripted, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(request)
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    return answer


async def test_it_goes_through_byte_for_byte_and_a_reload_counts_at_once() -> None:
    body = b'{"input_prefix": "def ",  "n_predict": 4}'
    request = post(body, "Connection: close", path="/infill")
    async with Scripted(extra_routes=[INFILL]) as proxy:
        answer = await said(proxy, request)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b'{"text":"hi"}')
        head, got = proxy.peers[0].requests[0]
        assert head.startswith(b"POST /infill HTTP/1.1\r\n")
        assert got == body
        demo = proxy.settings.models["demo"].model_dump(exclude_unset=True)
        await proxy.pool.reconfigure(
            Settings(server=proxy.settings.server, models={"demo": {**demo, "extra_routes": []}})
        )
        answer = await said(proxy, request)
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert b"There is no route POST /infill" in answer
        await proxy.pool.reconfigure(proxy.settings)
        proxy.service.request_heads.forget()
        assert (await said(proxy, request)).startswith(b"HTTP/1.1 200 ")
