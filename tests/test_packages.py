"""What `lint-imports` (pyproject.toml) does not look at."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "proxy"
MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_project_does_not_import_its_tests_or_load_tests(path: Path) -> None:
    names = {n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
    assert not {n for n in names if n.split(".")[0] in {"tests", "loadtest"}}


def test_every_package_says_what_lives_there_and_what_it_may_not_import() -> None:
    for package in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(package.read_text())), package
