"""Another configuration while requests run: what differs, what the pool makes of it, and SIGHUP."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import tomli_w

from proxy.config import diff
from proxy.config.load import load
from proxy.config.model import ModelSettings
from proxy.config.settings import Settings
from proxy.errors import ConfigError, HostError, ModelNotFoundError, RuntimeFailure
from proxy.host import daemon_thread, facts
from proxy.tiers import Tier
from tests.fakes import Rig, model_settings, settle
from tests.served import ASK, Proxy, ServiceManager
from tests.support import PATIENCE_S, engine_model, get_json

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}
OTHER_ENGINE = {"process": {"command": ["other", "{port}"]}}


def settings(models: dict[str, dict[str, Any]], **tables: Any) -> Settings:
    """As a rig has them."""
    tables["pool"] = {"switch_after": "10s", **tables.get("pool", {})}
    return Settings(models={key: model_settings(**entry) for key, entry in models.items()}, **tables)


# --- what differs ---


def test_every_kind_of_difference_is_told() -> None:
    old = settings({"a": {}, "b": {}, "c": {}, "d": {}}, server={"port": 1, "drain_timeout": "1s"})
    new = settings(
        {"a": {}, "b": OTHER_ENGINE, "c": {"max_queue": 5}, "e": {}},
        server={"port": 2, "drain_timeout": "2s"},
        pool={"max_awake": 3, "state_dir": "elsewhere"},
        runtime={"podman": {"stop_grace": "3s"}},
    )
    changes, in_force = diff.compare(old, new)
    assert changes == diff.Changes(
        added=("e",), removed=("d",), replaced=("b",), adjusted=("c",),
        pending=("server.port", "pool.state_dir", "runtime.podman.stop_grace"),
        live=("server.drain_timeout", "pool.max_awake"),
    )  # fmt: skip
    assert str(changes) == (
        "added e; removed d; new engines for b; adjusted c; changed server.drain_timeout, pool.max_awake; "
        "after a restart only server.port, pool.state_dir, runtime.podman.stop_grace"
    )
    assert in_force.models == new.models
    assert (in_force.server.port, in_force.server.drain_timeout) == (1, 2.0)
    assert (in_force.pool.state_dir, in_force.pool.max_awake) == (old.pool.state_dir, 3)
    assert str(diff.compare(old, old)[0]) == "nothing changed"


def test_the_keys_with_a_meaning_of_their_own_exist() -> None:
    fields = Settings.model_fields.items()
    tables = {name: field.annotation for name, field in fields if name not in ("models", "defaults")}
    there = {f"{table}.{key}" for table, section in tables.items() for key in section.model_fields}  # type: ignore[union-attr]
    assert there >= diff.LIVE
    assert set(ModelSettings.model_fields) >= diff._ENGINE


def test_a_new_criu_program_needs_a_restart() -> None:
    podman = {"image": "x", "command": ["--port", "{port}"]}
    old = Settings(models={"a": {"podman": podman}})
    new = Settings(models={"a": {"podman": {**podman, "criu": {"program": "/opt/criu"}}}})
    with pytest.raises(ConfigError, match=r"models\.a\.podman\.criu\.program: .*restart"):
        diff.compare(old, new)


# --- the pool ---


async def rig_with(models: dict[str, dict[str, Any]], **pool: Any) -> Rig:
    rig = Rig(models, shares_images=True, **pool)
    await rig.pool.open()
    return rig


async def use(rig: Rig, model: str) -> Any:
    async with await rig.pool.lease(model) as lease:
        return lease


async def test_models_that_did_not_change_notice_nothing() -> None:
    rig = await rig_with({"a": {"idle": SECONDS}, "b": {"idle": SECONDS}})
    held = await rig.pool.lease("a")
    await rig.pool.reconfigure(settings({"a": {"idle": SECONDS}, "c": {}}))
    assert await use(rig, "c")
    with pytest.raises(ModelNotFoundError):
        await rig.pool.lease("b")
    assert (await use(rig, "a")).instance_id == held.instance_id
    held.release()
    assert rig.states() == {"a-1": "ready", "c-1": "ready"}
    await rig.pool.close()


async def test_what_does_not_shape_the_engine_is_adjusted_in_place() -> None:
    rig = await rig_with({"a": {"idle": SECONDS}})
    await use(rig, "a")
    await rig.pool.reconfigure(settings({"a": {"idle": {**SECONDS, "sleeping": "1s"}, "aliases": ["z"]}}))
    assert (await use(rig, "z")).found is Tier.READY
    await rig.pass_time(1)
    assert rig.states() == {"a-1": "sleeping"}
    await rig.pool.close()


async def test_a_changed_engine_serves_new_requests_while_the_old_one_ends_its_own() -> None:
    rig = await rig_with({"a": {"idle": SECONDS}})
    held = await rig.pool.lease("a")
    await rig.pool.reconfigure(settings({"a": {"idle": SECONDS, **OTHER_ENGINE}}))
    lease = await use(rig, "a")
    assert (lease.instance_id, lease.found) == ("a-2", Tier.STOPPED)
    assert rig.runtime.processes["a-2"].command == ["other", "{port}"]
    assert {i["id"]: i["state"] for i in rig.pool.status()["leaving"]} == {"a-1": "retiring"}
    assert "a-1" in rig.runtime.processes, "no answer is cut off"
    held.release()
    await settle()
    assert set(rig.runtime.processes) == {"a-2"}
    assert rig.pool.status()["leaving"] == []
    await rig.pool.close()


async def test_those_who_wait_get_the_new_engine() -> None:
    rig = await rig_with({"a": {"idle": SECONDS}})
    rig.runtime.gates["health"] = asyncio.Event()
    waiting = asyncio.create_task(use(rig, "a"))
    await settle()
    await rig.pool.reconfigure(settings({"a": {"idle": SECONDS, **OTHER_ENGINE}}))
    rig.runtime.gates["health"].set()
    assert (await waiting).instance_id == "a-2"
    await settle()
    assert set(rig.runtime.processes) == {"a-2"}
    await rig.pool.close()


async def test_one_that_leaves_after_a_reload_waits_no_longer() -> None:
    rig = await rig_with({"a": {"idle": SECONDS}})
    rig.runtime.gates["health"] = asyncio.Event()
    waiting = asyncio.create_task(use(rig, "a"))
    await settle()
    await rig.pool.reconfigure(settings({"a": {"idle": SECONDS, **OTHER_ENGINE}}))
    await settle()
    waiting.cancel()
    await settle()
    assert rig.pool.status()["models"]["a"]["queue"] == 0
    assert rig.pool.unused("a")
    rig.runtime.gates["health"].set()
    await settle()
    await rig.pool.close()


async def test_a_removed_model_drains_and_goes() -> None:
    rig = await rig_with({"a": {"idle": SECONDS, "max_concurrency": 1}, "b": {}})
    held = await rig.pool.lease("a")
    waiting = asyncio.create_task(use(rig, "a"))
    await settle()
    await rig.pool.reconfigure(settings({"b": {}}))
    with pytest.raises(ModelNotFoundError):
        await waiting
    assert "a-1" in rig.runtime.processes
    assert 'warmpool_instances{model="a",state="retiring"} 1.0' in (await rig.metrics.scrape()).decode()
    held.release()
    await settle()
    assert rig.runtime.processes == {}
    assert 'warmpool_instances{model="a"' not in (await rig.metrics.scrape()).decode()
    await rig.pool.close()


async def test_a_golden_checkpoint_serves_again_when_a_change_is_undone() -> None:
    rig = await rig_with({"a": {"idle": SECONDS}})
    await use(rig, "a")
    for _ in range(3):
        await rig.pass_time(10)
    boot = rig.runtime.images.there["a"].boot
    await rig.pool.reconfigure(settings({"a": {"idle": SECONDS, **OTHER_ENGINE}}))
    await settle()
    assert rig.states() == {}, "the old engine's checkpoint does not fit the new one"
    assert "a" in rig.runtime.images.there, "and is kept"
    await rig.pool.reconfigure(settings({"a": {"idle": SECONDS}}))
    await settle()
    assert rig.states() == {"a-1": "checkpointed"}
    assert (await use(rig, "a")).found is Tier.CHECKPOINTED
    assert rig.runtime.processes["a-1"].boot == boot
    await rig.pool.close()


async def test_a_checkpoint_under_way_is_finished_before_the_change() -> None:
    rig = await rig_with({"a": {"idle": SECONDS}})
    await use(rig, "a")
    rig.runtime.gates["checkpoint"] = asyncio.Event()
    for _ in range(3):
        await rig.pass_time(10)
    change = asyncio.create_task(rig.pool.reconfigure(settings({"a": {"idle": SECONDS, **OTHER_ENGINE}})))
    await settle()
    assert not change.done()
    rig.runtime.gates["checkpoint"].set()
    await change
    await settle()
    assert rig.states() == {}
    await rig.pool.close()


async def test_fewer_instances_are_the_coldest_ones_less() -> None:
    rig = await rig_with({"a": {"idle": SECONDS, "max_instances": 3, "max_concurrency": 1, "min_ready": 0}})
    held = [await rig.pool.lease("a") for _ in range(3)]
    await rig.pool.reconfigure(settings({"a": {"idle": SECONDS, "max_instances": 1, "max_concurrency": 1}}))
    await settle()
    assert len(rig.runtime.processes) == 3
    for lease in held:
        lease.release()
    await settle()
    assert len(rig.runtime.processes) == 1
    await rig.pool.close()


async def test_a_runtime_that_cannot_work_changes_nothing() -> None:
    rig = await rig_with({"a": {}})

    class Podman(type(rig.runtime)):  # type: ignore[misc]
        async def open(self) -> None:
            raise HostError("podman is not installed")

    rig.pool._state.all_runtimes = {**rig.pool._state.all_runtimes, "podman": Podman()}
    podman = {"podman": {"image": "x", "command": ["--port", "{port}"]}}
    wanted = Settings(models={"a": model_settings(), "b": podman})
    with pytest.raises(HostError):
        await rig.pool.reconfigure(wanted)
    assert rig.pool.settings.models.keys() == {"a"}
    await use(rig, "a")
    await rig.pool.close()


async def test_an_old_engine_that_breaks_on_its_way_out_is_cleared_away() -> None:
    rig = await rig_with({"a": {"idle": SECONDS}})
    held = await rig.pool.lease("a")
    await rig.pool.reconfigure(settings({"a": {"idle": SECONDS, **OTHER_ENGINE}}))
    rig.runtime.kill("a-1")
    await settle()
    held.release()
    await settle()
    assert rig.runtime.processes == {}
    assert rig.pool.status()["leaving"] == []
    rig.runtime.failures["remove"] = [RuntimeFailure("remove", "no")]
    await rig.pool.close()


# --- SIGHUP ---


async def test_sighup_takes_a_new_file_on_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    manager = ServiceManager(tmp_path)
    idle = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}
    demo = engine_model("--tokens-per-second", "40", idle=idle)
    proxy = await Proxy(tmp_path / "w", settings={"models": {"demo": demo}}, manager=manager).listening()
    path = tmp_path / "w" / "warmpool.toml"
    good = path.read_text()

    async def hup() -> str:
        manager.forget()
        proxy.process.send_signal(signal.SIGHUP)
        await manager.until("READY")
        assert "RELOADING" in manager.said[0]
        return next(m["STATUS"] for m in manager.said if "READY" in m)

    async def names() -> list[str]:
        return [model["id"] for model in (await get_json(f"{proxy.url}/v1/models"))["data"]]

    try:
        await manager.until("READY")
        body = {**ASK, "stream": True, "max_tokens": 80, "ignore_eos": True}
        async with proxy.session.post("/v1/completions", json=body) as stream:
            await stream.content.readany()
            path.write_text(good + "\n[nonsense]\n")
            assert "the last reload failed" in await hup()
            assert "reload: nothing was changed: " in proxy.log.read_text()
            assert await names() == ["demo"]

            changed = tomli_w.dumps({"models": {"other": engine_model(idle=idle)}, "server": {"port": 1}})
            path.write_text(changed + good[: good.index("[models")].replace("[server]\nport = 0\n", ""))
            status = await hup()
            assert "added other; removed demo" in status
            assert "after a restart only server.port" in status
            assert await names() == ["other"]
            assert (await proxy.ask(model="other"))[0] == "stopped"
            assert (await stream.read()).endswith(b"data: [DONE]\n\n"), "the old engine ends what it began"
        async with asyncio.timeout(PATIENCE_S):
            while (await get_json(f"{proxy.url}/admin/status"))["leaving"]:
                await asyncio.sleep(0.02)
        with pytest.raises((AssertionError, aiohttp.ClientError)):
            await proxy.ask()
        proxy.process.terminate()
        assert await proxy.ended() == 0
    finally:
        await proxy.session.close()
        if proxy.process.poll() is None:
            proxy.process.kill()
        proxy.process.wait()
        manager.close()


async def test_a_configuration_file_that_is_a_pipe_is_refused_and_harms_no_later_reload(tmp_path: Path) -> None:
    manager = ServiceManager(tmp_path)
    settings = {"models": {"demo": engine_model()}}
    proxy = await Proxy(tmp_path / "w", settings=settings, manager=manager).listening()
    path = tmp_path / "w" / "warmpool.toml"
    good = path.read_text()

    async def hup() -> str:
        manager.forget()
        proxy.process.send_signal(signal.SIGHUP)
        await manager.until("READY")
        return next(m["STATUS"] for m in manager.said if "READY" in m)

    try:
        await manager.until("READY")
        path.unlink()
        os.mkfifo(path)
        assert "is not a plain file" in await hup()
        path.unlink()
        path.write_text(good)
        assert "reloaded: nothing changed" in await hup()
        proxy.process.terminate()
        assert await proxy.ended() == 0
    finally:
        await proxy.session.close()
        proxy.process.kill()
        proxy.process.wait()
        manager.close()


async def test_work_that_hangs_is_waited_for_no_longer_than_it_may_take() -> None:
    hanging = threading.Event()
    with pytest.raises(TimeoutError):
        await daemon_thread.run(hanging.wait, 0.01, "hang")
    hanging.set()
    assert await daemon_thread.run(lambda: 1, PATIENCE_S, "work") == 1
    with pytest.raises(ZeroDivisionError):
        await daemon_thread.run(lambda: 1 // 0, PATIENCE_S, "fail")


def test_what_config_load_raises_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[models.a]\nnonsense = 1\n")
    with pytest.raises(ConfigError, match="nonsense"):
        load(path)


async def test_rules_change_where_host_memory_is_kept_account_of() -> None:
    rig = Rig({"demo": {}}, memory=facts.memory)
    await rig.pool.open()
    (await rig.pool.lease("demo")).release()
    await settle()
    pool = rig.settings.pool.model_copy(update={"quantum": 7.0})
    wanted = rig.settings.model_copy(update={"pool": pool})
    assert str(await rig.pool.reconfigure(wanted)) == "changed pool.quantum"
    (await rig.pool.lease("demo")).release()
    await rig.pool.close()
