"""The commands that talk to a running server, each against a real one."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from proxy.cli import request_commands, status_table
from proxy.cli.control_client import apply_patch
from proxy.cli.failures import EXIT_HOST
from proxy.cli.main import cli
from tests.served import Proxy
from tests.support import ENGINE_PORTS, PATIENCE_S, PYTHON, ROOT, engine_model, why_no_criu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NEVER = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    """A server with a model `demo` that clients call org/Demo, and that never steps down by itself."""
    settings = {
        "runtime": {"process": {"ports": ENGINE_PORTS}},
        "models": {"demo": engine_model(name="org/Demo", idle=NEVER)},
    }
    running = await Proxy(tmp_path / "served", settings=settings).listening()
    yield running
    running.process.terminate()
    assert await running.ended() == 0


async def run(proxy: Proxy, *arguments: str) -> str:
    """What a command prints; it must succeed."""
    status, out, err = await attempt(proxy, *arguments)
    assert status == 0, err
    return out


async def attempt(proxy: Proxy, *arguments: str) -> tuple[int, str, str]:
    runner = CliRunner(env={"WARMPOOL_URL": proxy.url, "COLUMNS": "200"})
    result = await asyncio.to_thread(runner.invoke, cli, arguments)
    return result.exit_code, result.stdout, result.stderr


async def test_the_ways_up_and_down(proxy: Proxy) -> None:
    assert re.fullmatch(
        r"demo-1: ready from stopped in [\d.]+ s \(start [\d.]+, load .*\)\n", await run(proxy, "wake", "demo")
    )
    assert await run(proxy, "wake", "org/Demo") == "demo-1: ready already\n"
    assert await run(proxy, "suspend", "demo") == "demo-1: ready -> suspended\n"
    assert await run(proxy, "suspend", "demo", "--instance", "demo-1") == "demo-1: suspended already\n"
    assert await run(proxy, "stop", "demo", "--discard-golden-checkpoint") == "demo-1: suspended -> stopped\n"
    assert await run(proxy, "stop", "demo") == "demo: stopped already\n"
    assert await run(proxy, "wake", "demo", "--no-wait") == "demo: waking\n"
    await proxy.until("ready")
    assert await run(proxy, "suspend", "demo", "--no-wait") in (
        "demo-1: ready -> suspended, under way\n", "demo-1: ready -> suspended\n",
    )  # fmt: skip
    await proxy.until("suspended")


@pytest.mark.criu
async def test_checkpoint_now_writes_an_image_that_wakes(proxy: Proxy) -> None:
    if reason := why_no_criu():
        pytest.skip(reason)
    await run(proxy, "wake", "demo")
    assert await run(proxy, "checkpoint", "now", "demo") == "demo-1: ready -> checkpointed\n"
    checkpoints = json.loads(await run(proxy, "status", "--json"))["memory"]["checkpoints"]
    (image,) = checkpoints["images"]
    assert (image["image"], image["model"]) == ("demo-1", "demo")
    assert image["bytes"] > 1 << 20
    assert (await run(proxy, "wake", "demo")).startswith("demo-1: ready from checkpointed in ")


@pytest.mark.criu
async def test_checkpoints_are_listed_beside_a_running_server(tmp_path: Path) -> None:
    if reason := why_no_criu():
        pytest.skip(reason)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"server": {"port": port}, "models": {"demo": engine_model(idle=NEVER)}}
    proxy = await Proxy(tmp_path / "served", settings=settings).listening()
    file = str(proxy.folder / "warmpool.toml")
    await run(proxy, "wake", "demo")
    await run(proxy, "checkpoint", "now", "demo")
    (row,) = json.loads(await run(proxy, "checkpoint", "ls", "-c", file, "--json"))
    assert (row["image"], row["state"]) == ("demo-1", "in use by the running warmpool")
    # It was not touched by that.
    assert (await run(proxy, "wake", "demo")).startswith("demo-1: ready from checkpointed in ")
    proxy.process.terminate()
    assert await proxy.ended() == 0
    (row,) = json.loads(await run(proxy, "checkpoint", "ls", "-c", file, "--json"))
    assert row["state"] == "good"


async def test_drain_and_undrain(proxy: Proxy) -> None:
    assert await run(proxy, "drain", "demo") == "demo: draining; no request is left\n"
    status, _, err = await attempt(proxy, "wake", "demo")
    assert (status, "takes no new requests" in err) == (1, True)
    assert "demo draining" in await run(proxy, "status")
    assert await run(proxy, "undrain", "demo") == "demo: takes requests again\n"
    assert await run(proxy, "drain") == "all models: draining; no request is left\n"
    assert "The server is draining" in await run(proxy, "status")
    assert await run(proxy, "undrain") == "all models: takes requests again\n"
    await proxy.ask(model="org/Demo")


async def test_status_for_people_and_for_programs(proxy: Proxy) -> None:
    await run(proxy, "wake", "demo")
    shown = await run(proxy, "status")
    row = next(line for line in shown.splitlines() if "demo-1" in line)
    assert re.search(r"demo +demo-1 +ready +0 +0 .*from stopped, \d+s ago", row)
    assert "host memory:" in shown
    assert json.loads(await run(proxy, "status", "org/Demo", "--json"))["tier"] == "ready"
    status, _, err = await attempt(proxy, "status", "other")
    assert (status, "no model 'other'; there are: demo" in err) == (1, True)


async def test_what_the_server_refuses_is_said_in_its_words(proxy: Proxy) -> None:
    status, out, err = await attempt(proxy, "suspend", "demo", "--instance", "demo-7")
    assert (status, out) == (1, "")
    assert err == "warmpool: 'demo' has no instance 'demo-7'; there are: none.\n"


async def test_watch_follows_until_the_server_ends(proxy: Proxy) -> None:
    environment = {**os.environ, "WARMPOOL_URL": proxy.url}
    watching = await asyncio.create_subprocess_exec(
        PYTHON, "-m", "proxy", "status", "demo", "--watch", "--json",
        cwd=ROOT, env=environment, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert watching.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        assert json.loads(await watching.stdout.readline())["tier"] == "stopped"
        await run(proxy, "wake", "demo")
        while json.loads(await watching.stdout.readline())["tier"] != "ready":
            pass
    watching.send_signal(signal.SIGINT)
    assert await watching.wait() == 0


async def test_watch_draws_a_table_until_it_is_interrupted(proxy: Proxy) -> None:
    environment = {**os.environ, "WARMPOOL_URL": proxy.url, "COLUMNS": "200"}
    master, terminal = os.openpty()
    watching = await asyncio.create_subprocess_exec(
        PYTHON, "-m", "proxy", "status", "--watch", cwd=ROOT, env=environment, stdin=terminal, stdout=terminal,
    )  # fmt: skip
    os.close(terminal)
    drawn = b""
    async with asyncio.timeout(PATIENCE_S):
        while b"demo" not in drawn:
            drawn += await asyncio.to_thread(os.read, master, 65536)
        await run(proxy, "wake", "demo")
        while b"demo-1" not in drawn or b"ready" not in drawn:
            drawn += await asyncio.to_thread(os.read, master, 65536)
    watching.send_signal(signal.SIGINT)
    assert await watching.wait() == 0
    os.close(master)


async def test_logs_print_what_the_engines_wrote_and_follow(proxy: Proxy) -> None:
    configuration = str(proxy.folder / "warmpool.toml")
    status, _, err = await attempt(proxy, "logs", "demo")
    assert (status, "no log of any instance of demo" in err) == (1, True)
    assert (await attempt(proxy, "logs", "other"))[2] == "warmpool: no model 'other'; there are: demo\n"
    await run(proxy, "wake", "demo")
    assert "listening on" in await run(proxy, "logs", "org/Demo")
    nobody = ("--url", "http://127.0.0.1:9", "-c", configuration)
    assert "listening on" in await run(proxy, "logs", "org/Demo", *nobody)
    status, _, err = await attempt(proxy, "logs", "other", *nobody)
    assert (status, "there are: demo" in err) == (1, True)
    assert await run(proxy, "logs", "demo", "-n", "0") == ""
    following = await asyncio.create_subprocess_exec(
        PYTHON, "-m", "proxy", "logs", "demo", "-f", "-n", "1", "--url", proxy.url,
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert following.stdout is not None
    assert following.stderr is not None
    log = proxy.folder / "state" / "logs" / "demo-1.log"
    async with asyncio.timeout(PATIENCE_S):
        assert await following.stderr.readline() == b"==> demo-1 <==\n"
        await following.stdout.readline()
        with log.open("a") as file:
            file.write("half a ")
            file.flush()
            file.write("line\n")
        while await following.stdout.readline() != b"half a line\n":
            pass
        log.with_name("demo-2.log").write_text("another\n")
        assert await following.stdout.readline() == b"another\n"
        log.write_text("anew\n")
        while await following.stdout.readline() != b"anew\n":
            pass
    following.send_signal(signal.SIGINT)
    await following.communicate()
    assert following.returncode == 0


def test_without_a_server_the_commands_say_so() -> None:
    for arguments in (["status"], ["wake", "demo"], ["drain"], ["status", "--watch"]):
        result = CliRunner(env={"WARMPOOL_URL": "http://127.0.0.1:9"}).invoke(cli, arguments)
        assert result.exit_code == EXIT_HOST
        assert "no warmpool answers at http://127.0.0.1:9 (Connection refused)" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_port_that_the_configuration_leaves_open_has_to_be_named(tmp_path: Path) -> None:
    path = tmp_path / "warmpool.toml"
    path.write_text('[server]\nport = 0\n[models.demo.process]\ncommand = ["x", "{port}"]\n')
    result = CliRunner().invoke(cli, ["status", "-c", str(path)])
    assert (result.exit_code, "--url" in result.stderr) == (EXIT_HOST, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_options_and_models(shell: str, tmp_path: Path) -> None:
    script = CliRunner().invoke(cli, ["completion", shell])
    assert script.exit_code == 0
    assert "_WARMPOOL_COMPLETE" in script.stdout
    path = tmp_path / "warmpool.toml"
    path.write_text('[models.demo.process]\ncommand = ["x", "{port}"]\n')
    words = {
        "wa": "wake",
        "checkpoint no": "now",
        "suspend --when-busy re": "refuse",
        "wake de": "demo",
        "wake --no": "--no-wait",
    }
    for typed, completed in words.items():
        environment = {"_WARMPOOL_COMPLETE": f"{shell}_complete", "WARMPOOL_CONFIG": str(path)}
        line = f"warmpool {typed}"
        environment |= {
            "COMP_WORDS": line,
            "COMP_CWORD": typed.split()[-1] if shell == "fish" else str(line.count(" ")),
        }
        result = CliRunner(env=environment).invoke(cli, prog_name="warmpool")
        assert completed in result.stdout, (typed, result.output)


def test_the_table_shows_what_there_is() -> None:
    instance: dict[str, Any] = {
        "id": "demo-1", "state": "falling_asleep", "leases": 2, "commanded": "suspended", "next_step": None,
        "last_used_unix_s": None, "last_wake": None,
        "gpu_bytes": {"GPU-a": 3 << 30, "GPU-b": 4 << 30},
    }  # fmt: skip
    model = {"draining": True, "queue": 3, "instances": [instance]}
    gpu = {"index": 0, "name": "H100", "total_bytes": 80 << 30, "used_bytes": 12 << 30, "reserved_bytes": 0}
    disk = {"path": "/tmpfs", "total_bytes": 8 << 30, "free_bytes": 6 << 30, "images": [{"bytes": 2 << 30}]}
    shown = {"draining": False, "models": {"demo": model}, "gpus": [gpu], "memory": {"checkpoints": disk}}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(status_table.table(shown))
    text = console.export_text()
    for expected in (
        "demo draining", "falling asleep", "7 GiB", "suspended as commanded", "GPU 0: 12 GiB of 80 GiB used (H100)",
        "checkpoints: 6 GiB of 8 GiB free, 2 GiB in 1 image (/tmpfs)",
    ):  # fmt: skip
        assert expected in text, text


def test_every_command_has_a_help_text() -> None:
    def look(command: click.Command) -> None:
        assert command.help, command.name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, (command.name, parameter.name)
        if isinstance(command, click.Group):
            for inner in command.commands.values():
                look(inner)

    look(cli)


def test_patches_leave_the_old_status_alone() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert apply_patch(old, {"a": {"b": None, "e": {"f": 1}}, "d": None}) == {"a": {"c": 2, "e": {"f": 1}}}
    assert old == {"a": {"b": 1, "c": 2}, "d": 3}


def test_the_table_is_whole_at_80_columns() -> None:
    now = time.time()
    wake = {"seconds": 1.234, "from": "checkpointed", "at_unix_s": now - 3700}

    def instance(number: int, **more: Any) -> dict[str, Any]:
        return {
            "id": f"llama_70b-{number}", "state": "checkpointed", "leases": 0, "commanded": None,
            "next_step": {"to": "checkpointed", "at_unix_s": now + 3700}, "last_used_unix_s": now - 5000,
            "last_wake": wake, "gpu_bytes": {"a": 75_500_000_000}, **more,
        }  # fmt: skip

    models = {
        "llama_70b": {"draining": True, "queue": 12, "instances": [instance(1), instance(2, state="falling_asleep")]},
        "small": {"draining": False, "queue": 0, "instances": []},
    }
    gpu = {"index": 0, "name": "NVIDIA H200", "total_bytes": 140 << 30, "used_bytes": 12 << 30, "reserved_bytes": 0}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(status_table.table({"draining": False, "models": models, "gpus": [gpu]}))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.strip()]
    assert rows[0] == ["INSTANCE", "STATE", "GPU", "BUSY", "QUEUE", "NEXT", "LAST", "WAKE"]
    text = "\n".join(" ".join(row) for row in rows)
    # Every word whole, in three lines an instance.
    assert "llama_70b-1 checkpointed 70.3 GiB 0 12 checkpointed 1.23 s from" in text, text
    assert "draining idle 1h23m in 1h1m checkpointed," in text, text
    assert "1h1m ago" in text, text
    assert "llama_70b-2 falling 70.3 GiB 0 checkpointed" in text, text
    assert "small stopped 0" in text, text


def test_requests_are_whole_at_80_columns_and_a_line_each_for_programs() -> None:
    row: dict[str, Any] = {
        "at_unix_s": 0.0, "state": "ended", "status": 200, "model": "Qwen/Qwen2.5-Coder-7B-Instruct", "key": "team-a",
        "host": "127.0.0.1", "tier": "checkpointed", "wait_s": 1.5, "ttft_s": 1.9, "total_s": 12.25,
        "prompt_tokens": 1234, "completion_tokens": 567, "tokens_per_s": 54.0, "id": "c9aef84e51b83c9b3c78fefc7e7e56ab",
    }  # fmt: skip
    found = [row, {**row, "state": "waiting", "key": None, "prompt_tokens": None, "ttft_s": None}]
    header, *whole = request_commands.lines(found)
    names = "AT STATE KEY FOUND WAIT TTFT TOTAL TOKENS /S MODEL HOST ID"
    assert header.split() == names.split()
    assert [line.endswith(row["id"]) for line in whole] == [True, True]
    narrow = request_commands.lines(found, 80)
    assert len(narrow) == 2 * (1 + len(found))
    assert max(map(len, narrow)) <= 80
    for value in ("200", "team-a", "checkpointed", "12.25", "1234+567", row["model"], row["id"], "waiting"):
        assert any(value in line for line in narrow)
    assert request_commands.lines(found, 200) == [header, *whole]
    assert request_commands.lines([], 80) == []
