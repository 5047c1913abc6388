"""The status of a server as a table for a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from proxy.config.values import format_duration, short_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import RenderableType

_COLOURS: Final[Mapping[str, str]] = {
    "ready": "green",
    "sleeping": "cyan",
    "suspended": "blue",
    "checkpointed": "magenta",
    "archived": "magenta",
    "broken": "red",
}

_NUMBERS: Final = frozenset({"GPU", "BUSY", "QUEUE", "IDLE"})
_GPU: Final = 3
"""The column of GPU memory, which is left out where there are no GPUs."""


def table(status: dict[str, Any], model: str | None = None) -> RenderableType:
    """Models and their instances, then memory; `model`: only that one, by key."""
    now = time.time()
    has_gpus = bool(status.get("gpus"))
    rows = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("MODEL", "INSTANCE", "STATE", "GPU", "BUSY", "QUEUE", "IDLE", "NEXT", "LAST WAKE"):
        if name != "GPU" or has_gpus:
            rows.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
    for key, entry in status["models"].items():
        if model in (None, key):
            for row in _rows(key, entry, now):
                rows.add_row(*(row if has_gpus else [*row[:_GPU], *row[_GPU + 1 :]]))
    notes = [Text(text) for text in _notes(status)]
    return Group(rows, *notes)


def _rows(key: str, entry: dict[str, Any], now: float) -> Iterator[list[RenderableType]]:
    title = Text(key, style="bold")
    if entry["draining"]:
        title.append(" draining", style="yellow")
    waiting = str(entry["queue"])
    if not entry["instances"]:
        yield [title, "", Text("stopped", style="dim"), "", "", waiting, "", "", ""]
    for instance in entry["instances"]:
        state = instance["state"]
        used, step = instance["last_used_unix_s"], instance["next_step"]
        busy = bool(instance["leases"])
        going = f"{instance['commanded']} as commanded" if instance["commanded"] else ""
        if not going and step is not None:
            going = f"{step['to']} in {_short(step['at_unix_s'] - now)}"
        yield [
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
            held = f", {short_size(sum(i['bytes'] for i in images))} in {len(images)} images" if images else ""
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
