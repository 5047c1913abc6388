"""`python -m loadtest simulate`: the options, and what is written."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import orjson

from loadtest import simulate_report, tables, trace
from loadtest.simulate import LADDERS, SPEEDS, Scenario, capacity_factor, policies, simulate
from loadtest.simulate_bound import fewest_late, least_p99_s
from proxy.config.values import parse_duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadtest.simulate_engine import Speed
    from loadtest.trace import Row
    from proxy.pool.model_view import Rules

_SOME: Final = click.IntRange(1)
_SHARE: Final = click.FloatRange(0, 10, min_open=True)


def _seconds(_ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Durations as in the configuration, in seconds; of an option that is repeated all of them."""
    if value is None or isinstance(value, tuple):
        return value if value is None else tuple(_seconds(_ctx, parameter, each) for each in value)
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from error


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--models", multiple=True, type=_SOME, default=(8,), help="Over how many models; repeat it.")
@click.option("--fits", type=_SOME, default=1, help="How many of them fit on the GPU at once.")
@click.option(
    "--load", "loads", multiple=True, type=_SHARE, default=(0.6,),
    help="The load, as a share of what one model could serve that had the GPU to itself; repeat it.",
)  # fmt: skip
@click.option("--speed", type=_SHARE, help="How many times as fast as it was recorded, instead of --load.")
@click.option(
    "--policy", "names", multiple=True, type=click.Choice(["turns", "fifo", "lru"]),
    default=("turns", "fifo", "lru"), help="Repeat it.",
)  # fmt: skip
@click.option("--quantum", callback=_seconds, default="500ms", help="pool.quantum, for turns.")
@click.option("--ttl", "ttls", multiple=True, callback=_seconds, default=("10s", "1m", "5m"), help="Of lru; repeat it.")
@click.option("--max-wait", callback=_seconds, default="1m", help="How long a request waits before it is refused.")
@click.option("--size", type=click.Choice(list(SPEEDS)), default="7B", help="Whose measured speed and switches.")
@click.option("--switch", callback=_seconds, help="Pausing, and going on, take this long each, instead.")
@click.option("--no-pause", is_flag=True, help="Engines that cannot pause.")
@click.option("--cold", is_flag=True, help="No engine was ever started (default: each has a checkpoint).")
@click.option("--skew", type=click.FloatRange(0), default=1.0, help="The n-th model has 1/n**skew of the first's.")
@click.option("--seed", default=0, help="Another one deals the requests out otherwise.")
@click.option("--begin", callback=_seconds, default="0s", help="Where in the trace to begin.")
@click.option("--length", callback=_seconds, help="How much of the trace (default: all).")
@click.option("--repeat", type=_SOME, default=1, help="The trace so many times, one after the other.")
@click.option("--ignore-names", is_flag=True, help="Deal the requests out, though the trace says which model is whose.")
@click.option("--by-model", is_flag=True, help="A table for each run, with a row for each model.")
@click.option("--bound", is_flag=True, help="What no policy can beat: a GPU that only reads prompts.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Everything, as JSON.")
@click.option("--svg", "svg_path", type=click.Path(path_type=Path, dir_okay=False), help="A picture of it.")
@click.pass_context
def command(ctx: click.Context, /, file: Path, **options: Any) -> None:
    """Schedule FILE (Azure's format) in virtual time, by warmpool's own policy and by others."""
    rows = _rows(file, options)
    console = tables.console()
    began = time.monotonic()
    runs = list(_runs(rows, options))
    for made in simulate_report.by_policy(runs):
        console.print(made)
    if options["bound"]:
        _print_bounds(rows, runs, SPEEDS[options["size"]], options["max_wait"])
    for run in runs if options["by_model"] else ():
        console.print(simulate_report.by_model(run))
    asked, decided = sum(run["requests"] for run in runs), sum(run["decisions"] for run in runs)
    click.echo(f"{asked} requests and {decided} decisions in {time.monotonic() - began:.1f} s")
    if (path := options["json_path"]) is not None:
        shown = {name: value for name, value in ctx.params.items() if name not in ("json_path", "svg_path", "file")}
        found = {"command": "simulate", "trace": file.name, "options": shown, "runs": runs}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    if options["svg_path"] is not None:
        simulate_report.write_picture(options["svg_path"], runs)


def _print_bounds(rows: Sequence[Row], runs: Sequence[dict[str, Any]], speed: Speed, max_wait_s: float) -> None:
    for load, factor in sorted({(run["load"], run["speed_up"]) for run in runs}):
        least_s, late = least_p99_s(rows, factor, speed), fewest_late(rows, factor, speed, max_wait_s)
        click.echo(
            f"load {load:.0%}, any policy and any number of models: the slowest hundredth waits {least_s:.2f} s or "
            f"longer, {late / len(rows):.1%} or more wait longer than {max_wait_s:g} s"
        )


def _rows(file: Path, options: dict[str, Any]) -> list[Row]:
    rows = trace.part(trace.read(file), options["begin"], options["length"])
    if options["ignore_names"]:
        rows = [dataclasses.replace(row, model="") for row in rows]
    length_s = rows[-1].at_s
    return [
        dataclasses.replace(row, at_s=row.at_s + number * length_s)
        for number in range(options["repeat"])
        for row in rows
    ]


def _runs(rows: Sequence[Row], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    speed, ladder = SPEEDS[options["size"]], LADDERS[options["size"]]
    if options["no_pause"]:
        ladder = dataclasses.replace(ladder, pause_s=None)
    elif options["switch"] is not None:
        ladder = dataclasses.replace(ladder, pause_s=options["switch"], unpause_s=options["switch"])
    chosen: list[Rules] = policies(options["names"], options["ttls"], options["quantum"])
    natural = 1.0 / capacity_factor(rows, speed, 1.0)
    loads = options["loads"] if options["speed"] is None else (options["speed"] * natural,)
    for models in options["models"]:
        scenario = Scenario(
            models, options["fits"], speed, ladder, options["skew"], options["seed"], options["max_wait"],
            cold=options["cold"],
        )  # fmt: skip
        for load in loads:
            factor = capacity_factor(rows, speed, load)
            about = {"models": models, "fits": options["fits"], "load": load, "speed_up": factor}
            for rules in chosen:
                yield about | simulate(rows, factor, scenario, rules)
