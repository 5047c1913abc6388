"""Images that are damaged, and tmpfs that is too small for one: real engines, CRIU, and files in between."""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.served import Proxy
from tests.support import PATIENCE_S, engine_model, why_no_criu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from pathlib import Path

    Serve = Callable[..., Coroutine[Any, Any, Proxy]]

pytestmark = [pytest.mark.criu, pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))]

LATER = {"sleeping": "never", "suspended": "never", "checkpointed": "1h"}
"""Engines are checkpointed, but in these tests by a command."""


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts a proxy with a model `demo`, whose engine steps down when it is told to."""
    proxies: list[Proxy] = []

    async def start(**pool: Any) -> Proxy:
        model = engine_model("--memory", "48MiB", idle=LATER, golden_sleep_level=1)
        settings = {"models": {"demo": model}, "pool": {"checkpoint_reserve": "1MiB", **pool}}
        proxies.append(await Proxy(tmp_path / "warmpool", settings=settings).listening())
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.process.terminate()
        await proxy.ended()


async def checkpoint(proxy: Proxy) -> int:
    """Have the engine checkpointed: the status of the command's answer."""
    async with proxy.session.post("/admin/models/demo/checkpoint", json={"when_busy": "wait"}) as answer:
        return answer.status


async def boot_of(proxy: Proxy) -> str:
    return str((await proxy.engine_state())["boot_id"])


def pages(proxy: Proxy) -> Path:
    """The largest file of the image: what the engine had in memory."""
    return max((proxy.folder / "images" / "demo-1" / "criu").glob("pages-*.img"), key=lambda path: path.stat().st_size)


def overwrite(path: Path) -> None:
    """Other bytes, and as many."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(os.urandom(size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


async def until_said(proxy: Proxy, text: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while text not in proxy.log.read_text():
            await asyncio.sleep(0.02)


async def boot_of_next(proxy: Proxy, text: str) -> str:
    """The engine that a request restores; it is checkpointed again afterwards."""
    assert await proxy.ask() == ("checkpointed", text)
    boot = await boot_of(proxy)
    assert await checkpoint(proxy) == 200
    return boot


@pytest.mark.parametrize("damage", [overwrite, cut])
async def test_a_damaged_page_file_costs_one_start_and_leads_to_a_new_image(
    serve: Serve, damage: Callable[[Path], None]
) -> None:
    proxy = await serve()
    _, text = await proxy.ask()
    assert await checkpoint(proxy) == 200
    first = await boot_of_next(proxy, text)
    damage(pages(proxy))
    assert (await proxy.ask())[1] == text
    assert (second := await boot_of(proxy)) != first
    await until_said(proxy, "demo-1: its checkpoint is set aside")
    assert await checkpoint(proxy) == 200
    assert (proxy.folder / "images" / "demo-1.quarantined").is_dir()
    for _ in range(2):
        assert await boot_of_next(proxy, text) == second


async def test_a_damaged_image_comes_back_from_its_copy_in_the_archive(serve: Serve, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    proxy = await serve(archive_dir=str(archive))
    _, text = await proxy.ask()
    boot = await boot_of(proxy)
    assert await checkpoint(proxy) == 200
    await until_said(proxy, "a copy of its checkpoint is in the archive")
    cut(pages(proxy))
    for _ in range(2):
        assert await boot_of_next(proxy, text) == boot
    log = proxy.log.read_text()
    assert ("demo-1 ready from archived" in log, "demo-1 ready from checkpointed" in log) == (True, True)
    assert (proxy.folder / "images" / "demo-1.quarantined").is_dir()
    assert (archive / "demo-1.tar.zst").is_file()


# --- want of space ---


@pytest.fixture(params=["size=24m", "size=400m,nr_inodes=12"], ids=["seen before the dump", "found in the dump"])
def small_tmpfs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The folder for images, on a tmpfs of its own that has no room for one."""
    folder = tmp_path / "warmpool" / "images"
    folder.mkdir(parents=True)
    options = f"mode=0700,{request.param}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the proxy ends later


async def test_a_tmpfs_without_room_for_an_image_leaves_the_engine_as_it_is(serve: Serve, small_tmpfs: Path) -> None:
    proxy = await serve()
    _, text = await proxy.ask()
    boot = await boot_of(proxy)
    assert await checkpoint(proxy) >= 400
    await until_said(proxy, "demo-1 cannot go to checkpointed, and stays")
    assert [path.name for path in small_tmpfs.iterdir()] == [".lock"], "nothing half-written is left"
    assert await proxy.ask() == ("sleeping", text), "it had been put to sleep for its image"
    assert await boot_of(proxy) == boot
    subprocess.run(["mount", "-o", "remount,size=400m,nr_inodes=1000", str(small_tmpfs)], check=True)
    assert await checkpoint(proxy) == 200
    assert await proxy.ask() == ("checkpointed", text)
    assert await boot_of(proxy) == boot
    log = proxy.log.read_text()
    assert "set aside" not in log
    assert "broke" not in log
