"""`warmpool key usage`: what a running server has counted of each key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click
import orjson
from rich.console import Console
from rich.table import Table

from proxy.cli.control_client import Control
from proxy.cli.control_commands import address_of_choice, finished

if TYPE_CHECKING:
    from proxy.cli.options import ServerChoice

_SUMS: Final = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "gpu_seconds", "idle_gpu_seconds")
_K: Final = 10_000
"""Figures from here on are shortened."""


def show(server: ServerChoice, name: str | None, days: int, *, by_day: bool, as_json: bool) -> None:
    """Print it."""

    async def read() -> dict[str, Any]:
        async with Control(address_of_choice(server)) as control:
            return await control.usage(days, name)

    found = finished(read())
    if as_json:
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    console = Console(highlight=False)
    if not found["rows"] and not found["budgets"]:
        console.print("nothing was used")
        return
    if found["rows"]:
        console.print(table(found["rows"], by_day=by_day))
    for key, budget in found["budgets"].items():
        console.print(_budget_line(key, budget))


def table(rows: list[dict[str, Any]], *, by_day: bool) -> Table:
    """One key and model a line, those that used most first; or one for each day."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    if by_day:
        shown.add_column("DAY", no_wrap=True)
    for heading in ("KEY", "MODEL"):
        shown.add_column(heading, overflow="fold")
    for heading in ("REQUESTS", "PROMPT", "CACHED", "ANSWER", "GPU", "IDLE"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in _summed(rows, by_day=by_day):
        cells = [row["day"]] if by_day else []
        shown.add_row(
            *cells, row["key"] or "(no key)", row["model"], _count(row["requests"]), _count(row["prompt_tokens"]),
            _count(row["cached_tokens"]), _count(row["completion_tokens"]), _time(row["gpu_seconds"]),
            _time(row["idle_gpu_seconds"]),
        )  # fmt: skip
    return shown


def _summed(rows: list[dict[str, Any]], *, by_day: bool) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        day = row["day"] if by_day else ""
        key = day, row["key"] or "", row["model"]
        total = sums.setdefault(key, {"day": day, "key": row["key"], "model": row["model"], **dict.fromkeys(_SUMS, 0)})
        for name in _SUMS:
            total[name] += row[name]
    ordered = sorted(sums.values(), key=lambda r: (-r["gpu_seconds"], r["key"] or "", r["model"]))
    return sorted(ordered, key=lambda r: r["day"], reverse=True)


def _budget_line(key: str, budget: dict[str, Any]) -> str:
    said = []
    if (limit := budget["tokens_per_day"]) is not None:
        said.append(f"{_count(budget['tokens_today'])} of {_count(limit)} tokens")
    if (limit := budget["gpu_seconds_per_day"]) is not None:
        said.append(f"{_time(budget['gpu_seconds_today'])} of {_time(limit)} of GPU time")
    return f"{key}: {' and '.join(said)} today (UTC)"


def _count(value: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= max(_K, size):
            return f"{value / size:.1f}{unit}"
    return str(value)


def _time(seconds: float) -> str:
    if seconds < 0.05:
        return "0"
    if seconds < 99.95:
        return f"{seconds:.1f}s"
    minutes = round(seconds / 60)
    return f"{minutes}min" if minutes < 120 else f"{minutes / 60:.1f}h"
