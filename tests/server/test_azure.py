"""Azure OpenAI's paths, for clients that know no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from openai import AsyncAzureOpenAI

from tests.served import ASK
from tests.server.test_http import error_of
from tests.support import get_json

if TYPE_CHECKING:
    from tests.front import Front

AZURE = {"azure_paths": True}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


async def test_azures_own_client_reaches_a_model(front_of: Any) -> None:
    front: Front = await front_of(server=AZURE, aliases=["gpt-4"])
    async with AsyncAzureOpenAI(azure_endpoint=front.url, api_key="none", api_version="2024-10-21") as client:
        answer = await client.chat.completions.create(
            model="gpt-4", messages=[{"role": "user", "content": "x"}], max_tokens=2
        )
        assert answer.choices[0].message.content
        vectors = await client.embeddings.create(model="demo", input="x")
        assert vectors.data


@pytest.mark.parametrize("body", [{}, {"model": "none"}, {"model": "demo"}, {"model": 5}, {"model": ""}])
async def test_the_path_says_which_model_whatever_the_body_says(front_of: Any, body: dict[str, Any]) -> None:
    front: Front = await front_of(server=AZURE, name="org/Demo")
    path = "/openai/deployments/org%2FDemo/completions?api-version=x"
    request = {**{k: v for k, v in ASK.items() if k != "model"}, **body}
    response, answer = await front.post(path, request)
    assert response.status == 200, answer
    assert orjson.loads(answer)["model"] == "org/Demo"
    assert (await get_json(f"{await front.engine()}/debug/state"))["served"] >= 1


async def test_a_recording_goes_to_the_model_of_the_path(front_of: Any) -> None:
    front: Front = await front_of(server=AZURE)
    for fields in ({}, {"model": "none"}):
        form = aiohttp.FormData(fields)
        form.add_field("file", b"\0" * 100, filename="a.wav")
        path = "/openai/deployments/demo/audio/transcriptions"
        async with front.session.post(path, data=form) as response:
            assert response.status == 200, await response.text()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/openai/deployments/none/completions", 404),
        ("GET", "/openai/deployments/demo/completions", 405),
        ("POST", "/openai/deployments/demo/sleep", 404),
        ("POST", "/openai/deployments/demo/x/completions", 404),
        ("POST", "/openai/deployments//completions", 404),
        ("POST", "/openai/deployments/%ff/completions", 404),
    ],
)
async def test_there_is_nothing_else_below_it(front_of: Any, method: str, path: str, status: int) -> None:
    front: Front = await front_of(server=AZURE)
    async with front.session.request(method, path, json=ASK if method == "POST" else None) as response:
        assert response.status == status
        assert error_of(await response.read())["message"]


async def test_the_paths_are_an_option(front: Front) -> None:
    response, answer = await front.post("/openai/deployments/demo/chat/completions", CHAT)
    assert (response.status, error_of(answer)["code"]) == (404, "not_found")
