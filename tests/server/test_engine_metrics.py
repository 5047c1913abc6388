"""Engines' own metrics at `/metrics`, with real engines that sleep, are restored and end."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from proxy.pool import engine_scrape
from tests.server.test_http import ASK
from tests.support import PATIENCE_S, why_no_criu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.front import Front

GENERATED = "vllm:generation_tokens_total"


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_scrape, "_FRESH_S", 0.0)


async def scraped(front: Front) -> dict[tuple[str, ...], float]:
    """Name and labels of each of the engines' samples → its value."""
    async with front.session.get("/metrics") as response:
        assert response.status == 200
        text = await response.text()
    return {
        (s.name, *(f"{k}={v}" for k, v in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name.startswith("vllm:")
    }


def of(found: dict[tuple[str, ...], float], name: str, instance: str = "demo-1") -> float | None:
    return next((v for key, v in found.items() if key[0] == name and f"instance={instance}" in key), None)


async def do(front: Front, command: str, **body: Any) -> None:
    async with front.session.post(f"/admin/models/demo/{command}", json=body) as response:
        assert response.status == 200, await response.text()


def never_less(before: dict[tuple[str, ...], float], now: dict[tuple[str, ...], float]) -> None:
    for series, value in before.items():
        if series[0].endswith(("_total", "_bucket", "_sum", "_count")):
            assert now[series] >= value, series


async def test_an_awake_engine_is_asked_and_labelled_and_none_is_woken(front_of: Any) -> None:
    front: Front = await front_of("--sleep-mode")
    assert await scraped(front) == {}
    assert front.pool.status()["models"]["demo"]["instances"] == [], "it was not started"
    await front.post("/v1/completions", {**ASK, "max_tokens": 7, "ignore_eos": True})
    first = await scraped(front)
    assert (of(first, GENERATED) or 0) >= 7
    assert (GENERATED, "instance=demo-1", "model=demo", "model_name=demo") in first
    assert of(first, "vllm:num_requests_running") == 0
    assert not [key for key in first if key[0].startswith("loadtest")], "only what the configuration names"
    await do(front, "suspend")
    asleep = await scraped(front)
    never_less(first, asleep)
    assert of(asleep, "vllm:num_requests_running") is None, "how it was is not true any more"
    instance = front.pool.status()["models"]["demo"]["instances"][0]
    assert instance["tier"] == "suspended"
    assert front.sample("warmpool_engine_scrape_failures_total", model="demo") == 0


async def test_an_engine_that_is_started_anew_counts_on(front_of: Any) -> None:
    front: Front = await front_of()
    ask = {**ASK, "max_tokens": 7, "ignore_eos": True}
    total = 0.0
    before: dict[tuple[str, ...], float] = {}
    for _ in range(3):
        await front.post("/v1/completions", ask)
        now = await scraped(front)
        never_less(before, now)
        assert (of(now, GENERATED) or 0) >= total + 7
        total, before = of(now, GENERATED) or 0, now
        await do(front, "stop")
        never_less(before, await scraped(front))


async def test_one_that_ends_by_itself_counts_on(front_of: Any) -> None:
    front: Front = await front_of()
    await front.post("/v1/completions", ASK)
    before = await scraped(front)
    os.kill((await front.engine_state())["pid"], signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while front.sample("warmpool_engine_exits_total", model="demo") == 0:
            await asyncio.sleep(0.02)
    await front.post("/v1/completions", ASK)
    never_less(before, await scraped(front))


@pytest.fixture
async def odd(front: Front) -> AsyncIterator[Any]:
    """Has the engine of a front answer `/metrics` otherwise."""
    answers: dict[str, Any] = {}

    async def serve(request: web.Request) -> web.StreamResponse:
        answered: web.StreamResponse = await answers["now"](request)
        return answered

    app = web.Application()
    app.router.add_get("/metrics", serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def use(answer: Any) -> Front:
        answers["now"] = answer
        await front.post("/v1/completions", ASK)
        (instance,) = front.pool._state.models["demo"].instances.values()
        assert instance.client is not None
        client = instance.client
        own = client.base_url

        async def metrics(most_bytes: int) -> bytes | None:
            client.base_url = url
            try:
                return await type(client).metrics(client, most_bytes)
            finally:
                client.base_url = own

        client.metrics = metrics  # type: ignore[method-assign]
        return front

    yield use
    await runner.cleanup()


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(PATIENCE_S)
    return web.Response()


def fixed(**said: Any) -> Any:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(**said)

    return answer


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"vllm:x 1\n" * 10_000)


@pytest.mark.parametrize(
    "answer",
    [
        hang,
        endless,
        fixed(status=500),
        fixed(text="vllm:x{ 1"),
        fixed(body=b"\xff vllm:"),
    ],
    ids=["silent", "endless", "error", "malformed", "bytes"],
)
async def test_an_engine_that_says_nothing_of_use_is_counted_and_delays_nobody(
    odd: Any, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_scrape, "_LIMIT_S", 0.5)
    front: Front = await odd(answer)
    before = front.sample("warmpool_engine_scrape_failures_total", model="demo")
    assert await scraped(front) == {}
    assert front.sample("warmpool_engine_scrape_failures_total", model="demo") == before + 1


async def test_an_engine_without_metrics_is_no_failure(odd: Any) -> None:
    front: Front = await odd(fixed(status=404))
    assert await scraped(front) == {}
    assert front.sample("warmpool_engine_scrape_failures_total", model="demo") == 0


async def test_what_is_passed_on_is_as_the_configuration_says(front_of: Any) -> None:
    front: Front = await front_of()
    await front.post("/v1/completions", ASK)
    assert await scraped(front)
    pool = front.settings.pool.model_copy(update={"engine_metrics": []})
    changes = await front.pool.reconfigure(front.settings.model_copy(update={"pool": pool}))
    assert changes.live == ("pool.engine_metrics",)
    assert await scraped(front) == {}


async def test_many_who_ask_at_once_have_engines_asked_once(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    await front.post("/v1/completions", ASK)
    (instance,) = front.pool._state.models["demo"].instances.values()
    assert instance.client is not None
    asked, own = [], instance.client.metrics

    async def metrics(most_bytes: int) -> bytes | None:
        asked.append(most_bytes)
        return await own(most_bytes)

    monkeypatch.setattr(instance.client, "metrics", metrics)
    await asyncio.gather(*(front.pool.scrape_engines() for _ in range(20)))
    assert len(asked) == 1


@pytest.mark.criu
@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool in PATH (of Debian's package prometheus)")
async def test_in_prometheus_no_counter_of_a_restored_engine_goes_back(front_of: Any, tmp_path: Any) -> None:
    """A recorded scrape in promtool: what it counts as increase is what was asked, over restores and a sleep."""
    front: Front = await front_of("--sleep-mode")
    ask = {**ASK, "max_tokens": 7, "ignore_eos": True}
    recorded = []
    for command in ("checkpoint", "suspend", "checkpoint", "checkpoint"):
        for _ in range(3):
            await front.post("/v1/completions", ask)
            recorded.append(await scraped(front))
        await do(front, command)
        recorded.append(await scraped(front))
    for before, now in itertools.pairwise(recorded):
        never_less(before, now)
    started = of(recorded[0], GENERATED) or 0
    assert (of(recorded[-1], GENERATED) or 0) - started >= 11 * 7, "all that was asked after the first"
    assert (of(recorded[-1], GENERATED) or 0) - started <= 11 * 7 + 16 * 8, "and of the rest canaries at most"
    counters = [key for key in recorded[-1] if key[0].endswith(("_total", "_bucket", "_count", "_sum"))]
    lines = ["rule_files: []", "evaluation_interval: 1m", "tests:", "  - interval: 1m", "    input_series:"]
    for key in counters:
        labels = ",".join('{}="{}"'.format(*label.split("=", 1)) for label in key[1:])
        values = " ".join(f"{scrape.get(key, '_')}" for scrape in recorded)
        lines.append(f"      - {{series: '{key[0]}{{{labels}}}', values: '{values}'}}")
    lines.append("    promql_expr_test:")
    for name in sorted({key[0] for key in counters}):
        lines += [
            f"      - expr: sum(resets({name}[{len(recorded)}m]))",
            f"        eval_time: {len(recorded) - 1}m",
            "        exp_samples: [{labels: '{}', value: 0}]",
        ]
    file = tmp_path / "recorded.test.yml"
    file.write_text("\n".join(lines) + "\n")
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
