"""Engines that ask for an API key of their own, from a client's side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tomli_w

from proxy.config.load import load
from proxy.config.model import ModelSettings
from proxy.config.settings import Settings
from proxy.engine.api_key import key_of, problem_of
from proxy.errors import ConfigError
from tests.served import ASK, Proxy
from tests.support import engine_model, get_json, why_no_criu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

KEY = "the-engines-own-key"
AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}
QUICK = {"sleeping": "200ms", "suspended": "400ms", "checkpointed": "600ms"}


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Proxy]]]:
    """Starts a proxy with a model `demo` whose engine asks for `KEY`; ends it afterwards."""
    proxies: list[Proxy] = []

    async def serve_(**entry: Any) -> Proxy:
        model = engine_model("--api-key", KEY, **{"idle": AWAKE, **entry})
        proxies.append(Proxy(tmp_path / "warmpool", settings={"models": {"demo": model}}))
        return await proxies[-1].listening()

    yield serve_
    for proxy in proxies:
        proxy.process.terminate()
        await proxy.ended()


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("by_file", [False, True])
async def test_every_request_to_the_engine_has_its_key_and_never_the_clients(
    serve: Any, tmp_path: Path, by_file: bool
) -> None:
    entry = {"api_key_file": str(private(tmp_path / "key", f"{KEY}\n"))} if by_file else {"api_key": KEY}
    proxy: Proxy = await serve(**entry)
    for headers in ({}, {"Authorization": "Bearer the-clients"}, {"Authorization": f"Bearer {KEY}"}):
        for more in ({}, {"stream": True}):
            async with proxy.session.post("/v1/completions", json={**ASK, **more}, headers=headers) as response:
                assert response.status == 200, await response.text()
    # Long enough that it goes the other way through, and a WebSocket.
    long = {**ASK, "prompt": "x " * 20_000}
    async with proxy.session.post("/v1/completions", json=long) as response:
        assert response.status in (200, 400), "the engine's own word on a long prompt"
    async with proxy.session.ws_connect("/v1/realtime?model=demo") as socket:
        assert (await socket.receive_json())["type"] == "session.created"
    assert "warmup=" in proxy.log.read_text()
    status = await get_json(f"{proxy.url}/admin/status")
    assert KEY not in proxy.log.read_text() + str(status)


@pytest.mark.criu
@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
async def test_an_engine_with_a_key_falls_asleep_is_checkpointed_and_comes_back(serve: Any) -> None:
    proxy: Proxy = await serve(api_key=KEY, idle=QUICK, reseed={"path": "/debug/reseed"})
    _, text = await proxy.ask()
    await proxy.until("checkpointed")
    assert await proxy.ask() == ("checkpointed", text)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "asks for an API key: set the model's api_key or api_key_file"),
        ({"api_key": "another"}, "does not take the API key that is set in the model's api_key or api_key_file"),
        ({"warmup": {"requests": 0}, "canary": "never"}, "asks for an API key"),
    ],
)
async def test_an_engine_whose_key_is_missing_does_not_start_and_says_why(
    serve: Any, entry: dict[str, Any], said: str
) -> None:
    proxy: Proxy = await serve(**entry)
    async with proxy.session.post("/v1/completions", json=ASK, headers={"Authorization": f"Bearer {KEY}"}) as response:
        assert response.status == 503
        assert KEY not in await response.text()
    log = proxy.log.read_text()
    assert f"answered 401: the engine {said}" in log
    assert KEY not in log
    assert "another" not in log


async def test_a_file_that_others_can_read_is_not_taken_and_named_in_the_log_only(serve: Any, tmp_path: Path) -> None:
    path = private(tmp_path / "key", KEY, 0o644)
    proxy: Proxy = await serve(api_key_file=str(path))
    async with proxy.session.post("/v1/completions", json=ASK) as response:
        assert response.status == 503
        assert str(path) not in await response.text()
    assert f"models.demo.api_key_file: {path}: mode 0644: others may read it" in proxy.log.read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "one word"), ("two words", "one word"), ("line\nline", "one word"), ("schlüssel", "one word")],
)
def test_a_file_that_holds_no_key_is_said(tmp_path: Path, text: str, reason: str) -> None:
    model = ModelSettings(**engine_model(), api_key_file=private(tmp_path / "key", text))
    assert reason in str(problem_of("demo", model))
    assert key_of("demo", model) is None


def test_the_key_is_not_shown_with_the_settings() -> None:
    settings = Settings(models={"demo": engine_model(api_key=KEY)})
    assert KEY not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()


def test_a_key_that_cannot_be_one_is_refused_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "warmpool.toml"
    path.write_text(tomli_w.dumps({"models": {"demo": engine_model(api_key="two wörds")}}))
    with pytest.raises(ConfigError, match="models.demo: api_key must be one word of printable ASCII") as refused:
        load(path)
    assert "two w" not in str(refused.value)
