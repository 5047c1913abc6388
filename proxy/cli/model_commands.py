"""What `warmpool model add` does."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import tomli_w

from proxy.cli import checkpoint_commands, checkpoint_tables
from proxy.config import engine_line
from proxy.config.load import parse
from proxy.doctor import preflight
from proxy.doctor.view import Host
from proxy.errors import ConfigError, HostError
from proxy.host import private_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.config.settings import Settings

_NVIDIA: Final = Path("/dev/nvidiactl")
_ARRAY: Final = re.compile(r"\[\n((?:    .*,\n)+)\]$", re.MULTILINE)
_LONGEST_LINE: Final = 100
_KEY: Final = re.compile(r"[a-z][a-z0-9_]{0,47}")


def add(line: Sequence[str], file: Path | None, key: str | None, *, checkpoint: bool) -> None:
    """Write a model's entry, check it, make its golden checkpoint."""
    if file is None:
        raise click.UsageError(
            "which file is it to be added to? Name it with --config FILE; it is made if there is none"
        )
    words = shlex.split(line[0]) if len(line) == 1 else line
    try:
        found = engine_line.parse(words, environment=os.environ, folder=Path.cwd(), gpu=_NVIDIA.exists())
    except engine_line.LineError as error:
        raise click.ClickException(f"{error}. Nothing was written") from None
    name = key or engine_line.key_of(found.key_hint)
    if not _KEY.fullmatch(name):
        raise click.UsageError("--key: a key has lower-case letters, digits and _, and begins with a letter")
    settings = _write(file, name, found.table)
    for note in found.notes:
        click.echo(f"note: {note}")
    click.echo(f"{file}: models.{name} was added, which clients call {settings.served_name(name)}")
    _warn(settings, name, file)
    if not checkpoint:
        click.echo(f"Its golden checkpoint is made by `warmpool checkpoint create {name} -c {file}`.")
        checkpoint_tables.tiers(settings.models[name], None)
        return
    try:
        checkpoint_commands.create(file, name, as_json=False, costs=True)
    except (click.ClickException, HostError) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise click.ClickException(
            f"its golden checkpoint was not made: {reason}. The entry is in {file}; a running warmpool takes it on "
            f"when it reloads, and `warmpool checkpoint create {name} -c {file}` tries again"
        ) from None


def _write(file: Path, key: str, table: Mapping[str, Any]) -> Settings:
    """Add the entry at the end, where it disturbs no comment. Raises ConfigError, and changes nothing then."""
    before = file.read_text() if file.exists() else ""
    if before:
        try:
            there = parse(before, str(file)).settings.models
        except ConfigError as error:
            if "models: is required" not in error.problems:
                raise
        else:
            if key in there:
                raise click.UsageError(f"there is a model {key} in {file}; choose another key with --key")
    entry = _ARRAY.sub(_compact, tomli_w.dumps({"models": {key: table}}))
    text = f"{before.rstrip()}\n\n{entry}" if before.strip() else entry
    try:
        settings = parse(text, str(file)).settings
    except ConfigError as error:
        problems = [*error.problems, "nothing was written"]
        raise ConfigError(str(file), problems, [*error.lines, None]) from None
    private_files.write(file.resolve(), text)
    return settings


def _compact(array: re.Match[str]) -> str:
    """A list of texts on one line, or with each option and its value on one."""
    items = [line.strip().removesuffix(",") for line in array[1].splitlines()]
    if len(whole := f"[{', '.join(items)}]") <= _LONGEST_LINE:
        return whole
    rows: list[list[str]] = []
    for item in items:
        if rows and not item.startswith('"-') and len(rows[-1]) < 2 and rows[-1][0].startswith('"-'):
            rows[-1].append(item)
        else:
            rows.append([item])
    return "[\n" + "".join(f"    {', '.join(row)},\n" for row in rows) + "]"


def _warn(settings: Settings, key: str, file: Path) -> None:
    only = settings.model_copy(update={"models": {key: settings.models[key]}})
    for missing in asyncio.run(preflight.missing(only, Host())):
        click.echo(f"warmpool: warning: {missing}", err=True)
    model = settings.models[key]
    secret = model.api_key is not None or any(
        re.search(r"TOKEN|SECRET|PASSW|KEY", name)
        for engine in (model.process, model.podman)
        if engine is not None
        for name in engine.env
    )
    if secret and stat.S_IMODE(file.stat().st_mode) & 0o044:
        click.echo(
            f"warmpool: warning: {file} has a secret in it and can be read by others; chmod 600 {file}, or write "
            "{env:NAME} in its place",
            err=True,
        )
