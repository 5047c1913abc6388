"""The command: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from proxy import __version__
from proxy.checkpoint.archive import SUFFIX
from proxy.cli import checkpoint, key, serve
from proxy.cli.failures import EXIT_CONFIG, EXIT_HOST
from proxy.cli.main import cli
from proxy.config.load import load
from proxy.server.auth import api_keys
from proxy.systemd import units
from proxy.telemetry import logs
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EMBEDDED = str(ROOT / "config" / "embedded.toml")


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    result = CliRunner(env=environment).invoke(cli, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_version_and_help() -> None:
    assert run("--version") == run("-V") == (0, f"warmpool, version {__version__}\n", "")
    status, out, _ = run("-h")
    assert status == 0
    for command in ("serve", "config", "checkpoint", "doctor"):
        assert command in out


def test_check_says_good_with_the_models() -> None:
    assert run("config", "check", EMBEDDED) == (0, f"{EMBEDDED}: good; models: demo\n", "")


def test_check_says_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[server]\nport = 'x'\n[pol]\n")
    status, out, err = run("config", "check", str(path))
    assert (status, out) == (EXIT_CONFIG, "")
    lines = err.splitlines()
    assert lines[0] == "warmpool: the configuration cannot be used"
    assert lines[1:] == [
        f"{path}: models: is required",
        f'{path}:2: server.port: must be a whole number, not "x"',
        f"{path}:3: pol: unknown key; did you mean pool?",
    ]


def test_show_prints_what_is_in_effect_and_masks_secrets(tmp_path: Path) -> None:
    path = tmp_path / "warmpool.toml"
    path.write_text('[models.demo.process]\ncommand = ["x", "{port}"]\nenv = { HF_TOKEN = "hf_secret" }\n')
    status, out, _ = run("config", "show", "-c", str(path), WARMPOOL_SERVER__PORT="1234")
    assert status == 0
    assert "hf_secret" not in out
    shown = tomllib.loads(out)
    assert shown["server"]["port"] == 1234
    assert shown["models"]["demo"]["process"]["env"] == {"HF_TOKEN": "**********"}
    assert shown["models"]["demo"]["idle"]["sleeping"] == "30s"


def test_what_show_prints_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "shown.toml"
    path.write_text(run("config", "show", "-c", EMBEDDED)[1])
    assert load(path).model_dump() == load(ROOT / "config" / "embedded.toml").model_dump()


def test_the_file_may_come_from_the_environment() -> None:
    status, out, _ = run("config", "show", WARMPOOL_CONFIG=EMBEDDED)
    assert (status, tomllib.loads(out)["models"]["demo"]["max_concurrency"]) == (0, 256)


@pytest.mark.parametrize("arguments", [["serve", "--log-format", "xml"], ["config", "check"], ["nonsense"]])
def test_wrong_arguments_end_with_usage(arguments: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert err.startswith("warmpool: ")
    assert "\nUsage:" in err


def test_every_error_begins_with_the_name_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[sever]\n")
    for arguments, status in (
        (["wake"], 2),
        (["checkpoint", "inspect", "demo", "-c", EMBEDDED], 1),
        (["checkpoint", "create", "other", "-c", EMBEDDED], 2),
        (["config", "check", str(tmp_path / "bad.toml")], EXIT_CONFIG),
        (["status", "--url", "http://127.0.0.1:1"], EXIT_HOST),
        (["logs", "demo", "--token-file", str(tmp_path / "none"), "-c", EMBEDDED], 1),
    ):
        ended, _, err = run(*arguments)
        assert (ended, err.partition(": ")[0]) == (status, "warmpool"), err


def groups(command: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in command.commands.items():
        if isinstance(inner, click.Group):
            yield from groups(inner, (*path, name))


def test_no_line_of_help_is_cut_off() -> None:
    for path in groups(cli):
        out = run(*path, "--help")[1]
        assert "..." not in out.partition("Commands:")[2], out
        assert max(map(len, out.splitlines())) <= 80


def test_the_manual_page_has_every_command_and_option_and_is_sound() -> None:
    status, page, _ = run("man")
    assert status == 0
    for text in ("checkpoint create", "discard\\-golden\\-checkpoint", "key admin\\-token", ".SH EXIT STATUS"):
        assert text in page
    if shutil.which("groff") is None:
        pytest.skip("no groff")
    made = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z"], input=page, capture_output=True, text=True, check=True
    )
    assert made.stderr == ""


def test_an_admin_token_is_only_replaced_when_asked_to(tmp_path: Path) -> None:
    file = tmp_path / "token"
    assert run("key", "admin-token", str(file))[0] == 0
    first = file.read_text()
    status, _, err = run("key", "admin-token", str(file))
    assert (status, f"{file} has a token; --yes replaces it" in err, file.read_text()) == (1, True, first)
    assert run("key", "admin-token", str(file), "--yes")[0] == 0
    second = file.read_text()
    assert second != first
    for answer, changed in (("n", False), ("y", True)):
        master, terminal = os.openpty()
        asking = subprocess.Popen(
            [sys.executable, "-m", "proxy", "key", "admin-token", str(file)], stdin=terminal, stderr=subprocess.PIPE,
            cwd=ROOT, text=True,
        )  # fmt: skip
        os.write(master, f"{answer}\n".encode())
        assert "has a token. Replace it" in asking.communicate(timeout=60)[1]
        os.close(master)
        os.close(terminal)
        assert (file.read_text() != second) == changed


def test_import_env_prints_a_configuration_or_writes_a_new_private_file(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("MODEL_ID=org/Demo-7B\nAPI_PORT=9000\nCOLOUR=red\n")
    status, out, err = run("config", "import-env", str(env))
    assert status == 0
    assert tomllib.loads(out)["server"]["port"] == 9000
    assert "COLOUR" in err
    target = tmp_path / "warmpool.toml"
    assert run("config", "import-env", str(env), "--output", str(target))[0] == 0
    assert target.stat().st_mode & 0o777 == 0o600
    assert run("config", "check", str(target))[0] == 0
    status, _, err = run("config", "import-env", str(env), "--output", str(target))
    assert (status, "File exists" in err) == (1, True)
    env.write_text("API_PORT=99999\n")
    status, out, err = run("config", "import-env", str(env), "-o", str(tmp_path / "other.toml"))
    assert (status, out) == (EXIT_CONFIG, "")
    assert "MODEL_ID" in err
    assert not (tmp_path / "other.toml").exists()


def test_checkpoint_commands_say_what_is_not_there(tmp_path: Path) -> None:
    config = tmp_path / "warmpool.toml"
    config.write_text(
        f'[pool]\ncheckpoint_dir = "{tmp_path}/images"\nstate_dir = "{tmp_path}/state"\n'
        '[models.demo.process]\ncommand = ["x", "{port}"]\n'
    )
    for arguments in (
        ["inspect", "demo"], ["analyze", "demo"], ["export", "demo"], ["archive", "demo"], ["verify", "demo"],
        ["rm", "demo"],
    ):  # fmt: skip
        status, _, err = run("checkpoint", *arguments, "-c", str(config))
        assert (status, "demo: no such checkpoint in" in err) == (1, True), arguments
    assert run("checkpoint", "ls", "--json", "-c", str(config))[:2] == (0, "[]\n")
    status, _, err = run("checkpoint", "import", str(tmp_path / "none.tar"), "-c", str(config))
    assert (status, "none.tar" in err) == (1, True)
    status, _, err = run("checkpoint", "create", "other", "-c", str(config))
    assert (status, "there are: demo" in err) == (2, True)


def test_doctor_ends_with_1_where_a_model_cannot_be_checkpointed(tmp_path: Path) -> None:
    config = tmp_path / "warmpool.toml"
    config.write_text(
        f'[pool]\ncheckpoint_dir = "{tmp_path}/images"\nstate_dir = "{tmp_path}/state"\n'
        '[models.demo.podman]\nimage = "localhost/no-such-image"\ncommand = ["{port}"]\n'
        'criu = { program = "/no/such/criu" }\n'
    )
    status, out, _ = run("doctor", "--json", "-c", str(config))
    assert status == 1
    report = json.loads(out)
    assert report["ok"] is False
    assert {"name", "status", "found", "fix"} <= set(report["checks"][0])


def test_check_reads_the_files_of_the_edge_too(tmp_path: Path) -> None:
    token, key = tmp_path / "token", tmp_path / "server.key"
    token.write_text("short")
    token.chmod(0o600)
    key.write_text("no key")
    key.chmod(0o600)
    file = tmp_path / "warmpool.toml"
    file.write_text(
        f'[server]\nkeys_file = "{tmp_path}/keys.toml"\nadmin.token_file = "{token}"\n'
        f'tls = {{ certificate = "{key}", key = "{key}" }}\n'
        '[models.demo.process]\ncommand = ["engine", "{port}"]\n'
    )
    result = CliRunner().invoke(cli, ["config", "check", str(file)])
    assert result.exit_code == 78
    for problem in ("keys.toml: cannot be read: No such file", "32 or more", "cannot be used"):
        assert problem in result.output


LIGHT = """
import os, sys
import click
from click.shell_completion import ShellComplete
from proxy.cli.main import cli

def paths(command, path=()):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from paths(inner, (*path, name))

asked = 0
shell = ShellComplete(cli, {}, "warmpool", "_WARMPOOL_COMPLETE")
for path in paths(cli):
    found = [item.value for start in ("", "-") for item in shell.get_completions([*path], start)]
    assert "--help" in found, path
    asked += 1
assert "demo" in [item.value for item in shell.get_completions(["wake"], "de")]
try:
    cli(["--version"], prog_name="warmpool")
except SystemExit as end:
    assert not end.code
heavy = {"aiohttp", "asyncio", "pydantic", "rich", "prometheus_client", "psutil"}
parts = ("proxy.pool", "proxy.server", "proxy.runtime")
print(asked, sorted(m for m in sys.modules if m in heavy or m.startswith(parts)))
"""


def test_completing_and_version_import_no_more_than_they_need() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT],
        env={**os.environ, "WARMPOOL_CONFIG": EMBEDDED},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    asked, _, heavy = done.stdout.splitlines()[-1].partition(" ")
    assert int(asked) > 30
    assert heavy == "[]"


def test_the_choices_of_options_are_those_of_what_takes_them() -> None:
    assert serve.FORMATS == logs.FORMATS
    assert tuple(api_keys.PRIORITIES) == key.PRIORITIES
    assert tuple(SUFFIX) == checkpoint.COMPRESSIONS


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed configuration, with the model `theirs`."""
    path = tmp_path / "etc" / "warmpool.toml"
    path.parent.mkdir()
    path.write_text('[server]\nport = 1\n[models.theirs.process]\ncommand = ["x", "{port}"]\n')
    monkeypatch.setattr(units, "CONFIG", path)
    for name in [name for name in os.environ if name.startswith("WARMPOOL_")]:
        monkeypatch.delenv(name)
    return path


def test_commands_use_the_installed_configuration_where_none_is_named(installed: Path) -> None:
    assert "theirs" in run("config", "show")[1]
    assert run("config", "check")[1].startswith(f"{installed}: good; models: theirs")
    assert "127.0.0.1:1" in run("status")[2]
    assert [i.value for i in ShellComplete(cli, {}, "warmpool", "_X").get_completions(["wake"], "th")] == ["theirs"]
    installed.write_text("[models.theirs]\n")
    for command in (["serve"], ["doctor"], ["checkpoint", "ls"], ["pull", "theirs"], ["key", "list"]):
        status, _, err = run(*command)
        assert (status, str(installed) in err) == (EXIT_CONFIG, True), err


def test_a_named_configuration_models_of_the_environment_or_none_at_all_come_before_the_installed_one(
    installed: Path,
) -> None:
    assert "theirs" not in run("config", "show", "-c", EMBEDDED)[1]
    assert "theirs" not in run("config", "show", WARMPOOL_CONFIG=EMBEDDED)[1]
    by_environment = run("config", "show", WARMPOOL_MODELS__OURS__PROCESS__COMMAND='["x", "{port}"]')[1]
    assert "models.ours" in by_environment
    assert "theirs" not in by_environment
    status, _, err = run("config", "show", WARMPOOL_CONFIG="")
    assert (status, "models: is required" in err) == (EXIT_CONFIG, True)
    assert run("config", "check", WARMPOOL_CONFIG="")[0] == 2


def test_models_are_completed_from_what_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def completed() -> list[str]:
        return [item.value for item in ShellComplete(cli, {}, "warmpool", "_X").get_completions(["wake"], "de")]

    path = tmp_path / "warmpool.toml"
    monkeypatch.setenv("WARMPOOL_CONFIG", str(path))
    assert completed() == []
    path.write_text("[models")
    assert completed() == []
    path.write_text(
        '[models.demo.process]\ncommand = ["x", "{port}"]\n[models.other.process]\n[models.dex]\nname = "y"\n'
    )
    assert completed() == ["demo", "dex"]
    monkeypatch.setenv("WARMPOOL_MODELS__DEEP_ONE__IDLE__SLEEPING", "10s")
    assert completed() == ["deep_one", "demo", "dex"]
