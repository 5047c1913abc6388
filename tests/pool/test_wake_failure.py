"""A model that cannot start: its back-off, what it costs others, what clients and operators are told."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from proxy.errors import RuntimeFailure, WakeFailedError
from proxy.pool.wake_failure import WakeFailure, delay_s
from proxy.runtime.log_tail import MAX_BYTES, MAX_LINES, last_lines
from proxy.tiers import Tier
from tests.fakes import Rig, settle
from tests.front import Front
from tests.support import PATIENCE_S, engine_model

if TYPE_CHECKING:
    from pathlib import Path

NO = RuntimeFailure("start", "no")
IDLE = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}


async def refused(rig: Rig, model: str = "bad") -> float:
    """After how many seconds a request that is refused may come again."""
    with pytest.raises(WakeFailedError) as raised:
        await rig.pool.lease(model)
    assert raised.value.retry_after_s is not None
    return raised.value.retry_after_s


def test_each_failure_in_a_row_doubles_the_back_off_up_to_five_minutes() -> None:
    assert [delay_s(n) for n in (1, 2, 3, 9, 10, 10_000)] == [1, 2, 4, 256, 300, 300]


async def test_a_model_that_cannot_start_refuses_at_once_and_starts_once_a_back_off() -> None:
    rig = Rig({"bad": {}})
    await rig.pool.open()
    rig.runtime.failures["start"] = [NO] * 10
    waits = []
    for _ in range(4):
        waits.append(await refused(rig))
        starts = rig.runtime.calls["start"]
        for _ in range(20):
            assert await refused(rig) == waits[-1]
        assert rig.runtime.calls["start"] == starts
        await rig.pass_time(waits[-1])
    assert (waits, rig.runtime.calls["start"]) == ([1, 2, 4, 8], 4)
    assert rig.pool.status()["models"]["bad"]["last_failure"]["reasons"] == ["stopped: start: no"]
    await rig.pool.close()


async def test_meanwhile_it_sends_nobody_down() -> None:
    rig = Rig({"bad": {}, "good": {"idle": IDLE}}, max_awake=1)
    await rig.pool.open()
    rig.runtime.failures["start"] = [NO]
    await refused(rig)
    async with await rig.pool.lease("good"):
        pass
    for _ in range(20):
        await refused(rig)
        await settle()
        assert rig.states() == {"good-1": "ready"}
    await rig.pool.close()


@pytest.mark.parametrize("how", ["success", "wake", "undrain", "reload"])
async def test_success_an_operator_and_a_reload_end_the_back_off(how: str) -> None:
    rig = Rig({"bad": {"idle": IDLE}})
    await rig.pool.open()
    rig.runtime.failures["start"] = [NO] * 3
    for wait_s in (1, 2, 4):
        assert await refused(rig) == wait_s
        await rig.pass_time(wait_s if wait_s < 4 or how == "success" else 0)
    match how:
        case "wake":
            await rig.pool.wake("bad")
        case "undrain":
            rig.pool.undrain("bad")
        case "reload":
            await rig.pool.reconfigure(rig.settings)
    async with await rig.pool.lease("bad") as lease:
        assert lease.instance_id == "bad-1"
    for command in rig.pool.step_down("bad", Tier.STOPPED):
        await command.carried_out()
    rig.runtime.failures["start"] = [NO]
    assert await refused(rig) == 1
    await rig.pool.close()


async def test_an_instance_that_can_serve_does_while_another_cannot_start() -> None:
    rig = Rig({"demo": {"max_instances": 2, "max_concurrency": 1}})
    await rig.pool.open()
    async with await rig.pool.lease("demo"):
        rig.runtime.failures["start"] = [NO] * 5
        waits = asyncio.create_task(rig.pool.lease("demo"))
        await settle()
        assert rig.runtime.calls["start"] == 2
        later = asyncio.create_task(rig.pool.lease("demo"))
        await settle()
        assert rig.runtime.calls["start"] == 2
        await rig.pass_time(1)
        assert rig.runtime.calls["start"] == 3, "those who wait have it tried again after the back-off"
    async with await waits:
        pass
    async with await later:
        pass
    await rig.pool.close()


def test_clients_see_nothing_of_this_host_but_the_tiers_that_failed() -> None:
    reasons = ("checkpointed: restore: /mnt/ram/demo-1/criu: No such file", "stopped: start: 'x': [Errno 2] '/opt/x'")
    message = WakeFailure("demo-1", Tier.CHECKPOINTED, 0.0, reasons, ("CUDA out of memory",)).message_for_clients(
        "demo"
    )
    assert message == "The model 'demo' could not be started (tried: checkpointed, stopped)"


async def test_the_last_lines_are_bounded_and_cannot_steer_a_terminal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert (await last_lines(log)) == []
    log.write_bytes(b"before\n" + b"".join(b"line %d\n" % n for n in range(1000)) + b"\x1b[2Jlast\xff\n\n")
    lines = await last_lines(log)
    assert (len(lines), lines[-1], lines[0]) == (MAX_LINES, "[2Jlast\ufffd", "line 981")
    log.write_bytes(b"x" * 3 * MAX_BYTES)
    assert [len(line) for line in await last_lines(log)] == [MAX_BYTES]
    log.write_bytes(b"an engine before\n2026-11-29T17:00:00.123456789+00:00 stderr F CUDA out of memory\n")
    assert await last_lines(log, len(b"an engine before\n")) == ["CUDA out of memory"]


async def test_the_engines_last_lines_are_for_operators_and_never_for_clients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    front = Front(
        tmp_path, {"demo": engine_model("--fail-start"), "slow": engine_model("--hang-start", start_timeout="1s")}
    )
    await front.open()
    try:
        response, answer = await front.post("/v1/completions", {"model": "demo", "prompt": "Hello", "max_tokens": 1})
        assert (response.status, orjson.loads(answer)["error"]["code"]) == (503, "wake_failed")
        assert b"told to fail" not in answer
        failure = front.pool.status()["models"]["demo"]["last_failure"]
        assert any("cannot load: told to fail" in line for line in failure["log_lines"])
        assert "cannot load: told to fail" in caplog.text
        _, answer = await front.post("/v1/completions", {"model": "slow", "prompt": "Hello", "max_tokens": 1})
        assert "(tried: stopped)" in orjson.loads(answer)["error"]["message"]
        _, answer = await front.post("/admin/models/slow/wake", {}, headers={"Content-Type": "application/json"})
        assert "no result within start_timeout (1 s)" in orjson.loads(answer)["error"]["message"]
    finally:
        await front.close()


async def test_lines_of_an_engine_before_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    marker = tmp_path / "fail"
    model: dict[str, Any] = engine_model("--fail-file", str(marker))
    front = Front(tmp_path / "proxy", {"demo": model})
    await front.open()
    ask = {"model": "demo", "prompt": "Hello", "max_tokens": 1}
    try:
        assert (await front.post("/v1/completions", ask))[0].status == 200
        for command in front.pool.step_down("demo", Tier.STOPPED):
            await command.carried_out()
        marker.touch()
        async with asyncio.timeout(PATIENCE_S):
            assert (await front.post("/v1/completions", ask))[0].status == 503
        lines = front.pool.status()["models"]["demo"]["last_failure"]["log_lines"]
        assert any("told to fail" in line for line in lines)
        assert not any("loaded demo" in line for line in lines), "the first engine wrote that"
    finally:
        await front.close()
