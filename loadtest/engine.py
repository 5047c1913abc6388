"""An engine for development and load tests: from outside it behaves like vLLM, inside it only keeps time.

``python -m loadtest.engine --port 8000``. Needs aiohttp and orjson and nothing else of this project, so that it fits
into a small container image. The protocol follows vLLM 0.20 (vllm/entrypoints/openai and vllm/entrypoints/serve); where
vLLM answers an error, so does this, in the same envelope. It runs on plain asyncio: uvloop opens an io_uring, which
cannot be checkpointed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from loadtest import engine_text as text
from loadtest.engine_weights import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CHUNK_BYTES = 8 << 20
EMBEDDING_DIMENSIONS = 64
FAULTS: Final = ("refuse", "hang", "hang_mid_stream", "die_mid_stream", "garbage_http", "garbage_json", "error")

_CHILD = """
import os, sys
memory = [os.urandom(1 << 20) for _ in range(int(sys.argv[1]) >> 20)]
os.write(1, b"ready\\n")
os.read(0, 1)  # returns when the parent is gone
"""


class ApiError(Exception):
    """An answer in vLLM's error envelope."""

    def __init__(self, status: int, type_: str, message: str, param: str | None = None) -> None:
        self.status, self.type, self.message, self.param = status, type_, message, param
        super().__init__(message)

    def response(self) -> web.Response:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return _json({"error": error}, self.status)


def _bad(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "BadRequestError", message, param)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


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


@dataclass(slots=True)
class Counters:
    """What is remembered in memory only: it survives a checkpoint, not a restart."""

    served: int = 0
    aborted: int = 0
    running: int = 0
    waiting: int = 0
    loads: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    last_request_id: str | None = None
    faults: list[dict[str, Any]] = field(default_factory=list)


class Engine:
    """The engine's state and its routes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.models: list[str] = options.model or ["demo"]
        self.boot_id = uuid.uuid4().hex
        self.started_at = time.time()
        self.counters = Counters()
        self.loaded = False
        self.sleep_level = 0
        self.weights_valid = True
        self.worker = Worker(options.worker_extension_cls) if options.worker_extension_cls else None
        self.memory: list[bytes] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.scratch = [path.open("wb", buffering=0) for path in options.scratch]
        self.slots = asyncio.Semaphore(options.max_num_seqs)
        self.failed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    # --- loading ---

    async def load(self) -> None:
        """Fill the memory over the configured time, start the children, then be healthy."""
        options = self.options
        if options.hang_start:
            return
        ends = time.monotonic() + options.load_seconds
        if options.fail_start or (options.fail_file is not None and options.fail_file.exists()):
            await asyncio.sleep(options.load_seconds / 2)
            log("cannot load: told to fail")
            self.exit(3)
            return
        await self.fill()
        await self.start_children()
        await asyncio.sleep(max(0.0, ends - time.monotonic()))
        self.counters.loads += 1
        self.loaded = True
        log(f"loaded {', '.join(self.models)}: {options.memory} bytes, {options.processes} processes")

    async def fill(self) -> None:
        own = self.options.memory // self.options.processes
        while (missing := own - sum(map(len, self.memory))) > 0:
            self.memory.append(os.urandom(min(CHUNK_BYTES, missing)))
            await asyncio.sleep(0)

    async def start_children(self) -> None:
        """Further processes of the tree, as vLLM has an API server and its EngineCore."""
        share = self.options.memory // self.options.processes
        for _ in range(self.options.processes - 1):
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD, str(share)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self.children.append(child)
        for child in self.children:
            assert child.stdout is not None
            while child.poll() is None and not await asyncio.to_thread(child.stdout.readline):
                pass
        if self.children:
            asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self.child_ended)

    def child_ended(self) -> None:
        if any(child.poll() is not None for child in self.children):
            log("a child process ended")
            self.exit(4)

    def exit(self, status: int) -> None:
        if not self.failed.done():
            self.failed.set_result(status)

    # --- text ---

    def parse(self, body: Any, *, chat: bool) -> Generation:
        """A Generation, or ApiError as vLLM would answer it."""
        if not isinstance(body, dict):
            raise _bad("the body must be a JSON object")
        model = self.check_model(body)
        prompt = _prompt_of(body, chat=chat)
        prompt_tokens = text.token_count(prompt)
        room = self.options.max_model_len - prompt_tokens
        limit = body.get("max_completion_tokens") if chat else None
        if limit is None:
            limit = body.get("max_tokens")
        if limit is None:
            limit = room if chat else 16
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise _bad("max_tokens must be at least 1", "max_tokens")
        if limit > room:
            raise _bad(
                f"This model's maximum context length is {self.options.max_model_len} tokens. However, you requested "
                f"{limit} output tokens and your prompt contains {prompt_tokens} input tokens.",
                "max_tokens",
            )
        n = body.get("n") or 1
        if not isinstance(n, int) or not 1 <= n <= 128:
            raise _bad("n must be between 1 and 128", "n")
        options = body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            raise _bad("stream_options must be an object", "stream_options")
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

    def check_model(self, body: dict[str, Any]) -> str:
        model = body.get("model") or self.models[0]
        if model not in self.models:
            raise ApiError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")
        return str(model)

    def choice(self, body: dict[str, Any], prompt: str, index: int, limit: int) -> tuple[list[str], str]:
        temperature = body.get("temperature", 1.0)
        seed = body.get("seed")
        parts: list[str | bytes] = [self.models[0], prompt]
        if temperature != 0:
            parts.append(os.urandom(16) if seed is None else str(seed))
            parts.append(str(index))
        if not self.weights_valid:
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
        return self.counters.faults.pop(0) if self.counters.faults else None

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """`/v1/completions` and `/v1/chat/completions`."""
        chat = request.path == "/v1/chat/completions"
        job = self.parse(await _body(request), chat=chat)
        if job.fault is not None and (answer := await self.misbehave(request, job.fault)) is not None:
            return answer
        counters = self.counters
        finished = False
        for file in self.scratch:
            file.write(job.id.encode())
        counters.waiting += 1
        try:
            async with self.slots:
                counters.waiting -= 1
                counters.running += 1
                try:
                    response = await (self.stream(request, job) if job.stream else self.whole(job))
                    finished = True
                finally:
                    counters.running -= 1
                    counters.waiting += 1  # undone below, whichever way it ends
        finally:
            counters.waiting -= 1
            if finished:
                counters.served += 1
                counters.prompt_tokens += job.prompt_tokens
                counters.generation_tokens += job.usage()["completion_tokens"]
            else:
                counters.aborted += 1
        return response

    async def pace(self, count: int) -> AsyncIterator[int]:
        """Token numbers, each at its moment: the first after the time to first token, no drift after it."""
        loop = asyncio.get_running_loop()
        first = loop.time() + self.options.ttft
        step = 1.0 / self.options.tokens_per_second
        for i in range(count):
            delay = first + i * step - loop.time()
            await asyncio.sleep(max(0, delay))
            yield i

    async def whole(self, job: Generation) -> web.Response:
        async for _ in self.pace(max(len(tokens) for tokens, _ in job.choices) or 1):
            pass
        choices = []
        for index, (tokens, reason) in enumerate(job.choices):
            content = "".join(tokens)
            said = {"message": {"role": "assistant", "content": content}} if job.chat else {"text": content}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason, "stop_reason": None})
        kind = "chat.completion" if job.chat else "text_completion"
        head = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
        return _json({**head, "choices": choices, "usage": job.usage()})

    async def stream(self, request: web.Request, job: Generation) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        kind = "chat.completion.chunk" if job.chat else "text_completion"
        head = {"id": job.id, "object": kind, "created": job.created, "model": job.model}

        def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return b"data: " + orjson.dumps({**head, "choices": choices, **more}) + b"\n\n"

        def piece(index: int, content: str, reason: str | None, role: str | None = None) -> dict[str, Any]:
            if not job.chat:
                said: dict[str, Any] = {"text": content}
            elif role is not None:
                said = {"delta": {"role": role, "content": content}}
            else:
                said = {"delta": {"content": content}}
            return {"index": index, **said, "logprobs": None, "finish_reason": reason}

        longest = max(len(tokens) for tokens, _ in job.choices) or 1
        dies_after = int(job.fault.get("after_tokens", 3)) if job.fault is not None else -1
        async for i in self.pace(longest):
            if i == 0 and job.chat:
                for index in range(len(job.choices)):
                    await response.write(event([piece(index, "", None, "assistant")]))
            if i == dies_after and job.fault is not None:
                await self.die_or_hang(job.fault["kind"])
            for index, (tokens, reason) in enumerate(job.choices):
                if i < max(1, len(tokens)):
                    last = i >= len(tokens) - 1
                    content = tokens[i] if tokens else ""
                    await response.write(event([piece(index, content, reason if last else None)]))
        if job.include_usage:
            await response.write(event([], usage=job.usage()))
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
            case "hang":
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

    async def die_or_hang(self, kind: str) -> None:
        if kind == "die_mid_stream":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        if kind == "hang_mid_stream":
            await asyncio.Event().wait()

    async def arm_fault(self, request: web.Request) -> web.StreamResponse:
        """`POST /debug/fault {"kind": …, "count": 1, "after_tokens": 3}`: the next completions misbehave."""
        fault = _check_fault(await _body(request))
        self.counters.faults.extend([fault] * int(fault.get("count", 1)))
        return _json({"armed": len(self.counters.faults)})

    # --- other routes ---

    async def health(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if self.loaded else 503)

    async def list_models(self, _: web.Request) -> web.StreamResponse:
        length, created = self.options.max_model_len, int(self.started_at)
        data = [
            {"id": m, "object": "model", "created": created, "owned_by": "vllm", "root": m, "max_model_len": length}
            for m in self.models
        ]
        return _json({"object": "list", "data": data})

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        if not isinstance(body, dict):
            raise _bad("the body must be a JSON object")
        model = self.check_model(body)
        given = body.get("input")
        inputs = [given] if isinstance(given, str) else given
        if not isinstance(inputs, list) or not inputs or not all(isinstance(i, str) for i in inputs):
            raise _bad("input must be a string or a list of strings", "input")
        vectors = [text.embed(model, i, EMBEDDING_DIMENSIONS) for i in inputs]
        packed = body.get("encoding_format") == "base64"
        data = [
            {"index": i, "object": "embedding", "embedding": text.pack_embedding(v) if packed else v}
            for i, v in enumerate(vectors)
        ]
        tokens = sum(text.token_count(i) for i in inputs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        self.counters.served += 1
        head = {"id": "embd-" + uuid.uuid4().hex, "object": "list", "created": int(time.time()), "model": model}
        return _json({**head, "data": data, "usage": usage})

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        if not isinstance(body, dict):
            raise _bad("the body must be a JSON object")
        self.check_model(body)
        tokens = text.tokenize(_prompt_of(body, chat="messages" in body))
        return _json(
            {"count": len(tokens), "max_model_len": self.options.max_model_len, "tokens": tokens, "token_strs": None}
        )

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        if not isinstance(body, dict):
            raise _bad("the body must be a JSON object")
        self.check_model(body)
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens):
            raise _bad("tokens must be a list of integers", "tokens")
        try:
            return _json({"prompt": text.detokenize(tokens)})
        except ValueError as error:
            raise _bad(str(error), "tokens") from error

    async def metrics(self, _: web.Request) -> web.StreamResponse:
        c = self.counters
        label = f'{{model_name="{self.models[0]}"}}'
        lines = []
        for name, kind, value in (
            ("vllm:num_requests_running", "gauge", c.running),
            ("vllm:num_requests_waiting", "gauge", c.waiting),
            ("vllm:request_success_total", "counter", c.served),
            ("vllm:prompt_tokens_total", "counter", c.prompt_tokens),
            ("vllm:generation_tokens_total", "counter", c.generation_tokens),
            ("loadtest:requests_aborted_total", "counter", c.aborted),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name}{label} {value}"]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    async def version(self, _: web.Request) -> web.StreamResponse:
        return _json({"version": "0.0.0+loadtest"})

    async def state(self, _: web.Request) -> web.StreamResponse:
        c = self.counters
        return _json(
            {
                "boot_id": self.boot_id, "pid": os.getpid(), "started_at": self.started_at, "served": c.served,
                "aborted": c.aborted, "running": c.running, "waiting": c.waiting, "loads": c.loads,
                "sleep_level": self.sleep_level, "memory_bytes": sum(map(len, self.memory)),
                "children": [child.pid for child in self.children], "last_request_id": c.last_request_id,
            }
        )  # fmt: skip

    # --- sleep mode ---

    async def sleep(self, request: web.Request) -> web.StreamResponse:
        level = request.query.get("level", "1")
        if level not in {"1", "2"}:
            raise _bad("level must be 1 or 2")
        self.sleep_level = int(level)
        if level == "2":
            self.memory.clear()
            self.weights_valid = False
            if self.worker is not None:
                self.worker.lose()
        return web.Response()

    async def wake_up(self, request: web.Request) -> web.StreamResponse:
        tags = request.query.getall("tags", [])
        if set(tags) - {"weights", "kv_cache"}:
            raise _bad("tags are weights and kv_cache")
        if not tags or "kv_cache" in tags:
            self.sleep_level = 0
        return web.Response()

    async def is_sleeping(self, _: web.Request) -> web.StreamResponse:
        return _json({"is_sleeping": self.sleep_level > 0})

    async def collective_rpc(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        method = body.get("method") if isinstance(body, dict) else None
        if self.worker is not None and isinstance(method, str) and method != "reload_weights":
            try:
                result = await asyncio.to_thread(self.worker.call, method)
            except AttributeError as error:
                raise _bad(str(error)) from error
            self.weights_valid = self.worker.valid()
            return _json({"results": [result]})
        if method != "reload_weights":
            raise _bad("the only method here is reload_weights")
        await self.fill()
        if self.worker is not None:
            self.worker.load()
        self.weights_valid = True
        self.counters.loads += 1
        return _json({"results": [None]})

    def application(self) -> web.Application:
        """The routes, those of sleep mode and faults only where they are switched on."""
        app = web.Application(middlewares=[self.guard], client_max_size=64 << 20)
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/health", self.health),
            ("GET", "/version", self.version),
            ("GET", "/metrics", self.metrics),
            ("GET", "/debug/state", self.state),
            ("GET", "/v1/models", self.list_models),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.completions),
            ("POST", "/v1/embeddings", self.embeddings),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
        ]
        if self.options.sleep_mode:
            routes += [
                ("POST", "/sleep", self.sleep),
                ("POST", "/wake_up", self.wake_up),
                ("GET", "/is_sleeping", self.is_sleeping),
                ("POST", "/collective_rpc", self.collective_rpc),
            ]
        if self.options.faults:
            routes.append(("POST", "/debug/fault", self.arm_fault))
        for method, path, handler in routes:
            app.router.add_route(method, path, handler)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            needs_model = request.path.startswith("/v1/") or request.path in {"/tokenize", "/detokenize"}
            if needs_model and not self.loaded:
                raise ApiError(503, "ServiceUnavailableError", "the model is still loading")
            if needs_model and request.method == "POST" and self.sleep_level:
                raise ApiError(503, "ServiceUnavailableError", "the engine is sleeping")
            if needs_model:
                self.counters.last_request_id = request.headers.get("X-Request-Id")
            return await handler(request)
        except ApiError as error:
            return error.response()


async def _body(request: web.Request) -> Any:
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise _bad(f"the body is not JSON: {error}") from error


def _prompt_of(body: dict[str, Any], *, chat: bool) -> str:
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _bad("messages must be a list that is not empty", "messages")
        return orjson.dumps(messages).decode()
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(t, int) for t in prompt):
        try:
            return text.detokenize(prompt)
        except ValueError as error:
            raise _bad(str(error), "prompt") from error
    if not isinstance(prompt, str):
        raise _bad("prompt must be a string or a list of token ids", "prompt")
    return prompt


def _check_fault(fault: Any) -> dict[str, Any]:
    if not isinstance(fault, dict) or fault.get("kind") not in FAULTS:
        raise _bad(f"kind must be one of {', '.join(FAULTS)}")
    for name in ("count", "after_tokens"):
        if not isinstance(fault.get(name, 1), int) or fault.get(name, 1) < 0:
            raise _bad(f"{name} must be a number from 0 up")
    return fault


def log(line: str) -> None:
    """One line with the time on standard output."""
    stamp = time.strftime("%H:%M:%S", time.localtime())
    with contextlib.suppress(OSError):
        print(f"{stamp} engine[{os.getpid()}] {line}", flush=True)


def _size(value: str) -> int:
    match = re.fullmatch(r"(\d+)(B|KiB|MiB|GiB)?", value)
    if match is None:
        raise argparse.ArgumentTypeError(f"{value!r}: a size is a number with B, KiB, MiB or GiB")
    return int(match[1]) << {"KiB": 10, "MiB": 20, "GiB": 30}.get(match[2] or "B", 0)


def _number(minimum: float, *, whole: bool = False) -> Callable[[str], Any]:
    def parse(value: str) -> float | int:
        try:
            number = int(value) if whole else float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None
        if not minimum <= number < 1e12:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return number

    return parse


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends the program with status 2 and a sentence when one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=_number(0, whole=True), required=True)
    add("--model", action="append", help="served name; repeat it for aliases (default: demo)")
    add("--load-seconds", type=_number(0), default=0.0, help="time until /health answers 200")
    add("--memory", type=_size, default=0, help="resident, incompressible: 256MiB")
    add("--ttft", type=_number(0), default=0.02, help="time to first token, seconds")
    add("--tokens-per-second", type=_number(0.001), default=100.0, help="of each stream")
    add("--max-num-seqs", type=_number(1, whole=True), default=256, help="streams at once; more wait in turn")
    add("--max-model-len", type=_number(16, whole=True), default=4096)
    add("--worker-extension-cls", metavar="MODULE.CLASS")
    add("--sleep-mode", action=argparse.BooleanOptionalAction, default=False)
    add("--faults", action=argparse.BooleanOptionalAction, default=False)
    add("--processes", type=_number(1, whole=True), default=1, help="size of the process tree")
    add("--scratch", type=Path, action="append", default=[], help="a file to keep open and to grow with each request")
    add("--fail-start", action="store_true", help="exit with status 3 while loading")
    add("--fail-file", type=Path, help="exit with status 3 while loading as long as this file exists")
    add("--hang-start", action="store_true", help="never become healthy")
    return parser.parse_args(arguments)


async def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGINT or a failure; the exit status."""
    engine = Engine(options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, engine.exit, 0)
    runner = web.AppRunner(engine.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, options.host, options.port, backlog=1024).start()
        except OSError as error:
            log(f"cannot listen on {options.host}:{options.port}: {error}")
            return 1
        log(f"listening on {options.host}:{options.port}")
        loading = asyncio.create_task(engine.load())
        status = await engine.failed
        loading.cancel()
        return status
    finally:
        await runner.cleanup()
        loop.remove_signal_handler(signal.SIGCHLD)
        for child in engine.children:
            child.kill()
            child.wait()


def main() -> None:
    """Run the engine."""
    raise SystemExit(asyncio.run(serve(parse_arguments())))


if __name__ == "__main__":
    main()
