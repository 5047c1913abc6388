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

    async def make(
        before: Rig | None = None, takes: float = 30, idle: dict[str, str] | None = None, **places: tuple[int, ...]
    ) -> Rig:
        probes = LadderProbes(tmp_path / "probes.json")
        probes.load()
        rig = Rig(
            {key: {"idle": idle or LADDER} for key in places},
            takes={key: (int(takes * GIB), GIB) for key in places},
            places=places,
            probes=probes,
            shares_images=True,
        )
        if before is not None:
            rig.runtime.inherit(before.runtime, keep=True)
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
