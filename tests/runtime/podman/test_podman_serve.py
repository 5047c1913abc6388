"""`warmpool serve` and `warmpool checkpoint` with engines in real containers, from an OpenAI client's side."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import openai
import orjson
import pytest

from tests.podman_bench import podman, why_no_podman
from tests.podman_host import AWAKE, Host
from tests.served import ASK, Proxy
from tests.support import PATIENCE_S, files_in, get_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


@pytest.fixture
def client_of() -> Callable[[Proxy], openai.AsyncOpenAI]:
    return lambda proxy: openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0)


async def first_token(client: openai.AsyncOpenAI) -> tuple[float, str, dict[str, float], str]:
    """Seconds to the first token, the tier found, the stages in milliseconds, the whole text."""
    began = time.perf_counter()
    raw = await client.completions.with_raw_response.create(**ASK, stream=True)  # type: ignore[call-overload]
    ttft_s, text = 0.0, ""
    async for chunk in raw.parse():
        ttft_s = ttft_s or time.perf_counter() - began
        text += "".join(choice.text for choice in chunk.choices)
    timing = {n: float(v) for n, v in re.findall(r"(\w+);dur=([\d.]+)", raw.headers["server-timing"])}
    return ttft_s, raw.headers["x-warmpool-tier"], timing, text


async def boot_id(host: Host, instance: str = "demo-1") -> str:
    """Of the engine behind an instance, asked around the proxy."""
    (name,) = host.containers(f"label=io.warmpool.instance={instance}")
    address = podman("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)
    return str((await get_json(f"http://{address}:8000/debug/state"))["boot_id"])


async def test_from_a_cold_start_to_restores_through_the_openai_package(host: Host, client_of: Any) -> None:
    proxy = await host.serve("--load-seconds", "5", canary="first")
    async with client_of(proxy) as client:
        cold_s, tier, _, text = await first_token(client)
        assert tier == "stopped"
        before = await boot_id(host)
        own_ms, others_ms, warm_s = [], [], []
        for _ in range(4):
            await proxy.until("checkpointed")
            ttft_s, tier, stages, again = await first_token(client)
            assert (tier, again) == ("checkpointed", text)
            assert await boot_id(host) == before
            others = sum(stages.get(name, 0.0) for name in ("podman", "criu", "health", "wake_up", "reseed", "canary"))
            others_ms.append(others)
            own_ms.append(stages["wake"] + stages["queue"] - others)
            warm_s.append(ttft_s)
    assert median(warm_s) <= cold_s / 10
    assert median(own_ms) < median(others_ms) / 4, "the proxy's own part of a restore"


async def test_weights_come_back_from_the_copy_beside_the_checkpoint(host: Host, client_of: Any, images: Path) -> None:
    proxy = await host.serve("--memory", "8MiB", weights_copy=True, sleep_level=2)
    async with client_of(proxy) as client:
        _, _, _, text = await first_token(client)
        await proxy.until("checkpointed")
        for _ in range(2):
            _, tier, stages, again = await first_token(client)
            assert (tier, again) == ("checkpointed", text)
            assert "load_weights" in stages
            assert "reload_weights" not in stages
            await proxy.until("checkpointed")
        for file in (images / "demo.weights").iterdir():
            file.unlink()
        _, _, stages, again = await first_token(client)
        assert again == text
        assert "reload_weights" in stages
        await proxy.until("checkpointed")
        assert len([*(images / "demo.weights").iterdir()]) == 2, "written again"
        _, _, stages, again = await first_token(client)
        assert again == text
        assert "reload_weights" not in stages


async def test_three_requests_at_once_are_answered_by_three_clones(host: Host) -> None:
    # Answers that take longer than a restore, or the first instance to be ready would give two of them.
    proxy = await host.serve("--tokens-per-second", "40", max_instances=3, max_concurrency=1)
    await proxy.ask()
    await proxy.until_all(3, "checkpointed")
    answers = await asyncio.gather(*(proxy.ask(max_tokens=100, ignore_eos=True) for _ in range(3)))
    assert {tier for tier, _ in answers} == {"checkpointed"}
    assert len({text for _, text in answers}) == 1
    status = await get_json(f"{proxy.url}/admin/status")
    wakes = [i["last_wake"] for i in status["models"]["demo"]["instances"]]
    assert [wake["from"] for wake in wakes if wake] == ["checkpointed"] * 3
    await proxy.until_all(3, "checkpointed")


async def test_two_clones_and_two_restores_of_one_image_draw_differently(host: Host) -> None:
    proxy = await host.serve("--tokens-per-second", "40", engine="vllm", max_instances=2, max_concurrency=1)
    _, greedy = await proxy.ask()
    sampled = {"temperature": 1, "max_tokens": 60, "ignore_eos": True}
    texts = []
    for _ in range(2):
        await proxy.until_all(2, "checkpointed")
        answers = await asyncio.gather(proxy.ask(**sampled), proxy.ask(**sampled))
        assert [tier for tier, _ in answers] == ["checkpointed"] * 2
        texts += [text for _, text in answers]
    assert len({*texts}) == 4
    await proxy.until_all(2, "checkpointed")
    seeded = await asyncio.gather(*(proxy.ask(**sampled, seed=7) for _ in range(2)))
    assert len({text for _, text in seeded}) == 1, "a client's own seed decides"
    assert (await proxy.ask())[1] == greedy


async def test_a_golden_checkpoint_made_by_command_serves_the_first_request(host: Host) -> None:
    settings = host.settings(warmup={"requests": 3, "max_tokens": 5})
    done = host.command("create", "demo", "--json", settings=settings)
    assert done.returncode == 0, done.stderr
    report = orjson.loads(done.stdout)
    assert [set(w) for w in report["warmup"]] == [{"ttft_s", "total_s", "tokens"}] * 3
    assert {w["tokens"] for w in report["warmup"]} == {5}
    assert report["canary_checked"]
    assert {"start", "load", "warmup", "canary", "sleep", "checkpoint"} <= set(report["making_s"])
    assert {"restore", "criu", "podman", "canary", "stop"} <= set(report["proof_s"])
    for stage in ("load", "checkpoint", "restore"):
        assert stage in done.stderr, "progress"
    assert host.containers("status=running") == []
    manifest = orjson.loads(host.command("inspect", "demo", settings=settings).stdout)
    assert manifest["facts"].keys() >= {"kernel", "podman", "CRIU", "container image"}
    assert manifest["sha256_by_file"].keys() == manifest["bytes_by_file"].keys()
    assert manifest["details"]["engine"]["command"][:2] == ["--host", "{host}"]
    assert manifest["details"]["bytes_by_kind"]["memory pages"] > 0

    proxy = await host.serve(warmup={"requests": 3, "max_tokens": 5})
    assert (await proxy.ask())[0] == "checkpointed"


async def test_leave_running_hands_the_engine_to_the_proxy(host: Host) -> None:
    keys = {"criu": {"leave_running": True}}
    done = host.command("create", "demo", settings=host.settings(podman_keys=keys))
    assert done.returncode == 0, done.stderr
    assert len(host.containers("status=running")) == 1
    proxy = await host.serve(podman_keys=keys, idle=AWAKE)
    await proxy.until("ready")  # it repeats its known answer first
    assert (await proxy.ask())[0] == "ready"


async def test_the_commands_for_checkpoints(host: Host, tmp_path: Path) -> None:
    settings = host.settings()

    def run(*arguments: str, status: int = 0) -> str:
        done = host.command(*arguments, settings=settings)
        assert done.returncode == status, done.stderr + done.stdout
        return done.stdout + done.stderr

    run("create", "demo")
    assert orjson.loads(run("ls", "--json"))[0] | {"bytes": 0, "created_unix_s": 0} == {
        "image": "demo", "model": "demo", "where": "tmpfs", "bytes": 0, "created_unix_s": 0, "state": "good",
    }  # fmt: skip
    assert "good" in run("verify", "demo")
    assert "as they were written" in run("verify", "demo", "--digests-only")
    analysis = orjson.loads(run("analyze", "demo", "--json"))
    assert analysis["bytes_by_kind"]["memory pages"] > analysis["bytes_by_kind"]["process state"] > 0
    assert "memory pages" in run("analyze", "demo")
    for name in ("a.tar", "a.tar.gz", "a.tar.zst"):
        run("export", "demo", str(tmp_path / name))
    assert (tmp_path / "a.tar").stat().st_size > (tmp_path / "a.tar.zst").stat().st_size
    run("archive", "demo")
    assert orjson.loads(run("ls", "--json"))[0]["where"] == "archive"
    run("rm", "demo")
    assert orjson.loads(run("ls", "--json")) == []
    for name in ("a.tar", "a.tar.gz", "a.tar.zst"):
        run("import", str(tmp_path / name))
        assert "as they were written" in run("verify", "demo", "--digests-only")
    assert "good" in run("verify", "demo")
    pages = next(host.images.glob("demo/criu/pages-*.img"))
    with pages.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 64)
    assert "its content is not what was written" in run("verify", "demo", status=1)
    assert "no model 'nope'" in run("create", "nope", status=2)
    assert "no such checkpoint" in run("rm", "nope", status=1)
    settings["models"]["demo"]["podman"]["shm_size"] = "65MiB"
    assert "models.demo has changed since" in run("ls", "--json")
    del settings["pool"]["archive_dir"]
    assert "pool.archive_dir" in run("archive", "demo", status=1)


@pytest.mark.parametrize(
    ("engine", "entry", "said"),
    [
        (("--fail-start",), {}, "load: start: the engine ended: exit status 3"),
        (("--hang-start",), {"start_timeout": "2s"}, "load: no result within start_timeout (2 s)"),
        (("--no-sleep-mode",), {"podman_keys": {"criu": {"options": ["no-such-option"]}}}, "checkpoint: "),
    ],
)
async def test_create_says_at_which_stage_it_failed_and_leaves_nothing(
    host: Host, engine: tuple[str, ...], entry: dict[str, Any], said: str
) -> None:
    done = host.command("create", "demo", settings=host.settings(*engine, **entry))
    assert done.returncode == 1
    assert said in done.stderr
    assert host.containers() == []
    assert files_in(host.images) == []


async def test_one_that_does_not_prove_good_is_set_aside(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "refuse"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o755)
    settings = host.settings(podman_keys={"criu": {"action_scripts": {"pre-restore": str(script)}}})
    done = host.command("create", "demo", settings=settings)
    assert done.returncode == 1
    assert "does not prove good and was set aside: restore: " in done.stderr
    assert [p.name for p in files_in(host.images)] == ["demo.quarantined"]
    assert host.containers() == []


async def test_commands_that_change_images_wait_for_the_proxy_to_end(host: Host) -> None:
    proxy = await host.serve()
    await proxy.ask()
    await proxy.until("checkpointed")
    settings = host.settings()
    assert "another warmpool uses" in host.command("create", "demo", settings=settings).stderr
    assert "another warmpool uses" in host.command("rm", "demo", settings=settings).stderr
    assert host.command("verify", "demo", "--digests-only", settings=settings).returncode == 0
    assert "used by a running warmpool" in host.command("ls", "--json", settings=settings).stdout
    assert (await proxy.ask())[0] == "checkpointed"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_running_engines_outlive_the_proxy_and_are_adopted(host: Host, how: signal.Signals) -> None:
    proxy = await host.serve(idle=AWAKE)
    _, text = await proxy.ask()
    before = await boot_id(host)
    proxy.process.send_signal(how)
    await asyncio.to_thread(proxy.process.wait, PATIENCE_S)
    assert len(host.containers("status=running")) == 1
    after = await host.serve(idle=AWAKE)
    assert await after.ask() == ("ready", text)
    assert await boot_id(host) == before
    assert len(host.containers()) == 1


async def test_checkpoints_outlive_the_proxy_killed_at_any_time(host: Host) -> None:
    proxy = await host.serve(max_instances=2)
    _, text = await proxy.ask()
    await proxy.until_all(2, "checkpointed")
    before = len(host.containers())
    proxy.process.kill()
    proxy.process.wait()
    after = await host.serve(max_instances=2)
    assert await after.ask() == ("checkpointed", text)
    assert len(host.containers()) == before


async def test_on_exit_stop_ends_the_engines(host: Host) -> None:
    proxy = await host.serve(idle=AWAKE, runtime={"on_exit": "stop"})
    await proxy.ask()
    proxy.process.terminate()
    await asyncio.to_thread(proxy.process.wait, PATIENCE_S)
    assert host.containers("status=running") == []


async def test_a_corrupted_image_falls_back_to_a_cold_start_and_is_set_aside(host: Host) -> None:
    proxy = await host.serve()
    await proxy.ask()
    await proxy.until("checkpointed")
    core = next(host.images.glob("demo/criu/core-*.img"))
    core.write_bytes(os.urandom(core.stat().st_size))
    tier, _ = await proxy.ask()
    assert tier == "checkpointed"
    assert (await proxy.instance())["last_wake"]["from"] == "stopped"
    async with asyncio.timeout(PATIENCE_S):  # its digests are read behind the wake
        while not (host.images / "demo.quarantined").exists():
            await asyncio.sleep(0.02)
    async with proxy.session.get("/metrics") as response:
        metrics = await response.text()
    assert 'warmpool_quarantined_checkpoints_total{model="demo"} 1.0' in metrics
    assert 'warmpool_wake_failures_total{model="demo",tier="checkpointed"} 1.0' in metrics
    await proxy.until("checkpointed")
    assert (await proxy.ask())[0] == "checkpointed", "a new golden checkpoint was written"
    assert (await proxy.instance())["last_wake"]["from"] == "checkpointed"


async def test_a_container_removed_behind_our_back_costs_one_fallback_at_most(host: Host) -> None:
    proxy = await host.serve(idle=AWAKE)
    _, text = await proxy.ask()
    podman("rm", "--force", "--time", "0", *host.containers())
    async with asyncio.timeout(PATIENCE_S):
        while await proxy.states():
            await asyncio.sleep(0.02)
    assert await proxy.ask() == ("stopped", text)


async def test_a_full_tmpfs_leaves_engines_serving(host: Host, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=True)
    try:
        host.images = small
        proxy = await host.serve()
        _, text = await proxy.ask()
        async with asyncio.timeout(PATIENCE_S):
            while "cannot go to checkpointed, and stays" not in proxy.log.read_text():
                await asyncio.sleep(0.02)
        assert await proxy.ask() == ("suspended", text)
        assert "are free beyond the reserve" in proxy.log.read_text()
        host.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
