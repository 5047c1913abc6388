"""`warmpool checkpoint …`: golden checkpoints from the command line.

Reading (`ls`, `inspect`, `analyze`, `export`, `verify --digests-only`) goes beside a running proxy; what changes or
restores images needs the state folder for itself.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click
import orjson
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from proxy.checkpoint.manifest import Manifest
from proxy.checkpoint.store import SUFFIX, CheckpointStore, Compression, StoreError
from proxy.config.load import load
from proxy.config.values import format_duration
from proxy.doctor import preflight
from proxy.doctor.view import Host
from proxy.errors import HostError, RuntimeFailure
from proxy.pool import golden

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping

    from proxy.config.settings import Settings
    from proxy.runtime.base import Runtime

T = TypeVar("T")

MAKING = (
    "leftovers", "start", "load", "warmup", "canary", "sleep", "checkpoint", "check", "restore", "health", "wake_up",
    "reseed", "canary again", "stop",
)  # fmt: skip
"""The stages of `create`, for the length of the bar; some may not occur."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the command hands on: how to make the store and the runtimes of a configuration."""

    store: Callable[[Settings], CheckpointStore]
    runtimes: Callable[[Settings], Mapping[str, Runtime]]


class _Bar(golden.Watcher):
    """A progress bar with the stage and its time; a line a stage where the output is not a terminal."""

    def __init__(self, title: str, stages: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._title = title
        self._task: TaskID = self._progress.add_task(title, total=stages)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begins(self, stage: str) -> None:
        self._progress.update(self._task, description=f"{self._title}: {stage}")

    def ended(self, stage: str, seconds: float) -> None:
        self._progress.advance(self._task)
        self._console.print(f"  {stage:<12} {seconds:8.3f} s")


@asynccontextmanager
async def _opened(runtime: Runtime) -> AsyncIterator[Runtime]:
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.close()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """The result; expected failures become one line and exit status 1."""
    try:
        return asyncio.run(work)
    except (golden.GoldenError, StoreError, RuntimeFailure) as error:
        raise click.ClickException(str(error)) from error


def _model(settings: Settings, name: str) -> str:
    """The key of a model, given by key or by any name clients use."""
    if name in settings.models:
        return name
    try:
        return settings.names()[name]
    except KeyError:
        known = ", ".join(sorted(settings.models))
        raise click.BadParameter(f"no model {name!r}; there are: {known}", param_hint="MODEL") from None


def _image(store: CheckpointStore, settings: Settings, name: str, there: Iterable[str]) -> str:
    """The image that a user means: by its own name, or by that of its model if that has just one."""
    images = sorted(set(there))
    if name in images:
        return name
    key = settings.names().get(name, name)
    mine = [image for image in images if image == key or image.rpartition("-")[0] == key]
    if len(mine) == 1:
        return mine[0]
    reason = f"several images: {', '.join(mine)}" if mine else f"no such checkpoint in {store.root}"
    raise click.ClickException(f"{name}: {reason}")


def _shop(wiring: Wiring, settings: Settings, key: str) -> golden.Workshop:
    runtimes = wiring.runtimes(settings)
    runtime = runtimes[settings.models[key].runtime]
    return golden.Workshop(settings, key, runtime, wiring.store(settings))


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def _age(unix_s: float) -> str:
    return f"{format_duration(float(max(0, int(time.time() - unix_s))))} ago"


def group(wiring: Wiring) -> click.Group:
    """The command group."""

    @click.group("checkpoint")
    def checkpoint() -> None:
        """Make, prove, move and explain golden checkpoints."""

    option = click.option(
        "--config",
        "-c",
        "path",
        type=click.Path(path_type=Path),
        envvar="WARMPOOL_CONFIG",
        help="The TOML file to use.",
    )
    as_json = click.option("--json", "json", is_flag=True, help="Print JSON.")

    @checkpoint.command()
    @click.argument("model")
    @option
    @as_json
    def create(model: str, path: Path | None, json: bool) -> None:
        """Make the golden checkpoint of MODEL, and prove it by a restore."""
        settings = load(path)
        key = _model(settings, model)
        shop = _shop(wiring, settings, key)

        async def work() -> golden.Created:
            if found := await preflight.problems(settings, Host(), key):
                raise golden.GoldenError(f"nothing was started, for its checkpoint would fail: {'; '.join(found)}")
            async with _opened(shop.runtime):
                with _Bar(key, len(MAKING)) as bar:
                    return await golden.create(shop, bar)

        created = _run(work())
        if json:
            click.echo(orjson.dumps(_report(created), option=orjson.OPT_INDENT_2).decode())
        else:
            _print_created(created)

    @checkpoint.command("ls")
    @option
    @as_json
    def ls(path: Path | None, json: bool) -> None:
        """List the checkpoints, on tmpfs and archived."""
        settings = load(path)
        rows = _run(_listing(wiring, settings))
        if json:
            click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
            return
        table = _table("IMAGE", "MODEL", "WHERE", "SIZE", "MADE", "STATE", right=["SIZE"])
        for row in rows:
            size = golden.short_size(row["bytes"]) if row["bytes"] is not None else ""
            made = _age(row["created_unix_s"]) if row["created_unix_s"] is not None else ""
            table.add_row(row["image"], row["model"] or "", row["where"], size, made, row["state"])
        _console().print(table)

    @checkpoint.command()
    @click.argument("image")
    @option
    def inspect(image: str, path: Path | None) -> None:
        """Print the manifest of IMAGE as JSON; secrets are not in it, the canary's text is left out."""
        settings = load(path)
        store = wiring.store(settings)
        manifest = _run(_manifest(store, settings, image))
        shown = manifest.model_dump(mode="json") | {
            "bytes_by_kind": manifest.bytes_by_kind(),
            "total_bytes": manifest.total_bytes(),
        }
        shown["canary"] = None if manifest.canary is None else f"{len(manifest.canary)} characters"
        click.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())

    @checkpoint.command()
    @click.argument("image")
    @option
    @click.option("--digests-only", is_flag=True, help="Only read the files; works beside a running proxy.")
    def verify(image: str, path: Path | None, digests_only: bool) -> None:
        """Check the digest of every file of IMAGE, then restore it and compare its answer with the canary."""
        settings = load(path)
        store = wiring.store(settings)
        name = _image(store, settings, image, store.names())
        manifest = _run(_load(store, name))
        if digests_only:
            _run(store.verify(name))
            click.echo(f"{name}: {len(manifest.bytes_by_file)} files are as they were written")
            return
        if manifest.model not in settings.models:
            raise click.ClickException(f"{name}: the configuration has no model {manifest.model!r}")
        shop = _shop(wiring, settings, manifest.model)

        async def work() -> bool:
            async with _opened(shop.runtime):
                with _Bar(name, 6) as bar:
                    return await golden.verify(shop, name, bar, restore=True)

        asked = _run(work())
        click.echo(f"{name}: good" + ("" if asked else " (it has no canary: only that it comes up)"))

    @checkpoint.command()
    @click.argument("image")
    @option
    @as_json
    def analyze(image: str, path: Path | None, json: bool) -> None:
        """Say what fills IMAGE, and how to make it smaller."""
        settings = load(path)
        manifest = _run(_manifest(wiring.store(settings), settings, image))
        if json:
            shown = {
                "bytes_by_kind": manifest.bytes_by_kind(),
                "memory_bytes": manifest.details.get("memory"),
                "largest_files": dict(_largest(manifest)),
                "advice": golden.advice(manifest),
            }
            click.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
            return
        _print_analysis(manifest)

    @checkpoint.command()
    @click.argument("image")
    @option
    def rm(image: str, path: Path | None) -> None:
        """Delete IMAGE: from tmpfs, from the archive, and what was set aside."""
        settings = load(path)
        store = wiring.store(settings)
        name = _image(store, settings, image, [*store.names(), *store.archived(), *store.quarantined()])

        async def work() -> None:
            with _alone(store):
                await store.remove(name)
                await store.remove_archive(name)

        _run(work())
        click.echo(f"{name}: deleted")

    @checkpoint.command()
    @click.argument("image")
    @click.argument("file", type=click.Path(path_type=Path), required=False)
    @option
    @click.option(
        "--compression", type=click.Choice([*SUFFIX]), help="Default: criu.compression of the model, or by FILE's name."
    )
    def export(image: str, file: Path | None, path: Path | None, compression: Compression | None) -> None:
        """Write IMAGE to FILE (default: its name here), for another machine of the same kind."""
        settings = load(path)
        store = wiring.store(settings)
        name = _image(store, settings, image, store.names())
        chosen = compression or _compression_of(settings, _run(_load(store, name)), file)
        target = file if file is not None else Path(f"{name}{SUFFIX[chosen]}")
        if target.is_dir():
            target /= f"{name}{SUFFIX[chosen]}"
        _run(store.export(name, target, chosen))
        click.echo(f"{name}: {golden.short_size(target.stat().st_size)} in {target}")

    @checkpoint.command("import")
    @click.argument("file", type=click.Path(path_type=Path))
    @option
    def import_(file: Path, path: Path | None) -> None:
        """Take the image that `export` wrote to FILE into the store, digests checked."""
        settings = load(path)
        store = wiring.store(settings)

        async def work() -> tuple[Manifest, str | None]:
            with _alone(store):
                manifest = await store.import_(file)
            return manifest, await _refusal(wiring, settings, manifest)

        manifest, reason = _run(work())
        click.echo(f"{manifest.image}: {golden.short_size(manifest.total_bytes())} imported")
        if reason is not None:
            raise click.ClickException(f"{manifest.image}: it will not be used here: {reason}")

    @checkpoint.command()
    @click.argument("image")
    @option
    @click.option("--keep", is_flag=True, help="Leave it on tmpfs as well.")
    def archive(image: str, path: Path | None, keep: bool) -> None:
        """Move IMAGE from tmpfs to pool.archive_dir, compressed with zstd."""
        settings = load(path)
        store = wiring.store(settings)
        name = _image(store, settings, image, store.names())

        async def work() -> Path:
            with _alone(store):
                target = await store.put_into_archive(name)
                if not keep:
                    await store.remove(name)
            return target

        target = _run(work())
        click.echo(f"{name}: {golden.short_size(target.stat().st_size)} in {target}")

    return checkpoint


@contextmanager
def _alone(store: CheckpointStore) -> Iterator[None]:
    """Keep a running proxy's images from being changed under it. Raises StoreError where one runs."""
    store.open()
    try:
        yield
    finally:
        store.close()


async def _load(store: CheckpointStore, image: str) -> Manifest:
    return store.load(image)


async def _manifest(store: CheckpointStore, settings: Settings, name: str) -> Manifest:
    image = _image(store, settings, name, [*store.names(), *store.archived()])
    return store.load(image) if image in store.names() else await store.archived_manifest(image)


async def _refusal(wiring: Wiring, settings: Settings, manifest: Manifest) -> str | None:
    """Why an image cannot be used here."""
    runtime = wiring.runtimes(settings).get(manifest.runtime)
    if runtime is None:
        return f"there is no runtime {manifest.runtime!r}"
    async with _opened(runtime):
        return await runtime.refusal(manifest, settings.models)


async def _listing(wiring: Wiring, settings: Settings) -> list[dict[str, Any]]:
    store = wiring.store(settings)
    there: list[tuple[str, str, Manifest | StoreError]] = []
    for image in store.names():
        try:
            there.append((image, "tmpfs", store.load(image)))
        except StoreError as error:
            there.append((image, "tmpfs", error))
    for image in store.archived():
        try:
            there.append((image, "archive", await store.archived_manifest(image)))
        except StoreError as error:
            there.append((image, "archive", error))
    states = await _states(wiring, settings, [m for *_, m in there if isinstance(m, Manifest)])
    rows = [
        _row(image, where, found, states[id(found)])
        if isinstance(found, Manifest)
        else _row(image, where, None, f"damaged: {found}")
        for image, where, found in there
    ]
    rows += [_row(image, "tmpfs", None, "set aside: it failed to restore") for image in store.quarantined()]
    return rows


async def _states(wiring: Wiring, settings: Settings, manifests: Iterable[Manifest]) -> dict[int, str]:
    """`id` of a manifest → whether it can be used here, as far as that can be told beside a running proxy."""
    states = {id(m): f"refused: there is no runtime {m.runtime!r}" for m in manifests}
    for name, runtime in wiring.runtimes(settings).items():
        mine = [m for m in manifests if m.runtime == name]
        try:
            async with _opened(runtime) if mine else nullcontext():
                models = {key: model for key, model in settings.models.items() if model.runtime == name}
                outdated = await runtime.outdated(models) if mine else {}
                for manifest in mine:
                    reason = await runtime.refusal(manifest, settings.models)
                    state = f"outdated: {outdated[manifest.model].reason}" if manifest.model in outdated else "good"
                    states[id(manifest)] = state if reason is None else f"refused: {reason}"
        except (HostError, RuntimeFailure) as error:
            states |= {id(m): f"not checked against this host: {error}" for m in mine}
    return states


def _row(image: str, where: str, manifest: Manifest | None, state: str) -> dict[str, Any]:
    return {
        "image": image,
        "model": manifest.model if manifest is not None else None,
        "where": where,
        "bytes": manifest.total_bytes() if manifest is not None else None,
        "created_unix_s": manifest.created_unix_s if manifest is not None else None,
        "state": state,
    }


def _compression_of(settings: Settings, manifest: Manifest, file: Path | None) -> Compression:
    by_name: dict[str, Compression] = {suffix: name for name, suffix in SUFFIX.items()}
    if file is not None:
        for suffix in sorted(by_name, key=len, reverse=True):
            if file.name.endswith(suffix):
                return by_name[suffix]
    model = settings.models.get(manifest.model)
    return model.podman.criu.compression if model is not None and model.podman is not None else "zstd"


def _report(created: golden.Created) -> dict[str, Any]:
    manifest = created.manifest
    return {
        "image": manifest.image,
        "bytes": manifest.total_bytes(),
        "bytes_by_kind": manifest.bytes_by_kind(),
        "space_by_kind": manifest.space_by_kind(),
        "memory_bytes": manifest.details.get("memory", {}),
        "gpu_bytes": manifest.details.get("gpu", {}),
        "zero_bytes_left_out": manifest.details.get("zero_bytes_left_out", 0),
        "sleep_level": manifest.sleep_level,
        "warmup": manifest.details.get("warmup", []),
        "making_s": dict(created.making_s),
        "proof_s": dict(created.proof_s),
        "canary_checked": created.canary_checked,
        "repeats_randomness": manifest.details.get("repeats_randomness"),
    }


def _print_created(created: golden.Created) -> None:
    manifest, console = created.manifest, _console()
    warmup = _table("WARM-UP", "TTFT", "TOTAL", "TOKENS", right=["TTFT", "TOTAL", "TOKENS"])
    for number, figure in enumerate(manifest.details.get("warmup", []), 1):
        ttft, total = f"{figure['ttft_s'] * 1000:.1f} ms", f"{figure['total_s'] * 1000:.1f} ms"
        warmup.add_row(str(number), ttft, total, f"{figure['tokens']:.0f}")
    if warmup.row_count:
        console.print(warmup)
    sizes = ", ".join(f"{golden.short_size(size)} {kind}" for kind, size in manifest.bytes_by_kind().items() if size)
    console.print(f"{manifest.image}: {golden.short_size(manifest.total_bytes())} ({sizes})")
    restored_s = sum(s for name, s in created.proof_s.items() if name in ("restore", "health", "wake_up"))
    answered = "it answers as before" if created.canary_checked else "it has no canary"
    console.print(f"{manifest.image}: restored in {restored_s:.3f} s; {answered}")
    if (repeats := manifest.details.get("repeats_randomness")) is not None:
        text = "without a seed of the client's, answers repeat after each restore, and on clones"
        console.print(f"{manifest.image}: {text}: {repeats}")


def _largest(manifest: Manifest, count: int = 5) -> list[tuple[str, int]]:
    return sorted(manifest.bytes_by_file.items(), key=lambda entry: -entry[1])[:count]


def _print_analysis(manifest: Manifest) -> None:
    console = _console()
    total = manifest.total_bytes() or 1
    table = _table("IN THE IMAGE", "SIZE", "SHARE", right=["SIZE", "SHARE"])
    for kind, size in sorted(manifest.bytes_by_kind().items(), key=lambda entry: -entry[1]):
        table.add_row(kind, golden.short_size(size), f"{100 * size / total:.1f} %")
    console.print(table)
    memory: Mapping[str, int] = manifest.details.get("memory") or {}
    if memory:
        resident = _table("RESIDENT AT THE DUMP", "SIZE", right=["SIZE"])
        for kind, size in sorted(memory.items(), key=lambda entry: -entry[1]):
            resident.add_row(kind, golden.short_size(size))
        console.print(resident)
    files = _table("LARGEST FILES", "SIZE", right=["SIZE"])
    for name, size in _largest(manifest):
        files.add_row(name, golden.short_size(size))
    console.print(files)
    for text in golden.advice(manifest) or ["Nothing stands out."]:
        console.print(f"- {text}")
