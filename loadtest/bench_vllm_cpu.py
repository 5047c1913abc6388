"""Cold start, checkpoint and restore of the real vLLM on the CPU, measured from a client's side (`make bench-vllm`).

``python -m loadtest.bench_vllm_cpu [--rounds N] [--restores N] [--model FOLDER] [--json FILE]``: root, after
`make vllm-cpu`, on a machine with nothing else to do. Each round serves config/vllm-cpu.toml from nothing: a cold
start, a checkpoint, restores one after the other, two clones at once. Prints a table; the file gets every sample.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson
import psutil

from loadtest import vllm_cpu
from proxy.runtime.state_dir import Claim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

ROOT: Final = Path(__file__).parent.parent
ASK: Final = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "stream": True}
WARM: Final = 10
PATIENCE_S: Final = 300.0
TIMES: Final = {"sleeping": "never", "suspended": "never", "checkpointed": "1s"}
OTHERS: Final = ("podman", "criu", "health", "wake_up", "reseed", "canary")
"""The stages of a restore that are not the proxy's."""


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine says of all its requests: how many, and how long their first tokens took together."""

    requests: int
    ttft_s: float


async def served(address: str) -> Served:
    """By the engine's own metrics, asked around the proxy."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as response:
        text = await response.text()
    figures = dict(re.findall(r"^vllm:time_to_first_token_seconds_(sum|count)\{.*\} (\S+)$", text, re.MULTILINE))
    return Served(int(float(figures["count"])), float(figures["sum"]))


@dataclass(slots=True)
class Restore:
    """One restore."""

    ttft_s: float
    stages_ms: dict[str, float]
    engine_ms: float | None
    """To the first token by the engine's own account; None where a canary came before."""
    own_ms: float | None
    """The proxy's own part: all but podman, CRIU and the engine."""


@dataclass(slots=True)
class Round:
    """One cold start and all that came after it."""

    load: tuple[float, float, float]
    cold_ttft_s: float = 0.0
    cold_stages_ms: dict[str, float] = field(default_factory=dict)
    warm_ttft_s: list[float] = field(default_factory=list)
    checkpoint_s: float = 0.0
    checkpoint_stages_s: dict[str, float] = field(default_factory=dict)
    image_bytes: dict[str, int] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    restores: list[Restore] = field(default_factory=list)
    clones_ttft_s: list[float] = field(default_factory=list)
    tmpfs_bytes: dict[str, int] = field(default_factory=dict)
    """What the images take with one and with two instances prepared, and with two running."""
    engine_bytes: list[int] = field(default_factory=list)
    """The memory of each of two running engines (proportional set size)."""


class Bench:
    """A served proxy with folders of its own."""

    def __init__(self, folder: Path, images: Path, url: str, session: aiohttp.ClientSession) -> None:
        self.folder, self.images, self.url, self.session = folder, images, url, session

    async def ask(self, **more: Any) -> tuple[float, str, dict[str, float]]:
        """Seconds to the first token, the tier found, the stages in milliseconds."""
        began = time.perf_counter()
        ttft_s = 0.0
        async with self.session.post(f"{self.url}/v1/completions", json={**ASK, **more}) as response:
            if response.status != 200:
                sys.exit(f"bench: {await response.text()}")
            async for line in response.content:
                if not ttft_s and line.startswith(b"data: {"):
                    ttft_s = time.perf_counter() - began
            timing = re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"])
            return ttft_s, response.headers["x-warmpool-tier"], {name: float(value) for name, value in timing}

    async def states(self) -> list[str]:
        """Of all instances."""
        async with self.session.get(f"{self.url}/admin/status") as response:
            return [i["state"] for i in (await response.json())["models"]["tiny"]["instances"]]

    async def until(self, *states: str) -> None:
        """Return when the instances have these states."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.states() != [*states]:
                await asyncio.sleep(0.005)

    def containers(self, *options: str) -> list[dict[str, Any]]:
        """What podman says of its containers that run, or of those that `podman ps` lists with `options`."""
        owned = f"--filter=label=io.warmpool.owner={Claim(self.folder).owner}"
        ids = _podman("ps", "--quiet", owned, *options).split()
        found: list[dict[str, Any]] = orjson.loads(_podman("inspect", *ids)) if ids else []
        return found

    def address(self) -> str:
        """Of the one engine that runs."""
        (one,) = self.containers()
        return f"{next(iter(one['NetworkSettings']['Networks'].values()))['IPAddress']}:8000"

    def tmpfs_bytes(self) -> int:
        """What the images take."""
        return sum(path.stat().st_blocks * 512 for path in self.images.rglob("*"))


@contextlib.asynccontextmanager
async def serving(folder: Path, images: Path, model: Path) -> AsyncIterator[Bench]:
    """The proxy with the example's configuration, ended with its engines afterwards."""
    settings = {
        "SERVER__PORT": "0",
        "POOL__STATE_DIR": str(folder),
        "POOL__CHECKPOINT_DIR": str(images),
        "RUNTIME__PODMAN__ON_EXIT": "stop",
        "MODELS__TINY__IDLE": json.dumps(TIMES),
        "MODELS__TINY__MAX_CONCURRENCY": "1",
        "MODELS__TINY__PODMAN__VOLUMES": json.dumps([{"source": str(model), "target": "/model"}]),
    }
    environment = {**os.environ, **{f"WARMPOOL_{name}": value for name, value in settings.items()}}
    command = [sys.executable, "-m", "proxy", "serve", "--config", str(ROOT / "config" / "vllm-cpu.toml")]
    proxy = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stderr=asyncio.subprocess.PIPE)
    assert proxy.stderr is not None
    url, said = "", b""
    while not url:
        line = await proxy.stderr.readline()
        said += line
        if not line:
            sys.exit(f"bench: {said.decode()}")
        url = "".join(re.findall(r"listening on (http://\S+),", line.decode()))
    draining = asyncio.create_task(proxy.stderr.read())
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE_S))
    bench = Bench(folder, images, url, session)
    try:
        yield bench
    finally:
        await session.close()
        proxy.terminate()
        await draining
        await proxy.wait()
        for one in bench.containers("--all"):  # which a proxy leaves for the next one
            _podman("rm", "--force", "--time", "0", one["Id"])


async def round_(model: Path, restores: int) -> Round:
    """One round."""
    result = Round(os.getloadavg())
    with (
        tempfile.TemporaryDirectory(prefix="warmpool-bench-") as folder,
        tempfile.TemporaryDirectory(prefix="warmpool-bench-", dir="/dev/shm") as images,
    ):
        async with serving(Path(folder), Path(images), model) as bench:
            result.cold_ttft_s, _, result.cold_stages_ms = await bench.ask()
            result.warm_ttft_s = [(await bench.ask())[0] for _ in range(WARM)]
            before = await served(bench.address())
            await _checkpoint(bench, result)
            for _ in range(restores):
                result.restores.append(await _restore(bench, before))
                await bench.until("checkpointed", "checkpointed")
            await _clones(bench, result)
    return result


async def _checkpoint(bench: Bench, result: Round) -> None:
    await bench.until("checkpointing")
    began = time.perf_counter()
    async with asyncio.timeout(PATIENCE_S):
        while (await bench.states())[0] == "checkpointing":
            await asyncio.sleep(0.005)
    result.checkpoint_s = time.perf_counter() - began
    result.tmpfs_bytes["one instance"] = bench.tmpfs_bytes()
    await bench.until("checkpointed", "checkpointed")
    result.tmpfs_bytes["two instances"] = bench.tmpfs_bytes()
    manifest = orjson.loads((bench.images / "tiny" / "manifest.json").read_bytes())
    result.checkpoint_stages_s = manifest["details"]["stages_s"]
    result.image_bytes = manifest["details"]["bytes_by_kind"]
    result.facts = manifest["facts"]


async def _restore(bench: Bench, before: Served) -> Restore:
    ttft_s, tier, stages_ms = await bench.ask()
    after = await served(bench.address())
    if tier != "checkpointed":
        sys.exit(f"bench: found {tier}, not checkpointed")
    if after.requests != before.requests + 1:
        return Restore(ttft_s, stages_ms, None, None)
    engine_ms = (after.ttft_s - before.ttft_s) * 1000
    others_ms = sum(stages_ms.get(stage, 0.0) for stage in OTHERS)
    return Restore(ttft_s, stages_ms, engine_ms, ttft_s * 1000 - engine_ms - others_ms)


async def _clones(bench: Bench, result: Round) -> None:
    answers = await asyncio.gather(bench.ask(), bench.ask())
    result.clones_ttft_s = [ttft_s for ttft_s, *_ in answers]
    async with asyncio.TaskGroup() as both:
        for _ in range(2):
            both.create_task(bench.ask(max_tokens=400, ignore_eos=True))
        await bench.until("ready", "ready")
        running = await asyncio.to_thread(bench.containers)
        for one in running:
            tree = psutil.Process(one["State"]["Pid"])
            processes = (tree, *tree.children(recursive=True))
            result.engine_bytes.append(sum(p.memory_full_info().pss for p in processes))
        result.tmpfs_bytes["two running"] = bench.tmpfs_bytes()


def _podman(*arguments: str) -> str:
    return subprocess.run(["podman", *arguments], check=True, capture_output=True, text=True).stdout


# --- the report ---


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    processor = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cores": str(os.cpu_count()),
        "processor": processor[0] if processor else platform.machine(),
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        "huge pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "vLLM": f"vllm-cpu {vllm_cpu.VERSION}, torch {vllm_cpu.TORCH}",
    }


def table(rounds: list[Round]) -> str:
    """Markdown: the median of all samples, and their range."""
    later = [r for one in rounds for r in one.restores[1:]]
    first = [one.restores[0] for one in rounds]
    cold_s = [one.cold_ttft_s for one in rounds]
    rows = [
        ("cold start to the first token", _seconds(cold_s)),
        ("first token of a ready engine", _milliseconds(s * 1000 for one in rounds for s in one.warm_ttft_s)),
        ("checkpoint, all of it", _seconds(one.checkpoint_s for one in rounds)),
        ("- of it CRIU", _seconds(one.checkpoint_stages_s["dump"] for one in rounds)),
        ("- of it podman", _seconds(one.checkpoint_stages_s["podman"] for one in rounds)),
        ("- of it digests, and all else", _seconds(_else_s(one) for one in rounds)),
        ("**restore to the first token**", _seconds(r.ttft_s for r in later)),
        ("- of it CRIU", _milliseconds(r.stages_ms["criu"] for r in later)),
        ("- of it podman", _milliseconds(r.stages_ms["podman"] for r in later)),
        ("- of it the engine: until it answers", _milliseconds(r.stages_ms["health"] for r in later)),
        ("- of it the engine: to its first token", _milliseconds(r.engine_ms for r in later)),
        ("- of it warmpool", _milliseconds(r.own_ms for r in later)),
        ("the first restore of an image, with its canary", _seconds(r.ttft_s for r in first)),
        ("two clones restored at once, the later first token", _seconds(max(one.clones_ttft_s) for one in rounds)),
        ("cold start : restore", f"{median(cold_s) / median(r.ttft_s for r in later):.0f} : 1 | | "),
        ("image", _mebibytes(sum(one.image_bytes.values()) for one in rounds)),
        *((f"- {k}", _mebibytes(one.image_bytes[k] for one in rounds)) for k, v in rounds[0].image_bytes.items() if v),
        *((f"tmpfs, {what}", _mebibytes(one.tmpfs_bytes[what] for one in rounds)) for what in rounds[0].tmpfs_bytes),
        ("memory of a running engine", _mebibytes(b for one in rounds for b in one.engine_bytes)),
    ]
    return "\n".join(["| what | median | range | samples |", "|---|---|---|---|", *(f"| {n} | {v} |" for n, v in rows)])


def _else_s(one: Round) -> float:
    return one.checkpoint_s - one.checkpoint_stages_s["dump"] - one.checkpoint_stages_s["podman"]


def _figures(values: Iterable[float | None], form: str, unit: str) -> str:
    known = [value for value in values if value is not None]
    texts = [format(value, form) for value in (median(known), min(known), max(known))]
    return f"{texts[0]} {unit} | {texts[1]} to {texts[2]} | {len(known)}"


def _seconds(values: Iterable[float | None]) -> str:
    return _figures(values, ".2f", "s")


def _milliseconds(values: Iterable[float | None]) -> str:
    return _figures(values, ".0f", "ms")


def _mebibytes(values: Iterable[float]) -> str:
    return _figures((value / (1 << 20) for value in values), ".1f", "MiB")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_vllm_cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="cold starts (default: %(default)s)")
    parser.add_argument("--restores", type=int, default=7, help="of each (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=vllm_cpu.FOLDER / "model", help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="the file for all samples")
    arguments = parser.parse_args()
    rounds = []
    for number in range(1, arguments.rounds + 1):
        rounds.append(asyncio.run(round_(arguments.model, arguments.restores)))
        print(f"round {number} of {arguments.rounds}: {rounds[-1].cold_ttft_s:.2f} s cold", file=sys.stderr)
    on = {**machine(), **rounds[-1].facts}
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": on, "rounds": [asdict(one) for one in rounds]}
        arguments.json.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    print("; ".join(f"{name}: {value}" for name, value in on.items()))
    print(table(rounds))


if __name__ == "__main__":
    main()
