"""`warmpool status`, `wake`, `suspend`, `stop`, `drain`, `admit`, `checkpoint now`, `logs` and `completion`.

They talk to a running server, which the configuration, `--url` or the environment names.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Self, TypeVar

import click
import orjson
from click.shell_completion import CompletionItem, get_completion_class
from rich.console import Console
from rich.live import Live

from proxy.cli import status_table
from proxy.cli.control_client import Address, Control, ControlError, address_of
from proxy.config.load import load
from proxy.config.server import ServerSettings
from proxy.errors import ConfigError, HostError, WarmpoolError
from proxy.systemd import units

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

_FOLLOW_S: Final = 0.25
_REDRAW_S: Final = 1.0
_TAIL_BYTES_A_LINE: Final = 400

CONFIG_OPTION = click.option(
    "--config",
    "-c",
    "path",
    type=click.Path(path_type=Path),
    envvar="WARMPOOL_CONFIG",
    help="The TOML file that the server uses: its address and its admin token.",
)


def _server_options(command: F) -> F:
    url = click.option("--url", envvar="WARMPOOL_URL", help="The server's address, instead of the configuration's.")
    token = click.option(
        "--token-file",
        type=click.Path(path_type=Path),
        envvar="WARMPOOL_TOKEN_FILE",
        help="File with the admin token, instead of the configuration's.",
    )
    return CONFIG_OPTION(url(token(command)))


def _address(path: Path | None, url: str | None, token_file: Path | None) -> Address:
    address = _configured(path) if url is None else Address(url.rstrip("/"))
    if token_file is not None:
        try:
            token = token_file.read_text().strip()
        except OSError as error:
            raise click.FileError(str(token_file), hint=error.strerror) from None
        address = dataclasses.replace(address, token=token)
    return address


def _configured(path: Path | None) -> Address:
    """Of the given configuration, else the installed one, else that of the environment alone."""
    if path is None and units.CONFIG.is_file():
        path = units.CONFIG
    try:
        return address_of(load(path).server)
    except ConfigError:
        if path is not None:
            raise
        return address_of(ServerSettings())


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except ControlError as error:
        raise click.ClickException(str(error)) from error


def _models(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The models of the configuration, for the shell; nothing where there is none that can be used."""
    path = ctx.params.get("path") or os.environ.get("WARMPOOL_CONFIG")
    try:
        settings = load(Path(path) if path else None)
    except WarmpoolError:
        return []
    return [CompletionItem(key) for key in settings.models if key.startswith(incomplete)]


MODEL = click.argument("model", shell_complete=_models)
_NO_WAIT = click.option("--no-wait", is_flag=True, help="Do not wait until it is done.")
_INSTANCE = click.option("--instance", metavar="ID", help="Only this instance, such as demo-1.")
_WHEN_BUSY = click.option(
    "--when-busy",
    type=click.Choice(["refuse", "wait"]),
    default="refuse",
    show_default=True,
    help="With requests running or waiting: do nothing, or take no new ones and go after the last.",
)


async def _give(address: Address, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with Control(address) as control:
        return await control.order(path, body)


def _down(order: str, address: Address, model: str, body: dict[str, Any]) -> None:
    answer = _run(_give(address, f"models/{model}/{order}", body))
    if not answer["instances"]:
        click.echo(f"{answer['model']}: stopped already")
    for one in answer["instances"]:
        if one["found"] == one["to"]:
            said = f"{one['to']} already"
        else:
            said = f"{one['found']} -> {one['to']}" + ("" if one["done"] else ", under way")
        click.echo(f"{one['id']}: {said}")


@click.command()
@click.argument("model", required=False, shell_complete=_models)
@_server_options
@click.option("--watch", "-w", is_flag=True, help="Stay, and show every change.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, a line for each change.")
def status(
    model: str | None, path: Path | None, url: str | None, token_file: Path | None, watch: bool, as_json: bool
) -> None:
    """Show models, instances, queues, last wakes and memory; of MODEL or of all."""
    address = _address(path, url, token_file)
    with contextlib.suppress(KeyboardInterrupt):
        _run(_watch(address, model, as_json=as_json) if watch else _show(address, model, as_json=as_json))


async def _show(address: Address, model: str | None, *, as_json: bool) -> None:
    async with Control(address) as control:
        found = await control.status()
    key = _key(found, model)
    if as_json:
        shown = found if key is None else found["models"][key]
        click.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
    else:
        Console(highlight=False).print(status_table.table(found, key))


async def _watch(address: Address, model: str | None, *, as_json: bool) -> None:
    async with Control(address) as control:
        if as_json:
            async for found in control.statuses():
                key = _key(found, model)
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
                    live.update(status_table.table(latest, _key(latest, model)), refresh=True)
                changed.clear()
                waiting = asyncio.create_task(changed.wait())
                # Without a change too: the table says how long ago things were.
                await asyncio.wait([following, waiting], timeout=_REDRAW_S, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
        await following


def _key(found: dict[str, Any], model: str | None) -> str | None:
    """The key of a model given by any of its names. Raises ControlError for one that the server does not have."""
    if model is None or model in found["models"]:
        return model
    for key, entry in found["models"].items():
        if model in (entry["name"], *entry["aliases"]):
            return str(key)
    raise ControlError(f"no model {model!r}; there are: {', '.join(found['models'])}")


@click.command()
@MODEL
@_server_options
@_NO_WAIT
def wake(model: str, path: Path | None, url: str | None, token_file: Path | None, no_wait: bool) -> None:
    """Have an instance of MODEL ready."""
    answer = _run(_give(_address(path, url, token_file), f"models/{model}/wake", {"wait": not no_wait}))
    if not answer["done"]:
        click.echo(f"{answer['model']}: waking")
    elif answer["wake"] is None:
        click.echo(f"{answer['instance']}: ready already")
    else:
        took = answer["wake"]
        stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in took["stages"].items())
        click.echo(f"{answer['instance']}: ready from {answer['found']} in {took['seconds']:.3f} s ({stages})")


@click.command()
@MODEL
@_server_options
@_INSTANCE
@_WHEN_BUSY
@_NO_WAIT
def suspend(
    model: str,
    path: Path | None,
    url: str | None,
    token_file: Path | None,
    instance: str | None,
    when_busy: str,
    no_wait: bool,
) -> None:
    """Suspend the instances of MODEL: processes and memory stay, the GPU is free."""
    body = _body(instance, when_busy, no_wait)
    _down("suspend", _address(path, url, token_file), model, body)


@click.command("now")
@MODEL
@_server_options
@_INSTANCE
@_WHEN_BUSY
@_NO_WAIT
def checkpoint_now(
    model: str,
    path: Path | None,
    url: str | None,
    token_file: Path | None,
    instance: str | None,
    when_busy: str,
    no_wait: bool,
) -> None:
    """Have the running server checkpoint the instances of MODEL, as if they had been idle for long."""
    body = _body(instance, when_busy, no_wait)
    _down("checkpoint", _address(path, url, token_file), model, body)


@click.command()
@MODEL
@_server_options
@_INSTANCE
@_WHEN_BUSY
@click.option("--discard-golden-checkpoint", is_flag=True, help="The checkpoint that its instances share goes too.")
@click.option("--force", is_flag=True, help="At once, whatever they do: answers under way break off.")
@_NO_WAIT
def stop(
    model: str,
    path: Path | None,
    url: str | None,
    token_file: Path | None,
    instance: str | None,
    when_busy: str,
    discard_golden_checkpoint: bool,
    force: bool,
    no_wait: bool,
) -> None:
    """End the instances of MODEL, and their own checkpoints."""
    body = _body(instance, when_busy, no_wait)
    if discard_golden_checkpoint:
        body["golden_checkpoint"] = "discard"
    if force:
        body["force"] = True
    _down("stop", _address(path, url, token_file), model, body)


def _body(instance: str | None, when_busy: str, no_wait: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"when_busy": when_busy, "wait": not no_wait}
    return body if instance is None else body | {"instance": instance}


@click.command()
@click.argument("model", required=False, shell_complete=_models)
@_server_options
@_NO_WAIT
def drain(model: str | None, path: Path | None, url: str | None, token_file: Path | None, no_wait: bool) -> None:
    """Close MODEL, or the whole server, to new requests until `admit`; what runs or waits is finished."""
    where = "drain" if model is None else f"models/{model}/drain"
    answer = _run(_give(_address(path, url, token_file), where, {"wait": not no_wait}))
    left = "no request is left" if answer["done"] else "requests are left"
    click.echo(f"{answer['model'] or 'all models'}: closed to new requests; {left}")


@click.command()
@click.argument("model", required=False, shell_complete=_models)
@_server_options
def admit(model: str | None, path: Path | None, url: str | None, token_file: Path | None) -> None:
    """Open MODEL, or the whole server, to requests again."""
    where = "admit" if model is None else f"models/{model}/admit"
    answer = _run(_give(_address(path, url, token_file), where, {}))
    click.echo(f"{answer['model'] or 'all models'}: open to requests")


# --- logs ---


@click.command()
@MODEL
@_server_options
@click.option("--follow", "-f", is_flag=True, help="Stay, and print what is added.")
@click.option("--lines", "-n", type=click.IntRange(min=0), default=50, show_default=True, help="Begin with so many.")
@_INSTANCE
def logs(
    model: str,
    path: Path | None,
    url: str | None,
    token_file: Path | None,
    follow: bool,
    lines: int,
    instance: str | None,
) -> None:
    """Print what the engines of MODEL wrote; on the server's host."""
    folder, key = _run(_log_folder(_address(path, url, token_file), path, model))
    with _Logs(folder, key, instance) as reader, contextlib.suppress(KeyboardInterrupt):
        printed = reader.begin(lines)
        if not printed and not follow:
            what = instance or f"any instance of {key}"
            raise click.ClickException(f"no log of {what} in {folder}")
        while follow:
            time.sleep(_FOLLOW_S)
            reader.go_on()


async def _log_folder(address: Address, path: Path | None, model: str) -> tuple[Path, str]:
    """Where the running server has its logs, and the model's key; as the configuration says where none runs."""
    try:
        async with Control(address) as control:
            found = await control.status()
        return Path(found["log_dir"]), str(_key(found, model))
    except HostError:
        settings = load(path)
        key = settings.names().get(model, model)
        if key not in settings.models:
            raise ControlError(f"no model {model!r}; there are: {', '.join(settings.models)}") from None
        return settings.pool.state_dir.absolute() / "logs", key


class _Logs:
    """The log files of a model's instances, printed as they grow; those that are yet to come too."""

    def __init__(self, folder: Path, key: str, instance: str | None) -> None:
        self._folder = folder
        self._key = key
        self._instance = instance
        self._open: dict[str, IO[bytes]] = {}
        self._rest: dict[str, bytes] = {}
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self._folder.glob(f"{self._key}-*.log")):
            name = path.stem
            if name.rpartition("-")[0] == self._key and self._instance in (None, name):
                yield name, path

    def begin(self, lines: int) -> bool:
        """Print the last `lines` of each; whether there was a file."""
        for name, path in self._files():
            file = self._open[name] = path.open("rb")
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - lines * _TAIL_BYTES_A_LINE - 1))
            text = file.read()
            ends = text.splitlines(keepends=True)
            self._print(name, b"".join(ends[-lines:]) if lines else b"")
        return bool(self._open)

    def go_on(self) -> None:
        """Print what was added since, from the start where a file was begun anew."""
        for name, path in self._files():
            file = self._open.get(name)
            with contextlib.suppress(OSError):
                there = path.stat()
                if file is None or os.fstat(file.fileno()).st_ino != there.st_ino:
                    anew = path.open("rb")
                    if file is not None:
                        file.close()
                    file = self._open[name] = anew
                elif there.st_size < file.tell():
                    file.seek(0)
            if file is not None:
                self._print(name, file.read())

    def _print(self, name: str, text: bytes) -> None:
        """Whole lines, and a heading wherever another file goes on."""
        text = self._rest.pop(name, b"") + text
        whole, newline, rest = text.rpartition(b"\n")
        if rest:
            self._rest[name] = rest
        if not newline:
            return
        if name != self._last:
            click.echo(click.style(f"==> {name} <==", bold=True), err=True)
            self._last = name
        click.echo(whole.decode("utf-8", "replace"))


# --- completion ---


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options and models.

    \b
    bash:  warmpool completion bash > /etc/bash_completion.d/warmpool
    zsh:   warmpool completion zsh > "${fpath[1]}/_warmpool"
    fish:  warmpool completion fish > ~/.config/fish/completions/warmpool.fish
    """
    root = click.get_current_context().find_root()
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click has these three
    click.echo(kind(root.command, {}, "warmpool", "_WARMPOOL_COMPLETE").source())


COMMANDS: Final = (status, wake, suspend, stop, drain, admit, logs, completion)
