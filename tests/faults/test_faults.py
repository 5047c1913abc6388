"""Faults under load, on real engines and CRIU: each request is answered or honestly failed, and all comes right again.

A short form runs with the other tests: some faults at random stages. `make test-faults` runs each fault at each stage,
FAULTS_ROUNDS times (1). FAULTS_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.faults.under_load import FAULTS, MODELS, STAGES, UnderLoad
from tests.podman_bench import engine_table, why_no_podman
from tests.support import engine_model, why_no_criu

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUNDS: Final = int(os.environ.get("FAULTS_ROUNDS", "0"))
SEED: Final = int(os.environ.get("FAULTS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
SHORT: Final = 4
"""How many faults the short form has."""


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """One of its own, which can be filled up."""
    folder = tmp_path / "images"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900m,mode=700", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def entries(runtime: str) -> dict[str, dict[str, Any]]:
    """Two models with load-test engines that need a while for an answer."""
    options = ("--tokens-per-second", "200")
    if runtime == "podman":
        return {key: {"podman": engine_table(*options)} for key in MODELS}
    return {key: engine_model(*options) for key in MODELS}


def schedule(chance: random.Random) -> list[tuple[str, str]]:
    """Fault and stage, in which order."""
    if not ROUNDS:
        return [(name, chance.choice(STAGES)) for name in chance.sample(sorted(FAULTS), SHORT)]
    each = [(name, stage) for name in FAULTS for stage in STAGES] * ROUNDS
    chance.shuffle(each)
    return each


@pytest.mark.criu
@pytest.mark.timeout(600 + 7200 * ROUNDS)
@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param("process", marks=pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))),
        pytest.param(
            "podman",
            marks=[
                pytest.mark.podman, pytest.mark.skipif(why_no_podman() is not None, reason=str(why_no_podman())),
            ],
        ),
    ],
)  # fmt: skip
async def test_whatever_fails_requests_are_answered_or_honestly_failed(
    runtime: str, tmp_path: Path, small_tmpfs: Path
) -> None:
    print(f"FAULTS_SEED={SEED}")  # noqa: T201 - to repeat it
    chance = random.Random(f"{SEED} {runtime}")
    it = UnderLoad(tmp_path, small_tmpfs, entries(runtime), chance)
    await it.serve()
    try:
        await it.begin()
        for name, stage in schedule(chance):
            await it.until_some(stage)
            await FAULTS[name](it)
            assert it.outcomes.wrong == [], (name, stage)
            await it.until_all_serve()
            assert it.outcomes.wrong == [], (name, stage)
            if chance.random() < 0.3 or not ROUNDS:
                await it.stop_asking()
                try:
                    await it.reconcile()
                except TimeoutError:
                    raise AssertionError((name, stage, it.last_differences, await it.status())) from None
                await it.begin()
        await it.stop_asking()
        await it.reconcile()
        assert it.outcomes.counts["answered"] > 0
        print(f"{runtime}: {dict(it.outcomes.counts)}")  # noqa: T201 - the figures
    finally:
        await it.close()
    log = (tmp_path / "warmpool" / "log").read_text()
    assert "Traceback" not in log
