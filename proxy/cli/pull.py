"""`warmpool pull`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from proxy.cli.options import CONFIG, MODEL

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@MODEL
@CONFIG
@click.option("--only", type=click.Choice(["image", "weights"]), help="Only one of the two.")
@click.option(
    "--repo", metavar="OWNER/NAME", help="The repository of the weights, where the configuration does not say."
)
@click.option(
    "--revision", help="Branch, tag or commit of the repository; default: what the engine's command says, or main."
)
def pull(model: str, path: Path | None, only: str | None, repo: str | None, revision: str | None) -> None:
    """Fetch what MODEL needs: its container image, and its weights from Hugging Face.

    What is there already is not fetched again, and what was cut off is continued. HF_ENDPOINT names a mirror, HF_TOKEN
    (here or in the engine's env) is for repositories that want one.
    """
    from proxy.cli import pull_commands

    pull_commands.pull(path, model, only=only, repo=repo, revision=revision)
