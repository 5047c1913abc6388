"""Lines that start engines, turned into models: what becomes of each part, and what cannot be taken."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import pytest

from proxy.config import engine_line
from proxy.config.engine_line import LineError
from proxy.config.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

REPLACED = ["--served-model-name", "{model}", "--host", "{host}", "--port", "{port}"]
IN_CONTAINERS = {
    "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_MQ_MAX_CHUNK_BYTES_MB": "1",
}  # fmt: skip


def table(line: str, folder: Path, *, gpu: bool = False, **environment: str) -> dict[str, Any]:
    """The model's table, which must be a valid one."""
    found = engine_line.parse(shlex.split(line), environment=environment, folder=folder, gpu=gpu)
    Settings(models={engine_line.key_of(found.key_hint): found.table})
    return found.table


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "vllm serve org/Model-7B --port 8001 --host=0.0.0.0 --max-model-len 4096",
            {
                "name": "org/Model-7B",
                "process": {"command": ["vllm", "serve", "org/Model-7B", "--max-model-len", "4096", *REPLACED]},
            },
        ),
        (
            "sudo CUDA_DEVICE_ORDER=x /opt/v/bin/vllm serve --port 8000 org/M --served_model_name m org/M --api-key k",
            {
                "name": "m",
                "aliases": ["org/M"],
                "api_key": "k",
                "process": {
                    "command": ["/opt/v/bin/vllm", "serve", "org/M", *REPLACED],
                    "env": {"CUDA_DEVICE_ORDER": "x", "VLLM_API_KEY": "k"},
                },
            },
        ),
        (
            "python -m vllm.entrypoints.openai.api_server --model org/M",
            {
                "name": "org/M",
                "process": {
                    "command": ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/M", *REPLACED]
                },
            },
        ),
        (
            "llama-server --model /m.gguf --alias small --port=8080 --host 127.0.0.1",
            {
                "name": "small",
                "engine": "generic",
                "process": {
                    "command": [
                        "llama-server",
                        "--model",
                        "/m.gguf",
                        "--alias",
                        "small",
                        "--port={port}",
                        "--host",
                        "{host}",
                    ]
                },
            },
        ),
        (
            (
                "docker run -d --rm -it --name tiny --restart always -v /srv/hf:/root/.cache/huggingface -p 9000:8123 "
                "--gpus '\"device=0,1\"' --shm-size 2g --ulimit memlock=-1:-1 -e A=b vllm/vllm-openai:v1 --model org/M"
            ),
            {
                "name": "org/M",
                "gpus": [0, 1],
                "podman": {
                    "image": "docker.io/vllm/vllm-openai:v1",
                    "command": ["--model", "org/M", *REPLACED, "--enable-sleep-mode"],
                    "devices": ["nvidia.com/gpu=0", "nvidia.com/gpu=1"],
                    "env": {"A": "b", "VLLM_SERVER_DEV_MODE": "1", **IN_CONTAINERS},
                    "volumes": ["/srv/hf:/root/.cache/huggingface"],
                    "shm_size": "2GiB",
                    "ulimits": {"memlock": "-1:-1"},
                    "container_port": 8123,
                },
            },
        ),
        (
            (
                'podman run --entrypoint \'["vllm", "serve"]\' --mount type=bind,src=/m,target=/model,readonly,z '
                "--net host --security-opt label=disable --security-opt seccomp=unconfined -m 64g localhost/own /model"
            ),
            {
                "name": "/model",
                "podman": {
                    "image": "localhost/own",
                    "entrypoint": ["vllm", "serve"],
                    "command": ["/model", *REPLACED],
                    "env": IN_CONTAINERS,
                    "volumes": ["/m:/model:ro,z"],
                    "network": "host",
                    "security_options": ["label=disable"],
                    "memory_limit": "64GiB",
                },
            },
        ),
    ],
)
def test_what_becomes_of_a_line(line: str, expected: dict[str, Any], tmp_path: Path) -> None:
    assert table(line, tmp_path) == expected


def test_on_a_gpu_the_sleep_mode_is_switched_on(tmp_path: Path) -> None:
    process = table("vllm serve m", tmp_path, gpu=True)["process"]
    assert process["command"][-1] == "--enable-sleep-mode"
    assert process["env"] == {"VLLM_SERVER_DEV_MODE": "1"}
    assert (
        table("vllm serve m --enable-sleep-mode", tmp_path, gpu=True)["process"]["command"].count("--enable-sleep-mode")
        == 1
    )


def test_an_engine_on_several_gpus_is_accounted_on_each(tmp_path: Path) -> None:
    assert table("vllm serve m --tensor-parallel-size 2", tmp_path)["gpus"] == [0, 1]
    line = "docker run --gpus '\"device=2,3\"' vllm --model m --tensor-parallel-size=2"
    assert table(line, tmp_path)["gpus"] == [2, 3]


def test_paths_and_variables_are_those_of_where_the_line_is_written(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x.safetensors").touch()
    (tmp_path / "vars").write_text("# no\nA=1\nB\n")
    assert table("vllm serve model", tmp_path)["process"]["cwd"] == str(tmp_path)
    assert table(f"vllm serve {tmp_path}/model", tmp_path)["weights"] == [f"{tmp_path}/model"]
    line = "podman run -v ./model:/m:ro --env-file vars -e C -e D --device nvidia.com/gpu=all vllm --model /m"
    podman = table(line, tmp_path, B="2", C="3")["podman"]
    assert podman["volumes"] == [f"{tmp_path}/model:/m:ro"]
    env = podman["env"]
    assert (env["A"], env["B"], env["C"], "D" in env) == ("1", "{env:B}", "{env:C}", False)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("ls -la", "no --port in it"),
        ("A=b", "there is no command in it"),
        ("vllm bench", "of vLLM only `vllm serve` is a server"),
        ("vllm serve --port 8000", "which model?"),
        ("vllm serve m --uds /x", "--uds: warmpool reaches engines by a port"),
        ("vllm serve m --port", "--port has no value"),
        ("server --port 1", "what is the model called?"),
        ("docker compose up", "only `docker run` starts an engine, not `docker compose`"),
        ("docker run --user 3 x", "--user: warmpool has no setting for it"),
        ("docker run -d", "names no container image"),
        ("docker run -v", "--volume has no value"),
        ("docker run -v /x i --port 1 --model m", "a volume without a source is lost"),
        ("docker run --mount type=tmpfs,target=/x i --port 1 --model m", "only type=bind and type=volume"),
        ("docker run --gpus some i --port 1 --model m", "--gpus some: all, a number"),
        ("docker run --shm-size big i --port 1 --model m", "--shm-size big: a size such as 8g is needed"),
        ("docker run -e 1x=3 i --port 1 --model m", "'1x' is no name of a variable"),
        ("docker run --env-file none i --port 1 --model m", "--env-file none: cannot be read"),
        ("docker run --entrypoint '[3]' i --port 1 --model m", "--entrypoint: a program, or a JSON list"),
        ("A=b podman run i", "A would be set for podman only"),
        ("podman run -p x:y vllm --model m", "y is no port"),
    ],
)
def test_what_cannot_be_taken_is_said(line: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(LineError) as failure:
        table(line, tmp_path)
    assert sentence in str(failure.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [("org/Model-7B", "model_7b"), ("7b", "m_7b"), ("/srv/models/x/", "x"), ("---", "model"), ("a" * 99, "a" * 48)],
)
def test_a_key_is_made_of_any_name(name: str, key: str) -> None:
    assert engine_line.key_of(name) == key
