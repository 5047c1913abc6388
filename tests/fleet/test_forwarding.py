"""A request that came in on one host is answered by another, as if it were one."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import aiohttp
import orjson
import pytest

from proxy.engine.connection import SilenceError, Upstream
from proxy.fleet.tls import client_context
from tests.fleet import certificates
from tests.fleet.hosts import Hosts, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from proxy.engine.connection import Connection
    from tests.fleet.hosts import Host


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    async with Hosts(tmp_path) as made:
        yield made


async def warm(host: Host, model: str = "m", *, for_: Host) -> None:
    """Have it ready there, and known to be."""
    await host.pool.wake(model)
    await until(lambda: (for_.offers(model, host) or [""])[0] == "ready")


async def test_a_model_that_is_ready_elsewhere_is_found_there(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    said, response = await a.ask()
    assert said["host"] == "b"
    assert response.headers["x-warmpool-host"] == "b"
    assert response.headers["x-warmpool-instance"] == "b/m-1"
    assert response.headers["x-warmpool-tier"] == "ready"
    assert response.headers["server-timing"].startswith("hop;desc=b;dur=")
    assert "queue;dur=" in response.headers["server-timing"]
    assert len(response.headers.getall("x-request-id")) == len(response.headers.getall("server")) == 1
    assert not a.runtime.calls["start"]
    said, response = await b.ask()
    assert response.headers["x-warmpool-host"] == "b"
    assert "hop" not in response.headers["server-timing"]
    assert a.forwarded("b", "answered") == 1


async def test_tokens_count_where_they_were_asked_for_and_gpu_time_where_it_was_had(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    said, _ = await a.ask()
    assert said["host"] == "b"
    (asked,) = await a.service.usage.rows(1)
    assert (asked["model"], asked["requests"], asked["gpu_seconds"] + asked["idle_gpu_seconds"]) == ("m", 1, 0.0)
    (answered,) = await b.service.usage.rows(1)
    assert answered["requests"] == 0, "it is counted once"
    assert answered["gpu_seconds"] + answered["idle_gpu_seconds"] > 0


async def test_a_model_that_only_another_host_has_is_listed_and_answered(hosts: Hosts) -> None:
    a, b = await hosts.host("a", {"m": {}}), await hosts.host("b", {"n": {"name": "org/n"}})
    await hosts.acquainted()
    async with a.session.get("/v1/models") as response:
        assert [each["id"] for each in (await response.json())["data"]] == ["m", "org/n"]
    async with a.session.get("/v1/models/org/n") as response:
        assert (await response.json())["tier"] == "stopped"
    said, response = await a.ask("org/n")
    assert (said["host"], said["model"]) == ("b", "org/n")
    said, response = await a.ask("none")
    assert response.status == 404
    assert b.runtime.calls["start"] == 1


async def test_a_gateway_has_no_models_and_answers_by_every_name_that_hosts_have(hosts: Hosts) -> None:
    gate = await hosts.host("gate", {})
    host = await hosts.host("a", {"m": {"name": "org/m", "aliases": ["short"], "adapters": ["tuned"]}})
    await hosts.acquainted()
    async with gate.session.get("/v1/models") as response:
        listed = {each["id"]: each["root"] for each in (await response.json())["data"]}
    assert listed == dict.fromkeys(("org/m", "short", "tuned"), "org/m")
    for called, engines in (("org/m", "org/m"), ("short", "org/m"), ("tuned", "tuned")):
        said, response = await gate.ask(called)
        assert (said["host"], said["model"]) == ("a", engines)
    assert host.fleet.status()["hosts"]["gate"]["role"] == "gateway"


async def test_another_model_does_not_stand_in_for_one_that_is_ready_elsewhere(hosts: Hosts) -> None:
    models = {"m": {"fallback": "other", "fallback_wait": "0s"}, "other": {}}
    a, b = await hosts.host("a", models), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    said, response = await a.ask()
    assert (said["host"], said["model"]) == ("b", "m")
    assert "x-warmpool-fallback" not in response.headers


async def test_a_cold_model_is_woken_once_whoever_is_asked(hosts: Hosts) -> None:
    made = [await hosts.host(name) for name in ("a", "b", "c")]
    await hosts.acquainted()
    answers = await asyncio.gather(*(host.ask() for host in made for _ in range(4)))
    assert len({said["host"] for said, _ in answers}) == 1
    assert sum(host.runtime.calls["start"] for host in made) == 1


async def test_streams_come_as_they_are_made_and_a_client_that_leaves_ends_its_engines_request(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    b.go_on.clear()
    body = {"model": "m", "prompt": "x", "stream": True, "events": 1000}
    async with a.session.post("/v1/completions", json=body) as response:
        first = await response.content.readline()
        assert orjson.loads(first[6:])["host"] == "b"
        assert b.pool.status()["leases"] == 1
    await until(lambda: b.pool.status()["leases"] == 0)
    b.go_on.set()
    await until(lambda: b.left == 1)


async def test_a_whole_stream_comes_through(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    body = {"model": "m", "prompt": "x", "stream": True, "events": 200, "pad": 2000}
    async with a.session.post("/v1/completions", json=body) as response:
        events = [line for line in (await response.read()).split(b"\n\n") if line]
    assert [orjson.loads(event[6:])["n"] for event in events] == list(range(200))


async def test_a_slow_client_holds_the_engine_back_over_both_hosts(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    body = {"model": "m", "prompt": "x", "stream": True, "events": 4000, "pad": 20_000}
    async with a.session.post("/v1/completions", json=body) as response:
        await response.content.readany()
        (cycle,) = [c.cycle for c in b.service.connections if c.cycle is not None]
        await until(lambda: cycle.connection.write_paused)
        assert cycle.answer is not None
        assert cycle.answer.events < 4000
    await until(lambda: b.pool.status()["leases"] == 0)


async def test_what_hosts_tell_one_another_means_nothing_from_a_client(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    marks = {
        "x-warmpool-from": "evil", "x-warmpool-hop": "1", "x-warmpool-key": "other", "x-warmpool-priority": "1",
        "x-warmpool-expected-wait": "0",
    }  # fmt: skip
    said, _ = await a.ask(headers=marks)
    assert said["host"] == "b"
    await b.ask(headers=marks)
    assert all(b"x-warmpool" not in head.lower() and b"evil" not in head for head in b.heads)


async def test_a_host_that_would_have_it_wait_says_so_and_another_takes_it(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b", {"m": {"max_concurrency": 1, "max_instances": 1}})
    await hosts.acquainted()
    await warm(b, for_=a)
    hosts.exchange.lose = lambda subject, _: subject == "t.state.b" or subject.endswith(".state.b")
    b.go_on.clear()
    async with b.session.post("/v1/completions", json={"model": "m", "prompt": "x", "stream": True}) as response:
        await response.content.readline()
        said, answer = await a.ask()
        assert said["host"] == "a"
        assert answer.headers["x-warmpool-host"] == "a"
        b.go_on.set()
    assert a.forwarded("b", "refused") == 1


async def test_a_host_that_cannot_be_reached_is_passed_over_and_rests(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    b.peers_site.stop()
    said, _ = await a.ask()
    assert said["host"] == "a"
    assert a.fleet.status()["hosts"]["b"]["rests_s"] > 0


async def test_a_host_that_is_out_of_reach_for_a_moment_is_tried_again_where_no_other_has_the_model(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = await hosts.host("a", {}), await hosts.host("b")
    await hosts.acquainted()
    failed = list[Upstream]()
    connect = Upstream.connect

    async def connect_late(upstream: Upstream) -> Connection:
        if upstream.tls is not None and len(failed) < 2:
            failed.append(upstream)
            raise SilenceError("no connection within 3 s")
        return await connect(upstream)

    monkeypatch.setattr(Upstream, "connect", connect_late)
    said, _ = await a.ask()
    assert said["host"] == "b"
    assert len(failed) == 2
    assert a.forwarded("b", "failed") == 2
    async with a.session.get("/v1/models") as response:
        assert [each["id"] for each in (await response.json())["data"]] == ["m"]


async def test_an_engine_that_breaks_there_is_an_error_of_that_host(hosts: Hosts) -> None:
    a, b = await hosts.host("a", {}), await hosts.host("b")
    await hosts.acquainted()
    b.breaks = True
    said, response = await a.ask()
    assert response.status == 502
    assert said["error"]["code"]


async def test_what_refers_to_a_response_goes_to_the_host_that_made_it_as_long_as_that_can(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)

    async def respond(**more: str) -> str:
        async with a.session.post("/v1/responses", json={"model": "m", "input": "Hello", **more}) as response:
            assert response.status == 200
            said = await response.json()
        first.append(said["id"])
        return str(said["host"])

    first = list[str]()
    assert await respond() == "b"
    await a.pool.wake("m")
    assert await respond() == "a"
    for _ in range(3):
        assert await respond(previous_response_id=first[0]) == "b"
    b.peers_site.stop()
    await a.fleet.close_peers()
    assert await respond(previous_response_id=first[0]) == "a"


async def test_a_draining_host_sends_its_requests_elsewhere_and_gets_none(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(a, for_=b)
    a.pool.drain(None)
    await until(lambda: b.fleet.table.hosts["a"].drain)
    for host in (a, b):
        said, _ = await host.ask()
        assert said["host"] == "b"
    a.pool.undrain(None)
    await until(lambda: not b.fleet.table.hosts["a"].drain)


async def test_keys_are_asked_for_once_and_named_on_the_other_host(hosts: Hosts, tmp_path: Path) -> None:
    from proxy.server.auth import api_keys

    file = tmp_path / "keys.toml"
    id_, key, entry = api_keys.generate("alice")
    with api_keys.changing(file) as entries:
        entries[id_] = entry
    a, b = await hosts.host("a", keys_file=str(file)), await hosts.host("b", keys_file=str(file))
    await hosts.acquainted()
    await warm(b, for_=a)
    said, response = await a.ask()
    assert response.status == 401
    said, response = await a.ask(headers={"Authorization": f"Bearer {key}"})
    assert said["host"] == "b"
    row = next(iter(b.service.history.rows()))
    assert (row["key"], row["status"]) == ("alice", 200)
    assert b"authorization" not in b.heads[-1].lower()


async def test_nobody_comes_in_as_a_host_without_its_certificate(hosts: Hosts, tmp_path: Path) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    url, body = str(b.settings.fleet.url), {"model": "m", "prompt": "x"}
    good = client_context(a.settings.fleet)
    other = tmp_path / "other"
    certificates.authority(other)
    certificate, key = certificates.certificate(other, "a")
    wrong = client_context(a.settings.fleet.model_copy(update={"certificate": certificate, "key": key}))
    none = ssl.create_default_context(cafile=str(a.settings.fleet.ca))
    async with aiohttp.ClientSession() as session:

        async def asked(context: ssl.SSLContext, path: str = "/v1/completions", **marks: str) -> int:
            headers = {f"x-warmpool-{name}": value for name, value in marks.items()}
            async with session.post(
                url + path, json=body, headers=headers, ssl=context, server_hostname="b"
            ) as response:
                return response.status

        for _ in range(3):  # the heads are known after the first time
            assert await asked(good, **{"from": "a", "hop": "1"}) == 200
            assert await asked(good, **{"from": "b", "hop": "1"}) == 403
            assert await asked(good, hop="1") == 403
            assert await asked(good, **{"from": "a", "hop": "2"}) == 400
            assert await asked(good, "/admin/drain", **{"from": "a", "hop": "1"}) == 403
        for context in (wrong, none):
            with pytest.raises(aiohttp.ClientError):
                await asked(context, **{"from": "a", "hop": "1"})
        with pytest.raises(aiohttp.ClientError):  # it is b, and says so
            async with session.post(url, json=body, ssl=good, server_hostname="c"):
                pass


async def test_a_request_goes_no_further_than_one_hop(hosts: Hosts) -> None:
    a, b, c = await hosts.host("a", {}), await hosts.host("b"), await hosts.host("c")
    await hosts.acquainted()
    await warm(c, for_=a)
    await warm(c, for_=b)
    for _ in range(5):
        said, _ = await a.ask()
        assert said["host"] == "c"
    assert not b.heads


async def test_without_the_bus_requests_go_where_they_went(hosts: Hosts) -> None:
    a, b = await hosts.host("a"), await hosts.host("b")
    await hosts.acquainted()
    await warm(b, for_=a)
    a.bus.disconnect()
    b.bus.disconnect()
    said, _ = await a.ask()
    assert said["host"] == "b"
