"""`warmpool model …`: models of the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from proxy.cli.failures import Commands
from proxy.cli.options import config_option

if TYPE_CHECKING:
    from pathlib import Path


@click.group(cls=Commands)
def model() -> None:
    """Add models to the configuration."""


@model.command(context_settings={"allow_interspersed_args": False})
@click.argument("line", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@config_option("The TOML file to add it to; made if there is none.")
@click.option(
    "--key", metavar="KEY", help="Its key in configuration, metrics and logs; default: made from the model's name."
)
@click.option("--no-checkpoint", is_flag=True, help="Do not start the engine to make its golden checkpoint.")
def add(line: tuple[str, ...], path: Path | None, key: str | None, no_checkpoint: bool) -> None:
    """Add the model that COMMAND serves: a `vllm serve`, `podman run` or `docker run` line, or another server's.

    The entry is written to the configuration, whose comments stay, and checked; then the golden checkpoint is made, as
    by `warmpool checkpoint create`, and the cost of each tier is printed.

    \b
    warmpool model add -- vllm serve org/Model-7B --max-model-len 4096
    warmpool model add -- docker run --gpus all -v /srv/hf:/root/.cache/huggingface \\
        -p 8000:8000 vllm/vllm-openai:latest --model org/Model-7B
    """
    from proxy.cli import model_commands

    model_commands.add(line, path, key, checkpoint=not no_checkpoint)
