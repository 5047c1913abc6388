"""Fixtures of the tests with podman."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.podman_bench import PodmanBench, engine_image, moving_tag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

tag = pytest.fixture(moving_tag)


@pytest.fixture
async def bench(tmp_path: Path, images: Path) -> AsyncIterator[PodmanBench]:
    """A runtime, open; whatever it made is gone afterwards."""
    engine_image()
    made = PodmanBench(tmp_path, images)
    await made.runtime.open()
    yield made
    await made.clear()
    assert made.remains() == []
