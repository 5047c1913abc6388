"""The official `openai` package as a client: it must not notice anything but the model's answers."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.front import Front


@pytest.fixture
async def client(front: Front) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def blocking(front: Front) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


async def test_chat_streaming_gives_the_same_text_and_usage(client: openai.AsyncOpenAI) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
    whole = await client.chat.completions.create(model="demo", messages=messages, max_tokens=20, temperature=0)
    stream = await client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage == whole.usage


async def test_completions_and_streaming(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="demo", prompt="Hello", max_tokens=8, temperature=0)
    stream = await client.completions.create(model="demo", prompt="Hello", max_tokens=8, temperature=0, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model="demo", input=["a", "b"])
    assert [item.index for item in answer.data] == [0, 1]
    floats = await client.embeddings.create(model="demo", input="a", encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(answer.data[0].embedding, rel=1e-6)


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["demo"]
    assert (await client.models.retrieve("demo")).owned_by == "warmpool"


async def test_errors_are_the_classes_that_clients_expect(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="Hello")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="demo", prompt="Hello", max_tokens=-1)
    assert "max_tokens" in bad.value.message
    with pytest.raises(openai.NotFoundError) as route:
        await client.images.generate(prompt="x")
    assert route.value.code == "not_found"


async def test_rate_limit_and_unavailable(front: Front) -> None:
    model = front.pool._state.models["demo"]
    model.settings = model.settings.model_copy(update={"max_queue": 0})
    async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model="demo", prompt="Hello")
        assert int(full.value.response.headers["Retry-After"]) >= 1
        front.pool.drain()
        with pytest.raises(openai.InternalServerError) as draining:
            await client.completions.create(model="demo", prompt="Hello")
        assert draining.value.status_code == 503
        assert draining.value.code == "draining"


async def test_a_broken_stream_is_an_error_and_not_an_end(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="demo",
        prompt="Hello",
        max_tokens=100,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": {"fault": "die_mid_stream"}},
    )
    received = 0
    with pytest.raises(openai.APIConnectionError):
        async for _ in stream:
            received += 1
    assert received >= 1
    await client.completions.create(model="demo", prompt="Hello", max_tokens=4)


async def test_the_blocking_client(blocking: openai.OpenAI) -> None:
    def use() -> None:
        whole = blocking.completions.create(model="demo", prompt="Hello", max_tokens=8, temperature=0)
        stream = blocking.completions.create(model="demo", prompt="Hello", max_tokens=8, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        assert [model.id for model in blocking.models.list()] == ["demo"]
        with pytest.raises(openai.NotFoundError):
            blocking.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])

    await asyncio.to_thread(use)


async def test_responses_streaming_and_by_id(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="demo", input="Hello", max_output_tokens=12, temperature=0)
    assert made.output_text
    assert (await client.responses.retrieve(made.id)).output_text == made.output_text
    text = ""
    stream = await client.responses.create(
        model="demo", input="Hello", max_output_tokens=12, temperature=0, stream=True
    )
    async for event in stream:
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == made.output_text
    async with client.responses.stream(model="demo", input="Hello", max_output_tokens=12, temperature=0) as helper:
        kinds = [event.type async for event in helper]
    assert kinds[0] == "response.created"


async def test_audio(client: openai.AsyncOpenAI) -> None:
    sound = b"\r\n--sound\r\n" * 10_000
    heard = await client.audio.transcriptions.create(model="demo", file=("a.wav", sound))
    assert heard.text == (await client.audio.transcriptions.create(model="demo", file=("a.wav", sound))).text != ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer packages call translations deprecated
        translated = await client.audio.translations.create(model="demo", file=("a.wav", sound))
    assert translated.text not in {"", heard.text}


async def test_realtime(client: openai.AsyncOpenAI) -> None:
    async with client.realtime.connect(model="demo") as connection:
        assert (await connection.recv()).type == "session.created"
        await connection.send({"type": "session.update", "model": "demo"})  # type: ignore[arg-type]
        await connection.input_audio_buffer.append(audio="AAAA")
        await connection.input_audio_buffer.commit()
        kinds = []
        while "transcription.done" not in kinds:
            kinds.append(str((await connection.recv()).type))
        assert set(kinds) == {"transcription.delta", "transcription.done"}


async def test_a_model_says_its_tier(client: openai.AsyncOpenAI) -> None:
    [model] = [model async for model in client.models.list()]
    assert model.model_extra is not None
    assert model.model_extra["tier"] == "stopped"
    assert model.model_extra["expected_wait_s"] > 0
