"""`warmpool checkpoint …`: golden checkpoints from the command line.

Reading (`ls`, `inspect`, `analyze`, `export`, `verify --digests-only`) goes beside a running proxy; what changes or
restores images needs the state folder for itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from proxy.cli.control import checkpoint_now
from proxy.cli.failures import Commands
from proxy.cli.options import CONFIG, JSON, MODEL

if TYPE_CHECKING:
    from proxy.checkpoint.archive import Compression

COMPRESSIONS: Final = ("none", "gzip", "zstd")
"""As `checkpoint.store` has them, which is imported when a command runs."""

_IMAGE: Final = click.argument("image")


@click.group(cls=Commands)
def checkpoint() -> None:
    """Make, prove, move and explain golden checkpoints."""


checkpoint.add_command(checkpoint_now)


@checkpoint.command()
@MODEL
@CONFIG
@JSON
def create(model: str, path: Path | None, as_json: bool) -> None:
    """Make the golden checkpoint of MODEL, and prove it by a restore."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.create(path, model, as_json=as_json)


@checkpoint.command()
@CONFIG
@JSON
def ls(path: Path | None, as_json: bool) -> None:
    """List the checkpoints, on tmpfs and archived."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.ls(path, as_json=as_json)


@checkpoint.command()
@_IMAGE
@CONFIG
def inspect(image: str, path: Path | None) -> None:
    """Print the manifest of IMAGE as JSON, without secrets and without the canary's text."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.inspect(path, image)


@checkpoint.command()
@_IMAGE
@CONFIG
@click.option("--digests-only", is_flag=True, help="Only read the files; works beside a running proxy.")
def verify(image: str, path: Path | None, digests_only: bool) -> None:
    """Check the digest of every file of IMAGE, then restore it and compare its answer with the canary."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.verify(path, image, digests_only=digests_only)


@checkpoint.command()
@_IMAGE
@CONFIG
@JSON
def analyze(image: str, path: Path | None, as_json: bool) -> None:
    """Say what fills IMAGE, and how to make it smaller."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.analyze(path, image, as_json=as_json)


@checkpoint.command()
@_IMAGE
@CONFIG
def rm(image: str, path: Path | None) -> None:
    """Delete IMAGE from tmpfs and from the archive, with what was set aside of it."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.rm(path, image)


@checkpoint.command()
@_IMAGE
@click.argument("file", type=click.Path(path_type=Path), required=False)
@CONFIG
@click.option(
    "--compression",
    type=click.Choice(COMPRESSIONS),
    help="Default: criu.compression of the model, or by FILE's name.",
)
def export(image: str, file: Path | None, path: Path | None, compression: Compression | None) -> None:
    """Write IMAGE to FILE (default: its name, in this folder), for another machine of the same kind."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.export(path, image, file, compression)


@checkpoint.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@CONFIG
def import_(file: Path, path: Path | None) -> None:
    """Read the image that `export` wrote to FILE into the store, and check its digests."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.import_(path, file)


@checkpoint.command()
@_IMAGE
@CONFIG
@click.option("--keep", is_flag=True, help="Leave it on tmpfs as well.")
def archive(image: str, path: Path | None, keep: bool) -> None:
    """Move IMAGE from tmpfs to pool.archive_dir, compressed with zstd."""
    from proxy.cli import checkpoint_commands

    checkpoint_commands.archive(path, image, keep=keep)
