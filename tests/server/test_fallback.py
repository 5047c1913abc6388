"""Another model that answers instead, and requests that begin alike."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from proxy.config.load import load
from proxy.errors import ConfigError
from proxy.server.auth import api_keys
from proxy.server.forward import near
from tests.fakes import Rig, settle
from tests.front import Front
from tests.pool.test_pool import rig_of
from tests.served import ASK
from tests.server.test_http import error_of
from tests.support import engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

__all__ = ["rig_of"]

BROKEN = {"process": {"command": ["false", "{port}"]}}


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Front]]]:
    """Makes a front with the models `demo` and `small`."""
    fronts: list[Front] = []

    async def make(*, server: dict[str, Any] | None = None, small: dict[str, Any] | None = None, **entry: Any) -> Front:
        models = {"demo": {**engine_model(), "fallback": "small", **entry}, "small": engine_model(**(small or {}))}
        fronts.append(Front(tmp_path / "front", models, **(server or {})))
        await fronts[0].open()
        return fronts[0]

    yield make
    for front in fronts:
        await front.close()
        assert front.pool.status()["leases"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_who_would_wait_too_long_is_answered_by_another_model(pair: Any, stream: bool) -> None:
    front: Front = await pair(fallback_wait="20s", aliases=["gpt"], small={"name": "org/Small"})
    response, answer = await front.post("/v1/completions", {**ASK, "model": "gpt", "stream": stream})
    assert (response.status, response.headers["x-warmpool-fallback"]) == (200, "small")
    assert response.headers["x-warmpool-instance"] == "small-1"
    assert b'"org/Small"' in answer
    assert front.pool.status()["models"]["demo"]["instances"] == []
    assert front.sample("warmpool_fallbacks_total", model="demo") == 1
    await front.pool.wake("demo")
    response, _ = await front.post("/v1/completions", ASK)
    assert (response.headers["x-warmpool-instance"], "x-warmpool-fallback" in response.headers) == ("demo-1", False)


async def test_without_a_limit_it_waits(pair: Any) -> None:
    front: Front = await pair()
    response, _ = await front.post("/v1/completions", ASK)
    assert (response.headers["x-warmpool-instance"], "x-warmpool-fallback" in response.headers) == ("demo-1", False)


async def test_what_cannot_start_is_stood_in_for_then_and_from_then_on(pair: Any) -> None:
    front: Front = await pair(**BROKEN)
    for _ in range(2):
        response, answer = await front.post("/v1/completions", ASK)
        assert (response.status, response.headers.get("x-warmpool-fallback")) == (200, "small"), answer


async def test_what_is_drained_is_stood_in_for(pair: Any) -> None:
    front: Front = await pair()
    front.pool.drain("demo")
    response, _ = await front.post("/v1/completions", ASK)
    assert (response.status, response.headers["x-warmpool-fallback"]) == (200, "small")
    front.pool.drain("small")
    response, answer = await front.post("/v1/completions", ASK)
    assert (response.status, error_of(answer)["code"]) == (503, "draining")


async def test_a_model_that_does_not_offer_the_route_stands_in_for_none(pair: Any) -> None:
    front: Front = await pair(small={"routes": {"completions": False}})
    front.pool.drain("demo")
    response, answer = await front.post("/v1/completions", ASK)
    assert (response.status, error_of(answer)["code"]) == (503, "draining")


async def test_a_key_that_is_not_good_for_it_gets_none(pair: Any, tmp_path: Path) -> None:
    shown = {}
    with api_keys.changing(tmp_path / "keys.toml") as entries:
        for name, models in (("team", None), ("narrow", ["demo"])):
            id_, shown[name], entries[id_] = api_keys.generate(name, models=models)
    front: Front = await pair(server={"keys_file": str(tmp_path / "keys.toml")})
    front.pool.drain("demo")
    for name, status in (("team", 200), ("narrow", 503)):
        response, _ = await front.post("/v1/completions", ASK, headers={"Authorization": f"Bearer {shown[name]}"})
        assert response.status == status, name


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ('fallback = "none"', "models.demo.fallback: there is no model 'none'; name one of: demo, small"),
        ('fallback = "demo"', "models.demo.fallback: is the model itself"),
        ('fallback_wait = "5s"', "models.demo.fallback_wait: needs fallback"),
    ],
)
def test_a_fallback_that_cannot_work_is_refused(tmp_path: Path, entry: str, problem: str) -> None:
    path = tmp_path / "warmpool.toml"
    command = 'process.command = ["engine", "{port}"]'
    path.write_text(f"[models.demo]\n{entry}\n{command}\n[models.small]\n{command}\n")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert problem in str(error.value)


# --- requests that begin alike ---


async def test_requests_that_begin_alike_go_to_one_instance_until_it_has_twice_as_many(rig_of: Any) -> None:
    rig: Rig = await rig_of({"demo": {"max_instances": 3, "min_ready": 3}})
    await rig.until(demo_1="ready", demo_2="ready", demo_3="ready")
    keys = [near.key_of(f"session-{n}", {}, b"") for n in range(90)]
    homes = {}
    for key in keys:
        lease = rig.pool.try_lease("demo", key)
        assert lease is not None
        homes[key] = lease.instance_id
        lease.release()
    assert min(Counter(homes.values()).values()) > 15, "spread evenly"
    for key in keys[:20]:
        lease = rig.pool.try_lease("demo", key)
        assert lease is not None
        assert lease.instance_id == homes[key]
        lease.release()
    many = [rig.pool.try_lease("demo", keys[0]) for _ in range(9)]
    counts = Counter(lease.instance_id for lease in many if lease is not None)
    assert len(counts) == 3
    assert counts.most_common(1)[0][0] == homes[keys[0]]
    for lease in many:
        assert lease is not None
        lease.release()
    others = [i for i in rig.states() if i != homes[keys[0]]]
    rig.runtime.kill(others[0])
    await settle()
    lease = rig.pool.try_lease("demo", keys[0])
    assert lease is not None
    assert lease.instance_id == homes[keys[0]], "others that go move nobody"
    lease.release()


SYSTEM = {"role": "system", "content": "You are terse."}
HELLO = {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {}}]}


def test_what_counts_is_the_session_or_the_head_of_the_prompt() -> None:
    def key(asked: object, session: str | None = None, body: bytes = b"") -> bytes | None:
        return near.key_of(session, asked, body)

    turn = key({"messages": [SYSTEM, HELLO]})
    assert turn is not None
    later = key({"max_tokens": 5, "messages": [SYSTEM, HELLO, {"role": "assistant", "content": "Hi"}]})
    assert later == turn
    assert key({"messages": [SYSTEM, {**HELLO, "content": "Good bye"}]}) != turn
    assert key({"messages": [SYSTEM, HELLO]}, "s1") == key({"prompt": "x"}, "s1") != turn
    assert key({"prompt": "x" * 2000}) == key({"prompt": "x" * 3000})
    assert key({"prompt": [1, 2]}) != key({"prompt": [1, 3]})
    assert key({"input": "a"}) != key({"input": "b"})
    nothings: list[object] = [
        {},
        {"messages": 5},
        {"messages": [5, {"content": None}]},
        {"prompt": None},
        {"prompt": []},
    ]
    for nothing in nothings:
        assert key(nothing) is None, nothing
    large = orjson.dumps({"prompt": "y" * 8000})
    assert key(object(), body=large) == key(object(), body=large + b" ")
