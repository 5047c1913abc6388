"""Use counted over restarts, and checkpoints brought back in the background after one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import RuntimeFailure
from proxy.pool.usage import HALF_LIFE_S, Usage
from tests.fakes import Rig, settle

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}
MODELS = {key: {"idle": SECONDS} for key in ("a", "b", "c")}


class Wall:
    now = 1e9

    def __call__(self) -> float:
        return self.now


# --- use ---


def test_counts_halve_every_week_and_survive(tmp_path: Path) -> None:
    wall = Wall()
    usage = Usage(tmp_path / "usage.json", wall)
    for model in ("a", "a", "a", "b", "b"):
        usage.note(model)
    assert usage.ranking() == ["a", "b"]
    wall.now += HALF_LIFE_S
    usage.note("b")
    assert usage.count("a") == pytest.approx(1.5)
    assert usage.count("b") == pytest.approx(2.0)
    usage.save()
    again = Usage(tmp_path / "usage.json", wall)
    again.load()
    assert again.ranking() == ["b", "a"]
    assert again.count("never") == 0.0
    assert [p.name for p in tmp_path.iterdir()] == ["usage.json"]


async def test_each_request_counts_once_however_many_are_counted_together() -> None:
    """At the latest with the next decision, or when the pool stops."""
    rig = Rig(MODELS)
    usage = rig.pool._state.usage = Usage()
    await rig.pool.open()
    (await rig.pool.lease("a")).release()
    for _ in range(5):
        lease = rig.pool.try_lease("a")
        assert lease is not None
        lease.release()
    rig.pool.tick()
    assert usage.count("a") == pytest.approx(6.0, abs=1e-3)
    assert rig.pool._state.models["a"].demand.count(rig.clock()) == pytest.approx(6.0, abs=0.1)
    held = [rig.pool.try_lease("a") for _ in range(3)]
    rig.pool.begin_stop()
    assert usage.count("a") == pytest.approx(9.0, abs=1e-3)
    for lease in held:
        assert lease is not None
        lease.release()
    await rig.pool.close()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": ["x", 1]}', '{"a": []}'])
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "usage.json").write_text(content)
    usage = Usage(tmp_path / "usage.json")
    usage.load()
    assert usage.ranking() == []
    assert "counting begins anew" in caplog.text


async def test_counts_are_written_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    usage = Usage(tmp_path / "usage.json")
    keeper = asyncio.create_task(usage.keep_saved(3600.0))
    usage.note("a")
    while not (tmp_path / "usage.json").exists():
        await asyncio.sleep(0.001)  # a model that is new is saved at once
    before = (tmp_path / "usage.json").read_bytes()
    usage.note("a")
    usage.note("a")
    await settle()
    assert (tmp_path / "usage.json").read_bytes() == before
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
    after = Usage(tmp_path / "usage.json")
    after.load()
    assert after.count("a") == pytest.approx(3.0)
    often = asyncio.create_task(usage.keep_saved(0.001))
    usage.note("a")
    while (tmp_path / "usage.json").read_bytes() == before:
        await asyncio.sleep(0.001)
    often.cancel()
    await asyncio.gather(often, return_exceptions=True)
    Usage(tmp_path / "nowhere" / "usage.json").save()


# --- bringing back ---


def used(*models: str) -> Usage:
    """The first one most."""
    usage = Usage()
    for count, model in enumerate(reversed(models), 1):
        for _ in range(count):
            usage.note(model)
    return usage


async def rig_with(usage: Usage, models: dict[str, Any] = MODELS, **pool: Any) -> Rig:
    rig = Rig(models, shares_images=True, **pool)
    rig.pool._state.usage = usage
    await rig.pool.open()
    return rig


async def finish(rig: Rig, usage: Usage) -> None:
    async with asyncio.timeout(10):
        await rig.pool.prewarm(usage)
    await settle()


async def test_the_models_used_most_are_checkpointed_again_and_no_others() -> None:
    usage = used("b", "c", "a")
    rig = await rig_with(usage, prewarm=2)
    await finish(rig, usage)
    assert rig.states() == {"b-1": "checkpointed", "c-1": "checkpointed"}
    assert rig.runtime.processes == {}
    assert usage.ranking() == ["b", "c", "a"], "that was no use"
    await rig.pool.close()


async def test_checkpoints_that_an_upgrade_has_made_useless_are_made_anew_however_many() -> None:
    usage = used("b")
    rig = Rig(MODELS, shares_images=True, prewarm=1)
    rig.pool._state.usage = usage
    rig.runtime.lost = {"a", "b"}
    await rig.pool.open()
    await finish(rig, usage)
    assert rig.states() == {"a-1": "checkpointed", "b-1": "checkpointed"}
    await rig.pool.close()


async def test_models_that_were_never_used_are_left_alone() -> None:
    rig = await rig_with(used("gone"))
    await finish(rig, used("gone"))
    assert rig.states() == {}
    await rig.pool.close()


@pytest.mark.parametrize("entry", [{"min_ready": 1}, {"idle": {"checkpointed": "never"}}])
async def test_models_that_are_not_to_be_checkpointed_are_left_alone(entry: dict[str, Any]) -> None:
    usage = used("a")
    rig = await rig_with(usage, {"a": {"idle": SECONDS, **entry}})
    await settle()
    before = rig.states()
    await finish(rig, usage)
    assert rig.states() == before
    await rig.pool.close()


async def archived_rig() -> Rig:
    """A pool that finds its model's checkpoint in the archive, and its container."""
    old = await rig_with(used("a"), {"a": {"idle": {**SECONDS, "archived": "40s"}}})
    async with await old.pool.lease("a"):
        pass
    for _ in range(4):
        await old.pass_time(10)
    await old.pool.close()
    rig = Rig({"a": {"idle": SECONDS}}, shares_images=True)
    rig.runtime.inherit(old.runtime, keep=True)
    await rig.pool.open()
    assert rig.states() == {"a-1": "archived"}
    return rig


async def test_an_archived_checkpoint_comes_back_without_a_start() -> None:
    rig = await archived_rig()
    await finish(rig, used("a"))
    assert rig.states() == {"a-1": "checkpointed"}
    assert (rig.runtime.calls["start"], rig.runtime.calls["unarchive_image"]) == (0, 1)
    await rig.pool.close()


async def test_a_request_meanwhile_waits_for_the_same_image() -> None:
    rig = await archived_rig()
    gate = rig.runtime.gates["unarchive_image"] = asyncio.Event()
    work = asyncio.create_task(rig.pool.prewarm(used("a")))
    await settle()

    async def ask() -> None:
        async with await rig.pool.lease("a"):
            pass

    request = asyncio.create_task(ask())
    await settle()
    gate.set()
    await asyncio.gather(work, request)
    assert rig.runtime.calls["unarchive_image"] == 1
    assert rig.states() == {"a-1": "ready"}
    await rig.pool.close()


async def test_one_that_is_in_use_is_not_sent_down() -> None:
    usage = used("a")
    rig = await rig_with(usage)
    gate = rig.runtime.gates["health"] = asyncio.Event()
    work = asyncio.create_task(rig.pool.prewarm(usage))
    await settle()
    request = asyncio.create_task(rig.pool.lease("a"))
    await settle()
    gate.set()
    await work
    (await request).release()
    assert rig.states() == {"a-1": "ready"}
    await rig.pool.close()


async def test_requests_of_others_go_first() -> None:
    usage = used("a")
    rig = await rig_with(usage)
    gate = rig.runtime.gates["health"] = asyncio.Event()
    request = asyncio.create_task(rig.pool.lease("b"))
    await settle()
    work = asyncio.create_task(rig.pool.prewarm(usage))
    await settle()
    assert set(rig.states()) == {"b-1"}
    gate.set()
    (await request).release()
    await work
    assert rig.states() == {"a-1": "checkpointed", "b-1": "ready"}
    await rig.pool.close()


async def test_nothing_steps_down_for_it() -> None:
    usage = used("a")
    rig = await rig_with(usage, max_awake=1)
    async with await rig.pool.lease("b"):
        pass
    work = asyncio.create_task(rig.pool.prewarm(usage))
    await settle()
    assert rig.states() == {"b-1": "ready"}
    await rig.pass_time(10)
    await work
    assert rig.states() == {"a-1": "checkpointed", "b-1": "sleeping"}
    await rig.pool.close()


async def test_a_failure_is_logged_and_the_next_model_tried(caplog: pytest.LogCaptureFixture) -> None:
    usage = used("b", "a")
    rig = await rig_with(usage)
    rig.runtime.failures["start"] = [RuntimeFailure("start", "no such image")]
    await finish(rig, usage)
    assert "b: its checkpoint cannot be brought back" in caplog.text
    assert rig.states() == {"a-1": "checkpointed"}
    await rig.pool.close()


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_copy_goes_to_the_archive_when_a_checkpoint_is_written(wanted: bool) -> None:
    usage = used("a")
    rig = await rig_with(usage, archive_copies=wanted)
    rig.runtime.failures["copy_to_archive"] = []
    await finish(rig, usage)
    assert rig.runtime.calls["copy_to_archive"] == int(wanted)
    await rig.pool.close()
