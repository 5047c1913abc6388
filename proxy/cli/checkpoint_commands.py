"""What the commands about checkpoints do."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import orjson

from proxy.checkpoint.archive import SUFFIX, Compression
from proxy.checkpoint.errors import StoreError
from proxy.checkpoint.manifest import Manifest
from proxy.cli import checkpoint_tables as tables
from proxy.cli import wiring
from proxy.cli.control_client import Control, ControlError, address_of
from proxy.config.load import load
from proxy.config.values import short_size
from proxy.doctor import preflight
from proxy.doctor.view import Host
from proxy.errors import ConfigError, HostError, RuntimeFailure
from proxy.pool import golden
from proxy.runtime.state_dir import InUseError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator

    from proxy.checkpoint.store import CheckpointStore
    from proxy.config.settings import Settings
    from proxy.runtime.base import Runtime

T = TypeVar("T")

MAKING: Final = (
    "cleanup", "start", "load", "warmup", "canary", "sleep", "checkpoint", "check", "restore", "health", "wake_up",
    "reseed", "canary again", "stop",
)  # fmt: skip
"""The stages of `create`, for the length of the bar; some may not occur."""


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


def key_of(settings: Settings, name: str) -> str:
    """The key of a model, given by key or by any name clients use. Raises BadParameter."""
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


def _context(settings: Settings, key: str) -> golden.CheckpointContext:
    runtimes = wiring.runtimes(settings)
    runtime = runtimes[settings.models[key].runtime]
    return golden.CheckpointContext(settings, key, runtime, wiring.store(settings))


def create(path: Path | None, model: str, *, as_json: bool, costs: bool = False) -> None:
    """Make a golden checkpoint and prove it; `costs`: and say what each tier costs."""
    settings = load(path)
    key = key_of(settings, model)
    context = _context(settings, key)

    async def work() -> golden.Created:
        if found := await preflight.problems(settings, Host(), key):
            raise golden.GoldenError(f"nothing was started, for its checkpoint would fail: {'; '.join(found)}")
        async with _opened(context.runtime):
            with tables.Bar(key, len(MAKING)) as bar:
                return await golden.create(context, bar)

    created = _run(work())
    if as_json:
        click.echo(orjson.dumps(_report(created), option=orjson.OPT_INDENT_2).decode())
    else:
        tables.created(created)
        if costs:
            tables.tiers(settings.models[key], created)


def ls(path: Path | None, *, as_json: bool) -> None:
    """Print the checkpoints there are."""
    settings = load(path)
    rows = _run(_listing(settings))
    if as_json:
        click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
        return
    tables.listing(rows)


def inspect(path: Path | None, image: str) -> None:
    """Print a manifest."""
    settings = load(path)
    store = wiring.store(settings)
    manifest = _run(_manifest(store, settings, image))
    shown = manifest.model_dump(mode="json") | {
        "bytes_by_kind": manifest.bytes_by_kind(),
        "total_bytes": manifest.total_bytes(),
    }
    shown["canary"] = None if manifest.canary is None else f"{len(manifest.canary)} characters"
    click.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())


def verify(path: Path | None, image: str, *, digests_only: bool) -> None:
    """Prove an image by its digests, and by a restore."""
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
    context = _context(settings, manifest.model)

    async def work() -> bool:
        async with _opened(context.runtime):
            with tables.Bar(name, 6) as bar:
                return await golden.verify(context, name, bar, restore=True)

    asked = _run(work())
    click.echo(f"{name}: good" + ("" if asked else " (it has no canary: only that it comes up)"))


def analyze(path: Path | None, image: str, *, as_json: bool) -> None:
    """Print what fills an image."""
    settings = load(path)
    manifest = _run(_manifest(wiring.store(settings), settings, image))
    if as_json:
        shown = {
            "bytes_by_kind": manifest.bytes_by_kind(),
            "memory_bytes": manifest.details.get("memory"),
            "largest_files": dict(tables.largest(manifest)),
            "advice": golden.advice(manifest),
        }
        click.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
        return
    tables.analysis(manifest)


def rm(path: Path | None, image: str) -> None:
    """Delete an image."""
    settings = load(path)
    store = wiring.store(settings)
    name = _image(store, settings, image, [*store.names(), *store.archived(), *store.quarantined()])

    async def work() -> None:
        with _alone(store):
            await store.remove(name)
            await store.remove_archive(name)

    _run(work())
    click.echo(f"{name}: deleted")


def export(path: Path | None, image: str, file: Path | None, compression: Compression | None) -> None:
    """Write an image to a file."""
    settings = load(path)
    store = wiring.store(settings)
    name = _image(store, settings, image, store.names())
    chosen = compression or _compression_of(settings, _run(_load(store, name)), file)
    target = file if file is not None else Path(f"{name}{SUFFIX[chosen]}")
    if target.is_dir():
        target /= f"{name}{SUFFIX[chosen]}"
    _run(store.export(name, target, chosen))
    click.echo(f"{name}: {short_size(target.stat().st_size)} in {target}")


def import_(path: Path | None, file: Path) -> None:
    """Take an image out of a file."""
    settings = load(path)
    store = wiring.store(settings)

    async def work() -> tuple[Manifest, str | None]:
        with _alone(store):
            manifest = await store.import_(file)
        return manifest, await _refusal(settings, manifest)

    manifest, reason = _run(work())
    click.echo(f"{manifest.image}: {short_size(manifest.total_bytes())} imported")
    if reason is not None:
        raise click.ClickException(f"{manifest.image}: it will not be used here: {reason}")


def archive(path: Path | None, image: str, *, keep: bool) -> None:
    """Move an image to the archive."""
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
    click.echo(f"{name}: {short_size(target.stat().st_size)} in {target}")


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


async def _refusal(settings: Settings, manifest: Manifest) -> str | None:
    """Why an image cannot be used here."""
    runtime = wiring.runtimes(settings).get(manifest.runtime)
    if runtime is None:
        return f"there is no runtime {manifest.runtime!r}"
    async with _opened(runtime):
        return await runtime.images.refusal(manifest, settings.models)


async def _listing(settings: Settings) -> list[dict[str, Any]]:
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
    states = await _states(settings, [m for *_, m in there if isinstance(m, Manifest)])
    rows = [
        _row(image, where, found, states[id(found)])
        if isinstance(found, Manifest)
        else _row(image, where, None, f"damaged: {found}")
        for image, where, found in there
    ]
    rows += [_row(image, "tmpfs", None, "set aside: it failed to restore") for image in store.quarantined()]
    return rows


async def _states(settings: Settings, manifests: Iterable[Manifest]) -> dict[int, str]:
    """`id` of a manifest → whether it can be used here, as far as that can be told beside a running proxy."""
    states = {id(m): f"refused: there is no runtime {m.runtime!r}" for m in manifests}
    for name, runtime in wiring.runtimes(settings).items():
        mine = [m for m in manifests if m.runtime == name]
        try:
            async with _opened(runtime) if mine else nullcontext():
                models = {key: model for key, model in settings.models.items() if model.runtime == name}
                outdated = await runtime.outdated(models) if mine else {}
                for manifest in mine:
                    reason = await runtime.images.refusal(manifest, settings.models)
                    state = f"outdated: {outdated[manifest.model].reason}" if manifest.model in outdated else "good"
                    states[id(manifest)] = state if reason is None else f"refused: {reason}"
        except InUseError:
            states |= await _states_of_server(settings, mine)
        except (HostError, RuntimeFailure) as error:
            states |= {id(m): f"not checked against this host: {error}" for m in mine}
    return states


async def _states_of_server(settings: Settings, manifests: Iterable[Manifest]) -> dict[int, str]:
    """The same in the words of the running proxy that has the images."""
    try:
        async with Control(address_of(settings.server)) as control:
            models = (await control.status())["models"]
    except (HostError, ControlError, ConfigError):
        return {id(m): "used by a running warmpool that could not be asked" for m in manifests}
    states = {}
    for manifest in manifests:
        model = models.get(manifest.model)
        if model is None:
            states[id(manifest)] = "refused: the running warmpool has no such model"
        elif model["outdated"] is not None:
            states[id(manifest)] = f"outdated: {model['outdated']['reason']}"
        else:
            states[id(manifest)] = "in use by the running warmpool"
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
