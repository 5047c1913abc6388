"""`python -m loadtest fleet`: the options, and the table."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import orjson
from rich.table import Table

from loadtest import tables
from loadtest.simulate_fleet import CHOOSERS, Chooser, Scenario, simulate

_SOME = click.IntRange(1)
_MORE_THAN_0 = click.FloatRange(0, min_open=True)


@click.command()
@click.option("--hosts", type=_SOME, default=200)
@click.option("--models", type=_SOME, default=100)
@click.option("--rate", type=_MORE_THAN_0, default=400.0, help="Requests a second, over all hosts.")
@click.option("--length", type=_MORE_THAN_0, default=60.0, help="Seconds, in virtual time.")
@click.option("--stale", "stales", multiple=True, type=_MORE_THAN_0, default=(0.2, 1.0, 2.0, 10.0), help="Repeat it.")
@click.option("--chooser", "choosers", multiple=True, type=click.Choice(CHOOSERS), default=CHOOSERS, help="Repeat it.")
@click.option("--places", type=_SOME, default=2, help="Engines that a host can have awake.")
@click.option("--wake", type=_MORE_THAN_0, default=1.5, help="Seconds from a checkpoint to ready.")
@click.option("--serve", type=_MORE_THAN_0, default=3.0, help="Seconds of a request in its engine, on the average.")
@click.option("--seed", default=0)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Everything, as JSON.")
def command(json_path: Path | None, stales: tuple[float, ...], choosers: tuple[Chooser, ...], **options: Any) -> None:
    """Choose among many hosts in virtual time, as the proxy does and otherwise."""
    shown = Table(title=f"{options['hosts']} hosts, {options['models']} models, {options['rate']:g} requests/s")
    for name in ("chooser", "stale s", "mean s", "p99 s", "wakes", "evictions", "refused", "hops", "turned away"):
        shown.add_column(name, justify="right")
    runs = []
    for chooser in choosers:
        for stale_s in stales:
            scenario = Scenario(
                options["hosts"], options["models"], options["rate"], options["length"], stale_s,
                places=options["places"], wake_s=options["wake"], serve_s=options["serve"], seed=options["seed"],
            )  # fmt: skip
            began = time.monotonic()
            found = simulate(scenario, chooser).as_json()
            runs.append({"chooser": chooser, "scenario": asdict(scenario), **found, "took_s": time.monotonic() - began})
            shown.add_row(
                chooser, f"{stale_s:g}", f"{found['mean_s']:.3f}", f"{found['p99_s']:.2f}",
                *(str(found[name]) for name in ("wakes", "evictions", "refused", "hops", "turned_away")),
            )  # fmt: skip
    tables.console().print(shown)
    if json_path is not None:
        json_path.write_bytes(orjson.dumps({"command": "fleet", "runs": runs}, option=orjson.OPT_INDENT_2))
