"""Golden checkpoints made and proven without a proxy, by the pool's own transitions, on fakes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from proxy.errors import EngineError
from proxy.pool import golden
from tests.fakes import Rig

if TYPE_CHECKING:
    from proxy.checkpoint.manifest import Manifest
    from proxy.checkpoint.store import CheckpointStore
    from proxy.engine.client import EngineClient
    from proxy.runtime.base import EngineProcess, Runtime


class Recorded:
    """Writes down the stages it is told of."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def begins(self, stage: str) -> None:
        self.stages.append(stage)

    def ended(self, stage: str, seconds: float) -> None:
        assert stage == self.stages[-1], "one at a time"


class Store:
    """The images of a fake runtime, as a store shows them."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def names(self) -> list[str]:
        return [*self._rig.runtime.images.there]

    def load(self, image: str) -> Manifest:
        facts = self._rig.runtime.images.there[image].facts
        shown = SimpleNamespace(
            sleep_level=facts.sleep_level,
            canary=facts.canary,
            details=facts.details,
            bytes_by_kind=lambda: {"memory pages": 1 << 20},
        )
        return cast("Manifest", shown)

    async def verify(self, image: str) -> Manifest:
        return self.load(image)


class Context(golden.CheckpointContext):
    def client(self, engine: EngineProcess) -> EngineClient:
        return RIGS[engine.key]._connect(engine, engine.key, self.model)


RIGS: dict[str, Rig] = {}


def context_of(rig: Rig) -> Context:
    RIGS["demo"] = rig
    return Context(rig.settings, "demo", cast("Runtime", rig.runtime), cast("CheckpointStore", Store(rig)))


@pytest.mark.parametrize("shares_images", [False, True])
async def test_a_checkpoint_is_made_and_proven(shares_images: bool) -> None:
    rig, recorded = Rig(shares_images=shares_images), Recorded()
    made = await golden.create(context_of(rig), recorded)
    stages = ["cleanup", "start", "load", "warmup", "canary", "sleep", "checkpoint", "check"]
    assert recorded.stages[: len(stages)] == stages == [*made.making_s][: len(stages)]
    assert {"restore", "health", "wake_up", "canary", "stop"} <= {*made.proof_s}
    assert made.canary_checked
    assert not rig.runtime.processes
    (image,) = rig.runtime.images.there.values()
    assert (image.facts.sleep_level, image.facts.canary) == (2, "canary")
    assert "start" in image.facts.details["making_s"]
    assert await golden.verify(context_of(rig), "demo" if shares_images else "demo-1", Recorded(), restore=True)
    assert not rig.runtime.processes
    assert rig.runtime.images.there


async def test_one_that_answers_otherwise_is_set_aside() -> None:
    rig = Rig()
    context = context_of(rig)
    await golden.create(context, Recorded())
    connect = rig._connect

    def other(*what: Any) -> EngineClient:
        client = connect(*what)
        cast("Any", client).answer = "another answer"
        return client

    rig._connect = other  # type: ignore[assignment, method-assign]
    with pytest.raises(golden.GoldenError, match="set aside: canary: .*answers differently"):
        await golden.verify(context, "demo-1", Recorded(), restore=True)
    assert (rig.runtime.images.there, [*rig.runtime.images.quarantined]) == ({}, ["demo-1"])


async def test_a_copy_of_the_weights_that_fails_is_a_warning_as_in_the_pool(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig({"demo": {"weights_copy": True}})
    rig.runtime.failures["save_weights"] = [EngineError("save_weights", "no space")]
    made = await golden.create(context_of(rig), Recorded())
    assert made.manifest.details["weights_copy_bytes"] == 0
    assert "no copy of its weights" in caplog.text


async def test_what_fails_on_the_way_is_named_and_leaves_nothing() -> None:
    rig = Rig()
    rig.runtime.failures["sleep"] = [EngineError("sleep", "it refuses")]
    with pytest.raises(golden.GoldenError, match="^sleep: .*it refuses"):
        await golden.create(context_of(rig), Recorded())
    assert (rig.runtime.processes, rig.runtime.images.there) == ({}, {})


async def test_keep_or_not_a_checkpoint_that_was_made_stays() -> None:
    rig = Rig({"demo": {"keep": False}})
    await golden.create(context_of(rig), Recorded())
    assert [*rig.runtime.images.there] == ["demo-1"]
