"""`baseline`, `restore` and `burst`: what a request costs that finds an engine on a given tier."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loadtest.serving import TIERS, ServeError, completion, learn_versions, serving
from loadtest.timeline import recorded_timeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.client import Outcome
    from loadtest.display import Display
    from loadtest.results import Writer
    from loadtest.serving import Folders, Served, Setup

WARM: Final = ("checkpointed", "suspended", "sleeping", "ready")


@dataclass(slots=True)
class Checks:
    """What must not happen."""

    lost: int = 0
    different: int = 0
    other_tier: int = 0
    in_batches: int = 0
    """Answers that differ, of requests that an engine answered beside others."""
    texts: dict[str, str] = field(default_factory=dict)

    def look_at(self, outcome: Outcome, model: str, tier: str | None = None, *, alone: bool = True) -> None:
        """Count an answer that is missing, is another than before, or comes from elsewhere than meant.

        Not `alone`: what an engine answers may depend on what else it computes in the same step, as with vLLM.
        """
        if not outcome.ok:
            self.lost += 1
            return
        if self.texts.setdefault(model, outcome.text) != outcome.text:
            self.different += alone
            self.in_batches += not alone
        self.other_tier += tier is not None and outcome.tier != tier

    def into(self, writer: Writer) -> bool:
        """Write them down; whether all is well."""
        writer.count(lost=self.lost, different_answers=self.different, other_tier=self.other_tier)
        if self.in_batches:
            writer.note(
                f"{self.in_batches} answers to requests that came together are not word for word the one to a request "
                "alone: an engine's last digits depend on what it computes in one step. They do not count as different."
            )
        return not (self.lost or self.different)


async def baseline(setup: Setup, count: int, writer: Writer, display: Display) -> bool:
    """`count` cold starts, one after the other, each from nothing; whether all went well."""
    checks = Checks()
    await _cold(setup, count, writer, display, checks)
    return checks.into(writer)


async def restore(setup: Setup, count: int, cold: int, tiers: Sequence[str], writer: Writer, display: Display) -> bool:
    """`cold` cold starts, then `count` wakes from each tier; whether all went well. What the host lacks is noted.

    One engine is brought up for all tiers, from an image that was kept if there is one; each tier has a proxy of its
    own, which restores the image of the one before.
    """
    checks = Checks()
    if cold:
        await _cold(setup, cold, writer, display, checks)
    with setup.folders() as where:
        for tier in tiers:
            try:
                await _tier(setup, tier, count, where, writer, display, checks)
            except ServeError as error:
                writer.note(f"{tier}: {error}")
    return checks.into(writer)


async def _cold(setup: Setup, count: int, writer: Writer, display: Display, checks: Checks) -> None:
    with setup.folders(fresh=True) as where:
        await _tier(setup, "stopped", count, where, writer, display, checks)


async def _tier(
    setup: Setup, tier: str, count: int, where: Folders, writer: Writer, display: Display, checks: Checks
) -> None:
    (key,) = setup.keys()
    name = setup.name(key)
    display.phase(tier)
    async with serving(setup.settings(TIERS[tier], pool=_archive(tier, where.state)), where) as served:
        if tier != "stopped":
            await _prepare(served, key, name, tier, writer, checks)
        for number in range(count):
            await served.until(key, tier)
            outcome = await served.ask(name, tier, model=key)
            checks.look_at(outcome, key, tier)
            writer.outcome(outcome)
            if number == 0:
                await learn_versions(setup, where, writer)
            display.update(number + 1, count, ttft=_ms(outcome.ttft_s))


def _archive(tier: str, folder: object) -> dict[str, str]:
    return {"archive_dir": f"{folder}/archive"} if tier == "archived" else {}


async def _prepare(served: Served, key: str, name: str, tier: str, writer: Writer, checks: Checks) -> None:
    """Bring an engine up, by a cold start or from an image that is there; then the first restore of an image.

    The latter repeats the known answer, and so counts apart.
    """
    found = await _first(served, key, name, writer, checks)
    if tier in ("checkpointed", "archived") and found != tier:
        await served.until(key, tier)
        await _first(served, key, name, writer, checks)


async def _first(served: Served, key: str, name: str, writer: Writer, checks: Checks) -> str:
    outcome = await served.ask(name, "stopped", model=key)
    checks.look_at(outcome, key)
    writer.outcome(outcome, "stopped" if outcome.tier in ("stopped", "") else f"{outcome.tier}, first")
    return outcome.tier


async def burst(
    setup: Setup, sizes: Sequence[int], tiers: Sequence[str], rounds: int, writer: Writer, display: Display
) -> bool:
    """`rounds` times each of `sizes` requests at once, to a model that rests on each tier; whether all went well."""
    checks = Checks()
    with setup.folders() as where:
        for tier in tiers:
            try:
                with setup.folders(fresh=True) if tier == "stopped" else contextlib.nullcontext(where) as mine:
                    await _bursts(setup, sizes, tier, rounds, mine, writer, display, checks)
            except ServeError as error:
                writer.note(f"{tier}: {error}")
    return checks.into(writer)


async def _bursts(
    setup: Setup, sizes: Sequence[int], tier: str, rounds: int, where: Folders, writer: Writer, display: Display,
    checks: Checks,
) -> None:  # fmt: skip
    (key,) = setup.keys()
    name = setup.name(key)
    async with serving(setup.settings(TIERS[tier], pool=_archive(tier, where.state)), where) as served:
        if tier != "stopped":
            await _prepare(served, key, name, tier, writer, checks)
        for size in sizes:
            series = f"{tier}, {size} at once"
            display.phase(series)
            for number in range(rounds):
                await served.until(key, tier)
                outcomes = await at_once(served, name, key, size, series, number, writer)
                for outcome in outcomes:
                    checks.look_at(outcome, key, alone=size == 1 or setup.config is None)
                    writer.outcome(outcome)
                if number == 0:
                    await learn_versions(setup, where, writer)
                display.update(number + 1, rounds, lost=str(checks.lost))


async def at_once(
    served: Served, name: str, key: str, size: int, series: str, number: int, writer: Writer
) -> list[Outcome]:
    """Requests that are all meant to be sent in the same moment."""
    outcomes: list[Outcome] = []
    requests = [completion(name, 0.0, series, keep_text=True, model=key, round=number) for _ in range(size)]
    async with recorded_timeline(served.client, writer):
        await served.client.run(requests, outcomes.append)
    return outcomes


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f} ms"
