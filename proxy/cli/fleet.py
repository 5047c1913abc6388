"""`warmpool fleet`: several hosts as one, as a running server sees them."""

from __future__ import annotations

import click

from proxy.cli.failures import Commands
from proxy.cli.options import JSON, ServerChoice, server_options


@click.group(cls=Commands)
def fleet() -> None:
    """Look at the fleet: several hosts that answer as one."""


@fleet.command()
@server_options
@JSON
def status(server: ServerChoice, as_json: bool) -> None:
    """Show the other hosts that the server has heard of, and what they offer."""
    from proxy.cli import fleet_commands

    fleet_commands.status(server, as_json=as_json)
