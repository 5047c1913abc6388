"""What each tier costs with the real vLLM on a GPU, as a client of warmpool sees it.

``make bench-gpu`` (root, podman, CRIU, a GPU, vLLM). Makes the golden checkpoint (cold start, warm-up, dump, proof),
then serves with one idle timetable after the other and asks for a completion each time the instance rests on the tier:
ready, sleeping, suspended, checkpointed; and with two models on one GPU, in turns. Every answer must be the one given
before. Prints a table and writes every sample, with stages, machine and versions, to a JSON file.

The container is described by a TOML file with a `[models.NAME.podman]` table (see config/gpu-one-model.toml), whose
model is benchmarked; a second model in it is the other one of the hot swap.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import orjson
import tomli_w

PROMPT: Final = "The quick brown fox jumps over the lazy dog. Once upon a time"
TIERS: Final = {
    "ready": {},
    "sleeping": {"sleeping": "100ms"},
    "suspended": {"sleeping": "100ms", "suspended": "200ms"},
    "checkpointed": {"sleeping": "100ms", "suspended": "never", "checkpointed": "200ms"},
}
NEVER: Final = dict.fromkeys(("sleeping", "suspended", "checkpointed", "archived", "stopped"), "never")
PATIENCE_S: Final = 400.0


@dataclass
class Sample:
    """One request: what it found, when the first token came (seconds), the stages (milliseconds), the answer."""

    rested: str
    """The tier that the instance was meant to rest on, or the phase."""
    tier: str
    """What the request found."""
    ttft_s: float
    stages_ms: dict[str, float]
    text: str
    gpu_bytes: int = 0
    """GPU memory in use after the answer."""
    resting_gpu_bytes: int = 0
    """And before the request, by everything on the GPU."""


@dataclass
class Report:
    """Everything that was seen."""

    machine: dict[str, Any]
    create: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    after_swaps: dict[str, Any] = field(default_factory=dict)
    """What `/admin/status` said at the end of the swaps."""
    problems: list[str] = field(default_factory=list)


class Server:
    """`warmpool serve` with one configuration."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.config = folder / "serve.toml"
        self.config.write_text(tomli_w.dumps(settings))
        self.log = folder / "serve.log"
        self.url = f"http://127.0.0.1:{settings['server']['port']}"

    async def __aenter__(self) -> Self:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "proxy", "serve", "-c", str(self.config), stdout=log, stderr=log
            )
        self.session = aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(PATIENCE_S))
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with self.session.get("/ready") as response:
                        if response.status == 200:
                            return self
                if self.process.returncode is not None:
                    raise RuntimeError(self.log.read_text()[-2000:])
                await asyncio.sleep(0.05)

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        self.process.send_signal(signal.SIGTERM)
        await self.process.wait()

    async def state(self, model: str) -> str:
        async with self.session.get("/admin/status") as response:
            instances = orjson.loads(await response.read())["models"][model]["instances"]
        return instances[0]["state"] if instances else "stopped"

    async def until(self, model: str, state: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.state(model) != state:
                await asyncio.sleep(0.02)

    async def ask(self, tier: str, name: str, max_tokens: int = 16) -> Sample:
        body = {"model": name, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        began = time.perf_counter()
        async with self.session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status} {await response.text()}")
            ttft_s, text = 0.0, ""
            async for line in response.content:
                if line.startswith(b"data: {"):
                    ttft_s = ttft_s or time.perf_counter() - began
                    text += "".join(c.get("text", "") for c in orjson.loads(line[6:])["choices"])
        timing = re.findall(r"(\w+);dur=([\d.]+)", response.headers.get("server-timing", ""))
        return Sample(
            tier, response.headers["x-warmpool-tier"], ttft_s, {n: float(v) for n, v in timing}, text, gpu_bytes()
        )


def gpu_bytes() -> int:
    """GPU memory in use on the first GPU; 0 where NVML cannot be asked."""
    with contextlib.suppress(Exception):
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    return 0


def creep(used: list[int]) -> float:
    """The slope of a series of memory readings, in bytes a step (Theil-Sen: the median of the slopes of all pairs)."""
    pairs = ((i, j) for j in range(len(used)) for i in range(j))
    return statistics.median((used[j] - used[i]) / (j - i) for i, j in pairs)


def output_of(*command: str) -> str:
    """What a command prints; empty when it cannot be run."""
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout.strip()
    except OSError:
        return ""


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "gpu": output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "podman": output_of("podman", "--version"),
        "runtime": output_of("podman", "info", "--format", "{{.Host.OCIRuntime.Name}} {{.Host.OCIRuntime.Version}}"),
        "criu": output_of("criu", "--version").splitlines()[:1],
        "huge pages": huge.read_text().strip() if huge.exists() else "",
        "python": platform.python_version(),
    }


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base: dict[str, Any] = tomllib.loads(options.config.read_text())
        self.base.setdefault("server", {})["port"] = options.port
        self.keys = list(self.base["models"])
        self.report = Report(machine())
        self.answers: dict[str, str] = {}

    def name(self, key: str) -> str:
        return str(self.base["models"][key].get("name", key))

    def settings(self, idle: dict[str, str], keys: list[str], **pool: Any) -> dict[str, Any]:
        models = {key: {**self.base["models"][key], "idle": {**NEVER, **idle}} for key in keys}
        return {**self.base, "models": models, "pool": {**self.base.get("pool", {}), **pool}}

    def keep(self, sample: Sample, key: str) -> None:
        known = self.answers.setdefault(key, sample.text)
        if sample.text != known:
            self.report.problems.append(f"{sample.rested}: {key} answered {sample.text!r} instead of {known!r}")
        self.report.samples.append(sample)
        stages = " ".join(f"{n}={v:.0f}" for n, v in sample.stages_ms.items())
        print(f"{sample.rested:<14} {sample.tier:<13} {sample.ttft_s * 1000:8.1f} ms  {stages}", flush=True)

    async def create(self, key: str) -> None:
        """The golden checkpoint, by command."""
        config = self.folder / "create.toml"
        config.write_text(tomli_w.dumps(self.settings({"checkpointed": "1h"}, self.keys)))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", "checkpoint", "create", key, "--json", "-c", str(config),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        printed, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"warmpool checkpoint create {key} failed")
        self.report.create[key] = orjson.loads(printed)
        for command in ("analyze", "inspect"):
            options = ["--json"] if command == "analyze" else []
            text = output_of(sys.executable, "-m", "proxy", "checkpoint", command, key, *options, "-c", str(config))
            self.report.create[key][command] = orjson.loads(text or "null")

    async def tier(self, tier: str, count: int) -> None:
        """`count` requests that find the instance on a tier."""
        key = self.keys[0]
        async with Server(self.folder, self.settings(TIERS[tier], [key])) as server:
            if tier != "checkpointed":
                self.keep(await server.ask("first", self.name(key)), key)
            for _ in range(count):
                await server.until(key, tier)
                resting = gpu_bytes()
                sample = await server.ask(tier, self.name(key))
                sample.resting_gpu_bytes = resting
                self.keep(sample, key)
            if tier == "checkpointed":
                return
            await server.until(key, tier)

    async def swap(self, count: int) -> None:
        """`count` requests, alternating between two models of which one may be awake."""
        keys = self.keys[:2]
        async with Server(self.folder, self.settings({"suspended": "1h"}, keys, max_awake=1)) as server:
            for key in keys:
                self.keep(await server.ask("first", self.name(key)), key)
            for number in range(count):
                key = keys[number % 2]
                self.keep(await server.ask("swap", self.name(key)), key)
                other = keys[(number + 1) % 2]
                async with asyncio.timeout(60):
                    while await server.state(other) not in ("suspended", "sleeping"):
                        await asyncio.sleep(0.02)
                if self.options.settle:
                    await server.until(other, "suspended")
            async with server.session.get("/admin/status") as response:
                self.report.after_swaps = orjson.loads(await response.read())

    async def run(self) -> int:
        """All phases that were asked for; what fails is noted, and the next one is tried."""
        models = self.keys[: 2 if "swap" in self.options.phases else 1]
        phases: list[tuple[str, Any]] = [
            *((f"create {key}", partial(self.create, key)) for key in models),
            *((tier, partial(self.tier, tier, self.options.count)) for tier in TIERS),
            ("swap", partial(self.swap, self.options.count * 2)),
        ]
        for name, phase in phases:
            if name.split()[0] not in self.options.phases:
                continue
            print(f"--- {name}", flush=True)
            try:
                await phase()
            except Exception as error:  # noqa: BLE001 - a phase that fails must not lose the others' figures
                self.report.problems.append(f"{name}: {error!r}")
                print(f"{name}: {error!r}", flush=True)
            self.write()
        print(self.table())
        return 1 if self.report.problems else 0

    def write(self) -> None:
        """The JSON file."""
        (self.folder / "bench-gpu.json").write_bytes(orjson.dumps(asdict(self.report), option=orjson.OPT_INDENT_2))

    def table(self) -> str:
        """Medians, for people."""
        lines = ["| tier | n | first token, median | least | most | of which |", "|---|---|---|---|---|---|"]
        for tier in ("ready", "sleeping", "suspended", "checkpointed", "swap"):
            mine = [s for s in self.report.samples if s.rested == tier]
            if not mine:
                continue
            ttft = [s.ttft_s for s in mine]
            names = dict.fromkeys(n for s in mine for n in s.stages_ms)
            stages = ", ".join(f"{n} {statistics.median(s.stages_ms.get(n, 0) for s in mine):.0f} ms" for n in names)
            middle, least, most = statistics.median(ttft), min(ttft), max(ttft)
            lines.append(f"| {tier} | {len(mine)} | **{middle:.3f} s** | {least:.3f} | {most:.3f} | {stages} |")
            used = [s.resting_gpu_bytes or s.gpu_bytes for s in mine]
            if len(mine) > 20 and all(used):
                lines.append(f"GPU memory over {len(mine)} cycles: {creep(used) / 2**20:+.2f} MiB a cycle")
        return "\n".join([*lines, *(f"PROBLEM {p}" for p in self.report.problems)])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_gpu", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML with one or two models in podman")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder for logs and the JSON file")
    parser.add_argument("--count", type=int, default=10, help="repetitions of each tier")
    parser.add_argument("--port", type=int, default=8097)
    parser.add_argument("--settle", action="store_true", help="in the swap, wait until the other one is suspended")
    parser.add_argument(
        "--phases", nargs="+", default=["create", "checkpointed", "ready", "sleeping", "suspended", "swap"]
    )
    raise SystemExit(asyncio.run(Bench(parser.parse_args()).run()))


if __name__ == "__main__":
    main()
