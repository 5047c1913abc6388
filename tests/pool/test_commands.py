"""Commands of operators, on the fake runtime: where instances go, what is refused, and that no request is harmed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import CommandFailedError, ConflictError, DrainingError, InstanceNotFoundError, RuntimeFailure
from proxy.tiers import Tier
from tests.fakes import Rig, settle
from tests.pool.test_pool import rig_of, use

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.pool.command import Command

__all__ = ["rig_of"]

NEVER = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}


@pytest.fixture
async def rig(rig_of: Any) -> Rig:
    """One model, `demo`, that never steps down by itself."""
    made: Rig = await rig_of({"demo": {"idle": NEVER}})
    return made


async def carried_out(commands: Sequence[Command]) -> None:
    async with asyncio.timeout(5):
        for command in commands:
            await command.carried_out()


# --- down ---


@pytest.mark.parametrize("to", [Tier.SUSPENDED, Tier.CHECKPOINTED])
async def test_an_idle_instance_goes_where_it_is_sent_and_wakes_from_there(rig: Rig, to: Tier) -> None:
    await use(rig)
    commands = rig.pool.step_down("demo", to)
    assert [(o.instance_id, o.found, o.to, o.open) for o in commands] == [("demo-1", Tier.READY, to, True)]
    await carried_out(commands)
    assert rig.states() == {"demo-1": to.label}
    assert (await use(rig)).found is to
    await rig.pass_time(10_000)
    assert rig.states() == {"demo-1": "ready"}, "a command is carried out once"


async def test_a_command_that_has_come_true_already_changes_nothing(rig: Rig) -> None:
    await use(rig)
    await carried_out(rig.pool.step_down("demo", Tier.CHECKPOINTED))
    calls = rig.runtime.calls.copy()
    for to in (Tier.SUSPENDED, Tier.CHECKPOINTED):
        (command,) = rig.pool.step_down("demo", to)
        assert not command.open
    assert rig.runtime.calls == calls
    assert rig.states() == {"demo-1": "checkpointed"}


async def test_the_same_command_again_joins_the_first(rig: Rig) -> None:
    await use(rig)
    gate = rig.runtime.gates["suspend"] = asyncio.Event()
    first = rig.pool.step_down("demo", Tier.SUSPENDED)
    await settle()
    assert rig.pool.step_down("demo", Tier.SUSPENDED) == first
    gate.set()
    await carried_out(first)
    assert rig.runtime.calls["suspend"] == 1


async def test_a_colder_command_takes_the_place_of_one_under_way(rig: Rig) -> None:
    await use(rig)
    gate = rig.runtime.gates["suspend"] = asyncio.Event()
    (first,) = rig.pool.step_down("demo", Tier.SUSPENDED)
    await settle()
    (second,) = rig.pool.step_down("demo", Tier.CHECKPOINTED)
    with pytest.raises(CommandFailedError, match="came after it"):
        await first.carried_out()
    gate.set()
    await carried_out([second])
    assert rig.states() == {"demo-1": "checkpointed"}


async def test_a_missing_tier_means_the_next_colder_one(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": NEVER}})
    rig.runtime.offered = frozenset({Tier.CHECKPOINTED})
    await use(rig)
    (command,) = rig.pool.step_down("demo", Tier.SUSPENDED)
    assert command.to is Tier.CHECKPOINTED
    await carried_out([command])
    assert rig.states() == {"demo-1": "checkpointed"}


async def test_no_command_but_stop_stops_an_engine(rig: Rig) -> None:
    rig.runtime.offered = frozenset({Tier.SLEEPING, Tier.SUSPENDED})
    rig.runtime.missing = {Tier.CHECKPOINTED: "no CRIU here"}
    await use(rig)
    with pytest.raises(ConflictError, match="no CRIU here"):
        rig.pool.step_down("demo", Tier.CHECKPOINTED)
    await settle()
    assert rig.states() == {"demo-1": "ready"}


async def test_stop_ends_the_instance(rig: Rig) -> None:
    await use(rig)
    await carried_out(rig.pool.step_down("demo", Tier.STOPPED))
    assert (rig.states(), rig.runtime.processes) == ({}, {})
    assert rig.pool.step_down("demo", Tier.STOPPED) == []
    assert rig.metrics.registry.get_sample_value(
        "warmpool_step_downs_total", {"model": "demo", "tier": "stopped", "reason": "command"}
    ) == 1.0  # fmt: skip


async def test_one_instance_of_several(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": NEVER, "max_instances": 2, "max_concurrency": 1}})
    leases = await asyncio.gather(*(rig.pool.lease("demo") for _ in range(2)))
    for lease in leases:
        lease.release()
    await carried_out(rig.pool.step_down("demo", Tier.SUSPENDED, instance_id="demo-2"))
    assert rig.states() == {"demo-1": "ready", "demo-2": "suspended"}
    with pytest.raises(InstanceNotFoundError, match="demo-1, demo-2"):
        rig.pool.step_down("demo", Tier.SUSPENDED, instance_id="demo-3")


# --- busy ones ---


async def test_a_busy_instance_is_left_alone(rig: Rig) -> None:
    async with await rig.pool.lease("demo"):
        with pytest.raises(ConflictError, match="demo-1 is answering 1"):
            rig.pool.step_down("demo", Tier.SUSPENDED)
        assert rig.states() == {"demo-1": "ready"}
    await settle()
    assert rig.states() == {"demo-1": "ready"}


async def test_one_that_is_being_woken_for_somebody_is_busy(rig: Rig) -> None:
    gate = rig.runtime.gates["health"] = asyncio.Event()
    request = asyncio.create_task(use(rig))
    await settle()
    with pytest.raises(ConflictError, match="1 requests wait"):
        rig.pool.step_down("demo", Tier.STOPPED)
    gate.set()
    await request


async def test_with_wait_it_goes_after_its_last_request_and_takes_no_new_one(rig: Rig) -> None:
    lease = await rig.pool.lease("demo")
    commands = rig.pool.step_down("demo", Tier.SUSPENDED, wait=True)
    assert rig.states() == {"demo-1": "retiring"}
    late = asyncio.create_task(use(rig))
    await rig.pass_time(60)
    assert (rig.states(), late.done()) == ({"demo-1": "retiring"}, False), "it is not readmitted"
    lease.release()
    await carried_out(commands)
    assert (await late).found is Tier.SLEEPING, "a ready one it did not find"
    assert rig.runtime.calls["suspend"] == rig.runtime.calls["resume"] == 1, "it went down, and was woken for the late"


async def test_with_wait_one_that_is_being_woken_serves_first(rig: Rig) -> None:
    gate = rig.runtime.gates["health"] = asyncio.Event()
    request = asyncio.create_task(rig.pool.lease("demo"))
    await settle()
    commands = rig.pool.step_down("demo", Tier.CHECKPOINTED, wait=True)
    assert commands[0].found is Tier.READY, "where the wake ends"
    gate.set()
    lease = await request
    assert rig.states() == {"demo-1": "retiring"}
    lease.release()
    await carried_out(commands)
    assert rig.states() == {"demo-1": "checkpointed"}


async def test_a_command_to_wake_takes_back_one_that_still_waits(rig: Rig) -> None:
    lease = await rig.pool.lease("demo")
    (command,) = rig.pool.step_down("demo", Tier.STOPPED, wait=True)
    assert await rig.pool.wake("demo") == ("demo-1", Tier.READY, None)
    with pytest.raises(CommandFailedError, match="command to wake"):
        await command.carried_out()
    lease.release()
    await settle()
    assert rig.states() == {"demo-1": "ready"}


async def test_what_min_ready_would_wake_again_is_not_sent_down(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"idle": NEVER, "min_ready": 1}})
    await rig.until(demo_1="ready")
    with pytest.raises(ConflictError, match="min_ready"):
        rig.pool.step_down("demo", Tier.SUSPENDED)
    rig.pool.drain("demo")
    await carried_out(rig.pool.step_down("demo", Tier.SUSPENDED))
    await rig.pass_time(1000)
    assert rig.states() == {"demo-1": "suspended"}
    rig.pool.undrain("demo")
    await rig.until(demo_1="ready")


# --- failures ---


async def test_a_step_that_fails_without_harm_fails_the_command_and_the_engine_serves_on(rig: Rig) -> None:
    await use(rig)
    rig.runtime.failures["checkpoint"] = [RuntimeFailure("checkpoint", "no space", alive=True)]
    with pytest.raises(CommandFailedError, match="no space"):
        await carried_out(rig.pool.step_down("demo", Tier.CHECKPOINTED))
    assert rig.pool.status()["models"]["demo"]["instances"][0]["commanded"] is None
    await use(rig)
    await carried_out(rig.pool.step_down("demo", Tier.CHECKPOINTED))
    assert rig.states() == {"demo-1": "checkpointed"}, "a command tries again at once"


async def test_a_step_that_breaks_the_engine_fails_the_command(rig: Rig) -> None:
    await use(rig)
    rig.runtime.failures["suspend"] = [RuntimeFailure("suspend", "gone")]
    with pytest.raises(CommandFailedError, match="broke: suspend: gone"):
        await carried_out(rig.pool.step_down("demo", Tier.SUSPENDED))
    await rig.until(demo_1="gone")


async def test_a_failed_step_to_a_warmer_tier_does_not_end_a_command_to_stop(rig: Rig) -> None:
    await use(rig)
    gate = rig.runtime.gates["suspend"] = asyncio.Event()
    rig.runtime.failures["suspend"] = [RuntimeFailure("suspend", "busy", alive=True)]
    rig.pool.step_down("demo", Tier.SUSPENDED)
    await settle()
    commands = rig.pool.step_down("demo", Tier.STOPPED)
    gate.set()
    await carried_out(commands)
    assert rig.states() == {}


async def test_closing_the_pool_ends_open_commands(rig: Rig) -> None:
    await use(rig)
    rig.runtime.gates["suspend"] = asyncio.Event()
    (command,) = rig.pool.step_down("demo", Tier.SUSPENDED)
    await settle()
    await rig.pool.close()
    with pytest.raises(CommandFailedError, match="shutting down"):
        await command.carried_out()
    with pytest.raises(DrainingError):
        rig.pool.step_down("demo", Tier.SUSPENDED)


# --- up ---


async def test_wake_brings_a_stopped_model_up_and_again_does_nothing(rig: Rig) -> None:
    instance, found, wake = await rig.pool.wake("demo")
    assert (instance, found) == ("demo-1", Tier.STOPPED)
    assert wake is not None
    assert rig.states() == {"demo-1": "ready"}
    assert await rig.pool.wake("demo") == ("demo-1", Tier.READY, None)
    assert rig.runtime.calls["start"] == 1
    assert rig.pool.status()["leases"] == 0


async def test_wake_makes_room_as_a_request_does(rig_of: Any) -> None:
    rig: Rig = await rig_of({"a": {"idle": NEVER}, "b": {"idle": NEVER}}, max_awake=1)
    await rig.pool.wake("a")
    await rig.pool.wake("b")
    await rig.until(b_1="ready")
    assert rig.states()["a-1"] in ("sleeping", "suspending", "suspended")


# --- golden checkpoints ---


async def golden(rig_of: Any) -> Rig:
    rig: Rig = await rig_of({"demo": {"idle": NEVER, "max_instances": 2}}, shares_images=True)
    await rig.pool.wake("demo")
    await carried_out(rig.pool.step_down("demo", Tier.CHECKPOINTED))
    await rig.until(demo_1="checkpointed", demo_2="checkpointed")
    return rig


async def test_a_golden_checkpoint_outlives_a_stop_and_instances_of_it_come_back(rig_of: Any) -> None:
    rig = await golden(rig_of)
    await carried_out(rig.pool.step_down("demo", Tier.STOPPED))
    await rig.until(demo_1="checkpointed", demo_2="checkpointed")
    assert list(rig.runtime.images.there) == ["demo"]
    assert (await use(rig)).found is Tier.CHECKPOINTED


async def test_a_golden_checkpoint_is_discarded_with_the_last_instance(rig_of: Any) -> None:
    rig = await golden(rig_of)
    lease = await rig.pool.lease("demo")
    commands = rig.pool.step_down("demo", Tier.STOPPED, wait=True, discard=True)
    await settle()
    assert list(rig.runtime.images.there) == ["demo"], "one of its instances is still in use"
    lease.release()
    await carried_out(commands)
    await settle()
    assert (rig.states(), rig.runtime.images.there) == ({}, {})
    assert (await use(rig)).found is Tier.STOPPED
    await carried_out(rig.pool.step_down("demo", Tier.CHECKPOINTED))
    await rig.until(demo_1="checkpointed", demo_2="checkpointed")


async def test_a_golden_checkpoint_is_discarded_when_all_instances_go_in_one_moment(rig_of: Any) -> None:
    rig = await golden(rig_of)
    await carried_out(rig.pool.step_down("demo", Tier.STOPPED, discard=True))
    await settle()
    assert (rig.states(), rig.runtime.images.there) == ({}, {})


# --- drain and undrain ---


async def test_a_drained_model_takes_nothing_new_and_finishes_what_it_has(rig_of: Any) -> None:
    rig: Rig = await rig_of({"a": {"idle": NEVER}, "b": {"idle": NEVER}})
    lease = await rig.pool.lease("a")
    rig.pool.drain("a")
    with pytest.raises(DrainingError, match="takes no new requests"):
        await rig.pool.lease("a")
    await use(rig, "b")
    unused = asyncio.create_task(rig.pool.until_unused("a"))
    await settle()
    assert (unused.done(), rig.pool.unused("a"), rig.pool.unused("b")) == (False, False, True)
    lease.release()
    await asyncio.wait_for(unused, 5)
    rig.pool.undrain("a")
    await use(rig, "a")


async def test_a_drain_hears_of_requests_that_give_up(rig: Rig) -> None:
    rig.runtime.gates["health"] = asyncio.Event()
    request = asyncio.create_task(use(rig))
    await settle()
    rig.pool.drain("demo")
    unused = asyncio.create_task(rig.pool.until_unused("demo"))
    await settle()
    assert not unused.done()
    request.cancel()
    await asyncio.wait_for(unused, 5)


async def test_a_drained_server_is_not_ready_until_it_is_undrained(rig: Rig) -> None:
    rig.pool.drain()
    assert (rig.pool.ready, rig.pool.status()["draining"]) == (False, True)
    with pytest.raises(DrainingError):
        await rig.pool.lease("demo")
    await asyncio.wait_for(rig.pool.until_unused(), 5)
    rig.pool.undrain()
    await use(rig)
    rig.pool.begin_stop()
    rig.pool.undrain()
    assert not rig.pool.ready, "an operator does not stop a shutdown"


async def test_listeners_hear_of_changes_until_they_end_it(rig: Rig) -> None:
    heard: list[str] = []
    silence = rig.pool.listen(lambda: heard.append(rig.states().get("demo-1", "gone")))
    await use(rig)
    assert {"waking", "ready"} <= set(heard)
    silence()
    heard.clear()
    await carried_out(rig.pool.step_down("demo", Tier.SUSPENDED))
    assert heard == []


async def test_the_last_wakes_are_kept_with_when_each_stage_began(rig: Rig) -> None:
    await use(rig)
    await carried_out(rig.pool.step_down("demo", Tier.CHECKPOINTED))
    await use(rig)
    rig.runtime.failures["start"] = [RuntimeFailure("start", "no GPU")]
    await carried_out(rig.pool.step_down("demo", Tier.STOPPED))
    with pytest.raises(Exception, match="no GPU"):
        await use(rig)
    failed, restored, started = rig.pool.status()["wakes"]
    assert (failed["model"], failed["instance"], failed["found"]) == ("demo", "demo-1", "stopped")
    assert failed["failed"] == ["stopped: start: no GPU"]
    assert (restored["found"], started["found"]) == ("checkpointed", "stopped")
    for wake in (restored, started):
        assert set(wake["starts"]) == set(wake["stages"])
        begins = list(wake["starts"].values())
        assert begins == sorted(begins)
