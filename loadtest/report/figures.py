"""The figures: each takes a run and draws itself at any width."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loadtest import attribution, stats
from loadtest.report.drawing import CHARACTER, LINE, Drawing, Scale, linear, logarithmic, short_s
from loadtest.results import TTFT
from loadtest.tables import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loadtest.results import Result

TIERS: Final = ("ready", "sleeping", "suspended", "checkpointed", "archived", "stopped")
_MOVING: Final = "moving"
_MOST_DOTS: Final = 400
_MOST_POINTS: Final = 2500
_ROW: Final = 34


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its words."""

    name: str
    """For files and links."""
    title: str
    caption: str
    draw: Callable[[float], Drawing]


def colour(series: str) -> str:
    """A tier's own colour, whatever else is in the name of a series."""
    return next((tier for tier in TIERS if series.startswith(tier)), "lost" if series == "lost" else "other")


def part_colour(name: str) -> str:
    """A stage's."""
    if name == "first token":
        return "token"
    return name if name in attribution.ORDER and name != "wake" else "other"


def figures(result: Result) -> list[Figure]:
    """All that a run has the data for."""
    found: list[Figure] = []
    timed = {s: v for s in ordered_series(result) if (v := [x for x in result.values(s) if x > 0])}
    if "stopped" in timed and len(timed) > 1 and result.command in ("restore", "baseline"):
        found.append(_cold_against_restored(timed))
    if len({value for values in timed.values() for value in values}) > 1 and result.command != "calibrate":
        found.append(_distributions(timed))
    if any(len(values) >= 100 for values in timed.values()) and result.command != "calibrate":
        found.append(_percentiles(timed))
    if result.command in ("baseline", "restore"):
        found += _waterfalls(result)
    if result.command == "restore-flags" and "default" in timed:
        found.append(_forest(timed, "default"))
    if result.command in ("trace", "soak") and timed:
        found.append(_where(result))
    if result.states and timed:
        found.append(_timeline(result))
    errors = result.values("client", "error_s")
    if errors:
        found.append(_errors(errors))
    if any("image_bytes" in s["values"] for s in result.samples):
        found.append(_contents(result))
    return found


def ordered_series(result: Result) -> list[str]:
    """The series; where they are what requests happened to find, from warm to cold."""
    series = result.series()
    if result.command in ("trace", "soak"):
        series.sort(key=lambda name: TIERS.index(name) if name in TIERS else len(TIERS))
    return series


def _label(drawing: Drawing, text: str, y: float, left: float) -> None:
    """Of a row: beside it, or above it where there is no room."""
    if drawing.narrow:
        drawing.text(0, y - 15, text)
    else:
        drawing.text(left - 10, y + 4, text, anchor="end")


def _left(drawing: Drawing, names: Iterable[str]) -> float:
    """Where rows begin."""
    return 0.0 if drawing.narrow else min(230.0, 14 + CHARACTER * max((len(n) for n in names), default=0))


def _axis(drawing: Drawing, scale: Scale, top: float, bottom: float, form: Callable[[float], str] = short_s) -> None:
    """Vertical grid lines, with their values below."""
    last = -100.0
    for tick in scale.ticks:
        x = scale.at(tick)
        text = form(tick)
        drawing.line(x, top, x, bottom)
        half = CHARACTER * len(text) / 2
        if x - half > last + 6:
            anchor = "start" if x < half else "end" if x + half > drawing.width else "middle"
            drawing.text(x, bottom + 15, text, anchor=anchor, kind="soft")
            last = x + half
    drawing.height = bottom + 22


def _distributions(timed: Mapping[str, Sequence[float]]) -> Figure:
    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        left, row = _left(drawing, timed), _ROW + (14 if drawing.narrow else 0)
        everything = [value for values in timed.values() for value in values]
        scale = logarithmic(min(everything), max(everything), left, width - 8)
        _axis(drawing, scale, 4, 10 + row * len(timed))
        jitter = random.Random(0)
        for number, (series, values) in enumerate(timed.items()):
            y = 8 + row * number + row - _ROW / 2
            ordered, fill = sorted(values), colour(series)
            _label(drawing, series, y, left)
            shown = ordered if len(ordered) <= _MOST_DOTS else jitter.sample(ordered, _MOST_DOTS)
            beyond = set(stats.outliers(ordered))
            for value in shown:
                if value not in beyond:
                    drawing.dot(scale.at(value), y + jitter.uniform(-8, 8), fill)
            for value in sorted(beyond, reverse=True)[:60]:
                title = f"{series}: {quantity('_s', value)}, an outlier"
                drawing.dot(scale.at(value), y + jitter.uniform(-6, 6), fill, title, radius=3, ring=True)
            made = stats.summary(values)
            assert made is not None
            title = f"{series}: median {quantity('_s', made.median)}, {made.n} samples, 99 % {quantity('_s', made.p99)}"
            low, high = scale.at(made.low), scale.at(made.high)
            drawing.rect(low, y - 10, high - low, 20, "mark", title, opacity=0.18)
            drawing.rect(scale.at(made.median) - 1, y - 12, 2.5, 24, "mark", title, radius=0)
        return drawing

    return Figure(
        "ttft",
        "Time to the first token",
        "Every request is a dot (of more than 400 a sample), every outlier a ring. The line is the median, the band "
        "its 95 % interval. The scale is logarithmic.",
        draw,
    )


def _percentiles(timed: Mapping[str, Sequence[float]]) -> Figure:
    many = {series: sorted(values) for series, values in timed.items() if len(values) >= 100}
    marks = (50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9)

    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        left, bottom = 46.0, 230.0
        across = linear(0, len(marks) - 1, left, width - 12)
        low = min(stats.percentile(v, 50) for v in many.values())
        high = max(v[-1] for v in many.values())
        up = logarithmic(low, high, bottom, 8)
        for tick in up.ticks:
            drawing.line(left, up.at(tick), width, up.at(tick))
            drawing.text(left - 6, up.at(tick) + 4, short_s(tick), anchor="end", kind="soft")
        for number, mark in enumerate(marks):
            if not drawing.narrow or number % 2 == 0:
                anchor = "end" if number == len(marks) - 1 else "middle"
                drawing.text(across.at(number), bottom + 16, f"{mark:g} %", anchor=anchor, kind="soft")
        for series, ordered in many.items():
            points = [(across.at(n), up.at(stats.percentile(ordered, mark))) for n, mark in enumerate(marks)]
            drawing.path(points, colour(series))
            for (x, y), mark in zip(points, marks, strict=True):
                value = quantity("_s", stats.percentile(ordered, mark))
                drawing.dot(x, y, colour(series), f"{series}: {mark:g} % within {value}", radius=3)
        drawing.height = bottom + 22
        drawing.legend([(colour(series), f"{series} ({len(ordered)})") for series, ordered in many.items()])
        return drawing

    return Figure("percentiles", "Percentiles", "So many of the requests had their first token within this time.", draw)


def _cold_against_restored(timed: Mapping[str, Sequence[float]]) -> Figure:
    made = {series: m for series, values in timed.items() if "first" not in series and (m := stats.summary(values))}
    cold = made["stopped"].median
    shown = dict(sorted(made.items(), key=lambda entry: -entry[1].median))

    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        left, row = _left(drawing, shown), _ROW + (14 if drawing.narrow else 0)
        most = max(one.high for one in shown.values())
        scale = linear(0, most * 1.02, left, width - (96 if drawing.narrow else 150))
        _axis(drawing, scale, 4, 10 + row * len(shown))
        for number, (series, one) in enumerate(shown.items()):
            y = 8 + row * number + row - _ROW / 2
            _label(drawing, series, y, left)
            end = scale.at(one.median)
            title = f"{series}: {quantity('_s', one.low)} to {quantity('_s', one.high)} with 95 % confidence"
            drawing.rect(left, y - 9, end - left, 18, colour(series), title)
            drawing.line(scale.at(one.low), y, scale.at(one.high), y, "mark", 1.5)
            faster = "" if series == "stopped" else f", {cold / one.median:,.0f} : 1"
            drawing.text(scale.at(one.high) + 8, y + 4, quantity("_s", one.median) + faster, kind="strong")
        return drawing

    return Figure(
        "cold-against-restored",
        "Cold against warm",
        "Median time to the first token by what the request found, on one scale; the line is its interval.",
        draw,
    )


def _waterfalls(result: Result) -> list[Figure]:
    found = []
    for series in result.series():
        rows = attribution.median_stages([s for s in result.samples if s["series"] == series])
        if len(rows) > 2:
            found.append(_waterfall(series, rows))
    return found


def _waterfall(series: str, rows: Sequence[tuple[str, float]]) -> Figure:
    total = sum(seconds for _, seconds in rows)

    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        labels = [attribution.LABELS.get(name, name) for name, _ in rows]
        left, row = _left(drawing, labels), LINE + 4 + (14 if drawing.narrow else 0)
        scale = linear(0, total, left, width - 70)
        _axis(drawing, scale, 4, 10 + row * len(rows))
        began = 0.0
        for number, ((name, seconds), label) in enumerate(zip(rows, labels, strict=True)):
            y = 8 + row * number + row - (LINE + 4) / 2
            if drawing.narrow:
                drawing.text(0, y - 11, label, kind="soft")
            else:
                drawing.text(left - 10, y + 4, label, anchor="end")
            x, end = scale.at(began), scale.at(began + seconds)
            drawing.rect(x, y - 7, end - x, 14, part_colour(name), f"{label}: {quantity('_s', seconds)}")
            drawing.text(end + 6, y + 4, quantity("_s", seconds), kind="soft")
            began += seconds
        return drawing

    safe = "".join(c if c.isalnum() else "-" for c in series)
    return Figure(
        f"waterfall-{safe}",
        f"Waterfall: {series}, {quantity('_s', total)}",
        "The median of each stage, one after the other, up to the first token.",
        draw,
    )


def _forest(timed: Mapping[str, Sequence[float]], base: str) -> Figure:
    found = {
        series: ratio
        for series, values in timed.items()
        if series != base and "first" not in series and (ratio := stats.ratio(timed[base], values)) is not None
    }

    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        left, row = _left(drawing, found), _ROW - 6 + (14 if drawing.narrow else 0)
        low, high = min([0.8, *(r.low for r in found.values())]), max([1.25, *(r.high for r in found.values())])
        scale = logarithmic(low, high, left, width - 60)
        bottom = 10 + row * len(found)
        _axis(drawing, scale, 4, bottom, lambda value: f"{value:g} ×")  # noqa: RUF001
        drawing.line(scale.at(1), 4, scale.at(1), bottom, "mark", 1.5)
        for number, (series, ratio) in enumerate(found.items()):
            y = 8 + row * number + row - (_ROW - 6) / 2
            _label(drawing, series, y, left)
            few = min(len(timed[base]), len(timed[series])) < stats.FEWEST
            fill = "other" if few else "bad" if ratio.low > 1 else "good" if ratio.high < 1 else "other"
            drawing.line(scale.at(ratio.low), y, scale.at(ratio.high), y, fill, 2.5)
            title = f"{series}: {ratio.ratio:.2f}, {ratio.low:.2f} to {ratio.high:.2f} with 95 % confidence"
            drawing.dot(scale.at(ratio.ratio), y, fill, title, radius=4.5)
            drawing.text(scale.at(ratio.high) + 8, y + 4, f"{ratio.ratio:.2f}", kind="soft")
        return drawing

    return Figure(
        "against-default",
        "One setting changed: time to the first token, by that of the default",
        "Left of the line is faster; the bar is the 95 % interval of the ratio. Grey: no difference to tell, or too "
        "few samples.",
        draw,
    )


def _where(result: Result) -> Figure:
    found = attribution.where(result.samples)
    order = sorted(found, key=lambda tier: TIERS.index(tier) if tier in TIERS else len(TIERS))
    names = [name for name in attribution.ORDER if any(found[tier].get(name, 0) > 0 for tier in order)]
    counts = {tier: sum(s.get("tier", "") == tier and TTFT in s["values"] for s in result.samples) for tier in order}

    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        labels = {tier: f"{tier or 'not said'} ({counts[tier]})" for tier in order}
        left, row = _left(drawing, labels.values()), _ROW + (14 if drawing.narrow else 0)
        scale = linear(0, 1, left, width - 72)
        for number, tier in enumerate(order):
            y = 8 + row * number + row - _ROW / 2
            _label(drawing, labels[tier], y, left)
            total, began = sum(found[tier].values()) or 1.0, 0.0
            for name in names:
                share = found[tier].get(name, 0.0) / total
                if share:
                    x = scale.at(began)
                    title = f"{attribution.LABELS.get(name, name)}: {100 * share:.1f} %"
                    drawing.rect(x, y - 11, scale.at(began + share) - x, 22, part_colour(name), title, radius=0)
                    began += share
            drawing.text(width - 1, y + 4, short_s(total / max(1, counts[tier])), anchor="end", kind="strong")
        drawing.height = 8 + row * len(order)
        drawing.legend([(part_colour(name), attribution.LABELS.get(name, name)) for name in names])
        return drawing

    return Figure(
        "where",
        "Where the time to the first token went",
        "All requests that found a model on this tier, together; at the right the mean of one of them.",
        draw,
    )


def _errors(errors: Sequence[float]) -> Figure:
    ordered = sorted(errors)

    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        bottom, left = 180.0, 40.0
        edge = max(0.0012, stats.percentile(ordered, 99.9))
        across = linear(0, edge, left, width - 12)
        bins = 48 if not drawing.narrow else 30
        counted: dict[int, int] = defaultdict(int)
        for value in ordered:
            counted[min(bins - 1, max(0, int(value / edge * bins)))] += 1
        _axis(drawing, across, 8, bottom)
        most = max(counted.values())
        for number, count in counted.items():
            x, top = across.at(edge * number / bins), bottom - (bottom - 16) * count / most
            title = f"{short_s(edge * number / bins)} to {short_s(edge * (number + 1) / bins)}: {count}"
            drawing.rect(x + 0.5, top, across.at(edge / bins) - left - 1, bottom - top, "checkpointed", title, radius=1)
        for percent, label in ((50, "median"), (99, "99 %")):
            x = across.at(stats.percentile(ordered, percent))
            drawing.line(x, 8, x, bottom, "mark", 1.5)
            words = f"{label} {short_s(stats.percentile(ordered, percent))}"
            drawing.text(width - 14, 22 if percent == 50 else 40, words, anchor="end", kind="strong")
        return drawing

    return Figure(
        "own-error",
        "The client's own error in the time to the first token",
        f"{len(errors)} streams, each against what the calibrated server did. The last bar holds all that are longer.",
        draw,
    )


def _contents(result: Result) -> Figure:
    kinds = {
        "memory_pages_bytes": ("checkpointed", "memory pages"), "GPU_data_bytes": ("cuda", "GPU data"),
        "shared_memory_bytes": ("sleeping", "shared memory"), "filesystem_diff_bytes": ("archived", "filesystem"),
        "process_state_bytes": ("ready", "process state"),
    }  # fmt: skip
    # Where it is known what of the pages came from a GPU, the two parts are shown in place of the whole.
    pages, parts = "memory_pages_bytes", ("memory_pages.else_bytes", "memory_pages.GPU_state_bytes")
    kinds = {parts[0]: kinds[pages], parts[1]: ("cuda", "GPU state, in memory pages"), **kinds}
    found = {
        series: {
            kind: statistics.median(values)
            for kind in kinds
            if (values := result.values(series, kind))
            and any(values)
            and not (kind == pages and result.values(series, parts[1]))
        }
        for series in result.series()
        if result.values(series, "image_bytes")
    }

    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        left, row = _left(drawing, found), _ROW + (14 if drawing.narrow else 0)
        most = max(sum(sizes.values()) for sizes in found.values())
        scale = linear(0, most / (1 << 20), left, width - 80)
        _axis(drawing, scale, 4, 10 + row * len(found), lambda value: f"{value:g} MiB")
        for number, (series, sizes) in enumerate(found.items()):
            y, began = 8 + row * number + row - _ROW / 2, 0.0
            _label(drawing, series, y, left)
            for kind, size in sizes.items():
                x = scale.at(began)
                began += size / (1 << 20)
                title = f"{kinds[kind][1]}: {quantity('_bytes', size)}"
                drawing.rect(x, y - 10, scale.at(began) - x, 20, kinds[kind][0], title, radius=0)
            drawing.text(scale.at(began) + 8, y + 4, quantity("_bytes", sum(sizes.values())), kind="strong")
        there = [kinds[kind] for kind in kinds if any(kind in sizes for sizes in found.values())]
        drawing.legend(list(dict.fromkeys(there)))
        return drawing

    return Figure("contents", "What is in the image", "By what the bytes are.", draw)


# --- the timeline ---


def _timeline(result: Result) -> Figure:
    dots = [
        (s["at_s"], s["values"][TTFT], s.get("tier", ""), s.get("model", ""))
        for s in result.samples
        if TTFT in s["values"] and "at_s" in s and s["values"][TTFT] > 0
    ]
    lost = [s["at_s"] for s in result.samples if s.get("error") and "at_s" in s]
    lanes = _lanes(result.states)
    ends_s = max([at for at, *_ in dots] + [s["at_s"] for s in result.states])
    begins_s = min([at for at, *_ in dots] + [s["at_s"] for s in result.states])

    def draw(width: float) -> Drawing:
        drawing = Drawing(width)
        left = 46.0 if drawing.narrow else max(46.0, _left(drawing, lanes))
        across = linear(begins_s, ends_s, left, width - 10)
        bottom = _requests(drawing, dots, lost, across, left)
        bottom = _instances(drawing, lanes, across, left, bottom + 26, ends_s)
        bottom = _queue(drawing, result.states, across, left, bottom + 30, ends_s)
        _axis(drawing, across, bottom - 1, bottom, lambda value: f"{value:g} s")
        seen = [
            tier for tier in TIERS if any(t == tier for _, _, t, _ in dots) or any(tier in w for w in _words(lanes))
        ]
        moving = [(_MOVING, "on the way")] if any(_MOVING in words for words in _words(lanes)) else []
        drawing.legend([*((tier, tier) for tier in seen), *moving])
        return drawing

    return Figure(
        "timeline",
        "Timeline",
        "Above: when each request was meant to be sent, and how long its first token took, coloured by what it found. "
        "Middle: the state of each instance. Below: requests that waited for an instance.",
        draw,
    )


def _words(lanes: Mapping[str, Sequence[tuple[float, str]]]) -> list[set[str]]:
    return [{state for _, state in spans} for spans in lanes.values()]


def _lanes(states: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, str]]]:
    """Instance → since when which state; a lane that is gone is stopped."""
    lanes: dict[str, list[tuple[float, str]]] = {}
    for entry in states:
        now = {i: s for model in entry["models"].values() for i, s in model["instances"].items()}
        for instance in dict.fromkeys([*lanes, *now]):
            state = now.get(instance, "stopped")
            word = state if state in TIERS else _MOVING
            spans = lanes.setdefault(instance, [])
            if not spans or spans[-1][1] != word:
                spans.append((entry["at_s"], word))
    return dict(sorted(lanes.items()))


def _requests(
    drawing: Drawing, dots: Sequence[tuple[float, float, str, str]], lost: Sequence[float], across: Scale, left: float
) -> float:
    bottom = 190.0
    up = logarithmic(min(t for _, t, _, _ in dots), max(t for _, t, _, _ in dots), bottom, 10)
    for tick in up.ticks:
        drawing.line(left, up.at(tick), drawing.width - 10, up.at(tick))
        drawing.text(left - 6, up.at(tick) + 4, short_s(tick), anchor="end", kind="soft")
    # The few that waited long are drawn last, and all of them.
    shown = sorted(dots, key=lambda dot: dot[1])
    if len(shown) > _MOST_POINTS:
        shown = [*random.Random(0).sample(shown[:-500], _MOST_POINTS - 500), *shown[-500:]]
        shown.sort(key=lambda dot: dot[1])
    for at, ttft, tier, model in shown:
        title = f"{model} at {at:.2f} s: {quantity('_s', ttft)}, found {tier}" if ttft > 0.1 else ""
        drawing.dot(across.at(at), up.at(ttft), colour(tier), title, radius=2 if len(shown) > 300 else 3.5)
    for at in lost:
        drawing.text(across.at(at), 14, "✕", anchor="middle")
    return bottom


def _instances(
    drawing: Drawing,
    lanes: Mapping[str, Sequence[tuple[float, str]]],
    across: Scale,
    left: float,
    top: float,
    ends_s: float,
) -> float:
    row = 18 + (14 if drawing.narrow else 0)
    for number, (instance, spans) in enumerate(lanes.items()):
        y = top + row * number + (14 if drawing.narrow else 0)
        if drawing.narrow:
            drawing.text(0, y - 2, instance, kind="soft")
        else:
            drawing.text(left - 10, y + 11, instance, anchor="end")
        for index, (begun, state) in enumerate(spans):
            end = spans[index + 1][0] if index + 1 < len(spans) else ends_s
            x = across.at(begun)
            title = f"{instance}: {state} from {begun:.2f} to {end:.2f} s"
            drawing.rect(x, y, max(0.0, across.at(end) - x), 13, state, title, radius=0)
    return top + row * len(lanes)


def _queue(
    drawing: Drawing, states: Sequence[Mapping[str, Any]], across: Scale, left: float, top: float, ends_s: float
) -> float:
    bottom = top + 60
    depth = [(entry["at_s"], sum(model["queue"] for model in entry["models"].values())) for entry in states]
    most = max([1, *(count for _, count in depth)])
    points: list[tuple[float, float]] = []
    for at, count in depth:
        y = bottom - (bottom - top) * count / most
        if points:
            points.append((across.at(at), points[-1][1]))
        points.append((across.at(at), y))
    if points:
        points.append((across.at(ends_s), points[-1][1]))
    drawing.line(left, bottom, drawing.width - 10, bottom)
    drawing.path(points, "queue", closed_at=bottom)
    drawing.text(left - 6, top + 8, str(most), anchor="end", kind="soft")
    drawing.text(left - 6, bottom + 4, "0", anchor="end", kind="soft")
    drawing.text(left, top - 4, "waiting", kind="soft")
    return bottom
