"""Deliberate faults: each entry of `*.yaml` changes one place of the source, and names the tests that then fail.

A place is found by its syntax tree in any file of its table, so that spaces and line breaks do not count.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import yaml

from tests.conftest import REPO

TABLES = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(Path(__file__).parent.glob("*.yaml"))]
FAULTS = {name: (table["files"], *fault) for table in TABLES for name, fault in table["faults"].items()}
MISTAKES = (NameError, AttributeError, TypeError, ImportError)  # of a table: the fault itself went unnoticed


def parse(original: str, changed: str) -> tuple[list[ast.AST], list[ast.AST]]:
    """Return two expressions, or two lists of statements."""
    before, after = ast.parse(original).body, ast.parse(changed).body
    if isinstance(before[0], ast.Expr) and isinstance(after[0], ast.Expr):
        return [before[0].value], [after[0].value]
    return list(before), list(after)


@cache
def load(path: Path) -> tuple[ast.Module, dict[str, list[tuple[ast.AST, str, list[Any], int]]]]:
    """Return a file's tree and, by its dump, where each node hangs: its parent, field, list and index."""
    tree, places = ast.parse(path.read_text("utf-8")), defaultdict(list)
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            nodes = value if isinstance(value, list) else [value]
            for index, node in enumerate(nodes):
                if isinstance(node, ast.expr | ast.stmt):
                    places[ast.dump(node)].append((parent, field, nodes, index))
    return tree, places


def find_only(files: str, pattern: list[ast.AST]) -> tuple[Path, ast.Module, ast.AST, str, int]:
    """Return the only place of the pattern in the files, which are globs: path, tree, parent, field and index."""
    dumps, found = [ast.dump(node) for node in pattern], []
    for path in sorted(path for glob in files.split() for path in REPO.glob(glob)):
        tree, places = load(path)
        for parent, field, nodes, index in places.get(dumps[0], []):
            if dumps[1:] == [ast.dump(node) for node in nodes[index + 1 : index + len(dumps)]]:
                found.append((path, tree, parent, field, index))
    assert len(found) == 1, (
        f"expected one {ast.unparse(pattern)!r} in {files}, got {[f[0].name for f in found]}"
    )
    return found[0]


def change(files: str, original: str, changed: str) -> tuple[str, CodeType]:
    """Return the module in which the only place of `original` is `changed`: its name, and its code."""
    pattern, new = parse(original, changed)
    path, tree, parent, field, index = copy.deepcopy(find_only(files, pattern))
    if isinstance(nodes := getattr(parent, field), list):
        nodes[index : index + len(pattern)] = new
    else:
        setattr(parent, field, new[0])
    module = ".".join(path.relative_to(REPO).with_suffix("").parts)
    return module, compile(ast.fix_missing_locations(tree), module, "exec")


@contextmanager
def imported_anew(name: str, code: CodeType) -> Iterator[None]:
    """Import the project's modules and tests again, the named one from this code; put them back at the end."""
    ours = [m for m in sys.modules if m.partition(".")[0] in ("experiments", "runner", "tests")]
    before = {m: sys.modules.pop(m) for m in ours}
    try:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        exec(code, sys.modules[name].__dict__)
        yield
    finally:
        for m in [m for m in sys.modules if m.partition(".")[0] in ("experiments", "runner", "tests")]:
            del sys.modules[m]
        sys.modules.update(before)


@cache
def find_tests() -> dict[str, list[str]]:
    """Return the node ids of each name of a test function."""
    tests = defaultdict(list)
    for path in sorted((REPO / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE):
            tests[name].append(f"{path}::{name}")
    return tests


class Errors(list):
    """Of the tests that have failed: a plugin of pytest."""

    def pytest_exception_interact(self, call: pytest.CallInfo) -> None:
        self.append(call.excinfo.value)


def test_every_fault_has_one_place_and_names_tests_that_there_are() -> None:
    """Where this fails, a refactoring has changed the place, or the name of a test: say so in the table."""
    for files, original, changed, *tests in FAULTS.values():
        find_only(files, parse(original, changed)[0])
        for test in tests:
            assert len(find_tests()[test]) == 1, f"expected one test {test}, got {find_tests()[test]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, original, changed, *tests = FAULTS[name]
    module, code = change(files, original, changed)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    options = [
        "-qqx",
        "-oaddopts=",
        "--assert=plain",
        "-pno:cacheprovider",
        f"--basetemp={tmp_path / 'inner'}",
    ]
    options.append("-pno:unraisableexception")  # it collects garbage for half a second
    for test in tests:
        errors = Errors()
        with imported_anew(module, code):
            status = pytest.main([*options, *find_tests()[test]], plugins=[errors])
        assert status == pytest.ExitCode.TESTS_FAILED, f"{test} passes with the fault"
        assert errors and not isinstance(errors[0], MISTAKES), errors
