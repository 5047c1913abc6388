"""Who is asked for its own metrics, and when."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from proxy.pool import engine_scrape
from proxy.tiers import Tier
from tests.fakes import Rig, settle
from tests.pool.test_commands import NEVER
from tests.pool.test_pool import rig_of

if TYPE_CHECKING:
    from tests.fakes import FakeEngine


__all__ = ["rig_of"]


def text(count: int) -> bytes:
    return b"# TYPE vllm:x_total counter\nvllm:x_total %d\nvllm:gauge 1\n" % count


@pytest.fixture
async def rig(rig_of: Any, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Two models that have each an instance awake."""
    monkeypatch.setattr(engine_scrape, "_FRESH_S", 0.0)
    made: Rig = await rig_of({"a": {"idle": NEVER}, "b": {"idle": NEVER}})
    for name in ("a", "b"):
        async with await made.pool.lease(name):
            pass
    return made


def answers(engine: FakeEngine, asked: list[str], count: int, gate: asyncio.Event | None = None) -> None:
    async def metrics(most_bytes: int) -> bytes | None:
        asked.append(engine.engine.instance_id)
        if gate is not None:
            await gate.wait()
        return text(count)

    engine.metrics = metrics  # type: ignore[method-assign]


def shown(rig: Rig, model: str) -> float | None:
    return rig.metrics.registry.get_sample_value("vllm:x_total", {"model": model, "instance": f"{model}-1"})


async def test_one_that_steps_down_while_others_are_asked_is_not_asked_any_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection to it would be there when its processes are frozen."""
    monkeypatch.setattr(engine_scrape, "_AT_ONCE", 1)
    asked: list[str] = []
    gate = asyncio.Event()
    answers(rig.engines["a-1"], asked, 5, gate)
    answers(rig.engines["b-1"], asked, 7)
    scrape = asyncio.create_task(rig.pool.scrape_engines())
    await settle()
    assert asked == ["a-1"]
    rig.pool.step_down("b", Tier.SUSPENDED)
    await rig.until(b_1="suspended")
    assert asked == ["a-1", "b-1"], "once more, before it stepped down"
    gate.set()
    await scrape
    assert asked == ["a-1", "b-1"]
    assert (shown(rig, "a"), shown(rig, "b")) == (5.0, 7.0)
    assert rig.metrics.registry.get_sample_value("warmpool_engine_scrape_failures_total", {"model": "b"}) == 0
    await rig.pool.scrape_engines()
    assert asked == ["a-1", "b-1", "a-1"], "who sleeps is left alone"
    gauge = {"model": "b", "instance": "b-1"}
    assert rig.metrics.registry.get_sample_value("vllm:gauge", gauge) is None


async def test_what_a_checkpoint_has_counted_is_taken_off_each_engine_that_comes_from_it(rig: Rig) -> None:
    asked: list[str] = []
    answers(rig.engines["a-1"], asked, 100)
    await rig.pool.scrape_engines()
    for restored, total in ((104, 104), (103, 107)):
        rig.pool.step_down("a", Tier.CHECKPOINTED)
        await rig.until(a_1="checkpointed")
        answers(rig.engines["a-1"], asked, restored)
        async with await rig.pool.lease("a"):
            pass
        await rig.pool.scrape_engines()
        assert shown(rig, "a") == total


async def test_a_model_that_is_gone_and_other_names_are_forgotten(rig: Rig) -> None:
    asked: list[str] = []
    answers(rig.engines["a-1"], asked, 5)
    await rig.pool.scrape_engines()
    assert shown(rig, "a") == 5
    pool = rig.settings.pool.model_copy(update={"engine_metrics": ["sglang:"]})
    await rig.pool.reconfigure(rig.settings.model_copy(update={"pool": pool}))
    await rig.pool.scrape_engines()
    assert shown(rig, "a") is None


async def test_what_one_said_before_it_stepped_down_is_there_when_it_is_first_asked_for(rig: Rig) -> None:
    asked: list[str] = []
    answers(rig.engines["a-1"], asked, 5)
    rig.pool.step_down("a", Tier.SUSPENDED)
    await rig.until(a_1="suspended")
    await rig.pool.scrape_engines()
    assert (asked, shown(rig, "a")) == (["a-1"], 5)
