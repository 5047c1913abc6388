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
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from loadtest.engine_apis import Messages, Responses
from loadtest.engine_audio import Audio
from loadtest.engine_completions import PROMPT_BUCKETS, Completions, Writer
from loadtest.engine_frontend import Frontend
from loadtest.engine_pooling import Pooling
from loadtest.engine_weights import Worker
from loadtest.engine_wire import ApiError, answer, bad, body_of, object_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CHUNK_BYTES = 8 << 20
NEEDS_MODEL: Final = re.compile(
    r"/v1/|/v2/|/tokenize|/detokenize|/rerank|/score|/classify|/pooling|/generative_scoring|/invocations"
)

_CHILD = """
import os, sys
memory = [os.urandom(1 << 20) for _ in range(int(sys.argv[1]) >> 20)]
os.write(1, b"ready\\n")
os.read(0, 1)  # returns when the parent is gone
"""


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
    prompts_up_to: list[int] = field(default_factory=lambda: [0] * (len(PROMPT_BUCKETS) + 1))
    """How many prompts of so many tokens, up to each bound and above the one before, and above all."""
    last_request_id: str | None = None
    last_socket: dict[str, Any] | None = None
    last_traceparent: str | None = None
    faults: list[dict[str, Any]] = field(default_factory=list)


class Engine:
    """The engine's state and its routes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.models: list[str] = options.model or ["demo"]
        self.adapters: set[str] = set()
        self.boot_id = uuid.uuid4().hex
        self.started_at = time.time()
        self.counters = Counters()
        self.loaded = False
        self.sleep_level = 0
        self.weights_valid = True
        self.worker = Worker(options.worker_extension_cls) if options.worker_extension_cls else None
        self.frontends = [Frontend(name, self.worker, options.worker_extension_cls) for name in options.middleware]
        self.memory: list[bytes] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.scratch = [path.open("wb", buffering=0) for path in options.scratch]
        self.slots = asyncio.Semaphore(options.max_num_seqs)
        self.thaws = asyncio.Event()
        """Not set: no token is made for anybody, as when vLLM's EngineCore hangs."""
        self.thaws.set()
        self.unpaused = asyncio.Event()
        """Not set: paused by `/pause`, with its requests kept."""
        self.unpaused.set()
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

    def check_model(self, body: dict[str, Any]) -> str:
        """The model that a request names, or the first. Raises ApiError for one that is not here."""
        model = body.get("model") or self.models[0]
        if model not in self.models and model not in self.adapters:
            raise ApiError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")
        return str(model)

    # --- randomness ---

    def draw(self) -> bytes:
        """What decides on a text that is sampled without a seed: a generator in memory, as it was after a restore."""
        return self.worker.draw() if self.worker is not None else random.randbytes(16)

    async def reseed(self, request: web.Request) -> web.StreamResponse:
        """`POST /debug/reseed`: the generator begins anew with the body."""
        random.seed(await request.read())
        return web.Response(status=204)

    # --- what is not a model's ---

    async def health(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if self.loaded else 503)

    async def list_models(self, _: web.Request) -> web.StreamResponse:
        length, created = self.options.max_model_len, int(self.started_at)
        data = [
            {"id": m, "object": "model", "created": created, "owned_by": "vllm", "root": m, "max_model_len": length}
            for m in (*self.models, *sorted(self.adapters))
        ]
        return answer({"object": "list", "data": data})

    async def load_adapter(self, request: web.Request) -> web.StreamResponse:
        body = await object_of(request)
        if not body.get("lora_name") or not body.get("lora_path"):
            raise bad("Both 'lora_name' and 'lora_path' must be provided.")
        self.adapters.add(str(body["lora_name"]))
        return web.Response(text=f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    async def unload_adapter(self, request: web.Request) -> web.StreamResponse:
        name = (await object_of(request)).get("lora_name")
        if name not in self.adapters:
            raise ApiError(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        self.adapters.discard(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def metrics(self, _: web.Request) -> web.StreamResponse:
        c = self.counters
        label = f'{{model_name="{self.models[0]}"}}'
        lines = []
        for name, kind, value in (
            ("vllm:num_requests_running", "gauge", c.running),
            ("vllm:num_requests_waiting", "gauge", c.waiting),
            ("vllm:kv_cache_usage_perc", "gauge", c.running / self.options.max_num_seqs),
            ("vllm:request_success_total", "counter", c.served),
            ("vllm:prompt_tokens_total", "counter", c.prompt_tokens),
            ("vllm:generation_tokens_total", "counter", c.generation_tokens),
            ("loadtest:requests_aborted_total", "counter", c.aborted),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name}{label} {value}"]
        name = "vllm:request_prompt_tokens"
        lines.append(f"# TYPE {name} histogram")
        for bound, count in zip((*PROMPT_BUCKETS, "+Inf"), accumulate(c.prompts_up_to), strict=True):
            lines.append(f'{name}_bucket{{le="{bound}",model_name="{self.models[0]}"}} {count}')
        lines += [f"{name}_sum{label} {c.prompt_tokens}", f"{name}_count{label} {sum(c.prompts_up_to)}"]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    async def version(self, _: web.Request) -> web.StreamResponse:
        return answer({"version": "0.0.0+loadtest"})

    async def state(self, _: web.Request) -> web.StreamResponse:
        c = self.counters
        return answer(
            {
                "boot_id": self.boot_id, "pid": os.getpid(), "started_at": self.started_at, "served": c.served,
                "aborted": c.aborted, "running": c.running, "waiting": c.waiting, "loads": c.loads,
                "sleep_level": self.sleep_level, "memory_bytes": sum(map(len, self.memory)),
                "children": [child.pid for child in self.children], "last_request_id": c.last_request_id,
                "last_socket": c.last_socket,
                "last_traceparent": c.last_traceparent,
            }
        )  # fmt: skip

    # --- sleep mode ---

    async def sleep(self, request: web.Request) -> web.StreamResponse:
        level = request.query.get("level", "1")
        if level not in {"1", "2"}:
            raise bad("level must be 1 or 2")
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
            raise bad("tags are weights and kv_cache")
        if not tags or "kv_cache" in tags:
            self.sleep_level = 0
        return web.Response()

    async def is_sleeping(self, _: web.Request) -> web.StreamResponse:
        return answer({"is_sleeping": self.sleep_level > 0})

    # --- pauses ---

    async def pause(self, request: web.Request) -> web.StreamResponse:
        """`POST /pause?mode=keep`: no request gets a token; none is lost, and new ones wait."""
        mode = request.query.get("mode", "abort")
        if mode != "keep":
            raise bad("the only mode here is keep")
        self.unpaused.clear()
        return answer({"status": "paused"})

    async def resume(self, _: web.Request) -> web.StreamResponse:
        """`POST /resume`: they go on."""
        if self.take_fault("fail_resume"):
            raise ApiError(500, "InternalServerError", "told to fail")
        if self.worker is not None:
            self.weights_valid = self.worker.valid()
        self.unpaused.set()
        return answer({"status": "resumed"})

    async def is_paused(self, _: web.Request) -> web.StreamResponse:
        return answer({"is_paused": not self.unpaused.is_set()})

    def take_fault(self, kind: str) -> bool:
        """Whether this fault was armed for what is asked now; it counts once."""
        armed = next((fault for fault in self.counters.faults if fault["kind"] == kind), None)
        if armed is not None:
            self.counters.faults.remove(armed)
        return armed is not None

    @property
    def cache_valid(self) -> bool:
        """Whether what running requests rely on is there."""
        return self.worker is None or (self.worker.valid() and self.worker.cache_valid())

    async def collective_rpc(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request)
        method = body.get("method") if isinstance(body, dict) else None
        if self.worker is not None and isinstance(method, str) and method != "reload_weights":
            try:
                result = await asyncio.to_thread(self.worker.call, method)
            except AttributeError as error:
                raise bad(str(error)) from error
            if self.unpaused.is_set():  # else nobody reads them before `resume`
                self.weights_valid = self.worker.valid()
            return answer({"results": [result]})
        if method != "reload_weights":
            raise bad("the only method here is reload_weights")
        await self.fill()
        if self.worker is not None:
            self.worker.load()
        self.weights_valid = True
        self.counters.loads += 1
        return answer({"results": [None]})

    def application(self) -> web.Application:
        """The routes, those of sleep mode and faults only where they are switched on."""
        app = web.Application(middlewares=[self.guard], client_max_size=64 << 20)
        writer = Writer(self)
        completions, pooling = Completions(writer), Pooling(self)
        responses, messages, audio = Responses(writer), Messages(writer), Audio(writer)
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/health", self.health),
            ("GET", "/ping", self.health),
            ("GET", "/version", self.version),
            ("GET", "/metrics", self.metrics),
            ("GET", "/debug/state", self.state),
            ("POST", "/debug/reseed", self.reseed),
            ("GET", "/v1/models", self.list_models),
            ("POST", "/v1/completions", completions.complete),
            ("POST", "/v1/completions/render", completions.render),
            ("POST", "/v1/chat/completions", completions.complete),
            ("POST", "/v1/chat/completions/batch", completions.batch),
            ("POST", "/v1/chat/completions/render", completions.render),
            ("POST", "/invocations", completions.complete),
            ("POST", "/v1/responses", responses.create),
            ("POST", "/v1/responses/render", completions.render),
            ("GET", "/v1/responses/{id}", responses.retrieve),
            ("POST", "/v1/responses/{id}/cancel", responses.cancel),
            ("POST", "/v1/messages", messages.create),
            ("POST", "/v1/messages/count_tokens", messages.count_tokens),
            ("POST", "/v1/messages/render", completions.render),
            ("POST", "/v1/audio/transcriptions", audio.transcribe),
            ("POST", "/v1/audio/translations", audio.transcribe),
            ("GET", "/v1/realtime", audio.realtime),
            ("POST", "/v1/embeddings", pooling.embeddings),
            ("POST", "/v2/embed", pooling.embed),
            ("POST", "/pooling", pooling.pooling),
            ("POST", "/classify", pooling.classify),
            *(("POST", path, pooling.score) for path in ("/score", "/v1/score")),
            *(("POST", path, pooling.rerank) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
            ("POST", "/generative_scoring", pooling.score_items),
            ("POST", "/v1/systemone", pooling.decide),
            ("POST", "/tokenize", pooling.tokenize),
            ("POST", "/detokenize", pooling.detokenize),
            ("GET", "/tokenizer_info", pooling.tokenizer_info),
            ("POST", "/v1/load_lora_adapter", self.load_adapter),
            ("POST", "/v1/unload_lora_adapter", self.unload_adapter),
        ]
        if self.options.sleep_mode:
            routes += [
                ("POST", "/sleep", self.sleep),
                ("POST", "/wake_up", self.wake_up),
                ("GET", "/is_sleeping", self.is_sleeping),
                ("POST", "/pause", self.pause),
                ("POST", "/resume", self.resume),
                ("GET", "/is_paused", self.is_paused),
                ("POST", "/collective_rpc", self.collective_rpc),
            ]
        routes += [("*", "/warmpool/{path:.*}", frontend.answer) for frontend in self.frontends]
        if self.options.faults:
            routes += [
                ("POST", "/debug/fault", completions.arm_fault),
                ("POST", "/debug/release", completions.release),
            ]
        for method, path, handler in routes:
            app.router.add_route(method, path, handler)
        return app

    def knows(self, request: web.Request) -> bool:
        """Whether a request has the engine's key, or needs none."""
        given = request.headers.get("Authorization", "")
        return not request.path.startswith(("/v1", "/v2")) or given == f"Bearer {self.options.api_key}"

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self.options.api_key is not None and not self.knows(request):
                return answer({"error": "Unauthorized"}, 401)
            needs_model = NEEDS_MODEL.match(request.path) is not None
            if needs_model and not self.loaded:
                raise ApiError(503, "ServiceUnavailableError", "the model is still loading")
            if needs_model and request.method == "POST" and self.sleep_level:
                raise ApiError(503, "ServiceUnavailableError", "the engine is sleeping")
            if needs_model:
                self.counters.last_request_id = request.headers.get("X-Request-Id")
                self.counters.last_traceparent = request.headers.get("traceparent")
            return await handler(request)
        except ApiError as error:
            return error.response()


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
    add("--middleware", metavar="MODULE.CLASS", action="append", default=[])
    add("--api-key", help="asked of whoever comes to /v1 and /v2, as by vLLM")
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
