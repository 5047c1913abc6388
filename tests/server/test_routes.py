"""The allow-list: what is on it, and that no spelling of anything else gets to an engine."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from proxy.cli.main import cli
from proxy.cli.route_comparison import OWN, REFUSED, compare
from proxy.config.model import RouteSettings
from proxy.errors import InvalidRequestError, MethodNotAllowedError, RouteNotFoundError
from proxy.server.forward.routes import ROUTES, find
from tests.scripted import GOOD, Scripted, post
from tests.server.test_http import ASK, error_of
from tests.support import ROOT

if TYPE_CHECKING:
    from tests.front import Front

FORBIDDEN = (
    "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/pause", "/resume", "/is_paused", "/update_weights",
    "/init_weight_transfer_engine", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/server_info",
    "/start_profile", "/stop_profile", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/release_kv_cache_memory",
    "/fault_tolerance/apply", "/inference/v1/generate", "/abort_requests", "/load", "/docs",
    "/openapi.json", "/debug/state", "/debug/fault",
)  # fmt: skip


def test_every_group_is_a_key_of_models_name_routes_and_the_other_way_round() -> None:
    assert {route.group for route in ROUTES} == set(RouteSettings.model_fields)


def test_lora_is_off_until_allowed_and_everything_else_is_on() -> None:
    assert [name for name, on in RouteSettings().model_dump().items() if not on] == ["lora"]


@pytest.mark.parametrize("path", FORBIDDEN)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_management_is_not_there(method: str, path: str) -> None:
    with pytest.raises(RouteNotFoundError):
        find(method, path)


def test_another_method_is_405_and_says_which() -> None:
    for method, path in (("GET", "/v1/chat/completions"), ("DELETE", "/v1/responses/resp_1")):
        with pytest.raises(MethodNotAllowedError, match=r"takes (GET|POST) only"):
            find(method, path)


@given(
    st.sampled_from([r.path for r in ROUTES] + list(FORBIDDEN)),
    st.lists(
        st.tuples(
            st.integers(0, 60),
            st.sampled_from(["/", "//", "/.", "/..", "/../sleep", "%2e", "%2F", "%00", "..", ";", "\\", " ", "?", "x"]),
        ),
        max_size=3,
    ),
)
def test_what_is_found_is_spelled_as_in_the_table(path: str, insertions: list[tuple[int, str]]) -> None:
    for at, text in insertions:
        path = path[:at] + text + path[at:]
    for method in ("GET", "POST"):
        with contextlib.suppress(RouteNotFoundError, MethodNotAllowedError):
            match = find(method, path)
            assert match.target == path
            known = {re.escape(r.path).replace(r"\{id\}", "[A-Za-z0-9_-]+") for r in ROUTES}
            assert any(re.fullmatch(k, path) for k in known)


def test_the_query_goes_on_and_may_not_be_odd() -> None:
    assert find("GET", "/v1/responses/resp_1", "stream=true&a=%20").target == "/v1/responses/resp_1?stream=true&a=%20"
    for query in ("a b", "a\r\nX: y", "a#b", "\xe9", "\x00"):
        with pytest.raises(InvalidRequestError):
            find("POST", "/v1/completions", query)


TRICKS = [
    "//sleep", "/./sleep", "/v1/../sleep", "/v1/completions/../../sleep", "/v1/completions/..%2f..%2fsleep",
    "/v1/%2e%2e/sleep", "/v1/responses/..", "/v1/responses/../../sleep", "/v1/responses/%2e%2e%2f%2e%2e%2fsleep",
    "/v1/responses/resp_1/../../../sleep", "/v1/responses/resp_1%2f..%2f..%2fsleep", "/v1/responses/a%3fb",
    "/v1/responses/sleep/../cancel", "/%73leep", "/SLEEP", "/sleep/", "/sleep%00", "/sleep;x", "/v1/completions%2f",
    "/v1/completion%73", "/V1/completions", "/v1/Completions", "/v1/completions/", "/v1//completions",
    "//v1/completions", "/v1\\completions", "/v1/completions;x=1", "/v1/models/../../sleep", "/v1/models/%2e%2e/sleep",
    "http://engine/sleep", "http://x/v1/../sleep", "*", "sleep", "@engine/sleep", "/.//sleep", "/sleep?level=1",
    "/sleep#/v1/completions", "/v1/chat/completions%23", "/v1/realtime/../../sleep",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_no_spelling_reaches_an_engine(front: Front, method: str) -> None:
    """Raw bytes, since clients tidy a path up before they send it."""
    body = b'{"model": "demo", "prompt": "x"}'
    for target in TRICKS:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        said, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert said[9:12] in {b"400", b"404", b"405"}, (target, said)
        if said[9:12] == b"404":
            assert error_of(answer)["code"] in {"not_found", "model_not_found"}
    assert front.pool.status()["models"]["demo"]["instances"] == []


async def test_a_model_may_offer_less(front_of: Any) -> None:
    front: Front = await front_of(routes={"completions": False, "audio": False})
    response, answer = await front.post("/v1/completions", ASK)
    assert (response.status, error_of(answer)["code"]) == (404, "not_found")
    assert "does not offer POST /v1/completions" in error_of(answer)["message"]
    response, answer = await front.post("/v1/load_lora_adapter?model=demo", {"lora_name": "a", "lora_path": "/etc"})
    assert (response.status, error_of(answer)["code"]) == (404, "not_found")
    assert front.pool.status()["models"]["demo"]["instances"] == []
    response, _ = await front.post("/tokenize", {"model": "demo", "prompt": "x"})
    assert response.status == 200


# --- beside what an engine says it serves ---

VLLM = orjson.loads((ROOT / "tests" / "vllm_openapi.json").read_bytes())


def test_vllm_serves_nothing_that_is_not_known_here() -> None:
    found = compare(VLLM)
    assert found.new == ()
    assert ("POST", "/invocations") in found.forwarded
    assert ("GET", "/v1/responses/{id}") in found.forwarded
    assert ("POST", "/sleep") in found.refused
    assert ("GET", "/health") in found.own
    of_other_models = {"/v1/embeddings", "/v2/embed", "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score",
                       "/classify", "/pooling", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}  # fmt: skip
    assert {path for _, path in found.lacking} <= of_other_models


def test_what_is_new_is_named() -> None:
    paths = {**VLLM["paths"], "/v3/dream": {"post": {}}, "/tokenize": {"delete": {}}, "/v1/models/{x}/y": {"get": {}}}
    found = compare({**VLLM, "paths": paths})
    assert found.new == (("DELETE", "/tokenize"), ("GET", "/v1/models/{id}/y"), ("POST", "/v3/dream"))


def test_nothing_is_forwarded_and_refused() -> None:
    listed = {(route.method, route.path) for route in ROUTES}
    assert not {path for _, path in listed} & {*REFUSED}
    assert not listed & OWN


@pytest.mark.parametrize("document", [None, [], {}, {"paths": []}, {"paths": {"/x": 1}}])
def test_what_is_no_openapi_document_is_said_to_be_none(document: Any) -> None:
    with pytest.raises(ValueError, match="no OpenAPI document"):
        compare(document)


async def test_the_command_says_what_an_engine_serves_that_is_new() -> None:
    async def described(_: web.Request) -> web.Response:
        return web.json_response({**VLLM, "paths": {**VLLM["paths"], "/v3/dream": {"post": {}}}})

    application = web.Application()
    application.router.add_get("/openapi.json", described)
    async with TestServer(application) as server:
        result = await asyncio.to_thread(CliRunner().invoke, cli, ["routes", str(server.make_url("/"))])
        assert result.exit_code == 1
        assert "new        POST  /v3/dream" in result.output
        assert "forwarded  POST  /v1/chat/completions" in result.output
        gone = await asyncio.to_thread(CliRunner().invoke, cli, ["routes", str(server.make_url("/nowhere"))])
        assert (gone.exit_code, "answers 404" in gone.output) == (69, True)
    listed = CliRunner().invoke(cli, ["routes"])
    assert "invocations  POST  /invocations" in listed.output


# --- SageMaker's route, and those that name no model ---


async def test_invocations_stands_for_the_groups_that_it_leads_to(front_of: Any) -> None:
    front: Front = await front_of(routes={"embeddings": False})
    response, answer = await front.post("/invocations", {"prompt": "x", "max_tokens": 1})
    assert (response.status, error_of(answer)["code"]) == (404, "not_found")


async def test_an_invocation_names_the_only_model_and_no_adapter_beside_it() -> None:
    async with Scripted() as proxy:
        fields = ("Connection: close", "X-Amzn-SageMaker-Adapter-Identifier: other")
        said = await proxy.ask(post(b'{"prompt":"x"}', *fields, path="/invocations"), GOOD)
        assert said.startswith(b"HTTP/1.1 200")
        head, body = proxy.peers[-1].requests[-1]
    assert head.startswith(b"POST /invocations HTTP/1.1\r\n")
    assert b"sagemaker" not in head.lower()
    assert orjson.loads(body) == {"prompt": "x", "model": "demo"}


def test_invocations_keeps_to_the_parameters_of_the_model() -> None:
    route = find("POST", "/invocations").route
    assert (route.generates, route.streams) == (True, True)
