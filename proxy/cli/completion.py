"""`warmpool completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL: commands, options and models.

    \b
    bash:  warmpool completion bash > /etc/bash_completion.d/warmpool
    zsh:   warmpool completion zsh > "${fpath[1]}/_warmpool"
    fish:  warmpool completion fish > ~/.config/fish/completions/warmpool.fish
    """
    root = click.get_current_context().find_root()
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click has these three
    click.echo(kind(root.command, {}, "warmpool", "_WARMPOOL_COMPLETE").source())
