"""Drawing in SVG: shapes, axes, legends. Colours are CSS variables of style.css, so that they follow the theme."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

CHARACTER: Final = 7.0
"""About the width of a character of the text, in pixels."""
LINE: Final = 20
NARROW: Final = 560
"""Below this width, labels stand above what they name instead of beside it."""


@dataclass(slots=True)
class Drawing:
    """An SVG that grows downwards."""

    width: float
    height: float = 0.0
    parts: list[str] = field(default_factory=list)

    @property
    def narrow(self) -> bool:
        """For a phone."""
        return self.width < NARROW

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        title: str = "",
        *,
        radius: float = 2,
        opacity: float = 1,
    ) -> None:
        """A filled rectangle, at least half a pixel wide."""
        faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" height="{height:.1f}" rx="{radius:g}" '
            f'style="fill:var(--{fill})"{faint}>{_title(title)}</rect>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str = "grid", width: float = 1) -> None:
        """A straight line."""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'style="stroke:var(--{stroke})" stroke-width="{width:g}"/>'
        )

    def dot(self, x: float, y: float, fill: str, title: str = "", *, radius: float = 2.5, ring: bool = False) -> None:
        """A disc, or a ring."""
        paint = f"fill:none;stroke:var(--{fill});stroke-width:1.5" if ring else f"fill:var(--{fill});fill-opacity:.55"
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" style="{paint}">{_title(title)}</circle>')

    def path(self, points: Iterable[tuple[float, float]], stroke: str, *, closed_at: float | None = None) -> None:
        """A line through points; filled down to `closed_at` where that is given."""
        text = " ".join(f"{'L' if number else 'M'}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(points))
        if not text:
            return
        if closed_at is not None:
            first, last = text.split()[0][1:], text.rsplit("L", 1)[-1].split()[0].lstrip("M")
            area = f"{text} L{last} {closed_at:.1f} L{first} {closed_at:.1f} Z"
            self.parts.append(f'<path d="{area}" style="fill:var(--{stroke});fill-opacity:.25;stroke:none"/>')
        self.parts.append(f'<path d="{text}" style="fill:none;stroke:var(--{stroke})" stroke-width="1.5"/>')

    def text(self, x: float, y: float, what: str, *, anchor: str = "start", kind: str = "") -> None:
        """A line of text; its baseline is at `y`."""
        named = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(what)}</text>')

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Colour and name of each, in as many lines as they need, below what is there."""
        x, y = 0.0, self.height + 16
        for fill, name in entries:
            wide = 18 + CHARACTER * len(name) + 14
            if x and x + wide > self.width:
                x, y = 0.0, y + LINE
            self.rect(x, y - 10, 11, 11, fill)
            self.text(x + 16, y, name)
            x += wide
        self.height = y + 8

    def svg(self, label: str) -> str:
        """The element; `label` is for those who do not see it."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:.0f}" width="{self.width:g}" height="{self.height:.0f}" '
            f'role="img" aria-label="{escape(label)}">{"".join(self.parts)}</svg>'
        )


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to pixels."""

    at: Callable[[float], float]
    ticks: tuple[float, ...]


def linear(low: float, high: float, left: float, right: float) -> Scale:
    """With three to six ticks at round values."""
    span = high - low or 1.0
    step = 10 ** math.floor(math.log10(span))
    for factor in (0.2, 0.5, 1.0, 2.0):
        if span / (step * factor) <= (4 if right - left < NARROW else 7):
            step *= factor
            break
    first = math.ceil(low / step)
    ticks = tuple(round(n * step, 12) for n in range(first, int(high / step + 1e-9) + 1))
    return Scale(lambda value: left + (value - low) / span * (right - left), ticks)


def logarithmic(low: float, high: float, left: float, right: float) -> Scale:
    """By powers of ten; both ends are positive."""
    low, high = low / 1.15, high * 1.15
    span = math.log(high / low) or 1.0
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < (1.5 if abs(right - left) < NARROW else 2.2) else (1,)
    ticks = tuple(
        round(step * 10.0**exponent, 12)
        for exponent in exponents
        for step in steps
        if low <= step * 10.0**exponent <= high
    )
    return Scale(lambda value: left + math.log(max(value, low) / low) / span * (right - left), ticks)


def short_s(seconds: float) -> str:
    """A time in as few characters as an axis has room for."""
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms" if seconds >= 0.001 else f"{seconds * 1e6:.3g} µs"
