"""This checkout beside another one (`--beside`): pairs of measurements in turn, and ratios of them.

Whatever else the machine does falls on both of a pair alike, and the order within the pairs alternates. A ratio is the
median of the pairs' ratios, this one : the other, with the least and the greatest. CPU time is the figure to trust on
a machine with other work: it grows by some percent with cold caches, while requests/s are what the others leave.

Asked of the other checkout: `.venv/bin/python` (or `--beside-python`), `python -m proxy serve -c FILE --log-level
warning` and `python -m proxy config reference`, from which it is seen which keys its configuration knows. Keys that it
does not know are left to its defaults. The engine and the client are this checkout's for both.
"""

from __future__ import annotations

import contextlib
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from loadtest import proxy_figures as figures
from loadtest import proxy_peers as peers
from loadtest import proxy_stalls as stalls

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from loadtest.proxy_peers import Checkout, Contender

PARTS: Final = ("short", "streams", "waiting", "stalls")
PAIRS: Final = 5
THIS: Final = "this"
OTHER: Final = "other"
CONNECTIONS: Final = 32
STREAMS: Final = 200
WAITING: Final = 1000

ROWS: Final[tuple[tuple[str, tuple[str, str], str, float | None], ...]] = (
    ("requests/s at 32 connections", ("short", "requests_per_s"), "at least", 0.95),
    ("- CPU for each, µs", ("short", "cpu_us_per_request"), "at most", None),
    ("CPU a chunk at 200 streams, µs", ("streams", "cpu_us_per_chunk"), "at most", 1.05),
    ("memory of a request that waits, KiB", ("waiting", "kib_each"), "at most", 1.0),
    ("CPU a request of 1,000 behind one wake, µs", ("waiting", "cpu_us_behind_wake"), "at most", None),
    ("CPU a request of 1,000 that find it ready, µs", ("waiting", "cpu_us_ready"), "at most", None),
)
"""What is compared, where it is in a round, and what the ratio has to keep."""
MOST_BEHIND: Final = 2.0
"""What a request behind a wake may cost, as a multiple of one that finds the engine ready."""


def measure(
    options: argparse.Namespace, parts: Sequence[str], folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """All pairs, and the stalls of both. Raises UnavailableError."""
    checkouts = {OTHER: peers.Checkout.at(options.beside, options.beside_python), THIS: peers.HERE}
    pairs: list[dict[str, dict[str, Any]]] = []
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, Contender] = {}
        for name, checkout in checkouts.items() if set(parts) - {"waiting"} else ():
            running[name] = stack.enter_context(
                peers.running("warmpool", folder / name, options.peers, checkout=checkout)
            )
            running[name].name = name
        for contender in running.values() if "short" in parts else ():
            figures.short(contender, CONNECTIONS, folder, seconds=1)  # warm
        for number in range(options.rounds if set(parts) - {"stalls"} else 0):
            names = (OTHER, THIS) if number % 2 == 0 else (THIS, OTHER)
            pair: dict[str, dict[str, Any]] = {name: {} for name in names}
            for part in (part for part in PARTS if part in parts and part != "stalls"):
                for name in names:
                    where = folder / f"{part}-{number}-{name}"
                    pair[name][part] = _part(part, running.get(name), checkouts[name], where, options)
            pairs.append(pair)
            say(f"pair {number + 1} of {options.rounds}: {_brief(pair)}")
        if "stalls" in parts:
            found = {
                name: stalls.measure(one, folder / f"{name}-stalls", quick=options.quick, say=say)
                for name, one in running.items()
            }
    return {
        "machine": figures.machine(), "versions": {name: one.version() for name, one in checkouts.items()},
        "ratios": ratios(pairs), "stalls": found, "pairs": pairs,
    }  # fmt: skip


def _part(
    part: str, contender: Contender | None, checkout: Checkout, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    folder.mkdir(parents=True)
    if contender is None or part == "waiting":
        release = folder / "release"
        with peers.running("warmpool", folder / "proxy", options.peers, checkout=checkout, release=release) as fresh:
            return figures.waiting(fresh, release, 100 if options.quick else WAITING)
    if part == "short":
        return figures.short(contender, CONNECTIONS, folder, seconds=1 if options.quick else 3)
    return figures.streaming(contender, STREAMS, settle_s=1.0, window_s=1.0 if options.quick else 3.0)


def _brief(pair: dict[str, dict[str, Any]]) -> str:
    said = []
    for title, keys, _, _ in ROWS:
        values = [_at(pair[name], keys) for name in (OTHER, THIS)]
        if None not in values:
            said.append(f"{title.removeprefix('- ')} {values[0]:,g} | {values[1]:,g}")
    return "; ".join(said)


def _at(round_: dict[str, Any], keys: tuple[str, str]) -> float | None:
    value: float | None = round_.get(keys[0], {}).get(keys[1])
    return value


def ratios(pairs: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each figure that was measured."""
    rows = []
    for title, keys, word, bound in ROWS:
        both = [(_at(pair[OTHER], keys), _at(pair[THIS], keys)) for pair in pairs]
        known = [(other, this) for other, this in both if other and this is not None]
        if known:
            quotients = [this / other for other, this in known]
            ratio = round(median(quotients), 3)
            rows.append(
                {
                    "figure": title,
                    OTHER: round(median(other for other, _ in known), 2),
                    THIS: round(median(this for _, this in known), 2),
                    "ratio": ratio,
                    "least": round(min(quotients), 3),
                    "most": round(max(quotients), 3),
                    "bound": f"{word} {bound:g}" if bound else "",
                    "kept": None if bound is None else ratio >= bound if word == "at least" else ratio <= bound,
                }
            )
    behind = {
        name: [_multiple(pair[name]["waiting"]) for pair in pairs if "waiting" in pair[name]] for name in (OTHER, THIS)
    }
    if behind[THIS]:
        middle = {name: round(median(values), 2) for name, values in behind.items()}
        rows.append(
            {
                "figure": "CPU behind one wake : ready", **middle, "ratio": round(middle[THIS] / middle[OTHER], 3),
                "least": round(min(behind[THIS]), 2), "most": round(max(behind[THIS]), 2),
                "bound": f"this: at most {MOST_BEHIND:g}", "kept": middle[THIS] <= MOST_BEHIND,
            }
        )  # fmt: skip
    return rows


def _multiple(waiting: dict[str, Any]) -> float:
    return float(waiting["cpu_us_behind_wake"] / waiting["cpu_us_ready"])


def show(report: dict[str, Any], console: Console) -> None:
    """Ratios, then stalls."""
    versions = report["versions"]
    shown = Table(title=f"this ({versions[THIS]}) beside the other ({versions[OTHER]}), {len(report['pairs'])} pairs")
    for name in ("", "other", "this", "this : other", "least to greatest", "bound", ""):
        shown.add_column(name, justify="left" if name == "" else "right")
    for row in report["ratios"]:
        kept = "" if row["kept"] is None else "kept" if row["kept"] else "missed"
        shown.add_row(
            row["figure"], f"{row[OTHER]:,}", f"{row[THIS]:,}", f"{row['ratio']:.3f}",
            f"{row['least']:.3f} to {row['most']:.3f}", row["bound"], kept,
        )  # fmt: skip
    if report["ratios"]:
        console.print(shown)
        console.print(
            "CPU time is the figure to trust where the machine had other work: requests/s are what that left."
        )
    if report["stalls"]:
        console.print(stalls.table(report["stalls"]))
