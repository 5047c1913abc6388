"""docs/guarantees.md: each promise has tests that are there; each limit is a setting with the default that is said."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from proxy.config.model import ModelSettings
from proxy.config.settings import Settings
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PAGE = (ROOT / "docs" / "guarantees.md").read_text()
TEST = re.compile(r"`([a-z0-9_/]+\.py)(?:::(\w+))?`")


def rows() -> list[list[str]]:
    """The cells of every row of a table but its head."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("promise", "what") and set(row[0]) != {"-"}]


@cache
def names(path: Path) -> frozenset[str]:
    """The tests of a file that are not always skipped."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            marks = {ast.unparse(mark).partition("(")[0] for mark in node.decorator_list}
            if not marks & {"pytest.mark.skip", "pytest.mark.xfail"}:
                found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_a_promise_has_a_test(row: list[str]) -> None:
    assert TEST.findall(row[-1]), row


@pytest.mark.parametrize(("path", "name"), sorted(set(TEST.findall(PAGE))))
def test_a_test_that_is_named_is_there(path: str, name: str) -> None:
    file = ROOT / "tests" / path
    assert file.is_file()
    assert not name or name in names(file)


@pytest.mark.parametrize("row", [row for row in rows() if len(row) == 4 and row[1]], ids=lambda row: row[1])
def test_a_limit_is_a_setting_with_this_default(row: list[str]) -> None:
    section: Any = Settings
    *tables, key = row[1].strip("`").split(".")
    if tables[0] == "models":
        section, tables = ModelSettings, tables[2:]
    for table in tables:
        section = section.model_fields[table].annotation
    assert f"{section.model_fields[key].default:g} s" == row[2]
