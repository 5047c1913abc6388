"""One HTML page that needs nothing else: style, figures and the few lines of script are in it."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loadtest import attribution, tables
from loadtest.report.figures import figures, ordered_series
from loadtest.results import TTFT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from loadtest.report.figures import Figure
    from loadtest.results import Result

STYLE: Final = Path(__file__).with_name("style.css")
WIDE: Final = 860
SMALL: Final = 340
_SCRIPT: Final = """
const root = document.documentElement, button = document.querySelector('#theme');
const system = matchMedia('(prefers-color-scheme: dark)');
const dark = () => root.dataset.theme ? root.dataset.theme === 'dark' : system.matches;
const say = () => { button.textContent = dark() ? 'light' : 'dark'; };
button.addEventListener('click', () => { root.dataset.theme = dark() ? 'light' : 'dark'; say(); });
system.addEventListener('change', say); button.hidden = false; say();
"""
_MAIN: Final = {
    "baseline": "Cold starts",
    "restore": "Warm against cold",
    "burst": "Bursts",
    "trace": "A trace, replayed",
    "soak": "Soak",
    "restore-flags": "Settings of a restore",
    "checkpoint": "Making checkpoints",
    "analyze": "What is in an image",
    "calibrate": "The client itself",
}


def render(results: Sequence[Result]) -> str:
    """The page."""
    titles = _titles(results)
    links = "".join(f'<a href="#run-{n}">{escape(title)}</a>' for n, title in enumerate(titles, 1))
    body = "".join(
        _section(f"run-{n}", title, result) for n, (title, result) in enumerate(zip(titles, results, strict=True), 1)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>warmpool load tests</title>'
        f"<style>{STYLE.read_text()}</style></head><body>"
        f'<header><h1>warmpool load tests</h1><button id="theme" type="button" hidden></button>'
        f"{f'<nav>{links}</nav>' if len(results) > 1 else ''}</header><main>{body}</main>"
        "<footer>Times are a client's, from the moment at which a request was meant to be sent. Medians have "
        "bootstrap intervals of 95 %; outliers (beyond 1.5 interquartile ranges) count and are shown.</footer>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _titles(results: Sequence[Result]) -> list[str]:
    """Of each run; the second of a kind has a number."""
    seen: Counter[str] = Counter()
    found = []
    for result in results:
        title = _MAIN.get(result.command, result.command)
        seen[title] += 1
        found.append(title if seen[title] == 1 else f"{title} ({seen[title]})")
    return found


def _section(anchor: str, title: str, result: Result) -> str:
    notes = [*result.notes] if result.complete else [*result.notes, "this run was cut short"]
    return (
        f'<section id="{anchor}"><h2>{escape(title)}</h2><p class="soft">{escape(result.began)} · '
        f"{escape(tables.head(result))}</p>{_cards(result)}"
        + (f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else "")
        + "".join(_figure(figure) for figure in figures(result))
        + _tables(result)
        + _details(result)
        + "</section>"
    )


def _cards(result: Result) -> str:
    """The numbers that matter most."""
    cards: list[tuple[str, str, str]] = []
    summaries = result.summaries()
    cold = tables.cold_start(result)
    for series in ordered_series(result):
        one = summaries[series].get(TTFT)
        if one is None or "first" in series or result.command in ("burst", "restore-flags", "calibrate"):
            continue
        faster = f", {cold.median / one.median:,.0f} : 1" if cold is not None and series != "stopped" else ""
        cards.append((tables.quantity("_s", one.median), f"{series}, median of {one.n}{faster}", ""))
    if result.command == "calibrate" and "client" in summaries and "error_s" in summaries["client"]:
        error = summaries["client"]["error_s"]
        cards += [
            (tables.quantity("_s", error.median), "error, median", ""),
            (tables.quantity("_s", error.p99), "error, 99 %", "good" if error.p99 < 0.001 else "bad"),
        ]
    if result.command == "checkpoint":
        for series, names in summaries.items():
            for name, what in (("create_s", "to write the image"), ("image_bytes", "its size")):
                if name in names:
                    cards.append((tables.quantity(name, names[name].median), f"{what}, {series}", ""))
    for name in ("sent", "answered", "lost", "late", "short", "different_answers", "other_tier", "most_open", "left"):
        if name in result.counts and (result.counts[name] or name != "other_tier"):
            value = result.counts[name]
            bad = name in ("lost", "short", "different_answers")
            kind = ("bad" if value else "good") if bad else ""
            cards.append((f"{value:g}", name.replace("_", " "), kind))
    if not cards:
        return ""
    items = "".join(
        f'<li class="{kind}"><b>{escape(value)}</b><span>{escape(label)}</span></li>' for value, label, kind in cards
    )
    return f'<ul class="cards">{items}</ul>'


def _figure(figure: Figure) -> str:
    wide, small = figure.draw(WIDE), figure.draw(SMALL)
    return (
        f"<h3>{escape(figure.title)}</h3><figure><figcaption>{escape(figure.caption)}</figcaption>"
        f'<div class="wide-figure">{wide.svg(figure.title)}</div>'
        f'<div class="narrow">{small.svg(figure.title)}</div></figure>'
    )


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], wide: int | None = None, words: Sequence[int] = ()
) -> str:
    if not rows:
        return ""
    kinds = [" class=wide" if n == wide else " class=words" if n in words else "" for n in range(len(head))]
    titles = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    """A number stays with its unit."""
    return escape(text).replace(" %", "&nbsp;%")


def _tables(result: Result) -> str:
    summaries = result.summaries()
    rows = []
    for series, names in summaries.items():
        for name, one in names.items():
            if name in (TTFT, "total_s", "error_s", "create_s", "image_bytes", "export_s", "import_s", "file_bytes"):
                q = [tables.quantity(name, v) for v in (one.median, one.low, one.high, one.p95, one.p99, one.most)]
                what = {TTFT: "first token", "total_s": "whole answer"}.get(
                    name, name.rsplit("_", 1)[0].replace("_", " ")
                )
                rows.append(
                    [series, what, str(one.n), q[0], f"{q[1]} to {q[2]}", *q[3:], str(one.outlier_count or "none")]
                )
    head = ("series", "what", "n", "median", "95 % interval", "95 %", "99 %", "most", "outliers")
    shown = f"<details><summary>All figures</summary>{_table(head, rows)}</details>" if rows else ""
    if result.command in ("trace", "soak"):
        answered = [s for s in result.samples if TTFT in s["values"]]
        lines = []
        shares = attribution.where(answered)
        for tier in (t for t in ordered_series(result) if t in shares):
            found = shares[tier]
            total = sum(found.values()) or 1.0
            parts = sorted(found.items(), key=lambda entry: -entry[1])
            text = ", ".join(
                f"{attribution.LABELS.get(n, n)} {100 * s / total:.0f} %" for n, s in parts if s > total / 100
            )
            lines.append(
                [tier or "not said", str(sum(s.get("tier", "") == tier for s in answered)), f"{total:.1f} s", text]
            )
        shown = (
            _table(("found", "requests", "together", "where it went"), lines, wide=3)
            + _as_printed(tables.held(result))
            + shown
        )
    if result.command == "restore-flags":
        shown = _as_printed(tables.moves(result)) + shown
    if result.command == "checkpoint":
        shown = _side_by_side(result) + shown
    if result.command == "analyze":
        shown = _as_printed(tables.contents(result))
    return shown


def _as_printed(found: Table) -> str:
    """A table of the terminal."""
    rows = zip(*(map(str, column.cells) for column in found.columns), strict=True)
    words = [n for n, column in enumerate(found.columns) if column.justify == "left"]
    return _table([str(column.header).lower() for column in found.columns], list(rows), words=words)


def _side_by_side(result: Result) -> str:
    """The median of each measurement, a column for each series."""
    summaries = result.summaries()
    rows = []
    for name in dict.fromkeys(name for names in summaries.values() for name in names):
        found = [names.get(name) for names in summaries.values()]
        if name != "create_s" and any(one is not None and tables.matters(name, one.median) for one in found):
            shown = [tables.quantity(name, one.median) if one is not None else "" for one in found]
            rows.append([tables.value_name(name), *shown])
    return _table(["medians", *summaries], rows)


def _details(result: Result) -> str:
    entries = {**result.machine, **result.versions, **{f"option {n}": str(v) for n, v in result.options.items()}}
    late = tables.client_lateness(result)
    if late:
        entries["the client"] = late
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items())
    return f"<details><summary>Machine, versions, options</summary><dl>{terms}</dl></details>"
