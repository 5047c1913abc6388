"""The control API on a real engine: commands, what is refused and why, and the events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from proxy.server.admin import events as admin_events
from proxy.server.admin.events import Events, merge_patch
from tests.server.test_http import ASK, HELD, error_of
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from tests.front import Front

NEVER = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}


async def command(front: Front, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with front.session.post(f"/admin/{path}", json=body) as response:
        return response.status, await response.json()


async def state(front: Front) -> str:
    async with front.session.get("/admin/status") as response:
        instances = (await response.json())["models"]["demo"]["instances"]
    return str(instances[0]["state"]) if instances else "gone"


@pytest.fixture
async def front(front_of: Any) -> Front:
    made: Front = await front_of(idle=NEVER)
    return made


async def test_commands_take_an_engine_up_and_down(front: Front) -> None:
    status, answer = await command(front, "models/demo/wake")
    assert (status, answer["done"], answer["found"], answer["instance"]) == (200, True, "stopped", "demo-1")
    assert set(answer["wake"]["stages"]) >= {"start", "load"}
    status, answer = await command(front, "models/demo/wake")
    assert (status, answer["found"], answer["wake"]) == (200, "ready", None)
    status, answer = await command(front, "models/demo/suspend")
    assert status == 200
    assert answer["instances"] == [{"id": "demo-1", "found": "ready", "to": "suspended", "done": True}]
    assert await state(front) == "suspended"
    status, answer = await command(front, "models/demo/suspend")
    assert answer["instances"] == [{"id": "demo-1", "found": "suspended", "to": "suspended", "done": True}]
    response, _ = await front.post("/v1/completions", ASK)
    assert response.headers["x-warmpool-tier"] == "suspended"
    status, answer = await command(front, "models/demo/stop", instance="demo-1")
    assert (status, answer["done"], await state(front)) == (200, True, "gone")
    assert (await command(front, "models/demo/stop"))[1]["instances"] == []


async def test_a_command_need_not_be_waited_for(front: Front) -> None:
    status, answer = await command(front, "models/demo/wake", wait=False)
    assert (status, answer["done"]) == (202, False)
    assert await state(front) == "waking"
    assert (await command(front, "models/demo/wake"))[1]["instance"] == "demo-1"
    status, answer = await command(front, "models/demo/suspend", wait=False)
    assert (status, answer["instances"][0]["done"]) == (202, False)
    assert (await command(front, "models/demo/suspend"))[0] == 200
    assert await state(front) == "suspended"


async def test_a_stream_is_never_cut(front: Front) -> None:
    async with front.session.post("/v1/completions", json=HELD) as stream:
        first = await stream.content.readany()
        status, answer = await command(front, "models/demo/suspend")
        assert (status, answer["error"]["code"]) == (409, "conflict")
        assert "demo-1 is answering 1 requests" in answer["error"]["message"]
        going = asyncio.create_task(command(front, "models/demo/suspend", when_busy="wait"))
        async with asyncio.timeout(PATIENCE_S):
            while await state(front) != "retiring":
                await asyncio.sleep(0.02)
        assert not going.done()
        await front.release()
        text = first + await stream.content.read()
    assert text.rstrip().endswith(b"data: [DONE]")
    assert (await going)[0] == 200
    assert await state(front) == "suspended"


async def test_a_client_that_leaves_does_not_take_its_command_back(front: Front) -> None:
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(0.05):
            await command(front, "models/demo/wake")
    async with asyncio.timeout(PATIENCE_S):
        while await state(front) != "ready":
            await asyncio.sleep(0.02)


async def test_drain_and_admit(front: Front) -> None:
    await command(front, "models/demo/wake")
    status, answer = await command(front, "models/demo/drain")
    assert (status, answer) == (200, {"model": "demo", "command": "drain", "done": True})
    response, body = await front.post("/v1/completions", ASK)
    assert (response.status, error_of(body)["code"]) == (503, "draining")
    assert (await command(front, "models/demo/wake"))[0] in (200, 503)
    assert (await command(front, "models/demo/undrain"))[0] == 200
    assert (await front.post("/v1/completions", ASK))[0].status == 200
    assert (await command(front, "drain"))[0] == 200
    async with front.session.get("/ready") as ready:
        assert ready.status == 503
    assert (await front.post("/v1/completions", ASK))[0].status == 503
    assert (await command(front, "undrain"))[0] == 200
    assert (await front.post("/v1/completions", ASK))[0].status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "said"),
    [
        ("models/none/wake", {}, 404, "model_not_found", "none"),
        (
            "models/demo/explode",
            {},
            404,
            "not_found",
            "wake, pause, unpause, suspend, checkpoint, stop, drain, undrain",
        ),
        ("models/demo/suspend", {"instance": "demo-9"}, 404, "instance_not_found", "there are: none"),
        ("models/demo/suspend", {"instances": 3}, 400, "invalid_request", "Fields: wait, instance, when_busy"),
        ("models/demo/suspend", {"when_busy": "cut"}, 400, "invalid_request", "when_busy"),
        ("models/demo/wake", {"wait": "yes"}, 400, "invalid_request", "wait"),
        ("drain", {"wait": 1}, 400, "invalid_request", "wait"),
    ],
)
async def test_what_cannot_be_done_says_why(
    front: Front, path: str, body: dict[str, Any], status: int, code: str, said: str
) -> None:
    answered, answer = await command(front, path, **body)
    error = error_of(orjson.dumps(answer))
    assert (answered, error["code"]) == (status, code)
    assert said in error["message"]


async def test_another_sites_form_gives_no_commands(front: Front) -> None:
    for data in ("{}", {"wait": "false"}):
        async with front.session.post("/admin/models/demo/wake", data=data) as response:
            assert response.status == 415
            assert error_of(await response.read())["code"] == "unsupported_media_type"
    async with front.session.get("/admin/models/demo/wake") as response:
        assert response.status == 405
    assert await state(front) == "gone"


async def test_status_has_memory_and_times(front: Front) -> None:
    for _ in range(2):
        await front.post("/v1/completions", {**ASK, "stream": True})
        await front.post("/v1/completions", ASK)  # has no first token
    async with front.session.get("/admin/status") as response:
        status = await response.json()
    assert status["ttft"]["demo"]["ready"]["count"] == 1
    assert 0 < status["ttft"]["demo"]["stopped"]["p50_s"] < PATIENCE_S
    assert status["memory"]["host"]["total_bytes"] > status["memory"]["host"]["available_bytes"] > 0
    checkpoints = status["memory"]["checkpoints"]
    assert checkpoints["reserve_bytes"] == 256 << 20
    assert checkpoints["total_bytes"] >= checkpoints["free_bytes"]
    assert status["wakes"][0]["model"] == "demo"


# --- events ---


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    """Name and data of each event; comments as ("", text)."""
    async for line in response.content:
        text = line.decode().rstrip("\n")
        if text.startswith(":"):
            yield "", text
        elif text.startswith("event: "):
            name = text.removeprefix("event: ")
            data = (await response.content.readline()).decode()
            yield name, orjson.loads(data.removeprefix("data: "))


def patched(old: Any, patch: Any) -> Any:
    """RFC 7386, as a client would do it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = patched(result.get(name), value)
    return result


async def models_of(front: Front) -> Any:
    async with front.session.get("/admin/status") as response:
        return (await response.json())["models"]


async def test_events_begin_with_a_snapshot_and_follow_every_change(front: Front) -> None:
    async with front.session.get("/admin/events") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        stream = events(response)
        name, status = await anext(stream)
        assert (name, status["models"]["demo"]["tier"]) == ("snapshot", "stopped")
        assert status["now_unix_s"] > 0
        going = asyncio.create_task(command(front, "models/demo/wake"))
        async with asyncio.timeout(PATIENCE_S):
            while status["models"]["demo"]["tier"] != "ready":
                name, change = await anext(stream)
                assert name == "change"
                status = patched(status, change)
        await going
        async with front.session.get("/admin/events") as second:
            _, late = await anext(events(second))
        assert late["models"]["demo"]["tier"] == "ready"
        # What memory it was seen to hold may come a moment later.
        async with asyncio.timeout(PATIENCE_S):
            while (now := await models_of(front)) != status["models"]:
                name, change = await anext(stream)
                status = patched(status, change) if name == "change" else status
        assert now["demo"]["tier"] == "ready"


async def test_events_end_with_the_server(front_of: Any) -> None:
    front: Front = await front_of(idle=NEVER)
    async with front.session.get("/admin/events") as response:
        stream = events(response)
        await anext(stream)
        closing = asyncio.create_task(front.service.close(2.0))
        async with asyncio.timeout(PATIENCE_S):
            assert [event async for event in stream if event[0]] == []
        await closing


async def test_events_end_when_the_server_begins_to_stop_and_hold_it_up_no_longer(front: Front) -> None:
    async with front.session.get("/admin/events") as response:
        stream = events(response)
        await anext(stream)
        front.pool.begin_stop()
        async with asyncio.timeout(PATIENCE_S):
            async for _ in stream:
                pass
    async with front.session.get("/admin/events") as response:
        assert response.status == 503


async def test_a_status_that_cannot_be_read_ends_the_streams_and_the_next_one_works(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("no status")

    async with front.session.get("/admin/events") as response, asyncio.timeout(PATIENCE_S):
        stream = events(response)
        await anext(stream)
        monkeypatch.setattr(front.pool, "status_in_turns", broken)
        front.pool.tick()
        async for _ in stream:
            pass
    assert "no status" in caplog.text
    monkeypatch.undo()
    async with front.session.get("/admin/events") as response:
        assert (await anext(events(response)))[0] == "snapshot"


async def test_quiet_streams_say_that_they_are_alive(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_events, "HEARTBEAT_S", 0.05)
    async with front.session.get("/admin/events") as response, asyncio.timeout(PATIENCE_S):
        async for name, text in events(response):
            if not name:
                assert text == ": still here"
                break


async def test_there_is_an_end_to_listeners(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_events, "MAX_LISTENERS", 1)
    async with front.session.get("/admin/events") as first:
        await anext(events(first))
        async with front.session.get("/admin/events") as second:
            assert second.status == 429


async def test_a_listener_that_does_not_read_gets_a_new_snapshot_instead() -> None:
    hub = Events(lambda: asyncio.sleep(0, {}), lambda _: lambda: None)
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(admin_events.QUEUE_LENGTH)
    hub._queues.add(queue)
    for number in range(admin_events.QUEUE_LENGTH + 1):
        hub._send(b"event: change\ndata: {}\n\n", or_else={"number": number})
    event = queue.get_nowait()
    assert event is not None
    assert event.startswith(b'event: snapshot\ndata: {"number":%d,' % admin_events.QUEUE_LENGTH)
    assert queue.empty()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"a": 1}),
        ({"a": 1, "b": 2}, {"a": 1}),
        ({"a": {"b": 1, "c": [1]}}, {"a": {"b": 1, "c": [2]}}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {}}}),
        ({"a": 1}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": 1}),
    ],
)
def test_a_patch_turns_the_old_into_the_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    patch = merge_patch(old, new)
    assert patched(old, patch) == new
    assert merge_patch(new, new) == {}
