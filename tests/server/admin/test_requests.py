"""`/admin/requests` and `warmpool requests`: who asks, and what becomes of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest

from proxy.server import request_history
from proxy.server.key_usage.token_figures import said
from tests.server.auth.test_authorization import Keyed, keyed_of
from tests.server.test_http import ASK, error_of
from tests.support import PATIENCE_S, get_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.front import Front

__all__ = ["keyed_of"]

SECRET = "a-prompt-that-nobody-may-see"
HELD = {**ASK, "prompt": SECRET, "stream": True, "vllm_xargs": {"fault": "hold_mid_stream"}}
JSON = {"Content-Type": "application/json"}


async def listed(front: Front, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await get_json(f"{front.url}/admin/requests{query}"))["requests"]
    return found


async def until(front: Front, fit: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first request that is so."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for row in await listed(front):
                if fit(row):
                    return row
            await asyncio.sleep(0.01)


async def cancel(front: Front, request_id: str) -> int:
    async with front.session.post(f"/admin/requests/{request_id}/cancel", data=b"{}", headers=JSON) as response:
        return response.status


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
async def test_one_that_has_ended_says_what_it_was_and_never_what_was_asked(
    front_of: Any, keyed_of: Any, stream: bool, keyed: bool
) -> None:
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    ask = {**ASK, "prompt": SECRET, "max_tokens": 7, "ignore_eos": True, **more}
    if keyed:
        holder: Keyed = await keyed_of({"team": {"tokens_per_minute": 100_000}}, admin={})
        front, headers = holder.front, holder["team"]
    else:
        front, headers = await front_of(), {}
    response, answer = await front.post("/v1/completions", ask, headers=headers)
    assert response.status == 200, answer
    (row,) = await listed(front)
    assert row["id"] == response.headers["x-request-id"]
    assert (row["state"], row["status"], row["model"], row["tier"]) == ("ended", 200, "demo", "stopped")
    assert (row["key"], row["host"], row["path"]) == ("team" if keyed else None, "127.0.0.1", "/v1/completions")
    assert row["completion_tokens"] == 7
    assert row["prompt_tokens"] > 0
    assert row["wait_s"] > 0
    assert row["wait_s"] <= row["ttft_s"] <= row["total_s"]
    assert (row["tokens_per_s"] is not None) is stream
    assert SECRET not in str(await listed(front))


async def test_without_usage_events_of_a_stream_are_counted(front_of: Any) -> None:
    front: Front = await front_of()
    await front.post("/v1/completions", {**ASK, "max_tokens": 20, "ignore_eos": True, "stream": True})
    (row,) = await listed(front)
    assert abs(row["completion_tokens"] - 20) <= 2
    assert row["prompt_tokens"] is None


async def test_those_that_wait_run_and_are_refused(front_of: Any) -> None:
    front: Front = await front_of(max_concurrency=1)
    first = asyncio.create_task(front.post("/v1/completions", HELD))
    running = await until(front, lambda r: r["state"] == "running" and r["ttft_s"] is not None)
    assert running["instance"] == "demo-1"
    second = asyncio.create_task(front.post("/v1/completions", {**ASK, "prompt": SECRET}))
    waiting = await until(front, lambda r: r["state"] == "waiting")
    assert (waiting["instance"], waiting["status"]) == (None, None)
    assert [row["state"] for row in await listed(front, "?state=live")] == ["waiting", "running"], "the newest first"
    assert [row["id"] for row in await listed(front, "?state=waiting")] == [waiting["id"]]
    response, _ = await front.post("/v1/completions", {**ASK, "model": "none"})
    (refused,) = await listed(front, "?status=404")
    assert (refused["id"], refused["model"]) == (response.headers["x-request-id"], "unknown")
    assert SECRET not in str(await listed(front))
    for id_ in (waiting["id"], running["id"]):
        assert await cancel(front, id_) == 200
    with pytest.raises(aiohttp.ClientError):
        await first
    response, answer = await second
    assert (response.status, error_of(answer)["code"]) == (410, "request_cancelled")
    ended = {row["id"]: row for row in await listed(front, "?state=ended")}
    assert ended[running["id"]]["broken"] == "cancelled by an operator"
    assert await cancel(front, running["id"]) == 404
    async with asyncio.timeout(PATIENCE_S):
        while (await front.engine_state())["running"]:
            await asyncio.sleep(0.01)
    assert front.pool.status()["leases"] == 0


async def test_filters(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of()
    for name in ("team", "team", "other"):
        await keyed.ask(name, model="org/Other", max_tokens=1)
    front = keyed.front
    assert len(await listed(front, "?key=team&model=other")) == 2
    assert len(await listed(front, "?key=other")) == 1
    assert len(await listed(front, "?limit=1")) == 1
    assert await listed(front, "?model=demo") == []
    for query, param in (
        ("?colour=red", "colour"),
        ("?state=odd", "state"),
        ("?status=x", "status"),
        ("?limit=-1", "limit"),
    ):
        async with front.session.get(f"/admin/requests{query}") as response:
            assert (response.status, error_of(await response.read())["param"]) == (400, param)


async def test_only_the_last_are_kept_and_looking_counts_for_nothing(
    front_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_history, "KEPT", 20)
    front: Front = await front_of()
    for _ in range(3):
        await listed(front)
    assert await listed(front) == []
    for _ in range(20 + 5):
        await front.post("/v1/completions", {"model": "none"})
    assert len(await listed(front)) == 20


async def test_a_cancel_needs_the_content_type_of_commands(front: Front) -> None:
    async with front.session.post("/admin/requests/x/cancel") as response:
        assert response.status == 415
    assert await cancel(front, "x") == 404


def test_tokens_are_those_that_the_engine_says() -> None:
    assert said(b"") == (None, None, None)
    openai = {
        "prompt_tokens": 3,
        "total_tokens": 8,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert said(orjson.dumps({"usage": openai})) == (3, 5, 2)
    anthropic = b'"usage":{"input_tokens":9,"output_tokens":1}}}' + b'"usage":{"output_tokens":44}}'
    assert said(anthropic) == (9, 44, None)
    responses = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 6}
    assert said(orjson.dumps({"usage": responses})) == (7, 6, 0)
