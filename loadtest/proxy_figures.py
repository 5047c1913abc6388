"""What is measured of one proxy that runs: figures by name, from wrk, from sockets and from the proxy's CPU clock."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import time
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final

import psutil

from loadtest import proxy_load as load
from loadtest import proxy_peers as peers
from loadtest.proxy_peers import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.proxy_peers import Contender

RATE: Final = 500.0
ENDLESS: Final = peers.QUESTION.replace(b'"max_tokens":4', b'"max_tokens":1000000,"stream":true')
TWO_TOKENS: Final = peers.QUESTION.replace(b'"max_tokens":4', b'"max_tokens":2,"stream":true')
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
        contender.port, load.request(peers.PATH, ENDLESS), count=count, settle_s=settle_s, window_s=window_s, at=at
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
    return _percentiles(load.first_tokens(contender.port, load.request(peers.PATH, TWO_TOKENS), count=count))


def _percentiles(times_s: list[float]) -> dict[str, Any]:
    if len(times_s) < 2:
        return {"p50_ms": None, "p99_ms": None, "n": len(times_s)}
    cuts = quantiles(times_s, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49] * 1e3, 4), "p99_ms": round(cuts[98] * 1e3, 4), "n": len(times_s)}


def middle(rounds: Sequence[Any]) -> Any:
    """The median of each figure over the rounds that have it."""
    if isinstance(rounds[0], dict):
        names = [name for name in rounds[0] if all(name in r for r in rounds)]
        return {name: middle([r[name] for r in rounds]) for name in names}
    numbers = [r for r in rounds if isinstance(r, int | float)]
    return round(median(numbers), 4) if numbers else None


def waiting(contender: Contender, release: Path, count: int) -> dict[str, Any]:
    """Requests that wait for one wake, beside as many that find the engine ready, a connection each.

    The memory of each that waits, CPU time of either kind, and whether all are answered. The engine is up as soon as
    the file `release` is there. One request more goes ahead, so that starting the engine is not counted; nor is what
    asking for its health costs.
    """
    message = load.request(peers.PATH, peers.QUESTION)
    with socket.create_connection(("127.0.0.1", contender.port), timeout=30) as ahead:
        ahead.sendall(message)
        contender.until_quiet()
        idle = contender.cpu_share(1.0)
        memory, cpu_s, began = contender.memory_bytes(), contender.cpu_s(), time.monotonic()
        held = [0, 0.0]

        def settled() -> None:
            contender.until_quiet()
            held[:] = contender.memory_bytes(), idle * (time.monotonic() - began)

        seen = load.waiting(contender.port, message, count=count, settled=settled, release=release.touch)
        contender.until_quiet()
        cpu_s = contender.cpu_s() - cpu_s - held[1]
    ready_s = _cpu_of_ready(contender, message, count)
    return {
        "requests": count, "kib_each": round((held[0] - memory) / count / 1024, 2), "answered": seen.answered,
        "refused": seen.refused, "first_answer_s": round(seen.first_s, 3), "last_answer_s": round(seen.last_s, 3),
        "cpu_us_behind_wake": round(cpu_s / count * 1e6, 1), "cpu_us_ready": round(ready_s / count * 1e6, 1),
    }  # fmt: skip


def _cpu_of_ready(contender: Contender, message: bytes, count: int, times: int = 3) -> float:
    before = contender.cpu_s()
    for _ in range(times):
        seen = load.waiting(contender.port, message, count=count, settled=lambda: None, release=lambda: None)
        if seen.answered != count:
            raise UnavailableError(f"{contender.name}: {seen.refused} of {count} requests were not answered")
    contender.until_quiet()
    return (contender.cpu_s() - before) / times


def machine() -> dict[str, Any]:
    """What it was measured on."""
    model = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[0] if model else platform.processor(), "cores": os.cpu_count(), "kernel": platform.release(),
        "python": platform.python_version(), "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
