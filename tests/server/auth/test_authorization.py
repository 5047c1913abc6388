"""Keys, limits, the admin token and CORS, through the whole proxy with a real engine."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import re
import signal
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import openai
import orjson
import pytest

from proxy.config.settings import Settings
from proxy.errors import ConfigError
from proxy.host import private_files
from proxy.server.auth import api_keys
from proxy.server.auth.prompt_tokens import IMAGE_TOKENS
from proxy.telemetry.metrics import REFUSALS, Metrics
from tests.front import Front
from tests.served import Proxy
from tests.server.test_http import ASK, error_of
from tests.support import PATIENCE_S, ROOT, engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path


LIMITS = {"team": {}, "other": {"models": ["org/Other"]}}


class Keyed:
    """A front with a file of keys: `one["team"]` is the key of that name."""

    def __init__(self, folder: Path, holders: dict[str, dict[str, Any]], *engine: str, **server: Any) -> None:
        self.file = folder / "keys.toml"
        self.keys: dict[str, str] = {}
        self.write(holders)
        models = {"demo": engine_model(*engine), "other": engine_model(name="org/Other")}
        self.front = Front(folder, models, keys_file=str(self.file), **server)

    def write(self, holders: dict[str, dict[str, Any]]) -> None:
        with api_keys.changing(self.file) as entries:
            entries.clear()
            for name, limits in holders.items():
                id_, self.keys[name], entries[id_] = api_keys.generate(name, **limits)

    def change(self, name: str, **limits: Any) -> None:
        with api_keys.changing(self.file) as entries:
            for id_, entry in entries.items():
                if entry.name == name:
                    entries[id_] = entry.model_copy(update=limits)

    def __getitem__(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    async def ask(self, name: str, **more: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        return await self.front.post("/v1/completions", {**ASK, **more}, headers=self[name])


async def keyed_of_test(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Keyed]]]:
    """Makes fronts with keys, and closes them."""
    made: list[Keyed] = []

    async def make(holders: dict[str, dict[str, Any]] | None = None, *engine: str, **server: Any) -> Keyed:
        keyed = Keyed(tmp_path, holders or LIMITS, *engine, **server)
        made.append(keyed)
        await keyed.front.open()
        return keyed

    yield make
    for keyed in made:
        await keyed.front.close()
        assert all(known.account.running == 0 for known in keyed.front.auth._known.values())


keyed_of = pytest.fixture(keyed_of_test)


def answered(front: Front, status: str) -> float:
    """How many requests of any model were answered so."""
    families = [f for f in front.metrics.registry.collect() if f.name == "warmpool_requests"]
    return sum(
        s.value for f in families for s in f.samples if s.name.endswith("_total") and s.labels["status"] == status
    )


@pytest.fixture
async def keyed(keyed_of: Any) -> Keyed:
    """Two keys: `team` for everything, `other` for org/Other."""
    one: Keyed = await keyed_of()
    return one


# --- who may ---


async def test_without_a_key_nothing_but_health(keyed: Keyed) -> None:
    front = keyed.front
    for path in ("/v1/models", "/v1/models/demo", "/version", "/nowhere", "/"):
        async with front.session.get(path) as response:
            assert response.status == 401, path
            assert error_of(await response.read())["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == 'Bearer realm="warmpool"'
    response, answer = await front.post("/v1/completions", ASK)
    assert (response.status, error_of(answer)["type"]) == (401, "invalid_request_error")
    for path in ("/health", "/ready"):
        async with front.session.get(path) as response:
            assert response.status == 200
    assert front.pool.status()["models"]["demo"]["instances"] == [], "nothing was woken"
    assert front.sample("warmpool_refused_total", reason="key") == 6
    assert answered(front, "401") == 6


@pytest.mark.parametrize(
    "header",
    [
        "Bearer", "Bearer ", "Bearer wrong", "Basic {key}", "{key}", "Bearer {key}x", "Bearer x{key}",
        "Bearer {key}, Bearer x",
        "Bearer wp_aaaaaaaa_" + "A" * 43, "Bearer \udcff\udcff",
    ],
)  # fmt: skip
async def test_what_is_no_key(keyed: Keyed, header: str) -> None:
    value = header.replace("{key}", keyed.keys["team"])
    async with keyed.front.session.get("/v1/models", headers={"Authorization": value}) as response:
        assert response.status == 401
        assert keyed.keys["team"] not in await response.text()


async def test_a_key_is_good_as_openais_and_as_anthropics(keyed: Keyed) -> None:
    key = keyed.keys["team"]
    for headers in ({"Authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}, {"x-api-key": key}):
        async with keyed.front.session.get("/v1/models", headers=headers) as response:
            assert response.status == 200


@pytest.mark.parametrize("field", ["Authorization", "x-api-key", "api-key"])
async def test_of_several_keys_any_that_is_known_counts(keyed: Keyed, field: str) -> None:
    key = keyed.keys["team"]
    shown = {"Authorization": "Bearer placeholder", "x-api-key": "sk-none", "api-key": "none"}
    good = {**shown, field: f"Bearer {key}" if field == "Authorization" else key}
    for headers in (good, {field: good[field]}):
        response, _ = await keyed.front.post("/v1/completions", ASK, headers=headers)
        assert response.status == 200
    response, answer = await keyed.front.post("/v1/completions", ASK, headers=shown)
    assert (response.status, error_of(answer)["code"]) == (401, "invalid_api_key")
    # As far as a WebSocket gets here: past the keys, to a model that does not offer it.
    handshake = {
        **shown, "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    protocol = {"Sec-WebSocket-Protocol": f"realtime, openai-insecure-api-key.{key}"}
    for headers, status in (
        (handshake, 401),
        ({**handshake, **protocol}, 404),
        ({**handshake, field: good[field]}, 404),
    ):
        async with keyed.front.session.get("/v1/realtime?model=none", headers=headers) as answered:
            assert answered.status == status


async def test_an_expired_key_beside_a_good_one(keyed: Keyed) -> None:
    keyed.change("other", expires=dt.datetime.now(dt.UTC) - dt.timedelta(days=1))
    keyed.front.auth.reload()
    headers = {"Authorization": f"Bearer {keyed.keys['other']}", "x-api-key": keyed.keys["team"]}
    response, _ = await keyed.front.post("/v1/completions", ASK, headers=headers)
    assert response.status == 200


async def test_the_clients_raise_their_own_errors(keyed: Keyed) -> None:
    url = f"{keyed.front.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            await client.models.list()
    async with openai.AsyncOpenAI(base_url=url, api_key=keyed.keys["other"], max_retries=0) as client:
        assert [m.id async for m in client.models.list()] == ["org/Other"]
        with pytest.raises(openai.PermissionDeniedError) as failure:
            await client.completions.create(model="demo", prompt="x")
    assert failure.value.code == "model_not_allowed"


async def test_anthropics_client_uses_the_same_keys(keyed: Keyed) -> None:
    import anthropic

    ask: dict[str, Any] = {"model": "demo", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    async with anthropic.AsyncAnthropic(base_url=keyed.front.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError, match="Incorrect API key"):
            await client.messages.create(**ask)
    key = keyed.keys["team"]
    async with anthropic.AsyncAnthropic(base_url=keyed.front.url, api_key=key, max_retries=0) as client:
        assert (await client.messages.create(**ask)).usage.output_tokens == 4


async def test_a_key_is_good_for_its_models_only(keyed: Keyed) -> None:
    front = keyed.front
    async with front.session.get("/v1/models", headers=keyed["other"]) as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["org/Other"]
    async with front.session.get("/v1/models", headers=keyed["team"]) as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["demo", "org/Other"]
    for path, status in (("/v1/models/org/Other", 200), ("/v1/models/demo", 404)):
        async with front.session.get(path, headers=keyed["other"]) as response:
            assert response.status == status
    response, answer = await keyed.ask("other")
    assert (response.status, error_of(answer)["code"]) == (403, "model_not_allowed")
    assert front.pool.status()["models"]["demo"]["instances"] == []
    assert front.sample("warmpool_refused_total", reason="model") == 1
    assert answered(front, "403") == 1
    assert (await keyed.ask("other", model="org/Other"))[0].status == 200


async def test_a_key_that_is_over_is_over(keyed_of: Any) -> None:
    now = dt.datetime.now(dt.UTC)
    hour = dt.timedelta(hours=1)
    keyed: Keyed = await keyed_of({"old": {"expires": now - hour}, "new": {"expires": now + hour}})
    response, answer = await keyed.ask("old")
    assert (response.status, error_of(answer)["message"]) == (401, "This API key has expired.")
    assert (await keyed.ask("new"))[0].status == 200


async def test_a_body_of_a_stranger_is_not_read(keyed: Keyed) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", keyed.front.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
    writer.close()


# --- how much ---


async def test_requests_by_the_minute(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of({"team": {"requests_per_minute": 3}, "free": {}})
    for left in (2, 1, 0):
        response, _ = await keyed.ask("team")
        assert response.status == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        assert re.fullmatch(r"\d+\.\d+s", response.headers["x-ratelimit-reset-requests"])
    response, answer = await keyed.ask("team")
    assert (response.status, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(response.headers["Retry-After"]) <= 20
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    async with keyed.front.session.get("/v1/models", headers=keyed["team"]) as response:
        assert response.status == 200, "looking is free"
    assert (await keyed.ask("free"))[0].status == 200
    assert keyed.front.sample("warmpool_refused_total", reason="limit") == 1
    assert answered(keyed.front, "429") == 1


@pytest.mark.parametrize("usage", [True, False], ids=["said", "estimated"])
async def test_tokens_by_the_minute(keyed_of: Any, usage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    keyed: Keyed = await keyed_of({"team": {"tokens_per_minute": 100_000}})
    more: dict[str, Any] = {"stream": True, "max_tokens": 50, "ignore_eos": True}
    if usage:
        more["stream_options"] = {"include_usage": True}
    now = time.monotonic()
    monkeypatch.setattr(keyed.front.auth, "_clock", lambda: now)
    response, answer = await keyed.ask("team", **more)
    assert response.status == 200
    async with keyed.front.session.get("/v1/models", headers=keyed["team"]) as looked:
        used = 100_000 - int(looked.headers["x-ratelimit-remaining-tokens"])
    if usage:
        said = int(re.findall(rb'"total_tokens":(\d+)', answer)[-1])
        assert used == said
    else:
        assert 50 <= used <= 100


@pytest.mark.parametrize("stream", [True, False], ids=["a stream without usage", "usage"])
async def test_a_picture_costs_its_tokens_and_not_its_length(
    keyed_of: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed: Keyed = await keyed_of({"team": {"tokens_per_minute": 5000}}, "--max-model-len", "1000000")
    now = time.monotonic()
    monkeypatch.setattr(keyed.front.auth, "_clock", lambda: now)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 600_000}}
    content = [{"type": "text", "text": "What is it?"}, picture]
    ask = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "stream": stream}
    response, answer = await keyed.front.post("/v1/chat/completions", ask, headers=keyed["team"])
    assert response.status == 200
    expected = 5000 - int(response.headers["x-ratelimit-remaining-tokens"])
    assert IMAGE_TOKENS < expected < IMAGE_TOKENS + 50
    async with keyed.front.session.get("/v1/models", headers=keyed["team"]) as looked:
        used = 5000 - int(looked.headers["x-ratelimit-remaining-tokens"])
    if stream:
        assert expected < used < expected + 20
        assert (await keyed.ask("team"))[0].status == 200
    else:
        assert used == min(5000, orjson.loads(answer)["usage"]["total_tokens"]), "what the engine says counts"


async def test_who_has_used_up_its_tokens_waits(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of({"team": {"tokens_per_minute": 60}})
    assert (await keyed.ask("team", max_tokens=200, ignore_eos=True))[0].status == 200
    response, answer = await keyed.ask("team")
    assert (response.status, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
    assert "60 tokens per minute" in error_of(answer)["message"]
    assert int(response.headers["Retry-After"]) > 100, "a debt of more than 100 at one a second"


async def test_what_failed_costs_no_tokens(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of({"team": {"tokens_per_minute": 1000}})
    assert (await keyed.ask("team", max_tokens=0))[0].status == 400
    assert (await keyed.ask("team", model="missing"))[0].status == 404
    response, _ = await keyed.ask("team", model="missing")
    assert response.headers["x-ratelimit-remaining-tokens"] == "1000"


async def test_requests_at_once(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of({"team": {"concurrency": 2}}, "--tokens-per-second", "20")
    await keyed.ask("team", max_tokens=1)
    long = {**ASK, "stream": True, "max_tokens": 1000, "ignore_eos": True}
    streams = []
    for _ in range(2):
        response = await keyed.front.session.post("/v1/completions", json=long, headers=keyed["team"])
        await response.content.readany()
        streams.append(response)
    refused, answer = await keyed.ask("team")
    assert (refused.status, error_of(answer)["message"]) == (429, "This API key is limited to 2 requests at once.")
    assert refused.headers["Retry-After"] == "1"
    streams[0].close()  # a client that leaves makes room
    async with asyncio.timeout(PATIENCE_S):
        while (await keyed.ask("team", max_tokens=1))[0].status != 200:
            await asyncio.sleep(0.02)
    streams[1].close()


async def test_the_priority_of_a_key_orders_the_queue(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of({"high": {"priority": "high"}, "low": {"priority": "low"}}, "--load-seconds", "2")
    finished: list[str] = []
    keyed.front.pool._state.models["demo"].settings = keyed.front.pool._state.models["demo"].settings.model_copy(
        update={"max_concurrency": 1}
    )

    async def ask(name: str) -> None:
        assert (await keyed.ask(name))[0].status == 200
        finished.append(name)

    tasks = []
    for queue, name in enumerate(["low", "low", "high", "high"], 1):
        tasks.append(asyncio.create_task(ask(name)))
        async with asyncio.timeout(PATIENCE_S):
            while keyed.front.pool.status()["models"]["demo"]["queue"] < queue:
                await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    assert finished == ["high", "high", "low", "low"]


# --- the file while it serves ---


async def test_reading_the_file_again_adds_revokes_changes_and_keeps_what_was_used(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of({"team": {"requests_per_minute": 5}, "gone": {}})
    for _ in range(2):
        await keyed.ask("team")
    with api_keys.changing(keyed.file) as entries:
        id_, keyed.keys["new"], entries[id_] = api_keys.generate("new")
        del entries[keyed.keys["gone"][3:11]]
    keyed.change("team", requests_per_minute=4)
    assert (await keyed.ask("new"))[0].status == 401, "not yet"
    keyed.front.auth.reload()
    assert (await keyed.ask("new"))[0].status == 200
    assert (await keyed.ask("gone"))[0].status == 401
    response, _ = await keyed.ask("team")
    assert response.headers["x-ratelimit-remaining-requests"] == "1"


async def test_new_names_of_models_are_taken_up(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of({"early": {"models": ["org/New"]}})
    assert (await keyed.ask("early"))[0].status == 403
    before = keyed.front.settings
    renamed = before.models["demo"].model_copy(update={"name": "org/New"})
    keyed.front.auth.reload(Settings(models={**before.models, "demo": renamed}, server=before.server))
    assert (await keyed.ask("early"))[0].status == 200


async def test_a_bad_file_changes_nothing(keyed: Keyed) -> None:
    keyed.file.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        keyed.front.auth.reload()
    assert (await keyed.ask("team"))[0].status == 200


async def test_sighup_reads_keys_again_and_secrets_are_nowhere(tmp_path: Path) -> None:
    """`warmpool serve` itself: what it logs, what it writes, what /metrics and /admin/status show."""
    file, token_file = tmp_path / "keys.toml", tmp_path / "token"
    with api_keys.changing(file) as entries:
        id_, first, entries[id_] = api_keys.generate("first")
    private_files.write(token_file, token := "t" * 40)
    model = engine_model()
    model["process"]["env"] = {"HF_TOKEN": "hf-secret"}
    settings = {
        "server": {"keys_file": str(file), "admin": {"token_file": str(token_file)}},
        "models": {"demo": model},
    }
    proxy = await Proxy(tmp_path / "w", "--log-level", "debug", settings=settings).listening()

    async def ask(key: str) -> int:
        async with proxy.session.post(
            "/v1/completions", json={**ASK, "prompt": "secret-prompt"}, headers={"Authorization": f"Bearer {key}"}
        ) as response:
            await response.read()
            return response.status

    try:
        assert await ask(first) == 200
        with api_keys.changing(file) as entries:
            id_, second, entries[id_] = api_keys.generate("second")
            del entries[first[3:11]]
        assert await ask(second) == 401
        proxy.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE_S):
            while await ask(second) != 200:
                await asyncio.sleep(0.02)
        assert await ask(first) == 401
        file.chmod(0o644)
        proxy.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE_S):
            while "mode 0644" not in proxy.log.read_text():
                await asyncio.sleep(0.02)
        assert await ask(second) == 200, "a file that cannot be used changes nothing"
        shown = ""
        for path in ("/metrics", "/admin/status"):
            async with proxy.session.get(path, headers={"Authorization": f"Bearer {token}"}) as response:
                assert response.status == 200
                shown += await response.text()
    finally:
        proxy.process.terminate()
        await proxy.ended()
    log = proxy.log.read_text()
    assert "key=second" in log, "the name is what a log needs"
    entry = entries[second[3:11]]
    secrets = (first, second, token, entry.salt, entry.sha256, "secret-prompt", "hf-secret")
    for written in tmp_path.rglob("*"):
        if written.is_file() and written not in (file, token_file, tmp_path / "w" / "warmpool.toml"):
            text = written.read_bytes()
            assert not [s for s in secrets if s.encode() in text], written
    assert not [s for s in secrets if s in shown]


# --- administration ---


async def test_without_a_token_administration_is_for_this_host(front: Front) -> None:
    async with front.session.get("/admin/status") as response:
        assert response.status == 200
    refused = (
        {"X-Forwarded-For": "192.0.2.1"}, {"Forwarded": "for=192.0.2.1"}, {"Via": "1.1 x"}, {"Host": "evil.example"},
        {"Host": "evil.example:8080"},
    )  # fmt: skip
    for headers in refused:
        for path in ("/admin/status", "/metrics"):
            async with front.session.get(path, headers=headers) as response:
                assert response.status == 403, (path, headers)
                assert error_of(await response.read())["code"] == "forbidden"
    for host in ("localhost", "localhost:1", "127.0.0.1", "[::1]:8080"):
        async with front.session.get("/admin/status", headers={"Host": host}) as response:
            assert response.status == 200, host


async def test_an_api_key_is_no_admin_token(keyed: Keyed) -> None:
    async with keyed.front.session.get("/admin/status") as response:
        assert response.status == 200, "loopback, as long as there is no token"


async def test_the_admin_token(front_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "token"
    private_files.write(file, token := "t" * 40)
    front: Front = await front_of(server={"admin": {"token_file": str(file)}})
    basic = base64.b64encode(f"admin:{token}".encode()).decode()
    cases: list[tuple[dict[str, str], int]] = [
        ({}, 401),
        ({"Authorization": f"Bearer {token[1:]}"}, 401),
        ({"Authorization": "Basic !!!"}, 401),
        ({"Authorization": "Basic " + base64.b64encode(b"admin").decode()}, 401),
        ({"x-api-key": token}, 401),
        ({"Authorization": f"Bearer {token}"}, 200),
        ({"Authorization": f"Basic {basic}"}, 200),
        ({"Authorization": f"Bearer {token}", "X-Forwarded-For": "192.0.2.1", "Host": "pool.example"}, 200),
    ]
    for path in ("/admin/status", "/metrics"):
        for headers, status in cases:
            async with front.session.get(path, headers=headers) as response:
                assert response.status == status, headers
                if status == 401:
                    assert response.headers["WWW-Authenticate"] == 'Bearer realm="warmpool"'
    async with front.session.get("/admin/") as response:
        assert response.status == 200, "the page, which has no data and asks for the token"
    async with front.session.get("/admin/events") as response:
        assert response.status == 401
    async with front.session.post("/admin/drain", json={}) as response:
        assert response.status == 401
    private_files.write(file, "n" * 40)
    front.auth.reload()
    async with front.session.get("/metrics", headers={"Authorization": f"Bearer {token}"}) as response:
        assert response.status == 401
    async with front.session.get("/v1/models") as response:
        assert response.status == 200, "clients need no key where there is no file of keys"


async def test_a_page_of_another_site_cannot_act_with_what_the_browser_knows(front: Front) -> None:
    own = front.url
    cases: list[tuple[dict[str, str], int]] = [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": own.replace("127.0.0.1", "localhost")}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": own, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": own}, 200),
        ({}, 200),
    ]
    for headers, status in cases:
        async with front.session.post("/admin/undrain", json={}, headers=headers) as response:
            assert response.status == status, headers


# --- pages ---

PREFLIGHT = {
    "Origin": "https://chat.example", "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}  # fmt: skip


async def test_no_page_may_ask_by_default(front: Front) -> None:
    async with front.session.options("/v1/chat/completions", headers=PREFLIGHT) as response:
        assert response.status == 403
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
    response, _ = await front.post("/v1/completions", ASK, headers={"Origin": "https://chat.example"})
    assert not [name for name in response.headers if name.lower().startswith("access-control")]


async def test_without_keys_no_page_from_elsewhere_uses_a_model(front_of: Any) -> None:
    """Neither by a simple request nor by a name that points here: its browser would let it read the answer."""
    front: Front = await front_of(server={"cors": {"origins": ["https://chat.example"]}})
    rebound = {"Origin": "http://evil.example:8080", "Host": "evil.example:8080"}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, rebound):
        response, answer = await front.post("/v1/completions", ASK, headers={**headers, "Content-Type": "text/plain"})
        assert (response.status, error_of(answer)["code"]) == (403, "forbidden")
    assert front.pool.status()["models"]["demo"]["instances"] == []
    for origin in ("https://chat.example", "http://localhost:3000", "http://127.0.0.1", "http://[::1]:9"):
        async with front.session.get("/v1/models", headers={"Origin": origin}) as response:
            assert response.status == 200, origin


async def test_pages_of_a_configured_origin_may(keyed_of: Any) -> None:
    keyed: Keyed = await keyed_of(cors={"origins": ["https://chat.example"], "max_age": "5m"})
    session = keyed.front.session
    async with session.options("/v1/chat/completions", headers=PREFLIGHT) as response:
        assert response.status == 204, "a preflight brings no key"
        assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert response.headers["Access-Control-Allow-Headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        assert response.headers["Access-Control-Max-Age"] == "300"
        assert "Access-Control-Allow-Credentials" not in response.headers
        assert "Origin" in response.headers["Vary"]
    async with session.options("/v1/completions", headers={**PREFLIGHT, "Origin": "https://evil.example"}) as response:
        assert "Access-Control-Allow-Origin" not in response.headers
    headers = {**keyed["team"], "Origin": "https://chat.example"}
    response, _ = await keyed.front.post("/v1/completions", {**ASK, "stream": True}, headers=headers)
    assert response.status == 200
    assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert "x-warmpool-tier" in response.headers["Access-Control-Expose-Headers"]
    response, _ = await keyed.front.post("/v1/completions", ASK, headers={"Origin": "https://chat.example"})
    assert response.status == 401, "errors can be read by the page too"
    assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    for path in ("/admin/status", "/metrics"):
        async with session.get(path, headers={"Origin": "https://chat.example"}) as response:
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_any_page_may_where_it_says_so(front_of: Any) -> None:
    front: Front = await front_of(server={"cors": {"origins": ["*"]}})
    async with front.session.get("/v1/models", headers={"Origin": "https://x.example"}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"


async def test_all_origins_of_a_scheme_may_where_it_is_named(front_of: Any) -> None:
    front: Front = await front_of(server={"cors": {"origins": ["vscode-webview://*", "app://*"]}})
    for origin in ("vscode-webview://0a1b2c", "app://obsidian.md", "APP://x"):
        response, _ = await front.post("/v1/completions", ASK, headers={"Origin": origin})
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, origin)
    for origin in ("https://evil.example", "vscode-webview", "app://", "xapp://obsidian.md", "null", "*"):
        response, _ = await front.post("/v1/completions", ASK, headers={"Origin": origin})
        assert (response.status, "Access-Control-Allow-Origin" in response.headers) == (403, False), origin


def test_every_reason_begins_at_0_and_is_explained() -> None:
    registry = Metrics().registry
    explained = (ROOT / "docs" / "api.md").read_text()
    for reason in REFUSALS:
        assert registry.get_sample_value("warmpool_refused_total", {"reason": reason}) == 0.0
        assert f"`{reason}`" in explained


# --- WebSockets ---


async def test_a_websocket_needs_a_key_and_a_page_that_may(keyed_of: Any) -> None:
    holders = {"team": {"concurrency": 1}, "other": {"models": ["org/Other"]}}
    keyed: Keyed = await keyed_of(holders, cors={"origins": ["https://chat.example"]})
    session, path = keyed.front.session, "/v1/realtime?model=demo"

    async def refused(**options: Any) -> int:
        with pytest.raises(aiohttp.WSServerHandshakeError) as failure:
            await session.ws_connect(path, **options)
        return failure.value.status

    assert await refused() == 401
    assert await refused(headers=keyed["other"]) == 403
    assert await refused(headers={**keyed["team"], "Origin": "https://evil.example"}) == 403
    async with session.ws_connect(path, headers={**keyed["team"], "Origin": "https://chat.example"}) as socket:
        assert (await socket.receive_json())["type"] == "session.created"
        assert await refused(headers=keyed["team"]) == 429, "a session is a request that runs"
    async with asyncio.timeout(PATIENCE_S):
        while keyed.front.pool.status()["leases"]:
            await asyncio.sleep(0.01)
    protocols = ("realtime", f"openai-insecure-api-key.{keyed.keys['team']}")
    async with session.ws_connect(path, protocols=protocols) as socket:
        assert (await socket.receive_json())["type"] == "session.created", "as browsers send a key"


async def test_no_page_may_open_a_websocket_by_default(front: Front) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as failure:
        await front.session.ws_connect("/v1/realtime?model=demo", headers={"Origin": "https://evil.example"})
    assert failure.value.status == 403
    assert front.pool.status()["models"]["demo"]["instances"] == []
