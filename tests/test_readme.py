"""What README and docs say is true: examples run, commands compose, links and names exist, docs/cli.md is current."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from runner.new import write_experiment
from tests.conftest import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
DOCS = sorted((REPO / "docs").glob("*.md"))


def block(after: str) -> str:
    """Return the first fenced block that follows a text."""
    match = re.search(re.escape(after) + r".*?```\w*\n(.*?)```", README, re.DOTALL)
    assert match, f"no block follows {after!r}"
    return match[1]


@pytest.fixture
def own_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the README's own experiment to `mine/`, as a reader does; return what the command prints."""
    monkeypatch.chdir(tmp_path)
    command = re.search(r"`runner new ([^`]*)`", README)
    assert command
    return write_experiment(command[1].split(), "runner")


def test_own_experiment_is_shown_as_it_is_written(own_experiment: str) -> None:
    for name in ("mine/spirals.py", "mine/experiment/spirals.yaml"):
        assert block(f"`{name}`:") == Path(name).read_text(encoding="utf-8")
    for command in own_experiment.partition("Next:")[2].split("\n")[1:]:
        assert f"`{command.strip()}`" in README


@pytest.mark.parametrize(
    ("call", "instead", "expected"),
    [
        (r"super\(\).__init__\(batch_size\)", "", "Spirals to begin with super().__init__(batch_size"),
        (
            r"super\(\).__init__\(\n.*\n *\)",
            "self.layer = nn.Linear(2, 2)",
            "Net to begin with super().__init__()",
        ),
    ],
)
def test_forgotten_super_init_is_named(
    own_experiment: str, cli: Callable, call: str, instead: str, expected: str
) -> None:
    file = Path("mine/spirals.py")
    changed, count = re.subn(call, instead, file.read_text(encoding="utf-8"))
    assert count == 1
    file.write_text(changed, encoding="utf-8")
    outcome = cli("--config-dir", "mine", "experiment=spirals")
    assert outcome.status == 2 and expected in outcome.err
    assert not Path("outputs").exists()


def test_the_python_example_runs_as_written(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import runner

    given: list[tuple[str, ...]] = []

    class Known:
        metrics, folder, model = {"test": {"accuracy": 0.9}}, Path(), None

    monkeypatch.setattr(runner, "run", lambda *overrides: given.append(overrides) or Known())
    exec(block("From Python or a notebook:"))
    assert given == [("experiment=rnn_fashion", "loop.epochs=1")]


@pytest.mark.parametrize(
    "command", re.findall(r"^runner (experiment=.*?) *(?:#|$)", block("## Commands"), re.MULTILINE)
)
def test_commands_compose(command: str, cli: Callable) -> None:
    outcome = cli(*dict.fromkeys([*shlex.split(command), "--cfg", "job"]))
    assert outcome.status == 0, outcome.err


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for file in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        lines = re.findall(r"(?:^|`)make ([a-z -]+)", (REPO / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert lines and set(" ".join(lines).split()) <= targets, file


def test_keys_and_flags_are_current(clean_process: None) -> None:
    module = runpy.run_path(str(REPO / "docs" / "generate_cli.py"))
    assert module["PAGE"].read_text(encoding="utf-8") == module["render"](), "write it anew: make docs"


def test_lock_file_is_current() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = (REPO / "uv.lock").read_text(encoding="utf-8")
    [locked] = [package for package in tomllib.loads(lock)["package"] if package["name"] == project["name"]]

    declared = map(Requirement, sum(project["optional-dependencies"].values(), project["dependencies"]))
    requirements = locked["metadata"]["requires-dist"]
    assert {(row["name"], SpecifierSet(row["specifier"])) for row in requirements} == {
        (row.name, row.specifier) for row in declared
    }, "write it anew: make lock"
    assert set(re.findall(r"https?://([^/\"]+)", lock)) == {"pypi.org", "files.pythonhosted.org"}


@pytest.mark.parametrize("document", [*sorted(REPO.glob("*.md")), *DOCS], ids=lambda path: path.name)
def test_links_and_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (document.parent / target).exists(), target
    for file in re.findall(r"`((?:conf|experiments|runner|tests)/[\w./]+\.(?:py|yaml))`", text):
        assert "NAME" in file or (REPO / file).exists(), file


@pytest.fixture(scope="module")
def definitions() -> set[str]:
    """Return the names of all functions and classes, tests included."""
    files = (file for folder in ("experiments", "runner", "tests") for file in (REPO / folder).rglob("*.py"))
    return {
        name
        for file in files
        for name in re.findall(r"\b(?:def|class) (\w+)", file.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_functions_and_tests_that_a_document_names_exist(document: Path, definitions: set[str]) -> None:
    text = document.read_text(encoding="utf-8")
    names = re.findall(r"`(test_\w+|\w+(?:\.\w+)*\(\))`", text)
    assert names or document.stem in ("architecture", "benchmarks", "cli", "glossary", "hydra")
    assert {name.removesuffix("()").split(".")[-1] for name in names} <= definitions
