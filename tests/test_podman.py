"""The podman runtime: the contract, and what is special to containers. Real podman, runc or crun, CRIU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proxy.instance import Tier
from tests.podman_bench import PodmanBench, engine_image, tmpfs_folder, why_no_podman
from tests.runtime_contract import RuntimeContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]

images = pytest.fixture(tmpfs_folder)


@pytest.fixture
async def bench(tmp_path: Path, images: Path) -> AsyncIterator[PodmanBench]:
    """A runtime, open; whatever it made is gone afterwards."""
    engine_image()
    made = PodmanBench(tmp_path, images)
    await made.runtime.open()
    yield made
    await made.clear()
    assert made.remains() == []


class TestPodmanRuntime(RuntimeContract):
    """The contract."""

    async def test_every_rung_is_there_where_criu_works(self, bench: PodmanBench) -> None:
        assert bench.runtime.rungs().missing == {}
        assert Tier.ARCHIVED in bench.runtime.rungs().offered
