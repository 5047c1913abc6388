"""Results on a terminal."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest import attribution, stats
from loadtest.results import TTFT
from proxy.config.values import short_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loadtest.compare_runs import Comparison
    from loadtest.results import Result

COLD: Final = "stopped"
_OF: Final = {TTFT: "FIRST TOKEN", "total_s": "WHOLE ANSWER"}
AGAINST_COLD: Final = ("baseline", "restore", "burst")
"""Runs of which the requests differ in what they find only."""

_WHEN: Final = ("before", "after")
_HELD: Final = {"resident_bytes": "memory", "files": "open files", "open": "open requests"}
_BESIDE: Final = ("on_the_GPU", "copied_from", "zeros_left_out")
"""Sizes that are no part of an image's."""
SHOWN_VERSIONS: Final = ("warmpool", "commit", "podman", "criu", "vllm", "torch", "CUDA of torch")


def console() -> Console:
    """Standard output; as wide as the tables need where it is no terminal."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=140)


def quantity(name: str, value: float) -> str:
    """A measurement with its unit, by its name's ending."""
    if name.endswith("_bytes"):
        return short_size(round(value))
    if not name.endswith("_s"):
        return f"{value:g}"
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.1f} ms" if value >= 0.0009995 else f"{value * 1e6:.0f} µs"


def interval(name: str, low: float, high: float) -> str:
    """The interval of a median."""
    return f"{quantity(name, low)} to {quantity(name, high)}"


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """An empty one."""
    made = Table(box=box.SIMPLE, pad_edge=False)
    for number, column in enumerate(columns):
        # Names of series are read as wholes.
        made.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=number == 0)
    return made


def cold_start(result: Result, name: str = TTFT) -> stats.Summary | None:
    """What the others are compared with, in a run of which the requests differ in what they find only."""
    if result.command not in AGAINST_COLD:
        return None
    summaries = result.summaries()
    return next((summaries[s][name] for s in (COLD, f"{COLD}, 1 at once") if name in summaries.get(s, {})), None)


def summary(result: Result, name: str = TTFT) -> Table:
    """A row for each series: the median with its interval, percentiles, outliers, the ratio to a cold start."""
    columns = [_OF.get(name, "SERIES"), "N", "MEDIAN", "95 % INTERVAL", "P95", "P99", "MOST", "OUTLIERS"]
    summaries = result.summaries()
    cold = cold_start(result, name) if len(summaries) > 1 else None
    if cold is not None:
        columns.append("AGAINST COLD")
    made = table(*columns, right=columns[1:])
    for series, names in summaries.items():
        found = names.get(name)
        if found is None:
            continue
        faster = [] if cold is None else ["" if found is cold else f"{cold.median / found.median:,.0f} : 1"]
        made.add_row(
            series,
            str(found.n) + ("" if found.enough else " (few)"),
            quantity(name, found.median),
            interval(name, found.low, found.high),
            quantity(name, found.p95),
            quantity(name, found.p99),
            quantity(name, found.most),
            _outliers(found, name),
            *faster,
        )
    return made


def _outliers(found: stats.Summary, name: str) -> str:
    if not found.outlier_count:
        return "none"
    shown = ", ".join(quantity(name, value) for value in found.outliers[:2])
    return shown if found.outlier_count <= 2 else f"{found.outlier_count}: {shown}, …"


def stages(result: Result) -> Table:
    """Where a typical request of each series spends its time to the first token."""
    made = table("SERIES", "OF WHICH (MEDIANS)")
    for series in result.series():
        found = attribution.median_stages([s for s in result.samples if s["series"] == series])
        shown = [f"{attribution.LABELS.get(n, n)} {quantity('_s', s)}" for n, s in found if s >= 0.0005]
        if shown:
            made.add_row(series, "; ".join(shown))
    return made


def where(result: Result) -> Table:
    """All requests together: the share of each part."""
    made = table("FOUND", "REQUESTS", "SECONDS", "WHERE THEY WENT", right=["REQUESTS", "SECONDS"])
    answered = [s for s in result.samples if TTFT in s["values"]]
    for tier, found in attribution.where(answered).items():
        total = sum(found.values())
        shares = sorted(found.items(), key=lambda entry: -entry[1])
        text = ", ".join(
            f"{attribution.LABELS.get(n, n)} {100 * s / total:.0f} %" for n, s in shares if s / total > 0.01
        )
        count = sum(s.get("tier", "") == tier for s in answered)
        made.add_row(tier or "not said", str(count), f"{total:.1f}", text)
    return made


def values(result: Result) -> Table:
    """A row for each measurement of each series."""
    made = table(
        "SERIES", "WHAT", "N", "MEDIAN", "95 % INTERVAL", "MOST", right=["N", "MEDIAN", "95 % INTERVAL", "MOST"]
    )
    for series, names in result.summaries().items():
        for name, found in names.items():
            if name == "create_s" or not matters(name, found.median):
                continue  # said under another name, or too small to be of interest to anybody
            what = value_name(name)
            spread = interval(name, found.low, found.high) if found.n > 1 else ""
            made.add_row(series, what, str(found.n), quantity(name, found.median), spread, quantity(name, found.most))
    return made


def matters(name: str, value: float) -> bool:
    """Whether a measurement is large enough to be of interest to anybody."""
    return value >= 0.001 if name.endswith("_s") else bool(value)


def value_name(name: str) -> str:
    """Of a measurement, for people: `making.load_s`: "making: load"."""
    return name.removesuffix("_s").removesuffix("_bytes").replace("_", " ").replace(".", ": ")


def against(result: Result, base: str) -> Table:
    """Each series' time to the first token by that of one of them."""
    made = table("AGAINST " + base.upper(), "RATIO", "95 % INTERVAL", "", right=["RATIO", "95 % INTERVAL"])
    for series in result.series():
        found = stats.ratio(result.values(base), result.values(series))
        if found is None or series == base:
            continue
        word = "slower" if found.low > 1 else "faster" if found.high < 1 else "no clear difference"
        if min(len(result.values(one)) for one in (base, series)) < stats.FEWEST:
            word = f"fewer than {stats.FEWEST} samples"
        made.add_row(series, f"{found.ratio:.2f}", f"{found.low:.2f} to {found.high:.2f}", word)
    return made


def moves(result: Result) -> Table:
    """Exports and imports."""
    made = table("MOVE", "EXPORT", "IMPORT", "FILE", right=["EXPORT", "IMPORT", "FILE"])
    for sample in result.samples:
        found = sample["values"]
        if "export_s" in found:
            shown = [quantity(n, found[n]) if n in found else "" for n in ("export_s", "import_s", "file_bytes")]
            made.add_row(sample["series"], *shown)
    return made


def contents(result: Result) -> Table:
    """What is in each image, largest first."""
    made = table("IMAGE", "WHAT", "SIZE", "SHARE", right=["SIZE", "SHARE"])
    names = {
        "image": "all of it", "zero": "pages of zeros", "repeated": "pages that are there already",
        "compressed": "all of it, by zstd",
    }  # fmt: skip
    for sample in result.samples:
        whole = sample["values"].get("image_bytes") or 1.0
        for name, size in sorted(sample["values"].items(), key=lambda entry: -entry[1]):
            what = name.removesuffix("_bytes")
            if size:
                label = names.get(what, value_name(name))
                share = "" if name.startswith(_BESIDE) else f"{100 * size / whole:.1f} %"
                made.add_row(sample["series"], label, quantity(name, size), share)
        for what, size in sorted(sample.get("memory_bytes", {}).items(), key=lambda entry: -entry[1]):
            made.add_row(sample["series"], f"resident at the dump: {what}", short_size(size), "")
        for what, size in sample.get("pages_by_file", {}).items():
            made.add_row(sample["series"], f"{what}", short_size(size * 4096), f"{100 * size * 4096 / whole:.1f} %")
    return made


def own_error(result: Result) -> Table:
    """The client's error against a calibrated server."""
    made = table("THE CLIENT'S OWN ERROR IN TTFT", "")
    errors = sorted(result.values("client", "error_s"))
    if errors:
        for name, percent in (("median", 50), ("90 %", 90), ("99 %", 99), ("99.9 %", 99.9), ("most", 100)):
            made.add_row(name, quantity("_s", stats.percentile(errors, percent)))
        below = sum(error < 0.001 for error in errors)
        made.add_row("below 1 ms", f"{below} of {len(errors)}: {100 * below / len(errors):.2f} %")
    return made


def comparison(found: Sequence[Comparison], bound: float) -> Table:
    """A row for each pair."""
    made = table("SERIES", "WHAT", "A", "B", "B / A", "95 % INTERVAL", "", right=["A", "B", "B / A", "95 % INTERVAL"])
    for one in found:
        verdict = one.verdict(bound)
        style = {"regression": "bold red", "faster": "green"}.get(verdict, "")
        made.add_row(
            one.series,
            one.name.removesuffix("_s").removesuffix("_bytes").replace("_", " "),
            f"{quantity(one.name, one.base.median)} ({one.base.n})",
            f"{quantity(one.name, one.other.median)} ({one.other.n})",
            f"{one.ratio.ratio:.3f}",
            f"{one.ratio.low:.3f} to {one.ratio.high:.3f}",
            Text(verdict, style=style),
        )
    return made


def held(result: Result) -> Table:
    """What the proxy held while every model rested, before and after the load."""
    made = table("THE PROXY AT REST", "BEFORE", "AFTER", right=["BEFORE", "AFTER"])
    for name in dict.fromkeys(name.removesuffix(" before") for name in result.counts if name.endswith(" before")):
        found = [result.counts[f"{name} {when}"] for when in _WHEN if f"{name} {when}" in result.counts]
        shown = [short_size(round(v)) if "bytes" in name else f"{v:g}" for v in found]
        made.add_row(_HELD.get(name, name), *shown)
    return made


def of(result: Result) -> list[Table]:
    """What a run is shown with."""
    match result.command:
        case "calibrate":
            return [own_error(result)]
        case "checkpoint":
            return [values(result)]
        case "analyze":
            return [contents(result)]
        case "trace":
            return [summary(result), where(result)]
        case "soak":
            return [summary(result), where(result), held(result)]
        case "burst":
            return [summary(result)]
        case "restore-flags":
            return [summary(result), against(result, next(iter(result.series()), "")), moves(result)]
        case _:
            return [summary(result), summary(result, "total_s"), stages(result)]


def head(result: Result) -> str:
    """The machine, in a line."""
    machine = result.machine
    parts = [machine.get("processor", ""), f"{machine.get('cores', '?')} cores", machine.get("memory", "")]
    parts += [machine.get("gpu", "no GPU")]
    parts += [f"{n} {machine[n]}" for n in ("NVIDIA driver",) if n in machine]
    versions = [f"{n} {result.versions[n]}" for n in SHOWN_VERSIONS if n in result.versions]
    return ", ".join([*(p for p in parts if p), *versions])


def counts(result: Result) -> str:
    """The numbers of the run, in a line."""
    return ", ".join(
        f"{value_name(name)} {quantity(name, value)}"
        for name, value in result.counts.items()
        if not name.endswith(tuple(f" {when}" for when in _WHEN))
    )


def client_lateness(result: Result) -> str:
    """Whether the client itself kept up."""
    late = sorted(s["values"]["late_s"] for s in result.samples if "late_s" in s["values"])
    if not late:
        return ""
    return (
        f"the client sent {len(late)} requests {quantity('_s', statistics.median(late))} late (median), "
        f"{quantity('_s', stats.percentile(late, 99))} (99 %), {quantity('_s', late[-1])} (most)"
    )
