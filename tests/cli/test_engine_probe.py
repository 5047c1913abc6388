"""`warmpool engine probe`: what engines say of themselves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner

from proxy.cli.main import cli
from tests.engine.test_engine import start

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["start"]


async def probed(*arguments: str) -> Any:
    return await asyncio.to_thread(CliRunner().invoke, cli, ["engine", "probe", *arguments])


async def test_engines_are_shown_side_by_side(start: Any) -> None:
    one, another = await start("--sleep-mode"), await start("--model", "other")
    result = await probed(one.url, another.url, "--format", "json")
    assert result.exit_code == 0, result.output
    asleep, plain = orjson.loads(result.output)
    assert asleep["sleep mode"] == "yes, awake (/is_sleeping)"
    assert asleep["pause, resume"] == "yes, running (/is_paused)"
    assert plain["sleep mode"] == plain["pause, resume"] == plain["warmpool's extension"] == "no"
    assert plain["models"].startswith("other")
    assert {"method": "POST", "path": "/v1/completions", "listed": True} in plain["routes"]
    assert "vllm:generation_tokens_total" in plain["metrics"]
    state = await one.state()
    assert state["sleep_level"] == 0, "it was only asked"
    result = await probed(one.url, another.url, "--format", "markdown")
    lines = result.output.splitlines()
    assert lines[0] == f"|  | {one.url} | {another.url} |"
    assert all(line.startswith("| ") or line == "|---|---|---|" for line in lines)


async def test_its_sleep_mode_is_tried_where_that_is_wanted(start: Any) -> None:
    engine = await start("--sleep-mode")
    result = await probed(engine.url, "--try")
    assert "1: the same answer afterwards; 2: the same answer afterwards" in result.output
    assert (await engine.state())["sleep_level"] == 0


async def test_a_key_is_shown_where_it_is_asked_for(start: Any, tmp_path: Path) -> None:
    engine = await start("--api-key", "secret-1")
    result = await probed(engine.url)
    assert result.exit_code != 0
    assert "asks for an API key: --api-key-file" in result.output
    (tmp_path / "key").write_text("secret-1\n")
    result = await probed(engine.url, "--api-key-file", str(tmp_path / "key"))
    assert "demo" in result.output
    assert "secret-1" not in result.output


async def test_where_nobody_listens_that_is_said() -> None:
    result = await probed("http://127.0.0.1:1")
    assert result.exit_code != 0
    assert "http://127.0.0.1:1: " in result.output
    result = await probed("nonsense")
    assert result.exit_code != 0
    assert "Traceback" not in result.output


async def test_a_long_description_is_read_to_its_end() -> None:
    paths = {f"/v1/thing-{number}": {"get": {"summary": "x" * 200}} for number in range(10_000)}

    async def describe(_: web.Request) -> web.Response:
        return web.json_response({"paths": {**paths, "/v1/completions": {"post": {}}}})

    application = web.Application()
    application.router.add_get("/openapi.json", describe)
    async with TestServer(application) as server:
        url = str(server.make_url("")).rstrip("/")
        result = await probed(url, "--format", "json")
        (found,) = orjson.loads(result.output)
        assert found["describes its routes"] == "/openapi.json"
        assert len(found["routes"]) == 10_001
        result = await asyncio.to_thread(CliRunner().invoke, cli, ["routes", url])
        assert "10000 new" in result.output
