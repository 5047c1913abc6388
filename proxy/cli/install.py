"""`warmpool install` and `warmpool uninstall`: systemd's units, shown first, put in place with --yes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from proxy.errors import HostError
from proxy.systemd import units
from proxy.systemd.units import Change, Installation, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SERVICE: Final = "warmpool.service"
SOCKET: Final = "warmpool.socket"

_ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    help="A folder that stands for /: files are written there, and systemd is left alone.",
)
_YES = click.option("--yes", is_flag=True, help="Do it; otherwise only show what would be done.")


@click.command()
@click.option(
    "--config",
    "-c",
    "path",
    type=click.Path(path_type=Path),
    default=units.CONFIG,
    show_default=True,
    help="The configuration that the service will use; it is not changed.",
)
@click.option("--start", is_flag=True, help="Start warmpool, or restart it without losing a request.")
@_YES
@_ROOT
def install(path: Path, start: bool, yes: bool, root: Path) -> None:
    """Run warmpool under systemd with this configuration. Repeat it after an upgrade or a change of the address."""
    from proxy.config.load import load

    settings = load(root / path.relative_to("/") if path.is_absolute() else path)
    made = Installation(root)
    wanted = units.units(settings, _program(), path.absolute())
    steps = made.steps(wanted)
    mount = next((p.name for p in wanted if p.suffix == ".mount"), None)
    changed = {s.path.name if s.path.suffix != ".conf" else s.path.parent.name for s in steps if _does(s)}
    replaced = {s.path.name for s in steps if s.change is Change.REPLACE}
    commands = [
        ["systemctl", "daemon-reload"],
        *([["systemctl", "enable", "--now", mount]] if mount is not None else []),
        # Mounts it again with its new size; what is on it stays.
        *([["systemctl", "reload", mount]] if mount in replaced else []),
        ["systemctl", "enable", "--now", "podman.socket"],
        *([["systemctl", "try-restart", "podman.service"]] if "podman.service.d" in changed else []),
        ["systemctl", "enable", SOCKET, SERVICE],
        *([["systemctl", "restart", SOCKET]] if SOCKET in changed and start else []),
        *([["systemctl", "restart", SERVICE]] if start else []),
    ]
    _show(steps, commands if root == Path("/") else [])
    if not yes:
        click.echo("Nothing was done yet: run it again with --yes.")
        return
    made.carry_out(steps)
    if root == Path("/"):
        _run(commands)
        if not start:
            click.echo(f"Installed. Start it: systemctl restart {SERVICE}")


@click.command()
@_YES
@_ROOT
def uninstall(yes: bool, root: Path) -> None:
    """Stop warmpool and remove its units. The configuration, /var/lib/warmpool and containers stay."""
    made = Installation(root)
    steps = made.steps({})
    if not steps:
        click.echo("Nothing is installed.")
        return
    own = [s.path.name for s in steps if s.path.parent == units.UNITS]
    commands = [["systemctl", "disable", "--now", *own]]
    after = [["systemctl", "daemon-reload"]]
    _show(steps, [*commands, *after] if root == Path("/") else [])
    if not yes:
        click.echo("Nothing was done yet: run it again with --yes.")
        return
    if root == Path("/"):
        _run(commands)
    made.carry_out(steps)
    if root == Path("/"):
        _run(after)
    click.echo(f"Kept: {units.CONFIG.parent}, {units.STATE}, podman's containers and images.")


def _does(step: Step) -> bool:
    return step.change is not Change.NOTHING


def _show(steps: Sequence[Step], commands: Iterable[Sequence[str]]) -> None:
    """Say what happens. Raises HostError when somebody changed a file of ours."""
    for step in steps:
        click.echo(f"{step.change.value:10} {step.path}")
    for command in commands:
        click.echo(f"{'run':10} {' '.join(command)}")
    refused = [str(s.path) for s in steps if s.change is Change.REFUSE]
    if refused:
        raise HostError(
            f"not warmpool's any more: {', '.join(refused)}. Nothing was done. Move your changes to a drop-in "
            "(systemctl edit UNIT) and delete the file, then run this again"
        )


def _program() -> Path:
    """The command `warmpool` of this very environment, by a path that an upgrade leaves as it is."""
    beside = Path(sys.argv[0]).absolute()
    if beside.name == "warmpool" and beside.is_file():
        return beside
    return Path(sys.prefix) / "bin" / "warmpool"


def _run(commands: Iterable[Sequence[str]]) -> None:
    if os.geteuid() != 0 or shutil.which("systemctl") is None:
        raise HostError("this needs root and systemd")
    for command in commands:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise HostError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
