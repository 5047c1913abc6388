"""The load-test engine's text: completions and chat completions, whole and streamed, and its faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from loadtest import engine_text as text
from loadtest.engine_wire import ApiError, answer, bad, begin_stream, body_of, event, object_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loadtest.engine import Engine

FAULTS: Final = (
    "refuse", "hang", "hang_engine", "hang_mid_stream", "hold_mid_stream", "die_mid_stream", "garbage_http",
    "garbage_json", "error", "fail_resume",
)  # fmt: skip

PROMPT_BUCKETS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

NOT_OF_REQUESTS: Final = frozenset({"fail_resume"})


@dataclass(frozen=True, slots=True)
class Generation:
    """One request for text, checked: what to say and how to wrap it."""

    id: str
    model: str
    created: int
    chat: bool
    stream: bool
    include_usage: bool
    prompt_tokens: int
    choices: list[tuple[list[str], str]]
    fault: dict[str, Any] | None

    def usage(self) -> dict[str, int]:
        completion = sum(len(tokens) for tokens, _ in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion,
            "completion_tokens": completion,
        }

    @property
    def longest(self) -> int:
        """How many tokens the longest choice has, at least 1."""
        return max(len(tokens) for tokens, _ in self.choices) or 1


class Writer:
    """Makes text at the engine's pace, as many requests at once as it has slots."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.options = engine.options
        self.counters = engine.counters

    def parse(self, body: dict[str, Any], *, chat: bool) -> Generation:
        """A Generation, or ApiError as vLLM would answer it."""
        prompt = prompt_of(body, chat=chat)
        limit = body.get("max_completion_tokens") if chat else None
        if limit is None:
            limit = body.get("max_tokens")
        return self.generation(body, prompt, limit, "max_tokens", chat=chat)

    def generation(
        self, body: dict[str, Any], prompt: str, limit: Any, limit_name: str, *, chat: bool = True
    ) -> Generation:
        """What to say to a prompt, with the parameters that all APIs share."""
        model = self.engine.check_model(body)
        prompt_tokens = text.token_count(prompt)
        room = self.options.max_model_len - prompt_tokens
        if limit is None:
            limit = room if chat else 16
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise bad(f"{limit_name} must be at least 1", limit_name)
        if limit > room:
            raise bad(
                f"This model's maximum context length is {self.options.max_model_len} tokens. However, you requested "
                f"{limit} output tokens and your prompt contains {prompt_tokens} input tokens.",
                limit_name,
            )
        n = body.get("n") or 1
        if not isinstance(n, int) or not 1 <= n <= 128:
            raise bad("n must be between 1 and 128", "n")
        options = body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            raise bad("stream_options must be an object", "stream_options")
        return Generation(
            id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            model=model,
            created=int(time.time()),
            chat=chat,
            stream=bool(body.get("stream")),
            include_usage=bool(options and options.get("include_usage")),
            prompt_tokens=prompt_tokens,
            choices=[self.choice(body, prompt, index, limit) for index in range(n)],
            fault=self.fault_for(body),
        )

    def choice(self, body: dict[str, Any], prompt: str, index: int, limit: int) -> tuple[list[str], str]:
        temperature = body.get("temperature", 1.0)
        seed = body.get("seed")
        parts: list[str | bytes] = [self.engine.models[0], prompt]
        if temperature != 0:
            parts.append(self.engine.draw() if seed is None else str(seed))
            parts.append(str(index))
        if not self.engine.weights_valid:
            parts.append("these weights are not the model's")
        stops = body.get("stop") or []
        tokens, reason = text.generate(parts, limit, ignore_eos=bool(body.get("ignore_eos")))
        return text.cut_at_stop(tokens, reason, [stops] if isinstance(stops, str) else stops)

    def fault_for(self, body: dict[str, Any]) -> dict[str, Any] | None:
        if not self.options.faults:
            return None
        extra = body.get("vllm_xargs")
        if isinstance(extra, dict) and "fault" in extra:
            return _check_fault({"kind": extra["fault"], **extra})
        fault = next((fault for fault in self.counters.faults if fault["kind"] not in NOT_OF_REQUESTS), None)
        if fault is not None:
            self.counters.faults.remove(fault)
        return fault

    @contextlib.asynccontextmanager
    async def at_work(self, job: Generation) -> AsyncIterator[None]:
        """A slot for a request, counted: served when it comes to its end, else aborted."""
        counters = self.counters
        finished = False
        for file in self.engine.scratch:
            file.write(job.id.encode())
        counters.waiting += 1
        try:
            async with self.engine.slots:
                counters.waiting -= 1
                counters.running += 1
                try:
                    yield
                    finished = True
                finally:
                    counters.running -= 1
                    counters.waiting += 1  # undone below, whichever way it ends
        finally:
            counters.waiting -= 1
            if finished:
                counters.served += 1
            else:
                counters.aborted += 1

    async def pace(self, job: Generation) -> AsyncIterator[int]:
        """Token numbers, each at its moment and counted then: the first after the time to first token, no drift."""
        loop = asyncio.get_running_loop()
        first = loop.time() + self.options.ttft
        step = 1.0 / self.options.tokens_per_second
        for i in range(job.longest):
            delay = first + i * step - loop.time()
            await asyncio.sleep(max(0, delay))
            await self.engine.thaws.wait()
            if not self.engine.unpaused.is_set():
                began = loop.time()
                await self.engine.unpaused.wait()
                first += loop.time() - began
                if not self.engine.cache_valid:
                    raise RuntimeError("what this request relies on was lost in a pause")
            if i == 0:
                self.counters.prompt_tokens += job.prompt_tokens
                self.counters.prompts_up_to[bisect_left(PROMPT_BUCKETS, job.prompt_tokens)] += 1
            self.counters.generation_tokens += sum(i < len(tokens) for tokens, _ in job.choices)
            yield i

    async def finish(self, job: Generation) -> None:
        """Take the time that the whole text takes."""
        async for _ in self.pace(job):
            pass


class Completions:
    """OpenAI's completions and chat completions."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.counters = writer.counters
        self.released = asyncio.Event()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """`/v1/completions`, `/v1/chat/completions`, and `/invocations` for both."""
        body = await object_of(request)
        chat = "messages" in body if request.path == "/invocations" else request.path == "/v1/chat/completions"
        job = self.writer.parse(body, chat=chat)
        if job.fault is not None and (odd := await self.misbehave(request, job.fault)) is not None:
            return odd
        async with self.writer.at_work(job):
            return await (self.stream(request, job) if job.stream else self.whole(job))

    async def batch(self, request: web.Request) -> web.StreamResponse:
        """`/v1/chat/completions/batch`: a list of conversations, a choice for each."""
        body = await object_of(request)
        conversations = body.get("messages")
        if not isinstance(conversations, list) or not conversations:
            raise bad("messages must be a list of conversations that is not empty", "messages")
        jobs = [self.writer.parse({**body, "messages": m, "n": 1}, chat=True) for m in conversations]
        job = jobs[0]
        job.choices[:] = [choice for each in jobs for choice in each.choices]
        async with self.writer.at_work(job):
            return await self.whole(job)

    async def render(self, request: web.Request) -> web.StreamResponse:
        """`/render`: the tokens that a request would be made of."""
        chat = request.path.startswith(("/v1/chat", "/v1/messages"))
        job_body = await object_of(request)
        model = self.writer.engine.check_model(job_body)
        if request.path.startswith("/v1/responses"):
            job_body["prompt"] = job_body.get("input")
        tokens = text.tokenize(prompt_of(job_body, chat=chat))
        return answer({"model": model, "token_ids": tokens, "sampling_params": {}})

    async def whole(self, job: Generation) -> web.Response:
        await self.writer.finish(job)
        choices = []
        for index, (tokens, reason) in enumerate(job.choices):
            content = "".join(tokens)
            said = {"message": {"role": "assistant", "content": content}} if job.chat else {"text": content}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason, "stop_reason": None})
        kind = "chat.completion" if job.chat else "text_completion"
        head = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
        return answer({**head, "choices": choices, "usage": job.usage()})

    async def stream(self, request: web.Request, job: Generation) -> web.StreamResponse:
        response = await begin_stream(request)
        kind = "chat.completion.chunk" if job.chat else "text_completion"
        head = {"id": job.id, "object": kind, "created": job.created, "model": job.model}

        def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return event({**head, "choices": choices, **more})

        def piece(index: int, content: str, reason: str | None, role: str | None = None) -> dict[str, Any]:
            if not job.chat:
                said: dict[str, Any] = {"text": content}
            elif role is not None:
                said = {"delta": {"role": role, "content": content}}
            else:
                said = {"delta": {"content": content}}
            return {"index": index, **said, "logprobs": None, "finish_reason": reason}

        dies_after = int(job.fault.get("after_tokens", 3)) if job.fault is not None else -1
        async for i in self.writer.pace(job):
            if i == 0 and job.chat:
                for index in range(len(job.choices)):
                    await response.write(chunk([piece(index, "", None, "assistant")]))
            if i == dies_after and job.fault is not None:
                await self.misbehave_within(job.fault["kind"])
            for index, (tokens, reason) in enumerate(job.choices):
                if i < max(1, len(tokens)):
                    last = i >= len(tokens) - 1
                    content = tokens[i] if tokens else ""
                    await response.write(chunk([piece(index, content, reason if last else None)]))
        if job.include_usage:
            await response.write(chunk([], usage=job.usage()))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    # --- faults ---

    async def misbehave(self, request: web.Request, fault: dict[str, Any]) -> web.StreamResponse | None:
        """The answer of a fault that comes before any token; None for those that come later."""
        transport = request.transport
        match fault["kind"]:
            case "refuse" if transport is not None:
                transport.abort()
                return web.Response()
            case "hang" | "hang_engine":
                if fault["kind"] == "hang_engine":
                    self.writer.engine.thaws.clear()
                self.counters.running += 1
                try:
                    await asyncio.Event().wait()
                finally:
                    self.counters.running -= 1
                    self.counters.aborted += 1
            case "garbage_http" if transport is not None:
                transport.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
                transport.close()
                return web.Response()
            case "garbage_json":
                return web.Response(body=b'{"id": "cmpl-broken", "choices": [', content_type="application/json")
            case "error":
                raise ApiError(500, "InternalServerError", "told to fail")
        return None

    async def misbehave_within(self, kind: str) -> None:
        if kind == "die_mid_stream":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        if kind == "hang_mid_stream":
            await asyncio.Event().wait()
        if kind == "hold_mid_stream":
            self.released.clear()
            await self.released.wait()

    async def release(self, _: web.Request) -> web.StreamResponse:
        """`POST /debug/release`: streams that are held go on."""
        self.released.set()
        return web.Response(status=204)

    async def arm_fault(self, request: web.Request) -> web.StreamResponse:
        """`POST /debug/fault {"kind": …, "count": 1, "after_tokens": 3}`: the next completions misbehave."""
        fault = _check_fault(await body_of(request))
        self.counters.faults.extend([fault] * int(fault.get("count", 1)))
        return answer({"armed": len(self.counters.faults)})


def prompt_of(body: dict[str, Any], *, chat: bool) -> str:
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise bad("messages must be a list that is not empty", "messages")
        return orjson.dumps(messages).decode()
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(t, int) for t in prompt):
        try:
            return text.detokenize(prompt)
        except ValueError as error:
            raise bad(str(error), "prompt") from error
    if not isinstance(prompt, str):
        raise bad("prompt must be a string or a list of token ids", "prompt")
    return prompt


def _check_fault(fault: Any) -> dict[str, Any]:
    if not isinstance(fault, dict) or fault.get("kind") not in FAULTS:
        raise bad(f"kind must be one of {', '.join(FAULTS)}")
    for name in ("count", "after_tokens"):
        if not isinstance(fault.get(name, 1), int) or fault.get(name, 1) < 0:
            raise bad(f"{name} must be a number from 0 up")
    return fault
