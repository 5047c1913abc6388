"""The runtimes against their contract, and what is special to each."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import psutil
import pytest

from proxy.checkpoint.store import CheckpointStore
from proxy.config.model import ModelSettings
from proxy.config.runtime import ProcessRuntimeSettings
from proxy.errors import Fault, HostError, RuntimeFailure
from proxy.runtime.process.runtime import ProcessRuntime
from proxy.runtime.state_dir import Claim
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier
from tests.fakes import FakeRuntime, model_settings
from tests.forked import ForkingRuntime
from tests.runtime_contract import FACTS, Bench, RealFilesContract, RuntimeContract
from tests.support import (
    PYTHON,
    ROOT,
    HttpBench,
    engine_settings,
    files_in,
    get_json,
    processes_with,
    until_healthy,
    why_no_criu,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.runtime.base import EngineProcess


class FakeBench:
    """The fake runtime, looked at from inside."""

    def __init__(self, *, shares_images: bool) -> None:
        self.runtime = FakeRuntime(shares_images=shares_images)
        self.runtime.images.keeps_copies = True
        self.model = ModelSettings(**model_settings())

    async def healthy(self, engine: EngineProcess) -> None:
        assert await self.answers(engine)

    async def boot_id(self, engine: EngineProcess) -> str:
        return str(self.runtime.processes[engine.instance_id].boot)

    async def answers(self, engine: EngineProcess) -> bool:
        process = self.runtime.processes.get(engine.instance_id)
        return process is not None and not process.frozen

    async def crash(self, engine: EngineProcess) -> None:
        self.runtime.kill(engine.instance_id)

    def remains(self) -> list[str]:
        return [*self.runtime.processes, *self.runtime.images.there]

    async def scribble(self, engine: EngineProcess) -> None:
        self.runtime.processes[engine.instance_id].served += 1

    async def successor(self, *, changed: bool = False) -> FakeBench:
        await self.runtime.close()
        after = FakeBench(shares_images=self.runtime.shares_images)
        after.runtime.inherit(self.runtime, keep=not changed)
        await after.runtime.open()
        return after


class ProcessBench(HttpBench):
    """The process runtime with load-test engines.

    They are forked, which takes a tenth of what Python's start does, unless `forked` is False; other commands are
    started as ever.
    """

    runtime: ProcessRuntime

    def __init__(self, folder: Path, *, changed: bool = False, forked: bool = True, **settings: Any) -> None:
        self.folder = folder
        self.claim = Claim(folder / "state")
        self.store = CheckpointStore(folder / "images", 0, folder / "archive")
        kind = ForkingRuntime if forked else ProcessRuntime
        self.runtime = kind(ProcessRuntimeSettings(**settings), claim=self.claim, store=self.store)
        self.model = engine_settings("--max-model-len", "2048" if changed else "4096")

    async def crash(self, engine: EngineProcess) -> None:
        state = await get_json(f"{engine.base_url}/debug/state")
        os.kill(state["pid"], signal.SIGKILL)

    def remains(self) -> list[str]:
        return [
            *map(str, processes_with(f"{self.claim.owner}:demo")),
            *(p.name for folder in ("images", "archive") for p in files_in(self.folder / folder)),
        ]

    def another(self, *, changed: bool) -> ProcessBench:
        return ProcessBench(self.folder, changed=changed)


class TestFakeRuntime(RuntimeContract):
    """So that what the pool's tests show holds for real runtimes too."""

    @pytest.fixture(params=[False, True], ids=["an image each", "shared images"])
    async def bench(self, request: pytest.FixtureRequest) -> Bench:
        bench = FakeBench(shares_images=request.param)
        await bench.runtime.open()
        return bench


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder for state and images; tmp_path is long, which CRIU does not mind."""
    return tmp_path


class TestProcessRuntime(RealFilesContract, RuntimeContract):
    """Real processes, real CRIU where this host has it."""

    @pytest.fixture
    async def bench(self, images: Path) -> AsyncIterator[ProcessBench]:
        bench = ProcessBench(images)
        await bench.runtime.open()
        yield bench
        for engine in [*(bench.heir or bench).runtime.engines.values()]:
            await engine.remove()
        await bench.close()
        assert processes_with(f"{bench.claim.owner}:") == []

    @pytest.mark.criu
    @pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
    async def test_tiers_are_there_where_the_host_can(self, bench: ProcessBench) -> None:
        assert bench.runtime.tiers().missing == {}

    async def test_a_tree_of_processes_is_suspended_and_ended_whole(self, bench: ProcessBench) -> None:
        model = engine_settings("--processes", "3")
        engine = await bench.runtime.start("demo-1", "demo", model)
        await until_healthy(engine.base_url)
        state = await get_json(f"{engine.base_url}/debug/state")
        pids = [state["pid"], *state["children"]]
        assert len(pids) == 3
        await engine.suspend()
        assert {psutil.Process(pid).status() for pid in pids} == {psutil.STATUS_STOPPED}
        await engine.kill()
        assert not any(psutil.pid_exists(pid) for pid in pids)

    async def test_a_tree_of_processes_is_restored_with_the_same_pids(
        self, bench: ProcessBench, checkpoints: None
    ) -> None:
        model = engine_settings("--processes", "3")
        engine = await bench.runtime.start("demo-1", "demo", model)
        await until_healthy(engine.base_url)
        before = await get_json(f"{engine.base_url}/debug/state")
        await engine.checkpoint(FACTS, Stages())
        await engine.restore(Stages())
        await until_healthy(engine.base_url)
        after = await get_json(f"{engine.base_url}/debug/state")
        assert (after["pid"], after["children"]) == (before["pid"], before["children"])
        assert os.getsid(after["pid"]) == after["pid"]

    @pytest.mark.parametrize("way", ["fork", "spawn"])
    async def test_a_semaphore_is_there_at_every_restore(
        self, bench: ProcessBench, checkpoints: None, way: str
    ) -> None:
        # With "fork" it has no name at all, with "spawn" another one than that by which it was opened; a new child of
        # the engine opens it by that.
        script = """if True:
            import http.server, multiprocessing, sys
            context = multiprocessing.get_context(sys.argv[2])
            held = context.Semaphore(3)
            def taken_by_a_child():
                child = context.Process(target=held.__enter__)
                child.start()
                child.join()
                return child.exitcode == 0
            answers = {"/health": lambda: True, "/child": taken_by_a_child, "/take": lambda: held.acquire(block=False)}
            class Answer(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(200 if answers[self.path]() else 409)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
            http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
            """
        model = ModelSettings(process={"command": [PYTHON, "-c", script, "{port}", way]})
        engine = await bench.runtime.start("demo-1", "demo", model)
        await until_healthy(engine.base_url)
        await engine.checkpoint(FACTS, Stages())
        index = bench.store.path("demo-1") / "links" / "index.json"
        entries = orjson.loads(index.read_bytes()) if index.exists() else []
        kept = [Path(entry["path"]) for entry in entries]
        others = [Path(entry["path"]).with_name(name) for entry in entries for name in entry["names"]]
        assert (len(kept), len(others)) == ((1, 1) if way == "spawn" else (0, 0))
        # Python's resource tracker, a process of the engine, removes the name if it outlives the leader; when both are
        # killed, either may end first.
        for name_stays in (True, False, True):
            await engine.restore(Stages())
            await until_healthy(engine.base_url)
            async with aiohttp.ClientSession(engine.base_url) as session:
                statuses = [(await session.get(path)).status for path in ("/child", "/take", "/take", "/take")]
            assert statuses == [200, 200, 200, 409], "as it was at the checkpoint, each time"
            assert not any(path.exists() for path in kept), "a restore uses them up"
            if name_stays:
                await engine.suspend()  # the tracker too
                await engine.kill()
                assert all(path.exists() for path in others)
            else:
                await engine.kill()
                for path in others:
                    path.unlink(missing_ok=True)
        await engine.remove()
        assert not any(path.exists() for path in others)

    async def test_damage_is_told_from_what_the_host_could_not_do(self, bench: ProcessBench, checkpoints: None) -> None:
        engine = await self.start(bench)
        await engine.checkpoint(FACTS, Stages())
        await bench.runtime.images.verify(engine, whole=True)

        async def fault_of_a_restore() -> Fault:
            with pytest.raises(RuntimeFailure) as failure:
                await engine.restore(Stages())
            return failure.value.fault

        with socket.create_server(("127.0.0.1", engine.port)):
            assert await fault_of_a_restore() is Fault.HOST
        folder = bench.store.path("demo-1") / "criu"
        logs = bench.claim.folder / "logs"
        logs.rename(bench.folder / "logs-elsewhere")
        await engine.restore(Stages())
        await until_healthy(engine.base_url)
        await engine.kill()

        changed = max(folder.glob("core-*.img"))
        content = changed.read_bytes()
        changed.write_bytes(b"\0\0\0\0" + content[4:])
        assert await fault_of_a_restore() is Fault.IMAGE, "CRIU cannot read it"
        await bench.runtime.images.verify(engine, whole=False)
        with pytest.raises(RuntimeFailure, match="SHA-256 differs") as failure:
            await bench.runtime.images.verify(engine, whole=True)
        assert failure.value.fault is Fault.DAMAGE
        with pytest.raises(RuntimeFailure, match="SHA-256 differs") as failure:
            await bench.runtime.images.copy_to_archive(engine)
        assert (failure.value.fault, failure.value.alive) == (Fault.DAMAGE, True)
        assert bench.store.archived() == []

        changed.write_bytes(content[:-1])
        assert await fault_of_a_restore() is Fault.DAMAGE
        with pytest.raises(RuntimeFailure) as failure:
            await bench.runtime.images.verify(engine, whole=False)
        assert failure.value.fault is Fault.DAMAGE

        changed.write_bytes(content)
        await engine.restore(Stages())
        await until_healthy(engine.base_url)

    async def test_a_damaged_archive_is_told_from_one_that_cannot_be_opened(
        self, bench: ProcessBench, checkpoints: None
    ) -> None:
        engine = await self.start(bench)
        await engine.checkpoint(FACTS, Stages())
        await bench.runtime.images.archive(engine)
        archive = bench.store.archive_path("demo-1")
        content = archive.read_bytes()
        archive.rename(archive.with_name("elsewhere"))
        with pytest.raises(RuntimeFailure) as failure:
            await bench.runtime.images.unarchive(engine)
        assert failure.value.fault is Fault.HOST
        for damage in (content[:-100], content[:1000], b"text"):
            archive.write_bytes(damage)
            with pytest.raises(RuntimeFailure) as failure:
                await bench.runtime.images.unarchive(engine)
            assert failure.value.fault is Fault.DAMAGE
        archive.write_bytes(content)
        archive.with_name("elsewhere").unlink()
        await bench.runtime.images.unarchive(engine)
        await engine.restore(Stages())
        await until_healthy(engine.base_url)

    async def test_a_child_that_left_the_session_is_ended_too(self, bench: ProcessBench, tmp_path: Path) -> None:
        script = "setsid -f sleep 1000; exec sleep 1000 # {port}"
        model = ModelSettings(process={"command": ["sh", "-c", script]})
        engine = await bench.runtime.start("demo-1", "demo", model)
        async with asyncio.timeout(10):
            while len(processes_with(f"{bench.claim.owner}:demo-1;")) < 2:
                await asyncio.sleep(0.01)
        await engine.remove()
        assert bench.remains() == []

    async def test_an_engine_that_ignores_sigterm_is_killed(self, tmp_path: Path) -> None:
        bench = ProcessBench(tmp_path, stop_grace="100ms")
        await bench.runtime.open()
        script = "trap '' TERM; touch ready; while :; do sleep 0.1; done # {port}"
        model = ModelSettings(process={"command": ["sh", "-c", script], "cwd": str(tmp_path)})
        engine = await bench.runtime.start("demo-1", "demo", model)
        async with asyncio.timeout(10):
            while not (tmp_path / "ready").exists():
                await asyncio.sleep(0.01)
        await engine.remove()
        assert bench.remains() == []
        await bench.close()

    async def test_output_goes_to_a_log_of_its_own_that_only_the_owner_reads(self, bench: ProcessBench) -> None:
        engine = await self.start(bench)
        log = bench.claim.log_path("demo-1")
        assert f"listening on 127.0.0.1:{engine.port}" in log.read_text()
        assert log.stat().st_mode & 0o777 == 0o600
        assert (bench.folder / "state").stat().st_mode & 0o777 == 0o700

    async def test_environment_reaches_the_engine_and_no_descriptor_does(self, bench: ProcessBench) -> None:
        script = "echo secret=$SECRET; ls -l /proc/self/fd; exec sleep 1000 # {port}"
        model = ModelSettings(
            process={"command": ["sh", "-c", script], "env": {"SECRET": "x y"}},
        )
        await bench.runtime.start("demo-1", "demo", model)
        log = bench.claim.log_path("demo-1")
        async with asyncio.timeout(10):
            while "/proc/" not in log.read_text():
                await asyncio.sleep(0.01)
        text = log.read_text()
        assert "secret=x y" in text
        assert "socket:" not in text
        assert "pipe:" not in text

    async def test_a_program_that_does_not_exist_is_named(self, bench: ProcessBench) -> None:
        model = ModelSettings(process={"command": ["no-such-program", "{port}"]})
        with pytest.raises(RuntimeFailure, match="no-such-program.*models.demo.process.command"):
            await bench.runtime.start("demo-1", "demo", model)

    async def test_one_that_cannot_be_executed_says_so_in_its_log(self, bench: ProcessBench, tmp_path: Path) -> None:
        (tmp_path / "script").write_text("not a program")
        (tmp_path / "script").chmod(0o755)
        model = ModelSettings(process={"command": [str(tmp_path / "script"), "{port}"]})
        engine = await bench.runtime.start("demo-1", "demo", model)
        assert await asyncio.wait_for(engine.wait_exit(), 60) == "exit status 127"
        assert "cannot start" in bench.claim.log_path("demo-1").read_text()

    async def test_io_uring_is_refused_to_engines(self, bench: ProcessBench) -> None:
        script = (
            "import ctypes, errno; c = ctypes.CDLL(None, use_errno=True); r = c.syscall(425, 8, 0);"
            "print('io_uring', r, errno.errorcode[ctypes.get_errno()], flush=True); '{port}'"
        )
        model = ModelSettings(process={"command": [PYTHON, "-c", script]})
        engine = await bench.runtime.start("demo-1", "demo", model)
        await asyncio.wait_for(engine.wait_exit(), 60)
        assert "io_uring -1 ENOSYS" in bench.claim.log_path("demo-1").read_text()

    async def test_two_proxies_cannot_share_a_state_folder(self, bench: ProcessBench) -> None:
        with pytest.raises(HostError, match="another warmpool uses state_dir"):
            await ProcessBench(bench.folder).runtime.open()

    async def test_ports_run_out_with_an_error(self, tmp_path: Path) -> None:
        bench = ProcessBench(tmp_path, ports="18098-18098")
        await bench.runtime.open()
        engine = await self.start(bench)
        with pytest.raises(RuntimeFailure, match="no free port in 18098-18098"):
            await bench.runtime.start("demo-2", "demo", bench.model)
        await engine.remove()
        await bench.close()

    async def test_two_proxies_that_start_engines_at_once_give_them_different_ports(self, tmp_path: Path) -> None:
        benches = [ProcessBench(tmp_path / name, ports="18090-18091") for name in "ab"]
        model = ModelSettings(process={"command": ["sleep", "1000", "# {port}"]})
        for bench in benches:
            await bench.runtime.open()
        one, other = [await bench.runtime.start("demo-1", "demo", model) for bench in benches]
        assert {one.port, other.port} == {18090, 18091}
        with pytest.raises(RuntimeFailure, match="no free port in 18090-18091"):
            await benches[0].runtime.start("demo-2", "demo", model)
        await other.remove()
        third = await benches[0].runtime.start("demo-2", "demo", model)
        assert third.port == other.port, "a port is free again when its engine is gone"
        for engine in (one, third):
            await engine.remove()
        for bench in benches:
            await bench.close()

    async def test_an_engine_whose_port_another_proxy_has_meanwhile_is_started_on_another(self, tmp_path: Path) -> None:
        benches = [ProcessBench(tmp_path / name, ports="18092-18093") for name in "ab"]
        for bench in benches:
            await bench.runtime.open()
        mine = await self.start(benches[0])
        before = mine.port
        await mine.kill()
        benches[0].runtime._parts.ports.close()
        other = await benches[1].runtime.start("demo-1", "demo", benches[1].model)
        again = await self.start(benches[0])
        assert (before, other.port, again.port) == (18092, 18092, 18093)
        for bench, engine in zip(benches, (again, other), strict=True):
            await engine.remove()
            await bench.close()

    async def test_without_criu_the_tier_is_missing_and_said_why(self, tmp_path: Path) -> None:
        bench = ProcessBench(tmp_path, criu="no-criu-here")
        await bench.runtime.open()
        assert bench.runtime.tiers().offered == {Tier.SLEEPING, Tier.SUSPENDED}
        assert "no-criu-here" in bench.runtime.tiers().missing[Tier.CHECKPOINTED]
        await bench.close()

    async def test_a_criu_that_is_too_old_or_broken_is_not_used(self, tmp_path: Path) -> None:
        criu = tmp_path / "criu"
        for version, check, reason in (("3.17.1", 0, "CRIU is 3.17.1"), ("4.2.1", 1, "criu check fails: no vdso")):
            criu.write_text(
                f'#!/bin/sh\n[ "$1" = --version ] && echo "Version: {version}" && exit 0\necho no vdso; exit {check}\n'
            )
            criu.chmod(0o755)
            bench = ProcessBench(tmp_path, forked=False, criu=str(criu))
            await bench.runtime.open()
            missing = bench.runtime.tiers().missing[Tier.CHECKPOINTED]
            assert reason in missing or "root" in missing
            await bench.close()

    async def test_a_dump_that_fails_leaves_the_engine_serving(self, bench: ProcessBench, checkpoints: None) -> None:
        engine = await self.start(bench)
        boot = await bench.boot_id(engine)
        bench.runtime._parts.settings = ProcessRuntimeSettings(criu="false")
        with pytest.raises(RuntimeFailure) as failure:
            await engine.checkpoint(FACTS, Stages())
        assert failure.value.alive
        assert await bench.boot_id(engine) == boot
        await engine.suspend()
        with pytest.raises(RuntimeFailure):
            await engine.checkpoint(FACTS, Stages())
        assert not await bench.answers(engine), "suspended as before"

    async def test_an_image_that_would_not_fit_is_not_begun(self, bench: ProcessBench, checkpoints: None) -> None:
        bench.store.reserve_bytes = 1 << 60
        engine = await self.start(bench)
        with pytest.raises(RuntimeFailure, match="the image needs about") as failure:
            await engine.checkpoint(FACTS, Stages())
        assert failure.value.alive
        assert await bench.answers(engine)

    async def test_a_damaged_image_is_not_restored(self, bench: ProcessBench, checkpoints: None) -> None:
        engine, _ = await self.checkpointed(bench)
        pages = next((bench.folder / "images" / "demo-1").glob("criu/pages-*.img"))
        with pages.open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(RuntimeFailure, match="the manifest says"):
            await engine.restore(Stages())

    async def test_an_open_connection_does_not_keep_an_engine_from_being_checkpointed(
        self, bench: ProcessBench, checkpoints: None
    ) -> None:
        engine = await self.start(bench)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{engine.base_url}/health") as response:
                await response.read()
            await engine.checkpoint(FACTS, Stages())
        await engine.restore(Stages())
        await until_healthy(engine.base_url)


def test_the_orphan_reaper_ends_engines_when_the_proxy_is_killed(tmp_path: Path) -> None:
    """A proxy that ends without a chance to clean up leaves nothing running."""
    script = f"""
import asyncio, sys
from pathlib import Path
from proxy.config.model import ModelSettings
from tests.support import processes_with
from tests.runtime.test_runtimes import ProcessBench
async def main():
    bench = ProcessBench(Path({str(tmp_path)!r}), forked=False)
    await bench.runtime.open()
    engine = await bench.runtime.start("demo-1", "demo", bench.model)
    await bench.healthy(engine)
    hidden = ["sh", "-c", "exec env -i sh -c 'sleep 1000; : hidden {tmp_path}' # {{port}}"]
    await bench.runtime.start("demo-2", "demo", ModelSettings(process={{"command": hidden}}))
    while not processes_with("hidden {tmp_path}"):
        await asyncio.sleep(0.01)
    print(bench.claim.owner, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    with subprocess.Popen([PYTHON, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        owner = proxy.stdout.readline().strip()
        assert processes_with(f"{owner}:demo-1;")
        proxy.kill()
    deadline = 600
    while (processes_with(f"{owner}:") or processes_with(f"hidden {tmp_path}")) and deadline:
        deadline -= 1
        asyncio.run(asyncio.sleep(0.05))
    assert processes_with(f"{owner}:") == []
    assert processes_with(f"hidden {tmp_path}") == [], "one that hides its environment is known by its session"
