"""Many models: what is said of all of them costs in proportion, and holds nobody else up."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from prometheus_client import exposition

from proxy.config.settings import Settings
from proxy.pool import status as pool_status
from proxy.pool.instance import State
from proxy.pool.memory_report import MemoryReport
from proxy.pool.pool import Pool
from proxy.server.admin import events, pieces
from proxy.server.admin.status import Admin
from proxy.server.http_request import RequestHead
from proxy.server.own_routes import OwnRoutes
from proxy.telemetry import metrics
from proxy.telemetry.metrics import Metrics
from tests.fakes import FakeRuntime, model_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path


class Many:
    """A pool of many models, each with an alias, an instance and a past."""

    def __init__(self, folder: Path, count: int) -> None:
        self.settings = Settings(
            pool={"state_dir": str(folder / "state"), "checkpoint_dir": str(folder / "images")},
            models={f"m{n}": model_settings(aliases=[f"alias-{n}"]) for n in range(count)},
        )
        self.metrics = Metrics()
        self.pool = Pool(self.settings, {"process": FakeRuntime()}, self.metrics)
        for key, model in self.pool._state.models.items():
            self.pool._state.new_instance(model, f"{key}-1").adopt(State.CHECKPOINTED, 0.0)
            self.metrics.count_request(key, 200)
            for n in range(50):
                self.metrics.observe_ttft(key, "ready", n / 100)

    @property
    def admin(self) -> Admin:
        return Admin(self.pool, self.metrics, MemoryReport(self.settings.pool), lambda: None)


async def listed(many: Many) -> None:
    answer = OwnRoutes(many.pool).answer(RequestHead("GET", "/v1/models", [], http11=True, length=0), None)
    assert answer is not None
    assert answer[2].count(b'"object":"model"') == 2 * len(many.settings.models)


async def told(many: Many) -> None:
    assert len((await many.admin.read_status())["models"]) == len(many.settings.models)


async def scraped(many: Many) -> None:
    assert await many.metrics.scrape()


async def cpu_s(work: Callable[[Many], Coroutine[Any, Any, None]], many: Many) -> float:
    """Of the whole process, the least of three."""
    found = []
    gc.disable()
    try:
        for _ in range(3):
            began = time.process_time()
            await work(many)
            found.append(time.process_time() - began)
    finally:
        gc.enable()
    return min(found)


@pytest.mark.parametrize("work", [listed, told, scraped])
async def test_what_is_said_of_all_models_costs_in_proportion(work: Any, tmp_path: Path) -> None:
    few, many = Many(tmp_path / "few", 100), Many(tmp_path / "many", 400)
    assert await cpu_s(work, many) < 8 * await cpu_s(work, few)


async def test_the_status_looks_at_a_few_models_in_one_turn_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, looked_at = 0, Counter[int]()
    whole = pool_status.model_status

    def noted(*args: Any) -> dict[str, Any]:
        looked_at[turn] += 1
        return whole(*args)

    monkeypatch.setattr(pool_status, "model_status", noted)
    working = asyncio.create_task(told(Many(tmp_path, 300)))
    while not working.done():
        turn += 1
        await asyncio.sleep(0)
    await working
    assert sum(looked_at.values()) == 300
    assert max(looked_at.values()) <= 10


async def test_metrics_are_brought_up_to_date_in_turns_and_written_by_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Many(tmp_path, 300)
    turn, changed, writers = 0, Counter[int](), list[int]()
    labels = many.metrics.queue_depth.labels

    def noted(*values: Any) -> Any:
        changed[turn] += 1
        return labels(*values)

    def written(registry: Any) -> bytes:
        writers.append(threading.get_ident())
        return exposition.generate_latest(registry)

    monkeypatch.setattr(many.metrics.queue_depth, "labels", noted)
    monkeypatch.setattr(metrics, "generate_latest", written)
    scraping = asyncio.create_task(many.metrics.scrape())
    while not scraping.done():
        turn += 1
        await asyncio.sleep(0)
    text = await scraping
    assert sum(changed.values()) == 300
    assert max(changed.values()) <= 10
    assert len(writers) == 1
    assert threading.get_ident() not in writers
    monkeypatch.undo()
    plain = [line for line in text.splitlines() if not line.startswith(b"process_")]
    assert plain == [
        line
        for line in exposition.generate_latest(many.metrics.registry).splitlines()
        if not line.startswith(b"process_")
    ]
    assert b'warmpool_requests_total{model="m7",status="200"} 1.0' in plain


async def test_requests_that_end_while_metrics_are_read_are_counted_once(tmp_path: Path) -> None:
    many = Many(tmp_path, 50)
    scraping = asyncio.create_task(many.metrics.scrape())
    for _ in range(100):
        many.metrics.count_request("m1", 200)
        many.metrics.observe_ttft("m1", "sleeping", 0.1)
        await asyncio.sleep(0)
    await scraping
    assert b'warmpool_requests_total{model="m1",status="200"} 101.0' in exposition.generate_latest(
        many.metrics.registry
    )
    assert b'warmpool_requests_total{model="m1",status="200"} 101.0' in await many.metrics.scrape()


@pytest.mark.parametrize("path", ["/metrics", "/admin/status"])
async def test_long_answers_are_written_a_piece_in_each_turn_of_the_loop(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Many(tmp_path, 700)
    turn, written = 0, Counter[int]()
    write = web.StreamResponse.write

    async def noted(self: web.StreamResponse, data: Any) -> None:
        written[turn] += len(data)
        await write(self, data)

    async def turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(web.StreamResponse, "write", noted)
    application = web.Application()
    application.router.add_get("/metrics", many.admin.metrics)
    application.router.add_get("/admin/status", many.admin.status)
    counting = asyncio.create_task(turns())
    async with TestServer(application) as server, ClientSession() as session:
        async with session.get(server.make_url(path)) as response:
            body = await response.read()
        assert response.status == 200
        assert response.content_length == len(body)
        async with session.head(server.make_url(path)) as response:
            assert (response.status, await response.read()) == (200, b"")
    counting.cancel()
    assert sum(written.values()) == len(body) > 2 * pieces.PIECE_BYTES
    assert max(written.values()) <= pieces.PIECE_BYTES


async def test_two_states_of_many_models_are_compared_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = Many(tmp_path, 300)
    turn, compared = 0, Counter[int]()
    old = await many.admin.read_status()
    many.pool._state.models["m7"].draining = True
    new = {**await many.admin.read_status(), "ready": not old["ready"]}
    del new["models"]["m8"], new["wakes"]
    new["models"]["another"] = {}
    whole = events.merge_patch

    def noted(*args: Any) -> dict[str, Any]:
        compared[turn] += 1
        return whole(*args)

    monkeypatch.setattr(events, "merge_patch", noted)
    comparing = asyncio.create_task(events.patch_in_turns(old, new))
    while not comparing.done():
        turn += 1
        await asyncio.sleep(0)
    patch = await comparing
    monkeypatch.undo()
    assert patch == whole(old, new)
    assert (patch["models"]["m7"], patch["models"]["m8"], patch["wakes"]) == ({"draining": True}, None, None)
    assert compared.total() >= 600
    assert max(compared.values()) <= 60
