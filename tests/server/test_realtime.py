"""WebSockets through the proxy, with a real engine's sessions behind it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import WSCloseCode, WSMsgType
from websockets.asyncio.client import connect

from tests.server.test_http import error_of, until_engine
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from tests.front import Front

PATH = "/v1/realtime?model=demo"
SOUND = os.urandom(9000)


async def transcript(socket: aiohttp.ClientWebSocketResponse, model: str = "demo") -> list[dict[str, Any]]:
    """The events of one utterance, the first one left out."""
    assert (await socket.receive_json())["type"] == "session.created"
    await socket.send_json({"type": "session.update", "model": model})
    for at in range(0, len(SOUND), 3000):
        piece = base64.b64encode(SOUND[at : at + 3000]).decode()
        await socket.send_json({"type": "input_audio_buffer.append", "audio": piece})
    await socket.send_json({"type": "input_audio_buffer.commit"})
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] == "transcription.delta":
        events.append(await socket.receive_json())
    return events


async def settled(front: Front) -> None:
    """Return when no lease is held."""
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["leases"]:
            await asyncio.sleep(0.01)


async def test_a_session_holds_its_instance_and_is_the_engines(front_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "warmpool")
    front: Front = await front_of(aliases=["gpt-realtime"])
    async with front.session.ws_connect("/v1/realtime?model=gpt-realtime") as socket:
        assert socket._response.headers["x-warmpool-tier"] == "stopped"
        through = await transcript(socket, "gpt-realtime")
        assert through[-1]["type"] == "transcription.done"
        assert front.pool.status()["leases"] == 1
    await settled(front)
    async with aiohttp.ClientSession() as session, session.ws_connect(await front.engine() + PATH) as socket:
        assert through == await transcript(socket)
    assert front.sample("warmpool_requests_total", model="demo", status="101") == 1
    assert [m for m in caplog.messages if "status=101" in m and f"messages={5 + 1 + len(through)}" in m]


async def test_messages_come_through_whole_and_in_order_however_they_were_cut(front: Front) -> None:
    sizes = [0, 1, 125, 126, 65535, 65536, 300_000, *range(2, 60)]
    messages = [os.urandom(size) for size in sizes]
    url = front.url.replace("http", "ws") + PATH
    async with connect(url, compression=None, max_size=None, proxy=None) as socket:
        await socket.recv()

        async def send() -> None:
            for message in messages:
                # Fragments (RFC 6455, 5.4), and pings among the messages.
                await socket.send([message[i : i + 50_000] for i in range(0, len(message), 50_000)] or [b""])
                await socket.ping()

        sending = asyncio.create_task(send())
        assert [await socket.recv() for _ in messages] == messages
        await sending


@pytest.mark.parametrize("code", [1000, 1001, 1008, 3000, 4999])
async def test_close_codes_go_both_ways(front: Front, code: int) -> None:
    async with front.session.ws_connect(PATH) as socket:
        await socket.receive()
        await socket.send_json({"type": "debug.close", "code": code, "reason": "because"})
        message = await socket.receive()
        assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, code, "because")
    await settled(front)
    async with front.session.ws_connect(PATH) as socket:
        await socket.receive()
        await socket.close(code=code, message=b"bye")
        assert socket.close_code == code
    await settled(front)
    await until_engine(front, running=0)
    assert (await front.engine_state())["last_socket"]["close_code"] == code


async def test_an_engine_that_vanishes_is_an_error_and_not_an_end(front: Front) -> None:
    async with front.session.ws_connect(PATH) as socket:
        await socket.receive()
        await socket.send_json({"type": "debug.die"})
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, WSCloseCode.INTERNAL_ERROR)
        assert message.extra == "the engine's connection broke"
    await settled(front)


async def test_a_client_that_vanishes_ends_the_engines_session(front: Front) -> None:
    async with front.session.ws_connect(PATH) as socket:
        await socket.receive()
        await until_engine(front, running=1)
        connection = socket._response.connection
        assert connection is not None
        assert connection.transport is not None
        connection.transport.abort()
    await settled(front)
    await until_engine(front, running=0)


async def test_subprotocols_are_the_engines_choice_and_keys_do_not_get_there(front: Front) -> None:
    offered = ("openai-insecure-api-key.sk-secret", "realtime", "openai-beta.realtime-v1")
    async with front.session.ws_connect(PATH, protocols=offered) as socket:
        assert socket.protocol == "realtime"
    await settled(front)
    await until_engine(front, running=0)
    seen = (await front.engine_state())["last_socket"]["offered"]
    assert "realtime" in seen
    assert "sk-secret" not in seen


async def test_a_message_over_the_limit_ends_the_session(front: Front) -> None:
    async with front.session.ws_connect(PATH) as socket:
        await socket.receive()
        await socket.send_bytes(b"x" * ((1 << 20) + 1))
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, WSCloseCode.MESSAGE_TOO_BIG)
    await settled(front)
    await until_engine(front, running=0)


async def test_a_session_without_messages_ends(front_of: Any) -> None:
    front: Front = await front_of(server={"websocket_idle_timeout": "300ms"})
    async with front.session.ws_connect(PATH) as socket:
        await socket.receive()
        message = await socket.receive()
        assert (message.type, message.data, message.extra) == (
            WSMsgType.CLOSE,
            WSCloseCode.GOING_AWAY,
            "idle for too long",
        )
    await settled(front)


async def test_a_shutdown_says_goodbye(front: Front) -> None:
    async with front.session.ws_connect(PATH) as socket:
        await socket.receive()
        handler = next(t for t in asyncio.all_tasks() if "realtime" not in t.get_name() and _is_handler(t))
        handler.cancel()
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, WSCloseCode.GOING_AWAY)
    await settled(front)
    await until_engine(front, running=0)
    assert {t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("realtime")} == set()


def _is_handler(task: asyncio.Task[Any]) -> bool:
    return "_handle_request" in str(task.get_coro()) or any(
        frame.f_code.co_qualname.startswith("Realtime.") if hasattr(frame.f_code, "co_qualname") else False
        for frame in task.get_stack()
    )


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/realtime?model=", 400, "invalid_request"),
        ("/v1/realtime?model=other", 404, "model_not_found"),
        ("/v1/realtime/?model=demo", 404, "not_found"),
    ],
)
async def test_what_cannot_begin_is_an_http_answer(front: Front, path: str, status: int, code: str) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await front.session.ws_connect(path)
    assert refused.value.status == status
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    async with front.session.get(path, headers={**upgrade, "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}) as answer:
        assert (answer.status, error_of(await answer.read())["code"]) == (status, code)
    assert front.pool.status()["models"]["demo"]["instances"] == []


async def test_a_request_without_an_upgrade_is_told_so(front: Front) -> None:
    async with front.session.get(PATH) as response:
        assert (response.status, "upgrade" in error_of(await response.read())["message"]) == (426, True)
    assert front.pool.status()["models"]["demo"]["instances"] == []


async def test_a_model_may_be_without_and_so_may_its_engine(front_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    front: Front = await front_of(routes={"realtime": False})
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await front.session.ws_connect(PATH)
    assert refused.value.status == 404
    other: Front = await front_of()
    async with other.session.ws_connect(PATH):
        pass
    client = next(iter(other.pool._state.models["demo"].instances.values())).client
    assert client is not None
    original = client.websocket
    monkeypatch.setattr(client, "websocket", lambda target, **options: original("/v1/nothing", **options))
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await other.session.ws_connect(PATH)
    assert refused.value.status == 404
    await settled(other)


async def test_a_dead_engine_is_replaced_before_the_session_begins(front: Front) -> None:
    async with front.session.ws_connect(PATH):
        pass
    with contextlib.suppress(aiohttp.ClientError):
        await front.post("/v1/completions", {
            "model": "demo", "prompt": "x", "max_tokens": 50, "stream": True, "ignore_eos": True,
            "vllm_xargs": {"fault": "die_mid_stream", "after_tokens": 1},
        })  # fmt: skip
    async with front.session.ws_connect(PATH) as socket:
        assert (await socket.receive_json())["type"] == "session.created"
