"""Every route of the table, through the proxy and around it: the same answer, with a real engine's real bytes."""

from __future__ import annotations

import asyncio
import io
import re
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from proxy.engine.connection import Connection, ExchangeError
from proxy.server.forward.routes import ROUTES
from proxy.tiers import Tier
from tests.fakes import settle
from tests.front import Front
from tests.server.test_http import error_of
from tests.support import PATIENCE_S, engine_model

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
TEXT = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}
JSON_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {**CHAT, "messages": [CHAT["messages"]] * 2},
    "/v1/chat/completions/render": CHAT,
    "/v1/completions": TEXT,
    "/v1/completions/render": TEXT,
    "/v1/responses": {"input": "Hello", "max_output_tokens": 8, "temperature": 0},
    "/v1/messages": {**CHAT, "system": "Be brief."},
    "/v1/messages/count_tokens": CHAT,
    "/v1/messages/render": CHAT,
    "/v1/responses/render": {"input": "Hello"},
    "/invocations": CHAT,
    "/generative_scoring": {"query": "a", "items": ["a", "b"], "label_token_ids": [1, 2]},
    "/v1/systemone": {"state": "a", "questions": {"b": {"type": "binary"}}},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/v2/embed": {"texts": ["a", "b"], "input_type": "search_query"},
    **{path: {"query": "a", "documents": ["a", "b"], "top_n": 1} for path in ("/rerank", "/v1/rerank", "/v2/rerank")},
    **{path: {"text_1": "a", "text_2": ["a", "b"]} for path in ("/score", "/v1/score")},
    "/classify": {"input": "a"},
    "/pooling": {"input": ["a"]},
    "/tokenize": TEXT,
    "/detokenize": {"tokens": [(1 << 24) + 65, (1 << 24) + 66]},
}
LORA = {"lora_name": "sql-lora", "lora_path": "/models/sql"}
VOLATILE = re.compile(rb'"(id|created|created_at|item_id)": ?("[^"]*"|\d+)')


def test_every_route_is_tried() -> None:
    audio = {"/v1/audio/transcriptions", "/v1/audio/translations"}
    others = {"/v1/responses/{id}", "/v1/responses/{id}/cancel", "/tokenizer_info", "/v1/realtime"}
    lora = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    assert {r.path for r in ROUTES} == set(JSON_BODIES) | audio | others | lora


async def both(front: Front, method: str, path: str, **options: Any) -> tuple[bytes, bytes]:
    """The answer through the proxy and the engine's own, without ids and times."""
    answers = []
    await front.post("/tokenize", {"model": "demo", "prompt": "wake"})
    async with aiohttp.ClientSession() as session:
        for base in (front.url, await front.engine()):
            made = {name: value() if callable(value) else value for name, value in options.items()}
            async with session.request(method, base + path, **made) as response:
                assert response.status == 200, await response.read()
                answers.append(VOLATILE.sub(b"", await response.read()))
    return answers[0], answers[1]


async def test_json_routes(front: Front) -> None:
    for path, body in JSON_BODIES.items():
        through, direct = await both(front, "POST", path, json={"model": "demo", **body})
        assert through == direct, path
        assert len(through) > 10, path


async def test_streams(front: Front) -> None:
    for path in [r.path for r in ROUTES if r.streams and r.path in JSON_BODIES]:
        through, direct = await both(front, "POST", path, json={"model": "demo", **JSON_BODIES[path], "stream": True})
        assert through == direct, path
        assert through.count(b"\n\n") > 8, path


async def test_audio_uploads(front: Front) -> None:
    sound = bytes(range(256)) * 1000

    def form(stream: str) -> aiohttp.FormData:
        data = aiohttp.FormData({"model": "demo", "stream": stream})
        data.add_field("file", sound, filename="a.wav", content_type="audio/wav")
        return data

    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        through, direct = await both(front, "POST", path, data=lambda: form("false"))
        assert through == direct, path
        assert orjson.loads(through)["text"]
        through, direct = await both(front, "POST", path, data=lambda: form("true"))
        assert through == direct, path
        assert through.endswith(b"data: [DONE]\n\n")


async def test_an_upload_by_an_alias_and_by_the_default_model(front_of: Any) -> None:
    front: Front = await front_of(name="org/Demo", aliases=["whisper-1"], server={"default_model": "whisper-1"})
    answers = set()
    for fields in ({"model": "whisper-1"}, {}, {"model": "org/Demo"}):
        data = aiohttp.FormData(fields)
        data.add_field("file", b"\r\n--sound--\r\n" * 1000, filename="a.wav")
        async with front.session.post("/v1/audio/transcriptions", data=data) as response:
            assert response.status == 200, await response.read()
            answers.add(await response.read())
    assert len(answers) == 1


async def test_an_upload_over_the_limit_is_refused(front: Front) -> None:
    data = aiohttp.FormData({"model": "demo"})
    data.add_field("file", io.BytesIO(b"x" * (2 << 20)), filename="a.wav")
    async with front.session.post("/v1/audio/transcriptions", data=data) as response:
        assert (response.status, error_of(await response.read())["code"]) == (413, "request_too_large")
    assert front.pool.status()["models"]["demo"]["instances"] == []


async def test_an_upload_is_tried_again_when_the_engine_drops_it(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    await front.post("/tokenize", {"model": "demo", "prompt": "wake"})
    original, calls = Connection.begin, list[bytes]()

    def fails_once(self: Connection, receiver: Any, message: bytes, body: bytes = b"") -> None:
        calls.append(message.partition(b"\r\n\r\n")[2] + body)
        if len(calls) == 1:
            raise ExchangeError("the connection broke")
        original(self, receiver, message, body)

    monkeypatch.setattr(Connection, "begin", fails_once)
    data = aiohttp.FormData({"model": "demo"})
    data.add_field("file", b"sound", filename="a.wav")
    async with front.session.post("/v1/audio/transcriptions", data=data) as response:
        assert response.status == 200
    assert len(calls) == 2
    assert calls[0] == calls[1]


async def test_tokenizer_info_names_its_model_in_the_query_or_means_the_only_one(front: Front) -> None:
    for query in ("?model=demo", ""):
        through, direct = await both(front, "GET", f"/tokenizer_info{query}")
        assert through == direct


async def test_lora_adapters_are_loaded_where_that_is_allowed(front_of: Any) -> None:
    front: Front = await front_of(routes={"lora": True}, adapters=["sql-lora"])
    response, _ = await front.post("/v1/load_lora_adapter?model=demo", LORA)
    assert response.status == 200
    response, answer = await front.post("/v1/completions", {**TEXT, "model": "sql-lora"})
    assert (response.status, orjson.loads(answer)["model"]) == (200, "sql-lora")
    response, _ = await front.post("/v1/unload_lora_adapter?model=demo", LORA)
    assert response.status == 200
    response, _ = await front.post("/v1/completions", {**TEXT, "model": "sql-lora"})
    assert response.status == 404, "the engine's own answer"


# --- responses by id ---


async def test_a_response_is_found_cancelled_and_followed_by_its_id(front_of: Any) -> None:
    front: Front = await front_of("--tokens-per-second", "20")
    ask = {"model": "demo", "input": "Hello", "max_output_tokens": 8, "temperature": 0}
    _, answer = await front.post("/v1/responses", ask)
    made = orjson.loads(answer)
    async with front.session.get(f"/v1/responses/{made['id']}") as response:
        assert (response.status, orjson.loads(await response.read())) == (200, made)
    response, answer = await front.post("/v1/responses", {**ask, "previous_response_id": made["id"]})
    assert (response.status, orjson.loads(answer)["previous_response_id"]) == (200, made["id"])
    _, answer = await front.post("/v1/responses", {**ask, "background": True, "ignore_eos": True})
    queued = orjson.loads(answer)
    assert queued["status"] == "queued"
    response, answer = await front.post(f"/v1/responses/{queued['id']}/cancel", b"")
    assert (response.status, orjson.loads(answer)["status"]) == (200, "cancelled")
    for query in ("", "?model=demo"):
        async with front.session.get(f"/v1/responses/resp_unknown{query}") as response:
            assert response.status == 404, "the engine's own answer"
            assert error_of(await response.read())["message"] == "Response with id 'resp_unknown' not found."


async def test_a_response_that_nobody_made_is_unknown_in_vllms_words(tmp_path: Path) -> None:
    front = Front(tmp_path, {"demo": engine_model(), "other": engine_model()})
    await front.open()
    for method, path in (("GET", "/v1/responses/resp_unknown"), ("POST", "/v1/responses/resp_unknown/cancel")):
        async with front.session.request(method, path) as response:
            error = error_of(await response.read())
            assert (response.status, error["message"]) == (404, "Response with id 'resp_unknown' not found.")
            assert (error["type"], error["param"]) == ("invalid_request_error", "response_id")
    assert front.pool.status()["models"]["demo"]["instances"] == [], "and nothing is woken"
    await front.close()


async def test_it_goes_to_the_instance_that_made_it(front_of: Any) -> None:
    front: Front = await front_of(max_instances=2, min_ready=2)
    async with asyncio.timeout(PATIENCE_S):
        while [i["state"] for i in front.pool.status()["models"]["demo"]["instances"]] != ["ready"] * 2:
            await asyncio.sleep(0.02)
    makers: dict[str, str] = {}
    for stream in (True, False):
        asks = [{"model": "demo", "input": f"Hello {n}", "max_output_tokens": 50, "stream": stream} for n in range(8)]
        for response, answer in await asyncio.gather(*(front.post("/v1/responses", ask) for ask in asks)):
            found = re.search(rb'"id": ?"(resp_[^"]+)"', answer)
            assert found is not None
            makers[found[1].decode()] = response.headers["x-warmpool-instance"]
    assert set(makers.values()) == {"demo-1", "demo-2"}
    await settle()
    for id_, maker in makers.items():
        async with front.session.get(f"/v1/responses/{id_}") as response:
            assert (response.status, response.headers["x-warmpool-instance"]) == (200, maker)


async def test_it_wakes_the_instance_that_made_it_though_another_is_ready(front_of: Any) -> None:
    front: Front = await front_of(max_instances=2, max_concurrency=1)
    leases = await asyncio.gather(*(front.pool.lease("demo") for _ in range(2)))
    makers: dict[str, str] = {}
    for lease in [*leases]:
        lease.release()  # the only free one
        response, answer = await front.post("/v1/responses", {"model": "demo", "input": "Hello"})
        makers[orjson.loads(answer)["id"]] = response.headers["x-warmpool-instance"]
        leases.append(await front.pool.lease("demo", preferred=lease.instance_id))
    for lease in leases:
        lease.release()
    assert set(makers.values()) == {"demo-1", "demo-2"}
    for to in (Tier.SLEEPING, Tier.SUSPENDED):
        for id_, maker in makers.items():
            (command,) = front.pool.step_down("demo", to, instance_id=maker)
            await command.carried_out()
            async with front.session.get(f"/v1/responses/{id_}") as response:
                assert (response.status, response.headers["x-warmpool-instance"]) == (200, maker)
                assert response.headers["x-warmpool-tier"] == to.label
