"""`warmpool serve` as users start it: the ladder end to end, signals, crashes, what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest

from tests.served import ASK, Proxy
from tests.support import PATIENCE_S, engine_model, why_no_criu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

QUICK = {"sleeping": "200ms", "suspended": "400ms", "checkpointed": "600ms"}
AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}
COLDEST = "suspended" if why_no_criu() else "checkpointed"


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Proxy]]]:
    """Starts proxies with a model `demo`; ends those that still run."""
    proxies: list[Proxy] = []

    async def serve_(*engine: str, options: tuple[str, ...] = (), forked: bool = True, **entry: Any) -> Proxy:
        model = engine_model(*engine, "--fail-file", str(tmp_path / "mark-of-this-test"), **{"idle": AWAKE, **entry})
        proxy = Proxy(tmp_path / "warmpool", *options, settings={"models": {"demo": model}}, forked=forked)
        proxies.append(proxy)
        return await proxy.listening()

    yield serve_
    for proxy in proxies:
        if proxy.process.poll() is None:
            proxy.process.terminate()
            await proxy.ended()


async def test_the_whole_ladder_and_back_with_state_intact(serve: Any) -> None:
    proxy: Proxy = await serve("--load-seconds", "2", forked=False, idle=QUICK, golden_sleep_level=1)
    began = time.monotonic()
    tier, text = await proxy.ask()
    cold_s = time.monotonic() - began
    assert tier == "stopped"
    before = await proxy.engine_state()
    await proxy.until(COLDEST)
    began = time.monotonic()
    assert await proxy.ask() == (COLDEST, text)
    warm_s = time.monotonic() - began
    after = await proxy.engine_state()
    assert after["boot_id"] == before["boot_id"]
    assert after["pid"] == before["pid"]
    assert after["served"] > before["served"]
    assert after["loads"] == 1
    assert warm_s * 2 < cold_s, "several times faster than a start of 2 s"
    await proxy.until(COLDEST)
    assert (await proxy.ask())[0] == COLDEST, "and again from the same image"


async def test_every_tier_is_seen_on_the_way_down_and_logged(serve: Any) -> None:
    proxy: Proxy = await serve(idle=QUICK)
    await proxy.ask()
    await proxy.until(COLDEST)
    log = proxy.log.read_text()
    down = ["ready -> sleeping", "sleeping -> suspended", "suspended -> checkpointed"]
    for step in down[: 3 if COLDEST == "checkpointed" else 2]:
        assert f"demo-1 {step} (idle)" in log
    assert re.search(r"demo-1 ready from stopped in \d+\.\d+ s: start=\d+ms load=\d+ms", log)


async def test_a_host_without_criu_lacks_the_tier_and_says_so(tmp_path: Path) -> None:
    settings = {"runtime": {"process": {"criu": "no-such-criu"}}, "models": {"demo": engine_model(idle=QUICK)}}
    proxy = await Proxy(tmp_path / "w", settings=settings).listening()
    assert "no tier checkpointed with runtime process: no program 'no-such-criu'" in proxy.log.read_text()
    await proxy.ask()
    await proxy.until("suspended")
    assert (await proxy.ask())[0] == "suspended"
    proxy.process.terminate()
    assert await proxy.ended() == 0


@pytest.mark.criu
@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
async def test_a_restarted_proxy_goes_on_from_the_checkpoint(serve: Any) -> None:
    proxy: Proxy = await serve(idle=QUICK)
    text = (await proxy.ask())[1]
    boot = (await proxy.engine_state())["boot_id"]
    for kill in (signal.SIGTERM, signal.SIGKILL):
        await proxy.until("checkpointed")
        proxy.process.send_signal(kill)
        await proxy.ended()
        proxy.log.unlink()
        proxy = await serve(idle=QUICK)
        assert (await proxy.instance())["state"] == "checkpointed"
        assert await proxy.ask() == ("checkpointed", text)
        assert (await proxy.engine_state())["boot_id"] == boot


@pytest.mark.criu
@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
async def test_an_idle_checkpoint_is_tried_and_put_back(tmp_path: Path) -> None:
    settings = {"models": {"demo": engine_model(idle=QUICK)}, "pool": {"drill": "500ms"}}
    proxy = await Proxy(tmp_path / "warmpool", settings=settings).listening()
    text = (await proxy.ask())[1]
    boot = (await proxy.engine_state())["boot_id"]
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        passed = 0
        while passed < 2:
            await asyncio.sleep(0.1)
            metrics = await (await session.get(f"{proxy.url}/metrics")).text()
            found = re.search(r'warmpool_drills_total{model="demo",result="passed"} (\d+)', metrics)
            passed = int(found[1]) if found else 0
    assert await proxy.ask() in [("checkpointed", text), ("ready", text)]  # one may be under way
    assert (await proxy.engine_state())["boot_id"] == boot, "the same image, each time"
    proxy.process.terminate()
    assert await proxy.ended() == 0


async def test_killing_the_engine_mid_stream_breaks_the_answer_and_the_next_request_works(serve: Any) -> None:
    proxy: Proxy = await serve("--tokens-per-second", "20")
    text = (await proxy.ask())[1]
    pid = (await proxy.engine_state())["pid"]
    body = {**ASK, "stream": True, "max_tokens": 1000, "ignore_eos": True}
    with pytest.raises(aiohttp.ClientPayloadError):
        async with proxy.session.post("/v1/completions", json=body) as response:
            await response.content.readany()
            os.kill(pid, signal.SIGKILL)
            await response.read()
    # It may come before the end of the engine was noticed: then it finds a ready one, and is tried again.
    assert (await proxy.ask())[1] == text
    assert (await proxy.engine_state())["pid"] != pid


async def test_sigterm_lets_streams_finish_and_leaves_no_process(serve: Any) -> None:
    proxy: Proxy = await serve("--tokens-per-second", "20")
    await proxy.ask()
    body = {**ASK, "stream": True, "max_tokens": 30, "ignore_eos": True}
    async with proxy.session.post("/v1/completions", json=body) as response:
        await response.content.readany()
        proxy.process.terminate()
        rest = await response.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert await proxy.ended() == 0
    assert "stopped" in proxy.log.read_text().splitlines()[-1]


async def test_sigterm_waits_no_longer_than_drain_timeout(tmp_path: Path) -> None:
    settings = {
        "server": {"drain_timeout": "300ms"},
        "models": {"demo": engine_model("--tokens-per-second", "1", warmup={"requests": 0}, canary="never")},
    }
    proxy = await Proxy(tmp_path / "w", settings=settings).listening()
    body = {**ASK, "stream": True, "max_tokens": 1000, "ignore_eos": True}
    async with proxy.session.post("/v1/completions", json=body) as response:
        await response.content.readany()
        proxy.process.terminate()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert await proxy.ended() == 0


async def test_sigterm_during_a_start_leaves_no_process(serve: Any) -> None:
    proxy: Proxy = await serve("--hang-start")
    request = asyncio.create_task(proxy.ask())
    await proxy.until("waking")
    proxy.process.terminate()
    async with asyncio.timeout(PATIENCE_S):
        while "a second signal stops at once" not in proxy.log.read_text():
            await asyncio.sleep(0.01)
    proxy.process.terminate()
    with contextlib.suppress(aiohttp.ClientError, AssertionError):
        await request
    assert await proxy.ended() == 0


async def test_kill_9_of_the_proxy_leaves_no_process(serve: Any) -> None:
    proxy: Proxy = await serve("--processes", "2", forked=False)
    await proxy.ask()
    proxy.process.kill()
    assert await proxy.ended() == -signal.SIGKILL


async def test_json_logs_are_objects_without_prompts(serve: Any) -> None:
    proxy: Proxy = await serve(options=("--log-format", "json"))
    await proxy.ask(prompt="my secret prompt")
    proxy.process.terminate()
    await proxy.ended()
    lines = [orjson.loads(line) for line in proxy.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    request = next(line for line in lines if line["logger"] == "warmpool.request")
    assert (request["model"], request["status"], request["tier"]) == ("demo", 200, "stopped")
    assert "secret" not in proxy.log.read_text()


def serve_once(tmp_path: Path, settings: dict[str, Any]) -> tuple[int, str]:
    proxy = Proxy(tmp_path / "w", settings=settings)
    return proxy.process.wait(PATIENCE_S), proxy.log.read_text()


def test_what_cannot_be_served_ends_with_a_sentence_and_a_status(tmp_path: Path) -> None:
    status, log = serve_once(tmp_path, {"models": {}})
    assert (status, "Traceback" in log) == (78, False)
    assert "models" in log
    status, log = serve_once(
        tmp_path, {"server": {"host": "203.0.113.1", "allow_anyone": True}, "models": {"demo": engine_model()}}
    )
    assert (status, "Traceback" in log) == (69, False)
    assert "cannot listen on 203.0.113.1:0" in log
    assert "stopped" not in log, "it has never begun"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, log = serve_once(tmp_path, {"server": {"port": port}, "models": {"demo": engine_model()}})
    assert status == 69
    assert f"cannot listen on 127.0.0.1:{port}: the port is in use by process {os.getpid()} (" in log
