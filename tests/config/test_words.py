"""What is said of a wrong configuration: in our own words, with file, line and key, and what was probably meant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from proxy.config.explain import PATTERNS
from proxy.config.load import load, parse
from proxy.config.positions import Positions
from proxy.config.schema import schema
from proxy.config.settings import Settings
from proxy.config.values import parse_duration, parse_size
from proxy.errors import ConfigError
from tests.support import examples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOREIGN = re.compile(r"Input should|[Vv]alue error|valid |should (match|be|have)|pydantic|dictionary|instance of")
MINIMAL = '[models.demo.process]\ncommand = ["engine", "{port}"]\n'


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in __import__("os").environ if n.upper().startswith("WARMPOOL_")]:
        monkeypatch.delenv(name)


def said(text: str) -> list[str]:
    with pytest.raises(ConfigError) as failure:
        parse(text, "w.toml")
    return str(failure.value).splitlines()


def test_each_problem_has_the_line_that_it_is_written_in() -> None:
    text = """\
[server]
limits = { url = 10 }
port = "many"
tls.minimum_version = "1.1"

[models."demo"]
canary = "allways"
[models.demo.process]
env = { A = 3 }
command = [
    "a = 1",
    "{port}",
]
[models.demo.health]
path = '''
interval = 3
'''
[[models.demo.podman.volumes]]
source = "/a"
[[models.demo.podman.volumes]]
souce = "/a"
"""
    assert said(text) == [
        "w.toml:2: server.limits: url must be 256 bytes at least",
        'w.toml:3: server.port: must be a whole number, not "many"',
        'w.toml:4: server.tls.minimum_version: must be one of "1.2", "1.3", not "1.1"',
        (
            'w.toml:7: models.demo.canary: must be one of "first", "always", "never", not "allways"; '
            'did you mean "always"?'
        ),
        "w.toml:9: models.demo.process.env.A: must be text in quotes",
        "w.toml:15: models.demo.health.path: must be a path that begins with /, without spaces",
        "w.toml:18: models.demo.podman.image: is required",
        "w.toml:18: models.demo.podman.command: is required",
        "w.toml:18: models.demo.podman.volumes.0.target: is required",
        "w.toml:20: models.demo.podman.volumes.1.source: is required",
        "w.toml:20: models.demo.podman.volumes.1.target: is required",
        "w.toml:21: models.demo.podman.volumes.1.souce: unknown key; did you mean source?",
    ]


def test_a_syntax_error_has_its_line() -> None:
    assert said('[server]\nhost = "x\n')[0].startswith("w.toml:2: is not TOML: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[models.a]\ngpu_memory = 72", 'gpu_memory: 72 has no unit, and would be bytes: write "72GiB" or "72MiB"'),
        ('[models.a]\nhost_memory = "6"', 'host_memory: 6 has no unit, and would be bytes: write "6GiB" or "6MiB"'),
        ("[models.a.podman]\nshm_size = 8", "shm_size: 8 has no unit"),
        ('[models.a]\ncommand = ["x"]', "command: unknown key; it belongs in the table process or podman"),
        ("[models.a.iddle]", "iddle: unknown key; did you mean idle?"),
        ("[sever]", "sever: unknown key; did you mean server?"),
        ("server = 3", "server: must be a table"),
        ("[models.a]\naliases = 3", "aliases: must be a list"),
        ("[models.a]\nname = ''", "name: must not be empty"),
        ("[models.a]\ngpus = [0, -1]", "gpus.1: must be 0 at least, not -1"),
        ("[models.a]\nweights_copy = 'perhaps'", 'weights_copy: must be true or false, not "perhaps"'),
        ("[models.a.parameters]\ncaps = { n = 'x' }", 'caps.n: must be a number, not "x"'),
        ("[pool]\nengine_log_size = '1KiB'", "engine_log_size: must be 64KiB at least"),
        ("[tracing]\nsample = 2.5", "sample: must be 1 at most, not 2.5"),
        ("[runtime.podman]\ntimeout = '0s'", "timeout: must be more than 0"),
        ("[models.a.reseed]\npath = '/x'\ntimeout = '2h'", "timeout: must be "),
    ],
)
def test_what_is_wrong_is_said_in_our_words(text: str, sentence: str) -> None:
    lines = said(text)
    assert any(sentence in line for line in lines), lines
    assert not any(FOREIGN.search(line) for line in lines), lines


def test_a_duration_may_have_a_space_and_memory_may_be_bytes() -> None:
    assert parse_duration("30 s") == 30.0
    assert parse_duration("1m 30s") == parse_duration("1 m 30 s") == 90.0
    assert [parse_size(text) for text in ("16GiB", "16 gib", "1.5kB", "4096", 0)] == [16 << 30, 16 << 30, 1500, 4096, 0]
    settings = parse(f"{MINIMAL}[models.demo]\ngpu_memory = 4294967296\n[pool]\nmemory_reserve = 0\n", "").settings
    assert settings.models["demo"].gpu_memory == 4 << 30


# --- whatever somebody writes ---


def places(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key of the schema."""
    definitions = schema()["$defs"]

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]]
        for name, inner in node.get("properties", {}).items():
            yield (*path, name)
            yield from walk(inner, (*path, name))
        for inner in node.get("patternProperties", {}).values():
            yield from walk(inner, (*path, "demo"))

    yield from walk(node, path)


PLACES = sorted({*places(schema())} - {("models",)})
WRONG = st.one_of(
    st.integers(-10, 10**12), st.booleans(), st.floats(allow_nan=True), st.text(max_size=8), st.just([]), st.just({}),
    st.just([[1]]), st.just({"a": {"b": 1}}), st.just([1, "x", {"y": 2}]),
)  # fmt: skip


@given(st.sampled_from(PLACES), WRONG)
@hypothesis_settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_message_is_pydantics(place: tuple[str, ...], value: Any) -> None:
    table: dict[str, Any] = {}
    here = table
    for name in place[:-1]:
        here = here.setdefault(name, {})
    here[place[-1]] = value
    from tomli_w import dumps

    try:
        parse(dumps(table), "w.toml")
    except ConfigError as error:
        for problem in error.problems:
            assert not FOREIGN.search(problem.replace(repr(value), "")), problem


def test_every_pattern_says_what_it_asks_for() -> None:
    def patterns(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("pattern"), str):
                yield node["pattern"]
            for name, inner in node.items():
                yield from patterns(inner)
                if name == "patternProperties":
                    yield from inner
        elif isinstance(node, list):
            for inner in node:
                yield from patterns(inner)

    own = {pattern for pattern in patterns(Settings.model_json_schema()) if "ms|s|m" not in pattern}
    own = {pattern for pattern in own if "kKmM" not in pattern}
    assert own - set(PATTERNS) == set()


@given(st.text(alphabet="[]=.\"'#ab \n", max_size=60))
def test_any_text_has_positions_or_is_no_toml(text: str) -> None:
    import tomllib

    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    Positions(text).line_of(("a", "b"))


# --- what can never work ---


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            (
                "[pool]\nmax_awake = 1\n[models.demo]\nmin_ready = 1\nmax_instances = 2\n"
                '[models.b]\nmin_ready = 1\nprocess.command = ["{port}"]'
            ),
            "pool.max_awake: 1 may be awake, and min_ready asks for 2: models.demo (1), models.b (1)",
        ),
        (
            '[pool]\nmax_awake = 1\n[models.b]\nmin_ready = 1\nprocess.command = ["{port}"]',
            (
                "pool.max_awake: models.demo could never run: 1 may be awake, and so many stay so by min_ready or "
                "evictable: models.b (1)"
            ),
        ),
        (
            '[pool]\nmax_awake = 2\n[models.b]\nevictable = false\nmax_instances = 2\nprocess.command = ["{port}"]',
            (
                "pool.max_awake: models.demo could never run: 2 may be awake, and so many stay so by min_ready or "
                "evictable: models.b (2)"
            ),
        ),
        ('[models.demo.idle]\narchived = "1h"', "models.demo.idle.archived: there is no archive: set pool.archive_dir"),
        ('[models.demo]\nstart_timeout = "0s"', "models.demo.start_timeout: must be more than 0s"),
        ('[models.demo.health]\ninterval = "0s"', "models.demo.health.interval: must be more than 0s"),
        (
            '[runtime.process]\nports = "20000-20001"\n[models.demo]\nmax_instances = 3',
            "models.demo.max_instances: 3 engines need as many ports, and runtime.process.ports (20000-20001) has 2",
        ),
        ('[pool]\ncheckpoint_dir = "/x"\narchive_dir = "/x/y"', "pool.archive_dir: /x/y lies in pool.checkpoint_dir"),
        ('[pool]\nstate_dir = "/x"\narchive_dir = "/x"', "pool.archive_dir: /x is pool.state_dir too"),
        (
            '[models.v]\nweights_copy = true\nprocess.command = ["vllm", "serve", "m", "--port", "{port}"]',
            "models.v.weights_copy: needs the engine's sleep mode: add --enable-sleep-mode",
        ),
        (
            (
                '[models.p]\nhost_memory = "8GiB"\n[models.p.podman]\nimage = "x"\ncommand = ["{port}"]\n'
                'memory_limit = "4GiB"'
            ),
            "models.p.host_memory: is more than podman.memory_limit allows",
        ),
    ],
)
def test_what_can_never_work_is_refused(text: str, sentence: str) -> None:
    lines = said(f"{text}\n{MINIMAL}")
    assert any(sentence in line for line in lines), lines


def test_a_file_that_is_whole_is_as_good_as_before(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(MINIMAL)
    assert load(path).names() == {"demo": "demo"}
