"""`warmpool fleet`: several hosts as one, as a running server sees them."""

from __future__ import annotations

from pathlib import Path

import click

from proxy.cli.failures import Commands
from proxy.cli.options import JSON, ServerChoice, server_options


@click.group(cls=Commands)
def fleet() -> None:
    """Look at the fleet: several hosts that answer as one."""


@fleet.command()
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where to write it.")
@click.option("--listen", default="0.0.0.0:4222", show_default=True, metavar="ADDRESS:PORT", help="The server's.")
@click.option("--subject", default="warmpool", show_default=True, help="As fleet.nats.subject.")
@click.option("--certificate", default="/etc/nats/nats.pem", show_default=True, help="The server's, with its address.")
@click.option("--key", default="/etc/nats/nats.key", show_default=True, help="Its private key.")
@click.option(
    "--ca", default="/etc/nats/ca.pem", show_default=True, help="The authority, for the servers of a cluster."
)
@click.option("--route", "routes", multiple=True, metavar="HOST:PORT", help="A server of a cluster; repeat it for all.")
def nats(hosts: tuple[str, ...], folder: Path, routes: tuple[str, ...], **options: str) -> None:
    """Write nats.conf for a fleet of these hosts, and a file with a password for each."""
    from proxy.cli import fleet_commands

    fleet_commands.write_nats(hosts, folder, routes, options)


@fleet.command()
@server_options
@JSON
def status(server: ServerChoice, as_json: bool) -> None:
    """Show the other hosts that the server has heard of, and what they offer."""
    from proxy.cli import fleet_commands

    fleet_commands.status(server, as_json=as_json)
