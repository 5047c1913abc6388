"""Settings: the file, the environment, every problem at once, the reference."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from proxy.config.engine import PodmanEngineSettings, ProcessEngineSettings
from proxy.config.load import load
from proxy.config.model import ModelSettings
from proxy.config.pool import PoolSettings
from proxy.config.reference import reference
from proxy.config.reference_page import page
from proxy.config.settings import Settings
from proxy.config.tracing import TracingSettings
from proxy.config.values import format_duration, format_size, parse_duration
from proxy.errors import ConfigError
from proxy.tiers import Tier
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PODMAN = '[models.a.podman]\nimage = "x"\ncommand = ["{port}"]\n'
MINIMAL = '[models.demo.process]\ncommand = ["engine", "{port}"]\n'


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a configuration; the environment has none of our variables."""
    for name in [n for n in __import__("os").environ if n.upper().startswith("WARMPOOL_")]:
        monkeypatch.delenv(name)

    def write_(text: str) -> Path:
        path = tmp_path / "warmpool.toml"
        path.write_text(text)
        return path

    return write_


def problems(path: Path | None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as failure:
        load(path)
    assert failure.value.source == (str(path) if path else "environment")
    return failure.value.problems


# --- the file ---


def test_a_model_with_an_engine_is_enough(write: Callable[[str], Path]) -> None:
    settings = load(write(MINIMAL))
    assert settings.server.host == "127.0.0.1"
    assert settings.names() == {"demo": "demo"}
    assert settings.models["demo"].idle.timetable() == {
        Tier.SLEEPING: 30.0,
        Tier.SUSPENDED: 120.0,
        Tier.CHECKPOINTED: 600.0,
    }


def test_all_problems_are_reported_at_once_with_key_and_what_is_allowed(write: Callable[[str], Path]) -> None:
    found = problems(
        write(
            """
            colour = "red"
            [server]
            port = 99999
            hosst = "x"
            colour = "red"
            [pool]
            checkpoint_reserve = "16 gigs"
            [runtime.process]
            ports = "9-8"
            [models.Bad-Key.process]
            command = ["x", "{port}"]
            [models.a]
            min_ready = 2
            [models.a.idle]
            sleeping = 30
            [models.b.process]
            command = []
            [models.c.process]
            command = ["x", "{prot}"]
            [models.d.idle]
            sleeping = "2h"
            suspended = "1h"
            """
        )
    )
    text = "\n".join(found)
    for expected in (
        r"^colour: unknown key; allowed here: defaults, fleet, models, pool, runtime, server, tracing$",
        r"^server.port: must be 65535 at most, not 99999$",
        r"^server.hosst: unknown key; did you mean host\?$",
        r"^server.colour: unknown key; allowed here: admin, allow_anyone, azure_paths, body_limit, .*host, .*port",
        r'^pool.checkpoint_reserve: a size is a number with a unit, "512MiB" or "16GiB"',
        r"^runtime.process: ports must be FIRST-LAST",
        r"^models.Bad-Key: a model's key has lower-case letters",
        r'^models.a.idle.sleeping: a duration needs a unit: "500ms", .*or "never"$',
        r"^models.b.process.command: there must be one at least$",
        r"^models.c.process: command: \{prot\} is not one of",
        r"^models.d.idle: suspended comes before sleeping",
    ):
        assert re.search(expected, text, re.MULTILINE), f"{expected}\n--- not in ---\n{text}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "models: is required"),
        ("models = {}", "models: there must be one at least"),
        ("[models.demo]", "models.demo: no engine"),
        ("[server\n", "is not TOML"),
        ('[models.a.process]\ncommand = ["x"]', "{port} is missing"),
        (MINIMAL + MINIMAL, "is not TOML"),
        (MINIMAL + '[models.other]\nname = "demo"\nprocess.command = ["{port}"]', "belongs to models.demo already"),
        ('[models.a]\ngpu_memory = "0B"\nprocess.command = ["{port}"]', "models.a.gpu_memory: "),
        ('[models.a]\ngpu_memory = "72"\ngpus = []\nprocess.command = ["{port}"]', "models.a.gpus: "),
        ('[models.a]\ngpus = [-1]\nprocess.command = ["{port}"]', "models.a.gpus.0: "),
        (MINIMAL + '[pool]\ngpu_creep = "a lot"', "pool.gpu_creep: "),
        ('[models.a]\nmin_ready = 2\nprocess.command = ["{port}"]', "more than max_instances"),
        (
            MINIMAL + '[server]\ndefault_model = "other"',
            "server.default_model: there is no model 'other'; there are demo",
        ),
        (
            MINIMAL + '[models.other]\nadapters = ["demo"]\nprocess.command = ["{port}"]',
            "belongs to models.demo already",
        ),
        (MINIMAL + '[server]\nheartbeat = "50ms"', "server: heartbeat must be at least 100ms"),
        (MINIMAL + "[models.demo.routes]\nsleep = true", "models.demo.routes.sleep: unknown key; allowed here: audio"),
        (MINIMAL + '[models.demo.parameters]\nremove = ["model"]', "remove: `model` is not a parameter"),
        (
            MINIMAL + "[models.demo.parameters]\ncaps = { n = 1 }\ndefaults = { n = 2 }",
            "n must be a number up to its cap",
        ),
        (MINIMAL + '[models.demo.parameters]\ncaps = { n = 1 }\nremove = ["n"]', "'n' has a default or a cap too"),
        (MINIMAL + '[models.demo.parameters]\ncaps = { n = "many" }', "models.demo.parameters.caps.n"),
        (PODMAN + MINIMAL.replace("demo", "a"), "more than one engine: keep one of the tables process, podman"),
        (PODMAN.replace("{port}", "8000"), "{port} is missing"),
        (PODMAN + "criu = { tcp_established = true }", "tcp_established and tcp_close exclude each other"),
        (PODMAN + 'criu = { options = ["--evil"] }', "models.a.podman.criu.options.0"),
        (PODMAN + 'criu = { action_scripts = { "pre-lunch" = "/x" } }', "action_scripts"),
        (PODMAN + 'criu = { action_scripts = { "pre-dump" = "x" } }', "is not an absolute path"),
        (PODMAN + 'criu = { compression = "xz" }', 'must be one of "none", "gzip", "zstd", not "xz"'),
        (
            PODMAN + 'volumes = [{ source = "/x", target = "/x", readonly = true }]',
            "models.a.podman.volumes.0.readonly: unknown key; allowed here: options, source, target, writable",
        ),
        (
            PODMAN + 'volumes = [{ source = "../x", target = "/x" }]',
            "neither an absolute path nor the name of a volume",
        ),
        (PODMAN + 'ulimits = { nofile = "many" }', "models.a.podman.ulimits.nofile"),
        (PODMAN + 'security_options = ["seccomp=unconfined"]', "models.a.podman.security_options.0"),
        (PODMAN + 'network = "host"\n[models.a]\nmax_instances = 2', "clones would share one port"),
        (PODMAN + "[models.a]\nmax_instances = 2\nkeep = false", "keep = false needs max_instances = 1"),
        (
            PODMAN + "criu = { tcp_established = true, tcp_close = false }\n[models.a]\nmax_instances = 2",
            "connections cannot be cloned",
        ),
    ],
)
def test_what_cannot_be_used_is_said(write: Callable[[str], Path], text: str, problem: str) -> None:
    assert problem in "\n".join(problems(write(text)))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems(tmp_path / "missing.toml") == ("cannot be read: No such file or directory",)
    assert problems(tmp_path) == ("cannot be read: Is a directory",)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "is not TOML" in problems(tmp_path / "binary")[0]


# --- the environment ---


def test_the_environment_wins_over_the_file(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMPOOL_SERVER__PORT", "9999")
    monkeypatch.setenv("WARMPOOL_MODELS__DEMO__IDLE__SLEEPING", "7s")
    monkeypatch.setenv("WARMPOOL_MODELS__DEMO__PROCESS__ENV", '{"Mixed_Case": "kept"}')
    settings = load(write("[server]\nport = 1\nhost = '::1'\n" + MINIMAL))
    assert (settings.server.port, settings.server.host) == (9999, "::1")
    demo = settings.models["demo"]
    assert demo.idle.sleeping == 7.0
    assert demo.process is not None
    assert demo.process.env["Mixed_Case"].get_secret_value() == "kept"
    assert demo.process.command == ["engine", "{port}"]


def test_the_environment_alone_is_enough(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMPOOL_MODELS", '{"demo": {"process": {"command": ["x", "{port}"]}}}')
    assert load(None).names() == {"demo": "demo"}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("WARMPOOL_SERVER__PORT", "many", "server.port: .*from environment variable WARMPOOL_SERVER__PORT"),
        ("WARMPOOL_SERVR__PORT", "1", "WARMPOOL_SERVR__PORT: not a key; they begin with"),
        ("WARMPOOL_SERVER__PROT", "1", "server.prot: unknown key"),
        ("WARMPOOL_MODELS__DEMO__PROCESS__ENV__KEY", "1", r"set WARMPOOL_MODELS__DEMO__PROCESS__ENV='\{\"KEY\""),
        ("WARMPOOL_MODELS", "{", "environment: "),
    ],
)
def test_a_bad_variable_is_named(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)
    assert re.search(problem, "\n".join(problems(write(MINIMAL))))


# --- values ---


@given(st.integers(0, 10**10))
def test_durations_survive_being_written(milliseconds: int) -> None:
    assert round(parse_duration(format_duration(milliseconds / 1000)) * 1000) == milliseconds


@given(st.integers(0, 1 << 50))
def test_sizes_survive_being_written(count: int) -> None:
    settings = PoolSettings(checkpoint_reserve=format_size(count))
    assert settings.checkpoint_reserve == count


@pytest.mark.parametrize("text", ["90", 90, "1s2", "-1s", "1 day", "", None, True])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="needs a unit"):
        parse_duration(text)


# --- the edge ---


@pytest.mark.parametrize(
    ("server", "problem"),
    [
        ('host = "0.0.0.0"', "server: 0.0.0.0 can be reached by others, and there are no keys: set keys_file"),
        ('host = "::"', "server: :: can be reached by others"),
        ('host = "warm.example.org"', "server: warm.example.org can be reached by others"),
        ('tls = { certificate = "/c" }', "server.tls: certificate and key belong together"),
        ('tls = { client_ca = "/c" }', "server.tls: client_ca needs certificate and key"),
        ('cors = { origins = ["example.org"] }', "server.cors.origins.0: "),
        ('cors = { origins = ["https://example.org/page"] }', "server.cors.origins.0: "),
        ('cors = { origins = ["https://*"] }', "server.cors: 'https://*' is nearly every page"),
        ('cors = { origins = ["https://*.example.org"] }', "server.cors: 'https://*.example.org': a * stands for all"),
        ('admin = { socket_group = "ops" }', "server.admin: socket_group needs socket"),
        ("limits = { head = 1000 }", "server.limits: head must be as large as url"),
        ("limits = { url = 10 }", "server.limits: url must be 256 bytes at least"),
        ('limits = { head_timeout = "0s" }', "server.limits: head_timeout must be more than 0s"),
    ],
)
def test_what_would_leave_the_edge_open_or_shut(write: Callable[[str], Path], server: str, problem: str) -> None:
    assert any(p.startswith(problem) for p in problems(write(f"[server]\n{server}\n{MINIMAL}")))


@pytest.mark.parametrize(
    "server",
    [
        'host = "127.8.0.1"',
        'host = "::1"',
        'host = "localhost"',
        'host = "0.0.0.0"\nkeys_file = "/k"',
        'host = "0.0.0.0"\ntls = { certificate = "/c", key = "/k", client_ca = "/a" }',
        'host = "0.0.0.0"\nallow_anyone = true',
        'cors = { origins = ["https://a.example.org:8443", "*"] }',
        'cors = { origins = ["vscode-webview://*", "app://*"] }',
        'limits = { stall_timeout = "never" }',
    ],
)
def test_what_may_be_listened_on(write: Callable[[str], Path], server: str) -> None:
    load(write(f"[server]\n{server}\n{MINIMAL}"))


# --- the files in config/ ---


def keys_of(section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield name
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from keys_of(candidate)


def test_the_page_of_all_keys_is_up_to_date() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert text == page(), "write it anew: make reference"
    for path in ("[server]", "[models.NAME]", "[models.NAME.podman.criu]", "[[models.NAME.podman.volumes]]"):
        assert f"## `{path}`\n" in text
    assert "| `tcp_close` | `true`, `false` | `true` |" in text
    assert "| `sleeping` | duration or `never` | `30s` |" in text


def test_the_reference_is_complete_and_loads_to_the_defaults(write: Callable[[str], Path]) -> None:
    path = ROOT / "config" / "reference.toml"
    text = path.read_text()
    assert text == reference(), "write it anew: make reference"
    for key in keys_of(Settings):
        assert re.search(rf"^(# )?{key} = |^\[\[?(.+\.)?{key}(\..+)?\]\]?$", text, re.MULTILINE), key
    settings = load(path)
    written = tomllib.loads(text)["models"]
    process, podman = written["demo"]["process"], written["contained"]["podman"]
    bare = Settings(
        models={
            "demo": {
                "process": {"command": process["command"]},
                "extra_routes": written["demo"]["extra_routes"],
            },
            "contained": {"podman": {name: podman[name] for name in ("image", "command", "volumes")}},
        }
    )
    assert settings.model_dump() == bare.model_dump()
    with_all_keys = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    assert load(write(with_all_keys)).models["demo"].name == "org/Model-7B"


def test_every_key_says_what_it_is() -> None:
    def undescribed(section: type[BaseModel]) -> Iterator[str]:
        for name, field in section.model_fields.items():
            nested = [
                c
                for c in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if isinstance(c, type) and issubclass(c, BaseModel)
            ]
            if not nested and not field.description:
                yield f"{section.__name__}.{name}"
            for candidate in nested:
                yield from undescribed(candidate)

    assert list(undescribed(Settings)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda p: p.name)
def test_every_file_in_config_loads(path: Path, write: Callable[[str], Path]) -> None:
    load(path)


@pytest.mark.parametrize(
    "table",
    [{"endpoint": "127.0.0.1:4318"}, {"sample": 1.5}, {"sample": -0.1}, {"service_name": ""}, {"url": "http://x"}],
)
def test_tracing_refuses_what_cannot_be(table: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TracingSettings(**table)
    assert TracingSettings().endpoint is None


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 1),
        (["--tensor-parallel-size", "2"], 2),
        (["--tensor-parallel-size=4"], 4),
        (["--tensor_parallel_size", "2", "-pp", "2"], 4),
        (["-tp"], 1),
        (["-tp", "two"], 1),
        (["-tp", "0"], 1),
    ],
)
def test_how_many_gpus_an_engine_of_vllm_is_spread_over(words: list[str], count: int) -> None:
    model = ModelSettings(process=ProcessEngineSettings(command=["vllm", "serve", "{port}", *words]))
    assert model.gpus_an_engine == count


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"devices": ["nvidia.com/gpu=all"]}, False),
        ({"devices": ["nvidia.com/gpu=0"]}, True),
        ({"devices": ["/dev/nvidia1", "/dev/nvidiactl"]}, True),
        ({"devices": ["/dev/nvidiactl", "/dev/nvidia-uvm"]}, False),
        ({"privileged": True}, False),
        ({"env": {"CUDA_VISIBLE_DEVICES": "1"}}, True),
        ({"env": {"NVIDIA_VISIBLE_DEVICES": "all"}}, False),
    ],
)
def test_whether_a_model_names_its_gpus(table: dict[str, Any], named: bool) -> None:
    model = ModelSettings(podman=PodmanEngineSettings(image="i", command=["--port", "{port}"], **table))
    assert model.names_its_gpus is named
