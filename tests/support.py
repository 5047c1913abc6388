"""Real engines and real proxies for tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import aiohttp
import psutil

from proxy.config.model import ModelSettings

if TYPE_CHECKING:
    from proxy.runtime.base import EngineProcess

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0
"""How long a test waits for something that will surely happen, on a machine with much else to do."""

_FIRST_PORT = 20_000 + os.getpid() % 200 * 50
ENGINE_PORTS = f"{_FIRST_PORT}-{_FIRST_PORT + 49}"
"""Engines' ports of this test run, so that two runs on one machine do not take each other's engines for their own."""


_TIMES: Final = float(os.environ.get("EXAMPLES", "1"))


def examples(count: int) -> int:
    """How many examples hypothesis tries: EXAMPLES (1) times as many (`make fuzz`)."""
    return max(1, int(count * _TIMES))


def engine_command(*options: str) -> list[str]:
    """The command of a load-test engine that is up at once."""
    return [
        "{python}", "-m", "loadtest.engine", "--host", "{host}", "--port", "{port}", "--model", "{model}",
        "--memory", "8MiB", "--ttft", "0.001", "--tokens-per-second", "2000", "--sleep-mode", "--faults", *options,
    ]  # fmt: skip


def engine_model(*options: str, **entry: Any) -> dict[str, Any]:
    """A model's table with a load-test engine."""
    return {
        "process": {"command": engine_command(*options), "cwd": str(ROOT)},
        "health": {"interval": "20ms"},
        **entry,
    }


def engine_settings(*options: str, **entry: Any) -> ModelSettings:
    """The same, validated."""
    return ModelSettings(**engine_model(*options, **entry))


async def get_json(url: str) -> Any:
    """The answer to a GET."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        response.raise_for_status()
        return await response.json()


async def until_healthy(base_url: str) -> None:
    """Return when an engine's `/health` answers 200."""
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{base_url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.02)


def processes_with(text: str) -> list[int]:
    """The pids of live processes that have `text` in their environment or command line, this one left out."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            # Of a zombie both are empty.
            if pid != os.getpid() and any(
                text.encode() in Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")
            ):
                found.append(pid)
    return found


class HttpBench:
    """A runtime with load-test engines, looked at through HTTP, and those that follow it on the same folders."""

    runtime: Any
    heir: Self | None = None
    closed = False

    def another(self, *, changed: bool) -> Self:
        """One like this, on the same folders; `changed`: with another command."""
        raise AssertionError  # each has its own

    async def close(self) -> None:
        """Close the runtime, and those that followed."""
        if self.heir is not None:
            await self.heir.close()
        if not self.closed:
            self.closed = True
            await self.runtime.close()

    async def successor(self, *, changed: bool = False) -> Self:
        """Close the runtime and open another one on the same folders."""
        await self.close()
        self.heir = self.another(changed=changed)
        await self.heir.runtime.open()
        return self.heir

    async def healthy(self, engine: EngineProcess) -> None:
        """Return when the engine answers."""
        await until_healthy(engine.base_url)

    async def boot_id(self, engine: EngineProcess) -> str:
        """What the engine drew when it started."""
        return str((await get_json(f"{engine.base_url}/debug/state"))["boot_id"])

    async def answers(self, engine: EngineProcess) -> bool:
        """Whether the engine answers right now."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(0.5)) as session,
                session.get(f"{engine.base_url}/health") as response,
            ):
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def scribble(self, engine: EngineProcess) -> None:
        """Have the engine change memory, and its scratch files if it has any."""
        body = {"model": "demo", "prompt": "scribble", "max_tokens": 50}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{engine.base_url}/v1/completions", json=body) as response,
        ):
            assert response.status == 200


def files_in(folder: Path) -> list[Path]:
    """What is in a folder that may not be there, lock files left out."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []


def why_no_criu() -> str | None:
    """None where process trees can be checkpointed with CRIU, else the reason to skip."""
    if os.geteuid() != 0:
        return "checkpointing needs root"
    if shutil.which("criu") is None:
        return "no criu in PATH (make host)"
    return None


PYTHON = sys.executable
