"""Figures as PNG, by a headless Chromium: what is in the file is what the page shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loadtest.report.figures import figures
from loadtest.report.page import STYLE
from loadtest.results import ResultError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadtest.results import Result

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH: Final = 860
_MARGIN: Final = 16
_HEAD: Final = 34
_SCALE: Final = 1.5


def browser(given: str | None = None) -> str:
    """A Chromium. Raises ResultError when there is none."""
    for name in (given,) if given else BROWSERS:
        if found := shutil.which(name):
            return found
    raise ResultError(
        f"pictures need a Chromium: {given or ' or '.join(BROWSERS)} is not in PATH (apt install chromium)"
    )


def draw(results: Sequence[Result], folder: Path, given: str | None = None) -> Iterator[Path]:
    """Write every figure of every run to a folder; the paths. Raises ResultError."""
    program = browser(given)
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        for figure in figures(result):
            drawing = figure.draw(WIDTH)
            path = folder / f"{result.command}-{figure.name}.png"
            page = (
                f'<!doctype html><html data-theme="light"><meta charset="utf-8"><style>{STYLE.read_text()}'
                f"body{{background:var(--card);margin:{_MARGIN}px;overflow:hidden}}"
                f".head{{height:{_HEAD}px;font-size:16px;font-weight:600}}</style>"
                f'<div class="head">{figure.title}</div>{drawing.svg(figure.title)}'
            )
            height = round(drawing.height) + _HEAD + 2 * _MARGIN
            shoot(program, page, path, WIDTH + 2 * _MARGIN, height, _SCALE)
            yield path


def shoot(program: str, page: str, path: Path, width: int, height: int, scale: float) -> None:
    """A picture of a page. Raises ResultError."""
    with tempfile.TemporaryDirectory(prefix="warmpool-report-") as work:
        html = Path(work) / "page.html"
        html.write_text(page, encoding="utf-8")
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [program, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={work}/profile",
             f"--force-device-scale-factor={scale}", f"--window-size={width},{height}", *options,
             f"--screenshot={path.absolute()}", html.as_uri()],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    if done.returncode or not path.is_file():
        raise ResultError(f"{program} made no picture: {done.stderr.strip()[-300:]}")
