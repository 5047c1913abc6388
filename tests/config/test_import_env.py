"""The old `.env`: what it becomes, every problem at once, and the same values that a shell finds in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.config import import_env
from proxy.config.load import load
from proxy.errors import ConfigError
from tests.support import examples

if TYPE_CHECKING:
    from proxy.config.engine import PodmanEngineSettings
    from proxy.config.model import ModelSettings
    from proxy.config.settings import Settings

FULL = """\
# What the scripts' setup writes
MODEL_ID=Qwen/Qwen2-1.5B-Instruct
MAX_MODEL_LEN=2048
GPU_MEMORY_UTIL=0.90
CONT_NAME=vllm-llm-demo

VLLM_IMAGE="docker.io/vllm/vllm-openai:v0.20.2"
export API_PORT=8001
CHECKPOINT_DIR=/mnt/ram
CKPT_PATH=${CHECKPOINT_DIR}/checkpoint.tar
RESULTS_DIR=./results
NVIDIA_LIBS_PATH='/opt/nvidia libs'
MODELS_CACHE=/models/
WARMUP_REQUESTS=3 # three
HEALTH_CHECK_TIMEOUT=330
"""


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.upper().startswith("WARMPOOL_")]:
        monkeypatch.delenv(name)


def env_file(folder: Path, text: str | bytes) -> Path:
    path = folder / ".env"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def convert(folder: Path, text: str) -> import_env.Converted:
    return import_env.convert(env_file(folder, text))


def loaded(folder: Path, text: str) -> Settings:
    """What `warmpool serve` makes of the configuration."""
    path = folder / "imported.toml"
    path.write_text(convert(folder, text).toml, encoding="utf-8")
    return load(path)


def only_model(settings: Settings) -> tuple[str, ModelSettings, PodmanEngineSettings]:
    ((key, model),) = settings.models.items()
    assert model.podman is not None
    return key, model, model.podman


def problems(folder: Path, text: str | bytes) -> tuple[str, ...]:
    path = env_file(folder, text)
    with pytest.raises(ConfigError) as failure:
        import_env.convert(path)
    assert failure.value.source == str(path)
    return failure.value.problems


def value_of(folder: Path, text: str) -> str:
    """The value of the key V, as it is kept in a comment."""
    env = env_file(folder, f"MODEL_ID=m\n{text}")
    return parsed(env)["V"]


def parsed(path: Path) -> dict[str, str]:
    found: set[tuple[int, str]] = set()
    entries, broken = import_env._parse(import_env._read(path), found)
    assert (found, broken) == (set(), set())
    return {entry.name: entry.value for entry in entries}


# --- what it becomes ---


def test_every_key_has_its_place(tmp_path: Path) -> None:
    settings = loaded(tmp_path, FULL)
    key, model, engine = only_model(settings)
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8001)
    assert settings.pool.checkpoint_dir == Path("/mnt/ram/warmpool")
    assert (key, model.name) == ("vllm_llm_demo", "Qwen/Qwen2-1.5B-Instruct")
    assert (model.start_timeout, model.warmup.requests) == (330.0, 3)
    assert engine.image == "docker.io/vllm/vllm-openai:v0.20.2"
    assert engine.entrypoint == ["vllm", "serve"]
    assert engine.command == [
        "Qwen/Qwen2-1.5B-Instruct", "--served-model-name", "{model}", "--host", "{host}", "--port", "{port}",
        "--max-model-len", "2048", "--gpu-memory-utilization", "0.90", "--enforce-eager",
        "--load-format", "safetensors", "--trust-remote-code", "--enable-sleep-mode",
    ]  # fmt: skip
    assert [(v.source, str(v.target), v.writable) for v in engine.volumes] == [
        ("/opt/nvidia libs", "/opt/nvidia libs", False),
        ("/models", "/root/.cache/huggingface", True),
    ]
    assert {n: v.get_secret_value() for n, v in engine.env.items()} == {
        "LD_LIBRARY_PATH": "/opt/nvidia libs",
        **import_env.WARMPOOL_ENV,
    }
    assert engine.privileged
    assert engine.devices == ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]
    assert engine.security_options == ["label=disable"]
    assert engine.shm_size == 8 << 30


def test_comments_say_where_values_come_from_and_what_did_not_carry_over(tmp_path: Path) -> None:
    converted = convert(tmp_path, FULL)
    for comment in (
        "# API_PORT, line 8.",
        "# CHECKPOINT_DIR, line 9.",
        '# The key is "vllm-llm-demo" (CONT_NAME, line 5) made valid',
        '"2048",  # MAX_MODEL_LEN, line 3',
        "# - CKPT_PATH, line 10: ",
        "# - RESULTS_DIR, line 11: ",
    ):
        assert comment in converted.toml
    assert converted.warnings == ()
    assert "WARNING" not in converted.toml
    assert "0600" not in converted.toml


def test_what_is_not_set_is_as_the_scripts_had_it(tmp_path: Path) -> None:
    text = "MODEL_ID=org/Some-Model_2\nAPI_PORT=\nMAX_MODEL_LEN='  '\n"
    settings = loaded(tmp_path, text)
    key, model, engine = only_model(settings)
    assert key == "some_model_2"
    assert settings.server.port == 8000
    assert settings.pool.checkpoint_dir == Path("/mnt/checkpoint-ram/warmpool")
    assert engine.image == "docker.io/vllm/vllm-openai:latest"
    assert "4096" in engine.command
    assert (model.start_timeout, model.warmup.requests) == (300.0, 5)
    assert convert(tmp_path, text).toml.count("is not set: the scripts' default") == len(import_env.DEFAULTS)


def test_the_defaults_are_values_of_their_keys(tmp_path: Path) -> None:
    stated = "".join(f"{name}={value}\n" for name, value in import_env.DEFAULTS.items())
    assert loaded(tmp_path, f"MODEL_ID=m\n{stated}").model_dump() == loaded(tmp_path, "MODEL_ID=m\n").model_dump()


def test_unknown_keys_are_kept_as_comments_with_a_warning(tmp_path: Path) -> None:
    converted = convert(tmp_path, "MODEL_ID=m\nHEALTH_TIMEOUT=7\nNOTE='two\nlines \"x\"'\nHEALTH_TIMEOUT=8\n")
    assert '# - line 2: HEALTH_TIMEOUT = "7"\n' in converted.toml
    assert '# - line 3: NOTE = "two\\nlines \\"x\\""\n' in converted.toml
    assert '# - line 5: HEALTH_TIMEOUT = "8"\n' in converted.toml
    assert converted.warnings == (
        "line 2: HEALTH_TIMEOUT is not known; kept as a comment only",
        "line 3: NOTE is not known; kept as a comment only",
        "line 5: HEALTH_TIMEOUT is not known; kept as a comment only",
    )


def test_of_a_key_set_twice_the_last_one_counts(tmp_path: Path) -> None:
    text = "MODEL_ID=a\nAPI_PORT=nonsense\nMODEL_ID=${MODEL_ID}/b\nAPI_PORT=7000\n"
    settings = loaded(tmp_path, text)
    assert settings.server.port == 7000
    assert settings.names() == {"a/b": "b"}
    assert convert(tmp_path, text).warnings == (
        "line 1: MODEL_ID is set again in line 3, which counts",
        "line 2: API_PORT is set again in line 4, which counts",
    )


def test_tokens_go_to_the_engine_and_the_file_is_to_be_kept_private(tmp_path: Path) -> None:
    text = "MODEL_ID=m\nHF_TOKEN='hf_\"x\"'\nOPENAI_API_KEY=sk-1\n"
    _, _, engine = only_model(loaded(tmp_path, text))
    assert engine.env["HF_TOKEN"].get_secret_value() == 'hf_"x"'
    assert "OPENAI_API_KEY" not in engine.env
    toml = convert(tmp_path, text).toml
    assert "(mode 0600): it holds HF_TOKEN, OPENAI_API_KEY." in toml
    assert '# - line 3: OPENAI_API_KEY = "sk-1"' in toml


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("vllm-llm-demo", "vllm_llm_demo"),
        ("VLLM.Demo--2", "vllm_demo_2"),
        ("2nd", "m_2nd"),
        ("_x_", "x"),
        ("Ünï", "n"),
        ("---", "model"),
        ("x" * 60, "x" * 48),
        ("7" * 60, "m_" + "7" * 46),
    ],
)
def test_the_container_name_becomes_a_valid_key(tmp_path: Path, name: str, key: str) -> None:
    assert only_model(loaded(tmp_path, f"MODEL_ID=m\nCONT_NAME={name}\n"))[0] == key


def test_the_environment_of_the_command_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = convert(tmp_path, FULL)
    monkeypatch.setenv("WARMPOOL_SERVER__PORT", "nonsense")
    monkeypatch.setenv("MODEL_ID", "other")
    assert convert(tmp_path, FULL) == expected


# --- what cannot be used ---


def test_all_problems_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    assert problems(
        tmp_path,
        "MAX_MODEL_LEN=abc\n"
        "API_PORT=99999\n"
        "\n"
        "GPU_MEMORY_UTIL=1.5\n"
        "RESULTS_DIR=./results/$(date +%s)\n"
        "NVIDIA_LIBS_PATH=libs\n"
        "VLLM_IMAGE='a b'\n"
        "WARMUP_REQUESTS=-1\n"
        "just words\n"
        "HEALTH_CHECK_TIMEOUT=5m\n",
    ) == (
        "MODEL_ID is required: the model to serve, such as Qwen/Qwen2-1.5B-Instruct",
        "line 1: MAX_MODEL_LEN: 'abc' is not a whole number from 1 to 999999999",
        "line 2: API_PORT: '99999' is not a whole number from 1 to 65535",
        "line 4: GPU_MEMORY_UTIL: '1.5' is not a number over 0 and up to 1",
        "line 5: RESULTS_DIR: a command is not carried out; write what it prints",
        "line 6: NVIDIA_LIBS_PATH: 'libs' is not an absolute path",
        "line 7: VLLM_IMAGE: 'a b' is not the name of a container image",
        "line 8: WARMUP_REQUESTS: '-1' is not a whole number from 0 to 999999",
        "line 9: is not KEY=VALUE",
        "line 10: HEALTH_CHECK_TIMEOUT: '5m' is not a whole number from 1 to 999999",
    )


def test_each_folder_is_an_absolute_path(tmp_path: Path) -> None:
    found = problems(tmp_path, "MODEL_ID=m\nCHECKPOINT_DIR=ram\nMODELS_CACHE=./models\nNVIDIA_LIBS_PATH=../libs\n")
    assert [line.partition(": ")[2] for line in found] == [
        "CHECKPOINT_DIR: 'ram' is not an absolute path",
        "MODELS_CACHE: './models' is not an absolute path",
        "NVIDIA_LIBS_PATH: '../libs' is not an absolute path",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("V=`date`", "V: a command is not carried out"),
        ('V="$(date)"', "V: a command is not carried out"),
        ("V=$((1 + 1))", "V: a command is not carried out"),
        ("V=${OTHER}", "V: ${OTHER} is not set earlier in this file"),
        ('V="$OTHER/x"', "V: ${OTHER} is not set earlier in this file"),
        ("V=${MODEL_ID:-x}", "V: of references only ${NAME} and $NAME are understood"),
        ("V=$1", "V: of references only ${NAME} and $NAME are understood"),
        ("V=$'x'", "V: of references only ${NAME} and $NAME are understood"),
        ("V='open", "V: the quote is not closed"),
        ('V="open', "V: the quote is not closed"),
        ("V=two words", "V: there is more after the value; put a value with spaces in quotes"),
        ("V= x", "V: there is more after the value"),
        ("V=a; W=b", "V: ; needs quotes"),
        ("V=a&", "V: & needs quotes"),
        ("V={a,b}", "V: { needs quotes"),
        ("V=~/x", "V: ~ is not expanded; write the whole path"),
        ("V=x\\", "V: ends in a backslash"),
        ("V = x", "is not KEY=VALUE: no spaces around ="),
        ("export V", "is not KEY=VALUE"),
        ("1V=x", "is not KEY=VALUE"),
        ("source other.env", "is not KEY=VALUE"),
    ],
)
def test_what_is_no_plain_assignment_is_said(tmp_path: Path, line: str, problem: str) -> None:
    (found,) = problems(tmp_path, f"MODEL_ID=m\n\n{line}")
    assert found.startswith(f"line 3: {problem}")


def test_a_problem_does_not_cause_others(tmp_path: Path) -> None:
    found = problems(tmp_path, "MODEL_ID=$(pick)\nCONT_NAME=x-$MODEL_ID\nAPI_PORT=`port`\nMORE=$API_PORT\n")
    assert [line.split(":")[0] for line in found] == ["line 1", "line 3"]


@pytest.mark.parametrize("model_id", ["-m", "a{port}", "two words", "\x07", "x" * 201])
def test_a_model_that_vllm_or_warmpool_would_misread(tmp_path: Path, model_id: str) -> None:
    (found,) = problems(tmp_path, f"MODEL_ID='{model_id}'")
    assert found.startswith("line 1: MODEL_ID: ")


@pytest.mark.parametrize("share", ["0", "0.0", "1.01", "nan", "1e-1", "0,9", "\u0660.\u0665", "."])
def test_a_share_of_the_gpu_is_a_number_up_to_1(tmp_path: Path, share: str) -> None:
    assert "GPU_MEMORY_UTIL" in problems(tmp_path, f"MODEL_ID=m\nGPU_MEMORY_UTIL={share}\n")[0]


@pytest.mark.parametrize("share", ["1", "1.0", ".5", "0.90"])
def test_a_share_of_the_gpu_stays_as_it_was_written(tmp_path: Path, share: str) -> None:
    assert share in only_model(loaded(tmp_path, f"MODEL_ID=m\nGPU_MEMORY_UTIL={share}\n"))[2].command


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems(tmp_path, b"\xff\xfe") == ("is not UTF-8 text",)
    assert problems(tmp_path, b"MODEL_ID=a\0b\n") == ("is not text: it has a NUL byte",)
    with pytest.raises(ConfigError) as failure:
        import_env.convert(tmp_path / "missing")
    assert failure.value.problems == ("cannot be read: No such file or directory",)


# --- as a shell reads it ---

CASES = (
    "V=plain",
    "V=",
    "V=''",
    "export V=x",
    "  export \t V=x  ",
    "V=x # comment",
    "V=x#y",
    "V=#x",
    "V= # nothing",
    "V='single $A \\ \" #'",
    'V="double # \' \\$A \\` \\" \\\\ \\n"',
    "A=1\nV=$A-${A}x\"$A\"'$A'",
    'A="a  b"\nV="$A"',
    "V='a'\"b\"c\\ d",
    "V='two\nlines'",
    "V=one\\\nline",
    'V="one\\\nline"',
    "V=a=b",
    'V="a $ b"',
    "V=$",
    'V="100$%"',
    "V=x\nV=y",
    "V='~'\"~\"\\~",
    "V=[a-z]*?!@,:+%^",
)


def shell_values(path: Path) -> dict[str, str]:
    """What bash finds in the file, the scripts' shell."""
    names = set(parsed(path))
    script = f'. {path} && for n in {" ".join(sorted(names))}; do printf \'%s=%s\\0\' "$n" "${{!n}}"; done'
    output = subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", script],
        env={"PATH": os.environ["PATH"], "HOME": "/home/nobody"},
        cwd=path.parent,
        capture_output=True,
        check=True,
    )
    assert output.stderr == b""
    return dict(item.split("=", 1) for item in output.stdout.decode().split("\0") if item)


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash in PATH")


@needs_bash
@pytest.mark.parametrize("text", CASES)
def test_values_are_those_that_a_shell_finds(tmp_path: Path, text: str) -> None:
    path = env_file(tmp_path, text)
    assert parsed(path) == shell_values(path)


@needs_bash
@settings(max_examples=examples(30))
@given(st.text(st.sampled_from("ab $\"'\\#{}=\n!*[%,:~"), max_size=12), st.booleans())
def test_what_is_accepted_is_what_a_shell_finds(value: str, exported: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = env_file(Path(folder), f"a=x\nb='y z'\n{'export ' * exported}V={value}\n")
        found: set[tuple[int, str]] = set()
        entries, _ = import_env._parse(path.read_text(), found)
        # Only what sets no other shell variable is run, and nothing that is refused.
        if not found and {e.name for e in entries} <= {"a", "b", "V"}:
            assert parsed(path) == shell_values(path)


def test_other_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    assert parsed(env_file(tmp_path, b"\xef\xbb\xbfMODEL_ID=m\r\nV='a b' # c\r\n")) == {"MODEL_ID": "m", "V": "a b"}


# --- whatever comes ---

TEXTS = st.text(max_size=30)
LINES = st.builds(
    lambda name, value: f"{name}={value}",
    st.sampled_from([*sorted(import_env.KNOWN), "OTHER"]),
    st.one_of(TEXTS, TEXTS.map(import_env._toml), TEXTS.map(lambda t: "'" + t.replace("'", "'\\''") + "'")),
)


@settings(max_examples=examples(100))
@given(st.lists(LINES, max_size=6), TEXTS)
def test_it_gives_a_configuration_or_says_why_not(lines: list[str], more: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = env_file(Path(folder), "\n".join(["MODEL_ID=m", *lines, more]))
        try:
            toml = import_env.convert(path).toml
        except ConfigError as error:
            said = "\n".join(error.problems)
        else:
            import_env.write_new(path.with_name("imported.toml"), toml)
            load(path.with_name("imported.toml"))
            return
    # The file's keys are named, not those of the configuration it would have become.
    assert all(line.startswith(("line ", "MODEL_ID is required", "is not text")) for line in said.split("\n")), said


@settings(max_examples=examples(100))
@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])))
def test_a_quoted_value_comes_back_whole(value: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        quoted = "'" + value.replace("'", "'\\''") + "'"
        assert value_of(Path(folder), f"V={quoted}\n") == value


# --- the file that is written ---


def test_a_new_file_is_private_and_an_old_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "warmpool.toml"
    import_env.write_new(path, "text\n")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "text\n"
    with pytest.raises(FileExistsError):
        import_env.write_new(path, "other\n")
    link = tmp_path / "link.toml"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        import_env.write_new(link, "other\n")
    assert path.read_text() == "text\n"
    assert not (tmp_path / "elsewhere").exists()
