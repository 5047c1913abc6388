"""What a client sees while it waits: heartbeats, its own limit, the request's id; and what is answered at once."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import openai
import orjson
import pytest

from proxy.engine.http1 import chunk
from proxy.errors import MaxWaitError, RuntimeFailure
from proxy.server.forward import answer as answers
from proxy.server.forward.heartbeat import COMMENT, Heartbeat
from proxy.tiers import Tier
from tests.fakes import Rig, settle
from tests.scripted import Peer, Scripted, answer_of, post
from tests.server.test_http import ASK, error_of
from tests.support import PATIENCE_S, get_json

if TYPE_CHECKING:
    from pathlib import Path

    from tests.front import Front

STREAM = {**ASK, "stream": True}
EVERY = {"heartbeat": "100ms"}


def events_of(answer: bytes) -> list[Any]:
    """The data of the events of a stream, comments left out."""
    lines = [line for line in answer.replace(COMMENT, b"").decode().split("\n\n") if line]
    return [orjson.loads(d) if (d := line.split("data: ")[1]) != "[DONE]" else d for line in lines]


# --- heartbeats ---


async def test_a_stream_is_kept_alive_while_its_model_wakes(front_of: Any) -> None:
    front: Front = await front_of("--load-seconds", "1", server=EVERY)
    response, answer = await front.post("/v1/completions", STREAM)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["x-warmpool-tier"] == "stopped"
    assert answer.startswith(COMMENT * 3)
    assert events_of(answer)[-1] == "[DONE]"
    rest = answer.replace(COMMENT, b"")
    _, warm = await front.post("/v1/completions", STREAM)
    assert not warm.startswith(b":"), "nothing to wait for"
    assert [e["choices"] for e in events_of(rest)[:-1]] == [e["choices"] for e in events_of(warm)[:-1]]


async def test_there_is_none_for_others_and_none_unless_switched_on(front_of: Any) -> None:
    front: Front = await front_of("--load-seconds", "1", server=EVERY)
    response, answer = await front.post("/v1/completions", ASK)
    assert (response.status, response.content_type, b": " in answer[:2]) == (200, "application/json", False)
    quiet: Front = await front_of("--load-seconds", "1")
    _, answer = await quiet.post("/v1/completions", STREAM)
    assert answer.startswith(b"data:")


async def test_a_later_error_is_an_event(front_of: Any, tmp_path: Path) -> None:
    marker = tmp_path / "fail"
    marker.touch()
    front: Front = await front_of("--fail-file", str(marker), "--load-seconds", "1", server=EVERY)
    response, answer = await front.post("/v1/completions", STREAM)
    assert response.status == 200
    assert answer.startswith(COMMENT)
    assert answer.replace(COMMENT, b"").startswith(b"event: error\ndata: ")
    event = events_of(answer)[-1]
    assert (event["type"], event["error"]["code"]) == ("error", "wake_failed")
    assert front.sample("warmpool_requests_total", model="demo", status="503") == 1
    front.pool.undrain("demo")  # else it is refused at once, before a stream begins
    async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(model="demo", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="could not be started") as raised:
            [_ async for _ in stream]
        assert raised.value.code == "wake_failed"


async def test_an_engines_refusal_is_an_event_too(front_of: Any) -> None:
    front: Front = await front_of("--load-seconds", "1", server=EVERY)
    response, answer = await front.post("/v1/completions", {**STREAM, "max_tokens": 0})
    assert (response.status, events_of(answer)[-1]["error"]["type"]) == (200, "BadRequestError")
    assert front.sample("warmpool_requests_total", model="demo", status="400") == 1


async def test_an_early_error_keeps_its_status(front_of: Any) -> None:
    front: Front = await front_of(server=EVERY)
    response, answer = await front.post("/v1/completions", {**STREAM, "model": "other"})
    assert (response.status, error_of(answer)["code"]) == (404, "model_not_found")


async def test_a_client_that_leaves_between_heartbeats_leaves_nothing(front_of: Any) -> None:
    front: Front = await front_of("--hang-start", start_timeout="60s", server=EVERY)
    async with front.session.post("/v1/completions", json=STREAM) as response:
        assert await response.content.readexactly(len(COMMENT)) == COMMENT
        response.close()
    async with asyncio.timeout(PATIENCE_S):
        while front.pool.status()["models"]["demo"]["queue"]:
            await asyncio.sleep(0.01)
    assert "heartbeat" not in {task.get_name() for task in asyncio.all_tasks()}


SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
TO_STREAM = post(orjson.dumps(STREAM), "Connection: close")


def test_a_comment_ends_with_one_newline() -> None:
    """An empty line is an event to some clients."""
    assert COMMENT.count(b"\n") == 1
    assert COMMENT.endswith(b"\n")


async def test_comments_go_on_until_the_first_event_and_in_every_silence() -> None:
    event = chunk(b"data: {}\n\n")

    async def two_comments(_: Peer) -> None:
        seen = proxy.received.count(COMMENT)
        while proxy.received.count(COMMENT) < seen + 2:
            await asyncio.sleep(0.01)

    async with Scripted(server=EVERY) as proxy, asyncio.timeout(PATIENCE_S):
        head = SSE + b"transfer-encoding: chunked\r\n\r\n"
        raw = await proxy.ask(TO_STREAM, head, two_comments, event, two_comments, event + b"0\r\n\r\n")
    status, fields, body, _ = answer_of(raw)
    assert (status, fields["cache-control"], fields["x-accel-buffering"]) == (200, "no-cache", "no")
    before, between, after = body.split(b"data: {}\n\n")
    assert before.replace(COMMENT, b"") == between.replace(COMMENT, b"") == after == b""
    assert min(before.count(COMMENT), between.count(COMMENT)) >= 2


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("framing", ["chunked", "until its end", "with a length"])
async def test_no_comment_is_put_into_an_event(ends: bytes, framing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the stream is cut, in bytes and in chunks."""
    monkeypatch.setattr(answers, "Heartbeat", lambda _, beat: Heartbeat(0.001, beat))
    event = b"event: a" + ends + b"data: {}" + ends + ends
    stream = event * 2

    async def pause(_: Peer) -> None:
        await asyncio.sleep(0.005)

    between = 0
    async with Scripted(server=EVERY) as proxy:
        for cut in range(1, len(stream), 1 if framing == "chunked" else 3):
            steps: list[Any] = []
            for piece in (stream[:cut], stream[cut:]):
                data = chunk(piece) if framing == "chunked" else piece
                steps += [data[:2], pause, data[2:], pause]
            field = {
                "chunked": b"transfer-encoding: chunked\r\n", "until its end": b"",
                "with a length": b"content-length: %d\r\n" % len(stream),
            }[framing]  # fmt: skip
            end = [b"0\r\n\r\n"] if framing == "chunked" else [Peer.close]
            raw = await proxy.ask(TO_STREAM, SSE + field + b"\r\n", *steps, *end)
            body = answer_of(raw)[2]
            assert body.replace(COMMENT, b"") == stream, f"cut at {cut}"
            assert all(part in (b"", event) for part in re.split(b"(?<=%b)|%b" % (ends * 2, COMMENT), body)), body
            between += body.count(COMMENT)
    assert between or ends == b"\r" or framing == "with a length"


# --- x-warmpool-max-wait ---


async def test_what_cannot_be_met_is_refused_at_once_and_wakes_nothing(front: Front) -> None:
    for limit in ("0", "2.5", "500ms", "1m"):
        response, answer = await front.post("/v1/completions", ASK, headers={"x-warmpool-max-wait": limit})
        assert (response.status, error_of(answer)["code"]) == (503, "max_wait_exceeded")
        assert int(response.headers["Retry-After"]) == 100, "a cold start, before one was measured"
    assert "100.0 s" in error_of(answer)["message"]
    assert front.pool.status()["models"]["demo"]["instances"] == []
    response, _ = await front.post("/v1/completions", ASK, headers={"x-warmpool-max-wait": "2m"})
    assert response.status == 200
    response, _ = await front.post("/v1/completions", ASK, headers={"x-warmpool-max-wait": "0"})
    assert response.status == 200, "it is ready"


@pytest.mark.parametrize("limit", ["", "soon", "-1", "nan", "inf", "1e3", "5 parsecs"])
async def test_a_limit_that_is_none_is_refused(front: Front, limit: str) -> None:
    response, answer = await front.post("/v1/completions", ASK, headers={"x-warmpool-max-wait": limit})
    assert (response.status, error_of(answer)["code"]) == (400, "invalid_request")


async def test_it_bounds_the_wait_and_the_wake_goes_on() -> None:
    rig = Rig()
    rig.pool._state.costs.record("demo", Tier.STOPPED, 0.05)
    rig.runtime.gates["start"] = asyncio.Event()
    await rig.pool.open()
    with pytest.raises(MaxWaitError, match=r"within 0\.1 s"):
        await rig.pool.lease("demo", max_wait_s=0.1)
    assert rig.states() == {"demo-1": "waking"}
    rig.runtime.gates["start"].set()
    await rig.until(demo_1="ready")
    await rig.pool.close()


async def test_the_estimate_shrinks_while_a_wake_is_under_way() -> None:
    rig = Rig()
    rig.runtime.gates["start"] = asyncio.Event()
    await rig.pool.open()
    waiting = asyncio.create_task(rig.pool.lease("demo"))
    await settle()
    assert rig.pool.estimate_s("demo") == 100
    rig.clock.now += 60
    assert rig.pool.estimate_s("demo") == 40
    rig.clock.now += 60
    assert rig.pool.estimate_s("demo") == 0
    rig.runtime.gates["start"].set()
    (await waiting).release()
    await rig.pool.close()


async def test_a_lease_is_on_the_preferred_instance_if_that_is_ready() -> None:
    rig = Rig({"demo": {"max_instances": 2, "min_ready": 2}})
    await rig.pool.open()
    await rig.until(demo_1="ready", demo_2="ready")
    leases = [await rig.pool.lease("demo", preferred="demo-2") for _ in range(3)]
    assert {lease.instance_id for lease in leases} == {"demo-2"}
    other = await rig.pool.lease("demo", preferred="demo-9")
    assert other.instance_id == "demo-1"
    for lease in (*leases, other):
        lease.release()
    await rig.pool.close()


async def one_ready_and_one_below(seconds: float) -> Rig:
    """demo-1 is ready, and demo-2 as far down as it goes in this time."""
    idle = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}
    rig = Rig({"demo": {"max_instances": 2, "max_concurrency": 1, "idle": idle}})
    await rig.pool.open()
    first, second = await asyncio.gather(rig.pool.lease("demo"), rig.pool.lease("demo"))
    assert (first.instance_id, second.instance_id) == ("demo-1", "demo-2")
    second.release()
    for _ in range(int(seconds) // 10):
        await rig.pass_time(10)
    first.release()
    return rig


@pytest.mark.parametrize(
    ("seconds", "state", "tier"), [(10, "sleeping", Tier.SLEEPING), (20, "suspended", Tier.SUSPENDED)]
)
async def test_the_preferred_instance_is_woken_though_another_is_ready(seconds: int, state: str, tier: Tier) -> None:
    rig = await one_ready_and_one_below(seconds)
    assert rig.states() == {"demo-1": "ready", "demo-2": state}
    async with await rig.pool.lease("demo", preferred="demo-2") as lease:
        assert (lease.instance_id, lease.found) == ("demo-2", tier)
        assert lease.wake is not None
        assert lease.wake.found is tier
    await rig.pool.close()


async def test_one_whose_engine_has_ended_is_not() -> None:
    rig = await one_ready_and_one_below(30)
    assert rig.states() == {"demo-1": "ready", "demo-2": "checkpointed"}
    async with await rig.pool.lease("demo", preferred="demo-2") as lease:
        assert (lease.instance_id, lease.found) == ("demo-1", Tier.READY)
    assert rig.states()["demo-2"] == "checkpointed"
    await rig.pool.close()


async def test_who_waits_for_one_instance_holds_nobody_up_and_is_served_by_another_when_that_breaks() -> None:
    rig = await one_ready_and_one_below(20)
    rig.runtime.gates["resume"] = asyncio.Event()
    waiting = asyncio.create_task(rig.pool.lease("demo", preferred="demo-2"))
    await settle()
    assert rig.states() == {"demo-1": "ready", "demo-2": "waking"}
    async with await rig.pool.lease("demo") as other:
        assert other.instance_id == "demo-1"
        await settle()
        assert not waiting.done()
    rig.runtime.failures.update(resume=[RuntimeFailure("resume", "broke")], start=[RuntimeFailure("start", "broke")])
    rig.runtime.gates["resume"].set()
    async with await waiting as lease:
        assert lease.instance_id == "demo-1"
    await rig.pool.close()


async def test_a_request_that_left_wakes_nothing_in_its_name() -> None:
    rig = await one_ready_and_one_below(20)
    rig.runtime.gates["resume"] = asyncio.Event()
    waiting = asyncio.create_task(rig.pool.lease("demo", preferred="demo-2"))
    await settle()
    waiting.cancel()
    await settle()
    rig.runtime.gates["resume"].set()
    await rig.until(demo_2="ready")
    await rig.pass_time(10)
    await rig.pass_time(10)
    assert rig.states() == {"demo-1": "suspended", "demo-2": "suspended"}
    await rig.pass_time(1)
    assert rig.states() == {"demo-1": "suspended", "demo-2": "suspended"}
    await rig.pool.close()


# --- x-request-id ---


async def test_the_id_of_a_request_goes_everywhere(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "warmpool")
    for path, body in (("/v1/completions", ASK), ("/v1/completions", {}), ("/nothing", {})):
        response, _ = await front.post(path, body, headers={"X-Request-ID": "abc-1"})
        assert response.headers.getall("x-request-id") == ["abc-1"]
    assert [m for m in caplog.messages if "request_id=abc-1" in m and "status=200" in m]
    assert (await get_json(f"{await front.engine()}/debug/state"))["last_request_id"] == "abc-1"


@pytest.mark.parametrize("given", [[], ["a b"], ["x" * 129], ["\u00e9"], ["a\tb"], [""], ["a", "b"], ['"><script>']])
async def test_one_is_made_where_none_can_be_used(front: Front, given: list[str]) -> None:
    headers = [("X-Request-ID", value) for value in given]
    made = set()
    for _ in range(2):
        async with front.session.get("/v1/models", headers=headers) as response:
            made.add(response.headers["x-request-id"])
    assert len(made) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in made)


# --- answered here ---


async def test_models_say_their_tier_and_the_expected_wait(front_of: Any) -> None:
    front: Front = await front_of(aliases=["gpt"], adapters=["sql-lora"])
    listed = {m["id"]: m for m in (await get_json(f"{front.url}/v1/models"))["data"]}
    assert list(listed) == ["demo", "gpt", "sql-lora"]
    for model in listed.values():
        assert (model["tier"], model["expected_wait_s"], model["root"]) == ("stopped", 100, "demo")
    assert (listed["sql-lora"]["parent"], listed["gpt"]["parent"]) == ("demo", None)
    await front.post("/v1/completions", ASK)
    one = await get_json(f"{front.url}/v1/models/gpt")
    assert (one["tier"], one["expected_wait_s"]) == ("ready", 0)


async def test_version_and_ping_wake_nothing(front: Front) -> None:
    assert set(await get_json(f"{front.url}/version")) == {"version"}
    for method in ("GET", "POST", "HEAD"):
        async with front.session.request(method, "/ping") as response:
            assert (response.status, await response.read()) == (200, b"")
    assert front.pool.status()["models"]["demo"]["instances"] == []
    front.pool.drain()
    async with front.session.get("/ping") as response:
        assert response.status == 503
