"""`warmpool serve` in a process of its own, for tests."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import aiohttp
import tomli_w

from tests.forked import PROXIES, Forked
from tests.support import ENGINE_PORTS, PATIENCE_S, PYTHON, ROOT, get_json, processes_with

if TYPE_CHECKING:
    from pathlib import Path

ASK = {"model": "demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0}


_HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execve(sys.argv[2], sys.argv[2:], {**os.environ, "LISTEN_PID": str(os.getpid())})
"""


class ServiceManager:
    """Holds a listening socket for one process after the other and hears what they say, as systemd does."""

    def __init__(self, folder: Path, *, watchdog_s: float | None = None) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard.bind(str(folder / "notify"))
        self._heard.setblocking(False)
        self.said: list[dict[str, str]] = []
        self.environment = {"LISTEN_FDS": "1", "NOTIFY_SOCKET": str(folder / "notify")}
        if watchdog_s is not None:
            self.environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))

    def handing_over(self, command: list[str]) -> list[str]:
        """The command with the socket as its descriptor 3."""
        return [PYTHON, "-c", _HAND_OVER, str(self.socket.fileno()), *command]

    async def until(self, name: str, count: int = 1) -> str:
        """What was said of `name`, once it was said `count` times since `forget`."""
        async with asyncio.timeout(PATIENCE_S):
            while len(values := [m[name] for m in self.said if name in m]) < count:
                text = (await asyncio.get_running_loop().sock_recv(self._heard, 65536)).decode()
                self.said.append(dict(line.split("=", 1) for line in text.splitlines()))
        return values[count - 1]

    def forget(self) -> None:
        self.said.clear()

    def close(self) -> None:
        self.socket.close()
        self._heard.close()


class Proxy:
    """A running `warmpool serve`; `forked`: from a process of the session, not started as users do."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        settings: dict[str, Any],
        manager: ServiceManager | None = None,
        crash: str | None = None,
        cgroup: Path | None = None,
        forked: bool = True,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        pool = {
            "state_dir": str(folder / "state"),
            "checkpoint_dir": str(folder / "images"),
            **settings.get("pool", {}),
        }
        settings = {**settings, "pool": pool}
        runtime = settings.get("runtime", {})
        process = {"ports": ENGINE_PORTS, **runtime.get("process", {})}
        settings["runtime"] = {**runtime, "process": process}
        settings["server"] = {"port": 0, **settings.get("server", {})}
        (folder / "warmpool.toml").write_text(tomli_w.dumps(settings))
        self.url = ""
        self.log = folder / "log"
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        arguments = ["serve", "-c", str(folder / "warmpool.toml"), *options]
        environment = {**os.environ, **(manager.environment if manager is not None else {})}
        listening = manager.socket.fileno() if manager is not None else None
        self.process: subprocess.Popen[bytes] | Forked
        with self.log.open("ab") as log:
            if forked and crash is None and cgroup is None:
                self.process = Forked(PROXIES.start(arguments, environment, log.fileno(), listening=listening))
                return
            program = ["proxy"] if crash is None else ["tests.crashing", crash]
            command = [PYTHON, "-m", *program, *arguments]
            if cgroup is not None:
                command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(cgroup), *command]
            self.process = subprocess.Popen(
                manager.handing_over(command) if manager is not None else command,
                cwd=ROOT, stdout=log, stderr=log, pass_fds=[] if listening is None else [listening], env=environment,
            )  # fmt: skip

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
            # After kill -9 the orphan reaper needs a moment.
            while processes_with(str(self.folder)):
                await asyncio.sleep(0.02)
        return status
