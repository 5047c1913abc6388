"""`warmpool serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from proxy.cli.options import CONFIG

if TYPE_CHECKING:
    from pathlib import Path

FORMATS: Final = ("text", "json", "journal")
"""As `telemetry.logs` has them, which is imported when the server runs."""


@click.command()
@CONFIG
@click.option(
    "--log-format",
    type=click.Choice(["auto", *FORMATS]),
    default="auto",
    show_default=True,
    help="Lines for people, JSON objects, or lines with a priority for systemd's journal; auto: journal there, else "
    "text.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="The least important lines to log.",
)
def serve(path: Path | None, log_format: str, log_level: str) -> None:
    """Run the proxy until SIGTERM or Ctrl-C.

    Where there is no configuration it serves `demo`, the load-test engine, to try warmpool with. To do so though a
    configuration is installed: WARMPOOL_CONFIG= warmpool serve.
    """
    from proxy.cli import run_server

    run_server.run(path, log_format, log_level)
