"""`warmpool status`, `wake`, `pause`, `unpause`, `suspend`, `stop`, `drain`, `undrain`, `checkpoint now` and `logs`.

They talk to a running server, which the configuration, `--url` or the environment names.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from proxy.cli.options import ANY_MODEL, MODEL, ServerChoice, server_options

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")

_INSTANCE: Final = click.option("--instance", metavar="ID", help="Only this instance, such as demo-1.")
_NO_WAIT: Final = click.option("--no-wait", is_flag=True, help="Do not wait until it is done.")


def _step_down_options(command: F) -> F:
    """`--instance`, `--when-busy` and `--no-wait`, as one argument `body` for the server."""

    @functools.wraps(command)
    def with_body(*, instance: str | None, when_busy: str, no_wait: bool, **rest: Any) -> Any:
        body: dict[str, Any] = {"when_busy": when_busy, "wait": not no_wait}
        return command(body=body if instance is None else body | {"instance": instance}, **rest)

    when_busy = click.option(
        "--when-busy",
        type=click.Choice(["refuse", "wait"]),
        default="refuse",
        show_default=True,
        help="While requests run or wait: refuse the command, or admit no new ones and carry it out after the last.",
    )
    return _INSTANCE(when_busy(_NO_WAIT(with_body)))  # type: ignore[return-value]


@click.command()
@ANY_MODEL
@server_options
@click.option("--watch", "-w", is_flag=True, help="Keep running, and show every change.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, a line for each change.")
def status(model: str | None, server: ServerChoice, watch: bool, as_json: bool) -> None:
    """Show models, instances, queues, last wakes and memory, of MODEL or of all models."""
    from proxy.cli import control_commands

    control_commands.status(server, model, watch=watch, as_json=as_json)


@click.command()
@MODEL
@server_options
@click.option(
    "--keep-alive",
    metavar="TIME",
    help="Keep it ready for this long (30m), used or not, unless another model needs the room.",
)
@_NO_WAIT
def wake(model: str, server: ServerChoice, no_wait: bool, keep_alive: str | None) -> None:
    """Bring an instance of MODEL to ready."""
    from proxy.cli import control_commands

    control_commands.wake(server, model, wait=not no_wait, keep_alive=keep_alive)


@click.command()
@MODEL
@server_options
@_INSTANCE
@_NO_WAIT
def pause(model: str, server: ServerChoice, instance: str | None, no_wait: bool) -> None:
    """Pause the running answers of MODEL until `unpause`: its weights leave the GPU, streams stay open."""
    from proxy.cli import control_commands

    control_commands.pause(server, model, "pause", instance, wait=not no_wait)


@click.command()
@MODEL
@server_options
@_INSTANCE
@_NO_WAIT
def unpause(model: str, server: ServerChoice, instance: str | None, no_wait: bool) -> None:
    """Let the paused answers of MODEL continue as soon as there is room."""
    from proxy.cli import control_commands

    control_commands.pause(server, model, "unpause", instance, wait=not no_wait)


@click.command()
@MODEL
@server_options
@_step_down_options
def suspend(model: str, server: ServerChoice, body: dict[str, Any]) -> None:
    """Suspend the instances of MODEL: they leave the GPU, their processes and host memory stay."""
    from proxy.cli import control_commands

    control_commands.step_down(server, model, "suspend", body)


@click.command("now")
@MODEL
@server_options
@_step_down_options
def checkpoint_now(model: str, server: ServerChoice, body: dict[str, Any]) -> None:
    """Have the running server checkpoint the instances of MODEL now instead of when they have been idle."""
    from proxy.cli import control_commands

    control_commands.step_down(server, model, "checkpoint", body)


@click.command()
@MODEL
@server_options
@_step_down_options
@click.option("--discard-golden-checkpoint", is_flag=True, help="Also delete the checkpoint that its instances share.")
@click.option("--force", is_flag=True, help="End them at once; answers under way break off.")
def stop(model: str, server: ServerChoice, body: dict[str, Any], discard_golden_checkpoint: bool, force: bool) -> None:
    """End the instances of MODEL, and their own checkpoints."""
    from proxy.cli import control_commands

    if discard_golden_checkpoint:
        body["golden_checkpoint"] = "discard"
    if force:
        body["force"] = True
    control_commands.step_down(server, model, "stop", body)


@click.command()
@ANY_MODEL
@server_options
@_NO_WAIT
def drain(model: str | None, server: ServerChoice, no_wait: bool) -> None:
    """Refuse new requests for MODEL, or for all models, until `undrain`; requests that run or wait are finished."""
    from proxy.cli import control_commands

    control_commands.drain(server, model, wait=not no_wait)


@click.command()
@ANY_MODEL
@server_options
def undrain(model: str | None, server: ServerChoice) -> None:
    """Admit requests for MODEL, or for all models, again."""
    from proxy.cli import control_commands

    control_commands.undrain(server, model)


@click.command()
@ANY_MODEL
@server_options
@click.option(
    "--state",
    type=click.Choice(["live", "uploading", "waiting", "running", "paused", "ended"]),
    help="Only those in this state; live: all that have not ended.",
)
@click.option("--key", metavar="NAME", help="Only those of this API key.")
@click.option("--host", metavar="ADDRESS", help="Only those from this address.")
@click.option(
    "--status", "status_", metavar="CODE", type=click.IntRange(100, 599), help="Only those answered with this status."
)
@click.option(
    "--limit", "-n", type=click.IntRange(min=1), default=50, show_default=True, help="How many to show at most."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--cancel", metavar="ID", help="End the request with this id instead.")
def requests(
    model: str | None,
    server: ServerChoice,
    state: str | None,
    key: str | None,
    host: str | None,
    status_: int | None,
    limit: int,
    as_json: bool,
    cancel: str | None,
) -> None:
    """Show waiting and running requests, and the last 500 that ended, of MODEL or of all models."""
    from proxy.cli import request_commands

    if cancel is not None:
        request_commands.cancel(server, cancel)
        return
    given = {"state": state, "key": key, "host": host, "status": status_, "limit": limit}
    filters = {name: str(value) for name, value in given.items() if value is not None}
    request_commands.show(server, model, filters, as_json=as_json)


@click.command()
@MODEL
@server_options
@click.option("--follow", "-f", is_flag=True, help="Keep printing new lines.")
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="How many of the last lines to print first.",
)
@_INSTANCE
def logs(model: str, server: ServerChoice, follow: bool, lines: int, instance: str | None) -> None:
    """Print the logs of MODEL's engines; run it on the server's host."""
    from proxy.cli import control_commands

    control_commands.logs(server, model, instance, lines, follow=follow)


COMMANDS: Final = (status, requests, wake, pause, unpause, suspend, stop, drain, undrain, logs)
