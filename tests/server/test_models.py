"""`/v1/models`: what an engine says of its model, and the configuration."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from proxy.checkpoint.manifest import Details
from proxy.engine.client import EngineClient
from proxy.tiers import Tier
from tests.fakes import Rig
from tests.pool.test_pool import rig_of, use
from tests.served import ASK
from tests.support import get_json

if TYPE_CHECKING:
    from tests.front import Front

__all__ = ["rig_of"]

INFO = {"description": "For code", "context": 32768, "tags": ["fast", "small"]}
SECONDS = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}


async def test_the_length_is_learnt_from_the_engine_and_the_status_follows_it(front_of: Any) -> None:
    front: Front = await front_of("--max-model-len", "777", info=INFO, aliases=["gpt"])
    before = await get_json(f"{front.url}/v1/models/demo")
    assert (before["status"], before["meta"]) == ({"value": "unloaded"}, INFO)
    assert "max_model_len" not in before
    response, _ = await front.post("/v1/completions", ASK)
    assert response.status == 200
    for listed in (await get_json(f"{front.url}/v1/models"))["data"]:
        assert (listed["status"], listed["max_model_len"]) == ({"value": "loaded"}, 777), listed["id"]


async def test_a_model_that_wakes_is_loading(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {}})
    assert rig.pool.listed("demo")["status"] == {"value": "unloaded"}
    gate = rig.runtime.gates["start"] = asyncio.Event()
    request = asyncio.create_task(use(rig))
    await rig.until(demo_1="waking")
    assert rig.pool.listed("demo")["status"] == {"value": "loading"}
    gate.set()
    await request
    assert rig.pool.listed("demo")["status"] == {"value": "loaded"}
    assert "meta" not in rig.pool.listed("demo")


@pytest.mark.parametrize("shares_images", [True, False])
async def test_the_length_is_kept_with_the_checkpoint(shares_images: bool) -> None:
    rig = Rig({"demo": {"idle": SECONDS}}, shares_images=shares_images)
    rig.runtime.max_model_len = 4096
    await rig.pool.open()
    await use(rig)
    for _ in range(3):
        await rig.pass_time(10)
    assert rig.states() == {"demo-1": "checkpointed"}
    details = next(iter(rig.runtime.images.there.values())).facts.details
    assert Details.model_validate(details).max_model_len == 4096
    await rig.pool.close()
    heir = Rig({"demo": {"idle": SECONDS}}, shares_images=shares_images)
    heir.runtime.inherit(rig.runtime, keep=True)
    await heir.pool.open()
    assert heir.pool.tier("demo") is Tier.CHECKPOINTED
    assert heir.pool.listed("demo")["max_model_len"] == 4096
    await heir.pool.close()


async def test_an_engine_that_runs_already_is_asked_when_it_is_adopted() -> None:
    rig = Rig({"demo": {}}, shares_images=True)
    rig.runtime.leaves = True
    await rig.pool.open()
    await use(rig)
    await rig.pool.close()
    heir = Rig({"demo": {}}, shares_images=True)
    heir.runtime.max_model_len = 512
    heir.runtime.inherit(rig.runtime, keep=True)
    await heir.pool.open()
    assert heir.pool.listed("demo")["max_model_len"] == 512
    await heir.pool.close()


@pytest.mark.parametrize(
    "said",
    [b"", b"[]", b'{"data":1}', b'{"data":[{"id":"other","max_model_len":5}]}', b'{"data":[{"id":"demo"}]}',
     b'{"data":[{"id":"demo","max_model_len":true}]}', b'{"data":[{"id":"demo","max_model_len":-1}]}',
     b'{"data":["demo",{"id":"demo","max_model_len":"9"}]}'],
)  # fmt: skip
async def test_what_is_no_length_is_none(said: bytes) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=said)

    app = web.Application()
    app.router.add_get("/v1/models", answer)
    async with TestServer(app) as server:
        client = EngineClient(str(server.make_url("")).rstrip("/"), "demo")
        assert await client.max_model_len() is None
        await client.disconnect()
