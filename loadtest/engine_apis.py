"""The load-test engine's other APIs for text: OpenAI's responses, Anthropic's messages."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from loadtest import engine_text as text
from loadtest.engine_wire import ApiError, answer, bad, begin_stream, event, object_of

if TYPE_CHECKING:
    from aiohttp import web

    from loadtest.engine_completions import Generation, Writer


class Responses:
    """`/v1/responses`; what was made is kept in memory, as vLLM keeps it with VLLM_ENABLE_RESPONSES_API_STORE."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.made: dict[str, dict[str, Any]] = {}
        self.working: dict[str, asyncio.Task[None]] = {}

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await object_of(request)
        given = body.get("input")
        if not given or not isinstance(given, str | list):
            raise bad("input must be a string or a list that is not empty", "input")
        earlier = body.get("previous_response_id")
        if earlier is not None and earlier not in self.made:
            raise ApiError(404, "NotFoundError", f"Response with id '{earlier}' not found.", "previous_response_id")
        prompt = orjson.dumps(
            [body.get("instructions"), given, self.made.get(earlier or "", {}).get("output")]
        ).decode()
        job = self.writer.generation(body, prompt, body.get("max_output_tokens"), "max_output_tokens")
        made = self.response(f"resp_{uuid.uuid4().hex}", body, job)
        self.made[made["id"]] = made
        if body.get("background"):
            self.working[made["id"]] = asyncio.create_task(self.work(made, job))
            return answer({**made, "status": "queued"})
        if job.stream:
            async with self.writer.at_work(job):
                return await self.stream(request, made, job)
        await self.work(made, job)
        return answer(made)

    def response(self, id_: str, body: dict[str, Any], job: Generation) -> dict[str, Any]:
        return {
            "id": id_, "object": "response", "created_at": job.created, "model": job.model, "status": "in_progress",
            "output": [], "error": None, "incomplete_details": None, "instructions": body.get("instructions"),
            "metadata": body.get("metadata"), "parallel_tool_calls": True, "temperature": body.get("temperature"),
            "top_p": body.get("top_p"), "tool_choice": "auto", "tools": [], "usage": None,
            "previous_response_id": body.get("previous_response_id"), "background": bool(body.get("background")),
        }  # fmt: skip

    async def work(self, made: dict[str, Any], job: Generation) -> None:
        async with self.writer.at_work(job):
            await self.writer.finish(job)
            self.complete(made, job)

    def complete(self, made: dict[str, Any], job: Generation) -> dict[str, Any]:
        tokens, reason = job.choices[0]
        usage = job.usage()
        made["output"] = [message := _message("".join(tokens), made["id"])]
        made["status"] = "completed" if reason == "stop" else "incomplete"
        made["incomplete_details"] = None if reason == "stop" else {"reason": "max_output_tokens"}
        made["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return message

    async def stream(self, request: web.Request, made: dict[str, Any], job: Generation) -> web.StreamResponse:
        response = await begin_stream(request)
        number = 0

        async def say(kind: str, **fields: Any) -> None:
            nonlocal number
            await response.write(event({"type": kind, "sequence_number": number, **fields}, kind))
            number += 1

        tokens, _ = job.choices[0]
        empty = _message("", made["id"])
        where = {"item_id": empty["id"], "output_index": 0, "content_index": 0}
        await say("response.created", response=made)
        await say("response.in_progress", response=made)
        await say("response.output_item.added", output_index=0, item={**empty, "status": "in_progress", "content": []})
        await say("response.content_part.added", **where, part=empty["content"][0])
        async for i in self.writer.pace(job):
            if i < len(tokens):
                await say("response.output_text.delta", **where, delta=tokens[i], logprobs=[])
        message = self.complete(made, job)
        await say("response.output_text.done", **where, text="".join(tokens), logprobs=[])
        await say("response.content_part.done", **where, part=message["content"][0])
        await say("response.output_item.done", output_index=0, item=message)
        await say(f"response.{made['status']}", response=made)
        await response.write_eof()
        return response

    def find(self, request: web.Request) -> dict[str, Any]:
        id_ = request.match_info["id"]
        if id_ not in self.made:
            raise ApiError(404, "NotFoundError", f"Response with id '{id_}' not found.", "response_id")
        return self.made[id_]

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        return answer(self.find(request))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        made = self.find(request)
        task = self.working.pop(made["id"], None)
        if task is None or task.done():
            raise bad("Cannot cancel a synchronous response.", "response_id")
        task.cancel()
        made["status"] = "cancelled"
        return answer(made)


def _message(content: str, response_id: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": content, "annotations": [], "logprobs": []}
    id_ = "msg_" + response_id.removeprefix("resp_")
    return {"id": id_, "type": "message", "role": "assistant", "status": "completed", "content": [part]}


class Messages:
    """Anthropic's `/v1/messages`."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await object_of(request)
        job = self.writer.generation(body, _conversation(body), body.get("max_tokens"), "max_tokens")
        async with self.writer.at_work(job):
            return await (self.stream(request, job) if job.stream else self.whole(job))

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        body = await object_of(request)
        self.writer.engine.check_model(body)
        return answer({"input_tokens": text.token_count(_conversation(body))})

    async def whole(self, job: Generation) -> web.Response:
        await self.writer.finish(job)
        tokens, reason = job.choices[0]
        said = {"content": [{"type": "text", "text": "".join(tokens)}], "stop_reason": _stop_reason(reason)}
        return answer({**_head(job), **said, "usage": _usage(job, len(tokens))})

    async def stream(self, request: web.Request, job: Generation) -> web.StreamResponse:
        response = await begin_stream(request)

        async def say(kind: str, **fields: Any) -> None:
            await response.write(event({"type": kind, **fields}, kind))

        tokens, reason = job.choices[0]
        await say("message_start", message={**_head(job), "content": [], "stop_reason": None, "usage": _usage(job, 0)})
        await say("content_block_start", index=0, content_block={"type": "text", "text": ""})
        async for i in self.writer.pace(job):
            if i < len(tokens):
                await say("content_block_delta", index=0, delta={"type": "text_delta", "text": tokens[i]})
        await say("content_block_stop", index=0)
        await say(
            "message_delta",
            delta={"stop_reason": _stop_reason(reason), "stop_sequence": None},
            usage=_usage(job, len(tokens)),
        )
        await say("message_stop")
        await response.write_eof()
        return response


def _conversation(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages must be a list that is not empty", "messages")
    return orjson.dumps([body.get("system"), messages]).decode()


def _head(job: Generation) -> dict[str, Any]:
    id_ = job.id.replace("chatcmpl-", "msg_")
    return {"id": id_, "type": "message", "role": "assistant", "model": job.model, "stop_sequence": None}


def _usage(job: Generation, output_tokens: int) -> dict[str, int]:
    return {"input_tokens": job.prompt_tokens, "output_tokens": output_tokens}


def _stop_reason(reason: str) -> str:
    return "end_turn" if reason == "stop" else "max_tokens"
