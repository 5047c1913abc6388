"""What was found: one row for each check, a table for people, one JSON object for programs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from typing import TextIO

Status = Literal["ok", "warn", "fail", "skip"]
"""`fail` stops the configured models from being checkpointed, `warn` slows or endangers them, `skip` is not needed."""

_STYLE: Final[Mapping[Status, str]] = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


@dataclass(frozen=True, slots=True)
class Repair:
    """A change that is safe to make without asking: it only adds, and puts nothing of the user's aside."""

    what: str
    """Exactly what will be written or run."""
    make: Callable[[], Awaitable[None]]
    """Raises OSError when it cannot."""

    @staticmethod
    def of_files(what: str, change: Callable[[], None]) -> Repair:
        """One that works on files, in a thread."""

        async def make() -> None:
            await asyncio.to_thread(change)

        return Repair(what, make)


@dataclass(frozen=True, slots=True)
class Check:
    """One row."""

    name: str
    status: Status
    found: str
    """What is there, in one line."""
    fix: str = ""
    """The command or setting that fixes it, one a line; empty when there is nothing to fix."""
    repair: Repair | None = None
    stages_s: Mapping[str, float] = field(default_factory=dict)
    """What the stages of the self-test took, in seconds."""


def exit_status(checks: Iterable[Check]) -> int:
    """1 when anything stops the configured models from being checkpointed, else 0."""
    return int(any(check.status == "fail" for check in checks))


def as_json(checks: Sequence[Check], self_test: Check) -> bytes:
    """``{"ok": bool, "checks": [{"name", "status", "found", "fix"}], "self_test": {…, "stages_s": {…}}}``"""
    return orjson.dumps(
        {
            "ok": exit_status([*checks, self_test]) == 0,
            "checks": [_plain(check) for check in checks],
            "self_test": {**_plain(self_test), "stages_s": {n: round(s, 4) for n, s in self_test.stages_s.items()}},
        },
        option=orjson.OPT_INDENT_2,
    )


def _plain(check: Check) -> dict[str, Any]:
    return {"name": check.name, "status": check.status, "found": check.found, "fix": check.fix}


def render(checks: Sequence[Check], self_test: Check, file: TextIO) -> None:
    """Write the table, then what fixes each row, then one line with the sum of it.

    Coloured on a terminal only. Commands are never wrapped, so that they can be copied.
    """
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    rows = [*checks, self_test]
    console.print(_table(rows))
    console.print()
    for check in rows:
        if check.fix:
            console.print(Text(f"{check.name}:", style=_STYLE[check.status]), soft_wrap=True)
            for line in check.fix.splitlines():
                console.print(Text(f"    {line}"), soft_wrap=True)
    console.print(Text(_summary(rows)), soft_wrap=True)


def _table(rows: Iterable[Check]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("check", max_width=20, overflow="fold")
    table.add_column("", width=4)
    table.add_column("found", ratio=1, overflow="fold")
    for check in rows:
        found = check.found
        if check.stages_s:
            found += ": " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in check.stages_s.items())
        table.add_row(Text(check.name), Text(check.status, style=_STYLE[check.status]), Text(found))
    return table


def _summary(rows: Sequence[Check]) -> str:
    failed = [check.name for check in rows if check.status == "fail"]
    warned = [check.name for check in rows if check.status == "warn"]
    if failed:
        return f"Checkpoints do not work here yet: {', '.join(failed)}."
    if warned:
        return f"Checkpoints work here; better fix: {', '.join(warned)}."
    return "Everything needed is here."
