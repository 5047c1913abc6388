"""The accounting of GPU memory: what is learned, what is charged, what is foreign, what is grown; no GPU, no pool."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.gpu.nvml import GpuMemory
from proxy.pool.gpu_accounting import EMPTY, READY, SLEEPING, GpuAccounting, beyond, plus
from proxy.pool.instance import Instance, State
from proxy.pool.model_view import view_of
from proxy.tiers import Tier
from tests.fake_cuda import GIB

MIB = 1 << 20


def gpu(index: int = 0, *, used: int = 0) -> GpuMemory:
    return GpuMemory(index, "NVIDIA H100", f"GPU-{index}", 80 * GIB, used)


def instance(state: State, *, model: str = "a", number: int = 1) -> Instance:
    one = Instance(f"{model}-{number}", model)
    one.state = state
    return one


def accounting(*gpus: GpuMemory, creep: int = 0) -> GpuAccounting:
    made = GpuAccounting(creep)
    made.read(gpus or [gpu()], [], settled=True)
    return made


def test_arithmetic_is_done_gpu_by_gpu() -> None:
    assert plus({"x": 1}, {"x": 2, "y": 3}) == {"x": 3, "y": 3}
    assert beyond({"x": 5, "y": 1, "z": 2}, {"x": 2, "y": 1}) == {"x": 3, "z": 2}


# --- what a model needs ---


def test_the_last_run_is_believed_before_the_manifest_and_that_before_the_setting() -> None:
    one = accounting()
    assert one.need("a") is None
    one.configure("a", 70 * GIB, [0])
    assert one.need("a") == {"GPU-0": 70 * GIB}
    one.learn("a", {"ready": {"GPU-0": 60 * GIB}, "sleeping": {"GPU-0": 2 * GIB}})
    assert (one.need("a"), one.asleep("a")) == ({"GPU-0": 60 * GIB}, {"GPU-0": 2 * GIB})
    one.record(instance(State.READY), {"GPU-0": 61 * GIB})
    one.record(instance(State.SLEEPING), {"GPU-0": 3 * GIB})
    assert (one.need("a"), one.asleep("a")) == ({"GPU-0": 61 * GIB}, {"GPU-0": 3 * GIB})
    one.learn("a", {"ready": {"GPU-0": GIB}})
    assert one.need("a") == {"GPU-0": 61 * GIB}, "a manifest does not undo what was seen"
    assert one.figures("a") == {"ready": {"GPU-0": 61 * GIB}, "sleeping": {"GPU-0": 3 * GIB}}
    assert one.figures("b") == {}


@pytest.mark.parametrize(
    "figures",
    [None, 7, [], {}, {"ready": None}, {"ready": {}}, {"ready": {"GPU-0": "1"}}, {"ready": {"GPU-0": True}},
     {"ready": {"GPU-0": -1}}, {"ready": {"GPU-0": 1.5}}],
)  # fmt: skip
def test_a_manifest_that_says_something_else_teaches_nothing(figures: Any) -> None:
    one = accounting()
    one.learn("a", figures)
    assert not one.knows("a", READY)
    assert one.need("a") is None


def test_an_image_of_another_host_means_the_only_gpu_or_none_of_several() -> None:
    figures = {"ready": {"GPU-elsewhere": 60 * GIB}}
    only, several = accounting(), accounting(gpu(0), gpu(1))
    for one in (only, several):
        one.learn("a", figures)
    assert only.need("a") == {"GPU-0": 60 * GIB}
    assert several.need("a") is None
    several.learn("b", {"ready": {"GPU-elsewhere": 1, "GPU-1": 2}})
    assert several.need("b") == {"GPU-1": 2}


def test_a_setting_names_gpus_by_index_and_those_that_are_not_there_count_for_nothing() -> None:
    one = accounting(gpu(0), gpu(1))
    one.configure("a", GIB, [1, 5])
    one.configure("b", GIB, [5])
    assert one.need("a") == {"GPU-1": GIB}
    assert one.need("b") is None
    assert one.load([]).needs == {"a": {"GPU-1": GIB}}


def test_a_model_with_other_engines_learns_nothing_from_those_that_go() -> None:
    one = accounting()
    one.configure("a", 70 * GIB, [0])
    going = instance(State.READY)
    one.record(going, {"GPU-0": 60 * GIB})
    one.unlearn("a")
    one.configure("a", None, [0])
    one.record(going, {"GPU-0": 61 * GIB}, outgoing=True)
    assert (one.need("a"), one.charge(going)) == (None, {"GPU-0": 61 * GIB})
    one.record(instance(State.READY, number=2), {"GPU-0": 20 * GIB})
    assert one.need("a") == {"GPU-0": 20 * GIB}


def test_an_empty_reading_of_an_engine_is_not_believed() -> None:
    one = accounting()
    ready = instance(State.READY)
    one.record(ready, {"GPU-0": GIB})
    one.record(ready, {})
    assert (one.need("a"), one.charge(ready)) == ({"GPU-0": GIB}, {"GPU-0": GIB})


# --- what an instance holds ---


def known() -> GpuAccounting:
    one = accounting()
    one.learn("a", {"ready": {"GPU-0": 60 * GIB}, "sleeping": {"GPU-0": 2 * GIB}})
    return one


@pytest.mark.parametrize(
    ("state", "now", "after"),
    [
        (State.NEW, 0, 0), (State.WAKING, 60, 60), (State.READY, 60, 60), (State.RETIRING, 60, 60),
        (State.FALLING_ASLEEP, 60, 2), (State.SLEEPING, 2, 2), (State.SUSPENDED, 0, 0), (State.CHECKPOINTED, 0, 0),
        (State.ARCHIVED, 0, 0), (State.CLONING, 0, 0), (State.STOPPING, 0, 0),
    ],
)  # fmt: skip
def test_what_was_never_measured_is_charged_what_its_model_is_known_for(state: State, now: int, after: int) -> None:
    one = instance(state)
    load = known().load([one])
    assert sum(load.now["a-1"].values()) == now * GIB
    assert sum(load.after["a-1"].values()) == after * GIB


@pytest.mark.parametrize("state", [State.SUSPENDING, State.CHECKPOINTING, State.STOPPING, State.BROKEN])
def test_what_leaves_the_gpu_is_charged_until_it_has_left(state: State) -> None:
    one, accounts = instance(State.READY), known()
    accounts.record(one, {"GPU-0": 61 * GIB})
    one.state = state
    load = accounts.load([one])
    assert (load.now["a-1"], load.after["a-1"]) == ({"GPU-0": 61 * GIB}, {})


def test_a_tier_that_was_reached_is_charged_as_expected_until_it_is_measured() -> None:
    one, accounts = instance(State.READY), known()
    accounts.record(one, {"GPU-0": 61 * GIB})
    one.state = State.SLEEPING
    accounts.arrived(one, Tier.SLEEPING)
    assert accounts.charge(one) == {"GPU-0": 2 * GIB}
    one.state = State.SUSPENDED
    accounts.arrived(one, Tier.SUSPENDED)
    assert accounts.charge(one) == {}
    accounts.record(one, {"GPU-0": 4 * MIB})
    assert accounts.charge(one) == {"GPU-0": 4 * MIB}
    one.state = State.WAKING
    assert accounts.charge(one) == {"GPU-0": 61 * GIB}
    one.state = State.READY
    accounts.woke(one)
    assert accounts.charge(one) == {"GPU-0": 61 * GIB}
    accounts.forget(one.id)
    assert accounts.cycles(one) == 0


def test_where_suspending_frees_nothing_a_suspended_engine_is_charged() -> None:
    one, accounts = instance(State.SUSPENDED), known()
    accounts.suspending_frees = False
    accounts.record(one, {"GPU-0": 60 * GIB})
    load = accounts.load([one])
    assert load.now["a-1"] == {"GPU-0": 60 * GIB}
    assert load.held_on(Tier.SUSPENDED, view_of(one)) == {"GPU-0": 2 * GIB}
    assert load.held_on(Tier.CHECKPOINTED, view_of(one)) == {}
    one.state = State.SUSPENDING
    assert accounts.load([one]).after["a-1"] == {"GPU-0": 60 * GIB}


# --- what is foreign ---


def test_what_none_of_ours_holds_is_no_room_for_anybody() -> None:
    one, accounts = instance(State.READY), accounting()
    assert accounting(gpu(used=5 * GIB)).foreign == {"GPU-0": 5 * GIB}
    accounts.record(one, {"GPU-0": 60 * GIB})
    accounts.read([gpu(used=63 * GIB)], [(one, {"GPU-0": 60 * GIB})], settled=True)
    assert accounts.foreign == {"GPU-0": 3 * GIB}
    assert accounts.load([one]).capacity == {"GPU-0": 77 * GIB}
    assert accounts.charged([one]) == {"GPU-0": 60 * GIB}


def test_while_something_moves_what_is_foreign_stays_as_it_was() -> None:
    accounts = accounting(gpu(used=2 * GIB))
    accounts.read([gpu(used=40 * GIB)], [(instance(State.WAKING), {"GPU-0": 10 * GIB})], settled=False)
    assert accounts.foreign == {"GPU-0": 2 * GIB}
    assert accounts.gpus[0].used_bytes == 40 * GIB


def test_where_processes_cannot_be_told_apart_an_engine_is_not_foreign_to_itself() -> None:
    accounts = accounting()
    accounts.configure("a", 60 * GIB, [0])
    accounts.read([gpu(used=61 * GIB)], [(instance(State.READY), {})], settled=True)
    assert accounts.foreign == {"GPU-0": GIB}


def test_without_a_reading_the_policy_sees_no_gpu() -> None:
    accounts = GpuAccounting(0)
    accounts.configure("a", GIB, [0])
    assert accounts.load([instance(State.READY)]) is EMPTY


# --- growth ---


def test_an_engine_that_grows_beyond_the_limit_is_grown_until_it_begins_anew() -> None:
    one, accounts = instance(State.READY), accounting(creep=512 * MIB)
    for cycle in range(8):
        accounts.record(one, {"GPU-0": 60 * GIB + cycle * 100 * MIB})
        accounts.woke(one)
        assert not accounts.grown(one)
    assert (accounts.cycles(one), accounts.growth_bytes(one)) == (8, 500 * MIB)
    accounts.record(one, {"GPU-0": 60 * GIB + 800 * MIB})
    assert accounts.grown(one)
    assert [accounts.newly_grown(one), accounts.newly_grown(one)] == [True, False]
    accounts.began(one)
    assert (accounts.grown(one), accounts.cycles(one), accounts.growth_bytes(one)) == (False, 0, 0)
    accounts.record(one, {"GPU-0": 60 * GIB})
    assert accounts.need("a") == {"GPU-0": 60 * GIB}, "what had crept in is forgotten"


def test_what_requests_take_is_no_growth_but_is_needed() -> None:
    one, accounts = instance(State.READY), accounting(creep=512 * MIB)
    for cycle in range(5):
        just_woken = 63 if cycle == 2 else 60  # the first request was large
        for count in (just_woken, 63, 64, 64):
            accounts.record(one, {"GPU-0": count * GIB})
        accounts.woke(one)
    assert accounts.growth_bytes(one) == 0
    assert accounts.need("a") == {"GPU-0": 64 * GIB}


def test_an_engine_without_sleep_mode_keeps_what_its_first_requests_took() -> None:
    one, accounts = instance(State.READY), accounting(creep=512 * MIB)
    one.barred.add(Tier.SLEEPING)
    for _ in range(5):
        for count in (60 if accounts.cycles(one) == 0 else 64, 64):
            accounts.record(one, {"GPU-0": count * GIB})
        accounts.woke(one)
    assert accounts.growth_bytes(one) == 0
    for _ in range(3):
        accounts.record(one, {"GPU-0": 65 * GIB})
        accounts.woke(one)
    assert accounts.growth_bytes(one) == GIB


def test_what_it_leaves_behind_asleep_counts_too_and_zero_is_any_amount() -> None:
    one, accounts, free = instance(State.SLEEPING), accounting(creep=512 * MIB), accounting()
    for count in (2 * GIB, 3 * GIB, 3 * GIB, 3 * GIB):
        accounts.record(one, {"GPU-0": count})
        free.record(one, {"GPU-0": count})
    assert (accounts.grown(one), free.grown(one)) == (True, False)
    assert accounts.knows("a", SLEEPING)
    assert not accounts.newly_grown(instance(State.READY, number=2))


def test_a_leak_is_more_than_noise() -> None:
    one, accounts = instance(State.READY), known()
    accounts.record(one, {"GPU-0": 61 * GIB})
    expected = accounts.expected(one, Tier.SLEEPING)
    assert expected == {"GPU-0": 2 * GIB}
    one.state = State.SLEEPING
    accounts.record(one, {"GPU-0": 2 * GIB + 10 * MIB})
    assert accounts.leaked_bytes(one, expected) == 0
    accounts.record(one, {"GPU-0": 3 * GIB})
    assert accounts.leaked_bytes(one, expected) == GIB
    assert accounts.expected(one, Tier.SLEEPING) == {"GPU-0": 3 * GIB}, "one that rests is expected to stay as it is"
    assert accounts.expected(one, Tier.SUSPENDED) == {}
