"""What `warmpool pull` does: the container image through podman, the weights with huggingface_hub."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from proxy.cli.checkpoint_commands import key_of
from proxy.cli.model_weights import UnknownWeightsError, Weights, weights_of
from proxy.config.load import load
from proxy.config.values import short_size
from proxy.errors import HostError
from proxy.runtime.podman.api import Podman, PodmanError
from proxy.runtime.podman.pull import Pulled, pull_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub.hf_api import RepoSibling

    from proxy.config.settings import Settings

_ANSWER_S: Final = 30.0
_OTHER_FORMATS: Final = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.gguf",
    "original/*",
    "consolidated*",
)
"""The same weights once more, which vLLM does not read where there are safetensors."""


def pull(path: Path | None, model: str, *, only: str | None, repo: str | None, revision: str | None) -> None:
    """Fetch image and weights of a model; exit status 1 with the reason when one cannot be had."""
    settings = load(path)
    key = key_of(settings, model)
    entry = settings.models[key]
    weights = None
    if only != "image":
        try:
            weights = weights_of(key, settings.served_name(key), entry, repo=repo, revision=revision)
        except UnknownWeightsError as error:
            if only == "weights" or entry.podman is None or repo is not None:
                raise click.ClickException(str(error)) from None
            click.echo(f"warmpool: no weights are fetched: {error}", err=True)
    if only == "image" and entry.podman is None:
        raise click.ClickException(f"models.{key}: its engine is a process, there is no container image to fetch")
    if only != "weights" and entry.podman is not None:
        _image(settings, entry.podman.image)
    if weights is not None:
        _weights(weights)


# --- the container image ---


def _image(settings: Settings, image: str) -> None:
    if image.startswith("localhost/"):
        click.echo(f"{image}: made on this host, nothing to fetch")
        return
    click.echo(f"{image}: fetching the container image", err=True)
    try:
        pulled = asyncio.run(_pulled(settings, image))
    except (PodmanError, HostError) as error:
        raise click.ClickException(f"cannot fetch {image}: {error}") from None
    click.echo(f"{image}: {'fetched' if pulled.is_new else 'up to date'} ({pulled.image_id[:12]})")


async def _pulled(settings: Settings, image: str) -> Pulled:
    podman_settings = settings.runtime.podman
    own_socket = settings.pool.state_dir.absolute() / "pull.sock"
    podman = Podman(podman_settings.socket, own_socket, timeout_s=podman_settings.timeout)
    await podman.open()
    try:
        with _progress() as bar:
            task = bar.add_task("container image", total=None)
            return await pull_image(podman, image, lambda done, total: bar.update(task, completed=done, total=total))
    finally:
        await podman.close()


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


# --- the weights ---


def _weights(wanted: Weights) -> None:
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the package is imported
    try:
        import httpx2
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise click.ClickException(
            f"weights are fetched with the extra hub (make install EXTRAS=hub): {error}"
        ) from None
    hub = huggingface_hub.HfApi()
    endpoint = hub.endpoint
    try:
        info = hub.model_info(
            wanted.repo, revision=wanted.revision, files_metadata=True, timeout=_ANSWER_S, token=wanted.token or False
        )
        left_out = _left_out(info.siblings or ())
        size = sum(f.size or 0 for f in info.siblings or () if not any(Path(f.rfilename).match(p) for p in left_out))
        _make_room(wanted, size)
        click.echo(f"{wanted.repo}: {short_size(size)} from {endpoint} to {wanted.folder}", err=True)
        folder = huggingface_hub.snapshot_download(
            wanted.repo,
            # What was looked at just now, whatever is pushed meanwhile.
            revision=info.sha,
            token=wanted.token or False,
            ignore_patterns=[*left_out] or None,
            cache_dir=wanted.folder if wanted.is_cache else None,
            local_dir=None if wanted.is_cache else wanted.folder,
        )
        if wanted.is_cache:
            _name_revision(wanted, str(info.sha))
    except errors.GatedRepoError:
        reason = "its owner asks for an agreement: accept it on the hub's page, and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"there is no revision {wanted.revision or 'main'}"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it is private and HF_TOKEN is not set or not allowed to read it"
    except errors.OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError as error:
        reason = f"{endpoint}: {error}"
    except httpx2.HTTPError as error:
        reason = f"{endpoint} cannot be reached ({error}): is there a network? HF_ENDPOINT names a mirror"
    except (errors.HFValidationError, OSError) as error:
        reason = str(error)
    else:
        click.echo(f"{wanted.repo}: complete in {folder}")
        return
    raise click.ClickException(f"cannot fetch {wanted.repo}: {' '.join(reason.split())}")


def _left_out(files: Sequence[RepoSibling]) -> tuple[str, ...]:
    return _OTHER_FORMATS if any(f.rfilename.endswith(".safetensors") for f in files) else ()


def _make_room(wanted: Weights, size: int) -> None:
    """Make the folder. Raises ClickException where it cannot hold the files."""
    wanted.folder.mkdir(parents=True, exist_ok=True)
    there = sum(p.stat().st_size for p in wanted.folder.rglob("*") if p.is_file()) if not wanted.is_cache else 0
    free = shutil.disk_usage(wanted.folder).free
    if size - there > free:
        raise click.ClickException(
            f"no room for {wanted.repo}: it takes {short_size(size)}, and {wanted.folder} has {short_size(free)} free"
        )


def _name_revision(wanted: Weights, commit: str) -> None:
    """Engines without a network look a branch up in the cache (refs/main), which a download by commit leaves out."""
    refs = wanted.folder / f"models--{wanted.repo.replace('/', '--')}" / "refs" / (wanted.revision or "main")
    refs.parent.mkdir(parents=True, exist_ok=True)
    refs.write_text(commit)
