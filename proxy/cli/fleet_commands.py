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
from proxy.errors import HostError
from proxy.fleet import nats_conf
from proxy.fleet.record import HOST
from proxy.host import private_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

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


def write_nats(hosts: Sequence[str], folder: Path, routes: Sequence[str], options: Mapping[str, str]) -> None:
    """Write them, all new, mode 0600; nothing where one of them is there already. Raises HostError."""
    if len({*hosts}) < len(hosts) or not all(HOST.fullmatch(host) for host in hosts):
        raise click.UsageError("hosts need different names, of lower-case letters, digits and -")
    users = nats_conf.passwords(hosts)
    files = {f"{host}.password": f"{password}\n" for host, password in users.items()}
    files["nats.conf"] = nats_conf.configuration(users, routes=routes, **options)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if there := sorted(name for name in files if (folder / name).exists()):
            raise HostError(f"{folder} has {', '.join(there)} already: nothing was written")
        for name, text in files.items():
            private_files.write(folder / name, text)
    except OSError as error:
        raise HostError(f"{folder}: {error.strerror}") from None
    click.echo(
        f"Wrote {folder}/nats.conf, for the machine of nats-server, and for each host its fleet.nats.password_file:"
    )
    for host in hosts:
        click.echo(f"  {folder}/{host}.password")
    click.echo(f"nats-server needs {options['certificate']} and {options['key']} too: docs/fleet.md.")


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
