"""`soak`: mixed load for a time, with gaps in which engines step down, so that every tier is passed again and again.

Some clients leave, in any phase of their request; half of all bodies are chunked.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import psutil

from loadtest.client_aborts import Phase, leave
from loadtest.ladder import Checks
from loadtest.serving import completion, learn_versions, serving
from loadtest.timeline import recorded_timeline
from proxy.runtime.state_dir import Claim

if TYPE_CHECKING:
    from loadtest.client import Outcome, Request
    from loadtest.display import Display
    from loadtest.results import Writer
    from loadtest.serving import Folders, Served, Setup

IDLE: Final = {"sleeping": "500ms", "suspended": "1s", "checkpointed": "2s"}
GAPS_S: Final = (0.05, 0.7, 1.4, 3.5)
"""Between two bursts for a model: shorter than every step of `IDLE`, and longer than each of them in turn."""
MOST_AT_ONCE: Final = 8
LEAVES: Final = 0.25
"""Share of the clients that leave before their answer is there."""
SLOW: Final = 3.0
"""A wake that takes longer than this many times the median of its tier is a slow one …"""
_NOISE_S: Final = 0.25
"""… unless it takes no more than this beyond the median: a wake of milliseconds is at the mercy of the scheduler."""
_MOST_GROWTH: Final = 1.5
_GROWTH_BYTES: Final = 64 << 20
_SPARE_FILES: Final = 16


@dataclass(frozen=True, slots=True)
class Held:
    """What a proxy holds while it rests."""

    resident_bytes: int
    files: int
    processes: int
    containers: int
    open: int
    """Requests, waiting or being answered."""


@dataclass(slots=True)
class Soaked:
    """What was seen."""

    checks: Checks = field(default_factory=Checks)
    sent: int = 0
    left: Counter[Phase] = field(default_factory=Counter)
    """Clients that went away, on purpose."""
    tiers: Counter[str] = field(default_factory=Counter)
    wakes_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Tier → how long the wakes from it took; apart those that had to repeat the known answer."""
    ended_s: float | None = None
    """From SIGTERM to the proxy's end."""
    before: Held | None = None
    after: Held | None = None

    def slow_wakes(self) -> list[str]:
        """Those that took more than `SLOW` times the median of their tier; one sentence each."""
        found = []
        for tier, wakes_s in self.wakes_s.items():
            median_s = statistics.median(wakes_s)
            bound_s = max(SLOW * median_s, median_s + _NOISE_S)
            found += [
                f"a wake from {tier} took {s:.2f} s, the median is {median_s:.2f} s" for s in wakes_s if s > bound_s
            ]
        return found

    def leaks(self) -> list[str]:
        """What there is more of than when it began, or does not end; one sentence each."""
        before, after = self.before, self.after
        if before is None or after is None:
            return []
        found = []
        if self.ended_s is None:
            found.append("the proxy did not end within 60 s of SIGTERM")
        if after.open:
            found.append(f"{after.open} requests are open though every client has its answer or has left")
        if after.files > before.files + _SPARE_FILES:
            found.append(f"the proxy has {after.files} files open, {before.files} before")
        if after.processes > before.processes:
            found.append(f"{after.processes} processes belong to the proxy at rest, {before.processes} before")
        if after.containers > before.containers:
            found.append(f"{after.containers} containers, {before.containers} before")
        if after.resident_bytes > before.resident_bytes * _MOST_GROWTH + _GROWTH_BYTES:
            found.append(f"the proxy takes {after.resident_bytes >> 20} MiB, {before.resident_bytes >> 20} before")
        return found


async def soak(setup: Setup, count: int, seconds: float, writer: Writer, display: Display, *, seed: int = 0) -> Soaked:
    """Load `count` models for a time."""
    found = Soaked()
    with setup.folders() as where:
        async with serving(setup.settings(IDLE, count=count), where) as served:
            keys = setup.keys(count)
            display.phase("every model once")
            for key in keys:
                _note(found, await served.ask(setup.name(key), "first", model=key), writer)
                await learn_versions(setup, where, writer)
            found.before = await _at_rest(served, where, keys)
            display.phase(f"{seconds:g} s of load")
            ends_s = time.monotonic() + seconds
            async with recorded_timeline(served.client, writer), asyncio.TaskGroup() as users:
                for number, key in enumerate(keys):
                    draw = random.Random(f"{seed} {number}")
                    users.create_task(_use(served, setup, key, draw, ends_s, found, writer))
                users.create_task(_show(display, found, seconds, ends_s))
            display.phase("coming to rest")
            found.after = await _at_rest(served, where, keys)
        found.ended_s = served.ended_s
    _account(found, writer)
    return found


async def _use(
    served: Served, setup: Setup, key: str, draw: random.Random, ends_s: float, found: Soaked, writer: Writer
) -> None:
    """Bursts of requests for one model, with gaps of every length between them."""
    while time.monotonic() < ends_s:
        size = draw.randint(1, MOST_AT_ONCE)
        alone = size == 1 or setup.config is None
        async with asyncio.TaskGroup() as burst:
            for _ in range(size):
                request = completion(setup.name(key), 0.0, key, keep_text=True, model=key)
                request = replace(request, chunked=draw.random() < 0.5)
                if draw.random() < LEAVES:
                    phase = draw.choice([*Phase])
                    found.left[phase] += 1
                    burst.create_task(leave(served.client.target, request, phase, random.Random(draw.random())))
                else:
                    burst.create_task(_ask(served, request, found, writer, alone=alone))
        gap_s = draw.choice(GAPS_S) * draw.uniform(0.9, 1.3)
        await asyncio.sleep(max(0.0, min(gap_s, ends_s - time.monotonic())))


async def _ask(served: Served, request: Request, found: Soaked, writer: Writer, *, alone: bool) -> None:
    _note(found, await served.client.ask(request), writer, alone=alone)


def _note(found: Soaked, outcome: Outcome, writer: Writer, *, alone: bool = True) -> None:
    found.sent += 1
    found.checks.look_at(outcome, outcome.tags["model"], alone=alone)
    found.tiers[outcome.tier or "none"] += 1
    stages = outcome.stages_s
    if "wake" in stages:
        found.wakes_s[outcome.tier + (", first" if "canary" in stages else "")].append(stages["wake"])
    writer.outcome(outcome, outcome.tier or "lost")


async def _show(display: Display, found: Soaked, seconds: float, ends_s: float) -> None:
    while (left_s := ends_s - time.monotonic()) > 0:
        tiers = ", ".join(f"{count} {tier}" for tier, count in sorted(found.tiers.items()))
        display.update(round(seconds - left_s), round(seconds), sent=str(found.sent), found=tiers)
        await asyncio.sleep(0.25)


async def _at_rest(served: Served, where: Folders, keys: list[str]) -> Held:
    """Once every model has stepped down as far as it goes here."""
    tiers: dict[str, Any] = (await served.status())[keys[0]]["missing_tiers"]
    lowest = next(tier for tier in ("checkpointed", "suspended", "sleeping") if tier not in tiers)
    for key in keys:
        await served.until(key, lowest)
    status = await served.status()
    proxy = psutil.Process(served.process.pid)
    children = [p for p in proxy.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    containers = await asyncio.to_thread(_containers, where)
    return Held(
        proxy.memory_info().rss,
        proxy.num_fds(),
        len(children),
        containers,
        sum(model["queue"] + sum(i["leases"] for i in model["instances"]) for model in status.values()),
    )


def _containers(where: Folders) -> int:
    if shutil.which("podman") is None:
        return 0
    owned = f"--filter=label=io.warmpool.owner={Claim(where.state).owner}"
    command = ["podman", "ps", "--all", "--quiet", owned]
    return len(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())


def _account(found: Soaked, writer: Writer) -> None:
    found.checks.into(writer)
    writer.count(sent=found.sent, left=found.left.total(), **{f"found {t}": n for t, n in sorted(found.tiers.items())})
    writer.count(**{f"left {phase.value}": n for phase, n in found.left.items()})
    slow = found.slow_wakes()
    writer.count(slow_wakes=len(slow))
    for text in slow:
        writer.note(text)
    if found.ended_s is not None:
        writer.count(ended_s=found.ended_s)
    for name, held in (("before", found.before), ("after", found.after)):
        if held is not None:
            writer.count(**{f"{f} {name}": float(getattr(held, f)) for f in Held.__slots__})
    for text in found.leaks():
        writer.note(text)
