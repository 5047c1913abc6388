"""warmpool and other proxies, in turn, on one core before the same engine (`make bench-proxy`).

``python -m loadtest.bench_proxy [--only NAME,NAME…] [--json FILE] [--peers FOLDER]``, on a machine with two cores and
nothing else to do: the proxy has core 0 to itself, the engine and the client share core 1. Results of peers that are
not measured anew stay in the file. What each figure is: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final
from urllib.request import urlopen

import psutil
from rich.console import Console
from rich.table import Table

from loadtest import proxy_load as load
from loadtest import proxy_peers as peers
from loadtest.proxy_peers import Contender, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTIONS: Final = (1, 32, 256)
STREAMS: Final = (50, 200, 1000)
RATE: Final = 500.0
WAITING: Final = 10_000
_ENDLESS: Final = peers.QUESTION.replace(b'"max_tokens":4', b'"max_tokens":1000000,"stream":true')
_TWO_TOKENS: Final = peers.QUESTION.replace(b'"max_tokens":4', b'"max_tokens":2,"stream":true')
_SCRIPT: Final = """wrk.method = "POST"
wrk.body = [=[%s]=]
wrk.headers = {["Content-Type"] = "application/json", Authorization = "Bearer none"}
"""
_UNITS: Final = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class Cores:
    """How busy the two cores were since this was made, 0 to 1."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times(percpu=True)

    def busy(self) -> dict[str, float]:
        """The proxy's core, and that of the engine and the client."""
        shares = []
        for before, after in zip(self._before, psutil.cpu_times(percpu=True), strict=True):
            spent = sum(after) - sum(before)
            idle = after.idle + after.iowait - before.idle - before.iowait
            shares.append(round(1 - idle / spent, 2) if spent else 0.0)
        return {"proxy_core": shares[peers.PROXY_CORE], "other_core": shares[peers.OTHER_CORE]}


def short(contender: Contender, connections: int, folder: Path, *, seconds: int, samples: int) -> dict[str, Any]:
    """Short answers as fast as they come: requests/s, and the closed loop's latencies in ms."""
    script = folder / "post.lua"
    script.write_text(_SCRIPT % peers.QUESTION.decode())
    rates: list[float] = []
    p50: list[float] = []
    p99: list[float] = []
    failed = 0
    cores = Cores()
    for _ in range(samples):
        command = [
            peers.wrk(), "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "30s", "-s", str(script),
            f"http://127.0.0.1:{contender.port}{peers.PATH}",
        ]  # fmt: skip
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rates.append(float(re.findall(r"Requests/sec: +([\d.]+)", text)[0]))
        for share, into in (("50", p50), ("99", p99)):
            number, unit = re.findall(rf" {share}% +([\d.]+)(us|ms|s)", text)[0]
            into.append(float(number) * _UNITS[unit])
        failed += sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", text)))
        failed += sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", text)))
    return {
        "requests_per_s": round(median(rates), 1), "p50_ms": median(p50), "p99_ms": median(p99),
        "samples": rates, "failed": failed, **cores.busy(),
    }  # fmt: skip


def steady(contender: Contender, connections: int, seconds: float) -> dict[str, Any]:
    """Short answers at a rate that every faster proxy holds: what one request takes when nobody is in its way."""
    cores = Cores()
    message = load.request(peers.PATH, peers.QUESTION)
    result = load.paced(contender.port, message, connections=connections, rate=RATE, seconds=seconds)
    return {**_percentiles(result.latencies_s), "failed": result.failed, **cores.busy()}


def streaming(contender: Contender, count: int, *, settle_s: float, window_s: float) -> dict[str, Any]:
    """Streams of 100 tokens/s: CPU of the proxy for each chunk that arrived, and its memory for each stream."""
    memory, cpu, cores = contender.memory_bytes(), [0.0], [Cores()]
    held = [0]

    def at(moment: str) -> None:
        if moment == "begin":
            held[0] = contender.memory_bytes()
            cores[0] = Cores()
            cpu[0] = contender.cpu_s()
        else:
            cpu[0] = contender.cpu_s() - cpu[0]

    seen = load.streams(
        contender.port, load.request(peers.PATH, _ENDLESS), count=count, settle_s=settle_s, window_s=window_s, at=at
    )
    return {
        "cpu_us_per_chunk": round(cpu[0] / seen.events * 1e6, 2) if seen.events else None,
        "chunks_per_s": round(seen.events / seen.seconds),
        "kib_per_stream": round((held[0] - memory) / count / 1024, 2),
        "ended": seen.ended,
        **cores[0].busy(),
    }


def first_token(contender: Contender, count: int) -> dict[str, Any]:
    """Time to the first token of a stream, one after the other."""
    return _percentiles(load.first_bytes(contender.port, load.request(peers.PATH, _TWO_TOKENS), count=count))


def _percentiles(times_s: list[float]) -> dict[str, Any]:
    if len(times_s) < 2:
        return {"p50_ms": None, "p99_ms": None, "n": len(times_s)}
    cuts = quantiles(times_s, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49] * 1e3, 4), "p99_ms": round(cuts[98] * 1e3, 4), "n": len(times_s)}


def measure(name: str, folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one contender. Raises UnavailableError."""
    quick = options.quick
    with peers.running(name, folder, options.peers) as contender:
        result: dict[str, Any] = {"version": contender.version, "short": {}, "steady": {}, "streams": {}}
        short(contender, 32, folder, seconds=1, samples=1)  # warm
        for connections in CONNECTIONS:
            figures = short(contender, connections, folder, seconds=1 if quick else 3, samples=1 if quick else 3)
            result["short"][str(connections)] = figures
            say(f"{name}: {figures['requests_per_s']:.0f} requests/s at {connections}")
        if result["short"]["32"]["requests_per_s"] > 1.3 * RATE:
            for connections in CONNECTIONS[1:]:
                result["steady"][str(connections)] = steady(contender, connections, 1.0 if quick else 4.0)
        result["first_token"] = first_token(contender, 20 if quick else 200)
        for count in STREAMS:
            figures = streaming(contender, count, settle_s=1.0 if quick else 2.0, window_s=1.0 if quick else 4.0)
            result["streams"][str(count)] = figures
            say(f"{name}: {figures['cpu_us_per_chunk']} us a chunk at {count} streams")
    return result


def wake(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Requests that wait for one wake: the memory of each, and whether all are answered."""
    release = folder / "release"
    count = 500 if options.quick else WAITING
    with peers.running("warmpool", folder / "waiting", options.peers, release=release) as contender:
        before = contender.memory_bytes()
        held = [0]

        def settled() -> None:
            deadline = time.monotonic() + 60
            while _queued(contender) < count and time.monotonic() < deadline:
                time.sleep(0.2)
            held[0] = contender.memory_bytes()

        seen = load.waiting(
            contender.port,
            load.request(peers.PATH, peers.QUESTION),
            count=count,
            settled=settled,
            release=release.touch,
        )
        return {
            "requests": count, "kib_each": round((held[0] - before) / count / 1024, 2), "answered": seen.answered,
            "refused": seen.refused, "first_answer_s": round(seen.first_s, 3), "last_answer_s": round(seen.last_s, 3),
            "cpu_s": round(contender.cpu_s(), 2),
        }  # fmt: skip


def _queued(contender: Contender) -> int:
    with urlopen(f"http://127.0.0.1:{contender.port}/admin/status", timeout=60) as response:
        return int(json.load(response)["models"]["bench"]["queue"])


def machine() -> dict[str, Any]:
    """What it was measured on."""
    model = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[0] if model else platform.processor(), "cores": os.cpu_count(), "kernel": platform.release(),
        "python": platform.python_version(), "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """What docs/benchmarks.md promises, as far as the peers were measured."""
    found: dict[str, float] = {}

    def at(name: str, *keys: str) -> Any:
        value = results.get(name)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    for peer in ("vllm-router", "litellm", "nginx"):
        ours, theirs = at("warmpool", "short", "32", "requests_per_s"), at(peer, "short", "32", "requests_per_s")
        if ours and theirs:
            found[f"requests/s at 32 connections, warmpool : {peer}"] = round(ours / theirs, 2)
        ours, theirs = (
            at("warmpool", "streams", "200", "cpu_us_per_chunk"),
            at(peer, "streams", "200", "cpu_us_per_chunk"),
        )
        if ours and theirs:
            found[f"CPU a chunk at 200 streams, warmpool : {peer}"] = round(ours / theirs, 2)
    for title, keys in (
        ("p50 added at 1 connection", ("short", "1", "p50_ms")),
        (f"p50 added at {RATE:g} requests/s over 32 connections", ("steady", "32", "p50_ms")),
        ("first token added, p50", ("first_token", "p50_ms")),
    ):
        ours, theirs = at("warmpool", *keys), at("nginx", *keys)
        if ours is not None and theirs is not None:
            found[f"{title}, warmpool - nginx, ms"] = round(ours - theirs, 3)
    return found


def table(results: dict[str, Any]) -> Table:
    """Rows of figures, a column for each contender."""
    names = [n for n in peers.PEERS if n in results and "skipped" not in results[n]]
    shown = Table(title="one core for the proxy")
    shown.add_column("")
    for name in names:
        shown.add_column(name, justify="right")

    def row(title: str, *keys: str) -> None:
        cells = []
        for name in names:
            value = results[name]
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            cells.append("-" if value is None else f"{value:,}")
        shown.add_row(title, *cells)

    for connections in map(str, CONNECTIONS):
        row(f"requests/s, {connections} connections", "short", connections, "requests_per_s")
        row("  p50 ms", "short", connections, "p50_ms")
        row("  p99 ms", "short", connections, "p99_ms")
        row("  failed", "short", connections, "failed")
        row("  busy: core of the proxy", "short", connections, "proxy_core")
        row("  busy: core of engine and client", "short", connections, "other_core")
    for connections in map(str, CONNECTIONS[1:]):
        row(f"{RATE:g} requests/s, {connections} connections, p50 ms", "steady", connections, "p50_ms")
        row("  p99 ms", "steady", connections, "p99_ms")
    row("first token, p50 ms", "first_token", "p50_ms")
    row("  p99 ms", "first_token", "p99_ms")
    for count in map(str, STREAMS):
        row(f"CPU us a chunk, {count} streams", "streams", count, "cpu_us_per_chunk")
        row("  chunks/s", "streams", count, "chunks_per_s")
        row("  KiB a stream", "streams", count, "kib_per_stream")
        row("  busy: core of engine and client", "streams", count, "other_core")
    return shown


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_proxy", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", default=",".join((*peers.PEERS, "waiting")), help="some of %(default)s")
    parser.add_argument("--json", type=Path, default=Path("build/proxy.json"))
    parser.add_argument("--peers", type=Path, default=Path("/var/tmp/warmpool-bench-peers"))
    parser.add_argument("--quick", action="store_true", help="a second each: to try it out, not to measure")
    options = parser.parse_args()
    console = Console()
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("bench-proxy needs two cores: one for the proxy, one for the engine and the client")
    os.sched_setaffinity(0, {peers.OTHER_CORE})
    results: dict[str, Any] = json.loads(options.json.read_text())["results"] if options.json.exists() else {}
    with tempfile.TemporaryDirectory(prefix="bench-proxy-") as folder:
        for name in options.only.split(","):
            try:
                if name == "waiting":
                    results[name] = wake(Path(folder), options)
                else:
                    results[name] = measure(name, Path(folder) / name, options, console.print)
            except UnavailableError as reason:
                results[name] = {"skipped": str(reason)}
                console.print(f"{name}: left out: {reason}")
    report = {"machine": machine(), "results": results, "ratios": ratios(results)}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(results))
    console.print(report["ratios"])
    console.print(results.get("waiting", ""))


if __name__ == "__main__":
    main()
