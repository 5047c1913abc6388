"""What the pool relies on of an engine of any kind: the same tests for each (test_kinds, tests/vllm, tests/engines).

A module imports `EngineContract` and gives it a fixture `subject`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import psutil
import pytest

from proxy.config.engine import WarmupSettings
from proxy.engine import kinds
from proxy.errors import EngineError
from proxy.telemetry.stages import Stages
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient

OPTIONAL = frozenset({"canary", "sleep", "reseed", "pause", "tokens"})
"""What an engine may have and may lack."""


@dataclass(slots=True)
class Subject:
    """An engine that runs, and what it is configured as and should have."""

    url: str
    name: str
    model: ModelSettings
    has: frozenset[str]
    api_key: str | None = None
    client: EngineClient = field(init=False)

    async def __aenter__(self) -> Self:
        assert self.has <= OPTIONAL
        self.client = self.connect()
        async with asyncio.timeout(PATIENCE_S):
            await self.client.wait_healthy(self.model.health.path, self.model.health.interval)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.disconnect()

    def connect(self) -> EngineClient:
        """A client of its own, as a new warmpool has one."""
        kind = kinds.of(self.model)
        return kind.connect(self.url, self.name, self.model, instance="demo-1", api_key=self.api_key)


class EngineContract:
    """The tests. What an engine lacks it says, and does not pretend."""

    async def test_it_is_healthy_and_no_longer_loads(self, subject: Subject) -> None:
        assert await subject.client.healthy(subject.model.health.path)
        assert not await subject.client.loads(subject.model.health.path)

    async def test_the_canary_is_answered_alike(self, subject: Subject) -> None:
        answers = [await subject.client.canary() for _ in range(2)]
        assert answers[0] == answers[1]
        assert (answers[0] is not None) == ("canary" in subject.has)
        if answers[0] is not None:
            assert await subject.client.generates()

    async def test_each_warm_up_is_measured(self, subject: Subject) -> None:
        figures = await subject.client.warm_up(WarmupSettings(requests=2))
        assert len(figures) == 2 * ("canary" in subject.has)
        assert all(figure["total_s"] >= figure["ttft_s"] > 0 for figure in figures)

    async def test_it_sleeps_at_each_level_and_is_the_same_afterwards(self, subject: Subject) -> None:
        client = subject.client
        if "sleep" not in subject.has:
            assert await client.is_sleeping() is None
            with pytest.raises(EngineError):
                await client.sleep(1)
            return
        before = await client.canary()
        for level in (1, 2):
            await client.sleep(level)
            assert await client.is_sleeping() is True
            assert await client.wake_up(level, Stages()), "without a copy there is none that could be lost"
            assert await client.is_sleeping() is False
            assert await client.canary() == before

    async def test_another_warmpool_finds_an_engine_that_sleeps_asleep(self, subject: Subject) -> None:
        if "sleep" not in subject.has:
            pytest.skip("it has no sleep mode")
        await subject.client.sleep(1)
        other = subject.connect()
        try:
            assert await other.is_sleeping() is True
            await other.wake_up(2, Stages())
            assert await other.is_sleeping() is False
            assert await other.canary() is not None
        finally:
            await other.disconnect()

    async def test_it_is_reseeded_or_says_why_not(self, subject: Subject) -> None:
        kind, has = kinds.of(subject.model), "reseed" in subject.has
        for gap in (
            kind.reseed_gap(subject.model), await subject.client.reseed_gap(), await subject.client.reseed(),
        ):  # fmt: skip
            assert (gap is None) is has, gap
        assert has or not kind.reseeds(subject.model)

    async def test_its_counters_move_with_its_work(self, subject: Subject) -> None:
        before = await subject.client.progress()
        assert bool(before) == ("tokens" in subject.has)
        if before:
            await subject.client.canary()
            assert await subject.client.progress() != before

    async def test_what_cannot_be_paused_says_so(self, subject: Subject) -> None:
        able = await subject.client.can_pause()
        if "pause" in subject.has:
            assert able != "never"
            return
        assert able == "never"
        if await subject.client.is_paused() is None:  # else its scheduler would stand still, and nobody could go back
            with pytest.raises(EngineError):
                await subject.client.pause(Stages())

    async def test_nothing_is_connected_to_it_once_it_is_let_go_of(self, subject: Subject) -> None:
        """One connection is enough to fail a dump."""
        await subject.client.canary()
        await subject.client.disconnect()
        port = subject.client.place.port
        async with asyncio.timeout(PATIENCE_S):
            while [
                c for c in psutil.Process().net_connections("tcp")
                if c.status == psutil.CONN_ESTABLISHED and c.raddr.port == port
            ]:  # fmt: skip
                await asyncio.sleep(0)

    async def test_what_is_not_there_is_an_error_and_nothing_else(self, subject: Subject) -> None:
        """As of an engine that has just ended."""
        kind = kinds.of(subject.model)
        gone = kind.connect("http://127.0.0.1:1", subject.name, subject.model, instance="demo-1", api_key=None)
        try:
            assert await gone.loads(subject.model.health.path)
            assert not await gone.healthy(subject.model.health.path)
            assert await gone.progress() == {}
            assert not await gone.generates()
            with pytest.raises(EngineError):
                await gone.canary()
            with pytest.raises(EngineError):
                await gone.sleep(1)
        finally:
            await gone.disconnect()
