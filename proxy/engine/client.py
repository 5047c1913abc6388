"""What is said to an engine of any kind: health, warm-up, canary, and the requests of clients; what else there may be.

Each `EngineClient` has connections of its own, because every one of them must be closed before the engine is
checkpointed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import aiohttp
import orjson

from proxy.engine.connection import SilenceError, Upstream
from proxy.errors import EngineError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterable, Mapping
    from types import SimpleNamespace

    from proxy.config.engine import WarmupSettings
    from proxy.telemetry.stages import Stages

CANARY_PROMPT = "The quick brown fox jumps over the lazy dog. One, two, three,"
CANARY_TOKENS = 16
DIGITS = 32
"""Bytes of randomness that an engine is given, in hexadecimal digits."""
MAX_MODEL_LEN = 1 << 40
"""What an engine says beyond this is no length."""

# uvicorn, vLLM's server, drops idle connections after 5 s: let go of them first.
_KEEPALIVE_S = 4.0
_CONNECT_S = 5.0
_ANSWER_BYTES = 64 << 10
_JSON = {"Content-Type": "application/json"}
# vLLM's and SGLang's counters of tokens and requests in Prometheus' text format; what was aborted is no progress.
_PROGRESS = re.compile(rb"^(\w+:\w*(?:tokens|request)\w*_total(?:\{[^}\n]*\})?) +(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine is, and whose it is: for commands of the user's that are run for it."""

    host: str
    port: int
    model: str
    """What clients call the model."""
    instance: str


class EngineClient:
    """A client of one engine with OpenAI's API; each kind of engine adds what it has beside that.

    Methods raise EngineError with the stage and the reason.
    """

    def __init__(
        self,
        base_url: str,
        served_name: str,
        *,
        instance: str = "",
        response_timeout_s: float | None = None,
        api_key: str | None = None,
    ) -> None:
        self.served_name = served_name
        self._instance = instance
        self._api_key = api_key
        self.upstream = Upstream(base_url, response_timeout_s, api_key)
        """The connections that clients' requests go over."""
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=response_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._tls: ssl.SSLContext | None = None
        self._tls_name: str | None = None

    @property
    def base_url(self) -> str:
        """Where the engine is; it may be elsewhere after a restore."""
        return self.upstream.base_url

    @base_url.setter
    def base_url(self, base_url: str) -> None:
        self.upstream.move(base_url)

    @property
    def place(self) -> Place:
        """Where the engine is now."""
        url = urlsplit(self.base_url)
        return Place(url.hostname or "", url.port or 80, self.served_name, self._instance)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
                timeout=self._timeout,
                trace_configs=[_notes_reuse()],
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"},
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        return self._session

    async def websocket(
        self,
        target: str,
        *,
        protocols: Iterable[str],
        headers: Mapping[str, str],
        most_bytes: int,
        ping_s: float,
        close_s: float,
    ) -> aiohttp.ClientWebSocketResponse[Any]:
        """A WebSocket to the engine; a message has at most `most_bytes`.

        Raises aiohttp.ClientError or TimeoutError; WSServerHandshakeError has the engine's refusal.
        """
        return await self._connected().ws_connect(
            self.base_url + target,
            protocols=protocols,
            headers=headers,
            ssl=self._tls or True,
            server_hostname=self._tls_name,
            max_msg_size=most_bytes,
            heartbeat=ping_s,
            timeout=aiohttp.ClientWSTimeout(ws_close=close_s),
            autoclose=False,
        )

    async def disconnect(self) -> None:
        """Close every connection to the engine; the next request opens new ones. Requests in flight fail."""
        session, self._session = self._session, None
        await self.upstream.disconnect()
        if session is not None:
            await session.close()
            await asyncio.sleep(0)  # the transports close on the loop's next turn

    async def wait_healthy(self, path: str, interval_s: float) -> None:
        """Return when `path` answers 200. Bounded by the caller's time-out; raises EngineError for a missing key."""
        while (status := await self._status(path)) != 200:
            self._check_key("health", f"GET {path}", status)
            await asyncio.sleep(interval_s)

    async def healthy(self, path: str) -> bool:
        """Whether `path` answers 200 now."""
        return await self._status(path) == 200

    async def _status(self, path: str) -> int | None:
        try:
            async with self._connected().get(self.base_url + path) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError):
            return None

    def _check_key(self, stage: str, what: str, status: int | None) -> None:
        """Raise EngineError for a 401: warmpool has no key for this engine, or a wrong one."""
        if status == 401:
            has = "asks for an API key: set" if self._api_key is None else "does not take the API key that is set in"
            raise EngineError(stage, f"{what} answered 401: the engine {has} the model's api_key or api_key_file")

    async def loads(self, path: str) -> bool:
        """Whether it looks like one that is not up yet: nobody listens, or `path` answers 503 at once."""
        try:
            async with asyncio.timeout(_CONNECT_S), self._connected().get(self.base_url + path) as response:
                return response.status == 503
        except aiohttp.ClientConnectorError:
            return True
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def complete(self, stage: str, prompt: str, max_tokens: int) -> str | None:
        """The text of a completion at temperature 0, or None where the engine offers no completions (4xx)."""
        request = self._completion(prompt, max_tokens)
        status, body = await self._call(stage, "POST", "/v1/completions", json=request)
        if 400 <= status < 500:
            return None
        answer = as_json(body)
        try:
            text = answer["choices"][0]["text"]
        except (TypeError, KeyError, IndexError):
            text = None
        if status != 200 or not isinstance(text, str):
            raise EngineError(stage, f"POST /v1/completions answered {status} {excerpt(body)}")
        return text

    async def generates(self) -> bool:
        """Whether a request for one token is answered, with the token or with an error of the engine's own.

        One that is refused (4xx) says nothing: it may not have got as far as the engine. Bounded by the caller.
        """
        try:
            status, _ = await self._call("stall", "POST", "/v1/completions", json=self._completion("Hello", 1))
        except EngineError:
            return False
        return not 400 <= status < 500

    async def progress(self) -> dict[str, str]:
        """What the engine counts of its work (`/metrics`); empty where it counts nothing or does not answer."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                status, body = await self._call("stall", "GET", "/metrics")
        except (EngineError, TimeoutError):
            return {}
        found = _PROGRESS.findall(body) if status == 200 else []
        return {name.decode(): value.decode() for name, value in found if b"abort" not in name}

    async def metrics(self, most_bytes: int) -> bytes | None:
        """Its own metrics (`/metrics`), so much of it; None where it has none. Bounded by the caller."""
        try:
            async with self._connected().get(self.base_url + "/metrics") as response:
                self._check_key("metrics", "GET /metrics", response.status)
                if response.status == 404:
                    return None
                if response.status != 200:
                    raise EngineError("metrics", f"GET /metrics answered {response.status}")
                body = bytearray()
                async for piece in response.content.iter_any():
                    body += piece[: most_bytes - len(body)]
                    if len(body) >= most_bytes:
                        break
                return bytes(body)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise EngineError("metrics", f"GET /metrics: {str(error) or type(error).__name__}") from error

    @property
    def silent_s(self) -> float:
        """For how long no client has got a byte, though at least one waits for some."""
        return self.upstream.silent_s

    def give_up(self, reason: str) -> None:
        """End the requests of clients that are under way; they are not to be tried again."""
        self.upstream.give_up(SilenceError(reason))

    async def max_model_len(self) -> int | None:
        """How many tokens a prompt with its answer may have, as the engine lists its model; None where it does not say.

        Raises EngineError for a missing key too, of which nothing else may ask (a warm-up may have no requests).
        """
        status, body = await self._call("warmup", "GET", "/v1/models")
        answer = as_json(body) if status == 200 else None
        listed = answer.get("data") if isinstance(answer, dict) else None
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        own = next((entry for entry in entries if entry.get("id") == self.served_name), {})
        length = own.get("max_model_len")
        return length if type(length) is int and 0 < length <= MAX_MODEL_LEN else None

    async def warm_up(self, settings: WarmupSettings) -> list[dict[str, float]]:
        """Send the warm-up requests, one after the other; what each took, as far as the engine offers completions.

        `ttft_s`: to the first token; `total_s`; `tokens`: how many the engine says it generated.
        """
        figures = []
        for _ in range(settings.requests):
            figure = await self._streamed("warmup", settings.prompt, settings.max_tokens)
            if figure is None:
                break
            figures.append(figure)
        return figures

    async def _streamed(self, stage: str, prompt: str, max_tokens: int) -> dict[str, float] | None:
        request = {**self._completion(prompt, max_tokens), "stream": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        ttft_s, tokens = None, 0
        try:
            async with self._asked("POST", "/v1/completions", data=orjson.dumps(request), headers=_JSON) as response:
                self._check_key(stage, "POST /v1/completions", response.status)
                if 400 <= response.status < 500:
                    return None
                if response.status != 200:
                    body = await response.read()
                    raise EngineError(stage, f"POST /v1/completions answered {response.status} {excerpt(body)}")
                async for line in response.content:
                    event = as_json(line.removeprefix(b"data:")) if line.startswith(b"data:") else None
                    if not isinstance(event, dict):
                        continue
                    if ttft_s is None and event.get("choices"):
                        ttft_s = time.perf_counter() - began
                    usage = event.get("usage")
                    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
                        tokens = usage["completion_tokens"]
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise EngineError(stage, f"POST /v1/completions: {str(error) or type(error).__name__}") from error
        if ttft_s is None:
            raise EngineError(stage, "POST /v1/completions streamed no token")
        total_s = time.perf_counter() - began
        return {"ttft_s": round(ttft_s, 4), "total_s": round(total_s, 4), "tokens": tokens}

    def _completion(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.served_name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "seed": 0,
        }  # fmt: skip

    async def canary(self) -> str | None:
        """The engine's answer to a fixed prompt; a restored engine must give the same one."""
        return await self.complete("canary", CANARY_PROMPT, CANARY_TOKENS)

    # --- what an engine may have: nothing here, and each kind of engine says what it has (proxy/engine/kinds) ---

    async def is_sleeping(self) -> bool | None:
        """Whether the engine sleeps; None when it has no sleep mode."""
        return None

    async def sleep(self, level: int) -> None:
        """Put the engine to sleep: level 1 keeps the weights in host memory, level 2 drops them."""
        raise EngineError("sleep", f"this engine has no sleep mode (level {level})")

    async def wake_up(self, level: int, stages: Stages, *, copied: bool = False) -> bool:  # noqa: ARG002 - a contract
        """Wake an engine that sleeps at `level`; `copied`: with the weights from the copy of `save_weights`.

        False says that the copy could not be used, and that the engine has loaded its weights itself.
        """
        raise EngineError("wake_up", f"this engine has no sleep mode (level {level})")

    async def save_weights(self) -> int:
        """Have it keep a copy of its weights; its bytes."""
        raise EngineError("save_weights", "this engine makes no copies of its weights")

    async def can_pause(self) -> Literal["never", "without a copy of its weights", "yes"]:
        """Whether its requests can stand still with nothing of them on the GPU, as far as the engine says."""
        return "never"

    async def is_paused(self) -> bool | None:
        """Whether its requests stand still; None where the engine knows no pauses."""
        return None

    async def pause(self, stages: Stages) -> int:  # noqa: ARG002 - a contract
        """Have its requests stand still, and take their state and the weights off the GPU; bytes in host memory.

        When that fails, `unpause` is the way back.
        """
        raise EngineError("pause", "this engine cannot be paused")

    async def unpause(self, stages: Stages) -> bool:  # noqa: ARG002 - a contract
        """Bring all that back, and let its requests go on; False where the copy of the weights did not fit."""
        raise EngineError("unpause", "this engine cannot be paused")

    async def end_pauses(self) -> None:
        """Have it give back what it keeps for the next pause."""

    async def reseed_gap(self) -> str | None:
        """Why it repeats random numbers after a restore, asked of an engine that runs."""
        return "nothing is known of how to reseed this engine: set engine or reseed"

    async def reseed(self) -> str | None:
        """Begin the generators anew; why that could not be had, or not of all, where that is so.

        Raises EngineError when it should have worked and did not.
        """
        return await self.reseed_gap()

    # --- asking ---

    @contextlib.asynccontextmanager
    async def limit(self, stage: str, seconds: float) -> AsyncIterator[None]:
        """Raises EngineError when the time is over."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise EngineError(stage, f"no answer within {seconds:g} s") from error

    async def ask_json(self, stage: str, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """The status of any other answer, and what it says; None where that is not JSON. Raises EngineError."""
        try:
            async with self._asked(method, path, data=body) as response:
                self._check_key(stage, f"{method} {path}", response.status)
                return response.status, as_json(await response.content.read(_ANSWER_BYTES))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(stage, f"{method} {path}: {str(error) or type(error).__name__}") from error

    @contextlib.asynccontextmanager
    async def _asked(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request; once more where it went over a kept connection that the engine was just closing.

        llama.cpp closes a connection after a stream without having said so.
        """
        reused: list[bool] = []
        ask = partial(self._connected().request, method, self.base_url + path, **options)
        try:
            response = await ask(trace_request_ctx=reused)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            if not reused:
                raise
            response = await ask()
        async with response:
            yield response

    async def _call(
        self, stage: str, method: str, path: str, json: Mapping[str, Any] | None = None
    ) -> tuple[int, bytes]:
        data = orjson.dumps(json) if json is not None else None
        headers = _JSON if data is not None else {}
        try:
            async with self._asked(method, path, data=data, headers=headers) as response:
                self._check_key(stage, f"{method} {path}", response.status)
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(stage, f"{method} {path}: {str(error) or type(error).__name__}") from error


def _notes_reuse() -> aiohttp.TraceConfig:
    """Adds to the list that a request brings when it goes over a connection that was kept."""

    async def note(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        if context.trace_request_ctx is not None:
            context.trace_request_ctx.append(True)

    config = aiohttp.TraceConfig()
    config.on_connection_reuseconn.append(note)
    return config


def as_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def excerpt(body: bytes) -> str:
    return body[:200].decode("utf-8", "replace")
