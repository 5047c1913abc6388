"""The pool and GPU memory, on fakes: who makes room for whom, leaks, growth, what manifests teach, NVML failing."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import pytest

from proxy.errors import RuntimeFailure
from proxy.pool import golden
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier
from tests.fake_cuda import GIB
from tests.fakes import Rig, ended, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

    from proxy.checkpoint.store import CheckpointStore
    from proxy.engine.client import EngineClient
    from proxy.pool.lease import Lease
    from proxy.runtime.base import EngineProcess, Runtime

    RigOf = Callable[..., Coroutine[Any, Any, Rig]]

MIB = 1 << 20
FOREIGN = 9
"""A process that is none of ours."""
LADDER = {"sleeping": "10s", "suspended": "20s", "checkpointed": "never"}
TO_TMPFS = {**LADDER, "checkpointed": "30s"}


@pytest.fixture
async def rig_of() -> AsyncIterator[RigOf]:
    """Makes opened rigs with a GPU; at the end closes them and counts what is left."""
    rigs: list[Rig] = []

    async def make(before: Rig | None = None, idle: dict[str, str] | None = None, **takes: tuple[float, float]) -> Rig:
        rig = Rig(
            {key: {"idle": idle or LADDER} for key in takes},
            takes={key: (int(ready * GIB), int(asleep * GIB)) for key, (ready, asleep) in takes.items()},
        )
        if before is not None:
            rig.runtime.inherit(before.runtime, keep=True)
        rig.nvml.held[FOREIGN] = 2 * GIB
        rigs.append(rig)
        await rig.pool.open()
        return rig

    yield make
    await ended(rigs)
    for rig in rigs:
        assert rig.nvml.held == {FOREIGN: 2 * GIB}
        rig.gpus.close()


class Silent:
    """Is told of stages, and says nothing."""

    def begins(self, stage: str) -> None:
        pass

    def ended(self, stage: str, seconds: float) -> None:
        pass


async def use(rig: Rig, model: str) -> Lease:
    """A request that comes and is answered at once; its ended lease, when everything has come to rest."""
    async with await rig.pool.lease(model) as lease:
        pass
    await settle()
    return lease


async def known(rig: Rig, *models: str) -> None:
    """Have every model run and sleep once, one after the other, and end up suspended."""
    for model in models:
        await use(rig, model)
        await rig.pass_time(10)
        await rig.pass_time(10)
        assert rig.states()[f"{model}-1"] == "suspended"


async def asking_until(step: str, rig: Rig) -> tuple[Rig, asyncio.Task[Lease]]:
    """A request for `b` while `a` is ready, which waits at a step of the runtime."""
    await known(rig, "a", "b")
    await use(rig, "a")
    rig.runtime.gates[step] = asyncio.Event()
    request = asyncio.create_task(use(rig, "b"))
    await settle()
    return rig, request


def metric(rig: Rig, name: str, **labels: str) -> float:
    return rig.metrics.registry.get_sample_value(name, labels) or 0.0


# --- making room ---


async def test_where_both_fit_if_one_sleeps_it_sleeps_and_is_suspended_behind(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(60, 2))
    await known(rig, "a", "b")
    await use(rig, "a")
    rig.runtime.gates["suspend"] = asyncio.Event()
    async with asyncio.timeout(5):
        lease = await use(rig, "b")
    assert lease.wake is not None
    assert list(lease.wake.stages)[:2] == ["evict", "resume"]
    assert rig.states() == {"a-1": "suspending", "b-1": "ready"}
    rig.runtime.gates["suspend"].set()
    await rig.until(a_1="suspended")


async def test_a_wake_is_not_slowed_by_the_suspend_of_the_one_that_made_room(rig_of: RigOf) -> None:
    rig, request = await asking_until("resume", await rig_of(a=(60, 2), b=(60, 2)))
    assert rig.states() == {"a-1": "sleeping", "b-1": "waking"}
    rig.runtime.gates.pop("resume").set()
    await request
    assert rig.states() == {"a-1": "suspended", "b-1": "ready"}


async def test_where_they_do_not_fit_even_then_the_other_is_suspended_first(rig_of: RigOf) -> None:
    rig, request = await asking_until("suspend", await rig_of(a=(60, 2), b=(77, 2)))
    assert rig.states() == {"a-1": "suspending", "b-1": "waking"}
    assert not request.done()
    rig.runtime.gates["suspend"].set()
    await request
    assert rig.states() == {"a-1": "suspended", "b-1": "ready"}


async def test_requests_that_alternate_find_room_every_time(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(60, 2))
    for _ in range(50):
        for model in ("a", "b"):
            await use(rig, model)
            assert sum(rig.nvml.held.values()) < 80 * GIB or rig.runtime.calls["start"] <= 2
    assert rig.runtime.calls["start"] == 2
    assert metric(rig, "warmpool_gpu_leaks_total", model="a") == 0
    assert metric(rig, "warmpool_wake_failures_total", model="a", tier="suspended") == 0


async def test_models_that_fit_together_leave_each_other_alone(rig_of: RigOf) -> None:
    rig = await rig_of(a=(30, 2), b=(40, 2))
    for _ in range(3):
        await use(rig, "a")
        await use(rig, "b")
    assert rig.states() == {"a-1": "ready", "b-1": "ready"}


async def test_of_three_models_the_longest_idle_makes_room_or_both_do(rig_of: RigOf) -> None:
    rig = await rig_of(a=(35, 2), b=(35, 2), c=(35, 2), d=(70, 2))
    await known(rig, "a", "b", "c", "d")
    await use(rig, "a")
    await use(rig, "b")
    assert rig.states() == {"a-1": "ready", "b-1": "ready", "c-1": "suspended", "d-1": "suspended"}
    rig.clock.now += 1
    await use(rig, "c")
    assert rig.states() == {"a-1": "suspended", "b-1": "ready", "c-1": "ready", "d-1": "suspended"}
    await use(rig, "d")
    assert rig.states() == {"a-1": "suspended", "b-1": "suspended", "c-1": "suspended", "d-1": "ready"}


async def test_one_that_sleeps_is_suspended_where_it_is_in_the_way(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 4), b=(76, 2))
    await known(rig, "a", "b")
    await use(rig, "a")
    await rig.pass_time(10)
    assert rig.states() == {"a-1": "sleeping", "b-1": "suspended"}
    await use(rig, "b")
    assert rig.states() == {"a-1": "suspended", "b-1": "ready"}


async def test_a_busy_one_is_never_cut_and_gives_way_after_switch_after(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(60, 2))
    await known(rig, "a", "b")
    busy = await rig.pool.lease("a")
    request = asyncio.create_task(use(rig, "b"))
    await settle()
    assert rig.states() == {"a-1": "ready", "b-1": "suspended"}
    await rig.pass_time(10)
    assert rig.states() == {"a-1": "retiring", "b-1": "suspended"}
    busy.release()
    await request
    assert rig.states() == {"a-1": "suspended", "b-1": "ready"}


async def test_a_need_that_is_not_known_evicts_nobody_and_is_learned(rig_of: RigOf) -> None:
    rig = await rig_of(a=(30, 2), b=(30, 2))
    await use(rig, "a")
    assert rig.pool.status()["models"]["b"]["gpu_need_bytes"] is None
    await use(rig, "b")
    assert rig.states() == {"a-1": "ready", "b-1": "ready"}
    assert rig.pool.status()["models"]["b"]["gpu_need_bytes"] == {"GPU-1": 30 * GIB}


async def test_what_the_configuration_says_counts_before_the_first_start() -> None:
    rig = Rig(
        {"a": {"gpu_memory": "60GiB"}, "b": {"gpu_memory": "60GiB", "gpus": [0]}},
        takes={"a": (60 * GIB, 2 * GIB), "b": (60 * GIB, 2 * GIB)},
    )
    await rig.pool.open()
    await use(rig, "a")
    await use(rig, "b")
    assert rig.states() == {"a-1": "suspended", "b-1": "ready"}
    await rig.pool.close()


async def test_other_programs_count(rig_of: RigOf) -> None:
    rig = await rig_of(a=(30, 2), b=(30, 2))
    await known(rig, "a", "b")
    await use(rig, "a")
    rig.nvml.held[FOREIGN] = 30 * GIB
    await rig.pool._moves.gpus.measure()
    await use(rig, "b")
    assert rig.states() == {"a-1": "suspended", "b-1": "ready"}
    rig.nvml.held[FOREIGN] = 2 * GIB


async def test_a_request_that_is_cancelled_while_room_is_made_leaves_nothing_behind(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(77, 2))
    await known(rig, "a", "b")
    await use(rig, "a")
    rig.runtime.gates["suspend"] = asyncio.Event()
    request = asyncio.create_task(use(rig, "b"))
    await settle()
    request.cancel()
    with suppress(asyncio.CancelledError):
        await request
    rig.runtime.gates["suspend"].set()
    await rig.until(a_1="suspended", b_1="ready")
    assert rig.pool.status()["leases"] == 0


async def test_closing_while_room_is_made_leaves_nothing(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(77, 2))
    await known(rig, "a", "b")
    await use(rig, "a")
    rig.runtime.gates["suspend"] = asyncio.Event()
    request = asyncio.create_task(use(rig, "b"))
    await settle()
    await rig.pool.close()
    with suppress(Exception):
        await request
    assert rig.runtime.processes == {}


# --- leaks ---


async def test_a_victim_that_keeps_its_memory_is_stopped_and_counted(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(70, 2))
    await known(rig, "a", "b")
    await use(rig, "a")
    rig.runtime.leaks["a-1"] = 20 * GIB
    await use(rig, "b")
    assert rig.states() == {"b-1": "ready"}, "without a checkpoint it is gone"
    assert metric(rig, "warmpool_gpu_leaks_total", model="a") == 1
    assert metric(rig, "warmpool_wake_failures_total", model="b", tier="suspended") == 0
    assert sum(rig.nvml.held.values()) == 72 * GIB
    rig.runtime.leaks.clear()
    await use(rig, "a")
    assert rig.states() == {"a-1": "ready", "b-1": "suspended"}


async def test_one_with_a_checkpoint_goes_down_to_it(rig_of: RigOf) -> None:
    rig = await rig_of(idle=TO_TMPFS, a=(60, 2), b=(77, 2))
    await known(rig, "a", "b")
    await rig.pass_time(10)
    assert rig.states() == {"a-1": "checkpointed", "b-1": "checkpointed"}
    await use(rig, "a")
    rig.runtime.leaks["a-1"] = 10 * GIB
    await use(rig, "b")
    assert rig.states() == {"a-1": "checkpointed", "b-1": "ready"}
    assert metric(rig, "warmpool_gpu_leaks_total", model="a") == 1


async def test_little_more_than_expected_is_no_leak_and_neither_is_memory_of_others(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(77, 2))
    await known(rig, "a", "b")
    await use(rig, "a")
    rig.runtime.leaks["a-1"] = 30 * MIB
    rig.nvml.held[FOREIGN] = 4 * GIB
    await use(rig, "b")
    assert rig.states() == {"a-1": "suspended", "b-1": "ready"}
    assert metric(rig, "warmpool_gpu_leaks_total", model="a") == 0
    rig.nvml.held[FOREIGN] = 2 * GIB


async def test_a_leak_that_the_runtime_sees_itself_is_counted(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2))
    await known(rig, "a")
    await use(rig, "a")
    rig.runtime.failures["suspend"] = [RuntimeFailure("suspend", "still holds 1024 MiB", leaked_bytes=GIB)]
    await rig.pass_time(10)
    await rig.pass_time(10)
    assert rig.states() == {}
    assert metric(rig, "warmpool_gpu_leaks_total", model="a") == 1


# --- growth ---


async def grow(rig: Rig, count: int) -> None:
    """One cycle of sleep, after which the engine holds so much more than at first."""
    await rig.pass_time(10)
    assert rig.states() == {"a-1": "sleeping"}
    rig.runtime.leaks["a-1"] = count
    await use(rig, "a")


async def test_an_engine_that_grew_is_replaced_from_its_checkpoint_when_idle(rig_of: RigOf) -> None:
    rig = await rig_of(idle=TO_TMPFS, a=(60, 2))
    await known(rig, "a")
    await rig.pass_time(10)
    await use(rig, "a")
    boot = rig.runtime.images.there["a-1"].boot
    for cycle in range(1, 9):
        await grow(rig, cycle * 100 * MIB)
    (status,) = rig.pool.status()["models"]["a"]["instances"]
    assert (status["cycles"], status["gpu_bytes"]) == (8, {"GPU-1": 60 * GIB + 800 * MIB})
    assert status["gpu_growth_bytes"] == 600 * MIB
    await rig.pass_time(10)
    assert rig.states() == {"a-1": "checkpointed"}
    assert metric(rig, "warmpool_step_downs_total", model="a", tier="checkpointed", reason="recycle") == 1
    await use(rig, "a")
    (status,) = rig.pool.status()["models"]["a"]["instances"]
    assert (status["cycles"], status["gpu_bytes"]) == (0, {"GPU-1": 60 * GIB})
    assert rig.runtime.processes["a-1"].boot == boot
    assert rig.runtime.calls["checkpoint"] == 1


async def test_one_that_is_kept_ready_is_restored_anew_when_it_is_idle_for_a_while(rig_of: RigOf) -> None:
    rig = await rig_of(idle=TO_TMPFS, a=(60, 2))
    await known(rig, "a")
    await rig.pass_time(10)
    await use(rig, "a")
    for cycle in range(1, 9):
        await grow(rig, cycle * 100 * MIB)
    kept = rig.settings.models["a"].model_copy(update={"min_ready": 1})
    await rig.pool.reconfigure(rig.settings.model_copy(update={"models": {"a": kept}}))
    lease = await rig.pool.lease("a")
    await rig.pass_time(1000)
    assert rig.states() == {"a-1": "ready"}, "it is busy"
    lease.release()
    await rig.pass_time(9)
    (status,) = rig.pool.status()["models"]["a"]["instances"]
    assert (status["state"], status["cycles"]) == ("ready", 8)
    await rig.pass_time(1)
    await rig.until(a_1="ready")
    await settle()
    (status,) = rig.pool.status()["models"]["a"]["instances"]
    assert (status["cycles"], status["gpu_bytes"]) == (0, {"GPU-1": 60 * GIB})
    assert metric(rig, "warmpool_step_downs_total", model="a", tier="checkpointed", reason="recycle") == 1
    await rig.pass_time(1000)
    assert rig.runtime.calls["restore"] == 2, "and once is enough"


async def test_without_a_checkpoint_it_is_logged_once_and_goes_on(
    rig_of: RigOf, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await rig_of(a=(60, 2))
    await use(rig, "a")
    for cycle in range(1, 7):
        await grow(rig, cycle * 300 * MIB)
    assert len([r for r in caplog.records if "more of the GPU than at first" in r.message]) == 1
    await rig.pass_time(10)
    assert rig.states() == {"a-1": "sleeping"}


# --- what is known, and shown ---


async def test_a_checkpoint_remembers_what_its_engine_holds_for_the_next_start(rig_of: RigOf) -> None:
    before = await rig_of(idle=TO_TMPFS, a=(60, 2), b=(60, 3))
    await known(before, "a", "b")
    await before.pass_time(10)
    gpu = before.runtime.images.there["b-1"].facts.details["gpu"]
    assert gpu == {"ready": {"GPU-1": 60 * GIB}, "sleeping": {"GPU-1": 3 * GIB}}
    after = await rig_of(before, TO_TMPFS, a=(60, 2), b=(60, 3))
    await use(after, "a")
    rig = after
    rig.runtime.gates["suspend"] = asyncio.Event()
    await use(rig, "b")
    assert rig.states() == {"a-1": "suspending", "b-1": "ready"}, "asleep was known to be enough"


async def test_a_checkpoint_that_is_taken_at_once_is_measured_before(rig_of: RigOf) -> None:
    rig = await rig_of(idle=TO_TMPFS, a=(60, 2))
    rig.pool._moves.gpus.due.set = lambda: None  # type: ignore[method-assign]
    await use(rig, "a")
    (command,) = rig.pool.step_down("a", Tier.CHECKPOINTED)
    await command.carried_out()
    gpu = rig.runtime.images.there["a-1"].facts.details["gpu"]
    assert gpu == {"ready": {"GPU-1": 60 * GIB}, "sleeping": {"GPU-1": 2 * GIB}}


async def test_a_checkpoint_that_is_made_without_a_proxy_remembers_the_same() -> None:
    rig = Rig(takes={"demo": (60 * GIB, 2 * GIB)})

    class Context(golden.CheckpointContext):
        def client(self, engine: EngineProcess) -> EngineClient:
            return rig._connect(engine, "demo", self.model)

    context = Context(rig.settings, "demo", cast("Runtime", rig.runtime), cast("CheckpointStore", None))

    async def made(number: int) -> Mapping[str, Any]:
        engine = golden._Engine(context, f"demo-{number}")
        await engine.start(Stages())
        await engine.checkpoint(Stages())
        return rig.runtime.images.there[f"demo-{number}"].facts.details

    assert (await made(1))["gpu"] == {"ready": {"GPU-1": 60 * GIB}, "sleeping": {"GPU-1": 2 * GIB}}
    rig.nvml.broken = True
    assert "gpu" not in await made(2)


async def test_status_and_metrics_say_what_there_is_and_who_holds_it(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(10, 1))
    await use(rig, "a")
    status = rig.pool.status()
    assert status["gpus"] == [
        {
            "index": 0,
            "name": "NVIDIA H100",
            "uuid": "GPU-1",
            "total_bytes": 80 * GIB,
            "used_bytes": 62 * GIB,
            "foreign_bytes": 2 * GIB,
            "charged_bytes": 60 * GIB,
        }
    ]
    for kind, count in (("total", 80), ("used", 62), ("foreign", 2), ("charged", 60)):
        assert metric(rig, "warmpool_gpu_memory_bytes", gpu="0", kind=kind) == count * GIB
    assert metric(rig, "warmpool_instance_gpu_bytes", model="a") == 60 * GIB
    assert metric(rig, "warmpool_instance_gpu_bytes", model="b") == 0


async def test_nvml_that_fails_is_a_figure_less_and_nothing_worse(rig_of: RigOf) -> None:
    rig = await rig_of(a=(60, 2), b=(60, 2))
    await known(rig, "a", "b")
    rig.nvml.broken = True
    for model in ("a", "b", "a"):
        await use(rig, model)
    assert rig.states() == {"a-1": "ready", "b-1": "suspended"}, "what is known goes on being true"
    assert metric(rig, "warmpool_gpu_leaks_total", model="b") == 0


async def test_nvml_that_never_answered_means_no_gpu() -> None:
    rig = Rig({"a": {}, "b": {}}, takes={"a": (60 * GIB, 0), "b": (60 * GIB, 0)})
    rig.nvml.broken = True
    await rig.pool.open()
    await use(rig, "a")
    await use(rig, "b")
    assert rig.states() == {"a-1": "ready", "b-1": "ready"}
    assert rig.pool.status()["gpus"] == []
    await rig.pool.close()
