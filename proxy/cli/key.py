"""`warmpool key`: the file of API keys, and the admin token."""

from __future__ import annotations

import datetime as dt
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from proxy.cli.failures import Commands
from proxy.cli.options import JSON, ServerChoice, config_option, server_options
from proxy.config.values import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.server.auth.api_keys import Entry

PRIORITIES: Final = ("low", "normal", "high")
"""As `server.auth.api_keys` has them, which is imported when a command runs."""
_RELOAD: Final = "warmpool takes it up when it is started or told to reload (systemctl reload warmpool, or SIGHUP)."


def _file_option(command: Callable[..., None]) -> Callable[..., None]:
    """Where the keys are: named, or as the configuration says."""
    command = click.option(
        "--file", "-f", "file", type=click.Path(path_type=Path), help="The file of keys; default: server.keys_file."
    )(command)
    return config_option("The TOML file that names the file of keys.")(command)


def _keys_file(file: Path | None, path: Path | None) -> Path:
    from proxy.config.load import load

    found = file or (load(path).server.keys_file if path is not None else None)
    if found is None:
        raise click.UsageError("say which file: --file FILE, or --config with server.keys_file in it")
    return found


@click.group(cls=Commands)
def key() -> None:
    """Manage the API keys of clients, and the admin token."""


@key.command()
@click.argument("name")
@_file_option
@click.option("--model", "-m", "models", multiple=True, help="Allow this model only; may be repeated.")
@click.option("--requests-per-minute", type=click.IntRange(1), help="The limit of requests in a minute.")
@click.option(
    "--tokens-per-minute", type=click.IntRange(1), help="The limit of tokens in a minute, in prompts and answers."
)
@click.option("--tokens-per-day", type=click.IntRange(1), help="The budget of tokens for a day (UTC).")
@click.option("--gpu-seconds-per-day", type=click.IntRange(1), help="The budget of time on GPUs for a day (UTC).")
@click.option("--concurrency", type=click.IntRange(1), help="The limit of requests at the same time.")
@click.option(
    "--priority", type=click.Choice(PRIORITIES), default="normal", show_default=True,
    help="Whose waiting requests are served first.",
)  # fmt: skip
@click.option("--expires", metavar="DURATION", help="How long it is valid from now, such as 90d; default: for ever.")
def new(
    name: str, file: Path | None, path: Path | None, models: tuple[str, ...], expires: str | None, **rest: Any
) -> None:
    """Make a key for NAME and print it. It cannot be shown again: the file has only a salted hash of it."""
    from pydantic import ValidationError

    from proxy.config.explain import sentence
    from proxy.server.auth import api_keys

    target = _keys_file(file, path)
    limits = {**rest, "models": [*models] or None, "expires": _moment(expires)}
    with api_keys.changing(target) as entries:
        if any(entry.name == name for entry in entries.values()):
            raise click.UsageError(f"there is a key named {name} already; revoke it, or choose another name")
        try:
            id_, secret, entry = api_keys.generate(name, **limits)
        except ValidationError as error:
            raise click.UsageError("; ".join(f"{e['loc'][0]}: {sentence(e)}" for e in error.errors())) from None
        entries[id_] = entry
    click.echo(secret)
    click.echo(f"Keep it now: it is not shown again. {_RELOAD}", err=True)


def _moment(after: str | None) -> dt.datetime | None:
    if after is None:
        return None
    try:
        return dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(seconds=parse_duration(after))
    except ValueError as error:
        raise click.UsageError(f"--expires: {error}") from None


@key.command("list")
@_file_option
def list_(file: Path | None, path: Path | None) -> None:
    """List the keys: who has them, and what they allow."""
    from rich.console import Console
    from rich.table import Table

    from proxy.server.auth import api_keys

    table = Table("id", "name", "created", "expires", "may use", "limits", box=None)
    for id_, entry in api_keys.read(_keys_file(file, path)).entries().items():
        table.add_row(*_row(id_, entry))
    Console().print(table)


def _row(id_: str, entry: Entry) -> tuple[str, ...]:
    expires = "never" if entry.expires is None else f"{entry.expires:%Y-%m-%d}"
    if entry.expires is not None and entry.expires <= dt.datetime.now(dt.UTC):
        expires += " (expired)"
    limits = [
        f"{limit} {what}"
        for limit, what in (
            (entry.requests_per_minute, "requests/min"),
            (entry.tokens_per_minute, "tokens/min"),
            (entry.tokens_per_day, "tokens/day"),
            (entry.gpu_seconds_per_day, "GPU s/day"),
            (entry.concurrency, "at once"),
        )
        if limit is not None
    ]
    if entry.priority != "normal":
        limits.append(f"priority {entry.priority}")
    models = "all models" if entry.models is None else ", ".join(entry.models)
    return id_, entry.name, f"{entry.created:%Y-%m-%d}", expires, models, ", ".join(limits) or "none"


@key.command()
@click.argument("id_or_name")
@_file_option
def revoke(id_or_name: str, file: Path | None, path: Path | None) -> None:
    """Take a key out of the file, by its id or its name."""
    from proxy.server.auth import api_keys

    with api_keys.changing(_keys_file(file, path)) as entries:
        found = [id_ for id_, entry in entries.items() if id_or_name in (id_, entry.name)]
        if not found:
            raise click.UsageError(f"there is no key {id_or_name}")
        for id_ in found:
            del entries[id_]
    click.echo(f"{id_or_name} is revoked. {_RELOAD}")


@key.command()
@click.argument("name", required=False)
@server_options
@click.option(
    "--days", type=click.IntRange(1, 3660), default=1, show_default=True, help="How many days, with today (UTC)."
)
@click.option("--by-day", is_flag=True, help="Print a line for each day.")
@JSON
def usage(name: str | None, server: ServerChoice, days: int, by_day: bool, as_json: bool) -> None:
    """Show what the key NAME, or every key, has used of each model: requests, tokens, GPU time."""
    from proxy.cli import usage_commands

    usage_commands.show(server, name, days, by_day=by_day, as_json=as_json)


@key.command("admin-token")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="Replace a token that is there without asking.")
def admin_token(file: Path, yes: bool) -> None:
    """Write a new admin token to FILE (mode 0600 if it is new), for server.admin.token_file.

    Asks before it replaces one: whoever uses it is locked out.
    """
    from proxy.host import private_files

    if not yes and file.exists() and file.stat().st_size:
        if not sys.stdin.isatty():
            raise click.ClickException(f"{file} has a token; --yes replaces it")
        click.confirm(f"{file} has a token. Replace it? The old one stops working.", abort=True, err=True)
    private_files.write(file, secrets.token_urlsafe(32) + os.linesep)
    click.echo(f"{file} has a new admin token. {_RELOAD}")
