"""The podman runtime: the contract, and what is special to containers. Real podman, runc or crun, CRIU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import subprocess
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from loadtest.image import python
from proxy.checkpoint.archive import SUFFIX
from proxy.checkpoint.errors import StoreError
from proxy.checkpoint.files import MANIFEST
from proxy.config.model import ModelSettings
from proxy.errors import Fault, HostError, RuntimeFailure
from proxy.runtime import namespaces
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier
from tests.podman_bench import (
    PodmanBench,
    engine_image,
    engine_table,
    model_of,
    podman,
    why_no_podman,
)
from tests.runtime_contract import FACTS, RealFilesContract, RuntimeContract
from tests.support import PATIENCE_S, files_in

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.runtime.base import EngineProcess
    from tests.podman_bench import Tag

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


def shell(script: str, **podman_keys: Any) -> ModelSettings:
    """A container that runs Python code instead of an engine."""
    table = engine_table(**podman_keys)
    return ModelSettings(podman={**table, "entrypoint": [str(python()), "-c"], "command": [script + "\n# {port}"]})


def held_at(point: str, folder: Path) -> tuple[ModelSettings, Path, Path]:
    """A model that CRIU waits for at this point while the last file is there; it makes the other one when it waits."""
    script, reached, hang = (folder / name for name in ("script", "reached", "hang"))
    script.write_text(f"#!/bin/sh\ntouch {reached}\nwhile [ -e {hang} ]; do sleep 0.05; done\n")
    script.chmod(0o755)
    return model_of(criu={"action_scripts": {point: str(script)}}), reached, hang


async def until_there(file: Path) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not file.exists():
            await asyncio.sleep(0.01)


def service_of(bench: PodmanBench) -> asyncio.subprocess.Process | None:
    """podman's service, if the runtime runs it."""
    service = bench.runtime.host.podman.service
    return None if service is None else service.process


BINDS_AS_CUDA_DOES = """
import os, signal, socket
name = f"warmpool-test-{os.stat('/proc/self/ns/pid').st_ino}-{os.getpid()}"
held = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
held.bind(chr(0) + name)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
signal.sigwait([signal.SIGTERM])
"""
"""CUDA names its sockets after the number of the pid namespace and its pid there."""


async def abstract_name(bench: PodmanBench, engine: EngineProcess) -> str:
    """The name that such a program has bound."""
    pid = bench.pid_of(engine.instance_id)
    assert pid is not None
    async with asyncio.timeout(PATIENCE_S):
        while not (names := namespaces.abstract_names([pid])):
            await asyncio.sleep(0.01)
    return names[0].removeprefix("@")


def image_of(bench: PodmanBench, engine: EngineProcess) -> str:
    """The id of the container image that its container was made from."""
    return podman("inspect", "--format", "{{.Image}}", bench.container(engine))


async def output_of(bench: PodmanBench, model: ModelSettings) -> str:
    """What such a container prints before it ends."""
    engine = await bench.runtime.start("demo-1", "demo", model)
    await asyncio.wait_for(engine.wait_exit(), PATIENCE_S)
    # TIME STREAM P|F TEXT; "P": the line goes on in the next entry (k8s-file).
    pieces = [line.split(" ", 3) for line in bench.claim.log_path("demo-1").read_text().splitlines()]
    return "".join(text + "\n" * (whole == "F") for _, _, whole, text in pieces)


class TestPodmanRuntime(RealFilesContract, RuntimeContract):
    """The contract, and what only containers have."""

    async def test_every_tier_is_there_where_criu_works(self, bench: PodmanBench) -> None:
        assert bench.runtime.tiers().missing == {}
        assert Tier.ARCHIVED in bench.runtime.tiers().offered

    # --- one golden checkpoint, several containers ---

    async def test_three_clones_are_restored_at_once_from_the_same_pages(
        self, bench: PodmanBench, images: Path
    ) -> None:
        golden, boot = await self.checkpointed(bench)
        size = sum(p.stat().st_blocks for p in images.rglob("*"))
        clones = [await bench.runtime.clone(f"demo-{n}", "demo", bench.model) for n in (2, 3, 4)]
        await asyncio.gather(*(clone.restore(Stages()) for clone in clones))
        for clone in clones:
            await bench.healthy(clone)
            assert await bench.boot_id(clone) == boot
        assert sum(p.stat().st_blocks for p in images.rglob("*")) < size * 1.1, "clones have no pages of their own"
        for clone in clones:
            await bench.scribble(clone)
        await golden.remove()

    async def test_an_exported_image_is_restored_where_it_was_imported(
        self, bench: PodmanBench, tmp_path: Path
    ) -> None:
        engine, boot = await self.checkpointed(bench)
        for compression, suffix in SUFFIX.items():
            await bench.store.export("demo", tmp_path / f"golden{suffix}", compression)
        for suffix in SUFFIX.values():
            await bench.runtime.images.discard(engine)
            with pytest.raises(RuntimeFailure):
                await engine.restore(Stages())
            await engine.remove()
            await bench.store.import_(tmp_path / f"golden{suffix}")
            engine = await bench.runtime.clone("demo-1", "demo", bench.model)
            await self.comes_back(bench, engine, boot)
            await engine.kill()

    # --- the name of the container image means another one ---

    async def test_an_image_says_what_its_engine_was_started_from(self, bench: PodmanBench, tag: Tag) -> None:
        bench.model = model_of(image=tag.name)
        engine = await self.start(bench)
        tag.point_to(1)
        assert "was started from" in (await bench.runtime.outdated({"demo": bench.model}))["demo"].reason
        await engine.checkpoint(FACTS, Stages())
        assert bench.store.load("demo").facts["container image"] == tag.ids[0]
        assert (await bench.runtime.outdated({"demo": bench.model}))["demo"].usable
        tag.point_to(0)
        assert await bench.runtime.outdated({"demo": bench.model}) == {}

    async def test_memory_is_restored_over_the_files_it_was_taken_with(self, bench: PodmanBench, tag: Tag) -> None:
        bench.model = model_of(image=tag.name)
        golden, boot = await self.checkpointed(bench)
        tag.point_to(1)
        podman("rm", bench.container(golden))  # pruned
        await golden.restore(Stages())
        clone = await bench.runtime.clone("demo-2", "demo", bench.model)
        await clone.restore(Stages())
        for engine in (golden, clone):
            await bench.healthy(engine)
            assert await bench.boot_id(engine) == boot
            assert image_of(bench, engine) == tag.ids[0]
        started = await bench.runtime.start("demo-3", "demo", bench.model)
        assert image_of(bench, started) == tag.ids[1], "a new engine is what the name means now"
        await started.checkpoint(FACTS, Stages())
        await golden.restore(Stages())
        assert image_of(bench, golden) == tag.ids[1], "its container is made for the image there is now"

    async def test_memory_whose_files_are_gone_is_not_restored_over_others(self, bench: PodmanBench, tag: Tag) -> None:
        bench.model = model_of(image=tag.name)
        golden, _ = await self.checkpointed(bench)
        tag.point_to(1)
        podman("rm", bench.container(golden))
        podman("rmi", tag.ids[0])
        with pytest.raises(RuntimeFailure, match="its checkpoint was taken from that container image, which is gone"):
            await golden.restore(Stages())
        outdated = await bench.runtime.outdated({"demo": bench.model})
        assert not outdated["demo"].usable

    async def test_a_successor_adopts_what_is_outdated_unless_there_is_something_newer(
        self, bench: PodmanBench, tag: Tag
    ) -> None:
        bench.model = model_of(image=tag.name)
        await self.start(bench)
        tag.point_to(1)
        after = await bench.successor()
        after.model = bench.model
        recovered = await after.runtime.recover({"demo": after.model})
        assert [f.tier for f in recovered.instances] == [Tier.READY]
        newer = await after.runtime.start("demo-2", "demo", after.model)
        await after.healthy(newer)
        await newer.checkpoint(FACTS, Stages())
        # As one that was being made ready to take over.
        await after.runtime.start("demo-3", "demo", after.model)
        last = await after.successor()
        last.model = bench.model
        recovered = await last.runtime.recover({"demo": last.model})
        assert [(f.engine.instance_id, f.tier) for f in recovered.instances] == [("demo-2", Tier.CHECKPOINTED)]

    # --- what goes wrong ---

    async def test_a_dump_that_fails_leaves_the_container_serving(self, bench: PodmanBench, tmp_path: Path) -> None:
        script = tmp_path / "refuse"
        script.write_text("#!/bin/sh\nexit 7\n")
        script.chmod(0o755)
        bench.model = model_of(criu={"action_scripts": {"pre-dump": str(script)}})
        engine = await self.start(bench)
        boot = await bench.boot_id(engine)
        for suspended in (False, True):
            if suspended:
                await engine.suspend()
            with pytest.raises(RuntimeFailure, match="CRIU") as failure:
                await engine.checkpoint(FACTS, Stages())
            assert failure.value.alive
            assert await bench.answers(engine) is not suspended
        await engine.resume()
        assert await bench.boot_id(engine) == boot
        assert files_in(bench.images) == []

    async def test_an_image_that_would_not_fit_is_not_begun(self, bench: PodmanBench) -> None:
        engine, _ = await self.checkpointed(bench)
        await engine.restore(Stages())
        bench.store.reserve_bytes = 1 << 60
        with pytest.raises(RuntimeFailure, match="the image needs about") as failure:
            await engine.checkpoint(FACTS, Stages())
        assert failure.value.alive
        assert await bench.answers(engine)
        await bench.store.verify("demo")

    async def test_a_tmpfs_that_fills_up_meanwhile_harms_neither_the_engine_nor_the_image(
        self, bench: PodmanBench, tmp_path: Path
    ) -> None:
        small = tmp_path / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(small)], check=True)
        try:
            bench.store.root = small
            engine, boot = await self.checkpointed(bench)
            await bench.store.verify("demo")
            await engine.restore(Stages())
            await bench.healthy(engine)
            free = os.statvfs(small)
            (small / ".other").write_bytes(bytes(free.f_bavail * free.f_frsize - (4 << 20)))
            bench.store.reserve_bytes = -(1 << 40)  # as if the space went after it was looked at
            with pytest.raises(RuntimeFailure, match="checkpoint: ") as failure:
                await engine.checkpoint(FACTS, Stages())
            assert failure.value.alive
            assert await bench.boot_id(engine) == boot
            (small / ".other").unlink()
            await bench.store.verify("demo")
            await self.comes_back(bench, engine, boot)
            await engine.remove()
        finally:
            subprocess.run(["umount", "--lazy", str(small)], check=True)

    async def test_a_corrupted_image_file_is_refused(self, bench: PodmanBench) -> None:
        engine, _ = await self.checkpointed(bench)
        file = next(bench.store.path("demo").glob("criu/core-*.img"))
        content = file.read_bytes()
        for damaged, fault in (
            (os.urandom(len(content)), Fault.IMAGE), (content[:100], Fault.DAMAGE), (None, Fault.DAMAGE)
        ):  # fmt: skip
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            with pytest.raises(RuntimeFailure, match="restore") as failure:
                await engine.restore(Stages())
            assert failure.value.fault is fault
            with pytest.raises(StoreError):
                await bench.store.verify("demo")
            with pytest.raises(RuntimeFailure) as failure:
                await bench.runtime.images.verify(engine, whole=True)
            assert failure.value.fault is Fault.DAMAGE
            await engine.kill()
        assert await self.start(bench) == engine

    async def test_what_a_cleaner_removed_from_the_state_folder_is_made_again(self, bench: PodmanBench) -> None:
        engine, boot = await self.checkpointed(bench)
        for gone in ("podman", "logs"):
            shutil.rmtree(bench.folder / "state" / gone)
            await self.comes_back(bench, engine, boot)
            shutil.rmtree(bench.folder / "state" / gone)
            await bench.runtime.images.discard(engine)
            await engine.checkpoint(FACTS, Stages())

    async def test_a_container_that_somebody_removed_is_made_again(self, bench: PodmanBench) -> None:
        engine, boot = await self.checkpointed(bench)
        podman("rm", "--force", bench.container(engine))
        await self.comes_back(bench, engine, boot)

    async def test_a_running_container_that_somebody_removed_ends_and_starts_again(self, bench: PodmanBench) -> None:
        engine = await self.start(bench)
        ended = asyncio.create_task(engine.wait_exit())
        await asyncio.sleep(0)
        podman("rm", "--force", "--time", "0", bench.container(engine))
        await asyncio.wait_for(ended, PATIENCE_S)
        await engine.kill()
        assert await self.start(bench) == engine

    async def test_podmans_service_may_be_killed_at_any_time(self, bench: PodmanBench) -> None:
        engine, boot = await self.checkpointed(bench)
        service = service_of(bench)
        if service is None:
            pytest.skip(reason="podman's service is the system's here")
        service.kill()
        await self.comes_back(bench, engine, boot)
        await engine.suspend()
        killed = service_of(bench)
        assert killed is not None
        killed.kill()
        await engine.resume()
        assert await bench.boot_id(engine) == boot

    async def test_podmans_service_killed_in_the_middle_of_a_dump_leaves_something_usable(
        self, bench: PodmanBench, tmp_path: Path
    ) -> None:
        bench.model, reached, hang = held_at("pre-dump", tmp_path)
        hang.touch()
        engine = await self.start(bench)
        service = service_of(bench)
        if service is None:
            pytest.skip(reason="podman's service is the system's here")
        dumping = asyncio.create_task(engine.checkpoint(FACTS, Stages()))
        await until_there(reached)
        service.kill()
        with pytest.raises(RuntimeFailure):
            await dumping
        hang.unlink()
        await engine.kill()
        assert await self.start(bench) == engine
        assert files_in(bench.images) == []

    async def test_podmans_service_killed_in_the_middle_of_a_restore_costs_a_second_try(
        self, bench: PodmanBench, tmp_path: Path
    ) -> None:
        bench.model, reached, hang = held_at("pre-restore", tmp_path)
        engine, boot = await self.checkpointed(bench)
        service = service_of(bench)
        if service is None:
            pytest.skip(reason="podman's service is the system's here")
        hang.touch()
        restoring = asyncio.create_task(engine.restore(Stages()))
        await until_there(reached)
        service.kill()
        await service.wait()
        hang.unlink()
        await restoring
        await bench.healthy(engine)
        assert await bench.boot_id(engine) == boot

    async def test_a_restore_that_hangs_can_be_given_up(self, bench: PodmanBench, tmp_path: Path) -> None:
        bench.model, reached, hang = held_at("pre-restore", tmp_path)
        engine, boot = await self.checkpointed(bench)
        hang.touch()
        restoring = asyncio.create_task(engine.restore(Stages()))
        await until_there(reached)
        restoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await restoring
        await engine.kill()
        hang.unlink()
        await self.comes_back(bench, engine, boot)

    async def test_the_end_of_an_engine_is_told_with_its_status(self, bench: PodmanBench) -> None:
        engine = await bench.runtime.start("demo-1", "demo", shell("raise SystemExit(3)"))
        assert await asyncio.wait_for(engine.wait_exit(), PATIENCE_S) == "exit status 3"

    async def test_an_image_that_is_not_there_is_named_with_the_way_to_get_it(self, bench: PodmanBench) -> None:
        model = model_of(image="localhost/no-such-image")
        with pytest.raises(RuntimeFailure, match="podman pull localhost/no-such-image.*models.demo.podman.image"):
            await bench.runtime.start("demo-1", "demo", model)
        assert bench.remains() == []

    # --- what a predecessor left ---

    async def test_a_successor_adopts_a_running_container(self, bench: PodmanBench) -> None:
        engine = await self.start(bench)
        boot = await bench.boot_id(engine)
        assert bench.runtime.leaves
        after = await bench.successor()
        recovered = await after.runtime.recover({"demo": after.model})
        found = [(f.engine.instance_id, f.tier, f.restored) for f in recovered.instances]
        assert found == [("demo-1", Tier.READY, False)]
        engine = after.runtime.engine("demo-1", "demo")
        await engine.checkpoint(FACTS, Stages())
        await self.comes_back(after, engine, boot)

    async def test_a_successor_lets_a_suspended_container_go_on(self, bench: PodmanBench) -> None:
        engine, _ = await self.checkpointed(bench)
        await engine.restore(Stages())
        await engine.suspend()
        after = await bench.successor()
        recovered = await after.runtime.recover({"demo": after.model})
        assert [(f.tier, f.restored) for f in recovered.instances] == [(Tier.READY, True)]
        await after.healthy(engine)

    async def test_orphans_of_another_configuration_are_removed_and_other_peoples_containers_are_not(
        self, bench: PodmanBench, images: Path, tmp_path: Path
    ) -> None:
        await self.start(bench)
        neighbour = PodmanBench(tmp_path / "other", tmp_path / "other-images")
        await neighbour.runtime.open()
        theirs = await self.start(neighbour)
        after = await bench.successor(changed=True)
        recovered = await after.runtime.recover({"demo": after.model})
        assert list(recovered.instances) == []
        assert after.remains() == []
        assert await neighbour.answers(theirs)
        await neighbour.clear()

    async def test_a_container_that_ended_and_has_no_image_is_removed(self, bench: PodmanBench) -> None:
        engine = await self.start(bench)
        await engine.kill()
        after = await bench.successor()
        assert list((await after.runtime.recover({"demo": after.model})).instances) == []
        assert after.remains() == []

    async def test_an_image_taken_elsewhere_is_refused_with_the_reason(
        self, bench: PodmanBench, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine, _ = await self.checkpointed(bench)
        manifest = bench.store.path("demo") / MANIFEST
        written = orjson.loads(manifest.read_bytes())
        assert {"kernel", "CRIU", "podman", "container image"} <= written["facts"].keys()
        after = bench
        for fact, value in written["facts"].items():
            here = "missing" if fact == "container image" else value
            manifest.write_bytes(orjson.dumps({**written, "facts": {**written["facts"], fact: "1.2.3"}}))
            after = await after.successor()
            recovered = await after.runtime.recover({"demo": after.model})
            assert (list(recovered.instances), dict(recovered.images)) == ([], {})
            assert f"checkpoint demo is refused: {fact} was 1.2.3, is {here} here" in caplog.text
        assert (await self.start(after)).instance_id == engine.instance_id

    # --- connections ---

    async def test_a_clients_open_connection_is_closed_by_a_checkpoint(self, bench: PodmanBench) -> None:
        engine = await self.start(bench)
        with socket.create_connection((engine.host, engine.port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            await engine.checkpoint(FACTS, Stages())
            await engine.restore(Stages())
            await bench.healthy(engine)
            client.settimeout(5)
            with contextlib.suppress(ConnectionError):
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(1000) == b""

    async def test_with_neither_tcp_option_an_open_connection_fails_the_dump_and_harms_nothing(
        self, bench: PodmanBench
    ) -> None:
        bench.model = model_of(criu={"tcp_close": False})
        engine = await self.start(bench)
        boot = await bench.boot_id(engine)
        with socket.create_connection((engine.host, engine.port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            with pytest.raises(RuntimeFailure, match="CRIU") as failure:
                await engine.checkpoint(FACTS, Stages())
            assert failure.value.alive
        assert await bench.boot_id(engine) == boot

    async def test_with_tcp_established_the_engine_keeps_its_connections(self, bench: PodmanBench) -> None:
        bench.model = model_of(criu={"tcp_established": True, "tcp_close": False})
        engine = await self.start(bench)
        boot = await bench.boot_id(engine)
        with socket.create_connection((engine.host, engine.port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            await engine.checkpoint(FACTS, Stages())
            await self.comes_back(bench, engine, boot)
            client.settimeout(10)
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200")

    # --- what a container is given ---

    async def test_settings_reach_the_container(self, bench: PodmanBench, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("from the host")
        script = (
            "import os, resource;"
            "print(os.environ['SECRET'], open('/mnt/in/file').read(), resource.getrlimit(resource.RLIMIT_NOFILE));"
            "s = os.statvfs('/dev/shm'); print('shm', s.f_blocks * s.f_frsize);"
            "print('null', os.path.exists('/dev/mine'));"
            "\ntry: open('/mnt/in/new', 'w')\nexcept OSError as e: print('read-only', e.errno)\n"
            "open('/mnt/out/new', 'w').write('x')"
        )
        (tmp_path / "out").mkdir()
        model = shell(
            script,
            env={"SECRET": "x y"},
            volumes=[
                {"source": str(tmp_path), "target": "/mnt/in"},
                {"source": str(tmp_path / "out"), "target": "/mnt/out", "writable": True},
            ],
            devices=["/dev/null:/dev/mine"],
            shm_size="32MiB",
            ulimits={"nofile": "512:1024"},
        )
        text = await output_of(bench, model)
        assert "x y from the host (512, 1024)" in text
        assert f"shm {32 << 20}" in text
        assert "null True" in text
        assert "read-only 30" in text
        assert (tmp_path / "out" / "new").exists()
        engine = bench.runtime.engine("demo-1", "demo")
        shown = orjson.loads(podman("inspect", bench.container(engine)))[0]
        assert shown["HostConfig"]["Privileged"] is False
        assert shown["Config"]["Labels"]["io.warmpool.model"] == "demo"
        assert stat.S_IMODE((bench.folder / "state").stat().st_mode) == 0o700, "logs are below"

    @pytest.mark.parametrize("privileged", [False, True])
    async def test_io_uring_is_refused_to_engines(self, bench: PodmanBench, privileged: bool) -> None:
        script = (
            "import ctypes, errno; c = ctypes.CDLL(None, use_errno=True); r = c.syscall(425, 8, 0);"
            "print('io_uring', r, errno.errorcode[ctypes.get_errno()])"
        )
        assert "io_uring -1 ENOSYS" in await output_of(bench, shell(script, privileged=privileged))

    async def test_a_privileged_engine_can_be_checkpointed(self, bench: PodmanBench) -> None:
        bench.model = model_of(privileged=True, security_options=["label=disable", "apparmor=unconfined"])
        engine, boot = await self.checkpointed(bench)
        await self.comes_back(bench, engine, boot)

    async def test_a_model_on_the_hosts_network_listens_on_loopback(self, bench: PodmanBench) -> None:
        bench.model = model_of(network="host")
        engine, boot = await self.checkpointed(bench)
        await self.comes_back(bench, engine, boot)
        assert f"listening on 127.0.0.1:{engine.port}" in bench.claim.log_path("demo-1").read_text()

    async def test_an_engine_is_published_nowhere(self, bench: PodmanBench) -> None:
        engine = await self.start(bench)
        shown = orjson.loads(podman("inspect", bench.container(engine)))[0]["NetworkSettings"]
        assert not any((shown["Ports"] or {}).values())
        assert engine.host in {network["IPAddress"] for network in shown["Networks"].values()}

    async def test_two_proxies_that_start_engines_on_it_at_once_give_them_different_ports(
        self, bench: PodmanBench, tmp_path: Path
    ) -> None:
        other = PodmanBench(tmp_path / "other", tmp_path / "images")
        await other.runtime.open()
        model = shell("import time; time.sleep(1000)", network="host")
        handles = await asyncio.gather(*(b.runtime.start("demo-1", "demo", model) for b in (bench, other)))
        assert handles[0].port != handles[1].port
        for engine in handles:
            await engine.kill()  # it does not end politely
        await other.clear()

    @pytest.mark.parametrize("restarted", [False, True])
    async def test_engines_on_it_do_not_take_each_others_abstract_sockets(
        self, bench: PodmanBench, restarted: bool
    ) -> None:
        model = shell(BINDS_AS_CUDA_DOES, network="host")
        names = set()
        for key in ("a", "b"):
            engine = await bench.runtime.start(f"{key}-1", key, model)
            names.add(await abstract_name(bench, engine))
            await engine.checkpoint(FACTS, Stages())
            if key == "a" and restarted:
                bench = await bench.successor()
                await bench.runtime.recover({"a": model, "b": model})
        assert len(names) == 2
        for engine in [*bench.runtime.engines.values()]:
            await engine.restore(Stages())
        assert all(bench.pid_of(instance_id) for instance_id in bench.runtime.engines)

    async def test_a_name_of_its_image_that_somebody_has_on_it_is_said(self, bench: PodmanBench) -> None:
        engine = await bench.runtime.start("demo-1", "demo", shell(BINDS_AS_CUDA_DOES, network="host"))
        name = await abstract_name(bench, engine)
        await engine.checkpoint(FACTS, Stages())
        assert bench.store.load("demo").private["abstract_sockets"] == [f"@{name}"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mine:
            mine.bind(f"\0{name}")
            wanted = rf"the unix socket @{name} .* by process {os.getpid()} \(.*models\.demo\.podman\.network"
            with pytest.raises(RuntimeFailure, match=wanted):
                await engine.restore(Stages())
        await engine.restore(Stages())
        assert bench.pid_of("demo-1")

    async def test_a_network_of_the_users_own_is_used(self, bench: PodmanBench) -> None:
        podman("network", "create", "warmpool-test")
        try:
            bench.model = model_of(network="warmpool-test")
            engine, boot = await self.checkpointed(bench)
            await self.comes_back(bench, engine, boot)
            await engine.remove()
            await bench.runtime.images.discard(engine)
        finally:
            podman("network", "rm", "--force", "warmpool-test")

    async def test_what_was_written_to_the_root_filesystem_is_left_out_where_told(self, bench: PodmanBench) -> None:
        bench.model = ModelSettings(
            podman={
                **engine_table(criu={"ignore_rootfs": True}),
                "command": ["--host", "{host}", "--port", "{port}", "--model", "{model}"],
            }
        )
        engine, boot = await self.checkpointed(bench)
        assert "rootfs.tar" not in bench.store.load("demo").bytes_by_file
        await self.comes_back(bench, engine, boot)

    # --- CRIU ---

    async def test_the_users_action_scripts_run_at_their_points(self, bench: PodmanBench, tmp_path: Path) -> None:
        log = tmp_path / "log"
        scripts = {}
        for point in ("pre-dump", "post-dump", "pre-restore", "post-restore", "post-resume"):
            scripts[point] = tmp_path / f"script {point}"
            scripts[point].write_text(f"#!/bin/sh\necho $CRTOOLS_SCRIPT_ACTION >> {log}\n")
            scripts[point].chmod(0o755)
        bench.model = model_of(criu={"action_scripts": {n: str(p) for n, p in scripts.items()}})
        engine, _ = await self.checkpointed(bench)
        assert log.read_text().split() == ["pre-dump", "post-dump"]
        await engine.restore(Stages())
        assert log.read_text().split()[2:] == ["pre-restore", "post-restore", "post-resume"]

    async def test_a_criu_of_the_users_own_is_used(self, tmp_path: Path, images: Path) -> None:
        engine_image()
        log, mine = tmp_path / "calls", tmp_path / "my-criu"
        mine.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("criu")} "$@"\n')
        mine.chmod(0o755)
        bench = PodmanBench(tmp_path, images, criu_programs=[mine])
        await bench.runtime.open()
        bench.model = model_of(criu={"program": str(mine)})
        engine, boot = await self.checkpointed(bench)
        await self.comes_back(bench, engine, boot)
        assert "swrk" in log.read_text()
        await bench.clear()

    async def test_criu_options_come_from_a_file_of_the_models_own(self, bench: PodmanBench) -> None:
        bench.model = model_of(criu={"options": ["force-irmap"], "ghost_limit": "1GiB"})
        engine, _ = await self.checkpointed(bench)
        folder = bench.folder / "state" / "podman"
        text = (folder / "demo.criu.conf").read_text()
        assert "ghost-limit 1073741824\n" in text
        assert "force-irmap\n" in text
        shown = orjson.loads(podman("inspect", bench.container(engine)))[0]
        assert shown["Config"]["Annotations"]["org.criu.config"] == str(folder / "demo.criu.conf")

    async def test_an_engine_of_the_load_tests_writes_nothing_that_its_checkpoints_would_hold(
        self, bench: PodmanBench
    ) -> None:
        engine = await self.start(bench)
        assert "__pycache__" not in podman("diff", bench.container(engine))

    async def test_criu_reports_its_times(self, bench: PodmanBench) -> None:
        engine = await self.start(bench)
        stages = Stages()
        await engine.checkpoint(FACTS, stages)
        assert {"podman", "dump", "digest"} <= set(stages.seconds)
        assert stages.seconds["podman"] > 0
        again = Stages()
        await engine.restore(again)
        assert {"podman", "criu"} <= set(again.seconds)
        manifest = bench.store.load("demo")
        assert manifest.details["criu_us"]["frozen_time"] > 0
        assert manifest.facts.keys() >= {"kernel", "CRIU", "podman", "container image"}
        assert manifest.bytes_by_kind()["memory pages"] > 8 << 20

    async def test_the_memory_of_processes_that_hide_their_environment_counts(self, bench: PodmanBench) -> None:
        child = "import time; kept = b'x' * (32 << 20); print('up', flush=True); time.sleep(1000)"
        script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], env=dict())"
        engine = await bench.runtime.start("demo-1", "demo", shell(script))
        async with asyncio.timeout(PATIENCE_S):
            while "up" not in bench.claim.log_path("demo-1").read_text():
                await asyncio.sleep(0.02)
        await engine.checkpoint(FACTS, Stages())
        assert bench.store.load("demo").details["memory"]["anonymous"] > 32 << 20

    # --- the host ---

    async def test_two_proxies_cannot_share_a_state_folder(self, bench: PodmanBench, images: Path) -> None:
        with pytest.raises(HostError, match="another warmpool uses state_dir"):
            await PodmanBench(bench.folder, images).runtime.open()

    async def test_without_podman_the_host_error_says_how_to_get_it(
        self, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        bench = PodmanBench(tmp_path, images, socket=str(tmp_path / "no-socket"))
        with pytest.raises(HostError, match="podman is not installed"):
            await bench.runtime.open()

    async def test_a_checkpoint_folder_in_use_takes_the_tier_away_with_a_reason(
        self, bench: PodmanBench, tmp_path: Path, images: Path
    ) -> None:
        other = PodmanBench(tmp_path / "other", images)
        await other.runtime.open()
        assert "another warmpool uses it" in other.runtime.tiers().missing[Tier.CHECKPOINTED]
        await other.close()
