"""`/admin/models/{model}/logs`: what engines wrote, over HTTP."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.test_http import ASK, error_of
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from pathlib import Path

    import aiohttp

    from tests.front import Front


def log_of(front: Front, name: str = "demo-1") -> Path:
    folder = front.settings.pool.state_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


async def read(front: Front, query: str = "", model: str = "demo") -> tuple[aiohttp.ClientResponse, str]:
    async with front.session.get(f"/admin/models/{model}/logs{query}") as response:
        return response, await response.text()


async def test_the_last_lines_of_each_instance(front_of: Any) -> None:
    front: Front = await front_of(name="org/Demo")
    log_of(front).write_text("one\ntwo\nthree\n")
    log_of(front, "demo-2").write_bytes(b"odd \xff\nhalf a line")
    log_of(front, "demo2-1").write_text("of another model\n")
    for model in ("demo", "org%2FDemo"):
        response, text = await read(front, "?lines=2", model)
        assert (response.status, response.content_type) == (200, "text/plain")
        assert text == "==> demo-1 <==\ntwo\nthree\n==> demo-2 <==\nodd \ufffd\n"
    assert (await read(front, "?instance=demo-1&lines=1"))[1] == "==> demo-1 <==\nthree\n"
    assert (await read(front, "?lines=0"))[1] == ""


async def test_what_an_engine_writes_is_followed(front_of: Any) -> None:
    front: Front = await front_of()
    log_of(front).write_text("old\n")
    async with asyncio.timeout(PATIENCE_S), front.session.get("/admin/models/demo/logs?follow=1&lines=1") as response:
        assert [await response.content.readline() for _ in range(2)] == [b"==> demo-1 <==\n", b"old\n"]
        with log_of(front).open("a") as file:
            file.write("new\n")
        assert await response.content.readline() == b"new\n"
        log_of(front, "demo-2").write_text("another\n")
        assert [await response.content.readline() for _ in range(2)] == [b"==> demo-2 <==\n", b"another\n"]
        front.pool.begin_stop()
        assert await response.content.read() == b""


async def test_a_real_engine_is_heard(front: Front) -> None:
    await front.post("/v1/completions", ASK)
    assert "listening on" in (await read(front))[1]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("demo/logs?lines=x", 400, "invalid_request"), ("demo/logs?follow=yes", 400, "invalid_request"),
        ("demo/logs?colour=red", 400, "invalid_request"), ("none/logs", 404, "model_not_found"),
        ("demo/logs?instance=../../etc/passwd", 404, "instance_not_found"),
        ("demo/logs?instance=demo-9", 404, "instance_not_found"),
    ],
)  # fmt: skip
async def test_what_there_is_not(front: Front, path: str, status: int, code: str) -> None:
    async with front.session.get(f"/admin/models/{path}") as response:
        assert (response.status, error_of(await response.read())["code"]) == (status, code)
