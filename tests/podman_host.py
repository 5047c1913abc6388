"""A host with one proxy after the other and engines in real containers, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tomli_w

from proxy.runtime.state_dir import Claim
from tests.forked import PROXIES
from tests.podman_bench import engine_table, podman
from tests.served import Proxy, ServiceManager

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator
    from pathlib import Path

QUICK = {"sleeping": "200ms", "suspended": "400ms", "checkpointed": "600ms"}
AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}


class Host:
    """A folder for one proxy after the other, with a model `demo` in containers."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder, self.images = folder, images
        self.owner = Claim(folder / "warmpool" / "state").owner
        self.proxies: list[Proxy] = []

    def settings(self, *engine: str, podman_keys: dict[str, Any] | None = None, **entry: Any) -> dict[str, Any]:
        return {
            "pool": {"checkpoint_dir": str(self.images), "archive_dir": str(self.folder / "archive")},
            "models": {
                "demo": {
                    "idle": QUICK,
                    "health": {"interval": "20ms"},
                    "podman": engine_table(*engine, **(podman_keys or {})),
                    **entry,
                }
            },
        }

    async def serve(self, *engine: str, manager: ServiceManager | None = None, **entry: Any) -> Proxy:
        return await self.start(*engine, manager=manager, **entry).listening()

    def start(
        self, *engine: str, manager: ServiceManager | None = None, crash: str | None = None, **entry: Any
    ) -> Proxy:
        """Like `serve`, not waiting; `crash`: where it is to end, for tests/crashing.py."""
        runtime, pool, server = (entry.pop(table, {}) for table in ("runtime", "pool", "server"))
        settings = {**self.settings(*engine, **entry), "runtime": {"podman": runtime}, "server": server}
        settings["pool"].update(pool)
        proxy = Proxy(self.folder / "warmpool", settings=settings, manager=manager, crash=crash)
        self.proxies.append(proxy)
        return proxy

    def command(self, *arguments: str, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """Run `warmpool checkpoint …` with this configuration."""
        folder = self.folder / "warmpool"
        folder.mkdir(exist_ok=True)
        pool = {"state_dir": str(folder / "state"), **settings["pool"]}
        (folder / "command.toml").write_text(tomli_w.dumps({**settings, "pool": pool}))
        return PROXIES.run(["checkpoint", *arguments, "-c", str(folder / "command.toml")])

    def containers(self, *filters: str) -> list[str]:
        """The ids of this host's containers."""
        options = [f"--filter={f}" for f in (f"label=io.warmpool.owner={self.owner}", *filters)]
        return podman("ps", "--all", "--quiet", *options).split()

    def close(self) -> None:
        for proxy in self.proxies:
            if proxy.process.poll() is None:
                proxy.process.kill()
                proxy.process.wait()
        if left := self.containers():
            podman("rm", "--force", "--time", "0", *left)


async def host_of_test(tmp_path: Path, images: Path) -> AsyncIterator[Host]:
    """A host that is closed afterwards; for a fixture."""
    made = Host(tmp_path, images)
    yield made
    for proxy in made.proxies:
        if proxy.url:
            await proxy.session.close()
    made.close()
