"""warmpool always ends, and nothing that it depends on takes an instance with it for good."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import pytest

from proxy.errors import CommandFailedError, HostError, RequestError
from proxy.host import processes
from proxy.pool import removal_retry
from proxy.pool.instance import MOVING, State
from proxy.runtime import bounded
from proxy.telemetry import overdue
from proxy.tiers import Tier
from tests.fakes import Rig, settle
from tests.forked import PROXIES
from tests.served import ASK, Proxy
from tests.support import PATIENCE_S, PYTHON, ROOT, engine_command, engine_model, processes_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


def _reapers(proxy: Proxy) -> list[int]:
    """The orphan reapers of a warmpool."""
    return sorted({*processes.tree(proxy.process.pid)} & {*processes_with("proxy.runtime.process.end_orphans")})


async def _another_reaper(proxy: Proxy, before: list[int]) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        while not (now := _reapers(proxy)) or now == before:
            await asyncio.sleep(0.02)
    return now


async def test_an_orphan_reaper_that_is_killed_is_replaced_and_harms_no_instance(tmp_path: Path) -> None:
    proxy = await Proxy(tmp_path, settings={"models": {"demo": engine_model()}}).listening()
    try:
        await proxy.ask()
        first = _reapers(proxy)
        assert len(first) == 1
        os.kill(first[0], signal.SIGKILL)
        # At once, with nobody at the other end of the pipe.
        async with proxy.session.post("/admin/models/demo/stop", json={}) as answer:
            assert answer.status == 200, await answer.text()
        assert await proxy.instance() is None
        assert (await proxy.ask())[0] == "stopped"
        second = await _another_reaper(proxy, first)
        os.kill(second[0], signal.SIGKILL)
        # The one after it knows of an engine that it was not told of.
        await _another_reaper(proxy, second)
        proxy.process.kill()
        assert await proxy.ended() == -signal.SIGKILL, "and nothing is left"
    finally:
        proxy.process.kill()


# --- a runtime that never answers ---

IDLE = {"idle": {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s", "archived": "40s"}}


@pytest.fixture
async def rig_of() -> AsyncIterator[Callable[..., Rig]]:
    """Makes rigs whose runtimes answer in the end, so that nothing is left of a test."""
    rigs: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        rigs.append(Rig(*args, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.runtime.answers.set()
    await settle()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits that a test can wait for."""
    monkeypatch.setattr(overdue, "GIVE_UP_S", 0.02)
    for name in ("_OPEN_S", "_RECOVER_S", "_CLOSE_S", "_END_S", "_IMAGE_S", "_ASK_S"):
        monkeypatch.setattr(bounded, name, 0.05)


async def _wake(rig: Rig) -> None:
    async with await rig.pool.lease("demo"):
        pass


async def _starting(rig: Rig) -> None:
    await _ask_in_vain(rig)


async def _resuming(rig: Rig) -> None:
    await _down(rig, 20)
    await _ask_in_vain(rig)


async def _restoring(rig: Rig) -> None:
    await _down(rig, 20, 30)
    await _ask_in_vain(rig)


async def _suspending(rig: Rig) -> None:
    await _down(rig, 20)


async def _checkpointing(rig: Rig) -> None:
    await _down(rig, 20, 30)


async def _archiving(rig: Rig) -> None:
    await _down(rig, 20, 30, 40)


async def _stopping(rig: Rig) -> None:
    await _wake(rig)
    rig.pool.step_down("demo", Tier.STOPPED)


async def _broken(rig: Rig) -> None:
    await _down(rig, 20, 30)
    await _wake(rig)
    rig.runtime.kill("demo-1")


async def _down(rig: Rig, *times_s: float) -> None:
    """Wake an instance and let it be idle for so long."""
    await _wake(rig)
    now = rig.clock.now
    for at_s in times_s:
        rig.clock.now = now + at_s
        rig.pool.tick()
        await _at_rest(rig)


async def _ask_in_vain(rig: Rig) -> None:
    with pytest.raises(RequestError, match="could not be started"):
        await _wake(rig)


async def _at_rest(rig: Rig) -> None:
    """Return when no instance is on its way anywhere."""
    moving = {state.value for state in MOVING}
    async with asyncio.timeout(PATIENCE_S):
        while moving & {*rig.states().values()}:
            await asyncio.sleep(0.005)


OF_SETTINGS = {
    "start": "start_timeout",
    "resume": "wake_timeout",
    "restore": "wake_timeout",
    "suspend": "wake_timeout",
    "checkpoint": "checkpoint_timeout",
    "archive_image": "wake_timeout",
}
"""What bounds an operation, where a model's settings do."""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("operation", "act"),
    [
        ("start", _starting),
        ("resume", _resuming),
        ("restore", _restoring),
        ("suspend", _suspending),
        ("checkpoint", _checkpointing),
        ("archive_image", _archiving),
        ("remove", _stopping),
        ("kill", _broken),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_runtime_that_never_answers_keeps_no_instance_no_request_and_not_the_end(
    rig_of: Callable[..., Rig], operation: str, act: Callable[[Rig], Awaitable[None]]
) -> None:
    # Only what is to hang has a short time: the rest may be slow on a busy machine.
    limits = {OF_SETTINGS[operation]: "500ms"} if operation in OF_SETTINGS else {}
    rig = rig_of({"demo": {**IDLE, **limits}})
    await rig.pool.open()
    rig.runtime.hanging = {operation}
    async with asyncio.timeout(PATIENCE_S):
        await act(rig)
        while not rig.pool.status()["overdue"]:
            await asyncio.sleep(0.005)
        await _at_rest(rig)
        assert [o["operation"] for o in rig.pool.status()["overdue"]] == [operation]
        assert f'warmpool_hanging_operations{{operation="{operation}"}} 1.0' in (await rig.metrics.scrape()).decode()
        # What hangs is one instance; the next one serves.
        rig.runtime.hanging = set()
        rig.clock.now += 1000
        await _wake(rig)
        assert State.READY.value in rig.states().values()
        assert [w["id"] for w in rig.pool.status()["written_off"]] == ["demo-1"]
        await rig.pool.close(1.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("operation", ["open", "recover"])
async def test_a_runtime_that_never_answers_at_the_start_is_an_error_of_the_host(
    rig_of: Callable[..., Rig], operation: str
) -> None:
    rig = rig_of()
    rig.runtime.hanging = {operation, "close"}
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(HostError, match="process"):
            await rig.pool.open()
        await rig.pool.close(1.0)


@pytest.mark.usefixtures("impatient")
async def test_an_instance_that_was_written_off_is_removed_as_soon_as_that_works(
    rig_of: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_retry, "_RETRY_S", (0.01,))
    rig = rig_of()
    await rig.pool.open()
    await _wake(rig)
    rig.runtime.hanging = {"remove"}
    (command,) = rig.pool.step_down("demo", Tier.STOPPED)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(CommandFailedError, match="written off"):
            await command.carried_out()
        assert "demo-1" in rig.runtime.processes
        rig.runtime.hanging = set()
        rig.runtime.answers.set()
        while rig.pool.status()["written_off"]:
            await asyncio.sleep(0.005)
    assert "demo-1" not in rig.runtime.processes
    assert rig.pool.status()["overdue"] == []
    await rig.pool.close()


@pytest.mark.parametrize("operation", ["suspend", "kill", "remove", "clone", "wake_up", "restore", "start"])
async def test_no_exception_leaves_an_instance_on_its_way(rig_of: Callable[..., Rig], operation: str) -> None:
    rig = rig_of({"demo": {**IDLE, "max_instances": 2}}, shares_images=True)
    await rig.pool.open()

    async def fail_once(error: Exception) -> None:
        rig.runtime.failures[operation] = [error]
        for _ in range(3):
            with contextlib.suppress(RequestError):
                await _down(rig, 20, 30, 40)
            rig.clock.now += 1000
        with contextlib.suppress(KeyError):
            rig.runtime.kill("demo-1")
        for command in rig.pool.step_down("demo", Tier.STOPPED, discard=True):
            with contextlib.suppress(CommandFailedError):
                await command.carried_out()
        await _at_rest(rig)
        assert not rig.runtime.failures.pop(operation), "it came to that"

    async with asyncio.timeout(PATIENCE_S):
        await fail_once(OSError("a disk that fails"))
        await fail_once(ValueError("a mistake in warmpool"))
        await fail_once(BrokenPipeError("nobody there"))
        await _wake(rig)
    await rig.pool.close()


# --- an operator who has waited long enough ---


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "gate", ["start", "health", "suspend", "checkpoint", "restore", "archive_image", "remove", None]
)
async def test_force_ends_an_instance_in_every_state(rig_of: Callable[..., Rig], gate: str | None) -> None:
    rig = rig_of({"demo": IDLE})
    await rig.pool.open()
    if gate in ("start", "health"):
        rig.runtime.gates[gate] = asyncio.Event()
        waiting = [asyncio.create_task(_wake(rig))]
    else:
        waiting = []
        await _down(rig, *{"restore": (20, 30)}.get(gate or "", ()))
    if gate is not None:
        rig.runtime.gates[gate] = asyncio.Event()
    if gate == "restore":
        waiting = [asyncio.create_task(_wake(rig))]
    elif gate == "remove":
        rig.pool.step_down("demo", Tier.STOPPED)
    elif gate in ("suspend", "checkpoint", "archive_image"):
        for _ in range(3):
            await rig.pass_time(20)
    while gate is not None and not rig.runtime.calls[gate]:
        await asyncio.sleep(0.005)
    lease = await rig.pool.lease("demo") if gate is None else None
    (command,) = rig.pool.force_stop("demo")
    for task in waiting:
        task.cancel()
    rig.runtime.gates.pop("remove", None)
    async with asyncio.timeout(PATIENCE_S):
        await command.carried_out()
    if lease is not None:
        lease.release()
    assert rig.states() == {}
    assert rig.runtime.processes == {}
    rig.runtime.gates.clear()
    await _wake(rig)
    await rig.pool.close()


async def test_force_cuts_a_stream_off_and_the_next_request_gets_another_engine(tmp_path: Path) -> None:
    engine = engine_model("--tokens-per-second", "10")
    proxy = await Proxy(tmp_path, settings={"models": {"demo": engine}}).listening()
    try:
        body = {**ASK, "stream": True, "max_tokens": 1000, "ignore_eos": True}
        async with proxy.session.post("/v1/completions", json=body) as stream:
            await stream.content.readany()
            async with proxy.session.post("/admin/models/demo/stop", json={}) as answer:
                assert answer.status == 409
            ended = await asyncio.to_thread(PROXIES.run, ["stop", "demo", "--force", "--url", proxy.url])
            assert ended.stdout == "demo-1: ready -> stopped\n", ended.stderr
            with pytest.raises(aiohttp.ClientError):
                await stream.read()
        assert await proxy.instance() is None
        assert (await proxy.ask())[0] == "stopped"
        proxy.process.terminate()
        assert await proxy.ended() == 0
    finally:
        proxy.process.kill()


# --- signals ---


class Deaf:
    """A socket of podman's where everything is accepted and nothing answered."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "podman.sock"
        self.asked = asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._hear, self.path)
        return self

    async def _hear(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.asked.set()

    async def __aexit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.close()
        self._server.close()


async def test_sigterm_ends_a_start_that_waits_for_a_podman_that_does_not_answer(tmp_path: Path) -> None:
    async with Deaf(tmp_path) as deaf, asyncio.timeout(PATIENCE_S):
        settings = {
            "models": {"demo": {"podman": {"image": "localhost/none:1", "command": ["x", "{port}"]}}},
            "runtime": {"podman": {"socket": str(deaf.path)}},
        }
        proxy = Proxy(tmp_path / "w", settings=settings)
        try:
            await deaf.asked.wait()
            proxy.process.terminate()
            assert await asyncio.to_thread(proxy.process.wait) in (0, 1), proxy.log.read_text()
            assert "stopping before the start has ended" in proxy.log.read_text()
        finally:
            proxy.process.kill()


async def test_a_second_signal_ends_at_once_what_would_have_gone_on_for_long(tmp_path: Path) -> None:
    stubborn = ["sh", "-c", "trap '' TERM; \"$@\" & wait", "sh", *engine_command("--tokens-per-second", "10")]
    settings = {
        "models": {"demo": engine_model(process={"command": stubborn, "cwd": str(ROOT)})},
        "server": {"drain_timeout": "1h"},
        "runtime": {"process": {"stop_grace": "1h"}},
    }
    proxy = await Proxy(tmp_path, settings=settings).listening()
    try:
        body = {**ASK, "stream": True, "max_tokens": 1000, "ignore_eos": True}
        async with asyncio.timeout(PATIENCE_S), proxy.session.post("/v1/completions", json=body) as stream:
            await stream.content.readany()
            proxy.process.terminate()
            while "stopping: running requests" not in proxy.log.read_text():
                await asyncio.sleep(0.02)
            assert proxy.process.poll() is None
            proxy.process.terminate()
            with contextlib.suppress(aiohttp.ClientError):
                await stream.read()
            assert await proxy.ended() in (0, 1), "and nothing is left"
    finally:
        proxy.process.kill()


# --- the last resort ---


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    program = """
import threading
from proxy.telemetry import logs
from proxy.server.forced_exit import ForcedExit
logs.to_stderr("text", "info")
threading.Thread(target=threading.Event().wait).start()
ForcedExit().within(0.1)
"""
    ended = subprocess.run([PYTHON, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 1
    assert "ended by force" in ended.stderr
