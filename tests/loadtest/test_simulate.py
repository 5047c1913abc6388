"""The simulator: engines and pools in virtual time, and what its command prints."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from loadtest.commands import cli
from loadtest.simulate import LADDERS, SPEEDS, Scenario, capacity_factor, simulate
from loadtest.simulate_bound import fewest_late, least_p99_s
from loadtest.simulate_engine import Batch, Speed
from loadtest.simulate_pool import Ask, Ladder, Served, SimulatedPool
from loadtest.trace import Row
from proxy.pool.model_view import PolicyName, Rules
from proxy.tiers import Tier

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

SPEED = Speed(step_s=0.01, stream_s=0.001, prompt_tokens_per_s=10_000, chunk_tokens=1000)
LADDER = Ladder(
    {Tier.SLEEPING: 0.5, Tier.SUSPENDED: 1.0, Tier.CHECKPOINTED: 2.0, Tier.STOPPED: 60.0},
    dict.fromkeys((Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED, Tier.STOPPED), 0.25),
    pause_s=0.25,
    unpause_s=0.25,
)


def pool(*keys: str, rules: Rules | None = None, ladder: Ladder = LADDER, max_wait_s: float = 60.0) -> SimulatedPool:
    timetable = {Tier.SLEEPING: 1000.0}
    models = [Served(key, SPEED, ladder, timetable, max_wait_s, max_wait_s) for key in keys]
    return SimulatedPool(models, rules or Rules(max_awake=1))


def ttft(one: SimulatedPool, key: str) -> list[float]:
    return list(one.models[key].tally.ttft_s)


def events(batch: Batch) -> list[tuple[float, int, int]]:
    found = []
    while (when := batch.next_s()) < math.inf:
        first, ended = batch.happened(when)
        found.append((round(when, 3), len(first), len(ended)))
    return found


def test_a_request_alone_takes_its_prompt_and_its_steps() -> None:
    batch = Batch(SPEED)
    batch.add(Ask(0.0, 1000, 11), 0.0)
    # 1000 tokens in one step of 0.01 + 0.1 s; then ten steps of 0.011 s.
    assert events(batch) == [(0.11, 1, 0), (0.22, 0, 1)]
    assert batch.busy_s == pytest.approx(0.22)


def test_streams_share_steps_and_end_in_the_order_of_their_tokens() -> None:
    batch = Batch(SPEED)
    for tokens in (21, 11):
        batch.add(Ask(0.0, 1000, tokens), 0.0)
    when = batch.next_s()
    batch.happened(when)
    found = events(batch)
    assert [entry[1:] for entry in found] == [(1, 0), (0, 1), (0, 1)]
    assert found[-1][0] > 0.22 + 10 * 0.011, "two streams are slower than one"


def test_an_engine_that_stands_still_loses_nothing_but_time() -> None:
    batch = Batch(SPEED)
    batch.add(Ask(0.0, 1000, 11), 0.0)
    batch.stand_still(0.05, still=True)
    assert batch.next_s() == math.inf
    batch.stand_still(5.05, still=False)
    assert events(batch) == [(5.11, 1, 0), (5.22, 0, 1)]


def test_a_wake_is_waited_for_and_the_next_request_finds_it_warm() -> None:
    one = pool("a")
    one.run([("a", Ask(0.0, 1000, 11)), ("a", Ask(10.0, 1000, 11))])
    assert ttft(one, "a") == [pytest.approx(2.11), pytest.approx(0.11)]
    assert one.models["a"].tally.warm == 1


def test_an_idle_model_makes_room_at_once_and_the_switch_costs_what_it_costs() -> None:
    one = pool("a", "b")
    one.run([("a", Ask(0.0, 1000, 11)), ("b", Ask(10.0, 1000, 11))])
    assert ttft(one, "b") == [pytest.approx(0.25 + 2.0 + 0.11)]
    assert (one.switches, one.pauses) == (1, 0)


def test_a_long_answer_stands_still_while_another_model_runs_and_then_goes_on() -> None:
    long, short = ("a", Ask(0.0, 1000, 2000)), ("b", Ask(10.0, 1000, 11))
    waits, paused = (
        pool("a", "b", ladder=LADDER if pauses else Ladder(LADDER.wake_s, LADDER.down_s)) for pauses in (False, True)
    )
    for one in (waits, paused):
        one.run([long, short])
        assert one.models["a"].tally.tokens == 2000
    assert ttft(waits, "b")[0] > 14, "until the long answer ends"
    assert ttft(paused, "b") == [pytest.approx(0.25 + 2.0 + 0.11)]
    assert paused.pauses == 1
    assert len(paused.gaps_s) == 1
    assert paused.gaps_s[0] < 4


def test_whoever_waits_longer_than_the_limit_is_refused() -> None:
    one = pool("a", "b", rules=Rules("lru", max_awake=1), max_wait_s=5.0)
    one.run([("a", Ask(0.0, 1000, 2000)), ("b", Ask(3.0, 10, 10))])
    assert one.models["b"].tally.refused == 1
    assert one.models["b"].tally.longest_wait_s == pytest.approx(5.0)


@pytest.mark.parametrize(("policy", "order"), [("fifo", "ab"), ("lru", "aa")])
def test_the_policies_to_compare_with_do_what_their_names_say(policy: PolicyName, order: str) -> None:
    one = pool("a", "b", rules=Rules(policy, max_awake=1))
    one.run([("a", Ask(0.0, 10, 1000)), ("b", Ask(5.0, 10, 10)), ("a", Ask(6.0, 10, 10))])
    second_of_a, first_of_b = ttft(one, "a")[1] + 6.0, ttft(one, "b")[0] + 5.0
    assert ("ab" if first_of_b < second_of_a else "aa") == order


def rows(count: int = 400) -> list[Row]:
    return [Row(n * 0.25, 500 + n % 7 * 300, 20 + n % 11 * 30) for n in range(count)]


def test_the_load_is_a_share_of_what_one_full_engine_could_serve() -> None:
    half, full = (capacity_factor(rows(), SPEED, share) for share in (0.5, 1.0))
    assert full == pytest.approx(2 * half)
    work_s = sum(SPEED.work_s(row.prompt_tokens, row.tokens) for row in rows())
    assert rows()[-1].at_s / full == pytest.approx(work_s)


def test_turns_bound_the_wait_that_others_do_not_and_the_same_seed_gives_the_same_result() -> None:
    scenario = Scenario(4, speed=SPEED, ladder=LADDERS["1.5B"], max_wait_s=30.0)
    factor = capacity_factor(rows(), SPEED, 0.5)
    turns, again, fifo, lru = (
        simulate(rows(), factor, scenario, Rules(name)) for name in ("turns", "turns", "fifo", "lru")
    )
    assert turns == again
    other = simulate(rows(), factor, Scenario(4, speed=SPEED, ladder=LADDERS["1.5B"], seed=1), Rules("turns"))
    assert other != turns
    assert turns["refused"] <= min(fifo["refused"], lru["refused"])
    assert turns["above_unloaded_p99_s"] <= 0.5 * min(fifo["above_unloaded_p99_s"], lru["above_unloaded_p99_s"])
    assert turns["requests"] == sum(found["requests"] for found in turns["by_model"].values()) == 400


def test_no_policy_beats_the_bound_not_even_one_model_without_a_change() -> None:
    trace = rows()
    for share in (0.9, 4.0):
        factor = capacity_factor(trace, SPEED, share)
        least_s = least_p99_s(trace, factor, SPEED)
        alone = simulate(trace, factor, Scenario(1, speed=SPEED), Rules("turns"))
        assert least_s <= alone["above_unloaded_p99_s"] + 0.01
        assert fewest_late(trace, factor, SPEED, least_s) <= len(trace) / 100
        assert fewest_late(trace, factor, SPEED, 60.0) <= alone["refused"]
    assert least_s > 5.0, "there is more to read than can be"


def test_the_bound_leaves_out_whichever_is_longest() -> None:
    trace = [Row(0.0, 10_000, 1), *(Row(0.0, 1000, 1) for _ in range(9))]
    # 1.1 s for the long one and 0.11 s for each other: without the long one all are there within a second.
    assert fewest_late(trace, 1.0, SPEED, 0.9) == 1
    assert fewest_late(trace, 1.0, SPEED, 2.1) == 0


def test_load_test_engines_beside_one_another_are_no_slower_and_a_first_start_takes_what_it_takes() -> None:
    scenario = Scenario(2, 2, SPEEDS["engine"], LADDERS["engine"], cold=True)
    alone = simulate([Row(0.0, 10, 1000), Row(1.0, 10, 10)], 1.0, replace(scenario, models=1), Rules("turns"))
    both = simulate([Row(0.0, 10, 1000, "a"), Row(0.1, 10, 1000, "b")], 1.0, scenario, Rules("turns"))
    assert alone["by_model"]["model_1"]["ttft_p99_s"] == pytest.approx(LADDERS["engine"].wake_s[Tier.STOPPED], abs=0.1)
    assert both["gpu_busy"] > 1.5


def test_two_that_fit_share_the_gpu() -> None:
    asks = [(key, Ask(0.0, 1000, 101)) for key in "ab"]
    one = pool("a", "b", rules=Rules(max_awake=2))
    one.run(asks)
    alone = pool("a", "b", rules=Rules(max_awake=2))
    alone.run(asks[:1])
    assert one.now - 2.0 == pytest.approx(2 * (alone.now - 2.0), rel=0.02)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    lines = [
        f"2023-11-16 18:{n // 60:02}:{n % 60:02}.0000000,{300 + n * 7 % 900},{10 + n * 13 % 200}" for n in range(300)
    ]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    return path


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(cli, ["simulate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_a_row_for_each_policy_and_writes_json_and_a_picture(trace: Path, tmp_path: Path) -> None:
    json_path, svg_path = tmp_path / "found.json", tmp_path / "found.svg"
    printed = run(
        trace, "--models", 4, "--load", 0.3, "--load", 0.6, "--ttl", "10s", "--by-model", "--json", json_path, "--svg",
        svg_path,
    )  # fmt: skip
    assert all(word in printed for word in ("turns", "fifo", "lru 10 s", "model_4", "load 60%"))
    found = json.loads(json_path.read_text())
    assert [(r["load"], r["policy"]) for r in found["runs"]] == list(
        itertools.product((0.3, 0.6), ("turns", "fifo", "lru"))
    )
    assert svg_path.read_text().startswith("<svg")
    again = tmp_path / "again.json"
    run(trace, "--models", 4, "--load", 0.3, "--load", 0.6, "--ttl", "10s", "--by-model", "--json", again)
    assert json.loads(again.read_text())["runs"] == found["runs"]


def test_the_models_of_a_trace_of_ones_own_are_kept(trace: Path) -> None:
    lines = trace.read_text().splitlines()
    names = ["large", "small"]
    named = [f"{line},{names[n % 3 == 0]}" for n, line in enumerate(lines[1:])]
    trace.write_text("\n".join([f"{lines[0]},Model", *named]))
    assert re.search(r"model_2 +100 ", run(trace, "--models", 2, "--policy", "turns", "--by-model"))
    refused = CliRunner().invoke(cli, ["simulate", str(trace), "--models", "1"])
    assert refused.exit_code == 2
    assert "the trace names 2 models" in refused.output
