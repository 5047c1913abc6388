"""The load tests from the command line: options, files, exit status.

Exit status 0: measured, and nothing went wrong; 1: something was lost, leaked, answered differently or got slower
beyond the bound; 2: it could not be run as asked.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import signal
import sys
import time
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from loadtest import (
    checkpoint_images,
    client_calibration,
    compare_runs,
    ladder,
    restore_flags,
    results,
    serving,
    simulate_command,
    simulate_fleet_command,
    soak,
    tables,
    trace,
)
from loadtest.client import Client, Target, TargetError
from loadtest.display import Display
from loadtest.report import page, pictures
from proxy.checkpoint.archive import SUFFIX
from proxy.checkpoint.errors import StoreError
from proxy.checkpoint.store import CheckpointStore
from proxy.config.values import parse_duration
from proxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

OUT: Final = Path("build/loadtest")
_SOME: Final = click.IntRange(1)
_NONE_OR_SOME: Final = click.IntRange(0)
_POSITIVE: Final = click.FloatRange(0, min_open=True)
_NOT_NEGATIVE: Final = click.FloatRange(0)
EXPECTED: Final = (
    serving.ServeError, results.ResultError, trace.TraceError, TargetError, StoreError, ConfigError
)  # fmt: skip


class _Failures(click.Group):
    """What a user can mend is a line and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            click.echo(f"loadtest: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Failures, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def cli() -> None:
    """Load tests of warmpool: times as a user sees them, from connecting to the last token."""


def _out(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--out",
        "-o",
        type=click.Path(path_type=Path, dir_okay=False),
        help=f"File for all samples (default: in {OUT}).",
    )(function)


def _memory(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"\d+(B|KiB|MiB|GiB)", value):
        raise click.BadParameter(f"{value!r}: a size is a number with B, KiB, MiB or GiB")
    return value


def _served(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of what is served, as one argument `setup`."""

    @click.option(
        "--runtime", type=click.Choice(["podman", "process"]), help="Default: podman where it can checkpoint."
    )
    @click.option("--memory", callback=_memory, default="256MiB", help="Of the load-test engine.")
    @click.option(
        "--load", "load_s", type=_NOT_NEGATIVE, default=5.0, help="Seconds the load-test engine takes to load."
    )
    @click.option(
        "--ttft",
        "ttft_s",
        type=_NOT_NEGATIVE,
        default=0.02,
        help="Seconds the load-test engine takes to a first token.",
    )
    @click.option("--tokens-per-second", type=_POSITIVE, default=100.0, help="Of the load-test engine, each stream.")
    @click.option(
        "--engine", "options", multiple=True, metavar="OPTION", help="A further option of the load-test engine."
    )
    @click.option(
        "--config",
        "-c",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Your models instead of the load-test engine.",
    )
    @click.option(
        "--sleep-level",
        type=click.IntRange(1, 2),
        help="In a checkpoint; 1: with the weights (default: as configured).",
    )
    @click.option("--model", help="The key of the model in --config (default: its first).")
    @click.option(
        "--keep",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder on tmpfs in which images stay, and are used by the next run instead of a cold start.",
    )
    @wraps(function)
    def wrapper(
        *, runtime: str | None, memory: str, load_s: float, ttft_s: float, tokens_per_second: float,
        options: tuple[str, ...], config: Path | None, model: str | None, sleep_level: int | None, keep: Path | None,
        **rest: Any,
    ) -> Any:  # fmt: skip
        engine = serving.Engine(memory, load_s, ttft_s, tokens_per_second, options=options)
        setup = serving.Setup(runtime or serving.default_runtime(), engine, config, model, sleep_level, keep)
        setup.keys()
        return function(setup=setup, **rest)

    return wrapper


def _writer(command: str, out: Path | None, **options: Any) -> results.Writer:
    path = out if out is not None else OUT / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    setup = options.pop("setup", None)
    if setup is not None:
        about = {"runtime": setup.runtime} if setup.config is None else {"config": setup.config, "model": setup.model}
        if setup.config is None:
            engine = setup.engine
            about |= {"memory": engine.memory, "load_s": engine.load_s, "ttft_s": engine.ttft_s}
            about |= {"tokens_per_second": engine.tokens_per_second, "engine": " ".join(engine.options)}
        options = about | {"sleep_level": setup.sleep_level, "keep": setup.keep} | options
    return results.Writer(path, command, {n: v for n, v in options.items() if v not in (None, "", ())})


def _run(writer: results.Writer, title: str, work: Callable[[Display], Coroutine[Any, Any, T]]) -> T:
    with writer:
        with Display(title) as display:
            found = asyncio.run(work(display))
        writer.close()
    return found


def _finish(ctx: click.Context, writer: results.Writer, good: bool) -> None:
    """Print what was found and end with the exit status it deserves."""
    _show(writer.result)
    click.echo(f"all samples: {writer.path}")
    ctx.exit(0 if good else 1)


def _show(result: results.Result) -> None:
    console = tables.console()
    console.print(tables.head(result))
    for table in tables.of(result):
        console.print(table)
    for text in (tables.counts(result), tables.client_lateness(result)):
        if text:
            console.print(text)
    for note in result.notes:
        console.print(f"note: {note}")


@cli.command()
@_served
@click.option("--count", "-n", type=_SOME, default=10, help="Cold starts.")
@_out
@click.pass_context
def baseline(ctx: click.Context, setup: serving.Setup, count: int, out: Path | None) -> None:
    """Cold starts, stage by stage: container, model, health, first token, full answer."""
    writer = _writer("baseline", out, setup=setup, count=count)
    good = _run(writer, "baseline", lambda display: ladder.baseline(setup, count, writer, display))
    _finish(ctx, writer, good)


@cli.command()
@_served
@click.option("--count", "-n", type=_SOME, default=10, help="Wakes from each tier.")
@click.option("--cold", type=_NONE_OR_SOME, default=10, help="Cold starts, to compare with.")
@click.option(
    "--tier", "tiers", multiple=True, type=click.Choice([*ladder.WARM, "archived"]), help="Default: all but archived."
)
@_out
@click.pass_context
def restore(
    ctx: click.Context, setup: serving.Setup, count: int, cold: int, tiers: tuple[str, ...], out: Path | None
) -> None:
    """Wakes from each warm tier: restore, health, first token, total; and the speed-up over a cold start."""
    chosen = tiers or ladder.WARM
    writer = _writer("restore", out, setup=setup, count=count, cold=cold, tiers=", ".join(chosen))
    good = _run(writer, "restore", lambda display: ladder.restore(setup, count, cold, chosen, writer, display))
    _finish(ctx, writer, good)


@cli.command()
@_served
@click.option("--size", "sizes", multiple=True, type=_SOME, default=(1, 8, 64), help="Requests at once; repeat it.")
@click.option("--rounds", type=_SOME, default=3, help="Times each.")
@click.option(
    "--tier", "tiers", multiple=True, type=click.Choice(list(serving.TIERS)),
    default=("stopped", "checkpointed", "suspended", "ready"), help="What they find; repeat it.",
)  # fmt: skip
@_out
@click.pass_context
def burst(
    ctx: click.Context,
    setup: serving.Setup,
    sizes: tuple[int, ...],
    rounds: int,
    tiers: tuple[str, ...],
    out: Path | None,
) -> None:
    """Many requests in one moment, to a model that is cold, checkpointed, suspended, ready."""
    writer = _writer("burst", out, setup=setup, sizes=list(sizes), rounds=rounds, tiers=", ".join(tiers))
    good = _run(writer, "burst", lambda display: ladder.burst(setup, sizes, tiers, rounds, writer, display))
    _finish(ctx, writer, good)


@cli.command("trace")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_served
@click.option("--models", type=_SOME, help="Over how many models (default: 6, or as many as --config has).")
@click.option("--speed", type=_POSITIVE, default=1.0, help="How many times as fast as it was recorded.")
@click.option("--begin", default="0s", help="Where in the trace to begin.")
@click.option("--length", help="How much of the trace, as `10m` (default: all).")
@click.option("--late", default="10s", help="A first token after this is counted as late.")
@click.option("--idle", "idles", multiple=True, metavar="TIER=TIME", help="The idle timetable (default: by the speed).")
@click.option(
    "--max-awake", type=click.IntRange(0), default=0, help="How many models may be awake at once; 0: any number."
)
@click.option(
    "--switch-after", help="With --max-awake: how long a busy model may keep others out (default: warmpool's)."
)
@click.option("--policy", type=click.Choice(["turns", "fifo", "lru"]), help="With --max-awake: who runs when.")
@click.option("--quantum", help="With --max-awake: how long a busy model runs at least (default: warmpool's).")
@click.option("--pauses", is_flag=True, help="Load-test engines that can be paused while another model runs.")
@click.option(
    "--skew",
    type=_NOT_NEGATIVE,
    default=3.0,
    help="How unequal the models' shares are: the n-th has 1/n**skew of the first's.",
)
@click.option("--ignore-names", is_flag=True, help="Deal the requests out, though the trace says which model is whose.")
@click.option(
    "--max-prompt-tokens", type=_SOME, help="Shorten longer prompts (default: where --max-model-len of --config asks)."
)
@click.option("--max-tokens", type=_SOME, help="Shorten longer answers (default: likewise).")
@click.option(
    "--prompts", type=click.Choice(["text", "ids"]), help="Words or token ids (default: ids for vLLM of --config)."
)
@click.option("--url", help="Replay through this proxy, which runs already, instead of one of its own.")
@click.option("--names", help="With --url: the names of its models, with commas.")
@click.option("--api-key", envvar="WARMPOOL_API_KEY", help="With --url.")
@_out
@click.pass_context
def trace_(ctx: click.Context, /, file: Path, setup: serving.Setup, out: Path | None, **options: Any) -> None:
    """Replay FILE (Azure's format) through the proxy: lost, late, and where the time went."""
    rows = trace.part(trace.read(file), _seconds(options["begin"]) or 0.0, _seconds(options["length"]))
    rows = [replace(row, model="") for row in rows] if options["ignore_names"] else rows
    idle = dict(_pair(text) for text in options["idles"]) or trace.timetable(options["speed"])
    most = max(row.prompt_tokens + row.tokens for row in rows)
    setup = trace.with_room(setup, most, pauses=options["pauses"])
    late_s = _seconds(options["late"]) or 0.0
    count = setup.count(options["models"], 6)
    longest = trace.limits(setup, setup.keys(count))
    most_prompt_tokens, most_tokens = options["max_prompt_tokens"] or longest[0], options["max_tokens"] or longest[1]
    by_id = (
        all(setup.is_vllm(key) for key in setup.keys(count)) if not options["prompts"] else options["prompts"] == "ids"
    )
    how = trace.Replay(options["speed"], late_s, options["skew"], most_prompt_tokens, most_tokens, by_id)
    options |= {"models": count, "max_prompt_tokens": most_prompt_tokens, "max_tokens": most_tokens}
    options |= {"prompts": "ids" if by_id else "text"}
    shown = {n: v for n, v in options.items() if n not in ("api_key", "idles")}
    writer = _writer("trace", out, setup=setup, file=file.name, idle=idle, rows=len(rows), **shown)

    if text := trace.shortened(rows, how):
        writer.note(text)

    async def work(display: Display) -> trace.Account:
        if not options["url"]:
            chosen = {name: options[name] for name in ("switch_after", "policy", "quantum") if options[name]}
            pool = {"max_awake": options["max_awake"], **chosen}
            return await trace.run(setup, rows, count, idle, how, writer, display, pool=pool)
        names = [name.strip() for name in (options["names"] or "").split(",") if name.strip()]
        if not names:
            raise click.UsageError("--url needs --names: the models that the proxy serves")
        planned = trace.requests(
            rows, trace.models_of(rows, names, options["skew"]), {name: name for name in names}, how
        )
        display.phase(f"{len(rows)} requests over {len(names)} models")
        async with Client(Target.at(options["url"], options["api_key"])) as client:
            return await trace.replay(client, planned, len(rows), how, writer, display)

    account = _run(writer, "trace", work)
    _finish(ctx, writer, not account.lost)


@cli.command("soak")
@_served
@click.option("--models", type=_SOME, help="How many (default: 3, or as many as --config has).")
@click.option("--time", "length", default="2m", help="How long.")
@click.option("--seed", default=0, help="Another one is another load.")
@_out
@click.pass_context
def soak_(
    ctx: click.Context, setup: serving.Setup, models: int | None, length: str, seed: int, out: Path | None
) -> None:
    """Mixed load with idle gaps, so that every tier is passed again and again; counts what is lost or leaked."""
    seconds, count = _seconds(length) or 0.0, setup.count(models, 3)
    writer = _writer("soak", out, setup=setup, models=count, seconds=seconds, seed=seed)
    found = _run(writer, "soak", lambda display: soak.soak(setup, count, seconds, writer, display, seed=seed))
    good = not (found.checks.lost or found.checks.different or found.leaks())
    _finish(ctx, writer, good)


@cli.command("restore-flags")
@_served
@click.option("--count", "-n", type=_SOME, default=10, help="Restores with each setting.")
@click.option("--only", multiple=True, help="Only the variants whose name contains this (and the default).")
@click.option(
    "--criu", "program", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A CRIU of your own."
)
@click.option(
    "--disk",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=restore_flags.DISK,
    help="A folder on disk.",
)
@click.option(
    "--compression", "compressions", multiple=True, type=click.Choice([*SUFFIX]), default=tuple(SUFFIX),
    help="Of an export and import; repeat it.",
)  # fmt: skip
@_out
@click.pass_context
def measure_restore_flags(
    ctx: click.Context, setup: serving.Setup, count: int, only: tuple[str, ...], program: Path | None, disk: Path,
    compressions: tuple[str, ...], out: Path | None,
) -> None:  # fmt: skip
    """The same restore with one setting after the other changed: what each is worth."""
    matrix = [
        variant
        for variant in restore_flags.variants(setup.runtime, program, disk)
        if not only
        or variant.name in (restore_flags.DEFAULT, restore_flags.AGAIN)
        or any(text in variant.name for text in only)
    ]
    writer = _writer("restore-flags", out, setup=setup, count=count, only=list(only))
    good = _run(
        writer,
        "restore-flags",
        lambda display: restore_flags.restore_flags(setup, matrix, count, compressions, writer, display),
    )
    _finish(ctx, writer, good)


@cli.command()
@_served
@click.option("--count", "-n", type=_SOME, default=10, help="Images of each kind.")
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.IntRange(0, 2),
    default=(2, 1),
    help="Sleep levels; 0: awake. Repeat it.",
)
@click.option("--load-format", "formats", multiple=True, help="Of an engine of --config; repeat it.")
@_out
@click.pass_context
def checkpoint(
    ctx: click.Context,
    setup: serving.Setup,
    count: int,
    levels: tuple[int, ...],
    formats: tuple[str, ...],
    out: Path | None,
) -> None:
    """Make golden checkpoints: how long, how large, by sleep level and load format."""
    variants = [checkpoint_images.Variant(level, form) for level in levels for form in (formats or (None,))]
    writer = _writer("checkpoint", out, setup=setup, count=count, levels=list(levels), formats=list(formats))
    good = _run(
        writer, "checkpoint", lambda display: checkpoint_images.checkpoint(setup, variants, count, writer, display)
    )
    _finish(ctx, writer, good)


@cli.command()
@_served
@click.option(
    "--images", "folder", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The checkpoint_dir of a proxy, which may be running (default: an image is made).",
)  # fmt: skip
@_out
@click.pass_context
def analyze(ctx: click.Context, setup: serving.Setup, folder: Path | None, out: Path | None) -> None:
    """What is in an image, page by page, and what would make it smaller."""
    writer = _writer("analyze", out, setup=setup, images=folder)

    async def work(display: Display) -> None:
        if folder is not None:
            display.phase(str(folder))
            _look(folder, writer)
            return
        (key,) = setup.keys()
        with setup.folders() as where:
            if not where.image_names():
                display.phase("an image")
                await checkpoint_images.learning(
                    setup,
                    checkpoint_images.Variant(setup.sleep_level or setup.entry(key).get("golden_sleep_level", 2)),
                    key,
                    where,
                    writer,
                )
            display.phase("every page of it")
            _look(where.images, writer)

    _run(writer, "analyze", work)
    _finish(ctx, writer, True)


def _look(folder: Path, writer: results.Writer) -> None:
    store = CheckpointStore(folder, 0, None)
    names = store.names()
    if not names:
        raise serving.ServeError(f"{folder}: there is no image in it")
    for name in names:
        for text in checkpoint_images.analyze(store, name, writer):
            writer.note(f"{name}: {text}")


@cli.command()
@click.option("--streams", type=_SOME, default=2000, help="Open at once.")
@click.option("--per-second", type=_POSITIVE, default=200.0, help="How fast they begin.")
@click.option("--tokens-per-second", type=_POSITIVE, default=10.0, help="Of each stream.")
@_out
@click.pass_context
def calibrate(ctx: click.Context, streams: int, per_second: float, tokens_per_second: float, out: Path | None) -> None:
    """How wrong this client is by itself, against a server that knows when it did what."""
    load = client_calibration.Load(streams, per_second, tokens_per_second)
    writer = _writer("calibrate", out, streams=streams, per_second=per_second, tokens_per_second=tokens_per_second)
    found = _run(writer, "calibrate", lambda display: client_calibration.measure(load, writer, display))
    _finish(ctx, writer, not found.lost)


@cli.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@click.option(
    "--bound",
    type=_POSITIVE,
    default=1.10,
    help="A median that is longer than this many times the other is a regression.",
)
@click.pass_context
def compare(ctx: click.Context, base: Path, other: Path, bound: float) -> None:
    """Compare two files of results; exit status 1 when OTHER is slower beyond the bound, and not by chance."""
    first, second = results.read(base), results.read(other)
    found = list(compare_runs.compare(first, second))
    if not found:
        raise results.ResultError(f"{base} and {other} have no series in common")
    console = tables.console()
    for text in compare_runs.differences(first, second):
        console.print(f"not the same: {text}")
    console.print(tables.comparison(found, bound))
    ctx.exit(1 if any(one.regressed(bound) for one in found) else 0)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def show(files: tuple[Path, ...]) -> None:
    """Print what a run printed, from its file of results."""
    for path in files:
        _show(results.read(path))


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), default=OUT / "report.html", help="The page.")
@click.option("--png", type=click.Path(path_type=Path, file_okay=False), help="Folder for each figure as a picture.")
@click.option("--browser", help="A Chromium for the pictures (default: the one in PATH).")
def report(files: tuple[Path, ...], html: Path, png: Path | None, browser: str | None) -> None:
    """One page with everything that was measured, from any number of result files."""
    found = [results.read(path) for path in files]
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(page.render(found), encoding="utf-8")
    click.echo(html)
    if png is not None:
        for path in pictures.draw(found, png, browser):
            click.echo(path)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def discard(folder: Path) -> None:
    """Delete the images that were kept in FOLDER (--keep), and their containers."""
    serving.discard(folder)


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def proxy(arguments: tuple[str, ...]) -> None:
    """The proxy itself against others, on the same core (`proxy --help` for its own options)."""
    sys.argv = ["python -m loadtest proxy", *arguments]
    importlib.import_module("loadtest.bench_proxy").main()


cli.add_command(simulate_command.command, "simulate")
cli.add_command(simulate_fleet_command.command, "fleet")


def _pair(text: str) -> tuple[str, str]:
    tier, _, after = text.partition("=")
    if tier not in serving.NEVER or not after:
        raise click.BadParameter(f"{text!r}: a tier and a time, as sleeping=30s", param_hint="--idle")
    return tier, after


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}") from error


def main() -> None:
    """Entry point."""
    # A run that is ended leaves nothing behind, whichever way: asyncio unwinds on SIGINT only.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    cli(prog_name="python -m loadtest")
