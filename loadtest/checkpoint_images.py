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

from loadtest.serving import NEVER, ServeError, learn_versions, warmpool
from proxy.config.values import short_size
from proxy.host.processes import GPU_STATE
from proxy.pool.golden import advice

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from loadtest.display import Display
    from loadtest.results import Writer
    from loadtest.serving import Folders, Setup
    from proxy.checkpoint.store import CheckpointStore

PAGE_BYTES: Final = 4096
_LOOK_EVERY_S: Final = 2.0
_PARTS: Final[Mapping[str, Mapping[str, str]]] = {
    "making": dict.fromkeys(("cuda", "podman", "dump", "collect", "digest"), "checkpoint"),
    "proof": dict.fromkeys(("podman", "criu", "cuda"), "restore"),
}
_SLEEP_MODE: Final = "--enable-sleep-mode"
_ZERO: Final = bytes(PAGE_BYTES)
_SAMPLE_EVERY: Final = 64
"""One block in so many is compressed to see how far it can be."""
_BLOCK_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make an image: the level its engine sleeps at (0: awake), and how its weights are loaded."""

    level: int
    load_format: str | None = None

    def series(self, level: int) -> str:
        """What it is called; `level`: that of the engine in the image, which may have no sleep mode."""
        slept = f"asleep, level {level}" if level else "awake"
        return slept + (f", {self.load_format}" if self.load_format else "")


async def checkpoint(setup: Setup, variants: Sequence[Variant], count: int, writer: Writer, display: Display) -> bool:
    """Make and prove a golden checkpoint `count` times in each way; whether all were made.

    With a folder to keep, the last image of the first way that is the configuration's own stays there.
    """
    (key,) = setup.keys()
    good = True
    kept = next((variant for variant in variants if setup.keep is not None and is_own(setup, variant, key)), None)
    sleepless: set[str | None] = set()
    for variant in variants:
        if variant.load_format in sleepless:
            writer.note(f"{variant.series(variant.level)}: the engine has no sleep mode, so this is the same as awake")
            continue
        display.phase(variant.series(variant.level))
        for number in range(count):
            with setup.folders(fresh=variant is not kept) as where:
                try:
                    made = await learning(setup, variant, key, where, writer)
                except ServeError as error:
                    writer.note(f"{variant.series(variant.level)}: {error}")
                    good = False
                    break
            if not made["sleep_level"]:
                sleepless.add(variant.load_format)
            keep(made, variant.series(made["sleep_level"]), writer)
            display.update(number + 1, count, image=short_size(made["bytes"]))
    return good


async def learning(setup: Setup, variant: Variant, key: str, where: Folders, writer: Writer) -> dict[str, Any]:
    """`create`, and meanwhile a look at the engine's versions."""
    task = asyncio.create_task(create(setup, variant, key, where))
    try:
        while not (await asyncio.wait([task], timeout=_LOOK_EVERY_S))[0]:
            await learn_versions(setup, where, writer)
    finally:
        task.cancel()
        await asyncio.wait([task])
    return task.result()


def keep(made: Mapping[str, Any], series: str, writer: Writer) -> None:
    """Write one report of `warmpool checkpoint create` down."""
    values = {_within("making", name): float(value) for name, value in made["making_s"].items()}
    values |= {_within("proof", name): float(value) for name, value in made["proof_s"].items()}
    values |= sizes(made["space_by_kind"])
    values |= beside(made, made["space_by_kind"]["memory pages"])
    made_s = {n: s for n, s in made["making_s"].items() if n not in ("cleanup", "start", "load")}
    values["create_s"] = made_s.get("checkpoint", 0.0)
    writer.sample(series, values, stages_s=dict(made["making_s"]), memory_bytes=dict(made["memory_bytes"]))


def _within(half: str, stage: str) -> str:
    """The name of a stage's time, behind that of the stage it is a part of."""
    outer = _PARTS[half].get(stage)
    return f"{half}.{outer}.{stage}_s" if outer else f"{half}.{stage}_s"


def sizes(space: Mapping[str, int]) -> dict[str, float]:
    """Of an image, by kind and in all; without the holes of its files, which take no space."""
    by_kind = {f"{kind.replace(' ', '_')}_bytes": float(size) for kind, size in space.items()}
    return by_kind | {"image_bytes": float(sum(space.values()))}


def beside(made: Mapping[str, Any], pages: int) -> dict[str, float]:
    """What is known of an image beside the sizes of its files.

    What the engine held on the GPU, of which a part is the driver's own and stays there; what the driver copied of it
    to the processes' memory, which CRIU writes like any other (a part of the `pages`, and known to be one as long as
    no zeros were taken out of them); and zeros that were.
    """
    values = {f"on_the_GPU.{tier}_bytes": float(sum(held.values())) for tier, held in made["gpu_bytes"].items()}
    left_out = made.get("zero_bytes_left_out") or 0
    if GPU_STATE in made["memory_bytes"]:
        copied = float(made["memory_bytes"][GPU_STATE])
        values["copied_from_the_GPU_bytes"] = copied
        if not left_out and copied <= pages:
            values |= {"memory_pages.GPU_state_bytes": copied, "memory_pages.else_bytes": pages - copied}
    return values | ({"zeros_left_out_bytes": float(left_out)} if left_out else {})


async def create(setup: Setup, variant: Variant, key: str, where: Folders) -> dict[str, Any]:
    """Run `warmpool checkpoint create`; what it reports. Raises ServeError."""
    config = configure(setup, variant, where)
    done = await warmpool("checkpoint", "create", key, "--json", config=config)
    if done.status:
        raise ServeError(f"it could not be made: {done.reason}")
    made: dict[str, Any] = orjson.loads(done.output)
    return made


def configure(setup: Setup, variant: Variant, where: Folders) -> Path:
    """The configuration file for a variant. Raises ServeError."""
    settings = _settings(setup, variant)
    settings["pool"] |= {"state_dir": str(where.state), "checkpoint_dir": str(where.images)}
    path = where.state / "checkpoint.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def _settings(setup: Setup, variant: Variant) -> dict[str, Any]:
    if setup.config is None:
        if variant.load_format:
            raise ServeError("the load-test engine loads no files; --load-format is for an engine of --config")
        if not variant.level:
            setup = replace(setup, engine=replace(setup.engine, sleep_mode=False))
    settings = setup.settings({"checkpointed": "1h"}, entry={"golden_sleep_level": variant.level or 2})
    for model in settings["models"].values():
        runtime = "podman" if "podman" in model else "process"
        engine = model[runtime] = dict(model[runtime])
        if variant.load_format:
            engine["command"] = _with(list(engine["command"]), "--load-format", variant.load_format)
        if not variant.level and setup.config is not None:
            _stay_awake(engine)
    return settings


def _stay_awake(engine: dict[str, Any]) -> None:
    """Without vLLM's sleep mode."""
    engine["command"] = [part for part in engine["command"] if part != _SLEEP_MODE]
    # Its endpoints would seem to be there, and do nothing.
    engine["env"] = {name: value for name, value in engine.get("env", {}).items() if name != "VLLM_SERVER_DEV_MODE"}


def is_own(setup: Setup, variant: Variant, key: str) -> bool:
    """Whether the image of a variant is one that the configuration's own engine can be restored from."""
    try:
        made = _settings(setup, variant)["models"][key]
    except ServeError:
        return False
    own = setup.settings(NEVER)["models"][key]
    return all(made.get(name) == own.get(name) for name in {*made, *own} - {"idle", "golden_sleep_level"})


def _with(command: list[str], option: str, value: str) -> list[str]:
    if option in command[:-1]:
        command[command.index(option) + 1] = value
        return command
    return [*(part for part in command if not part.startswith(f"{option}=")), option, value]


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
    space = manifest.space_by_kind()
    writer.sample(
        image,
        {
            **sizes(space),
            **beside(
                {
                    "memory_bytes": manifest.details.get("memory") or {},
                    "gpu_bytes": manifest.details.get("gpu") or {},
                    "zero_bytes_left_out": manifest.details.get("zero_bytes_left_out"),
                },
                space["memory pages"],
            ),
            "zero_bytes": float(pages.zero * PAGE_BYTES),
            "repeated_bytes": float(pages.repeated * PAGE_BYTES),
            "compressed_bytes": round(sum(space.values()) * pages.compressed),
        },
        memory_bytes=dict(manifest.details.get("memory") or {}),
        pages_by_file=dict(pages.by_file),
        largest=dict(sorted(manifest.bytes_by_file.items(), key=lambda entry: -entry[1])[:10]),
    )
    found = list(advice(manifest))
    if pages.zero * PAGE_BYTES > sum(space.values()) / 20:
        found.append(
            f"{short_size(pages.zero * PAGE_BYTES)} are pages full of zeros: memory that was touched and never used, "
            "as a buffer larger than need be. A restore writes them all."
        )
    if pages.repeated * PAGE_BYTES > sum(space.values()) / 20:
        found.append(
            f"{short_size(pages.repeated * PAGE_BYTES)} are in the image more than once, as in processes that loaded "
            "the same; fewer processes would save them."
        )
    share = f"{100 * pages.compressed:.0f} %"
    if pages.compressed < 0.6:
        found.append(f"zstd makes it {share} of its size: the tier archived is worth its while.")
    else:
        found.append(f"zstd leaves {share} of its size: weights and random data do not compress.")
    return found
