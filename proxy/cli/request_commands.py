"""`warmpool requests`: who asks a running server, and what becomes of it."""

from __future__ import annotations

import datetime as dt
import shutil
import sys
from typing import TYPE_CHECKING, Any, Final

import click
import orjson

from proxy.cli.control_client import Control
from proxy.cli.control_commands import address_of_choice, finished, key_of_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.cli.options import ServerChoice


_NUMBERS: Final = ("WAIT", "TTFT", "TOTAL", "TOKENS", "/S")
_LONG: Final = ("MODEL", "HOST", "ID")
_HEADER: Final = ("AT", "STATE", "KEY", "FOUND", *_NUMBERS, *_LONG)


def show(server: ServerChoice, model: str | None, filters: Mapping[str, str], *, as_json: bool) -> None:
    """Print those that wait or run, and the last that have ended."""

    async def read() -> dict[str, Any]:
        async with Control(address_of_choice(server)) as control:
            wanted = dict(filters)
            if model is not None:
                wanted["model"] = key_of_model(await control.status(), model) or model
            return await control.requests(wanted)

    found = finished(read())["requests"]
    if as_json:
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    # Programs get a line for each request, however long it is.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines(found, width) or ["no request"]:
        click.echo(line)


def cancel(server: ServerChoice, request_id: str) -> None:
    """End one."""

    async def give() -> None:
        async with Control(address_of_choice(server)) as control:
            await control.cancel(request_id)

    finished(give())
    click.echo(f"{request_id}: cancelled")


def lines(found: list[dict[str, Any]], width: int | None = None) -> list[str]:
    """A line for each request, below their header; two, the second with what is long, where one is over the width."""
    rows = [_HEADER, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    whole = [
        "  ".join(c.rjust(w) if n in _NUMBERS else c.ljust(w) for n, c, w in zip(_HEADER, row, widths, strict=True))
        for row in rows
    ]
    if not found or width is None or max(len(line.rstrip()) for line in whole) <= width:
        return [line.rstrip() for line in whole] if found else []
    short = len(widths) - len(_LONG)
    cut = sum(widths[:short]) + 2 * short
    halves = [(line[:cut].rstrip(), "  " + "  ".join(row[short:])) for line, row in zip(whole, rows, strict=True)]
    return [half for both in halves for half in both]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    at = dt.datetime.fromtimestamp(row["at_unix_s"], dt.UTC).astimezone()
    tokens = "" if row["completion_tokens"] is None else str(row["completion_tokens"])
    return (
        f"{at:%H:%M:%S}", str(row["status"]) if row["state"] == "ended" else row["state"], row["key"] or "",
        row["tier"] or "", _seconds(row["wait_s"]), _seconds(row["ttft_s"]), _seconds(row["total_s"]),
        tokens if row["prompt_tokens"] is None else f"{row['prompt_tokens']}+{tokens or 0}",
        "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}",
        row["model"], row["host"] or "", row["id"],
    )  # fmt: skip


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value else "0"
