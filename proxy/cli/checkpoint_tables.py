"""What the commands about checkpoints print."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from proxy.config.values import format_duration, short_size
from proxy.pool import golden
from proxy.pool.costs import TYPICAL_S
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from proxy.checkpoint.manifest import Manifest
    from proxy.config.model import ModelSettings


class Bar(golden.Watcher):
    """A progress bar with the stage and its time; a line a stage where the output is not a terminal."""

    def __init__(self, title: str, stages: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._title = title
        self._task: TaskID = self._progress.add_task(title, total=stages)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begins(self, stage: str) -> None:
        self._progress.update(self._task, description=f"{self._title}: {stage}")

    def ended(self, stage: str, seconds: float) -> None:
        self._progress.advance(self._task)
        self._console.print(f"  {stage:<12} {seconds:8.3f} s")


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def _age(unix_s: float) -> str:
    return f"{format_duration(float(max(0, int(time.time() - unix_s))))} ago"


def listing(rows: Iterable[Mapping[str, Any]]) -> None:
    """A row an image."""
    table = _table("IMAGE", "MODEL", "WHERE", "SIZE", "MADE", "STATE", right=["SIZE"])
    for row in rows:
        size = short_size(row["bytes"]) if row["bytes"] is not None else ""
        made = _age(row["created_unix_s"]) if row["created_unix_s"] is not None else ""
        table.add_row(row["image"], row["model"] or "", row["where"], size, made, row["state"])
    _console().print(table)


def created(made: golden.Created) -> None:
    """What was made, and how long it took to restore."""
    manifest, console = made.manifest, _console()
    warmup = _table("WARM-UP", "TTFT", "TOTAL", "TOKENS", right=["TTFT", "TOTAL", "TOKENS"])
    for number, figure in enumerate(manifest.details.get("warmup", []), 1):
        ttft, total = f"{figure['ttft_s'] * 1000:.1f} ms", f"{figure['total_s'] * 1000:.1f} ms"
        warmup.add_row(str(number), ttft, total, f"{figure['tokens']:.0f}")
    if warmup.row_count:
        console.print(warmup)
    sizes = ", ".join(f"{short_size(size)} {kind}" for kind, size in manifest.bytes_by_kind().items() if size)
    console.print(f"{manifest.image}: {short_size(manifest.total_bytes())} ({sizes})")
    restored_s = _restored_s(made)
    answered = "it answers as before" if made.canary_checked else "it has no canary"
    console.print(f"{manifest.image}: restored in {restored_s:.3f} s; {answered}")
    if (repeats := manifest.details.get("repeats_randomness")) is not None:
        text = "without a seed of the client's, answers repeat after each restore, and on clones"
        console.print(f"{manifest.image}: {text}: {repeats}")


def _restored_s(made: golden.Created) -> float:
    stages = ("restore", "health", "wake_up", "load_weights", "reload_weights")
    return sum(seconds for name, seconds in made.proof_s.items() if name in stages)


def tiers(model: ModelSettings, made: golden.Created | None) -> None:
    """What each tier of a model costs to wake from, and what it holds: measured, or else as is usual."""
    measured = {}
    holds = {Tier.STOPPED: "nothing", Tier.CHECKPOINTED: "an image on tmpfs"}
    if made is not None:
        started = ("start", "load", "warmup")
        measured[Tier.STOPPED] = sum(seconds for name, seconds in made.making_s.items() if name in started)
        measured[Tier.CHECKPOINTED] = _restored_s(made)
        holds[Tier.CHECKPOINTED] = f"{short_size(made.manifest.total_bytes())} on tmpfs"
        if memory := sum((made.manifest.details.get("memory") or {}).values()):
            holds |= dict.fromkeys((Tier.SLEEPING, Tier.SUSPENDED), f"{short_size(memory)} of memory")
    table = _table("TIER", "AFTER", "WAKES IN", "HOLDS", right=["WAKES IN"])
    times = {**model.idle.timetable(), Tier.STOPPED: model.idle.stopped}
    for tier, after_s in times.items():
        known = measured.get(tier)
        wakes = f"{known:.2f} s" if known is not None else f"~{TYPICAL_S[tier]:g} s"
        after = "never" if after_s is None else f"{format_duration(after_s)} idle"
        table.add_row(tier.label, after, wakes, holds.get(tier, "its memory"))
    console = _console()
    console.print(table)
    if len(measured) < len(times):
        console.print(
            "~ is what a model of 1.5 billion parameters took on an H100; `warmpool status` shows what yours took."
        )


def largest(manifest: Manifest, count: int = 5) -> list[tuple[str, int]]:
    """The largest files of an image, and their sizes."""
    return sorted(manifest.bytes_by_file.items(), key=lambda entry: -entry[1])[:count]


def analysis(manifest: Manifest) -> None:
    """What fills an image, and how to make it smaller."""
    console = _console()
    total = manifest.total_bytes() or 1
    table = _table("IN THE IMAGE", "SIZE", "SHARE", right=["SIZE", "SHARE"])
    for kind, size in sorted(manifest.bytes_by_kind().items(), key=lambda entry: -entry[1]):
        table.add_row(kind, short_size(size), f"{100 * size / total:.1f} %")
    console.print(table)
    memory: Mapping[str, int] = manifest.details.get("memory") or {}
    if memory:
        resident = _table("RESIDENT AT THE DUMP", "SIZE", right=["SIZE"])
        for kind, size in sorted(memory.items(), key=lambda entry: -entry[1]):
            resident.add_row(kind, short_size(size))
        console.print(resident)
    files = _table("LARGEST FILES", "SIZE", right=["SIZE"])
    for name, size in largest(manifest):
        files.add_row(name, short_size(size))
    console.print(files)
    for text in golden.advice(manifest) or ["Nothing stands out."]:
        console.print(f"- {text}")
