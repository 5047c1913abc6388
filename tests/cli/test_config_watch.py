"""`server.watch`: a real server whose file is edited as editors, people and deployments do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w

from tests.served import Proxy
from tests.support import PATIENCE_S, engine_model, get_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


def document(proxy_folder: Path, **server: Any) -> dict[str, Any]:
    return {
        "server": {"port": 0, "watch": True, **server},
        "pool": {"state_dir": str(proxy_folder / "state"), "checkpoint_dir": str(proxy_folder / "images")},
        "models": {"demo": engine_model()},
    }


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    running = await Proxy(
        tmp_path / "w", settings={"server": {"watch": True}, "models": {"demo": engine_model()}}
    ).listening()
    yield running
    running.process.terminate()
    assert await running.ended() == 0


async def said(proxy: Proxy, text: str, count: int = 1) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while proxy.log.read_text().count(text) < count:
            await asyncio.sleep(0.05)


async def models(proxy: Proxy) -> set[str]:
    return set((await get_json(f"{proxy.url}/admin/status"))["models"])


async def test_a_changed_file_is_taken_on(proxy: Proxy) -> None:
    file = proxy.folder / "warmpool.toml"
    new = document(proxy.folder)
    new["models"]["second"] = engine_model()
    # As editors do: beside, and renamed.
    beside = file.with_suffix(".new")
    beside.write_text(tomli_w.dumps(new))
    beside.rename(file)
    await said(proxy, "reload: added second")
    assert await models(proxy) == {"demo", "second"}
    # In place.
    del new["models"]["second"]
    file.write_text(tomli_w.dumps(new))
    await said(proxy, "reload: removed second")
    # By a symbolic link that is moved.
    new["models"]["third"] = engine_model()
    (proxy.folder / "v2.toml").write_text(tomli_w.dumps(new))
    beside.symlink_to("v2.toml")
    beside.rename(file)
    await said(proxy, "reload: added third")


async def test_a_wrong_or_half_written_file_changes_nothing_and_is_said_once(proxy: Proxy) -> None:
    file = proxy.folder / "warmpool.toml"
    text = file.read_text()
    file.write_text(text[: len(text) // 2] + "\n[models.demo")
    await said(proxy, "reload: nothing was changed")
    assert await models(proxy) == {"demo"}
    file.unlink()
    await said(proxy, "is gone: its configuration stays in force")
    log = proxy.log.read_text()
    assert log.count("reload: nothing was changed") == log.count("is gone") == 1
    new = document(proxy.folder)
    new["models"]["later"] = engine_model()
    file.write_text(tomli_w.dumps(new))
    await said(proxy, "reload: added later")
    assert (await proxy.ask())[0] == "stopped"


async def test_without_watch_only_a_signal_reloads(tmp_path: Path) -> None:
    proxy = await Proxy(tmp_path / "w", settings={"models": {"demo": engine_model()}}).listening()
    file = proxy.folder / "warmpool.toml"
    new = document(proxy.folder, watch=False)
    new["models"]["second"] = engine_model()
    file.write_text(tomli_w.dumps(new))
    await asyncio.sleep(3)  # nothing is to happen
    assert await models(proxy) == {"demo"}
    new["server"]["watch"] = True
    file.write_text(tomli_w.dumps(new))
    proxy.process.send_signal(1)
    await said(proxy, "changed server.watch")
    del new["models"]["second"]
    file.write_text(tomli_w.dumps(new))
    await said(proxy, "reload: removed second")
    proxy.process.terminate()
    assert await proxy.ended() == 0
