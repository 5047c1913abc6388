"""How long an instance stays ready because somebody asked for it, and what makes no room for others; on fakes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from proxy.config.values import lies_in
from tests.fakes import Rig, settle
from tests.pool.test_pool import SECONDS, rig_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["rig_of"]

GIB = 1 << 30
NEVER = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}


async def ask(rig: Rig, *keeps: float | None, model: str = "demo") -> None:
    """Requests at once, that end in this order, each with its wish."""
    leases = [await rig.pool.lease(model) for _ in keeps]
    for lease, keep_s in zip(leases, keeps, strict=True):
        lease.keep_s = keep_s
        lease.release()
    await settle()


@pytest.mark.parametrize(
    ("keeps", "ready_for"),
    [
        ((None,), 10), ((60,), 60), ((5,), 10), ((60, None), 60), ((None, 60), 60), ((60, 20), 60), ((20, 60), 60),
        ((60, 0), 60), ((0, None), 10), ((7200,), 3600), ((3600.0,), 3600),
    ],
)  # fmt: skip
async def test_the_longest_wish_counts_up_to_the_limit(
    rig_of: Any, keeps: Sequence[float | None], ready_for: float
) -> None:
    rig: Rig = await rig_of()
    await ask(rig, *keeps)
    await rig.pass_time(ready_for - 1)
    assert rig.states() == {"demo-1": "ready"}
    await rig.pass_time(1.1)
    assert rig.states() != {"demo-1": "ready"}


async def test_a_later_request_does_not_shorten_an_earlier_wish(rig_of: Any) -> None:
    rig: Rig = await rig_of()
    await ask(rig, 60)
    await rig.pass_time(30)
    await ask(rig, None)
    await rig.pass_time(25)
    assert rig.states() == {"demo-1": "ready"}
    await rig.pass_time(6)
    assert rig.states() != {"demo-1": "ready"}


async def test_who_needs_it_no_longer_frees_its_gpu_at_once(rig_of: Any) -> None:
    rig: Rig = await rig_of()
    await ask(rig, 0)
    for _ in range(3):
        await rig.pass_time(0.1)
    assert rig.states() == {"demo-1": "suspended"}
    await rig.pass_time(29)
    assert rig.states() == {"demo-1": "suspended"}, "from there on its timetable counts"
    await ask(rig, None)
    await rig.pass_time(9)
    assert rig.states() == {"demo-1": "ready"}


async def test_a_model_may_not_look_at_wishes(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": SECONDS, "max_keep_alive": "never"}})
    await ask(rig, 60, 0)
    await rig.pass_time(9)
    assert rig.states() == {"demo-1": "ready"}
    await rig.pass_time(1.1)
    assert rig.states() != {"demo-1": "ready"}


@pytest.mark.parametrize("ready_before", [False, True])
async def test_a_command_to_wake_keeps_it_as_long_as_it_says(rig_of: Any, ready_before: bool) -> None:
    rig: Rig = await rig_of()
    if ready_before:
        await ask(rig, None)
    await rig.pool.wake("demo", keep_s=9000)
    await rig.pass_time(8999)
    assert rig.states() == {"demo-1": "ready"}
    await rig.pass_time(2)
    assert rig.states() != {"demo-1": "ready"}


async def test_a_kept_instance_makes_room_all_the_same(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": SECONDS}, "other": {}}, max_awake=1)
    await ask(rig, 3000)
    await ask(rig, None, model="other")
    await rig.until(other_1="ready")
    assert rig.states()["demo-1"] != "ready"


# --- what makes no room ---


def at(hour: int, minute: int = 0) -> float:
    """A time of today, as Unix time."""
    return time.mktime((*time.localtime()[:3], hour, minute, 0, 0, 0, -1))


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("places", [{"max_awake": 1}, {"takes": {"a": (60 * GIB, GIB), "b": (60 * GIB, GIB)}}])
async def test_what_is_not_evictable_keeps_its_place_and_the_other_waits(
    rig_of: Any, places: dict[str, Any], busy: bool
) -> None:
    models = {
        "a": {"idle": NEVER, "evictable": ["18:00-07:00"], "gpu_memory": "60GiB"},
        "b": {"idle": NEVER, "gpu_memory": "60GiB", "max_wait": "5s"},
    }
    now = [at(12)]
    rig: Rig = await rig_of(models, unix_s=lambda: now[0], **places)
    lease = await rig.pool.lease("a")
    if not busy:
        lease.release()
    other = asyncio.create_task(rig.pool.lease("b"))
    await settle()
    for _ in range(5):
        await rig.pass_time(30)
    assert rig.states()["a-1"] == "ready"
    assert not other.done()
    now[0] = at(18, 1)
    lease.release()
    for _ in range(5):
        await rig.pass_time(61)
    (await asyncio.wait_for(other, 5)).release()
    assert rig.states()["a-1"] != "ready"


@pytest.mark.parametrize(
    ("times", "minute", "inside"),
    [("08:00-18:00", 8 * 60, True), ("08:00-18:00", 18 * 60, False), ("22:00-06:30", 0, True),
     ("22:00-06:30", 6 * 60 + 30, False), ("22:00-06:30", 22 * 60, True), ("00:00-24:00", 1439, True)],
)  # fmt: skip
def test_times_of_the_day(times: str, minute: int, inside: bool) -> None:
    assert lies_in(times, minute) is inside
