"""How wrong the client is by itself: its times against those of a server that knows better."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loadtest.client import Client, Outcome, Request, Target
from loadtest.machine import ROOT
from loadtest.results import measured

if TYPE_CHECKING:
    from loadtest.display import Display
    from loadtest.results import Writer

SERIES: Final = "client"
_SETTLE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """How many streams, how fast they begin, how long each is."""

    streams: int = 2000
    per_second: float = 200.0
    tokens_per_second: float = 10.0
    ttft_s: float = 0.3

    @property
    def tokens(self) -> int:
        """So many that all streams are open when the last one begins."""
        return max(2, round((self.streams / self.per_second + 2) * self.tokens_per_second))


@dataclass(slots=True)
class Measured:
    """What was seen: errors in seconds, the most streams that were open at once."""

    errors_s: list[float]
    read_late_s: list[float]
    """What the error would be greater by with the time at which this program saw the token."""
    lost: int
    most_open: int
    cpu_share: float


def error_s(outcome: Outcome) -> float:
    """The client's time to the first token less the server's own: the server stamped its first event with both ends."""
    received_ns, sent_ns = (int(word) for word in outcome.text.split()[:2])
    assert outcome.ttft_s is not None
    return outcome.ttft_s - (sent_ns - received_ns) / 1e9


async def measure(load: Load, writer: Writer, display: Display) -> Measured:
    """Open the streams and compare."""
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.calibration_server", "--ttft", str(load.ttft_s),
        "--tokens-per-second", str(load.tokens_per_second), stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = (await server.stdout.readline()).decode().strip()
        return await _measure(url, load, writer, display)
    finally:
        server.kill()
        await server.wait()


async def _measure(url: str, load: Load, writer: Writer, display: Display) -> Measured:
    body = {"model": "calibrated", "prompt": "Hello", "max_tokens": load.tokens, "stream": True}
    due_s = [_SETTLE_S + number / load.per_second for number in range(load.streams)]
    found = Measured([], [], 0, 0, 0.0)
    outcomes: list[Outcome] = []
    display.phase(f"{load.streams} streams of {load.tokens_per_second:g} tokens a second")
    cpu_s, began_s = time.process_time(), time.monotonic()
    async with Client(Target.at(url)) as client:

        def done(outcome: Outcome) -> None:
            found.most_open = max(found.most_open, len(client.open) + 1)
            outcomes.append(outcome)
            display.update(len(outcomes), load.streams, open=str(len(client.open)))

        await client.run((Request(at, body, series=SERIES) for at in due_s), done)
    found.cpu_share = (time.process_time() - cpu_s) / (time.monotonic() - began_s)
    for outcome in outcomes:
        if not outcome.ok or outcome.ttft_s is None or outcome.read_s is None:
            found.lost += 1
            writer.sample(SERIES, {}, error=outcome.error)
            continue
        found.errors_s.append(error_s(outcome))
        found.read_late_s.append(outcome.read_s - outcome.ttft_s)
        writer.sample(SERIES, {**measured(outcome), "error_s": found.errors_s[-1]}, tokens=outcome.tokens)
    writer.count(
        lost=found.lost,
        most_open=found.most_open,
        cpu_share=round(found.cpu_share, 3),
        tokens=load.tokens * load.streams,
    )
    return found
