"""Many hosts in virtual time, by the proxy's own choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from click.testing import CliRunner

from loadtest.simulate_fleet import Scenario, simulate
from loadtest.simulate_fleet_command import command

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Scenario(hosts=20, models=10, rate=40.0, length_s=20.0, places=2)


def test_a_model_is_woken_once_by_all_where_others_choose_at_random_or_greedily() -> None:
    ours, chance = simulate(SMALL, "ours"), simulate(SMALL, "random")
    assert len(ours.waits_s) + ours.refused == len(chance.waits_s) + chance.refused > 500
    assert ours.wakes * 3 < chance.wakes
    assert sum(ours.waits_s) * 5 < sum(chance.waits_s)
    assert ours.evictions <= chance.evictions
    assert not ours.refused


def test_a_run_is_the_same_each_time() -> None:
    assert simulate(SMALL, "ours").as_json() == simulate(SMALL, "ours").as_json()


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    options = ["--hosts", "5", "--models", "3", "--rate", "5", "--length", "3", "--stale", "1", "--json", str(file)]
    done = CliRunner().invoke(command, options)
    assert done.exit_code == 0, done.output
    runs = orjson.loads(file.read_bytes())["runs"]
    assert [run["chooser"] for run in runs] == ["random", "greedy", "ours"]
    assert len({run["requests"] for run in runs}) == 1
