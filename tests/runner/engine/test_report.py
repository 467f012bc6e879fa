"""What a run says and keeps: the screen, `run.log`, `summary.json`, and the commands it proposes, run as typed."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from runner.engine.report import (
    _before_after_table,
    _git_commit,
    _null_for_nan,
    collect_metrics,
    main_settings,
)
from runner.engine.state import Progress
from runner.records.console import quote, shown_path
from tests.conftest import Outcome

GALLERY = Path(__file__).parents[1] / "gallery"
REPO = Path(__file__).resolve().parents[3]
Cli = Callable[..., Outcome]


def summary_of(folder: Path) -> dict[str, Any]:
    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def facts(out: str) -> dict[str, str]:
    """The greeting's lines by their first word or words."""
    return dict(re.findall(r"^  (\w+(?: \w+)?) {2,}(.+)$", out, re.MULTILINE))


def test_a_run_from_its_first_line_to_its_last(cli: Cli, last_run: Callable[[], Path]) -> None:
    done = cli("experiment=gallery", "threads=1", "seed=3", "loop.epochs=2", config_dir=GALLERY)
    assert (done.status, done.err) == (0, "")
    folder = last_run()
    said = facts(done.out)
    assert done.out.splitlines()[0] == "gallery"
    assert said["folder"] == str(folder.relative_to(Path.cwd()))
    assert said["device"] == ("cpu (1 thread), float32" if not torch.cuda.is_available() else said["device"])
    assert said["data"] == "Corners: train 60 · val 60 · test 60 samples"
    assert said["network"] == f"Net, {2 * 8 + 8 + 8 * 3 + 3} parameters"
    assert said["seed"] == "3"
    assert said["overrides"] == "seed=3 (0), threads=1 (null), loop.epochs=2 (4)"
    program, *arguments = said["tensorboard"].split()
    assert arguments == ["--logdir", "outputs"] and Path(shutil.which(program) or "").name == "tensorboard"
    lines = [line for line in done.out.splitlines() if line.startswith("epoch")]
    assert [re.findall(r"epoch (\S+) \| step (\d+)/10", line)[0] for line in lines] == [
        ("0", "0"),
        ("1", "5"),
        ("2", "10"),
    ]
    assert all(len(line) <= 110 for line in lines)
    assert "%" not in done.out  # no bar where there is no terminal
    assert (folder / "run.log").read_text(encoding="utf-8") == done.out


def test_git_commit_is_one_of_this_checkout() -> None:
    commit = _git_commit()
    if commit is None:
        pytest.skip("the tests do not run in a checkout")
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?", commit)
    asked = ["git", "-C", str(REPO), "merge-base", "--is-ancestor", commit[:12], "HEAD"]
    assert subprocess.run(asked).returncode == 0


def test_the_table_and_the_summary_are_the_metrics_file(cli: Cli, last_run: Callable[[], Path]) -> None:
    out = cli("experiment=gallery", "threads=1", "loop.epochs=2", config_dir=GALLERY).out
    rows, summary = rows_of(last_run()), summary_of(last_run())
    before, after = (row for row in rows if row["split"] == "test")
    table = re.findall(r"^(loss|accuracy|precision|recall|f1) +(\S+) +(\S+)$", out, re.MULTILINE)
    assert [name for name, _, _ in table] == ["loss", "accuracy", "precision", "recall", "f1"]
    for name, old, new in table:
        assert (old, new) == (f"{float(before[name]):.4f}", f"{float(after[name]):.4f}")
        assert summary["metrics"]["before"]["test"][name] == float(before[name])
        assert summary["metrics"]["test"][name] == float(after[name])
    vals = {int(row["step"]): float(row["accuracy"]) for row in rows if row["split"] == "val"}
    best = min(step for step, value in vals.items() if value == max(vals.values()))
    assert summary["best"] == {
        "metric": "accuracy/val",
        "value": vals[best],
        "step": best,
        "epoch": best / 5,
        "checkpoint": "checkpoints/best.pt",
    }
    assert summary["metrics"]["val"]["accuracy"] == vals[best]
    assert f"best accuracy/val {vals[best]:.4f} at epoch {best // 5}" in out
    assert int(after["step"]) == best


def test_summary_says_what_ran(cli: Cli, last_run: Callable[[], Path]) -> None:
    cli("experiment=toy_variants", "threads=1", "loop.epochs=1", config_dir=REPO / "tests" / "toys")
    summary = summary_of(last_run())
    assert summary["status"] == "done" and summary["error"] is None and summary["mode"] == "train"
    assert summary["experiment"] == "toy_variants"
    assert summary["parameters"] == {"narrow": 2 * 8 + 8 + 8 * 3 + 3, "wide": 2 * 16 + 16 + 16 * 3 + 3}
    assert summary["data"] == {"name": "Blobs", "digest": "blobs"}
    assert summary["versions"]["python"] == platform.python_version()
    assert summary["versions"]["torch"] == importlib.metadata.version("torch")
    assert summary["git"] == _git_commit()
    assert summary["changes"] == ["threads=1 (null)", "loop.epochs=1 (4)"]
    assert summary["steps"] == 8 and summary["seed"] == 0
    assert 0 < summary["training_seconds"] < summary["seconds"]
    assert summary["peak_memory_bytes"] > 2**20


@pytest.mark.curves
def test_the_folder_is_as_designed_and_the_summary_comes_last(cli: Cli, last_run: Callable[[], Path]) -> None:
    cli("experiment=gallery", "threads=1", "loop.epochs=1", "seed=5", config_dir=GALLERY)
    folder = last_run()
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events >= {
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "run.log",
        "metrics.csv",
        "summary.json",
        "checkpoints/best.pt",
        "checkpoints/last.pt",
        "figures/curves.png",
        "figures/predictions.png",
        "figures/turning.gif",
        "tables/checks.csv",
        "tables/counts.csv",
        "tables/counts.xlsx",
    }
    assert not [name for name in files if name.endswith(".tmp")]
    config = yaml.safe_load((folder / ".hydra/config.yaml").read_text(encoding="utf-8"))
    assert config["seed"] == 5 and config["model"] == {"_target_": "gallery.Net", "dropout": 0.1}
    overrides = yaml.safe_load((folder / ".hydra/overrides.yaml").read_text(encoding="utf-8"))
    assert overrides == ["experiment=gallery", "threads=1", "loop.epochs=1", "seed=5"]
    times = {name: (folder / name).stat().st_mtime_ns for name in files}
    assert max(times.values()) == times["summary.json"]


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [("check", 1, "Checks failed: finite."), ("raises", None, "RuntimeError: crashed on purpose")],
)
def test_a_failed_run_says_so(
    end: str, status: int | None, error: str, cli: Cli, last_run: Callable[[], Path]
) -> None:
    arguments = ("experiment=gallery", "threads=1", "loop.epochs=1", f"task.end={end}")
    if status is None:  # a bug: Python shows the traceback, and exits with 1
        with pytest.raises(RuntimeError, match="crashed on purpose"):
            cli(*arguments, config_dir=GALLERY)
    else:
        done = cli(*arguments, config_dir=GALLERY)
        assert done.status == status and f"FAILED: {error}" in done.out
    summary = summary_of(last_run())
    assert summary["status"] == "failed" and summary["error"] == error
    log = (last_run() / "run.log").read_text(encoding="utf-8")
    assert f"FAILED: {error}" in log and ("Traceback" in log) == (status is None)


def proposed(out: str, what: str) -> list[str]:
    """The arguments of a command on the screen, as a shell would hand them to the program."""
    [line] = re.findall(rf"^  {what} +(.+)$", out, re.MULTILINE)
    program, *arguments = shlex.split(line)[:3], *shlex.split(line)[3:]
    assert program == ["python", "-m", "runner"]
    return arguments


def test_the_proposed_commands_work_as_they_stand(
    cli: Cli, tmp_path: Path, last_run: Callable[[], Path]
) -> None:
    mine = tmp_path / "my own (configs)"
    mine.symlink_to(GALLERY)
    arguments = ["experiment=gallery", "threads=1", "loop.epochs=1", "outputs='my runs, all'"]
    done = cli("--config-dir", mine.name, *arguments)
    assert done.status == 0
    [folder] = (tmp_path / "my runs, all" / "gallery").iterdir()
    watch = shlex.split(facts(done.out)["tensorboard"])
    assert (
        Path(watch[0]).name == "tensorboard"
        and watch[1] == "--logdir"
        and folder.is_relative_to(Path.cwd() / watch[2])
    )
    recorded = summary_of(folder)["metrics"]["test"]

    looked = cli(*proposed(done.out, "evaluate"))
    assert looked.status == 0, looked.err
    [look] = (folder / "eval").iterdir()
    assert summary_of(look)["metrics"]["test"] == recorded

    longer = cli(*proposed(done.out, "resume"))
    assert longer.status == 0, longer.err
    assert summary_of(folder)["steps"] == 10

    swept = cli(*proposed(done.out, "sweep"), "loop.epochs=0", "threads=1")
    assert swept.status == 0, swept.err
    [sweep] = (tmp_path / "my runs, all" / "gallery" / "sweeps").iterdir()
    assert len(list(sweep.glob("*/summary.json"))) == 3


def test_the_resume_command_of_an_interrupted_run_works(cli: Cli, last_run: Callable[[], Path]) -> None:
    stop = ("task.signal_at=3", "task.signal_name=SIGINT")
    done = cli("experiment=gallery", "threads=1", "loop.epochs=1", *stop, config_dir=GALLERY)
    assert done.status == 130
    assert summary_of(last_run())["status"] == "interrupted"
    [line] = re.findall(r"^  (python -m runner .*resume=.*)$", done.out, re.MULTILINE)
    again = cli(*shlex.split(line)[3:])
    assert again.status == 0, again.err
    assert summary_of(last_run())["status"] == "done"


def test_a_run_counted_in_steps_is_prolonged_in_steps(cli: Cli, last_run: Callable[[], Path]) -> None:
    done = cli("experiment=gallery", "threads=1", "loop.steps=3", config_dir=GALLERY)
    assert proposed(done.out, "resume")[-1] == "loop.steps=6"
    assert cli(*proposed(done.out, "resume")).status == 0
    assert summary_of(last_run())["steps"] == 6


def test_before_after_table_without_a_before() -> None:
    assert _before_after_table({}, {"f1": 0.5, "loss": 1.0}).splitlines()[2:] == [
        "loss  1.0000",
        "f1    0.5000",
    ]
    assert _before_after_table({"loss": 2.0}, {"loss": 1.0, "own": 0.5}).splitlines()[2:] == [
        "loss  2.0000  1.0000",
        "own        –  0.5000",
    ]


def test_collected_val_metrics_are_those_of_the_best_step() -> None:
    history = [
        {"step": step, "epoch": step / 5, "split": "val", "accuracy": value}
        for step, value in ((0, 0.1), (5, 0.9), (10, 0.7))
    ]
    assert collect_metrics(history, Progress(best_step=5), {})["val"] == {"accuracy": 0.9}
    assert collect_metrics(history, Progress(), {})["val"] == {"accuracy": 0.7}
    assert "val" not in collect_metrics([], Progress(), {})


def test_finite_leaves_json_that_any_reader_takes() -> None:
    value = {"a": math.nan, "b": [1.0, -math.inf, {"c": (math.inf, "NaN", 3, None, True)}]}
    text = json.dumps(_null_for_nan(value), allow_nan=False)
    assert json.loads(text) == {"a": None, "b": [1.0, None, {"c": [None, "NaN", 3, None, True]}]}


def test_settings_of_one_experiment_have_the_same_columns_whatever_their_values() -> None:
    config: dict[str, Any] = {
        "name": "mine",
        "seed": 0,
        "precision": "float32",
        "task": {"_target_": "m.Task", "width": 3},
        "data": {"_target_": "m.Digits", "root": "/somewhere", "batch_size": 8},
        "model": {"_target_": "m.Net", "inner": {"depth": 2}},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "schedule": {"_target_": "runner.schedule.Constant"},
        "loop": {"clip_norm": None, "log_every": 50},
    }
    settings = main_settings(config)
    assert settings == {
        "experiment": "mine",
        "seed": 0,
        "precision": "float32",
        "task.width": 3,
        "data": "Digits",
        "data.batch_size": 8,
        "model": "Net",
        "model.inner.depth": 2,
        "optimizer": "SGD",
        "optimizer.lr": 0.1,
        "schedule": "Constant",
        "loop.clip_norm": None,
    }
    other = main_settings(config | {"loop": {"clip_norm": 1.0, "log_every": 5}, "model": None})
    assert other["loop.clip_norm"] == 1.0 and "model" not in other


def test_paths_are_shown_from_here_and_quoted_for_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "a" / "b") == str(Path("a", "b"))
    assert shown_path(tmp_path.parent) == str(tmp_path.parent)
    echo = [sys.executable, "-c", "import sys; print(sys.argv[1])"]
    odd = tmp_path / "it's a $HOME; (run)"
    command = f"{shlex.join(echo)} {quote(odd)}"
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert printed == f"{odd.name}\n"
