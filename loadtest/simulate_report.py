"""What a simulation found, as tables and as a picture (SVG, readable in light and dark)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from loadtest import tables
from loadtest.report.drawing import Drawing, logarithmic, short_s

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

_COLUMNS: Final = (
    "POLICY", "REFUSED", "P50", "P90", "P99", "WAIT P50", "WAIT P99", "LONGEST", "WARM", "SWITCHES", "PAUSES",
    "GAP P50", "GAP MOST", "BUSY", "TOKENS/S",
)  # fmt: skip
_WIDTH: Final = 900
_ROW: Final = 22
_LEFT: Final = 330
_COLOURS: Final = {"turns": "c1", "fifo": "c2", "lru": "c3"}
_STYLE: Final = (
    "<style>svg{--text:#222;--grid:#ddd;--c1:#2563eb;--c2:#d97706;--c3:#6b7280;background:#fff;"
    "font:13px system-ui,sans-serif}text{fill:var(--text)}"
    "@media(prefers-color-scheme:dark){svg{--text:#ddd;--grid:#444;background:#111}}</style>"
)


def name(run: Mapping[str, Any]) -> str:
    """A policy with what distinguishes it."""
    return f"lru {run['ttl_s']:g} s" if run["policy"] == "lru" else str(run["policy"])


def title(run: Mapping[str, Any]) -> str:
    """What was simulated."""
    about = f"{run['models']} models, {run['fits']} at once"
    return f"{about}, load {run['load']:.0%}, the trace {run['speed_up']:.2f} times as fast"


def by_policy(runs: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each load: a row for each policy."""
    made = []
    for heading, group in itertools.groupby(runs, key=title):
        table = tables.table(*_COLUMNS, right=_COLUMNS[1:])
        table.title, table.title_justify = heading, "left"
        for run in group:
            seconds = [f"{run[key]:.2f}" for key in ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s")]
            above = [f"{run[key]:.2f}" for key in ("above_unloaded_p50_s", "above_unloaded_p99_s", "longest_wait_s")]
            gaps = [f"{run[key]:.1f}" for key in ("gap_p50_s", "longest_pause_s")]
            table.add_row(
                name(run), str(run["refused"]), *seconds, *above, f"{run['warm']:.0%}", str(run["switches"]),
                str(run["pauses"]), *gaps, f"{run['gpu_busy']:.0%}", f"{run['tokens_per_s']:.0f}",
            )  # fmt: skip
        made.append(table)
    return made


def by_model(run: Mapping[str, Any]) -> Table:
    """A row for each model, of one run."""
    columns = ("MODEL", "REQUESTS", "REFUSED", "TTFT P50", "P90", "P99", "WARM")
    table = tables.table(*columns, right=columns[1:])
    table.title, table.title_justify = f"{name(run)}: {title(run)}", "left"
    for key, found in run["by_model"].items():
        seconds = [f"{found[k]:.2f}" for k in ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s")]
        table.add_row(key, str(found["requests"]), str(found["refused"]), *seconds, f"{found['warm']:.0%}")
    return table


def picture(runs: Sequence[Mapping[str, Any]]) -> str:
    """From the median to the 99th percentile of the time to the first token, a bar for each run."""
    drawing = Drawing(_WIDTH)
    longest = max(run["ttft_p99_s"] for run in runs)
    scale = logarithmic(0.05, max(1.0, longest), _LEFT, _WIDTH - 150)
    y = 24.0
    drawing.text(10, y, "Time to first token: median (dot), 90th and 99th percentile; refused ones count as the limit")
    for heading, group in itertools.groupby(runs, key=title):
        y += 30
        drawing.text(10, y, heading)
        for run in group:
            y += _ROW
            colour = _COLOURS[run["policy"]]
            low, middle, high = (max(0.05, run[f"ttft_p{p}_s"]) for p in (50, 90, 99))
            left, inner, right = scale.at(low), scale.at(middle), scale.at(high)
            drawing.text(_LEFT - 10, y + 4, name(run), anchor="end")
            drawing.rect(left, y - 5, right - left, 10, colour, short_s(high), opacity=0.35)
            drawing.rect(left, y - 5, inner - left, 10, colour, short_s(middle), opacity=0.6)
            drawing.dot(left, y, colour, short_s(low), radius=4)
            refused = f", {run['refused'] / run['requests']:.0%} refused" if run["refused"] else ""
            drawing.text(right + 6, y + 4, short_s(run["ttft_p99_s"]) + refused)
    bottom = y + 20
    for tick in scale.ticks:
        drawing.line(scale.at(tick), 40, scale.at(tick), bottom)
        drawing.text(scale.at(tick), bottom + 16, short_s(tick), anchor="middle")
    height = bottom + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}">{_STYLE}{"".join(drawing.parts)}</svg>\n'
    )


def write_picture(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the picture to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture(runs), encoding="utf-8")
