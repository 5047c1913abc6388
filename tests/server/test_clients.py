"""Clients of other makers, none of which may notice anything but the model's answers.

`openai` for Node, `anthropic`, LangChain, and `hey` as a public load generator. `openai` for Python is in
test_openai.py, vLLM's own `vllm bench serve` in vllm/test_bench_serve.py. What takes seconds to import is imported by
the tests themselves, so that only the worker that runs them waits for it.
"""

from __future__ import annotations

import asyncio
import functools
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import openai
import orjson
import pytest
from pydantic import SecretStr

from tests.server.test_http import until_engine
from tests.support import PATIENCE_S, ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import anthropic

    from tests.front import Front

CLIENTS = ROOT / "tests" / "clients"
HELLO: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Hello"}]


async def run(*command: str) -> str:
    """What a program prints. Fails with what it said when it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=CLIENTS, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


# --- openai for Node ---


@functools.cache
def why_no_node() -> str | None:
    """None where the package for Node is installed, or could be; else the reason to skip."""
    if shutil.which("node") is None:
        return "node is missing"
    if (CLIENTS / "node_modules" / "openai").is_dir():
        return None
    if shutil.which("npm") is None:
        return "npm is missing"
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--silent"]
    done = subprocess.run(command, cwd=CLIENTS, check=False, capture_output=True, text=True, timeout=100)
    return None if done.returncode == 0 else f"npm could not install the openai package: {done.stderr.strip()[-200:]}"


async def test_openai_for_node(front: Front) -> None:
    if (reason := await asyncio.to_thread(why_no_node)) is not None:
        pytest.skip(reason)
    seen = orjson.loads(await run("node", "openai.mjs", front.url))
    assert seen["models"] == [["demo", "stopped"]]
    assert seen["streamed"] == seen["chat"] != ""
    assert seen["usage"] == seen["wholeUsage"]
    assert seen["completion"]
    assert len(set(seen["requestId"])) == 1
    assert seen["dimensions"] == [64, 64]
    assert seen["responseStreamed"] == seen["response"] == seen["again"] != ""
    assert seen["events"][0] == "response.created"
    assert seen["events"][-1] in {"response.completed", "response.incomplete"}
    assert seen["heard"]
    assert (seen["missing"]["name"], seen["missing"]["code"]) == ("NotFoundError", "model_not_found")
    assert seen["bad"]["name"] == "BadRequestError"
    assert seen["broken"] is not None, "a truncated stream is an error"
    await until_engine(front, running=0)


# --- anthropic ---


@pytest.fixture
async def claude(front: Front) -> AsyncIterator[anthropic.AsyncAnthropic]:
    import anthropic

    async with anthropic.AsyncAnthropic(base_url=front.url, api_key="none", max_retries=0) as client:
        yield client


async def test_anthropic_messages_and_streams(claude: anthropic.AsyncAnthropic) -> None:
    whole = await claude.messages.create(
        model="demo", messages=HELLO, max_tokens=12, system="Brief.", extra_body={"temperature": 0}
    )
    assert (whole.role, whole.model) == ("assistant", "demo")
    block = whole.content[0]
    assert block.type == "text"
    async with claude.messages.stream(
        model="demo", messages=HELLO, max_tokens=12, system="Brief.", extra_body={"temperature": 0}
    ) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == block.text
    assert (final.usage.output_tokens, final.stop_reason) == (whole.usage.output_tokens, whole.stop_reason)
    count = await claude.messages.count_tokens(model="demo", messages=HELLO)
    assert count.input_tokens > 0


async def test_anthropic_errors(front_of: Any, tmp_path: Path) -> None:
    import anthropic

    marker = tmp_path / "fail"
    marker.touch()
    front: Front = await front_of("--fail-file", str(marker), "--load-seconds", "1", server={"heartbeat": "100ms"})
    async with anthropic.AsyncAnthropic(base_url=front.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="other", messages=HELLO, max_tokens=8)
        with pytest.raises(anthropic.APIStatusError, match="wake_failed"):
            async with client.messages.stream(model="demo", messages=HELLO, max_tokens=8) as stream:
                await stream.get_final_text()
        with pytest.raises(anthropic.InternalServerError):
            await client.messages.create(model="demo", messages=HELLO, max_tokens=8)
        marker.unlink()
        front.pool.undrain("demo")  # else nothing is started for a while
        async with client.messages.stream(model="demo", messages=HELLO, max_tokens=8) as stream:
            assert await stream.get_final_text(), "comments are not events"


# --- LangChain ---


async def test_langchain(front: Front) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    with openai.DefaultHttpxClient() as blocking:
        async with openai.DefaultAsyncHttpxClient() as http:
            chat = ChatOpenAI(
                model="demo", base_url=f"{front.url}/v1", api_key=SecretStr("none"), max_retries=0, temperature=0,
                max_completion_tokens=12, stream_usage=True, http_async_client=http, http_client=blocking,
            )  # fmt: skip
            whole = await chat.ainvoke([HumanMessage("Hello")])
            assert whole.content
            pieces = [chunk async for chunk in chat.astream([HumanMessage("Hello")])]
            assert "".join(str(piece.content) for piece in pieces) == whole.content
            assert [p.usage_metadata for p in pieces if p.usage_metadata] == [whole.usage_metadata]
            batch = await chat.abatch([[HumanMessage("Hello")]] * 4)
            assert {message.content for message in batch} == {whole.content}
            assert (await asyncio.to_thread(chat.invoke, "Hello")).content == whole.content
            embeddings = OpenAIEmbeddings(
                model="demo", openai_api_base=f"{front.url}/v1", openai_api_key=SecretStr("none"),
                check_embedding_ctx_length=False, http_async_client=http, http_client=blocking,
            )  # fmt: skip
            assert [len(v) for v in await embeddings.aembed_documents(["a", "b"])] == [64, 64]


# --- a load generator ---


async def test_hey(front: Front, tmp_path: Path) -> None:
    """Go's HTTP client, with kept connections; all requests come while the engine is not even started."""
    if shutil.which("hey") is None:
        pytest.skip("hey is missing (a package of Debian)")
    body = tmp_path / "body.json"
    body.write_bytes(orjson.dumps({"model": "demo", "prompt": "Hello", "max_tokens": 4, "temperature": 0}))
    out = await run(
        "hey", "-n", "400", "-c", "40", "-m", "POST", "-T", "application/json", "-D", str(body),
        f"{front.url}/v1/completions",
    )  # fmt: skip
    assert re.findall(r"\[(\d+)\]\s+(\d+) responses", out) == [("200", "400")], out
    assert "Error distribution" not in out
    assert (await front.engine_state())["loads"] == 1
