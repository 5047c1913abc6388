"""The load-test engine's ears: transcriptions and translations of uploads, and `/v1/realtime`. It hears bytes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from loadtest.engine_wire import ApiError, answer, bad, begin_stream, event

if TYPE_CHECKING:
    from loadtest.engine_completions import Writer

_BYTES_PER_S: Final = 32_000
"""Of 16 bit mono at 16 kHz."""
SUBPROTOCOL: Final = "realtime"


class Audio:
    """`/v1/audio/transcriptions`, `/v1/audio/translations` and `/v1/realtime`."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    async def transcribe(self, request: web.Request) -> web.StreamResponse:
        """The same text for the same bytes and the same kind of request."""
        if not request.content_type.startswith("multipart/"):
            raise bad("the body must be a form")
        try:
            form = await request.post()
        except ValueError as error:  # aiohttp's for what is no form
            raise bad(f"There was an error parsing the body: {error}") from error
        file = form.get("file")
        if not isinstance(file, web.FileField):
            raise bad("file must be an upload", "file")
        heard = file.file.read()
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        fields["temperature"] = "0"
        body: dict[str, Any] = {**fields, "temperature": 0, "stream": fields.get("stream") == "true"}
        prompt = f"{request.path} {hashlib.sha256(heard).hexdigest()} {fields.get('prompt', '')}"
        job = self.writer.generation(body, prompt, None, "max_tokens")
        tokens, _ = job.choices[0]
        async with self.writer.at_work(job):
            if not job.stream:
                await self.writer.finish(job)
                said = "".join(tokens)
                if fields.get("response_format") == "text":
                    return web.Response(text=said)
                seconds = -(-len(heard) // _BYTES_PER_S)
                return answer({"text": said, "usage": {"type": "duration", "seconds": seconds}})
            response = await begin_stream(request)
            head = {"id": job.id, "object": "transcription.chunk", "created": job.created, "model": job.model}
            async for i in self.writer.pace(job):
                choice = {"delta": {"content": tokens[i]}, "finish_reason": None if i + 1 < job.longest else "stop"}
                await response.write(event({**head, "choices": [choice]}))
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
            return response

    async def realtime(self, request: web.Request) -> web.StreamResponse:
        """vLLM's events (vllm/entrypoints/speech_to_text/realtime); binary messages come back as they are."""
        socket = web.WebSocketResponse(protocols=(SUBPROTOCOL,), max_msg_size=16 << 20)
        await socket.prepare(request)
        self.writer.counters.running += 1
        try:
            await _Session(self.writer, socket, request.transport).run()
        finally:
            self.writer.counters.running -= 1
            offered = request.headers.get("Sec-WebSocket-Protocol")
            self.writer.counters.last_socket = {"close_code": socket.close_code, "offered": offered}
        return socket


class _Session:
    def __init__(self, writer: Writer, socket: web.WebSocketResponse, transport: asyncio.Transport | None) -> None:
        self.writer = writer
        self.transport = transport
        self.socket = socket
        self.model: str | None = None
        self.heard = bytearray()
        self.speaking: asyncio.Task[None] | None = None

    async def run(self) -> None:
        await self.send("session.created", id=f"sess-{uuid.uuid4().hex}", created=int(time.time()))
        try:
            async for message in self.socket:
                if message.type is WSMsgType.BINARY:
                    await self.socket.send_bytes(message.data)
                elif message.type is WSMsgType.TEXT:
                    await self.receive(message.data)
        finally:
            if self.speaking is not None:
                self.speaking.cancel()

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send_str(orjson.dumps({"type": kind, **fields}).decode())

    async def error(self, text: str, code: str) -> None:
        await self.send("error", error=text, code=code)

    async def receive(self, data: str) -> None:
        try:
            said = orjson.loads(data)
        except orjson.JSONDecodeError:
            await self.error("Invalid JSON", "invalid_json")
            return
        match said.get("type") if isinstance(said, dict) else None:
            case "session.update":
                try:
                    self.model = self.writer.engine.check_model(said)
                except ApiError as error:
                    await self.error(error.message, "model_not_found")
            case "input_audio_buffer.append":
                try:
                    self.heard += base64.b64decode(said.get("audio", ""), validate=True)
                except (binascii.Error, TypeError):
                    await self.error("Invalid audio data", "invalid_audio")
            case "input_audio_buffer.commit" if self.model is None:
                await self.error("Model not validated.", "model_not_validated")
            case "input_audio_buffer.commit":
                self.speaking = asyncio.create_task(self.speak(bytes(self.heard)))
                self.heard.clear()
            case "debug.close":
                await self.socket.close(code=said.get("code", WSCloseCode.OK), message=said.get("reason", "").encode())
            case "debug.die":
                if self.transport is not None:
                    self.transport.abort()
            case other:
                await self.error(f"Unknown event type: {other}", "unknown_event")

    async def speak(self, heard: bytes) -> None:
        job = self.writer.generation({"temperature": 0}, hashlib.sha256(heard).hexdigest(), None, "max_tokens")
        tokens, _ = job.choices[0]
        with contextlib.suppress(ConnectionError):
            async for i in self.writer.pace(job):
                await self.send("transcription.delta", delta=tokens[i])
            await self.send("transcription.done", text="".join(tokens), usage=job.usage())
