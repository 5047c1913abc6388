"""`warmpool requests`: who asks a running server, and what becomes of it."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import click
import orjson
from rich.console import Console
from rich.table import Table

from proxy.cli.control_client import Control
from proxy.cli.control_commands import address_of_choice, finished, key_of_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.cli.options import ServerChoice


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
    else:
        Console(highlight=False).print(table(found) if found else "no request")


def cancel(server: ServerChoice, request_id: str) -> None:
    """End one."""

    async def give() -> None:
        async with Control(address_of_choice(server)) as control:
            await control.cancel(request_id)

    finished(give())
    click.echo(f"{request_id}: cancelled")


def table(found: list[dict[str, Any]]) -> Table:
    """One request a line."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("AT", "STATE", "MODEL", "KEY", "HOST", "FOUND"):
        shown.add_column(name, overflow="fold")
    for name in ("WAIT", "TTFT", "TOTAL", "TOKENS", "/S"):
        shown.add_column(name, justify="right")
    shown.add_column("ID", overflow="fold")
    for row in found:
        state = str(row["status"]) if row["state"] == "ended" else row["state"]
        at = dt.datetime.fromtimestamp(row["at_unix_s"], dt.UTC).astimezone()
        tokens = "" if row["completion_tokens"] is None else str(row["completion_tokens"])
        shown.add_row(
            f"{at:%H:%M:%S}", state, row["model"], row["key"] or "", row["host"] or "", row["tier"] or "",
            _seconds(row["wait_s"]), _seconds(row["ttft_s"]), _seconds(row["total_s"]),
            tokens if row["prompt_tokens"] is None else f"{row['prompt_tokens']}+{tokens or 0}",
            "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}", row["id"],
        )  # fmt: skip
    return shown


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value else "0"
