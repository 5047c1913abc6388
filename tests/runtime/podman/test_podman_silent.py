"""podman's service stands still, says nothing, loses its socket: every call ends in bounded time. Real podman."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from proxy.errors import HostError, RuntimeFailure
from proxy.host import processes
from proxy.telemetry.stages import Stages
from tests.podman_bench import PodmanBench, engine_image, podman, why_no_podman
from tests.runtime_contract import FACTS
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from proxy.runtime.base import EngineProcess

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


@pytest.fixture
async def bench(tmp_path: Path, images: Path) -> AsyncIterator[PodmanBench]:
    """A runtime with a podman's service of its own that is not waited for long."""
    engine_image()
    made = PodmanBench(tmp_path, images, socket=str(tmp_path / "none.sock"), timeout="4s")
    await made.runtime.open()
    yield made
    await made.clear()
    assert made.remains() == []


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[Path]:
    """A socket that somebody listens on who never answers."""
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield path


def service_of(bench: PodmanBench) -> asyncio.subprocess.Process:
    service = bench.runtime.host.podman.service
    assert service is not None
    assert service.process is not None
    return service.process


async def ready(bench: PodmanBench) -> EngineProcess:
    engine = await bench.runtime.start("demo-1", "demo", bench.model)
    await bench.healthy(engine)
    return engine


async def another_service(bench: PodmanBench, old: asyncio.subprocess.Process) -> None:
    """Return when a new one has taken the place of `old`, which is gone."""
    async with asyncio.timeout(PATIENCE_S):
        while service_of(bench) is old:
            await asyncio.sleep(0.02)
    assert old.returncode is not None
    await bench.runtime.host.podman.get("/_ping", raw=True)


async def test_where_nobody_answers_on_the_socket_the_host_error_says_so(
    tmp_path: Path, images: Path, mute: Path
) -> None:
    bench = PodmanBench(tmp_path, images, socket=str(mute), timeout="1s")
    with pytest.raises(HostError, match=r"podman's service on .*mute.sock.* did not answer within 1 s"):
        await asyncio.wait_for(bench.runtime.open(), PATIENCE_S)


async def test_a_service_that_stands_still_fails_every_operation_in_bounded_time(bench: PodmanBench) -> None:
    engine = await ready(bench)
    service = bench.runtime.host.podman.service
    assert service is not None
    service._silent_s = 1e9  # what comes of it by itself is another test's
    process = service_of(bench)
    process.send_signal(signal.SIGSTOP)
    runtime = bench.runtime
    for operation in (
        runtime.start("demo-2", "demo", bench.model),
        engine.suspend(),
        engine.checkpoint(FACTS, Stages()),
    ):
        with pytest.raises(RuntimeFailure, match="did not answer within"):
            await asyncio.wait_for(operation, PATIENCE_S)
    with pytest.raises(HostError, match="did not answer within"):
        await asyncio.wait_for(runtime.recover({"demo": bench.model}), PATIENCE_S)
    process.send_signal(signal.SIGCONT)
    await engine.kill()
    await ready(bench)


async def test_an_engine_is_ended_though_podman_says_nothing(bench: PodmanBench) -> None:
    engine = await ready(bench)
    pid = bench.pid_of("demo-1")
    assert pid is not None
    service_of(bench).send_signal(signal.SIGSTOP)
    with pytest.raises(RuntimeFailure, match="did not answer"):
        await asyncio.wait_for(engine.kill(), PATIENCE_S)
    assert not processes.alive(pid)
    service_of(bench).send_signal(signal.SIGCONT)
    await engine.remove()


async def test_a_runtime_is_closed_though_podman_says_nothing(bench: PodmanBench) -> None:
    process = service_of(bench)
    process.send_signal(signal.SIGSTOP)
    await asyncio.wait_for(bench.runtime.close(), PATIENCE_S)
    bench.closed = True
    assert process.returncode is not None


async def test_a_service_that_answers_nothing_for_long_is_replaced(bench: PodmanBench) -> None:
    engine = await ready(bench)
    old = service_of(bench)
    old.send_signal(signal.SIGSTOP)
    await another_service(bench, old)
    await engine.suspend()
    await engine.resume()
    assert await bench.answers(engine)


@pytest.mark.parametrize("lost", ["removed", "replaced"])
async def test_a_service_whose_socket_file_is_lost_is_replaced(bench: PodmanBench, lost: str) -> None:
    engine = await ready(bench)
    old, path = service_of(bench), bench.runtime.host.own_socket()
    if lost == "removed":
        path.unlink()
    else:
        path.unlink()
        with socket.socket(socket.AF_UNIX) as another:
            another.bind(str(path))
    await another_service(bench, old)
    await engine.suspend()
    await engine.resume()
    assert await bench.answers(engine)


async def test_a_failed_create_leaves_no_record_and_touches_no_folder_of_the_users(
    bench: PodmanBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "home"
    (mine / "checkpoint").mkdir(parents=True)
    (mine / "checkpoint" / "weights").write_text("a week of training")
    (mine / "restore.log").write_text("mine")
    engine = await ready(bench)
    boot = await bench.boot_id(engine)
    await engine.checkpoint(FACTS, Stages())
    monkeypatch.chdir(mine)
    table = bench.model.podman
    assert table is not None
    podman("rm", "--force", bench.container(engine))
    broken = bench.model.model_copy(update={"podman": table.model_copy(update={"image": "localhost/no-such-image"})})
    with pytest.raises(RuntimeFailure, match="no-such-image"):
        await bench.runtime.start("demo-1", "demo", broken)
    with pytest.raises(RuntimeFailure, match="no-such-image"):
        await bench.runtime.start("demo-2", "demo", broken)
    assert {e.instance_id for e in bench.runtime.engines.values() if e.it is not None} == {"demo-1"}
    await engine.restore(Stages())
    await bench.healthy(engine)
    assert await bench.boot_id(engine) == boot
    with pytest.raises(RuntimeFailure, match="restore"):
        await bench.runtime.engine("demo-2", "demo").restore(Stages())
    assert (mine / "checkpoint" / "weights").read_text() == "a week of training"
    assert (mine / "restore.log").read_text() == "mine"
