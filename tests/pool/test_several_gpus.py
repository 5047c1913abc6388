"""Engines on two GPUs, on fakes: tried before their suspends and checkpoints are relied on, evicted, swapped."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import Fault, RuntimeFailure
from proxy.runtime.ladder_probes import LadderProbes
from proxy.tiers import Tier
from tests.fake_cuda import GIB
from tests.fakes import Rig, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    RigOf = Callable[..., Coroutine[Any, Any, Rig]]

LADDER = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}
NOT_SUPPORTED = "CUDA: restore of process 7: CUDA_ERROR_NOT_SUPPORTED"


@pytest.fixture
async def rig_of(tmp_path: Path) -> AsyncIterator[RigOf]:
    """Makes opened rigs with two GPUs of 80 GiB, and their probes in one file; at the end counts what is left."""
    rigs: list[Rig] = []

    async def make(takes: float = 30, each: dict[str, Any] | None = None, **places: tuple[int, ...]) -> Rig:
        probes = LadderProbes(tmp_path / "probes.json")
        probes.load()
        rig = Rig(
            {key: {"idle": LADDER, **(each or {})} for key in places},
            takes={key: (int(takes * GIB), GIB) for key in places},
            places=places,
            probes=probes,
            shares_images=True,
        )
        rigs.append(rig)
        await rig.pool.open()
        return rig

    yield make
    for rig in rigs:
        await rig.pool.close()
        assert rig.nvml.held == rig.nvml.held_on_second == {}
        rig.gpus.close()
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def use(rig: Rig, model: str) -> Tier:
    """A request that is answered at once; the tier that it found."""
    async with await rig.pool.lease(model) as lease:
        tier = lease.wake.found if lease.wake is not None else Tier.READY
    await settle()
    return tier


def status(rig: Rig, model: str = "wide") -> dict[str, Any]:
    found: dict[str, Any] = rig.pool.status()["models"][model]
    return found


async def idle(rig: Rig, until_s: float) -> None:
    for _ in range(int(until_s / 10) + 1):
        await rig.pass_time(10.5)
        async with asyncio.timeout(5):
            await rig.pool.settled()
        await settle()


async def test_an_engine_on_several_gpus_is_tried_once_and_keeps_its_ladder(rig_of: RigOf) -> None:
    rig = await rig_of(wide=(0, 1))
    await use(rig, "wide")
    await idle(rig, 10)
    assert rig.states() == {"wide-1": "suspended"}
    assert rig.runtime.calls["resume"] == 1, "the trial's"
    assert rig.runtime.calls["canary"] == 2
    await idle(rig, 10)
    assert rig.states() == {"wide-1": "checkpointed"}
    assert rig.runtime.calls["restore"] == 1, "the trial's"
    assert await use(rig, "wide") is Tier.CHECKPOINTED
    await idle(rig, 30)
    assert rig.states() == {"wide-1": "checkpointed"}
    assert (rig.runtime.calls["restore"], rig.runtime.calls["resume"]) == (2, 1), "once"
    assert status(rig)["missing_tiers"] == {}


async def test_an_engine_on_one_gpu_is_not_tried(rig_of: RigOf) -> None:
    rig = await rig_of(narrow=(1,))
    await use(rig, "narrow")
    await idle(rig, 30)
    assert rig.states() == {"narrow-1": "checkpointed"}
    assert (rig.runtime.calls["restore"], rig.runtime.calls["resume"]) == (0, 0)


async def test_one_that_does_not_come_back_costs_that_engine_and_its_tiers(rig_of: RigOf) -> None:
    rig = await rig_of(wide=(0, 1))
    await use(rig, "wide")
    rig.runtime.failures["resume"] = [RuntimeFailure("resume", NOT_SUPPORTED)]
    await idle(rig, 20)
    assert rig.states() == {}
    assert rig.runtime.images.there == {}
    found = status(rig)
    assert found["tiers"] == ["sleeping"]
    assert found["missing_tiers"].keys() == {"suspended", "checkpointed", "archived"}
    assert "CUDA_ERROR_NOT_SUPPORTED" in found["missing_tiers"]["suspended"]
    assert await use(rig, "wide") is Tier.STOPPED
    await idle(rig, 60)
    assert rig.states() == {"wide-1": "sleeping"}, "the tier that is left"
    assert rig.runtime.calls["suspend"] == 1
    assert await use(rig, "wide") is Tier.SLEEPING

    again = await rig_of(wide=(0, 1))
    assert status(again)["tiers"] == ["sleeping"], "kept over a restart"
    await use(again, "wide")
    await idle(again, 60)
    assert again.states() == {"wide-1": "sleeping"}

    other = await rig_of(wide=(0, 1))
    other.runtime.fingerprint = "610.12"
    await use(other, "wide")
    await idle(other, 60)
    assert other.states() == {"wide-1": "checkpointed"}, "another driver, another trial"
    assert status(other)["missing_tiers"] == {}


async def test_one_that_answers_differently_after_its_trial_is_left_without_it(rig_of: RigOf) -> None:
    rig = await rig_of(wide=(0, 1))
    await use(rig, "wide")
    rig.engines["wide-1"].answer = "nonsense"
    await idle(rig, 20)
    assert rig.states() == {}
    assert "answers differently" in status(rig)["missing_tiers"]["suspended"]


async def test_an_image_that_does_not_come_back_is_set_aside(rig_of: RigOf) -> None:
    rig = await rig_of(wide=(0, 1))
    await use(rig, "wide")
    rig.runtime.failures["restore"] = [RuntimeFailure("restore", NOT_SUPPORTED, fault=Fault.IMAGE)]
    await idle(rig, 40)
    assert rig.states() == {}
    assert rig.runtime.images.quarantined.keys() == {"wide"}
    assert status(rig)["tiers"] == ["sleeping", "suspended"]
    assert status(rig)["missing_tiers"].keys() == {"checkpointed", "archived"}
    await use(rig, "wide")
    await idle(rig, 60)
    assert rig.states() == {"wide-1": "suspended"}


@pytest.mark.parametrize("alive", [True, False])
async def test_what_the_host_could_not_do_says_nothing_about_the_engine(rig_of: RigOf, alive: bool) -> None:
    rig = await rig_of(wide=(0, 1))
    await use(rig, "wide")
    reason = "the lock was late" if alive else "CUDA_ERROR_OUT_OF_MEMORY"
    rig.runtime.failures["suspend"] = [RuntimeFailure("suspend", reason, alive=alive)]
    await idle(rig, 20)
    assert rig.states() == ({"wide-1": "sleeping"} if alive else {})
    assert status(rig)["missing_tiers"] == {}
    if not alive:
        await use(rig, "wide")
    await idle(rig, 120)
    assert rig.states() == {"wide-1": "checkpointed"}, "tried again"


async def test_a_trial_waits_for_room(rig_of: RigOf) -> None:
    rig = await rig_of(wide=(0, 1), narrow=(1,), takes=60)
    await use(rig, "narrow")
    await idle(rig, 10)
    await use(rig, "wide")
    await idle(rig, 0)
    assert rig.states()["wide-1"] == "sleeping"
    async with await rig.pool.lease("narrow"):
        await idle(rig, 30)
        assert rig.states()["wide-1"] == "sleeping"
        assert rig.runtime.calls["resume"] == 0
    await idle(rig, 120)
    assert rig.states()["wide-1"] == "checkpointed"


async def test_a_file_that_says_nothing_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    one = LadderProbes(path)
    await one.note("wide", "a", Tier.SUSPENDED, "no")
    for content in (b"", b"{", b'{"wide": 3}', b'{"wide": {"engine": "a", "results": {"nowhere": ""}}}'):
        path.write_bytes(content)
        two = LadderProbes(path)
        with contextlib.suppress(FileNotFoundError):
            two.load()
        assert two.missing("wide") == {}
    await one.note("other", "b", Tier.CHECKPOINTED, "no")
    three = LadderProbes(path)
    three.load()
    assert three.missing("wide").keys() == {Tier.SUSPENDED, Tier.CHECKPOINTED, Tier.ARCHIVED}
    assert three.missing("other").keys() == {Tier.CHECKPOINTED, Tier.ARCHIVED}
    await three.started("wide", "a")
    assert three.missing("wide")
    await three.started("wide", "another")
    assert three.missing("wide") == {}


async def until(rig: Rig, **states: str) -> None:
    await rig.until(**states)
    async with asyncio.timeout(5):
        await rig.pool.settled()
    await settle()


async def test_an_engine_on_two_gpus_and_two_on_one_each_take_turns(rig_of: RigOf) -> None:
    rig = await rig_of(wide=(0, 1), left=(0,), right=(1,), takes=60)
    for key in ("wide", "left", "right"):  # what they need is learned
        await use(rig, key)
        await idle(rig, 60)
    for _ in range(2):
        await use(rig, "wide")
        assert status(rig)["gpu_need_bytes"] == {"GPU-1": 60 * GIB, "GPU-2": 60 * GIB}
        await use(rig, "left")
        await until(rig, left_1="ready")
        assert rig.states()["wide-1"] in ("sleeping", "suspended", "checkpointed")
        await use(rig, "right")
        await until(rig, left_1="ready", right_1="ready")
        await use(rig, "wide")
        await until(rig, wide_1="ready")
        assert not {"ready"} & {rig.states()["left-1"], rig.states()["right-1"]}, "both made room"


async def test_an_image_goes_to_the_gpu_that_has_room_and_home_when_there_is_room(rig_of: RigOf) -> None:
    rig = await rig_of(one=(0,), other=(0,), takes=50)
    await use(rig, "one")
    await idle(rig, 40)
    assert rig.states() == {"one-1": "checkpointed"}
    async with await rig.pool.lease("other"):
        await settle()
        async with await rig.pool.lease("one"):
            await settle()
            assert rig.states() == {"one-1": "ready", "other-1": "ready"}, "nobody made room"
            assert rig.runtime.restored_on["one-1"] == {"GPU-1": "GPU-2"}
            assert status(rig, "one")["instances"][0]["gpu_bytes"] == {"GPU-2": 50 * GIB}
            assert status(rig, "one")["gpu_need_bytes"] == {"GPU-1": 50 * GIB}, "what is learned is of its image's GPU"
    await rig.pass_time(12)
    await until(rig, one_1="sleeping")
    assert await use(rig, "one") is Tier.SLEEPING
    assert status(rig, "one")["instances"][0]["gpu_bytes"] == {"GPU-2": 50 * GIB}, "where it is it stays"
    await idle(rig, 40)
    assert set(rig.states().values()) == {"checkpointed"}
    await use(rig, "one")
    assert rig.runtime.restored_on["one-1"] == {}
    assert status(rig, "one")["instances"][0]["gpu_bytes"] == {"GPU-1": 50 * GIB}


@pytest.mark.parametrize("reason", ["named", "driver"])
async def test_a_model_that_names_its_gpus_stays_there(rig_of: RigOf, reason: str) -> None:
    named = {"process": {"command": ["engine", "{port}"], "env": {"CUDA_VISIBLE_DEVICES": "0"}}}
    rig = await rig_of(one=(0,), other=(0,), takes=50, each=named if reason == "named" else None)
    if reason == "driver":
        rig.pool._state.gpu_accounting.can_move = False
    await use(rig, "one")
    await idle(rig, 40)
    await use(rig, "other")
    await use(rig, "one")
    await until(rig, one_1="ready")
    assert rig.runtime.restored_on["one-1"] == {}
    assert rig.states()["other-1"] != "ready", "it made room"


async def test_two_instances_of_one_image_are_on_two_gpus(rig_of: RigOf) -> None:
    rig = await rig_of(one=(0,), takes=50, each={"max_instances": 2, "max_concurrency": 1})
    await use(rig, "one")
    await idle(rig, 40)
    await until(rig, one_1="checkpointed", one_2="checkpointed")
    async with await rig.pool.lease("one"), await rig.pool.lease("one"):
        await settle()
        assert rig.states() == {"one-1": "ready", "one-2": "ready"}
        assert sorted(map(str, (rig.runtime.restored_on[i] for i in ("one-1", "one-2")))) == [
            str({"GPU-1": "GPU-2"}),
            str({}),
        ]
    await idle(rig, 40)
    assert set(rig.states().values()) == {"checkpointed"}
