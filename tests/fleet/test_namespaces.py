"""Three hosts as they are run, each in a network of its own with a nats-server: load, and what goes wrong there."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
import tomli_w

from tests.fleet import certificates
from tests.fleet.nats_server import PROGRAM, needs_nats
from tests.fleet.network import Network
from tests.server.test_realtime import transcript
from tests.support import PATIENCE_S, PYTHON, ROOT, engine_model

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

log = logging.getLogger("tests.fleet")
pytestmark = [needs_nats, pytest.mark.timeout(300)]
NAMES = ("a", "b", "c")
_MANY = ("--max-model-len", "100000", "--max-num-seqs", "64")
_SLOW = ("--tokens-per-second", "50")
"""So that many streams are under way at once, however busy this machine is."""


class Fleet:
    """Three hosts: each has a model of its own, and one that all have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = Network(NAMES)
        self._authority = folder / "authority"
        self.warmpool: dict[str, subprocess.Popen[bytes]] = {}
        self.nats: dict[str, subprocess.Popen[bytes]] = {}
        self.begun = 0
        """Streams that have an answer's head."""

    async def open(self) -> None:
        certificates.authority(self._authority)
        self.network.open()
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE_S))
        for name in NAMES:
            self._configure(name)
            self.start_nats(name)
            self.start(name)
        for name in NAMES:
            await until(lambda name=name: self.lists(name, 4))  # type: ignore[misc]

    def _configure(self, name: str) -> None:
        certificate, key = certificates.certificate(self._authority, name)
        address = self.network.address[name]
        never = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}
        settings: dict[str, Any] = {
            "server": {"host": address, "port": 8080, "allow_anyone": True, "drain_timeout": "1m"},
            "pool": {
                "state_dir": str(self.folder / name / "state"),
                "checkpoint_dir": str(self.folder / name / "images"),
            },
            "fleet": {
                "host": name, "url": f"https://{address}:8443", "certificate": str(certificate), "key": str(key),
                "ca": str(self._authority / "ca.pem"),
                "nats": {"servers": [f"nats://{self.network.address[n]}:4222" for n in (name, *NAMES) if n]},
            },
            "models": {
                "shared": engine_model(*_MANY, canary="never", idle=never, max_concurrency=64),
                f"only_{name}": engine_model(*_MANY, *_SLOW, canary="never", idle=never, max_concurrency=64),
            },
        }  # fmt: skip
        (self.folder / f"{name}.toml").write_text(tomli_w.dumps(settings))
        routes = ", ".join(f'"nats://{each}:6222"' for each in self.network.address.values())
        (self.folder / f"{name}.conf").write_text(
            f'listen: "0.0.0.0:4222"\nserver_name: {name}\n'
            f'cluster {{name: f, listen: "0.0.0.0:6222", routes: [{routes}]}}\n'
        )

    def start_nats(self, name: str) -> None:
        assert PROGRAM is not None
        command = [PROGRAM, "-c", str(self.folder / f"{name}.conf")]
        self.nats[name] = self.network.run(name, command, str(self.folder / f"{name}-nats.log"))

    def start(self, name: str) -> None:
        command = [PYTHON, "-m", "proxy", "serve", "-c", str(self.folder / f"{name}.toml")]
        self.warmpool[name] = self.network.run(
            name, ["env", "-C", str(ROOT), *command], str(self.folder / f"{name}.log")
        )

    async def close(self) -> None:
        await self.session.close()
        for process in self.warmpool.values():
            process.terminate()
        for process in self.warmpool.values():
            await asyncio.to_thread(process.wait, 60)
        self.network.close()

    def url(self, name: str) -> str:
        return f"http://{self.network.address[name]}:8080"

    async def lists(self, name: str, count: int) -> bool:
        try:
            async with self.session.get(f"{self.url(name)}/v1/models") as response:
                return len((await response.json())["data"]) == count
        except aiohttp.ClientError:
            return False

    async def tier(self, name: str, model: str) -> str | None:
        async with self.session.get(f"{self.url(name)}/v1/models/{model}") as response:
            return str((await response.json())["tier"]) if response.status == 200 else None

    async def ask(self, name: str, model: str, **more: Any) -> tuple[str, float, Any]:
        """Which host answered, and after how many seconds; and what."""
        began = time.perf_counter()
        body = {"model": model, "prompt": "Hello", "max_tokens": 4, **more}
        async with self.session.post(f"{self.url(name)}/v1/completions", json=body) as response:
            said = await response.json()
            assert response.status == 200, said
            assert said["model"] == model
            return response.headers["x-warmpool-host"], time.perf_counter() - began, response.headers

    async def stream(self, name: str, model: str, tokens: int) -> int:
        """How many tokens a whole stream had."""
        body = {"model": model, "prompt": "Hello", "max_tokens": tokens, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
        async with self.session.post(f"{self.url(name)}/v1/completions", json=body) as response:
            assert response.status == 200, await response.read()
            self.begun += 1
            events = [line for line in (await response.read()).split(b"\n\n") if line]
        assert events[-1] == b"data: [DONE]"
        return int(orjson.loads(events[-2][6:])["usage"]["completion_tokens"])

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


async def until(holds: Callable[[], Awaitable[object]], limit_s: float = PATIENCE_S) -> float:
    """After how many seconds it held."""
    began = time.perf_counter()
    async with asyncio.timeout(limit_s):
        while not await holds():
            await asyncio.sleep(0.05)
    return time.perf_counter() - began


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path)
    try:
        await made.open()
        yield made
    finally:
        await made.close()


async def test_every_request_is_answered_by_the_right_model_wherever_it_comes_in(fleet: Fleet) -> None:
    for model in ("only_a", "only_b", "only_c"):
        for name in NAMES:
            host, _, _ = await fleet.ask(name, model)
            assert host == model[-1]
    where, _, _ = await fleet.ask("a", "shared")
    await asyncio.gather(*(until(lambda n=n: _from(fleet, n, where)) for n in NAMES))  # type: ignore[misc]
    for name in NAMES:
        async with fleet.session.ws_connect(f"{fleet.url(name)}/v1/realtime?model=only_c") as socket:
            assert (await transcript(socket, "only_c"))[-1]["type"] == "transcription.done"
    hosts, took = [], dict[bool, list[float]]({True: [], False: []})
    for n in range(150):
        name = NAMES[n % 3]
        host, seconds, _ = await fleet.ask(name, "shared")
        hosts.append(host)
        took[name == where].append(seconds)
    assert hosts.count(where) >= 149
    here, there = sorted(took[True]), sorted(took[False])
    log.warning("median here %.2f ms, by a hop %.2f ms", here[len(here) // 2] * 1e3, there[len(there) // 2] * 1e3)
    answers = await asyncio.gather(*(fleet.ask(NAMES[n % 3], f"only_{NAMES[n % 2]}") for n in range(90)))
    assert [host for host, _, _ in answers] == [NAMES[n % 2] for n in range(90)]
    assert await asyncio.gather(*(fleet.stream(name, "shared", 3000) for name in NAMES)) == [3000] * 3


async def test_each_host_in_turn_ends_and_comes_back_while_streams_run(fleet: Fleet) -> None:
    for name in NAMES:
        await fleet.ask(name, f"only_{name}")
    for gone in NAMES:
        others = [name for name in NAMES if name != gone]
        # Ten seconds each: they are running when it ends, and it lets them finish.
        running = [asyncio.create_task(fleet.stream(NAMES[n % 3], f"only_{gone}", 500)) for n in range(40)]
        running += [asyncio.create_task(fleet.stream(others[n % 2], f"only_{others[n % 2]}", 500)) for n in range(10)]
        while fleet.begun < len(running):
            assert not any(task.done() for task in running), [task for task in running if task.done()]
            await asyncio.sleep(0.05)
        fleet.begun = 0
        fleet.warmpool[gone].terminate()
        for _ in range(10):
            for name in others:
                host, _, _ = await fleet.ask(name, "shared")
                assert host in NAMES
        assert await asyncio.gather(*running) == [500] * len(running)
        await asyncio.to_thread(fleet.warmpool[gone].wait, 60)
        fleet.start(gone)
        for name in NAMES:
            await until(lambda name=name: fleet.lists(name, 4))  # type: ignore[misc]


async def test_a_network_that_is_cut_one_way_between_two_hosts_harms_nobody_else(fleet: Fleet) -> None:
    for name in NAMES:
        await fleet.ask(name, "only_c")
    where, _, _ = await fleet.ask("b", "shared")
    fleet.network.silence("a", "c")
    try:
        assert (await fleet.ask("b", "only_c"))[0] == "c"
        for name in NAMES:
            host, seconds, _ = await fleet.ask(name, "shared")
            log.warning("cut from a to c: shared, in at %s, by %s after %.1f s", name, host, seconds)
            assert {name, host} != {"a", "c"}
        assert (await fleet.ask("c", "only_b"))[0] == "b"
        async with fleet.session.post(
            f"{fleet.url('a')}/v1/completions", json={"model": "only_c", "prompt": "Hello", "max_tokens": 4}
        ) as response:
            assert response.status in (404, 502, 503)  # only c has it
    finally:
        fleet.network.speak("a", "c")
    log.warning("healed: found after %.1f s", await until(lambda: _from(fleet, "a", "c", "only_c")))
    for name in NAMES:
        await until(lambda name=name: _from(fleet, name, where))  # type: ignore[misc]


async def test_hosts_and_nats_fail_and_what_is_left_answers(fleet: Fleet) -> None:
    where, _, _ = await fleet.ask("c", "shared")
    for name in NAMES:
        await until(lambda name=name: _from(fleet, name, where))  # type: ignore[misc]
    others = [name for name in NAMES if name != where]

    # One nats-server, then all of them.
    fleet.nats[where].kill()
    for name in NAMES:
        assert (await fleet.ask(name, "shared"))[0] == where
    for process in fleet.nats.values():
        process.kill()
    for _ in range(5):
        for name in NAMES:
            assert (await fleet.ask(name, "shared"))[0] == where
        await asyncio.sleep(1.5)  # beyond the time after which a host is stale
    for name in NAMES:
        fleet.start_nats(name)
    for name in NAMES:
        await until(lambda name=name: _log_counts(fleet, name, "NATS: connected", 2))  # type: ignore[misc]

    # A host without a word: what runs there breaks, what comes is answered elsewhere.
    running = asyncio.create_task(fleet.stream(others[0], "shared", 40_000))
    await asyncio.sleep(0.5)
    began = time.perf_counter()
    fleet.network.cut(where)
    answers = await asyncio.gather(*(fleet.ask(name, "shared") for name in others))
    log.warning("cut off: answered elsewhere after %s s", [round(seconds, 1) for _, seconds, _ in answers])
    assert all(host != where for host, _, _ in answers)
    with pytest.raises(aiohttp.ClientError):
        await running
    log.warning("cut off: the stream broke after %.1f s", time.perf_counter() - began)
    fleet.network.join(where)
    log.warning("healed: found after %.1f s", await until(lambda: _from(fleet, others[0], where, f"only_{where}")))

    # A host that is killed.
    fleet.warmpool[where].kill()
    await asyncio.to_thread(fleet.warmpool[where].wait, 60)
    began = time.perf_counter()
    for name in others:
        assert (await fleet.ask(name, "shared"))[0] != where
    log.warning("killed: all answered elsewhere after %.1f s", time.perf_counter() - began)
    fleet.start(where)
    await until(lambda: _from(fleet, others[0], where, f"only_{where}"))


async def _from(fleet: Fleet, name: str, host: str, model: str = "shared") -> bool:
    try:
        return (await fleet.ask(name, model))[0] == host
    except (AssertionError, aiohttp.ClientError):
        return False


async def _log_counts(fleet: Fleet, name: str, text: str, count: int) -> bool:
    return fleet.log_of(name).count(text) >= count
