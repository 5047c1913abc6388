"""What the commands to a running server do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import orjson
from rich.console import Console
from rich.live import Live

from proxy.cli import status_table
from proxy.cli.control_client import Address, Control, ControlError, address_of
from proxy.config.load import load
from proxy.config.server import ServerSettings
from proxy.errors import ConfigError, HostError
from proxy.runtime.log_files import LogFiles

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from proxy.cli.options import ServerChoice

T = TypeVar("T")

_FOLLOW_S: Final = 0.25
_REDRAW_S: Final = 1.0


def address_of_choice(server: ServerChoice) -> Address:
    """Where the server is that the options name."""
    address = _configured(server.path) if server.url is None else Address(server.url.rstrip("/"))
    if server.token_file is not None:
        try:
            token = server.token_file.read_text().strip()
        except OSError as error:
            raise click.FileError(str(server.token_file), hint=error.strerror) from None
        address = dataclasses.replace(address, token=token)
    return address


def _configured(path: Path | None) -> Address:
    """Of the configuration, or of the environment alone."""
    try:
        return address_of(load(path).server)
    except ConfigError:
        if path is not None:
            raise
        return address_of(ServerSettings())


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Its result; what the server refuses is an error of the command."""
    try:
        return asyncio.run(work)
    except ControlError as error:
        raise click.ClickException(str(error)) from error


def _give(server: ServerChoice, model: str | None, command: str, body: dict[str, Any]) -> dict[str, Any]:
    """The server's answer to a command about a model, or about all."""
    address = address_of_choice(server)

    async def give() -> dict[str, Any]:
        async with Control(address) as control:
            return await control.command(command if model is None else f"models/{model}/{command}", body)

    return finished(give())


# --- status ---


def status(server: ServerChoice, model: str | None, *, watch: bool, as_json: bool) -> None:
    """Print it once, or at every change."""
    address = address_of_choice(server)
    with contextlib.suppress(KeyboardInterrupt):
        finished(_watch(address, model, as_json=as_json) if watch else _show(address, model, as_json=as_json))


async def _show(address: Address, model: str | None, *, as_json: bool) -> None:
    async with Control(address) as control:
        found = await control.status()
    key = key_of_model(found, model)
    if as_json:
        shown = found if key is None else found["models"][key]
        click.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
    else:
        Console(highlight=False).print(status_table.table(found, key))


async def _watch(address: Address, model: str | None, *, as_json: bool) -> None:
    async with Control(address) as control:
        if as_json:
            async for found in control.statuses():
                key = key_of_model(found, model)
                click.echo(orjson.dumps(found if key is None else found["models"][key]).decode())
            return
        latest: dict[str, Any] | None = None
        changed = asyncio.Event()

        async def follow() -> None:
            nonlocal latest
            async for found in control.statuses():
                latest = found
                changed.set()

        following = asyncio.create_task(follow())
        with Live(console=Console(highlight=False), auto_refresh=False) as live:
            while not following.done():
                if latest is not None:
                    live.update(status_table.table(latest, key_of_model(latest, model)), refresh=True)
                changed.clear()
                waiting = asyncio.create_task(changed.wait())
                # Without a change too: the table says how long ago things were.
                await asyncio.wait([following, waiting], timeout=_REDRAW_S, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
        await following


def key_of_model(found: dict[str, Any], model: str | None) -> str | None:
    """The key of a model given by any of its names. Raises ControlError for one that the server does not have."""
    if model is None or model in found["models"]:
        return model
    for key, entry in found["models"].items():
        if model in (entry["name"], *entry["aliases"]):
            return str(key)
    raise ControlError(f"no model {model!r}; there are: {', '.join(found['models'])}")


# --- commands ---


def wake(server: ServerChoice, model: str, *, wait: bool, keep_alive: str | None = None) -> None:
    """Wake, and say from which tier and how fast."""
    answer = _give(server, model, "wake", {"wait": wait, **({"keep_alive": keep_alive} if keep_alive else {})})
    if not answer["done"]:
        click.echo(f"{answer['model']}: waking")
    elif answer["wake"] is None:
        click.echo(f"{answer['instance']}: ready already")
    else:
        took = answer["wake"]
        stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in took["stages"].items())
        click.echo(f"{answer['instance']}: ready from {answer['found']} in {took['seconds']:.3f} s ({stages})")


def pause(server: ServerChoice, model: str, command: str, instance: str | None, *, wait: bool) -> None:
    """Pause or unpause, and say where each instance is."""
    body = {"wait": wait} if instance is None else {"wait": wait, "instance": instance}
    answer = _give(server, model, command, body)
    if not answer["instances"]:
        click.echo(f"{answer['model']}: nothing is paused")
    for one in answer["instances"]:
        click.echo(f"{one['id']}: {one['state'].replace('_', ' ')}")


def step_down(server: ServerChoice, model: str, command: str, body: dict[str, Any]) -> None:
    """Have instances step down, and say from where to where each did."""
    answer = _give(server, model, command, body)
    if not answer["instances"]:
        click.echo(f"{answer['model']}: stopped already")
    for one in answer["instances"]:
        if one["found"] == one["to"]:
            said = f"{one['to']} already"
        else:
            said = f"{one['found']} -> {one['to']}" + ("" if one["done"] else ", under way")
        click.echo(f"{one['id']}: {said}")


def drain(server: ServerChoice, model: str | None, *, wait: bool) -> None:
    """Have a model or all take no new requests."""
    answer = _give(server, model, "drain", {"wait": wait})
    left = "no request is left" if answer["done"] else "requests are left"
    click.echo(f"{answer['model'] or 'all models'}: draining; {left}")


def undrain(server: ServerChoice, model: str | None) -> None:
    """Take that back."""
    answer = _give(server, model, "undrain", {})
    click.echo(f"{answer['model'] or 'all models'}: takes requests again")


# --- logs ---


def logs(server: ServerChoice, model: str, instance: str | None, lines: int, *, follow: bool) -> None:
    """Print the last lines of the engines' logs, and go on with what is added."""
    address = address_of_choice(server)

    async def read() -> None:
        folder, key = await _log_folder(address, server.path, model)
        last = ""
        async with LogFiles(folder, key, instance) as files:
            last = _print(await files.begin(lines), last)
            if not files.found and not follow:
                what = instance or f"any instance of {key}"
                raise click.ClickException(f"no log of {what} in {folder}")
            while follow:
                await asyncio.sleep(_FOLLOW_S)
                last = _print(await files.go_on(), last)

    with contextlib.suppress(KeyboardInterrupt):
        finished(read())


def _print(pieces: Iterable[tuple[str, bytes]], last: str) -> str:
    """Print lines, and a heading wherever another file goes on than the `last` one; the last one now."""
    for name, text in pieces:
        if name != last:
            click.echo(click.style(f"==> {name} <==", bold=True), err=True)
            last = name
        click.echo(text.decode("utf-8", "replace"), nl=False)
    return last


async def _log_folder(address: Address, path: Path | None, model: str) -> tuple[Path, str]:
    """Where the running server has its logs, and the model's key; as the configuration says where none runs."""
    try:
        async with Control(address) as control:
            found = await control.status()
        return Path(found["log_dir"]), str(key_of_model(found, model))
    except HostError:
        settings = load(path)
        key = settings.names().get(model, model)
        if key not in settings.models:
            raise ControlError(f"no model {model!r}; there are: {', '.join(settings.models)}") from None
        return settings.pool.state_dir.absolute() / "logs", key
