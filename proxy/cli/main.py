"""The command `warmpool`: its commands, each of a file of its own.

A file that declares commands imports click and what is as small; what a command needs to run is imported when it runs.
So the shell completes commands and options, and `--version` answers, without aiohttp, pydantic and the server.
"""

from __future__ import annotations

import click

from proxy import __version__
from proxy.cli import (
    checkpoint,
    completion,
    config,
    control,
    doctor,
    engine,
    fleet,
    install,
    key,
    man,
    model,
    pull,
    routes,
    serve,
)
from proxy.cli.failures import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", "-V", prog_name="warmpool")
def cli() -> None:
    """An OpenAI-compatible proxy in front of engines that are mostly not running."""


for _command in (
    serve.serve,
    pull.pull,
    config.config,
    doctor.doctor,
    engine.engine,
    fleet.fleet,
    checkpoint.checkpoint,
    *control.COMMANDS,
    completion.completion,
    install.install,
    install.uninstall,
    key.key,
    man.man,
    model.model,
    routes.routes,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the command."""
    cli(prog_name="warmpool")
