"""`warmpool config …`: configurations checked, shown, converted and explained."""

from __future__ import annotations

from pathlib import Path

import click

from proxy.cli.failures import Commands
from proxy.cli.options import CONFIG, FILE_VARIABLE, chosen_file


@click.group(cls=Commands)
def config() -> None:
    """Check, show, convert and explain configurations."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path), required=False, envvar=FILE_VARIABLE)
def check(file: Path | None) -> None:
    """Check whether FILE can be used here, and list every problem if not (exit status 78).

    Without FILE, the installed one. Programs, files and container images that it names and that are missing are
    warnings.
    """
    import asyncio

    from proxy.config.load import load
    from proxy.doctor import preflight
    from proxy.doctor.view import Host
    from proxy.server import server

    if (file := chosen_file(file)) is None:
        raise click.UsageError("which file? There is no /etc/warmpool/warmpool.toml")
    settings = load(file)
    server.check_files(settings.server)
    for missing in asyncio.run(preflight.missing(settings, Host())):
        click.echo(f"warmpool: warning: {missing}", err=True)
    click.echo(f"{file}: good; models: {', '.join(settings.names())}")


@config.command()
@CONFIG
def show(path: Path | None) -> None:
    """Print the values in effect, file and environment together, as TOML; secrets are masked."""
    import tomli_w

    from proxy.config.load import read
    from proxy.config.masking import masked, with_references

    loaded = read(path)
    shown = with_references(masked(loaded.settings.model_dump(mode="json")), loaded.references)
    click.echo(tomli_w.dumps(shown), nl=False)


@config.command("import-env")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Write this new file, mode 0600, instead of printing."
)
def import_env(file: Path, output: Path | None) -> None:
    """Convert FILE, the .env of the checkpoint scripts that came before warmpool, to a configuration."""
    from proxy.config import import_env as importenv

    converted = importenv.convert(file)
    for warning in converted.warnings:
        click.echo(f"warmpool: {file}: {warning}", err=True)
    if output is None:
        click.echo(converted.toml, nl=False)
        return
    try:
        importenv.write_new(output, converted.toml)
    except OSError as error:
        raise click.FileError(str(output), hint=error.strerror) from None


@config.command("reference")
@click.option(
    "--format",
    "form",
    type=click.Choice(["toml", "markdown"]),
    default="toml",
    show_default=True,
    help="A file to start from, or the tables of docs/reference.md.",
)
def reference_(form: str) -> None:
    """Print every key, its meaning and its default."""
    from proxy.config import reference, reference_page

    click.echo(reference.reference() if form == "toml" else reference_page.page(), nl=False)


@config.command()
def schema() -> None:
    """Print the JSON Schema with which editors complete and check the file.

    \b
    warmpool config schema > warmpool.schema.json
    First line of the file: #:schema ./warmpool.schema.json
    """
    import json

    from proxy.config.schema import schema as made

    click.echo(json.dumps(made(), indent=2))
