"""`restore-flags`: the same restore again and again, each time with one setting changed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import tomli_w

from loadtest.ladder import Checks
from loadtest.machine import HUGE_PAGES, huge_pages
from loadtest.serving import TIERS, TMPFS, ServeError, learn_versions, serving, warmpool
from proxy.checkpoint.archive import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loadtest.display import Display
    from loadtest.results import Writer
    from loadtest.serving import Folders, Setup

DEFAULT: Final = "default"
AGAIN: Final = "default, again"
DISK: Final = Path("/var/tmp")


@dataclass(frozen=True, slots=True)
class Variant:
    """One setting that is not the default."""

    name: str
    entry: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the model."""
    criu: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `[models.NAME.podman.criu]`."""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `[runtime.process]`."""
    tier: str = "checkpointed"
    images: Path = TMPFS
    huge_pages: str | None = None
    same_image: bool = False
    """It matters at the restore only: one image does for all of these."""


def variants(runtime: str, program: Path | None, disk: Path) -> list[Variant]:
    """The matrix for a runtime: `program` is a CRIU other than the system's, `disk` a folder that is not on tmpfs."""
    found = [
        Variant(DEFAULT, same_image=True),
        *(
            Variant(f"huge pages {word}", huge_pages=word, same_image=True)
            for word in ("always", "never")
            if word != huge_pages()
        ),
        Variant("keep = false", entry={"keep": False, "max_instances": 1}),
        Variant("on disk", images=disk),
        Variant("archived (zstd, on disk)", tier="archived"),
    ]
    if runtime == "podman":
        fixed = {"ignore_static_ip": False, "ignore_static_mac": False}
        found += [
            Variant("ignore_static_ip, _mac = false", criu=fixed, same_image=True),
            Variant("tcp_close = false", criu={"tcp_close": False}),
            Variant(
                "tcp_established = true",
                entry={"max_instances": 1},
                criu={"tcp_established": True, "tcp_close": False, **fixed},
            ),
            Variant("file_locks = false", criu={"file_locks": False}),
            Variant("link_remap = false", criu={"link_remap": False}),
            Variant("ignore_rootfs = true", criu={"ignore_rootfs": True}),
            Variant("network_lock = nftables", criu={"network_lock": "nftables"}),
        ]
    if program is not None:
        if runtime == "podman":
            found.append(Variant(f"CRIU {program}", criu={"program": str(program)}))
        else:
            found.append(Variant(f"CRIU {program}", runtime={"criu": str(program)}))
    # What the host did meanwhile shows in this one.
    return [*found, Variant(AGAIN, same_image=True)]


async def restore_flags(
    setup: Setup, matrix: Sequence[Variant], count: int, compressions: Sequence[str], writer: Writer, display: Display
) -> bool:
    """`count` restores with each variant, then exports and imports; whether all that could be done went well."""
    checks = Checks()
    with setup.folders() as shared:
        for variant in matrix:
            display.phase(variant.name)
            own = contextlib.nullcontext(shared) if variant.same_image else setup.folders(variant.images, fresh=True)
            try:
                with _huge_pages(variant.huge_pages), own as where:
                    await _restores(setup, variant, count, where, writer, display, checks)
            except ServeError as error:
                writer.note(f"{variant.name}: {str(error).splitlines()[-1]}")
        if compressions:
            await _moves(setup, compressions, shared, writer, display)
    return checks.into(writer)


async def _restores(
    setup: Setup, variant: Variant, count: int, where: Folders, writer: Writer, display: Display, checks: Checks
) -> None:
    (key,) = setup.keys()
    name = setup.name(key)
    archive = {"archive_dir": f"{where.state}/archive"} if variant.tier == "archived" else {}
    async with serving(_settings(setup, variant, archive), where) as served:
        outcome = await served.ask(name, "stopped", model=key)
        checks.look_at(outcome, key)
        await learn_versions(setup, where, writer)
        if outcome.tier != variant.tier:
            # Its first restore, which repeats the known answer, is not one of those that are measured.
            await served.until(key, variant.tier)
            checks.look_at(await served.ask(name, "first", model=key), key)
        for number in range(count):
            await served.until(key, variant.tier)
            outcome = await served.ask(name, variant.name, model=key)
            if outcome.ok and outcome.tier != variant.tier:
                raise ServeError(f"the image was not used: a request found {outcome.tier}")
            checks.look_at(outcome, key, variant.tier)
            writer.outcome(outcome)
            display.update(number + 1, count)


def _settings(setup: Setup, variant: Variant, pool: Mapping[str, Any]) -> dict[str, Any]:
    # The load-test engine's memory is to be in the image; what it would draw anew after level 2 is not CRIU's time.
    level = {"golden_sleep_level": 1} if setup.config is None else {}
    settings = setup.settings(TIERS[variant.tier], pool=pool, entry={**level, **variant.entry})
    for model in settings["models"].values():
        if variant.criu:
            model["podman"] = {**model["podman"], "criu": {**model["podman"].get("criu", {}), **variant.criu}}
    if variant.runtime:
        of_process = settings.get("runtime", {}).get("process", {})
        settings["runtime"] = {**settings.get("runtime", {}), "process": {**of_process, **variant.runtime}}
    return settings


async def _moves(setup: Setup, compressions: Sequence[str], where: Folders, writer: Writer, display: Display) -> None:
    """Write an image, which is made where there is none, to a file and take it from there, in each form."""
    (key,) = setup.keys()
    settings = _settings(setup, Variant(DEFAULT), {})
    settings["pool"] |= {"state_dir": str(where.state), "checkpoint_dir": str(where.images)}
    config = where.state / "moves.toml"
    config.write_text(tomli_w.dumps(settings))
    if not where.image_names():
        display.phase("an image to export")
        made = await warmpool("checkpoint", "create", key, config=config)
        if made.status:
            writer.note(f"export and import: {made.reason}")
            return
    (image, *_) = where.image_names()
    for compression in compressions:
        display.phase(f"export and import, {compression}")
        file = where.state / f"exported{SUFFIX[compression]}"  # type: ignore[index]
        values: dict[str, float] = {}
        try:
            for name, arguments in (
                ("export_s", ("export", image, str(file), "--compression", compression)),
                ("import_s", ("import", str(file))),
            ):
                began_s = time.monotonic()
                done = await warmpool("checkpoint", *arguments, config=config)
                if done.status:
                    writer.note(f"{name.removesuffix('_s')}, {compression}: {done.reason}")
                    break
                values[name] = time.monotonic() - began_s
                values["file_bytes"] = float(file.stat().st_size)
        finally:
            file.unlink(missing_ok=True)
        if values:
            writer.sample(f"export and import, {compression}", values)


@contextlib.contextmanager
def _huge_pages(setting: str | None) -> Iterator[None]:
    """Transparent huge pages of the whole host, set back afterwards. Raises ServeError."""
    before = huge_pages()
    if setting is None or setting == before:
        yield
        return
    try:
        HUGE_PAGES.write_text(setting)
    except OSError as error:
        raise ServeError(f"{HUGE_PAGES}: {error.strerror}") from error
    try:
        yield
    finally:
        HUGE_PAGES.write_text(before)
