"""Containers of a state folder that no warmpool holds are shown by `doctor` and `status`, and left alone."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from proxy.runtime.podman import strays
from proxy.runtime.podman.api import PodmanError
from proxy.runtime.state_dir import Claim
from tests.fakes import settle
from tests.podman_bench import PodmanBench, engine_image, podman, why_no_podman
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not what():
            await asyncio.sleep(0.01)


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


async def test_the_status_shows_those_of_the_last_ten_minutes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed: list[Any] = [entry("a", None, "a" * 12)]
    now, failing = 0.0, False

    async def podman_lists() -> list[Any]:
        if failing:
            raise PodmanError(0, "podman's service cannot be reached")
        return listed

    caplog.set_level(logging.INFO)
    known = strays.Strays(podman_lists, Claim(tmp_path).owner, clock=lambda: now)
    assert known.lines() == []
    await known.look()
    listed.append(entry("b", None, "b" * 12))
    now = strays.AGAIN_S
    assert [line.count(": a") for line in known.lines()] == [1]
    await settle()
    assert len(known.lines()) == 1
    now, failing = strays.AGAIN_S + 1, True
    assert len(known.lines()) == 1
    await until(lambda: "could not be looked for" in caplog.text)
    now, failing = 2 * strays.AGAIN_S + 2, False
    assert len(known.lines()) == 1
    await until(lambda: len(known.lines()) == 2)
    assert [record.message.count(": b") for record in caplog.records if record.levelname == "WARNING"] == [0, 1]
    await known.close()


@pytest.mark.podman
@pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or "")
async def test_a_runtime_finds_what_another_one_left_and_leaves_it_there(tmp_path: Path, images: Path) -> None:
    engine_image()
    other = PodmanBench(tmp_path / "other", tmp_path / "images")
    await other.runtime.open()
    engine = await other.runtime.start("demo-1", "demo", other.model)
    await other.close()
    bench = PodmanBench(tmp_path / "mine", images)
    await bench.runtime.open()
    await bench.runtime.recover({"demo": bench.model})
    folder = str(tmp_path / "other" / "state")
    (line,) = [line for line in bench.runtime.strays() if folder in line]
    assert other.container(engine) in line
    assert podman("ps", "--format", "{{.Names}}", "--filter", f"name={other.container(engine)}")
    podman("rm", "--force", "--time", "0", other.container(engine))
    await bench.clear()
