"""What every runtime promises the pool (proxy/runtime/base.py), as tests.

A subclass gives a `bench`: a runtime with a way to look at its engines. Tiers that a host lacks are skipped with the
runtime's own reason; `test_tiers_are_there_where_the_host_can` of each subclass sees to it that nothing else is.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from proxy.errors import RuntimeFailure
from proxy.runtime.base import ImageFacts
from proxy.runtime.log_tail import MAX_LINES
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.config.model import ModelSettings
    from proxy.runtime.base import EngineProcess, Runtime

FACTS = ImageFacts(sleep_level=1, canary="yes", details={"gpu": {"ready": {"GPU-1": 1 << 30}}})
PATIENCE_S = 60


class Bench(Protocol):
    """A runtime with one model, and eyes for its engines."""

    @property
    def runtime(self) -> Runtime:
        """The runtime, open."""

    @property
    def model(self) -> ModelSettings:
        """What to start."""

    async def healthy(self, engine: EngineProcess) -> None:
        """Return when the engine answers."""

    async def boot_id(self, engine: EngineProcess) -> str:
        """What is drawn anew whenever an engine starts, and survives a checkpoint."""

    async def answers(self, engine: EngineProcess) -> bool:
        """Whether the engine answers right now."""

    async def crash(self, engine: EngineProcess) -> None:
        """Kill the engine behind the runtime's back."""

    async def scribble(self, engine: EngineProcess) -> None:
        """Have the engine change memory and files of its own."""

    def remains(self) -> list[str]:
        """What is left of any instance: processes, containers, images."""

    async def successor(self, *, changed: bool = False) -> Bench:
        """Close the runtime and open another one on the same folders; `changed`: with another command."""


class RuntimeContract:
    """The contract."""

    async def start(self, bench: Bench, number: int = 1) -> EngineProcess:
        engine = await bench.runtime.start(f"demo-{number}", "demo", bench.model)
        await bench.healthy(engine)
        return engine

    async def checkpointed(self, bench: Bench, number: int = 1) -> tuple[EngineProcess, str]:
        engine = await self.start(bench, number)
        boot = await bench.boot_id(engine)
        await engine.checkpoint(FACTS, Stages())
        return engine, boot

    async def comes_back(self, bench: Bench, engine: EngineProcess, boot: str) -> None:
        """Restore the engine; it is the one that has drawn this."""
        await engine.restore(Stages())
        await bench.healthy(engine)
        assert await bench.boot_id(engine) == boot

    @pytest.fixture
    def checkpoints(self, bench: Bench) -> None:
        """Skips where the host cannot checkpoint."""
        self._needs(bench, Tier.CHECKPOINTED)

    @pytest.fixture
    def suspends(self, bench: Bench) -> None:
        """Skips where the runtime cannot suspend."""
        self._needs(bench, Tier.SUSPENDED)

    def _needs(self, bench: Bench, tier: Tier) -> None:
        tiers = bench.runtime.tiers()
        if tier not in tiers.offered:
            pytest.skip(reason=f"no tier {tier.label}: {tiers.missing[tier]}")

    async def test_what_its_processes_do_and_hold_is_seen(self, bench: Bench) -> None:
        engine = await self.start(bench)
        assert not (await engine.vitals()).stopped
        assert await engine.host_bytes() >= 0
        assert len(await engine.log_tail()) <= MAX_LINES
        await engine.kill()
        assert await engine.host_bytes() == 0
        with pytest.raises(RuntimeFailure):
            await engine.vitals()

    async def test_a_tier_is_offered_or_missing_with_a_reason(self, bench: Bench) -> None:
        tiers = bench.runtime.tiers()
        assert not tiers.offered & set(tiers.missing)
        assert tiers.offered | set(tiers.missing) >= {Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED}
        assert all(tiers.missing.values())

    async def test_started_engines_serve_and_removed_ones_leave_nothing(self, bench: Bench) -> None:
        one = await self.start(bench, 1)
        two = await self.start(bench, 2)
        assert await bench.boot_id(one) != await bench.boot_id(two)
        assert one.base_url != two.base_url
        await one.remove()
        assert not await bench.answers(one)
        assert await bench.answers(two)
        await two.remove()
        await two.remove()
        assert bench.remains() == []

    async def test_one_that_was_never_started_can_be_ended_and_removed(self, bench: Bench) -> None:
        engine = bench.runtime.engine("demo-9", "demo")
        assert bench.runtime.engine("demo-9", "demo") is engine
        assert await engine.wait_exit() == "ended"
        assert (await engine.host_bytes(), await engine.gpu_bytes()) == (0, {})
        for operation in (engine.suspend(), engine.resume(), engine.restore(Stages())):
            with pytest.raises(RuntimeFailure):
                await operation
        await engine.kill()
        await engine.remove()
        assert bench.remains() == []

    async def test_an_image_written_beside_takes_its_place_when_it_is_promoted(
        self, bench: Bench, checkpoints: None
    ) -> None:
        first, old = await self.checkpointed(bench)
        second = await bench.runtime.start("demo-2", "demo", bench.model, beside=True)
        await bench.healthy(second)
        new = await bench.boot_id(second)
        await second.checkpoint(FACTS, Stages())
        assert first.image != second.image
        second.promote()
        restored = [(second, new)] if bench.runtime.shares_images else [(second, new), (first, old)]
        for engine, boot in restored:
            await self.comes_back(bench, engine, boot)
            await engine.kill()

    async def test_wait_exit_ends_with_the_engine_and_not_before(self, bench: Bench) -> None:
        engine = await self.start(bench)
        waiting = asyncio.create_task(engine.wait_exit())
        await asyncio.sleep(0)
        assert not waiting.done()
        await bench.crash(engine)
        assert await asyncio.wait_for(waiting, PATIENCE_S)
        assert not await bench.answers(engine)
        await engine.remove()
        assert bench.remains() == []

    async def test_wait_exit_can_be_cancelled_and_asked_again(self, bench: Bench) -> None:
        engine = await self.start(bench)
        waiting = asyncio.create_task(engine.wait_exit())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        waiting = asyncio.create_task(engine.wait_exit())
        await engine.kill()
        await asyncio.wait_for(waiting, PATIENCE_S)

    async def test_an_instance_can_be_started_again(self, bench: Bench) -> None:
        engine = await self.start(bench)
        boot = await bench.boot_id(engine)
        await engine.kill()
        assert not await bench.answers(engine)
        again = await self.start(bench)
        assert again == engine
        assert await bench.boot_id(again) != boot

    async def test_suspended_engines_are_silent_and_resumed_ones_as_before(self, bench: Bench, suspends: None) -> None:
        engine = await self.start(bench)
        boot = await bench.boot_id(engine)
        for _ in range(2):
            await engine.suspend()
            assert not await bench.answers(engine)
            await engine.resume()
            assert await bench.boot_id(engine) == boot

    async def test_what_an_engine_holds_of_a_gpu_can_be_asked_whatever_it_does(
        self, bench: Bench, suspends: None
    ) -> None:
        engine = await self.start(bench)
        assert sum((await engine.gpu_bytes()).values()) == 0, "these engines use none"
        await engine.suspend()
        assert sum((await engine.gpu_bytes()).values()) == 0
        await engine.kill()
        assert await engine.gpu_bytes() == {}
        await engine.remove()
        assert await engine.gpu_bytes() == {}

    async def test_a_suspended_engine_can_be_removed(self, bench: Bench, suspends: None) -> None:
        engine = await self.start(bench)
        await engine.suspend()
        await engine.remove()
        assert bench.remains() == []

    async def test_state_survives_a_checkpoint_as_often_as_it_is_restored(
        self, bench: Bench, checkpoints: None
    ) -> None:
        engine, boot = await self.checkpointed(bench)
        assert not await bench.answers(engine)
        for _ in range(3):
            stages = Stages()
            await engine.restore(stages)
            assert stages.seconds
            await bench.healthy(engine)
            assert await bench.boot_id(engine) == boot
            await engine.kill()
            assert not await bench.answers(engine)

    async def test_a_restored_engine_that_crashed_is_restored_again(self, bench: Bench, checkpoints: None) -> None:
        engine, boot = await self.checkpointed(bench)
        await engine.restore(Stages())
        await bench.healthy(engine)
        waiting = asyncio.create_task(engine.wait_exit())
        await asyncio.sleep(0)
        await bench.crash(engine)
        await asyncio.wait_for(waiting, PATIENCE_S)
        await engine.kill()
        await self.comes_back(bench, engine, boot)

    async def test_a_suspended_engine_is_checkpointed_and_runs_when_restored(
        self, bench: Bench, checkpoints: None, suspends: None
    ) -> None:
        engine = await self.start(bench)
        boot = await bench.boot_id(engine)
        await engine.suspend()
        await engine.checkpoint(FACTS, Stages())
        await self.comes_back(bench, engine, boot)

    async def test_two_instances_are_restored_side_by_side(self, bench: Bench, checkpoints: None) -> None:
        if bench.runtime.shares_images:
            one, first = await self.checkpointed(bench, 1)
            two, second = await bench.runtime.clone("demo-2", "demo", bench.model), first
        else:
            (one, first), (two, second) = await asyncio.gather(self.checkpointed(bench, 1), self.checkpointed(bench, 2))
        await asyncio.gather(*(h.restore(Stages()) for h in (one, two)))
        for engine, boot in ((one, first), (two, second)):
            await bench.healthy(engine)
            assert await bench.boot_id(engine) == boot
        await one.kill()
        assert await bench.answers(two)

    async def test_clones_are_prepared_without_a_process_or_refused(self, bench: Bench, checkpoints: None) -> None:
        engine, boot = await self.checkpointed(bench)
        if not bench.runtime.shares_images:
            with pytest.raises(RuntimeFailure):
                await bench.runtime.clone("demo-2", "demo", bench.model)
            return
        clones = [await bench.runtime.clone(f"demo-{n}", "demo", bench.model) for n in (2, 3)]
        assert not any([await bench.answers(clone) for clone in clones])
        await engine.remove()
        await asyncio.gather(*(clone.restore(Stages()) for clone in clones))
        for clone in clones:
            await bench.healthy(clone)
            assert await bench.boot_id(clone) == boot
            await clone.remove()
        await bench.runtime.images.discard(engine)
        assert bench.remains() == []

    async def test_what_an_engine_did_after_its_restore_does_not_reach_the_image(
        self, bench: Bench, checkpoints: None
    ) -> None:
        engine, boot = await self.checkpointed(bench)
        for _ in range(2):
            await engine.restore(Stages())
            await bench.healthy(engine)
            await bench.scribble(engine)
            await engine.kill()
        await self.comes_back(bench, engine, boot)

    async def test_without_an_image_there_is_no_restore(self, bench: Bench, checkpoints: None) -> None:
        engine, _ = await self.checkpointed(bench)
        await bench.runtime.images.discard(engine)
        with pytest.raises(RuntimeFailure):
            await engine.restore(Stages())
        await engine.remove()
        assert bench.remains() == []

    async def test_removing_a_checkpointed_instance_removes_its_image_unless_it_is_shared(
        self, bench: Bench, checkpoints: None
    ) -> None:
        engine, _ = await self.checkpointed(bench)
        assert bench.remains() != []
        await engine.remove()
        if bench.runtime.shares_images:
            assert bench.remains() != []
            await bench.runtime.images.discard(engine)
        assert bench.remains() == []

    async def test_a_quarantined_image_is_kept_and_not_restored(self, bench: Bench, checkpoints: None) -> None:
        engine, _ = await self.checkpointed(bench)
        await bench.runtime.images.quarantine(engine)
        with pytest.raises(RuntimeFailure):
            await engine.restore(Stages())
        assert (await bench.runtime.recover({"demo": bench.model})).images == {}
        await engine.kill()
        assert await self.start(bench) == engine

    async def test_the_copy_of_a_quarantined_image_is_kept_where_nothing_is_against_it(
        self, bench: Bench, checkpoints: None
    ) -> None:
        self._needs(bench, Tier.ARCHIVED)
        engine, boot = await self.checkpointed(bench)
        await bench.runtime.images.copy_to_archive(engine)
        assert await bench.runtime.images.quarantine(engine, keep_copy=True)
        with pytest.raises(RuntimeFailure):
            await engine.restore(Stages())
        await engine.kill()
        await bench.runtime.images.unarchive(engine)
        await self.comes_back(bench, engine, boot)
        await engine.kill()
        assert not await bench.runtime.images.quarantine(engine)
        with pytest.raises(RuntimeFailure):
            await bench.runtime.images.unarchive(engine)

    async def test_an_archived_image_comes_back_from_the_archive(self, bench: Bench, checkpoints: None) -> None:
        self._needs(bench, Tier.ARCHIVED)
        engine, boot = await self.checkpointed(bench)
        for _ in range(2):
            await bench.runtime.images.archive(engine)
            with pytest.raises(RuntimeFailure):
                await engine.restore(Stages())
            await engine.kill()
            await bench.runtime.images.unarchive(engine)
            await self.comes_back(bench, engine, boot)
            await engine.kill()
        await bench.runtime.images.discard(engine)
        with pytest.raises(RuntimeFailure):
            await bench.runtime.images.unarchive(engine)

    async def test_a_successor_finds_what_is_archived(self, bench: Bench, checkpoints: None) -> None:
        self._needs(bench, Tier.ARCHIVED)
        engine, _ = await self.checkpointed(bench)
        await bench.runtime.images.archive(engine)
        after = await bench.successor()
        recovered = await after.runtime.recover({"demo": after.model})
        assert [(f.engine.instance_id, f.tier) for f in recovered.instances] == [("demo-1", Tier.ARCHIVED)]
        assert [image.archived for image in recovered.images.values()] == [True]

    async def test_nothing_can_be_done_with_an_engine_that_is_gone(self, bench: Bench) -> None:
        engine = await self.start(bench)
        await engine.kill()
        for operation in (
            engine.suspend(),
            engine.resume(),
            engine.checkpoint(FACTS, Stages()),
        ):
            with pytest.raises(RuntimeFailure) as failure:
                await operation
            assert not failure.value.alive

    async def test_a_successor_finds_the_checkpoints(self, bench: Bench, checkpoints: None) -> None:
        engine, boot = await self.checkpointed(bench)
        after = await bench.successor()
        recovered = await after.runtime.recover({"demo": after.model})
        assert [(f.engine.instance_id, f.tier) for f in recovered.instances] == [("demo-1", Tier.CHECKPOINTED)]
        owner = "demo" if bench.runtime.shares_images else "demo-1"
        assert {o: (i.sleep_level, i.canary) for o, i in recovered.images.items()} == {owner: (1, "yes")}
        assert recovered.images[owner].details["gpu"] == FACTS.details["gpu"]
        engine = after.runtime.engine("demo-1", "demo")
        await self.comes_back(after, engine, boot)

    async def test_a_successor_refuses_checkpoints_of_other_engines(self, bench: Bench, checkpoints: None) -> None:
        engine, _ = await self.checkpointed(bench)
        after = await bench.successor(changed=True)
        recovered = await after.runtime.recover({"demo": after.model})
        assert (list(recovered.instances), dict(recovered.images)) == ([], {})
        assert not await after.answers(engine)
        engine = await self.start(after)
        assert await after.boot_id(engine)


class RealFilesContract:
    """What a runtime makes of the files that its engines read; beside the contract, for those with real engines."""

    async def test_an_edited_file_makes_engine_and_image_outdated_and_a_touched_one_does_not(
        self, bench: Any, tmp_path: Path
    ) -> None:
        if Tier.CHECKPOINTED not in bench.runtime.tiers().offered:
            pytest.skip("no checkpoints here")
        folder = tmp_path / "weights"
        folder.mkdir()
        template = folder / "chat_template.jinja"
        template.write_text("hello")
        bench.model = bench.model.model_copy(update={"weights": [folder]})
        models = {"demo": bench.model}

        async def outdated() -> str | None:
            found = (await bench.runtime.outdated(models)).get("demo")
            return None if found is None else found.reason

        engine = await bench.runtime.start("demo-1", "demo", bench.model)
        await bench.healthy(engine)
        assert await outdated() is None
        template.touch()
        assert await outdated() is None
        template.write_text("HELLO")
        assert await outdated() == f"{template} was edited after the engine was started"
        assert await bench.runtime.outdated(models, {"demo-2"}) == {}, "it is on its way out"
        template.write_text("hello")
        assert await outdated() is None
        await engine.checkpoint(FACTS, Stages())
        assert await outdated() is None
        template.unlink()
        template.write_text("hello")
        assert await outdated() is None
        after = await bench.successor()
        bench.runtime = after.runtime
        template.write_text("HELLO")
        recovered = await after.runtime.recover(models)
        assert [found.tier for found in recovered.instances] == [Tier.CHECKPOINTED]
        assert await outdated() == f"{template} was edited after the engine was started"

    async def test_an_engine_that_would_wake_up_with_other_weights_is_not_restored(
        self, bench: Any, tmp_path: Path
    ) -> None:
        if Tier.CHECKPOINTED not in bench.runtime.tiers().offered:
            pytest.skip("no checkpoints here")
        folder = tmp_path / "weights"
        folder.mkdir()
        weights = folder / "model.safetensors"
        weights.write_bytes(b"old")
        bench.model = bench.model.model_copy(update={"weights": [folder]})
        models = {"demo": bench.model}
        engine = await bench.runtime.start("demo-1", "demo", bench.model)
        await bench.healthy(engine)
        await engine.checkpoint(replace(FACTS, sleep_level=2), Stages())
        weights.write_bytes(b"new")
        outdated = (await bench.runtime.outdated(models))["demo"]
        assert (outdated.usable, outdated.reason) == (False, f"{weights} was edited after the engine was started")
        assert await bench.runtime.outdated(models) == {}, "it is refused by now"
        after = await bench.successor()
        assert (await after.runtime.recover(models)).images == {}
        await bench.store.remove(next(iter(bench.store.names())))
