"""What `lint-imports` (pyproject.toml) does not look at."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
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


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    trees = [ast.parse(path.read_text()) for path in MODULES if "warmpool_vllm" not in path.parts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    # Extras are imported only where they are used, and OpenTelemetry's module belongs to several distributions.
    modules = {name.partition(".")[0] for name in names} - {"proxy", "opentelemetry", *sys.stdlib_module_names}
    owners = importlib.metadata.packages_distributions()
    imported = {_name(owner) for module in modules for owner in owners.get(module, [module])}
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert imported == {_name(requirement) for requirement in project["dependencies"]}


def _name(requirement: str) -> str:
    return re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-")
