"""Commands of operators to engines in real containers, by the commands."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from proxy.cli.main import cli
from tests.podman_bench import why_no_podman
from tests.podman_host import AWAKE, Host
from tests.served import ASK
from tests.support import files_in, get_json

if TYPE_CHECKING:
    from pathlib import Path

    from tests.served import Proxy

pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or ""),
]


async def run(proxy: Proxy, *arguments: str) -> tuple[int, str]:
    runner = CliRunner(env={"WARMPOOL_URL": proxy.url})
    result = await asyncio.to_thread(runner.invoke, cli, arguments)
    return result.exit_code, result.output


async def test_containers_go_up_and_down_as_commanded_and_a_stream_is_not_cut(host: Host, images: Path) -> None:
    proxy = await host.serve("--tokens-per-second", "40", idle=AWAKE, max_instances=2)
    status, said = await run(proxy, "wake", "demo")
    assert (status, said[:26]) == (0, "demo-1: ready from stopped"), said
    _, text = await proxy.ask()
    assert await run(proxy, "checkpoint", "now", "demo") == (0, "demo-1: ready -> checkpointed\n")
    await proxy.until_all(2, "checkpointed")
    assert host.containers("status=running") == []
    assert len(files_in(images)) == 1

    body = {**ASK, "max_tokens": 120, "stream": True, "ignore_eos": True}
    async with proxy.session.post("/v1/completions", json=body) as stream:
        assert stream.headers["x-warmpool-tier"] == "checkpointed"
        first = await stream.content.readany()
        status, said = await run(proxy, "suspend", "demo")
        assert (status, "is answering 1 requests" in said) == (1, True), said
        going = asyncio.create_task(run(proxy, "suspend", "demo", "--when-busy", "wait"))
        whole = first + await stream.content.read()
    assert whole.rstrip().endswith(b"data: [DONE]")
    assert await going == (0, "demo-1: ready -> suspended\ndemo-2: checkpointed already\n")
    assert await proxy.ask() == ("suspended", text)

    assert await run(proxy, "stop", "demo", "--instance", "demo-1") == (0, "demo-1: ready -> stopped\n")
    await proxy.until_all(2, "checkpointed")  # a new one of the golden checkpoint takes its place
    assert await proxy.ask() == ("checkpointed", text)
    status, said = await run(proxy, "stop", "demo", "--discard-golden-checkpoint")
    assert status == 0, said
    shown: Any = await get_json(f"{proxy.url}/admin/status")
    assert shown["models"]["demo"]["instances"] == []
    assert (host.containers(), files_in(images)) == ([], [])
    assert await proxy.ask() == ("stopped", text)
