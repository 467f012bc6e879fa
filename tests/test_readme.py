"""What the README says is true: its example runs, its links lead somewhere, its keys exist."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")


def block(after: str) -> str:
    """The first fenced block that follows a text."""
    match = re.search(re.escape(after) + r".*?```\w*\n(.*?)```", README, re.DOTALL)
    assert match, f"no block follows {after!r}"
    return match[1]


def test_the_experiment_of_ones_own_runs_as_written(
    tmp_path: Path, door: Callable, last_run: Callable[[], Path]
) -> None:
    for name in ("mine/spirals.py", "mine/experiment/spirals.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block(f"`{name}`:"), encoding="utf-8")
    command = re.search(r"python -m runner (--config-dir mine .*)", README)
    assert command
    outcome = door(*command[1].split(), "threads=1")
    assert outcome.status == 0, outcome.err
    metrics = json.loads((last_run() / "summary.json").read_text())["metrics"]
    assert metrics["test"]["accuracy"] > 0.95 > 0.65 > metrics["before"]["test"]["accuracy"]


def test_the_python_example_runs_as_written(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import runner

    given: list[tuple[str, ...]] = []

    class Known:
        metrics, folder, model = {"test": {"accuracy": 0.9}}, Path(), None

    monkeypatch.setattr(runner, "run", lambda *overrides: given.append(overrides) or Known())
    exec(block("From Python or a notebook:"))
    assert given == [("experiment=rnn_fashion", "loop.epochs=1")]


@pytest.mark.parametrize(
    "document", sorted(REPO.glob("*.md")) + sorted((REPO / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", sorted((REPO / "docs").glob("*.md")), ids=lambda p: p.name)
def test_functions_and_tests_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    sources = "\n".join(
        file.read_text(encoding="utf-8")
        for folder in ("experiments", "runner", "tests")
        for file in (REPO / folder).rglob("*.py")
    )
    named = re.findall(r"`(test_\w+|\w+(?:\.\w+)*\(\))`", text)
    assert named
    for name in named:
        assert re.search(rf"\b(def|class) {name.removesuffix('()').split('.')[-1]}\b", sources), name
