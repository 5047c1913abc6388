"""What `lint-imports` (pyproject.toml) does not look at."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "proxy"
MODULES = sorted(ROOT.rglob("*.py"))


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_project_does_not_import_its_tests_or_load_tests(path: Path) -> None:
    names = {n.module or "" for n in ast.walk(_tree(path)) if isinstance(n, ast.ImportFrom)}
    assert not {n for n in names if n.split(".")[0] in {"tests", "loadtest"}}


def test_every_package_says_what_lives_there_and_what_it_may_not_import() -> None:
    for package in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(_tree(package)), package


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    trees = [_tree(path) for path in MODULES if "warmpool_vllm" not in path.parts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    # Extras are imported only where they are used, and OpenTelemetry's module belongs to several distributions.
    modules = {name.partition(".")[0] for name in names} - {"proxy", "opentelemetry", *sys.stdlib_module_names}
    owners = importlib.metadata.packages_distributions()
    imported = {_name(owner) for module in modules for owner in owners.get(module, [module])}
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    of_users = [each for extra, each in project["optional-dependencies"].items() if extra != "dev"]
    extras = {_name(requirement) for requirements in of_users for requirement in requirements}
    declared = {_name(requirement) for requirement in project["dependencies"]}
    assert imported - (extras - declared) == declared


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_class_has_more_than_400_lines(path: Path) -> None:
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    lines = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in classes}
    assert {name: count for name, count in lines.items() if count > 400} == {}


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT.parent / "loadtest").rglob("*.py"))], ids=str)
def test_no_private_name_of_another_library_is_used(path: Path) -> None:
    """As far as it can be seen: imported, of an imported module, or a name that is none of ours."""
    tree = _tree(path)
    foreign: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] not in OURS:
            used |= {a.name for a in node.names if _is_private(a.name)}
            used |= {node.module or ""} if any(map(_is_private, (node.module or "").split("."))) else set()
            foreign |= {a.asname or a.name for a in node.names}
        elif isinstance(node, ast.Import):
            foreign |= {
                (a.asname or a.name).partition(".")[0] for a in node.names if a.name.partition(".")[0] not in OURS
            }
            used |= {a.name for a in node.names if any(map(_is_private, a.name.split(".")))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            ours = node.attr in _our_names() and _root_of(node.value) not in foreign
            used |= set() if ours else {node.attr}
    assert used <= ALLOWED.get(path.name, set())


OURS = {"proxy", "loadtest", "tests", "__future__"}
ALLOWED = {"logs.py": {"_srcfile"}, "forced_exit.py": {"_exit"}, "weights.py": {"_host_emptyCache"}}
"""Python's own documentation names the first two (logging HOWTO); PyTorch has no other for it."""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _root_of(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@functools.cache
def _our_names() -> set[str]:
    """Those that are ours: methods, attributes, slots, functions and constants of our modules."""
    found: set[str] = set()
    for path in [*MODULES, *(ROOT.parent / "loadtest").rglob("*.py")]:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def _name(requirement: str) -> str:
    return re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-")
