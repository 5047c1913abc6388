"""The configurations in `config/`: each loads, says what it is for, and has what its comments claim."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import orjson
import pytest
from click.testing import CliRunner

from loadtest import vllm_cpu
from proxy.cli.main import cli
from proxy.config import import_env
from proxy.config.load import load
from proxy.doctor import several_gpus
from proxy.runtime.podman.container import NO_IO_URING
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.config.engine import PodmanEngineSettings
    from proxy.config.settings import Settings

FOLDER = ROOT / "config"
FILES = sorted(FOLDER.glob("*.toml"))
WRITTEN_BY_HAND = [path for path in FILES if path.name != "reference.toml"]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *FILES]

LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.upper().startswith("WARMPOOL_")]:
        monkeypatch.delenv(name)


def example(name: str) -> Settings:
    return load(FOLDER / name)


def engine(settings: Settings, key: str) -> PodmanEngineSettings:
    podman = settings.models[key].podman
    assert podman is not None
    return podman


def environment(engine: PodmanEngineSettings) -> dict[str, str]:
    return {name: value.get_secret_value() for name, value in engine.env.items()}


def options(command: list[str]) -> dict[str, str | None]:
    """The options of a command with their values."""
    found: dict[str, str | None] = {}
    for argument, following in zip(command, [*command[1:], "--"], strict=True):
        if argument.startswith("--"):
            found[argument] = None if following.startswith("--") else following
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_loads(path: Path) -> None:
    assert load(path).models


@pytest.mark.parametrize("path", WRITTEN_BY_HAND, ids=lambda path: path.name)
def test_it_says_first_what_it_is_for(path: Path) -> None:
    head = path.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(rf"warmpool serve --config config/{path.name}|`make run`", head)
    assert re.search(r"\bneeds\b", head, re.IGNORECASE)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    named = set(re.findall(r"\b(?:config|docs)/[\w.-]+\.(?:toml|json|md)\b", path.read_text()))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_the_seccomp_profile_is_the_one_that_warmpool_writes() -> None:
    assert orjson.loads((FOLDER / "no-io-uring.json").read_bytes()) == NO_IO_URING


def test_gpu_load_has_every_argument_of_the_scripts() -> None:
    load = engine(example("gpu-load.toml"), "vllm_llm_demo")
    assert load.image == "docker.io/vllm/vllm-openai:latest"
    assert load.entrypoint is None
    assert load.privileged
    assert load.devices == ["/dev/null:/dev/null:rwm", "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]
    assert str(load.seccomp) == "/etc/containers/seccomp.d/no-io-uring.json"
    assert load.security_options == ["label=disable"]
    assert load.shm_size == 8 << 30
    assert load.network == "bridge"
    assert [(v.source, str(v.target), v.writable) for v in load.volumes] == [
        ("/opt/nvidia-libs", "/opt/nvidia-libs", False),
        ("/models", "/root/.cache/huggingface", True),
    ]
    assert environment(load).items() >= {
        "LD_LIBRARY_PATH": "/opt/nvidia-libs",
        "ASYNCIO_DEFAULT_BACKEND": "select",
        "PYTHON_ASYNCIO_NO_IO_URING": "1",
        "UV_USE_IO_URING": "0",
    }.items()  # fmt: skip
    assert options(load.command) == {
        "--model": "Qwen/Qwen2-1.5B-Instruct",
        "--host": "{host}",
        "--port": "{port}",
        "--gpu-memory-utilization": "0.90",
        "--max-model-len": "4096",
        "--trust-remote-code": None,
        "--load-format": "safetensors",
        "--enforce-eager": None,
        # warmpool's own
        "--enable-sleep-mode": None,
        "--served-model-name": "{model}",
    }
    assert load.criu.file_locks
    assert load.criu.print_stats


def test_an_imported_env_is_gpu_load_without_what_never_did_anything(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("MODEL_ID=Qwen/Qwen2-1.5B-Instruct\nCONT_NAME=vllm-llm-demo\n")
    path = tmp_path / "imported.toml"
    path.write_text(import_env.convert(env).toml)
    imported, by_hand = load(path), example("gpu-load.toml")
    assert (imported.server, imported.pool) == (by_hand.server, by_hand.pool)
    ours, theirs = engine(imported, "vllm_llm_demo"), engine(by_hand, "vllm_llm_demo")

    without_effect = {"ASYNCIO_DEFAULT_BACKEND", "PYTHON_ASYNCIO_NO_IO_URING", "UV_USE_IO_URING"}
    assert environment(ours) == {n: v for n, v in environment(theirs).items() if n not in without_effect}
    assert ours.devices == theirs.devices[1:]
    assert ours.command[0] == options(theirs.command)["--model"]
    assert options(ours.command) == {n: v for n, v in options(theirs.command).items() if n != "--model"}
    differing = {"env", "devices", "command", "entrypoint", "seccomp"}
    assert ours.model_dump(exclude=differing) == theirs.model_dump(exclude=differing)

    models = [settings.models["vllm_llm_demo"] for settings in (imported, by_hand)]
    assert len({(m.name, m.start_timeout, m.warmup.requests) for m in models}) == 1


def test_vllm_cpu_has_two_instances_with_small_images() -> None:
    settings = example("vllm-cpu.toml")
    (key,) = settings.models
    tiny = engine(settings, key)
    assert settings.models[key].max_instances == 2
    assert not any(volume.writable for volume in tiny.volumes)
    assert environment(tiny) == LOOPBACK | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "VLLM_MQ_MAX_CHUNK_BYTES_MB": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    found = options(tiny.command)
    assert "--enforce-eager" in found
    assert found["--dtype"] == "float32"
    assert tiny.volumes[0].source == str(vllm_cpu.FOLDER / "model")
    assert tiny.image == vllm_cpu.IMAGE
    assert (found["--kv-cache-memory-bytes"], found["--max-model-len"]) == ("67108864", "512")


def test_gpu_many_models_take_turns() -> None:
    settings = example("gpu-many-models.toml")
    assert len(settings.models) == 3
    assert settings.pool.max_awake == 1
    assert settings.pool.archive_dir is not None
    assert len({tuple(m.idle.timetable().values()) for m in settings.models.values()}) == 3
    assert all(model.aliases for model in settings.models.values())


def test_gpu_tensor_parallel_has_what_comes_back_from_a_suspend() -> None:
    settings = example("gpu-tensor-parallel.toml")
    (key,) = settings.models
    model, it = settings.models[key], engine(settings, key)
    assert model.gpus_an_engine == len(model.gpus) == len(it.devices) == 2
    assert model.names_its_gpus
    assert environment(it).items() >= (several_gpus.ENVIRONMENT | LOOPBACK).items()
    assert model.names_option(several_gpus.OPTION)
    assert not it.privileged


@pytest.mark.parametrize("name", ["gpu-one-model.toml", "gpu-many-models.toml"])
def test_engines_on_a_gpu_are_fit_for_every_tier(name: str) -> None:
    settings = example(name)
    for key in settings.models:
        it = engine(settings, key)
        assert it.devices == ["nvidia.com/gpu=0"]
        assert not it.privileged
        assert environment(it).items() >= (LOOPBACK | {"VLLM_SERVER_DEV_MODE": "1"}).items()
        assert {"--enable-sleep-mode", "--kv-cache-memory-bytes", "--load-format"} <= set(it.command)
        assert "--gpu-memory-utilization" not in it.command


NOT_RUN = ("sglang.toml", "tensorrt-llm.toml", "tgi.toml", "whisper.toml")


@pytest.mark.parametrize("name", NOT_RUN)
def test_an_example_for_another_engine_passes_the_check_and_says_that_it_was_not_run(name: str) -> None:
    result = CliRunner().invoke(cli, ["config", "check", str(FOLDER / name)])
    assert result.exit_code == 0, result.output
    assert "NOT RUN by this project" in (FOLDER / name).read_text().partition("\n\n")[0]
    assert {model.engine_kind for model in example(name).models.values()} == {"generic"}


def test_of_the_examples_for_other_engines_all_others_are_run() -> None:
    generic = {path.name for path in WRITTEN_BY_HAND if 'engine = "generic"' in path.read_text()}
    assert generic == {*NOT_RUN, "llama-cpp.toml"}
