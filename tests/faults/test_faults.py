"""Deliberate faults: each entry of `*.yaml` changes one place of the source, and names the tests that then fail.

A place is found by its syntax tree in any file of its table. Line breaks and leading underscores do not count, nor do
the names of local variables where no place has the same ones.
"""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import importlib.util
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
TABLES = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(Path(__file__).parent.glob("*.yaml"))]
FAULTS = {name: (table["files"], *fault) for table in TABLES for name, fault in table["faults"].items()}
IDENTIFIERS = ("id", "attr", "arg")
MISTAKES = (NameError, AttributeError, TypeError, ImportError)  # of a table: the fault itself went unnoticed


class Place(NamedTuple):
    """Where a pattern stands, and what its identifiers are called there."""

    module: str
    tree: ast.Module
    parent: ast.AST
    field: str
    index: int
    names: dict[str, str]


def parse(original: str, changed: str) -> tuple[list[ast.AST], list[ast.AST]]:
    """Return two expressions, or two lists of statements."""
    before, after = ast.parse(original).body, ast.parse(changed).body
    if isinstance(before[0], ast.Expr) and isinstance(after[0], ast.Expr):
        return [before[0].value], [after[0].value]
    return list(before), list(after)


def same(a: Any, b: Any, names: dict[str, str], fixed: set[str] | None, field: str = "") -> bool:
    """Compare pattern `a` with source `b` and fill `names`; `fixed` are not local, None: each name counts."""
    if isinstance(a, ast.AST):
        fields = [name for name in a._fields if name not in ("ctx", "kind", "type_comment")]
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f), names, fixed, f) for f in fields)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(*pair, names, fixed, field) for pair in zip(a, b, strict=True))
    if field in IDENTIFIERS and a and b:
        local = field == "id" and fixed is not None and not {a, b} & fixed
        return (local or a.lstrip("_") == b.lstrip("_")) and names.setdefault(a, b) == b
    return type(a) is type(b) and bool(a == b)


@cache
def load(path: Path) -> tuple[ast.Module, dict[type, list[tuple[ast.AST, str, list[Any], int]]]]:
    """Return a file's tree and, by type, where each node hangs: its parent, field, list and index."""
    tree, places = ast.parse(path.read_text("utf-8")), defaultdict(list)
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            nodes = value if isinstance(value, list) else [value]
            for index, node in enumerate(nodes):
                places[type(node)].append((parent, field, nodes, index))
    return tree, places


def find(files: str, pattern: list[ast.AST], any_local: bool = False) -> Iterator[Place]:
    """Yield every place of the pattern in the files, which are globs."""
    for path in sorted(path for glob in files.split() for path in REPO.glob(glob)):
        module, (tree, places) = ".".join(path.relative_to(REPO).with_suffix("").parts), load(path)
        fixed = {*vars(builtins), *vars(importlib.import_module(module))} if any_local else None
        for parent, field, nodes, index in places[type(pattern[0])]:
            names: dict[str, str] = {}
            if same(pattern, nodes[index : index + len(pattern)], names, fixed):
                yield Place(module, tree, parent, field, index, names)


def find_only(files: str, pattern: list[ast.AST]) -> Place:
    """Return the only place of the pattern, with its own names or, if there is none, with any names of locals."""
    places = list(find(files, pattern)) or list(find(files, pattern, any_local=True))
    modules = [place.module for place in places]
    assert len(places) == 1, f"expected one {ast.unparse(pattern)!r} in {files}, got {modules}"
    return places[0]


def change(files: str, original: str, changed: str) -> tuple[str, CodeType]:
    """Return the module in which the only place of `original` is `changed`: its name, and its code."""
    pattern, new = parse(original, changed)
    module, tree, parent, field, index, names = copy.deepcopy(find_only(files, pattern))

    # the new nodes, in the words of the place
    words = {word for node in ast.walk(tree) for f in IDENTIFIERS if (word := getattr(node, f, None))}
    names = {word.lstrip("_"): word for word in words} | {word: word for word in words} | names
    for node in (node for top in new for node in ast.walk(top)):
        for f in set(IDENTIFIERS) & set(node._fields):
            setattr(node, f, names.get(getattr(node, f), getattr(node, f)))

    # in place of the old ones
    if isinstance(nodes := getattr(parent, field), list):
        nodes[index : index + len(pattern)] = new
    else:
        setattr(parent, field, new[0])
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
    options = ["-qqx", "-m", "", "--assert=plain", "-pno:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    options.append("-pno:unraisableexception")  # it collects garbage for half a second
    for test in tests:
        errors = Errors()
        with imported_anew(module, code):
            status = pytest.main([*options, *find_tests()[test]], plugins=[errors])
        assert status == pytest.ExitCode.TESTS_FAILED, f"{test} passes with the fault"
        assert errors and not isinstance(errors[0], MISTAKES), errors
