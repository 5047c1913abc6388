"""The files of the proxy's container image, without building it, which tests.fresh_machine does."""

from __future__ import annotations

import itertools
import re
import shlex

import pytest

from tests.support import ROOT
from tests.test_doc_blocks import commands
from tests.test_docs import blocks

FOLDER = ROOT / "config" / "containers"


def test_the_image_gets_what_the_wheel_is_made_of() -> None:
    text = (FOLDER / "Containerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert {path for path in copied if not (ROOT / path).exists()} == set()
    project = (ROOT / "pyproject.toml").read_text()
    included = re.search(r"force-include\]\n(.*?)\n\n", project, re.DOTALL)
    assert included is not None
    sources = {path.partition("/")[0] for path in re.findall(r'^"([^"]+)" =', included[1], re.MULTILINE)}
    assert sources | {"proxy", "loadtest", "pyproject.toml", "README.md", "LICENSE"} == set(copied)


def test_the_compose_file_runs_it_as_the_page_does() -> None:
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["warmpool"]
    lines = [c for text in blocks(ROOT / "docs" / "installation.md", "") for c in commands(text)]
    (run,) = (shlex.split(line) for line in lines if line.startswith("podman run"))
    volumes = [value for option, value in itertools.pairwise(run) if option == "-v"]
    assert volumes == service["volumes"]
    assert {"--privileged", "--pid=host", "--network=host"} <= set(run)
    assert (service["privileged"], service["pid"], service["network_mode"]) == (True, "host", "host")
    assert run[-1] == service["image"]
