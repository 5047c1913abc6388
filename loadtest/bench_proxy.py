"""warmpool and other proxies, in turn, on one core before the same engine (`make bench-proxy`).

``python -m loadtest.bench_proxy [--only NAME,NAME…] [--rounds N] [--json FILE] [--peers FOLDER]``, on a machine
with two cores and nothing else to do: the proxies are on core 0, each at work when it is its turn, the engines and the
client on core 1. ``--beside FOLDER`` compares this checkout with another one instead. What each figure is:
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from loadtest import proxy_beside as beside
from loadtest import proxy_figures as figures
from loadtest import proxy_peers as peers
from loadtest import proxy_stalls as stalls
from loadtest.proxy_peers import Contender, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONNECTIONS: Final = (1, 32, 256)
STREAMS: Final = (50, 200, 1000)
WAITING: Final = 10_000
ALONE: Final = ("waiting", "stalls")
"""What is measured of warmpool only."""
_CPU: Final = ("short", "32", "cpu_us_per_request")


def one_round(
    contenders: Sequence[Contender], folder: Path, *, quick: bool, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Everything once, figure by figure and proxy by proxy, so that what else the machine does falls on all alike."""
    results: dict[str, dict[str, Any]] = {c.name: {"short": {}, "steady": {}, "streams": {}} for c in contenders}
    for contender in contenders:
        figures.short(contender, 32, folder, seconds=1)  # warm
    for connections in CONNECTIONS:
        for contender in contenders:
            found = figures.short(contender, connections, folder, seconds=1 if quick else 2)
            results[contender.name]["short"][str(connections)] = found
            say(f"{contender.name}: {found['requests_per_s']:.0f} requests/s at {connections}")
    for connections in CONNECTIONS[1:]:
        for contender in contenders:
            if results[contender.name]["short"]["32"]["requests_per_s"] > 1.3 * figures.RATE:
                found = figures.steady(contender, connections, 1.0 if quick else 2.0)
                results[contender.name]["steady"][str(connections)] = found
    for contender in contenders:
        results[contender.name]["first_token"] = figures.first_token(contender, 20 if quick else 100)
    for count in STREAMS:
        for contender in contenders:
            found = figures.streaming(contender, count, settle_s=1.0, window_s=1.0 if quick else 2.0)
            results[contender.name]["streams"][str(count)] = found
            say(f"{contender.name}: {found['cpu_us_per_chunk']} us a chunk at {count} streams")
    return results


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
        (f"p50 added at {figures.RATE:g} requests/s over 32 connections", ("steady", "32", "p50_ms")),
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
        row(f"{figures.RATE:g} requests/s, {connections} connections, p50 ms", "steady", connections, "p50_ms")
        row("  p99 ms", "steady", connections, "p99_ms")
    row("first token, p50 ms", "first_token", "p50_ms")
    row("  p99 ms", "first_token", "p99_ms")
    for count in map(str, STREAMS):
        row(f"CPU us a chunk, {count} streams", "streams", count, "cpu_us_per_chunk")
        row("  chunks/s", "streams", count, "chunks_per_s")
        row("  KiB a stream", "streams", count, "kib_per_stream")
        row("  busy: core of engine and client", "streams", count, "other_core")
    return shown


def measure(options: argparse.Namespace, names: Sequence[str], folder: Path, console: Console) -> dict[str, Any]:
    """Every proxy, then what is measured of warmpool alone; a report, with the rounds of a file before."""
    before = json.loads(options.json.read_text()) if options.add and options.json.exists() else {}
    rounds: list[dict[str, Any]] = before.get("rounds", [])
    versions: dict[str, str] = before.get("versions", {})
    skipped: dict[str, str] = {}
    alone = {name: before.get(name) for name in ALONE}
    with contextlib.ExitStack() as stack:
        contenders = []
        for name in (name for name in names if name not in ALONE):
            try:
                contenders.append(stack.enter_context(peers.running(name, folder / name, options.peers)))
                versions[name] = contenders[-1].version
            except UnavailableError as reason:
                skipped[name] = str(reason)
                console.print(f"{name}: left out: {reason}")
        rounds += [
            one_round(contenders, folder, quick=options.quick, say=console.print)
            for _ in range(options.rounds if contenders else 0)
        ]
    if "waiting" in names:
        release = folder / "release"
        with peers.running("warmpool", folder / "waiting", options.peers, release=release) as contender:
            alone["waiting"] = figures.waiting(contender, release, 500 if options.quick else WAITING)
    if "stalls" in names:
        with peers.running("warmpool", folder / "stalls", options.peers) as contender:
            alone["stalls"] = stalls.measure(contender, folder / "past", quick=options.quick, say=console.print)
    measured = {name for r in rounds for name in r}
    results: dict[str, Any] = {
        name: figures.middle([r[name] for r in rounds if name in r]) for name in peers.PEERS if name in measured
    }
    return {
        "machine": figures.machine(), "versions": versions, "skipped": skipped, "results": results,
        "ratios": ratios(results), **alone, "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_proxy", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help=f"some of {','.join((*peers.PEERS, *ALONE))}; with --beside of {','.join(beside.PARTS)} (default: all)",
    )
    parser.add_argument("--rounds", type=int, help=f"3, or {beside.PAIRS} pairs with --beside")
    parser.add_argument("--add", action="store_true", help="to the rounds that are in the file already")
    parser.add_argument("--json", type=Path, help="build/proxy.json, or build/proxy-beside.json")
    parser.add_argument("--peers", type=Path, default=Path("/var/tmp/warmpool-bench-peers"))
    parser.add_argument("--quick", action="store_true", help="a second each: to try it out, not to measure")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout, with its own .venv")
    parser.add_argument("--beside-python", type=Path, metavar="FILE", help="its Python: FOLDER/.venv/bin/python")
    options = parser.parse_args()
    known = beside.PARTS if options.beside else (*peers.PEERS, *ALONE)
    names = options.only or known
    if unknown := set(names) - set(known):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.add and options.beside:
        parser.error("--add: not with --beside, whose pairs belong to one run")
    options.rounds = options.rounds or (beside.PAIRS if options.beside else 3)
    options.json = options.json or Path("build/proxy-beside.json" if options.beside else "build/proxy.json")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("bench-proxy needs two cores: one for the proxy, one for the engine and the client")
    os.sched_setaffinity(0, {peers.OTHER_CORE})
    with tempfile.TemporaryDirectory(prefix="bench-proxy-") as path:
        if options.beside:
            try:
                report = beside.measure(options, names, Path(path), console.print)
            except UnavailableError as reason:
                raise SystemExit(f"bench-proxy: {reason}") from None
        else:
            report = measure(options, names, Path(path), console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.beside:
        beside.show(report, console)
        return
    if report["results"]:
        console.print(table(report["results"]))
        console.print(report["ratios"])
    if report["waiting"]:
        console.print(report["waiting"])
    if report["stalls"]:
        console.print(stalls.table({"warmpool": report["stalls"]}))


if __name__ == "__main__":
    main()
