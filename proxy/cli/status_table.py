"""The status of a server as a table for a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from proxy.config.values import format_duration, short_size

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    _Row = Mapping[str, str | Text]

_COLOURS: Final[Mapping[str, str]] = {
    "ready": "green",
    "sleeping": "cyan",
    "suspended": "blue",
    "paused": "blue",
    "checkpointed": "magenta",
    "archived": "magenta",
    "broken": "red",
}

_NUMBERS: Final = frozenset({"GPU", "BUSY", "QUEUE", "IDLE"})
_COLUMNS: Final = ("MODEL", "INSTANCE", "STATE", "GPU", "BUSY", "QUEUE", "IDLE", "NEXT", "LAST WAKE")
_WIDEST: Final = 1000


def table(status: dict[str, Any], model: str | None = None) -> RenderableType:
    """Models and their instances, then memory; `model`: only that one, by key."""
    now = time.time()
    rows = [row for key, entry in status["models"].items() if model in (None, key) for row in _rows(key, entry, now)]
    notes = [Text(text) for text in _notes(status)]
    return Group(_FittingTable(rows, has_gpus=bool(status.get("gpus"))), *notes)


class _FittingTable:
    """A line an instance where that fits into the terminal's width, else a few lines each, of at most 80 columns."""

    def __init__(self, rows: Sequence[_Row], *, has_gpus: bool) -> None:
        self._rows = rows
        self._left_out = set() if has_gpus else {"GPU"}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = self._table(self._rows, self._left_out)
        needed = Measurement.get(console, options.update(width=_WIDEST, max_width=_WIDEST), wide).maximum
        if needed <= options.max_width:
            yield wide
        else:
            yield self._table([_narrow(row) for row in self._rows], self._left_out | {"MODEL", "IDLE"}, padding=0)

    def _table(self, rows: Iterable[_Row], left_out: Container[str], *, padding: int = 1) -> Table:
        made = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, padding))
        shown = [name for name in _COLUMNS if name not in left_out]
        for name in shown:
            made.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
        for row in rows:
            made.add_row(*(row[name] for name in shown))
        return made


def _narrow(row: _Row) -> _Row:
    """The same with more lines and fewer columns: the instance's name begins with the model's."""
    title, instance = Text.assemble(row["MODEL"]), str(row["INSTANCE"])
    named = Text.assemble(instance or title.plain.partition(" ")[0])
    for mark in title.plain.split(" ")[1:]:
        named.append(f"\n{mark}", style="yellow")
    state = Text.assemble(row["STATE"])
    if idle := str(row["IDLE"]):
        state.append(f"\nidle {idle}", style="dim")
    going = str(row["NEXT"]).replace(" in ", "\nin ").replace(" as ", "\nas ")
    wake = str(row["LAST WAKE"]).replace(" from ", " from\n").replace(", ", ",\n")
    return {**row, "INSTANCE": named, "STATE": state, "NEXT": going, "LAST WAKE": wake}


def _rows(key: str, entry: dict[str, Any], now: float) -> Iterator[_Row]:
    title = Text(key, style="bold")
    if entry["draining"]:
        title.append(" draining", style="yellow")
    waiting = str(entry["queue"])
    if not entry["instances"]:
        cells: list[str | Text] = [title, "", Text("stopped", style="dim"), "", "", waiting, "", "", ""]
        yield dict(zip(_COLUMNS, cells, strict=True))
    for instance in entry["instances"]:
        state = instance["state"]
        used, step = instance["last_used_unix_s"], instance["next_step"]
        busy = bool(instance["leases"])
        going = f"{instance['commanded']} as commanded" if instance["commanded"] else ""
        if not going and step is not None:
            going = f"{step['to']} in {_short(step['at_unix_s'] - now)}"
        shown: list[str | Text] = [
            title,
            instance["id"],
            Text(state.replace("_", " "), style=_COLOURS.get(state, "yellow")),
            short_size(held) if (held := sum(instance.get("gpu_bytes", {}).values())) else "",
            str(instance["leases"]),
            waiting,
            "" if busy or used is None else _short(now - used),
            going,
            _wake(instance["last_wake"], now),
        ]
        yield dict(zip(_COLUMNS, shown, strict=True))
        title, waiting = Text(""), ""


def _wake(wake: dict[str, Any] | None, now: float) -> str:
    if wake is None:
        return ""
    return f"{_seconds(wake['seconds'])} from {wake['from']}, {_short(now - wake['at_unix_s'])} ago"


def _notes(status: dict[str, Any]) -> Iterator[str]:
    if status["draining"]:
        yield "The server is draining: it takes no new requests."
    for key, entry in status["models"].items():
        if outdated := entry.get("outdated"):
            yield f"{key} is outdated: {outdated['reason']}. New engine: {outdated['renewal']}."
    yield from status.get("strays", ())
    memory = status.get("memory", {})
    if host := memory.get("host"):
        yield f"host memory: {short_size(host['available_bytes'])} of {short_size(host['total_bytes'])} free"
    for name in ("checkpoints", "archive"):
        entry = memory.get(name)
        if entry and "total_bytes" in entry:
            images = entry["images"]
            plural = "s" * (len(images) > 1)
            held = f", {short_size(sum(i['bytes'] for i in images))} in {len(images)} image{plural}" if images else ""
            free = f"{short_size(entry['free_bytes'])} of {short_size(entry['total_bytes'])} free"
            yield f"{name}: {free}{held} ({entry['path']})"
    for gpu in status.get("gpus", []):
        used, total = short_size(gpu["used_bytes"]), short_size(gpu["total_bytes"])
        yield f"GPU {gpu['index']}: {used} of {total} used ({gpu['name']})"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def _short(seconds: float) -> str:
    """To the second below an hour, to the minute above."""
    whole = max(0, int(seconds))
    return format_duration(float(whole if whole < 3600 else whole // 60 * 60))
