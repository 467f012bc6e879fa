"""`runner new`: what it writes runs and passes its test, in any folder and in a clone; what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPO, Outcome

Cli = Callable[..., Outcome]
OWN = {  # each template's metrics beside the loss, and its figures beside the curves
    "classifier": ({"accuracy", "precision", "recall", "f1"}, set()),
    "generative": ({"energy"}, {"points"}),
    "regression": ({"mae", "r2"}, {"curve"}),
    "sequence": ({"accuracy", "precision", "recall", "f1", "sequences"}, {"steps"}),
}


@pytest.mark.parametrize("template", OWN)
def test_the_printed_command_runs_what_was_written(
    template: str, cli: Cli, last_run: Callable[[], Path]
) -> None:
    written = cli("new", "own", "--template", template, "--dir", "my files")
    assert written.status == 0, written.err
    run, test = map(shlex.split, written.out.partition("Next:\n")[2].splitlines())
    assert run[:3] == ["python", "-m", "runner"] and test[:3] == ["python", "-m", "pytest"]
    assert Path(test[3]).is_file()

    outcome = cli(*run[3:], "debug=fast", "threads=1")
    assert outcome.status == 0, outcome.err
    metrics, figures = OWN[template]
    measured = json.loads((last_run() / "summary.json").read_text())["metrics"]["test"]
    assert measured.keys() >= metrics | {"loss"}
    assert {file.stem for file in last_run().glob("figures/*.png")} >= figures


def test_every_template_is_tried_and_samples_come_from_a_checkpoint_alone(
    cli: Cli, last_run: Callable[[], Path]
) -> None:
    assert {path.name for path in (REPO / "runner" / "templates").iterdir()} == set(OWN)
    assert cli("new", "own", "--template", "generative").status == 0
    assert cli("--config-dir", ".", "experiment=own", "debug=fast", "threads=1").status == 0
    outcome = cli("--config-dir", ".", "mode=sample", f"checkpoint={last_run()}/checkpoints/last.pt", "n=7")
    assert outcome.status == 0, outcome.err
    [samples] = last_run().glob("eval/*/tables/samples.csv")
    assert len(samples.read_text().split()) == 1 + 7


def python(*arguments: str, cwd: Path, environment: dict[str, str]) -> str:
    """Run Python in a folder; return what it prints, and fail where it does."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_was_written_passes_its_test(cli: Cli, tmp_path: Path, environment: dict[str, str]) -> None:
    """All in one folder, and in one process: they are in nobody's way."""
    for template in OWN:
        assert cli("new", f"own_{template}", "--template", template).status == 0
    assert f"{len(OWN)} passed" in python("-m", "pytest", "-q", cwd=tmp_path, environment=environment)


@pytest.mark.slow
def test_in_a_clone_it_becomes_an_experiment_like_the_others(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    # a clone
    for name in ("conf", "docs", "experiments", "runner", "tests"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path)
    place = {"cwd": tmp_path, "environment": environment | {"PYTHONPATH": str(tmp_path)}}

    # its new experiments
    for template in OWN:
        printed = python("-m", "runner", "new", f"mine_{template}", "--template", template, **place)
        assert "experiment=mine_" in printed and "make docs" in printed and "--config-dir" not in printed
    python("docs/generate_cli.py", **place)

    # what the clone asks of every experiment, and the test of one
    python("-m", "ruff", "check", "--no-cache", ".", **place)
    python("-m", "ruff", "format", "--no-cache", "--check", ".", **place)
    files = [
        "test_structure.py",
        "test_readme.py",
        "experiments/test_all.py",
        "experiments/test_mine_classifier.py",
    ]
    chosen = [f"tests/{file}" for file in files]
    python("-m", "pytest", "-p", "no:cacheprovider", *chosen, "-k", "mine_ or flags_are_current", **place)


@pytest.mark.parametrize(
    ("typed", "reason", "instead"),
    [
        ("two-spirals", "imported", "two_spirals"),
        ("2d", "imported", "my_2d"),
        ("class", "imported", "my_class"),
        ("a/b", "imported", "a_b"),
        *((word, "imported", f"my_{word}") for word in ("null", "nan", "on", "True")),
        *((module, "would hide", f"my_{module}") for module in ("torch", "test", "runner", "google")),
        ("ddpm_cifar", "is an experiment", "my_ddpm_cifar"),
        ("own --dir mine", "mine/own.py exists", "my_own --dir mine"),
        ("own --template clasifier", "'classifier'?", "own --template classifier"),
        ("own --dir full", "full/experiment", "own --dir empty"),
        ("own --dir file.txt", "file.txt", "own --dir mine/more"),
        ("", "NAME", "own"),
        ("own template=sequence", "--template TEMPLATE", "own --template sequence"),
    ],
)
def test_refusals_write_nothing_and_what_they_propose_is_accepted(
    typed: str, reason: str, instead: str, cli: Cli, tmp_path: Path
) -> None:
    for file in ("file.txt", "full/experiment", "mine/own.py"):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    before = set(tmp_path.rglob("*"))

    refused = cli("new", *typed.split())
    assert (refused.status, refused.out) == (2, "") and reason in refused.err, refused.err
    assert refused.err.count("\n") == 1 and set(tmp_path.rglob("*")) == before
    assert "such as" not in refused.err or f"such as {instead.split()[0]}." in refused.err
    assert cli("new", *instead.split()).status == 0
