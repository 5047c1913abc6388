"""What the commands of `warmpool fleet` do."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click
import orjson
from rich.console import Console
from rich.table import Table

from proxy.cli.control_client import Control
from proxy.cli.control_commands import address_of_choice, finished

if TYPE_CHECKING:
    from proxy.cli.options import ServerChoice


def status(server: ServerChoice, *, as_json: bool) -> None:
    """Print the other hosts."""

    async def read() -> dict[str, Any]:
        async with Control(address_of_choice(server)) as control:
            return await control.fleet()

    found = finished(read())
    if as_json:
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    console = Console(highlight=False)
    console.print(f"{found['host']}: {'connected to NATS' if found['connected'] else 'NATS cannot be reached'}")
    console.print(table(found["hosts"]) if found["hosts"] else "no other host was heard of")


def table(hosts: dict[str, Any]) -> Table:
    """One host a line."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("HOST", "STATE", "HEARD", "VERSION", "URL", "MODELS"):
        shown.add_column(name, overflow="fold")
    for name, host in hosts.items():
        tiers = Counter(offer["tier"] for offer in host["models"].values())
        models = ", ".join(f"{count} {tier}" for tier, count in tiers.most_common())
        shown.add_row(name, _state(host), f"{host['heard_s']:.1f} s", host["version"], host["url"], models)
    return shown


def _state(host: dict[str, Any]) -> str:
    if not host["live"]:
        return "stale"
    if host["draining"]:
        return "draining"
    if host["rests_s"]:
        return "unreachable"
    state = "live" if host["used"] else f"not used: record version {host['record_version']}"
    return f"{state}, gateway" if host["role"] == "gateway" else state
