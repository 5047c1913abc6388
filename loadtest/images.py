"""`checkpoint` and `analyze`: what an image costs to make, what is in it, and what would make it smaller."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import orjson
import tomli_w
import zstandard

from loadtest.serving import NEVER, ServeError, folders, remove_containers, warmpool
from proxy.golden import advice, short_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from loadtest.display import Display
    from loadtest.results import Writer
    from loadtest.serving import Folders, Setup
    from proxy.checkpoints import CheckpointStore

PAGE_BYTES: Final = 4096
_ZERO: Final = bytes(PAGE_BYTES)
_SAMPLE_EVERY: Final = 64
"""One block in so many is compressed to see how far it can be."""
_BLOCK_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make an image: the level its engine sleeps at (0: awake), and how its weights are loaded."""

    level: int
    load_format: str | None = None

    @property
    def series(self) -> str:
        """What it is called."""
        slept = f"asleep, level {self.level}" if self.level else "awake"
        return slept + (f", {self.load_format}" if self.load_format else "")


async def checkpoint(setup: Setup, variants: Sequence[Variant], count: int, writer: Writer, display: Display) -> bool:
    """Make and prove a golden checkpoint `count` times in each way; whether all were made."""
    (key,) = setup.keys()
    good = True
    for variant in variants:
        display.phase(variant.series)
        for number in range(count):
            with folders() as where:
                try:
                    made = await asyncio.to_thread(create, setup, variant, key, where)
                except ServeError as error:
                    writer.note(f"{variant.series}: {error}")
                    good = False
                    break
            keep(made, variant.series, writer)
            display.update(number + 1, count, image=short_size(made["bytes"]))
    return good


def keep(made: Mapping[str, Any], series: str, writer: Writer) -> None:
    """Write one report of `warmpool checkpoint create` down."""
    values = {f"making.{name}_s": float(value) for name, value in made["making_s"].items()}
    values |= {f"proof.{name}_s": float(value) for name, value in made["proof_s"].items()}
    values |= {f"{kind.replace(' ', '_')}_bytes": float(size) for kind, size in made["bytes_by_kind"].items()}
    made_s = {n: s for n, s in made["making_s"].items() if n not in ("leftovers", "start", "load")}
    values["create_s"] = made_s.get("checkpoint", 0.0)
    values["image_bytes"] = float(made["bytes"])
    writer.sample(series, values, stages_s=dict(made["making_s"]))


def create(setup: Setup, variant: Variant, key: str, where: Folders) -> dict[str, Any]:
    """Run `warmpool checkpoint create`; what it reports. Raises ServeError."""
    config = configure(setup, variant, where)
    done = warmpool("checkpoint", "create", key, "--json", config=config)
    if setup.settings(NEVER)["models"][key].get("podman"):
        remove_containers(where)
    if done.returncode:
        raise ServeError(f"it could not be made: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    made: dict[str, Any] = orjson.loads(done.stdout)
    return made


def configure(setup: Setup, variant: Variant, where: Folders) -> Path:
    """The configuration file for a variant. Raises ServeError."""
    if setup.config is None:
        if variant.load_format:
            raise ServeError("the load-test engine loads no files; --load-format is for an engine of --config")
        if not variant.level:
            setup = replace(setup, engine=replace(setup.engine, sleep_mode=False))
    elif not variant.level:
        raise ServeError("whether an engine of --config has a sleep mode is said by its command")
    settings = setup.settings({"checkpointed": "1h"}, entry={"golden_sleep_level": variant.level or 2})
    for model in settings["models"].values():
        engine = model.get("podman") or model.get("process") or {}
        if variant.load_format:
            engine["command"] = _with(list(engine["command"]), "--load-format", variant.load_format)
    settings["pool"] |= {"state_dir": str(where.state), "checkpoint_dir": str(where.images)}
    path = where.state / "checkpoint.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def _with(command: list[str], option: str, value: str) -> list[str]:
    if option in command[:-1]:
        command[command.index(option) + 1] = value
        return command
    return [*command, option, value]


# --- what is in an image ---


@dataclass(frozen=True, slots=True)
class Pages:
    """The memory pages of an image, looked at one by one."""

    count: int
    zero: int
    repeated: int
    """Pages, zeros left out, that are the same as an earlier one."""
    compressed: float
    """What zstd (level 3) makes of a sample of all bytes: a share of them."""
    by_file: Mapping[str, int]
    """Name of CRIU's file → pages; there is one for each process, and one for shared memory."""

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.count * PAGE_BYTES


def look_at_pages(folder: Path) -> Pages:
    """Read every page below a folder (about a gigabyte a second)."""
    seen: set[bytes] = set()
    by_file: Counter[str] = Counter()
    zero = repeated = 0
    shares: list[float] = []
    compressor = zstandard.ZstdCompressor(level=3)
    for path in sorted(folder.rglob("pages-*.img")):
        for number, block in enumerate(_blocks(path)):
            if number % _SAMPLE_EVERY == 0:
                shares.append(len(compressor.compress(block)) / len(block))
            for at in range(0, len(block), PAGE_BYTES):
                page = block[at : at + PAGE_BYTES]
                by_file[path.name] += 1
                if page == _ZERO:
                    zero += 1
                    continue
                digest = hashlib.blake2b(page, digest_size=12).digest()
                if digest in seen:
                    repeated += 1
                seen.add(digest)
    return Pages(by_file.total(), zero, repeated, statistics.fmean(shares) if shares else 1.0, dict(by_file))


def _blocks(path: Path) -> Iterator[bytes]:
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for at in range(0, len(mapped), _BLOCK_BYTES):
            yield mapped[at : at + _BLOCK_BYTES]


def analyze(store: CheckpointStore, image: str, writer: Writer) -> list[str]:
    """Write down what fills an image; advice, in sentences. Raises StoreError."""
    manifest = store.load(image)
    pages = look_at_pages(store.root / image)
    kinds = {f"{kind.replace(' ', '_')}_bytes": float(size) for kind, size in manifest.bytes_by_kind().items()}
    writer.sample(
        image,
        {
            **kinds,
            "image_bytes": float(manifest.total_bytes()),
            "zero_bytes": float(pages.zero * PAGE_BYTES),
            "repeated_bytes": float(pages.repeated * PAGE_BYTES),
            "compressed_bytes": round(manifest.total_bytes() * pages.compressed),
        },
        memory_bytes=dict(manifest.details.get("memory") or {}),
        pages_by_file=dict(pages.by_file),
        largest=dict(sorted(manifest.bytes_by_file.items(), key=lambda entry: -entry[1])[:10]),
    )
    found = list(advice(manifest))
    if pages.zero * PAGE_BYTES > manifest.total_bytes() / 20:
        found.append(
            f"{short_size(pages.zero * PAGE_BYTES)} are pages full of zeros: memory that was touched and never used, "
            "as a buffer larger than need be. A restore writes them all."
        )
    if pages.repeated * PAGE_BYTES > manifest.total_bytes() / 20:
        found.append(
            f"{short_size(pages.repeated * PAGE_BYTES)} are in the image more than once, as in processes that loaded "
            "the same; fewer processes would save them."
        )
    share = f"{100 * pages.compressed:.0f} %"
    if pages.compressed < 0.6:
        found.append(f"zstd makes it {share} of its size: the rung archived is worth its while.")
    else:
        found.append(f"zstd leaves {share} of its size: weights and random data do not compress.")
    return found
