"""warmpool and other proxies, in turn, on one core before the same engine (`make bench-proxy`).

``python -m loadtest.bench_proxy [--only NAME,NAME…] [--rounds N] [--json FILE] [--peers FOLDER]``, on a machine
with two cores and nothing else to do: the proxies are on core 0, each at work when it is its turn, the engines and the
client on core 1. What each figure is: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
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
    from collections.abc import Callable, Sequence

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
_CPU: Final = ("short", "32", "cpu_us_per_request")
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


def short(contender: Contender, connections: int, folder: Path, *, seconds: int) -> dict[str, Any]:
    """Short answers as fast as they come: requests/s, CPU of the proxy for each, and the closed loop's latencies."""
    script = folder / "post.lua"
    script.write_text(_SCRIPT % peers.QUESTION.decode())
    command = [
        peers.wrk(), "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "30s", "-s", str(script),
        f"http://127.0.0.1:{contender.port}{peers.PATH}",
    ]  # fmt: skip
    cores, cpu_s = Cores(), contender.cpu_s()
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu_s = contender.cpu_s() - cpu_s
    answered = int(re.findall(r"(\d+) requests in", text)[0])
    latencies = {
        share: float(number) * _UNITS[unit] for share, number, unit in re.findall(r" (50|99)% +([\d.]+)(us|ms|s)", text)
    }
    failed = sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", text)))
    failed += sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", text)))
    return {
        "requests_per_s": float(re.findall(r"Requests/sec: +([\d.]+)", text)[0]),
        "cpu_us_per_request": round(cpu_s / answered * 1e6, 1) if answered else None,
        "p50_ms": round(latencies["50"], 4), "p99_ms": round(latencies["99"], 4), "failed": failed, **cores.busy(),
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


def one_round(
    contenders: Sequence[Contender], folder: Path, *, quick: bool, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Everything once, figure by figure and proxy by proxy, so that what else the machine does falls on all alike."""
    results: dict[str, dict[str, Any]] = {c.name: {"short": {}, "steady": {}, "streams": {}} for c in contenders}
    for contender in contenders:
        short(contender, 32, folder, seconds=1)  # warm
    for connections in CONNECTIONS:
        for contender in contenders:
            figures = short(contender, connections, folder, seconds=1 if quick else 2)
            results[contender.name]["short"][str(connections)] = figures
            say(f"{contender.name}: {figures['requests_per_s']:.0f} requests/s at {connections}")
    for connections in CONNECTIONS[1:]:
        for contender in contenders:
            if results[contender.name]["short"]["32"]["requests_per_s"] > 1.3 * RATE:
                figures = steady(contender, connections, 1.0 if quick else 2.0)
                results[contender.name]["steady"][str(connections)] = figures
    for contender in contenders:
        results[contender.name]["first_token"] = first_token(contender, 20 if quick else 100)
    for count in STREAMS:
        for contender in contenders:
            figures = streaming(contender, count, settle_s=1.0, window_s=1.0 if quick else 2.0)
            results[contender.name]["streams"][str(count)] = figures
            say(f"{contender.name}: {figures['cpu_us_per_chunk']} us a chunk at {count} streams")
    return results


def middle(rounds: Sequence[Any]) -> Any:
    """The median of each figure over the rounds that have it."""
    if isinstance(rounds[0], dict):
        names = [name for name in rounds[0] if all(name in r for r in rounds)]
        return {name: middle([r[name] for r in rounds]) for name in names}
    numbers = [r for r in rounds if isinstance(r, int | float)]
    return round(median(numbers), 4) if numbers else None


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

    installed = "warmpool" + peers.INSTALLED, "vllm-router" + peers.INSTALLED
    for name, peer in (*(("warmpool", peer) for peer in ("vllm-router", "litellm", "nginx")), installed):
        ours, theirs = at(name, "short", "32", "requests_per_s"), at(peer, "short", "32", "requests_per_s")
        if ours and theirs:
            found[f"requests/s at 32 connections, {name} : {peer}"] = round(ours / theirs, 2)
    for peer in ("vllm-router", "litellm", "nginx"):
        ours, theirs = at("warmpool", *_CPU), at(peer, *_CPU)
        if ours and theirs:
            found[f"CPU a request at 32 connections, warmpool : {peer}"] = round(ours / theirs, 2)
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
    names = [n for n in peers.PEERS if n in results]
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
        row("  CPU us a request", "short", connections, "cpu_us_per_request")
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
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--add", action="store_true", help="to the rounds that are in the file already")
    parser.add_argument("--json", type=Path, default=Path("build/proxy.json"))
    parser.add_argument("--peers", type=Path, default=Path("/var/tmp/warmpool-bench-peers"))
    parser.add_argument("--quick", action="store_true", help="a second each: to try it out, not to measure")
    options = parser.parse_args()
    console = Console()
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("bench-proxy needs two cores: one for the proxy, one for the engine and the client")
    os.sched_setaffinity(0, {peers.OTHER_CORE})
    names = options.only.split(",")
    before = json.loads(options.json.read_text()) if options.add and options.json.exists() else {}
    rounds: list[dict[str, Any]] = before.get("rounds", [])
    versions: dict[str, str] = before.get("versions", {})
    skipped: dict[str, str] = {}
    waited = before.get("waiting")
    with tempfile.TemporaryDirectory(prefix="bench-proxy-") as path, contextlib.ExitStack() as stack:
        folder = Path(path)
        contenders = []
        for name in names:
            try:
                if name != "waiting":
                    contenders.append(stack.enter_context(peers.running(name, folder / name, options.peers)))
                    versions[name] = contenders[-1].version
            except UnavailableError as reason:
                skipped[name] = str(reason)
                console.print(f"{name}: left out: {reason}")
        rounds += [
            one_round(contenders, folder, quick=options.quick, say=console.print)
            for _ in range(options.rounds if contenders else 0)
        ]
        stack.close()
        if "waiting" in names:
            waited = wake(folder, options)
    measured = {name for r in rounds for name in r}
    results: dict[str, Any] = {
        name: middle([r[name] for r in rounds if name in r]) for name in peers.PEERS if name in measured
    }
    report = {
        "machine": machine(), "versions": versions, "skipped": skipped, "results": results, "ratios": ratios(results),
        "waiting": waited, "rounds": rounds,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(results))
    console.print(report["ratios"])
    console.print(waited or "")


if __name__ == "__main__":
    main()
