"""`warmpool serve` in a process of its own, for tests."""

from __future__ import annotations

import asyncio
import re
import subprocess
from typing import TYPE_CHECKING, Any

import aiohttp
import tomli_w

from tests.support import PATIENCE_S, PYTHON, ROOT, get_json, processes_with

if TYPE_CHECKING:
    from pathlib import Path

ASK = {"model": "demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0}


class Proxy:
    """A running `warmpool serve`."""

    def __init__(self, folder: Path, *options: str, settings: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        pool = {
            "state_dir": str(folder / "state"),
            "checkpoint_dir": str(folder / "images"),
            **settings.get("pool", {}),
        }
        settings = {**settings, "pool": pool}
        settings["server"] = {"port": 0, **settings.get("server", {})}
        (folder / "warmpool.toml").write_text(tomli_w.dumps(settings))
        self.log = folder / "log"
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "proxy", "serve", "-c", str(folder / "warmpool.toml"), *options],
                cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip
        self.url = ""

    async def listening(self) -> Proxy:
        async with asyncio.timeout(PATIENCE_S):
            while not (found := re.findall(r"listening on (http://[\d.:]+)", self.log.read_text()[self.log_start :])):
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.02)
        self.url = found[-1]
        self.session = aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(PATIENCE_S))
        return self

    async def ask(self, **more: Any) -> tuple[str, str]:
        """The tier that a request found, and the text of its answer."""
        async with self.session.post("/v1/completions", json={**ASK, **more}) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return response.headers["x-warmpool-tier"], answer["choices"][0]["text"]

    async def instance(self) -> Any:
        instances = (await get_json(f"{self.url}/admin/status"))["models"]["demo"]["instances"]
        return instances[0] if instances else None

    async def states(self) -> dict[str, str]:
        """Instance → state."""
        instances = (await get_json(f"{self.url}/admin/status"))["models"]["demo"]["instances"]
        return {i["id"]: i["state"] for i in instances}

    async def until(self, state: str) -> None:
        """Return when the first instance has this state."""
        async with asyncio.timeout(PATIENCE_S):
            while (instance := await self.instance()) is None or instance["state"] != state:
                await asyncio.sleep(0.02)

    async def until_all(self, count: int, state: str) -> None:
        """Return when there are `count` instances and all have this state."""
        async with asyncio.timeout(PATIENCE_S):
            while list((await self.states()).values()) != [state] * count:
                await asyncio.sleep(0.02)

    async def engine_state(self) -> Any:
        """Asks the engine itself, around the proxy."""
        text = "".join(p.read_text() for p in (self.folder / "state" / "logs").iterdir())
        return await get_json(re.findall(r"listening on ([\d.:]+)", text)[-1].join(("http://", "/debug/state")))

    async def ended(self) -> int:
        """The exit status, once it has ended; nothing of it may be left."""
        await self.session.close()
        status = await asyncio.to_thread(self.process.wait, PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            # After kill -9 the guard needs a moment.
            while processes_with(str(self.folder)):
                await asyncio.sleep(0.02)
        return status
