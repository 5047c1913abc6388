"""Decisions among very many models: what did not change is not looked at."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from typing import TYPE_CHECKING, Any

from proxy.pool import policy
from proxy.pool.instance import State
from proxy.pool.model import Model
from proxy.pool.model_view import InstanceView, ModelView
from proxy.pool.plan import Plan
from proxy.pool.view import View
from proxy.tiers import Tier
from tests.fakes import Rig, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest


@contextlib.asynccontextmanager
async def crowd(models: int, waiting: int, **pool: Any) -> AsyncIterator[Rig]:
    """`waiting` requests over a tenth of the models; another one is busy in the only place."""
    entries = {f"m{n}": {"queue_timeout": "1h", "max_queue": 100_000} for n in range(models)}
    rig = Rig(entries, max_awake=1, max_queue=100_000, **pool)
    await rig.pool.open()
    async with await rig.pool.lease("m0"):
        keys = [f"m{n}" for n in range(1, models // 10 + 1)]
        waits = [asyncio.create_task(rig.pool.lease(keys[number % len(keys)])) for number in range(waiting)]
        await settle()
        yield rig
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    await rig.pool.close()


def decisions_s(rig: Rig, count: int = 200) -> list[float]:
    """The CPU time of decisions, each after a change to one model."""
    state, took = rig.pool._state, []
    for number in range(count):
        state.models[f"m{1 + number % 50}"].note_change()
        began = time.thread_time()
        policy.decide(state.view(), state.clock())
        took.append(time.thread_time() - began)
    return sorted(took)


async def test_a_decision_copies_what_changed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    view = Model.view

    def noted(model: Model) -> Any:
        copied.append(model.key)
        return view(model)

    async with crowd(200, 100) as rig:
        monkeypatch.setattr(Model, "view", noted)
        rig.pool._state.models["m7"].note_change()
        rig.pool.tick()
        assert copied == ["m7"]
        lease = asyncio.create_task(rig.pool.lease("m150"))
        await settle()
        assert copied == ["m7", "m150"]
        lease.cancel()
        await asyncio.gather(lease, return_exceptions=True)


async def test_ten_times_as_many_models_do_not_slow_a_decision_down() -> None:
    async with crowd(100, 100) as few:
        of_few = statistics.median(decisions_s(few))
    async with crowd(1000, 1000) as many:
        of_many = statistics.median(decisions_s(many))
    assert of_many < 2.5 * of_few + 50e-6, f"{of_few * 1e6:.0f} and {of_many * 1e6:.0f} microseconds"


def test_those_who_go_on_when_nobody_wakes_are_not_looked_at_before(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = list[str]()
    reap = policy._reap

    def noted(model: ModelView, *rest: Any) -> None:
        looked_at.append(model.key)
        reap(model, *rest)

    monkeypatch.setattr(policy, "_reap", noted)
    tiers = frozenset({Tier.SLEEPING, Tier.SUSPENDED})
    asleep = [InstanceView(f"m{n}-1", f"m{n}", State.SLEEPING, idle_since=0.0, evicted=True) for n in range(100)]
    models = [ModelView(i.model, [i], tiers, {Tier.SUSPENDED: 60.0}, 1, 0, 8) for i in asleep]
    waking = InstanceView("w-1", "w", State.WAKING, waking_from=Tier.SLEEPING)
    hurried = View([*models, ModelView("w", [waking], tiers, {}, 1, 0, 8)])
    assert policy.decide(hurried, 1.0) == Plan([], 60.0)
    assert looked_at == []
    assert len(policy.decide(View(models), 1.0).actions) == 100


async def test_those_who_join_a_queue_at_once_are_one_reason_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = list[float]()
    decide = policy.decide

    def noted(view: Any, now: float) -> Any:
        decisions.append(now)
        return decide(view, now)

    rig = Rig({"demo": {"max_concurrency": 200, "max_instances": 2}})
    rig.runtime.gates["start"] = asyncio.Event()
    await rig.pool.open()
    first = asyncio.create_task(rig.pool.lease("demo"))
    await settle()
    monkeypatch.setattr(policy, "decide", noted)
    others = [asyncio.create_task(rig.pool.lease("demo")) for _ in range(300)]
    await settle()
    assert len(decisions) <= 3
    assert rig.states() == {"demo-1": "waking", "demo-2": "waking"}, "one is not enough for so many"
    rig.runtime.gates["start"].set()
    leases = await asyncio.gather(first, *others)
    for lease in leases:
        lease.release()
    await rig.pool.close()
