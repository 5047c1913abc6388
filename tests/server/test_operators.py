"""What is for operators and never for clients: this host's paths, other programs' lines; and what nobody is shown."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import tomli_w
from click.testing import CliRunner

from proxy.cli.main import cli
from proxy.config.load import load
from proxy.errors import ConfigError
from tests.server.test_http import ASK
from tests.support import engine_model

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2-is-the-password"


async def test_a_503_holds_no_path_and_no_line_of_criu_but_an_operator_sees_them(
    front_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = str(tmp_path / "secret-folder" / "vllm")
    front = await front_of(process={"command": [missing, "{port}"]})
    response, answer = await front.post("/v1/completions", ASK)
    assert (response.status, orjson.loads(answer)["error"]["code"]) == (503, "wake_failed")
    assert b"secret-folder" not in answer
    assert b"Errno" not in answer
    again, answer = await front.post("/v1/completions", {**ASK, "stream": True})
    assert again.status == 503
    assert b"secret-folder" not in answer
    assert missing in caplog.text
    response, answer = await front.post("/admin/models/demo/wake", {}, headers={"Content-Type": "application/json"})
    assert response.status == 503
    assert missing in orjson.loads(answer)["error"]["message"]


def written(folder: Path, **tables: Any) -> Path:
    path = folder / "warmpool.toml"
    path.write_text(tomli_w.dumps({"models": {"demo": engine_model()}, **tables}))
    return path


def shown(path: Path) -> str:
    result = CliRunner().invoke(cli, ["config", "show", "-c", str(path)])
    assert result.exit_code == 0, result.output
    return result.output


def test_config_show_masks_what_is_secret_in_urls_and_commands_and_env(tmp_path: Path) -> None:
    model = engine_model(weights=["/models"])
    model["process"] |= {
        "command": [
            "vllm", "serve", "--api-key", SECRET, f"--hf-token={SECRET}", "--port", "{port}",
            f"--proxy=http://user:{SECRET}@proxy.example:3128/x", "--max-num-batched-tokens", "2048",
        ],
        "env": {"HF_TOKEN": SECRET, "HTTPS_PROXY": f"http://u:{SECRET}@proxy.example"},
    }  # fmt: skip
    endpoint = f"https://user:{SECRET}@otel.example:4318/v1/traces?api-key={SECRET}"
    output = shown(written(tmp_path, models={"demo": model}, tracing={"endpoint": endpoint}))
    assert SECRET not in output
    values = tomllib.loads(output)
    assert values["tracing"]["endpoint"] == "https://**********@otel.example:4318/v1/traces?**********"
    command = values["models"]["demo"]["process"]["command"]
    assert command[:5] == ["vllm", "serve", "--api-key", "**********", "--hf-token=**********"]
    assert command[-3:] == ["--proxy=http://**********@proxy.example:3128/x", "--max-num-batched-tokens", "2048"]


@pytest.mark.parametrize(
    "tables",
    [
        {"tracing": {"endpoint": f"ftp://user:{SECRET}@otel.example"}},
        {"tracing": {f"https://u:{SECRET}@x": 1}},
        {"models": {"demo": engine_model() | {"process": {"command": ["x"], "env": {SECRET: 1}}}}},
        {"models": {"demo": engine_model() | {"process": {"command": ["x"], "env": {SECRET.upper(): [1]}}}}},
        {"models": {"demo": engine_model() | {"process": {"command": ["x"], "env": f"TOKEN={SECRET}"}}}},
        {"models": {"demo": engine_model() | {"process": {"command": ["x"], "cwd": f"https://u:{SECRET}@x"}}}},
        {"models": {"demo": engine_model(weights=[f"https://u:{SECRET}@x"])}},
        {"server": {"default_model": f"https://u:{SECRET}@x"}},
    ],
)
def test_no_error_of_the_configuration_shows_a_secret(tmp_path: Path, tables: dict[str, Any]) -> None:
    path = written(tmp_path, **tables)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert SECRET not in str(raised.value)
    assert SECRET.upper() not in str(raised.value)
    result = CliRunner().invoke(cli, ["config", "check", str(path)])
    assert result.exit_code == 78
    assert SECRET.lower() not in result.output.lower()


def test_no_error_of_the_environment_shows_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    for name, value in (
        ("WARMPOOL_MODELS__DEMO__PROCESS__ENV", f'{{"TOKEN": "{SECRET}"'),
        ("WARMPOOL_MODELS__DEMO__PROCESS__ENV", f'["{SECRET}"]'),
        ("WARMPOOL_TRACING__ENDPOINT", f"x://u:{SECRET}@x"),
        ("WARMPOOL_TRACING", f'{{"endpoint": "{SECRET}"'),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError) as raised:
                load(path)
        assert SECRET not in str(raised.value), name


def test_the_commands_show_no_password_of_a_servers_url() -> None:
    url = f"http://user:{SECRET}@127.0.0.1:9"
    result = CliRunner().invoke(cli, ["status", "--url", url])
    assert result.exit_code == 69
    assert SECRET not in result.output


def test_an_error_about_a_variable_still_names_it(tmp_path: Path) -> None:
    process = {"command": ["x"], "env": {"HF_TOKEN": 1}}
    with pytest.raises(ConfigError, match=r"models\.demo\.process\.env\.HF_TOKEN: "):
        load(written(tmp_path, models={"demo": {"process": process}}))
