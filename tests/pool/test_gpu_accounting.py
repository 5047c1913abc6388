"""The GPU memory ledger: what is learned, what is charged, what is foreign, what is worn; without a GPU or a pool."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.gpu.nvml import GpuMemory
from proxy.pool.gpu_accounting import EMPTY, READY, SLEEPING, GpuLedger, beyond, plus
from proxy.pool.instance import Instance, State
from proxy.pool.view import view_of
from proxy.tiers import Tier
from tests.fake_cuda import GIB

MIB = 1 << 20


def gpu(index: int = 0, *, used: int = 0) -> GpuMemory:
    return GpuMemory(index, "NVIDIA H100", f"GPU-{index}", 80 * GIB, used)


def instance(state: State, *, model: str = "a", number: int = 1) -> Instance:
    one = Instance(f"{model}-{number}", model)
    one.state = state
    return one


def ledger(*gpus: GpuMemory, creep: int = 0) -> GpuLedger:
    made = GpuLedger(creep)
    made.read(gpus or [gpu()], [], settled=True)
    return made


def test_arithmetic_is_done_gpu_by_gpu() -> None:
    assert plus({"x": 1}, {"x": 2, "y": 3}) == {"x": 3, "y": 3}
    assert beyond({"x": 5, "y": 1, "z": 2}, {"x": 2, "y": 1}) == {"x": 3, "z": 2}


# --- what a model needs ---


def test_the_last_run_is_believed_before_the_manifest_and_that_before_the_setting() -> None:
    one = ledger()
    assert one.need("a") is None
    one.configure("a", 70 * GIB, [0])
    assert one.need("a") == {"GPU-0": 70 * GIB}
    one.learn("a", {"ready": {"GPU-0": 60 * GIB}, "sleeping": {"GPU-0": 2 * GIB}})
    assert (one.need("a"), one.asleep("a")) == ({"GPU-0": 60 * GIB}, {"GPU-0": 2 * GIB})
    one.weigh(instance(State.READY), {"GPU-0": 61 * GIB})
    one.weigh(instance(State.SLEEPING), {"GPU-0": 3 * GIB})
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
    one = ledger()
    one.learn("a", figures)
    assert not one.knows("a", READY)
    assert one.need("a") is None


def test_an_image_of_another_host_means_the_only_gpu_or_none_of_several() -> None:
    figures = {"ready": {"GPU-elsewhere": 60 * GIB}}
    only, several = ledger(), ledger(gpu(0), gpu(1))
    for one in (only, several):
        one.learn("a", figures)
    assert only.need("a") == {"GPU-0": 60 * GIB}
    assert several.need("a") is None
    several.learn("b", {"ready": {"GPU-elsewhere": 1, "GPU-1": 2}})
    assert several.need("b") == {"GPU-1": 2}


def test_a_setting_names_gpus_by_index_and_those_that_are_not_there_count_for_nothing() -> None:
    one = ledger(gpu(0), gpu(1))
    one.configure("a", GIB, [1, 5])
    one.configure("b", GIB, [5])
    assert one.need("a") == {"GPU-1": GIB}
    assert one.need("b") is None
    assert one.load([]).needs == {"a": {"GPU-1": GIB}}


def test_a_model_with_other_engines_learns_nothing_from_those_that_go() -> None:
    one = ledger()
    one.configure("a", 70 * GIB, [0])
    going = instance(State.READY)
    one.weigh(going, {"GPU-0": 60 * GIB})
    one.unlearn("a")
    one.configure("a", None, [0])
    one.weigh(going, {"GPU-0": 61 * GIB}, outgoing=True)
    assert (one.need("a"), one.charge(going)) == (None, {"GPU-0": 61 * GIB})
    one.weigh(instance(State.READY, number=2), {"GPU-0": 20 * GIB})
    assert one.need("a") == {"GPU-0": 20 * GIB}


def test_an_empty_reading_of_an_engine_is_not_believed() -> None:
    one = ledger()
    ready = instance(State.READY)
    one.weigh(ready, {"GPU-0": GIB})
    one.weigh(ready, {})
    assert (one.need("a"), one.charge(ready)) == ({"GPU-0": GIB}, {"GPU-0": GIB})


# --- what an instance holds ---


def known() -> GpuLedger:
    one = ledger()
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
def test_what_was_never_weighed_is_charged_what_its_model_is_known_for(state: State, now: int, after: int) -> None:
    one = instance(state)
    load = known().load([one])
    assert sum(load.now["a-1"].values()) == now * GIB
    assert sum(load.after["a-1"].values()) == after * GIB


@pytest.mark.parametrize("state", [State.SUSPENDING, State.CHECKPOINTING, State.STOPPING, State.BROKEN])
def test_what_leaves_the_gpu_is_charged_until_it_has_left(state: State) -> None:
    one, book = instance(State.READY), known()
    book.weigh(one, {"GPU-0": 61 * GIB})
    one.state = state
    load = book.load([one])
    assert (load.now["a-1"], load.after["a-1"]) == ({"GPU-0": 61 * GIB}, {})


def test_a_tier_that_was_reached_is_charged_as_expected_until_it_is_weighed() -> None:
    one, book = instance(State.READY), known()
    book.weigh(one, {"GPU-0": 61 * GIB})
    one.state = State.SLEEPING
    book.arrived(one, Tier.SLEEPING)
    assert book.charge(one) == {"GPU-0": 2 * GIB}
    one.state = State.SUSPENDED
    book.arrived(one, Tier.SUSPENDED)
    assert book.charge(one) == {}
    book.weigh(one, {"GPU-0": 4 * MIB})
    assert book.charge(one) == {"GPU-0": 4 * MIB}
    one.state = State.WAKING
    assert book.charge(one) == {"GPU-0": 61 * GIB}
    one.state = State.READY
    book.woke(one)
    assert book.charge(one) == {"GPU-0": 61 * GIB}
    book.forget(one.id)
    assert book.cycles(one) == 0


def test_where_suspending_frees_nothing_a_suspended_engine_is_charged() -> None:
    one, book = instance(State.SUSPENDED), known()
    book.suspending_frees = False
    book.weigh(one, {"GPU-0": 60 * GIB})
    load = book.load([one])
    assert load.now["a-1"] == {"GPU-0": 60 * GIB}
    assert load.held_on(Tier.SUSPENDED, view_of(one)) == {"GPU-0": 2 * GIB}
    assert load.held_on(Tier.CHECKPOINTED, view_of(one)) == {}
    one.state = State.SUSPENDING
    assert book.load([one]).after["a-1"] == {"GPU-0": 60 * GIB}


# --- what is foreign ---


def test_what_none_of_ours_holds_is_no_room_for_anybody() -> None:
    one, book = instance(State.READY), ledger()
    assert ledger(gpu(used=5 * GIB)).foreign == {"GPU-0": 5 * GIB}
    book.weigh(one, {"GPU-0": 60 * GIB})
    book.read([gpu(used=63 * GIB)], [(one, {"GPU-0": 60 * GIB})], settled=True)
    assert book.foreign == {"GPU-0": 3 * GIB}
    assert book.load([one]).capacity == {"GPU-0": 77 * GIB}
    assert book.charged([one]) == {"GPU-0": 60 * GIB}


def test_while_something_moves_what_is_foreign_stays_as_it_was() -> None:
    book = ledger(gpu(used=2 * GIB))
    book.read([gpu(used=40 * GIB)], [(instance(State.WAKING), {"GPU-0": 10 * GIB})], settled=False)
    assert book.foreign == {"GPU-0": 2 * GIB}
    assert book.gpus[0].used_bytes == 40 * GIB


def test_where_processes_cannot_be_told_apart_an_engine_is_not_foreign_to_itself() -> None:
    book = ledger()
    book.configure("a", 60 * GIB, [0])
    book.read([gpu(used=61 * GIB)], [(instance(State.READY), {})], settled=True)
    assert book.foreign == {"GPU-0": GIB}


def test_without_a_reading_the_policy_sees_no_gpu() -> None:
    book = GpuLedger(0)
    book.configure("a", GIB, [0])
    assert book.load([instance(State.READY)]) is EMPTY


# --- growth ---


def test_an_engine_that_grows_beyond_the_limit_is_worn_until_it_begins_anew() -> None:
    one, book = instance(State.READY), ledger(creep=512 * MIB)
    for cycle in range(8):
        book.weigh(one, {"GPU-0": 60 * GIB + cycle * 100 * MIB})
        book.woke(one)
        assert not book.grown(one)
    assert (book.cycles(one), book.growth_bytes(one)) == (8, 500 * MIB)
    book.weigh(one, {"GPU-0": 60 * GIB + 800 * MIB})
    assert book.grown(one)
    assert [book.newly_grown(one), book.newly_grown(one)] == [True, False]
    book.began(one)
    assert (book.grown(one), book.cycles(one), book.growth_bytes(one)) == (False, 0, 0)
    book.weigh(one, {"GPU-0": 60 * GIB})
    assert book.need("a") == {"GPU-0": 60 * GIB}, "what had crept in is forgotten"


def test_what_requests_take_is_no_growth_but_is_needed() -> None:
    one, book = instance(State.READY), ledger(creep=512 * MIB)
    for cycle in range(5):
        just_woken = 63 if cycle == 2 else 60  # the first request was large
        for count in (just_woken, 63, 64, 64):
            book.weigh(one, {"GPU-0": count * GIB})
        book.woke(one)
    assert book.growth_bytes(one) == 0
    assert book.need("a") == {"GPU-0": 64 * GIB}


def test_an_engine_without_sleep_mode_keeps_what_its_first_requests_took() -> None:
    one, book = instance(State.READY), ledger(creep=512 * MIB)
    one.barred.add(Tier.SLEEPING)
    for _ in range(5):
        for count in (60 if book.cycles(one) == 0 else 64, 64):
            book.weigh(one, {"GPU-0": count * GIB})
        book.woke(one)
    assert book.growth_bytes(one) == 0
    for _ in range(3):
        book.weigh(one, {"GPU-0": 65 * GIB})
        book.woke(one)
    assert book.growth_bytes(one) == GIB


def test_what_it_leaves_behind_asleep_counts_too_and_zero_is_any_amount() -> None:
    one, book, free = instance(State.SLEEPING), ledger(creep=512 * MIB), ledger()
    for count in (2 * GIB, 3 * GIB, 3 * GIB, 3 * GIB):
        book.weigh(one, {"GPU-0": count})
        free.weigh(one, {"GPU-0": count})
    assert (book.grown(one), free.grown(one)) == (True, False)
    assert book.knows("a", SLEEPING)
    assert not book.newly_grown(instance(State.READY, number=2))


def test_a_leak_is_more_than_noise() -> None:
    one, book = instance(State.READY), known()
    book.weigh(one, {"GPU-0": 61 * GIB})
    expected = book.expected(one, Tier.SLEEPING)
    assert expected == {"GPU-0": 2 * GIB}
    one.state = State.SLEEPING
    book.weigh(one, {"GPU-0": 2 * GIB + 10 * MIB})
    assert book.leaked_bytes(one, expected) == 0
    book.weigh(one, {"GPU-0": 3 * GIB})
    assert book.leaked_bytes(one, expected) == GIB
    assert book.expected(one, Tier.SLEEPING) == {"GPU-0": 3 * GIB}, "one that rests is expected to stay as it is"
    assert book.expected(one, Tier.SUSPENDED) == {}
