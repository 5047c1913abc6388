"""Host memory: what cgroups leave, what a wake makes free, what is refused; engines in a small cgroup live."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy.errors import NoMemoryError
from proxy.host.cgroups import Limit, memory_limits
from proxy.host.facts import Memory, least
from proxy.runtime.base import Footprint
from proxy.runtime.podman.container import cgroup_of_all
from proxy.tiers import Tier
from tests.fakes import Rig, settle
from tests.served import Proxy
from tests.support import engine_model

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}


# --- what cgroups leave ---


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_every_cgroup_of_version_1_up_to_the_root_counts(tmp_path: Path) -> None:
    mounts = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    folder = "sys/fs/cgroup/memory"
    none = str((1 << 63) - 4096)
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/a/b\n0::/\n",
            "proc/self/mountinfo": mounts,
            f"{folder}/memory.limit_in_bytes": none,
            f"{folder}/memory.usage_in_bytes": "900",
            f"{folder}/memory.stat": "total_inactive_file 0\n",
            f"{folder}/a/memory.limit_in_bytes": "1000",
            f"{folder}/a/memory.usage_in_bytes": "700",
            f"{folder}/a/memory.stat": "inactive_file 1\ntotal_inactive_file 50\ntotal_active_file 20\n",
            f"{folder}/a/b/memory.limit_in_bytes": "800",
            f"{folder}/a/b/memory.usage_in_bytes": "100",
            f"{folder}/a/b/memory.stat": "",
        },
    )
    assert memory_limits(root) == [Limit(800, 700), Limit(1000, 370)]


def test_those_of_version_2_too_and_no_limit_is_none(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/warmpool.service\n",
            "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/system.slice/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/memory.current": "5\n",
            "sys/fs/cgroup/system.slice/memory.stat": "",
            "sys/fs/cgroup/system.slice/warmpool.service/memory.max": "2000\n",
            "sys/fs/cgroup/system.slice/warmpool.service/memory.current": "1500\n",
            "sys/fs/cgroup/system.slice/warmpool.service/memory.stat": "inactive_file 100\nactive_file 200\n",
        },
    )
    assert memory_limits(root) == [Limit(2000, 800)]


def test_those_of_containers_are_beside_the_own_one(tmp_path: Path) -> None:
    def limited(folder: str, limit: str, used: str) -> dict[str, str]:
        return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": ""}

    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/warmpool.service\n",
            "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            **limited("sys/fs/cgroup/system.slice/warmpool.service", "1000", "900"),
            **limited("sys/fs/cgroup/machine.slice", "5000", "1000"),
        },
    )
    assert memory_limits(root) == [Limit(1000, 100)]
    assert memory_limits(root, of="machine.slice") == [Limit(5000, 4000)]
    assert memory_limits(root, of="libpod_parent") == []


@pytest.mark.parametrize(
    ("said", "cgroup"),
    [
        ({"cgroupManager": "systemd", "security": {"rootless": False}}, "machine.slice"),
        ({"cgroupManager": "cgroupfs", "security": {"rootless": False}}, "libpod_parent"),
        ({"cgroupManager": "systemd", "security": {"rootless": True}}, None),
        ({}, None),
    ],
)
def test_where_containers_are(said: dict[str, Any], cgroup: str | None) -> None:
    assert cgroup_of_all(said) == cgroup


def test_of_several_places_the_least_counts() -> None:
    assert least([Memory(100, 20), Memory(50, 30)]) == Memory(50, 20)


# --- what the pool does with it ---


class Host:
    """A host whose memory is what the fake runtime's engines leave of it."""

    def __init__(
        self, total: int, takes: dict[str, int], *, shares_images: bool = False, **models: dict[str, Any]
    ) -> None:
        self.total = total
        settled = {key: {"idle": AWAKE, **models.get(key, {})} for key in takes}
        self.rig = Rig(settled, memory=self.read, memory_reserve=0, shares_images=shares_images)
        self.images: dict[str, int] = {}
        """Model → what its image takes on tmpfs."""
        self.rig.runtime.host_takes = takes

    def read(self) -> Memory:
        runtime = self.rig.runtime
        held = sum(runtime.host_takes[runtime.engines[i].key] for i in runtime.processes)
        held += sum(self.images.get(i.model, 0) for i in runtime.images.there.values() if not i.archived)
        return Memory(self.total, self.total - held)

    async def use(self, model: str) -> None:
        async with await self.rig.pool.lease(model):
            pass
        await self.rig.pool._moves.memory_monitor.measure()
        await settle()


async def test_the_longest_idle_makes_room_and_no_more_than_it_takes() -> None:
    host = Host(1000, {"a": 300, "b": 300, "c": 300, "d": 300})
    await host.rig.pool.open()
    for model in "abcd":
        await host.use(model)
    assert host.rig.states() == {"b-1": "ready", "c-1": "ready", "d-1": "ready"}
    await host.rig.pool.close()


async def test_what_cannot_be_had_is_refused_and_sends_nobody_down() -> None:
    host = Host(1000, {"a": 300, "big": 1100}, big={"host_memory": "1100B"})
    await host.rig.pool.open()
    await host.use("a")
    with pytest.raises(NoMemoryError, match="There is not enough host memory for 'big': it needs 1100B, 100B more"):
        await host.rig.pool.lease("big")
    assert host.rig.states() == {"a-1": "ready"}
    assert host.rig.runtime.calls["start"] == 1
    await host.rig.pool.close()


async def test_a_request_waits_for_a_busy_engine_whose_memory_it_needs() -> None:
    host = Host(500, {"a": 300, "b": 300})
    await host.rig.pool.open()
    async with await host.rig.pool.lease("a"):
        await host.rig.pool._moves.memory_monitor.measure()
        waits = host.rig.pool._moves.spawn("b", host.use("b"))
        await settle()
        assert host.rig.states() == {"a-1": "ready"}
        await host.rig.pass_time(11)
        assert host.rig.states() == {"a-1": "retiring"}
    await waits
    assert host.rig.states() == {"b-1": "ready"}
    await host.rig.pool.close()


async def test_idle_engines_go_when_others_take_the_hosts_memory() -> None:
    host = Host(1000, {"a": 300, "b": 300})
    await host.rig.pool.open()
    for model in "ab":
        await host.use(model)
    host.total = 500
    await host.rig.pool._moves.memory_monitor.measure()
    host.rig.pool.tick()
    await settle()
    assert host.rig.states() == {"b-1": "ready"}
    assert host.rig.pool.status()["models"]["b"]["host_need_bytes"] == 300
    await host.rig.pool.close()


# --- images on tmpfs and in the archive ---


ARCHIVES = {"idle": {**AWAKE, "checkpointed": "10s", "archived": "1000s"}}


def with_archives(total: int, takes: dict[str, int], images: dict[str, int], *, shared: bool, **models: Any) -> Host:
    """A host on which images take memory as long as they are not in the archive; all models checkpointed."""
    settled = {key: {**ARCHIVES, "max_instances": 2, **models.get(key, {})} for key in takes}
    host = Host(total, takes, shares_images=shared, **settled)
    host.images = images
    host.rig.runtime.images.footprints = {key: Footprint(takes[key], size, 1 << 40) for key, size in images.items()}
    return host


async def checkpoint(host: Host, model: str) -> None:
    await host.use(model)
    for _ in range(3):
        await host.rig.pass_time(11)
    await host.rig.pool._moves.memory_monitor.measure()


async def test_a_wake_from_the_archive_needs_the_tmpfs_of_its_image_too() -> None:
    host = with_archives(1000, {"a": 300, "b": 300, "c": 300}, {"a": 250}, shared=False)
    await host.rig.pool.open()
    await checkpoint(host, "a")
    for command in host.rig.pool.step_down("a", Tier.CHECKPOINTED):
        await command.carried_out()
    await host.rig.pass_time(1001)
    assert host.rig.states()["a-1"] == "archived"
    await host.use("b")
    await host.use("c")
    lease = await host.rig.pool.lease("a")
    lease.release()
    await settle()
    # 600 held, 400 free: the engine would fit, but not with its image.
    assert {name: state for name, state in host.rig.states().items() if state == "ready"}.keys() == {"a-1", "c-1"}
    assert lease.found is Tier.ARCHIVED
    await host.rig.pool.close()


async def test_an_image_that_all_instances_share_goes_to_the_archive_for_want_of_memory() -> None:
    host = with_archives(1000, {"a": 300, "b": 900}, {"a": 250}, shared=True, b={"host_memory": "900B"})
    await host.rig.pool.open()
    await checkpoint(host, "a")
    assert host.rig.states() == {"a-1": "checkpointed", "a-2": "checkpointed"}
    await host.use("b")
    assert host.rig.runtime.calls["archive_image"] == 1
    assert host.rig.states() == {"a-1": "archived", "a-2": "archived", "b-1": "ready"}
    async with await host.rig.pool.lease("a") as lease:
        assert lease.found is Tier.ARCHIVED
    await host.rig.pool.close()


# --- a small cgroup ---


@pytest.fixture
def small_cgroup(tmp_path: Path) -> Iterator[Path]:
    """One with 1100 MiB."""
    name = f"warmpool-test-{os.getpid()}"
    folder, limit = (V1 / name, "memory.limit_in_bytes") if V1.exists() else (V2 / name, "memory.max")
    try:
        folder.mkdir()
        (folder / limit).write_text(str(1100 * MIB))
        with suppress(OSError):
            (folder / "memory.swap.max").write_text("0")
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield folder
    folder.rmdir()


@pytest.mark.parametrize("mode", ["--sleep-mode", "--no-sleep-mode"])
async def test_no_engine_is_killed_in_a_small_cgroup(tmp_path: Path, small_cgroup: Path, mode: str) -> None:
    # Three fit, so that each of the second round makes room.
    models = {f"m{n}": engine_model("--memory", "256MiB", mode, idle=AWAKE) for n in range(4)}
    settings = {"models": models, "pool": {"memory_reserve": "96MiB"}}
    proxy = await Proxy(tmp_path / "proxy", settings=settings, cgroup=small_cgroup).listening()
    try:
        for _ in range(2):
            for model in models:
                body = {"model": model, "prompt": "Hello", "max_tokens": 8}
                async with proxy.session.post("/v1/completions", json=body) as response:
                    assert response.status == 200, await response.text()
        async with proxy.session.get("/metrics") as response:
            text = await response.text()
        exits = [line for line in text.splitlines() if line.startswith("warmpool_engine_exits_total{")]
        assert [float(line.split()[-1]) for line in exits] == [0.0] * 4
        assert 'warmpool_host_memory_bytes{kind="total"} 1.1534336e+09' in text
    finally:
        proxy.process.terminate()
        await proxy.ended()
