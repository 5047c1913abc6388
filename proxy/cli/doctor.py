"""`warmpool doctor`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from proxy.cli.options import CONFIG

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.checkpoint.store import CheckpointStore
    from proxy.runtime.base import Runtime
    from proxy.runtime.state_dir import Claim


@click.command()
@CONFIG
@click.option("--fix", is_flag=True, help="Make the fixes that are safe; each is announced first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def doctor(ctx: click.Context, path: Path | None, fix: bool, as_json: bool) -> None:
    """Check whether this host can make checkpoints, and say how to fix what is missing (exit status 1)."""
    import asyncio

    from proxy.cli import wiring
    from proxy.config.load import load
    from proxy.config.runtime import RuntimeSettings
    from proxy.doctor import examination, report
    from proxy.doctor.view import Host

    settings = load(path) if path is not None else None
    runtimes = settings.runtime if settings is not None else RuntimeSettings()

    def make(name: str, claim: Claim, store: CheckpointStore) -> Runtime:
        return wiring.runtime(name, runtimes, claim, store)

    diagnosis = asyncio.run(
        examination.diagnose(settings, Host(), make, fix=fix, tell=lambda text: click.echo(text, err=as_json))
    )
    if as_json:
        click.echo(report.as_json(diagnosis.checks, diagnosis.self_test))
    else:
        report.render(diagnosis.checks, diagnosis.self_test, sys.stdout)
    ctx.exit(diagnosis.exit_status())
