"""Containers of a state folder that no warmpool holds are shown by `doctor` and `status`, and left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from proxy.runtime.podman import strays
from proxy.runtime.state_dir import Claim
from tests.podman_bench import PodmanBench, engine_image, podman, tmpfs_folder, why_no_podman

if TYPE_CHECKING:
    from pathlib import Path

images = pytest.fixture(tmpfs_folder)


def entry(name: str, folder: Path | None, owner: str) -> dict[str, Any]:
    labels = {"io.warmpool.owner": owner}
    return {"Names": [name], "Labels": labels if folder is None else {**labels, "io.warmpool.state-dir": str(folder)}}


def test_those_of_a_folder_that_is_held_are_no_strays(tmp_path: Path) -> None:
    mine, held, left = (Claim(tmp_path / name) for name in ("mine", "held", "left"))
    held.acquire()
    left.acquire()
    left.release()
    entries = [entry(f"of-{c.folder.name}", c.folder, c.owner) for c in (mine, held, left)]
    (found,) = strays.among([*entries, entry("another", left.folder, left.owner)], mine.owner)
    assert found.found == f"2 containers of state_dir {left.folder}, which no warmpool holds: another, of-left"
    assert found.removal.endswith(f"label=io.warmpool.owner={left.owner})")
    held.release()
    assert len(strays.among(entries, mine.owner)) == 2


def test_those_that_name_no_folder_are_of_an_earlier_version(tmp_path: Path) -> None:
    (found,) = strays.among([entry("old", None, "0123456789ab")], Claim(tmp_path).owner)
    assert found.found == "1 container of a warmpool of an earlier version: old"


@pytest.mark.podman
@pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or "")
async def test_a_runtime_finds_what_another_one_left_and_leaves_it_there(tmp_path: Path, images: Path) -> None:
    engine_image()
    other = PodmanBench(tmp_path / "other", tmp_path / "images")
    await other.runtime.open()
    handle = await other.runtime.start("demo-1", "demo", other.model)
    await other.close()
    bench = PodmanBench(tmp_path / "mine", images)
    await bench.runtime.open()
    await bench.runtime.recover({"demo": bench.model})
    folder = str(tmp_path / "other" / "state")
    (line,) = [line for line in bench.runtime.strays() if folder in line]
    assert other.container(handle) in line
    assert podman("ps", "--format", "{{.Names}}", "--filter", f"name={other.container(handle)}")
    podman("rm", "--force", "--time", "0", other.container(handle))
    await bench.clear()
