"""An engine that is not vLLM on its way down and up, by nothing but its configuration."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.front import Front
from tests.support import PATIENCE_S, engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

IDLE = {"sleeping": "100ms", "suspended": "never", "checkpointed": "never"}
ASK = {"model": "demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
SLEEPS: dict[str, Any] = {"sleep": {"path": "/sleep?level=1"}, "wake_up": {"path": "/wake_up"}}


@pytest.fixture
async def front_of(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Front]]]:
    """Opens proxies with one model, `demo`."""
    opened: list[Front] = []

    async def open_(**entry: Any) -> Front:
        front = Front(tmp_path, {"demo": engine_model(idle=IDLE, engine="generic", **entry)})
        opened.append(front)
        await front.open()
        return front

    yield open_
    for front in opened:
        await front.close()


async def answer(front: Front) -> tuple[str, str]:
    response, body = await front.post("/v1/completions", ASK)
    assert response.status == 200, body
    return response.headers["x-warmpool-tier"], orjson.loads(body)["choices"][0]["text"]


async def until(front: Front, state: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while [i["state"] for i in front.pool.status()["models"]["demo"]["instances"]] != [state]:
            await asyncio.sleep(0.01)


async def test_it_sleeps_and_wakes_as_its_configuration_says(front_of: Any) -> None:
    front: Front = await front_of(**SLEEPS)
    _, text = await answer(front)
    await until(front, "sleeping")
    assert (await front.engine_state())["sleep_level"] == 1
    assert await answer(front) == ("sleeping", text)
    assert (await front.engine_state())["sleep_level"] == 0


async def test_what_is_not_given_is_not_a_tier(front_of: Any) -> None:
    """Though this engine has vLLM's endpoints, which nobody named."""
    front: Front = await front_of()
    await answer(front)
    (instance,) = next(iter(front.pool._state.models.values())).instances.values()
    assert [tier.label for tier in instance.barred] == ["sleeping"]


async def test_one_that_refuses_to_sleep_serves_on(front_of: Any) -> None:
    front: Front = await front_of(**{**SLEEPS, "sleep": {"path": "/no-such"}, "asleep": {"path": "/is_sleeping"}})
    _tier, text = await answer(front)
    async with asyncio.timeout(PATIENCE_S):
        while not any(i["state"] == "ready" for i in front.pool.status()["models"]["demo"]["instances"]):
            await asyncio.sleep(0.01)
    assert (await answer(front))[1] == text
    assert (await front.engine_state())["sleep_level"] == 0
