"""What the pool relies on of a client that pauses its engine: the same for the real one and for the tests' fake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from proxy.engine.kinds.vllm import VllmClient
from proxy.errors import EngineError
from proxy.telemetry.stages import Stages
from tests.engine.test_engine import start
from tests.fakes import FakeEngine, FakeRuntime
from tests.support import engine_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from proxy.engine.client import EngineClient

__all__ = ["start"]

EXTENSION = ("--worker-extension-cls", "proxy.engine.vllm_extension.warmpool_vllm.Worker")


@pytest.fixture(params=["the fake one", "the real one"])
async def client(
    request: pytest.FixtureRequest, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EngineClient]:
    """Of an engine that can pause."""
    if request.param == "the fake one":
        runtime = FakeRuntime()
        runtime.can_pause = True
        yield cast("EngineClient", FakeEngine(runtime, await runtime.start("demo-1", "demo", engine_settings())))
        return
    monkeypatch.setenv("WARMPOOL_WEIGHTS", str(tmp_path))
    made = VllmClient((await start("--sleep-mode", *EXTENSION)).url, "demo")
    yield made
    await made.disconnect()


async def test_it_takes_a_copy_of_the_weights(client: EngineClient) -> None:
    assert await client.can_pause() == "without a copy of its weights"
    await client.save_weights()
    assert await client.can_pause() == "yes"


async def test_it_is_paused_until_it_is_unpaused(client: EngineClient) -> None:
    await client.save_weights()
    assert await client.is_paused() is False
    assert await client.pause(Stages()) > 0
    assert await client.is_paused() is True
    assert await client.healthy("/health"), "it answers meanwhile"
    assert await client.unpause(Stages())
    assert await client.is_paused() is False
    assert await client.canary() is not None


async def test_both_ways_may_be_asked_for_again(client: EngineClient) -> None:
    await client.save_weights()
    assert await client.unpause(Stages()), "one that never was paused"
    await client.pause(Stages())
    await client.pause(Stages())
    assert await client.unpause(Stages())
    assert await client.unpause(Stages())
    await client.end_pauses()
    assert await client.is_paused() is False


async def test_an_engine_that_knows_no_pauses_says_so(start: Any) -> None:
    for options, paused in (((), None), (("--sleep-mode",), False)):
        client = VllmClient((await start(*options)).url, "demo")
        assert await client.is_paused() is paused
        assert await client.can_pause() == "never"
        with pytest.raises(EngineError):
            await client.pause(Stages())
        await client.disconnect()
    fake = FakeEngine(runtime := FakeRuntime(), await runtime.start("demo-1", "demo", engine_settings()))
    assert await fake.can_pause() == "never"
