"""A `warmpool serve` with two models of which one may be awake, clients that ask all the time, and what must hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson
import psutil

from proxy.runtime.state_dir import Claim
from tests.podman_bench import podman
from tests.served import Proxy
from tests.support import PATIENCE_S, files_in, get_json, processes_with

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

MODELS: Final = ("first", "second")
LIMITS: Final = {
    "start_timeout": "20s", "wake_timeout": "10s", "checkpoint_timeout": "20s", "response_timeout": "3s",
    "queue_timeout": "30s", "max_wait": "2s",
}  # fmt: skip
IDLE: Final = {"sleeping": "100ms", "suspended": "250ms", "checkpointed": "450ms"}
MOVING: Final = frozenset(
    {"waking", "falling_asleep", "suspending", "checkpointing", "cloning", "archiving", "broken", "stopping"}
)
RUNNING: Final = frozenset({"ready", "retiring", "sleeping", "suspended"})
TOKENS: Final = 60
HONEST: Final = frozenset({429, 500, 502, 503, 504})


@dataclass
class Outcomes:
    """What became of requests."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What no client may see."""


class UnderLoad:
    """One warmpool after the other on the same folders, and its clients."""

    def __init__(self, folder: Path, images: Path, entries: dict[str, dict[str, Any]], chance: random.Random) -> None:
        self.folder, self.images, self.chance = folder, images, chance
        models = {key: {**LIMITS, "idle": IDLE, "health": {"interval": "20ms"}, **e} for key, e in entries.items()}
        self.settings: dict[str, Any] = {
            "models": models,
            "pool": {"checkpoint_dir": str(images), "max_awake": 1, "switch_after": "300ms", "quantum": "200ms"},
            "server": {"drain_timeout": "5s"},
        }
        self.podman = "podman" in models[MODELS[0]]
        self.outcomes = Outcomes()
        self.texts: dict[str, str] = {}
        self.away = False
        """Nobody listens for now, which clients see."""
        self._asking: list[asyncio.Task[None]] = []
        self.proxy: Proxy

    # --- the server ---

    async def serve(self) -> None:
        self.proxy = await Proxy(self.folder / "warmpool", settings=self.settings).listening()
        self.away = False

    async def restart(self, number: int) -> None:
        """By a signal, and the next one."""
        self.away = True
        self.proxy.process.send_signal(number)
        await self.proxy.session.close()
        await asyncio.to_thread(self.proxy.process.wait, PATIENCE_S)
        await self.serve()

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = await get_json(f"{self.proxy.url}/admin/status")
        return found

    async def instances(self) -> list[dict[str, Any]]:
        return [i for model in (await self.status())["models"].values() for i in model["instances"]]

    async def until_some(self, state: str, limit_s: float = 3.0) -> dict[str, Any] | None:
        """An instance in this state, if one comes to it within the limit."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(limit_s):
                while True:
                    for instance in await self.instances():
                        if instance["state"] == state:
                            return instance
                    await asyncio.sleep(0.005)
        return None

    def engine_pids(self) -> list[int]:
        """The processes of engines, those that are restored by CRIU too."""
        if self.podman:
            owner = Claim(self.folder / "warmpool" / "state").owner
            ids = podman("ps", "--quiet", f"--filter=label=io.warmpool.owner={owner}").split()
            pids = [int(podman("inspect", "--format", "{{.State.Pid}}", one)) for one in ids]
            return [pid for pid in pids if pid]
        mine = []
        for pid in processes_with(str(self.folder)):
            with contextlib.suppress(psutil.Error):
                if "loadtest.engine" in " ".join(psutil.Process(pid).cmdline()):
                    mine.append(pid)
        return mine

    # --- the clients ---

    async def begin(self, clients: int = 6) -> None:
        """Learn what each model answers, and have clients ask from now on."""
        async with aiohttp.ClientSession() as session:
            for model in MODELS:
                async with session.post(f"{self.proxy.url}/v1/completions", json=_question(model)) as response:
                    assert response.status == 200, await response.text()
                    self.texts[model] = (await response.json())["choices"][0]["text"]
        for number in range(clients):
            self._asking.append(asyncio.create_task(self._ask_on(number)))

    async def _ask_on(self, number: int) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE_S)) as session:
            while True:
                model = MODELS[self.chance.randrange(2)]
                await self._ask(session, model, stream=number % 2 == 0)
                await asyncio.sleep(self.chance.choice((0.0, 0.1, 0.8)))

    async def _ask(self, session: aiohttp.ClientSession, model: str, *, stream: bool) -> None:
        """One request; whatever becomes of it is counted, and what may not be is written down."""
        status, raw, proxy = 0, b"", self.proxy
        try:
            async with session.post(f"{proxy.url}/v1/completions", json=_question(model, stream)) as response:
                status = response.status
                raw = await response.read()
        except TimeoutError:
            self.outcomes.wrong.append(f"{model}: nothing within {PATIENCE_S:g} s")
            return
        except aiohttp.ClientError as error:
            known = status == 200 or self.away or isinstance(error, aiohttp.ServerDisconnectedError)
            self.outcomes.counts["broken" if known else "unreachable"] += 1
            if not known:
                await asyncio.sleep(0.1)
                if proxy is self.proxy and not self.away:
                    self.outcomes.wrong.append(f"{model}: {error!r}")
            return
        self._judge(model, status, raw, stream=stream)

    def _judge(self, model: str, status: int, raw: bytes, *, stream: bool) -> None:
        if status != 200:
            try:
                error = orjson.loads(raw)["error"]
                honest = status in HONEST and bool(error["message"]) and str(self.folder) not in error["message"]
            except (ValueError, KeyError, TypeError):
                honest = False
            self.outcomes.counts[f"refused {status}"] += 1
            if not honest:
                self.outcomes.wrong.append(f"{model}: {status} {raw[:300]!r}")
            return
        text, error = _text_of(raw, stream=stream)
        if error:
            self.outcomes.counts["error event"] += 1
        elif text == self.texts[model]:
            self.outcomes.counts["answered"] += 1
        else:
            self.outcomes.wrong.append(f"{model}: another text, {text!r} for {self.texts[model]!r}")

    async def stop_asking(self) -> None:
        """The clients leave, wherever they are."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        self._asking.clear()

    # --- what must hold ---

    async def until_all_serve(self) -> None:
        """Return when each model gives its answer again."""
        async with asyncio.timeout(2 * PATIENCE_S), aiohttp.ClientSession() as session:
            for model in MODELS:
                while True:
                    with contextlib.suppress(aiohttp.ClientError):
                        url = f"{self.proxy.url}/v1/completions"
                        async with session.post(url, json=_question(model)) as response:
                            raw = await response.read()
                            if response.status == 200 and _text_of(raw, stream=False)[0] == self.texts[model]:
                                break
                    await asyncio.sleep(0.1)

    async def reconcile(self) -> None:
        """With no client about: what warmpool says is what is so, and nothing else is there."""
        async with asyncio.timeout(2 * PATIENCE_S):
            while (differences := await self._differences()) is None or differences:
                await asyncio.sleep(0.1)
                self.last_differences = differences

    async def _differences(self) -> list[str] | None:
        """Between the status and the host; None while something moves."""
        status = await self.status()
        instances = [i for m in status["models"].values() for i in m["instances"]]
        if any(i["state"] in MOVING for i in instances) or status["leaving"] or status["coming"]:
            return None
        found = []
        if status["leases"] or any(m["queue"] for m in status["models"].values()):
            found.append(f"{status['leases']} leases, and requests that wait")
        found += [f"{name}: {status[name]}" for name in ("overdue", "written_off") if status[name]]
        running = [i["id"] for i in instances if i["state"] in RUNNING]
        if len(pids := self.engine_pids()) != len(running):
            found.append(f"{len(pids)} engines run, for {running}")
        names = {path.name for path in files_in(self.images)}
        if partial := [name for name in names if name.endswith(".partial")]:
            found.append(f"half images: {partial}")
        shared = any(m["shares_checkpoint"] for m in status["models"].values())
        for key, model in status["models"].items():
            for instance in model["instances"]:
                image = key if shared else instance["id"]
                if instance["has_checkpoint"] and image not in names:
                    found.append(f"{instance['id']} has no image {image}")
        if criu := [p.pid for p in psutil.process_iter(["name"]) if p.info["name"] == "criu" and self._is_mine(p)]:
            found.append(f"CRIU goes on: {criu}")
        return found

    def _is_mine(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return any(str(folder) in " ".join(process.cmdline()) for folder in (self.folder, self.images))
        return False

    async def close(self) -> None:
        await self.stop_asking()
        if self.proxy.process.poll() is None:
            self.proxy.process.send_signal(signal.SIGTERM)
            await self.proxy.session.close()
            await asyncio.to_thread(self.proxy.process.wait, PATIENCE_S)
        if self.podman:
            owner = Claim(self.folder / "warmpool" / "state").owner
            if left := podman("ps", "--all", "--quiet", f"--filter=label=io.warmpool.owner={owner}").split():
                podman("rm", "--force", "--time", "0", *left)


def _question(model: str, stream: bool = False) -> dict[str, Any]:
    return {"model": model, "prompt": "Hello", "max_tokens": TOKENS, "temperature": 0, "stream": stream}


def _text_of(raw: bytes, *, stream: bool) -> tuple[str, bool]:
    """The text of a whole answer, and whether an error came in it."""
    if not stream:
        return orjson.loads(raw)["choices"][0]["text"], False
    events = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    chunks = [orjson.loads(event) for event in events if event != b"[DONE]"]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk.get("choices"))
    return text, any("error" in chunk for chunk in chunks)


# --- faults ---


def some(chance: random.Random, of: list[Any]) -> Any:
    """One of them, or None where there is none."""
    return of[chance.randrange(len(of))] if of else None


async def engine_killed(it: UnderLoad) -> None:
    if pid := some(it.chance, it.engine_pids()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def engine_stopped(it: UnderLoad) -> None:
    if pid := some(it.chance, it.engine_pids()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(4.0)  # beyond response_timeout
            os.kill(pid, signal.SIGCONT)


async def criu_killed(it: UnderLoad) -> None:
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(300):
            mine = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "criu" and it._is_mine(p)]
            for process in mine:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if mine:
                return
            await asyncio.sleep(0.01)


def _asks_for(fault: str) -> Callable[[UnderLoad], Any]:
    async def ask(it: UnderLoad) -> None:
        """A request that has its engine fail so, and may get any honest answer."""
        body = {**_question(MODELS[it.chance.randrange(2)], stream=True), "vllm_xargs": {"fault": fault}}
        timeout = aiohttp.ClientTimeout(PATIENCE_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(f"{it.proxy.url}/v1/completions", json=body) as response:
                    await response.read()

    return ask


def _damages(how: Callable[[Path], None]) -> Callable[[UnderLoad], Any]:
    async def damage(it: UnderLoad) -> None:
        folders = [p for p in files_in(it.images) if p.is_dir() and "." not in p.name]
        files = [f for folder in folders for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size]
        if (file := some(it.chance, files)) is not None:
            with contextlib.suppress(OSError):  # it is gone meanwhile
                how(file)

    return damage


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _scribbled(file: Path) -> None:
    with file.open("r+b") as f:
        f.seek(file.stat().st_size // 2)
        f.write(b"\xa5" * 64)


async def manifest_garbage(it: UnderLoad) -> None:
    manifests = list(it.images.glob("*/manifest.json"))
    if (file := some(it.chance, manifests)) is not None:
        with contextlib.suppress(OSError):
            file.write_bytes(it.chance.choice((b"", b"{", b"[]", b'{"version": "one"}')))


async def disk_full(it: UnderLoad) -> None:
    """The tmpfs of the images, for a while."""
    filler = it.images / ".filler"
    free = os.statvfs(it.images)
    size = free.f_bavail * free.f_frsize
    if size > 1 << 30:
        return  # not one of the test's own
    try:
        with filler.open("wb") as f, contextlib.suppress(OSError):  # somebody else took of it meanwhile
            os.posix_fallocate(f.fileno(), 0, size)
        await asyncio.sleep(1.5)
    finally:
        filler.unlink()


async def proxy_killed(it: UnderLoad) -> None:
    await it.restart(signal.SIGKILL)


async def proxy_restarted(it: UnderLoad) -> None:
    await it.restart(signal.SIGTERM)


async def proxy_stopped(it: UnderLoad) -> None:
    it.proxy.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(2.0)
    it.proxy.process.send_signal(signal.SIGCONT)


async def configuration_garbage(it: UnderLoad) -> None:
    file = it.folder / "warmpool" / "warmpool.toml"
    good = file.read_bytes()
    for content in (b"models = 1\n", good[: len(good) // 2], good):
        file.write_bytes(content)
        it.proxy.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.3)


async def second_proxy(it: UnderLoad) -> None:
    """Another one on the same folders: it has to give way at once."""
    other = it.folder / "other"
    other.mkdir(exist_ok=True)
    pool = {**it.settings["pool"], "state_dir": str(it.folder / "warmpool" / "state")}
    another = Proxy(other, settings={**it.settings, "pool": pool})
    assert await asyncio.to_thread(another.process.wait, PATIENCE_S) != 0


async def clients_vanish(it: UnderLoad) -> None:
    for task in it._asking:
        task.cancel()
    await asyncio.gather(*it._asking, return_exceptions=True)
    it._asking = [asyncio.create_task(it._ask_on(number)) for number in range(len(it._asking))]


async def clients_stall(it: UnderLoad) -> None:
    """Many connections on which nothing, or half a request, comes."""
    host, port = it.proxy.url.removeprefix("http://").split(":")
    writers = [(await asyncio.open_connection(host, int(port)))[1] for _ in range(100)]
    for writer in writers[::2]:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
    await asyncio.sleep(0.5)
    for writer in writers:
        writer.close()


FAULTS: Final[dict[str, Callable[[UnderLoad], Any]]] = {
    "engine killed": engine_killed,
    "engine stopped": engine_stopped,
    "engine refuses": _asks_for("refuse"),
    "engine hangs": _asks_for("hang_engine"),
    "engine hangs in an answer": _asks_for("hang_mid_stream"),
    "engine dies in an answer": _asks_for("die_mid_stream"),
    "engine answers garbage": _asks_for("garbage_http"),
    "CRIU killed": criu_killed,
    "image cut": _damages(_cut),
    "image scribbled on": _damages(_scribbled),
    "image file missing": _damages(Path.unlink),
    "manifest garbage": manifest_garbage,
    "tmpfs full": disk_full,
    "warmpool killed": proxy_killed,
    "warmpool restarted": proxy_restarted,
    "warmpool stopped": proxy_stopped,
    "configuration garbage": configuration_garbage,
    "a second warmpool": second_proxy,
    "clients vanish": clients_vanish,
    "clients stall": clients_stall,
}
"""What goes wrong, by name."""
STAGES: Final = (
    "waking",
    "ready",
    "falling_asleep",
    "sleeping",
    "suspending",
    "suspended",
    "checkpointing",
    "checkpointed",
)
"""In which state of an instance."""
