"""What a load test is doing, live, in a process of its own.

Drawing takes milliseconds, and a client that measures must not lose them: it only writes a line to a pipe, a few
times a second, and this program draws (``python -m loadtest.display``, on standard error). Where standard error is
no terminal, there is a line for each phase.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any, Final, Self

import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_INTERVAL_S: Final = 0.2


class Display:
    """The sending end. Use it with `with`; `enabled=False` draws nothing."""

    def __init__(self, title: str, *, enabled: bool | None = None) -> None:
        self._title = title
        self._live = sys.stderr.isatty() if enabled is None else enabled
        self._lines = enabled is not False and not self._live
        self._phase = title
        self._next_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._process = subprocess.Popen([sys.executable, "-m", "loadtest.display"], stdin=subprocess.PIPE)
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

    def phase(self, name: str) -> None:
        """Something else begins."""
        self._phase = name
        self._next_s = 0.0
        if self._lines:
            print(f"{self._title}: {name}", file=sys.stderr, flush=True)
        self.update(0, 0)

    def update(self, done: int, total: int, **figures: str) -> None:
        """How far it is; cheap, and dropped when it comes too often."""
        now_s = time.monotonic()
        if self._process is None or self._process.stdin is None or now_s < self._next_s:
            return
        self._next_s = now_s + _INTERVAL_S
        shown = {"title": self._title, "phase": self._phase, "done": done, "total": total, "figures": figures}
        try:
            os.write(self._process.stdin.fileno(), orjson.dumps(shown) + b"\n")
        except (BlockingIOError, BrokenPipeError):
            return  # a picture less


def _picture(shown: dict[str, Any], began_s: float) -> Group:
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(f"{shown['title']}: {shown['phase']}", style="bold"),
        ProgressBar(total=shown["total"] or None, completed=shown["done"], pulse=not shown["total"], width=30),
        Text(f"{shown['done']}/{shown['total']}" if shown["total"] else ""),
        Text(f"{time.monotonic() - began_s:.0f} s", style="dim"),
    )
    figures = Table.grid(padding=(0, 2))
    for name, value in shown["figures"].items():
        figures.add_row(Text(name, style="dim"), Text(value))
    return Group(head, figures)


def main() -> None:
    """Draw what comes on standard input until it ends."""
    began_s = time.monotonic()
    with Live(console=Console(stderr=True), refresh_per_second=8, transient=True) as live:
        for line in sys.stdin.buffer:
            try:
                live.update(_picture(orjson.loads(line), began_s))
            except orjson.JSONDecodeError:
                continue  # half a line: the pipe was full


if __name__ == "__main__":
    main()
