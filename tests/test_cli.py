"""The command: what it prints and how it ends."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from proxy import __version__
from proxy.cli import EXIT_CONFIG, cli
from proxy.config import load
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDED = str(ROOT / "config" / "embedded.toml")


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    result = CliRunner(env=environment).invoke(cli, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_version_and_help() -> None:
    assert run("--version") == (0, f"warmpool, version {__version__}\n", "")
    status, out, _ = run("-h")
    assert status == 0
    for command in ("serve", "config"):
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
    assert all(line.startswith(f"{path}: ") for line in lines[1:])
    assert len(lines) == 4


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
    assert "Usage:" in err
