"""`[defaults]`, `{env:NAME}`, and volumes as podman writes them."""

from __future__ import annotations

import json
import os
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from proxy.cli.main import cli
from proxy.config.load import load, parse
from proxy.config.masking import masked
from proxy.config.schema import schema
from proxy.errors import ConfigError
from proxy.runtime.podman import container
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.config.settings import Settings


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.upper().startswith("WARMPOOL_")]:
        monkeypatch.delenv(name)


def settings(text: str) -> Settings:
    return parse(text, "w.toml").settings


def problems(text: str) -> str:
    with pytest.raises(ConfigError) as failure:
        parse(text, "w.toml")
    return str(failure.value)


# --- defaults ---

TWO = """
[defaults]
max_concurrency = 8
weights = ["/a"]
[defaults.idle]
sleeping = "1s"
suspended = "2s"
[defaults.podman]
image = "localhost/engine"
command = ["--port", "{port}"]
env = { A = "1", B = "1" }
[models.one]
weights = ["/b"]
[models.one.idle]
suspended = "3s"
[models.two.podman]
env = { B = "2" }
"""


def test_defaults_are_merged_key_by_key_and_models_win() -> None:
    models = settings(TWO).models
    one, two = models["one"], models["two"]
    assert (one.max_concurrency, two.max_concurrency) == (8, 8)
    assert (one.idle.sleeping, one.idle.suspended, two.idle.suspended) == (1.0, 3.0, 2.0)
    assert [str(path) for path in (*one.weights, *two.weights)] == ["/b", "/a"]
    assert one.podman is not None
    assert two.podman is not None
    assert one.podman.image == two.podman.image == "localhost/engine"
    assert {name: value.get_secret_value() for name, value in two.podman.env.items()} == {"A": "1", "B": "2"}


def test_an_engine_table_of_the_defaults_is_not_for_a_model_with_the_other_one() -> None:
    models = settings(f'{TWO}[models.three.process]\ncommand = ["{{port}}"]\n').models
    assert models["three"].podman is None
    assert models["three"].max_concurrency == 8


def test_a_mistake_in_the_defaults_is_said_once_and_where_it_is() -> None:
    lines = problems(TWO.replace("max_concurrency = 8", 'max_concurrency = 8\ncanry = "first"\nstart_timeout = 3'))
    assert lines.splitlines() == [
        "w.toml:4: defaults.canry: unknown key; did you mean canary?",
        'w.toml:5: defaults.start_timeout: a duration needs a unit: "500ms", "90s", "1m30s", "2h" or "1d"',
    ]
    assert problems(TWO.replace("max_concurrency = 8", 'name = "x"')) == (
        "w.toml:3: defaults.name: cannot be that of all models; set it in [models.NAME]"
    )
    assert problems('defaults = 3\n[models.a.process]\ncommand = ["{port}"]\n') == "w.toml:1: defaults: must be a table"


def test_defaults_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMPOOL_DEFAULTS__IDLE__SLEEPING", "500ms")
    monkeypatch.setenv("WARMPOOL_DEFAULTS__MAX_QUEUE", "7")
    models = settings(TWO).models
    assert {(m.idle.sleeping, m.max_queue) for m in models.values()} == {(0.5, 7)}


def test_what_is_shown_has_the_defaults_in_the_models_and_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(TWO)
    shown = CliRunner().invoke(cli, ["config", "show", "-c", str(path)]).stdout
    assert "defaults" not in tomllib.loads(shown)
    again = tmp_path / "shown.toml"
    again.write_text(shown.replace("**********", "1"))
    assert load(again).models["one"].idle == load(path).models["one"].idle


# --- references ---

SECRET = "hf_do-not-show-me"
REFERRING = """
[server]
port = "{env:PORT_OF_TEST}"
[defaults.process]
env = { HF_TOKEN = "{env:TOKEN_OF_TEST}" }
[models.demo]
max_concurrency = "{env:COUNT_OF_TEST}"
aliases = ["x-{env:TOKEN_OF_TEST}-y"]
[models.demo.idle]
sleeping = "{env:COUNT_OF_TEST}s"
[models.demo.process]
command = ["x", "{port}", "--hf-token={env:TOKEN_OF_TEST}", "{env:TOKEN_OF_TEST}"]
"""


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PORT": "8181", "TOKEN": SECRET, "COUNT": "9"}.items():
        monkeypatch.setenv(f"{name}_OF_TEST", value)


@pytest.mark.usefixtures("variables")
def test_references_are_replaced_whatever_the_key_takes() -> None:
    found = settings(REFERRING)
    demo = found.models["demo"]
    assert (found.server.port, demo.max_concurrency, demo.idle.sleeping) == (8181, 9, 9.0)
    assert demo.process is not None
    assert demo.process.command == ["x", "{port}", f"--hf-token={SECRET}", SECRET]
    assert demo.process.env["HF_TOKEN"].get_secret_value() == SECRET


@pytest.mark.usefixtures("variables")
def test_what_came_from_the_environment_is_shown_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(REFERRING)
    shown = CliRunner().invoke(cli, ["config", "show", "-c", str(path)]).stdout
    assert SECRET not in shown
    plain = tomllib.loads(shown)
    assert plain["server"]["port"] == "{env:PORT_OF_TEST}"
    assert plain["models"]["demo"]["process"]["command"][2:] == [
        "--hf-token={env:TOKEN_OF_TEST}", "{env:TOKEN_OF_TEST}",
    ]  # fmt: skip
    again = tmp_path / "shown.toml"
    again.write_text(shown)
    assert load(again).model_dump() == load(path).model_dump()


@pytest.mark.usefixtures("variables")
def test_what_came_from_the_environment_is_in_no_message() -> None:
    wrong = REFERRING.replace('"{env:COUNT_OF_TEST}s"', '"{env:TOKEN_OF_TEST}"').replace('"{port}", ', "")
    wrong += (
        'cwd = "{env:TOKEN_OF_TEST}"\n[models.other]\nname = "{env:TOKEN_OF_TEST}"\ncanary = "{env:TOKEN_OF_TEST}"\n'
    )
    assert SECRET not in problems(wrong)
    twice = f'{REFERRING}[models.other]\nname = "x-{{env:TOKEN_OF_TEST}}-y"\nprocess.command = ["{{port}}"]\n'
    assert SECRET not in problems(twice)


@pytest.mark.usefixtures("variables")
def test_what_came_from_the_environment_is_masked_in_what_is_kept_of_an_engine() -> None:
    process = settings(REFERRING).models["demo"].process
    assert process is not None
    assert SECRET in process.command
    assert SECRET not in str(masked(process.model_dump(mode="json")))


def test_a_variable_that_is_not_set_is_said_once_with_its_key() -> None:
    text = '[server]\nport = "{env:NOT_SET_A}"\n[models.demo.process]\ncommand = ["{port}", "{env:NOT_SET_B}{env:1}"]\n'
    assert problems(text).splitlines() == [
        "w.toml:2: server.port: {env:NOT_SET_A}: the environment variable NOT_SET_A is not set",
        (
            "w.toml:4: models.demo.process.command.1: {env:NOT_SET_B}: the environment variable NOT_SET_B is not set; "
            "{env:1} names no environment variable: write {env:NAME}"
        ),
    ]


# --- volumes ---


def test_volumes_as_podman_writes_them() -> None:
    text = """
    [models.a.podman]
    image = "x"
    command = ["{port}"]
    volumes = ["/srv/models:/models:ro,z", "cache:/root/.cache", { source = "/etc/x", target = "/x" }]
    """
    model = settings(text).models["a"]
    assert model.podman is not None
    assert [(v.source, str(v.target), v.writable, v.options) for v in model.podman.volumes] == [
        ("/srv/models", "/models", False, ["z"]),
        ("cache", "/root/.cache", True, []),
        ("/etc/x", "/x", False, []),
    ]
    table = text.replace(
        '"/srv/models:/models:ro,z"', '{ source = "/srv/models", target = "/models", options = ["z"] }'
    )
    again = settings(
        table.replace('"cache:/root/.cache"', '{ source = "cache", target = "/root/.cache", writable = true }')
    )
    assert container.spec_digest("a", again.models["a"]) == container.spec_digest("a", model)


@pytest.mark.parametrize(
    ("volume", "sentence"),
    [
        ("/srv", "a volume is SOURCE:TARGET or SOURCE:TARGET:OPTIONS"),
        ("/srv:/x:rx", "rx is none of the options of a volume: ro, rw, z, Z"),
        ("/srv:x", "volumes.0.target: 'x' is not an absolute path"),
        ("./srv:/x", "'./srv' is neither an absolute path nor the name of a volume"),
    ],
)
def test_volumes_that_cannot_be(volume: str, sentence: str) -> None:
    found = problems(f'[models.a.podman]\nimage = "x"\ncommand = ["{{port}}"]\nvolumes = ["{volume}"]\n')
    assert sentence in found, found


# --- the schema ---


def test_the_schema_takes_every_file_in_config_and_refuses_what_is_wrong() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    printed = CliRunner().invoke(cli, ["config", "schema"]).stdout
    check = jsonschema.Draft7Validator(json.loads(printed))
    jsonschema.Draft7Validator.check_schema(schema())
    for path in (ROOT / "config").glob("*.toml"):
        assert [*check.iter_errors(tomllib.loads(path.read_text()))] == [], path.name
    for good in (TWO, REFERRING, '[models.a.podman]\nvolumes = ["/a:/b:ro,z"]'):
        assert [*check.iter_errors(tomllib.loads(good))] == [], good
    wrongs: list[Any] = [
        "colour = 1", "[server]\nport = 0.5", "[models.a]\ncanary = 'x'", "[models.a]\nstart_timeout = '3'",
        "[defaults]\nname = 'x'", "[models.A]\nmax_queue = 0", "[models.a]\nmax_queue = 0",
        "[models.a]\ngpu_memory = 'much'",
    ]  # fmt: skip
    for wrong in wrongs:
        found = [*check.iter_errors(tomllib.loads(wrong))]
        assert found or wrong.startswith("[models.A]"), wrong


def test_the_schema_has_every_default_as_it_is_written() -> None:
    keys = schema()["$defs"]["ModelSettings"]["properties"]
    assert keys["queue_timeout"]["default"] == "5m"
    assert keys["canary"]["anyOf"][0]["enum"] == ["first", "always", "never"]
    assert schema()["$defs"]["PodmanEngineSettings"]["properties"]["shm_size"]["default"] == "64MiB"
