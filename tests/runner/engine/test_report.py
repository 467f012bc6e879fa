"""What a run prints and keeps: screen, `run.log`, `summary.json`, and the commands it proposes, run as typed."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from runner.engine.report import (
    _metric_tables,
    _null_for_nan,
    collect_metrics,
    main_settings,
)
from runner.engine.state import Progress
from tests.conftest import REPO, TOYS
from tests.runner.engine.helpers import rows, summary


@pytest.fixture
def gallery(cli):
    """`gallery("loop.epochs=2")`: the gallery's experiment, for one epoch unless said otherwise."""
    command = ("experiment=gallery", "threads=1", "loop.epochs=1")
    return lambda *overrides: cli(*command, *overrides, config_dir=TOYS)


def facts(out: str) -> dict[str, str]:
    """Return the header's lines by their first word or words."""
    return dict(re.findall(r"^  (\w+(?: \w+)?) {2,}(.+)$", out, re.MULTILINE))


def test_a_run_from_its_first_line_to_its_last(gallery, last_run):
    done = gallery("seed=3", "loop.epochs=2")
    assert (done.status, done.err) == (0, "") and done.out.startswith("gallery\n")
    folder, lines = last_run(), facts(done.out)
    expected = {"folder": str(folder.relative_to(Path.cwd())), "seed": "3"}
    expected |= {"data": "Blobs: train 60 · val 60 · test 60 samples"}
    expected |= {"network": f"MLP, {2 * 8 + 8 + 8 * 3 + 3} parameters"}
    expected |= {"overrides": "seed=3 (0), threads=1 (null), loop.epochs=2 (4)"}
    assert lines.items() >= expected.items()
    assert lines["device"] == "cpu (1 thread), float32" or torch.cuda.is_available()

    evaluations = [line for line in done.out.splitlines() if line.startswith("epoch")]
    places = [re.findall(r"epoch (\S+) \| step (\d+)/10", line)[0] for line in evaluations]
    assert places == [("0", "0"), ("1", "5"), ("2", "10")] and max(map(len, evaluations)) <= 110
    assert "%" not in done.out  # no bar without a terminal
    assert (folder / "run.log").read_text(encoding="utf-8") == done.out

    # the table and the summary are the metrics file
    metrics, best = summary(folder)["metrics"], summary(folder)["best"]
    before, after = rows(folder, "test")
    table = re.findall(r"^(loss|accuracy|precision|recall|f1) +(\S+) +(\S+)$", done.out, re.MULTILINE)
    assert [name for name, _, _ in table] == ["loss", "accuracy", "precision", "recall", "f1"]
    for name, *cells in table:
        assert cells == [f"{float(row[name]):.4f}" for row in (before, after)]
        assert metrics["before"]["test"][name] == float(before[name])
        assert metrics["test"][name] == float(after[name])

    values = {int(row["step"]): float(row["accuracy"]) for row in rows(folder, "val")}
    step = max(values, key=lambda step: values[step])  # the first of equals
    expected = {"metric": "accuracy/val", "value": values[step], "step": step, "epoch": step / 5}
    assert best == expected | {"checkpoint": "checkpoints/best.pt"}
    assert metrics["val"]["accuracy"] == values[step] and int(after["step"]) == step
    assert f"best accuracy/val {values[step]:.4f} at epoch {step // 5}" in done.out


def test_summary_says_what_ran(cli, toys, last_run):
    cli("experiment=toy_variants", "threads=1", "loop.epochs=1", config_dir=toys)
    content = summary(last_run())
    expected = {"status": "done", "error": None, "mode": "train", "experiment": "toy_variants"}
    expected |= {"parameters": {"narrow": 2 * 8 + 8 + 8 * 3 + 3, "wide": 2 * 16 + 16 + 16 * 3 + 3}}
    expected |= {"data": {"name": "Blobs", "digest": "blobs"}, "steps": 8, "seed": 0}
    expected |= {"changes": ["threads=1 (null)", "loop.epochs=1 (4)"]}
    assert content.items() >= expected.items()
    versions = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    assert content["versions"].items() >= versions.items()
    assert 0 < content["training_seconds"] < content["seconds"] and content["peak_memory_bytes"] > 2**20

    git = content["git"]
    assert set(git) == {"runner", "folder", "config_dir"} and git["folder"] is None
    if git["runner"] is not None:  # the tests run in a checkout
        assert git["runner"] == git["config_dir"] and git["runner"]["repository"] == str(REPO)
        commit = re.fullmatch(r"([0-9a-f]{12})(\+changes)?", git["runner"]["commit"])
        ancestor = ["git", "-C", str(REPO), "merge-base", "--is-ancestor", commit[1], "HEAD"]
        assert subprocess.run(ancestor).returncode == 0


FILES = [
    ".hydra/config.yaml", ".hydra/overrides.yaml", "run.log", "metrics.csv", "summary.json",
    "checkpoints/best.pt", "checkpoints/last.pt",
    "figures/curves.png", "figures/predictions.png", "figures/turning.gif",
    "tables/checks.csv", "tables/counts.csv", "tables/counts.xlsx", "code/packages.txt", "code/toys.py",
]  # fmt: skip


@pytest.mark.curves
def test_the_folder_is_as_designed_and_the_summary_comes_last(gallery, last_run):
    gallery("seed=5")
    folder = last_run()
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert len(events) == 1 and files - events >= set(FILES)
    assert not [name for name in files if name.endswith(".tmp")]
    config, overrides = (yaml.safe_load((folder / name).read_text(encoding="utf-8")) for name in FILES[:2])
    assert config["seed"] == 5 and config["model"] == {"_target_": "toys.MLP", "hidden": 8, "dropout": 0.2}
    assert overrides == ["experiment=gallery", "threads=1", "loop.epochs=1", "seed=5"]
    times = {name: (folder / name).stat().st_mtime_ns for name in files}
    assert times["summary.json"] == max(times.values())  # of others too, where the clock of files is coarse


def test_a_bug_is_a_traceback_and_a_failed_run(gallery, last_run):
    with pytest.raises(RuntimeError, match="crashed on purpose"):  # Python shows it, and exits with 1
        gallery("task.end=raises")
    failed = {"status": "failed", "error": "RuntimeError: crashed on purpose"}
    assert summary(last_run()).items() >= failed.items()
    log = (last_run() / "run.log").read_text(encoding="utf-8")
    assert all(text in log for text in ("FAILED: RuntimeError: crashed on purpose", "Traceback", "in before"))


def proposed(out: str, name: str) -> list[str]:
    """Return the arguments of a command on the screen, as a shell would hand them to the program."""
    [line] = re.findall(rf"^  {name} *(python -m runner .+)$", out, re.MULTILINE)
    return shlex.split(line)[3:]


def test_the_proposed_commands_work_as_they_stand(cli, tmp_path):
    (tmp_path / "my own (configs)").symlink_to(TOYS)
    arguments = ["experiment=gallery", "threads=1", "loop.epochs=1", "outputs='my runs, all'"]
    done = cli("--config-dir", "my own (configs)", *arguments)
    assert done.status == 0
    [folder] = (tmp_path / "my runs, all" / "gallery").iterdir()
    program, flag, logs = shlex.split(facts(done.out)["tensorboard"])
    assert Path(shutil.which(program) or "").name == "tensorboard" and flag == "--logdir"
    assert folder.is_relative_to(Path.cwd() / logs)
    recorded = summary(folder)["metrics"]["test"]

    assert cli(*proposed(done.out, "evaluate")).status == 0
    [evaluated] = (folder / "eval").iterdir()
    assert summary(evaluated)["metrics"]["test"] == recorded

    assert cli(*proposed(done.out, "resume")).status == 0
    assert summary(folder)["steps"] == 10

    assert cli(*proposed(done.out, "sweep"), "loop.epochs=0", "threads=1").status == 0
    [sweep] = (tmp_path / "my runs, all" / "gallery" / "sweeps").iterdir()
    assert len(list(sweep.glob("*/summary.json"))) == 3


def test_the_resume_command_of_an_interrupted_run_works(cli, gallery, last_run):
    """And that of one counted in steps doubles them."""
    done = gallery("loop.steps=5", "task.signal_at=3", "task.signal_name=SIGINT")
    assert done.status == 130 and summary(last_run())["status"] == "interrupted"
    assert "Interrupted at step 4." in done.out and "Traceback" not in done.out + done.err
    assert [row["step"] for row in rows(last_run(), "val")] == ["0"], "it evaluates nothing more"
    resumed = cli(*proposed(done.out, ""))
    assert resumed.status == 0 and summary(last_run())["status"] == "done"
    longer = proposed(resumed.out, "resume")
    assert longer[-1] == "loop.steps=10" and cli(*longer).status == 0
    assert summary(last_run())["steps"] == 10


@pytest.mark.parametrize(
    ("mode", "before", "metrics", "lines"),
    [
        ("train", {}, {"test": {"f1": 0.5, "loss": 1.0}}, ["test value", "loss 1.0000", "f1 0.5000"]),
        (
            *("train", {"loss": 2.0}, {"train": {"loss": 3.0}, "test": {"loss": 1.0, "own": 0.5}}),
            ["test before after", "loss 2.0000 1.0000", "own – 0.5000"],
        ),
        ("train", {}, {"train": {"loss": 3.0}, "val": {"loss": 1.0}}, ["metric val", "loss 1.0000"]),
        ("train", {}, {"train": {"loss": 3.0}}, []),
        (
            *("eval", {"loss": 2.0}, {"val": {"loss": 3.0}, "before": {"test": {}}, "test": {"loss": 1.0}}),
            ["metric val test", "loss 3.0000 1.0000"],
        ),
        ("eval", {}, {"train": {"loss": 3.0}}, ["metric train", "loss 3.0000"]),
    ],
)
def test_the_last_table_holds_what_was_evaluated(mode, before, metrics, lines):
    tables = [line.split() for table in _metric_tables(mode, before, metrics) for line in table.splitlines()]
    assert tables[:1] + tables[2:] == [line.split() for line in lines]


def test_collected_val_metrics_are_those_of_the_best_step():
    history = [{"step": s, "epoch": 0.0, "split": "val", "f1": v} for s, v in ((0, 0.1), (5, 0.9), (10, 0.7))]
    for best_step, value in ((5, 0.9), (None, 0.7)):
        assert collect_metrics(history, Progress(best_step=best_step), {}) == {"val": {"f1": value}}
    assert collect_metrics([], Progress(), {}) == {}


def test_nan_and_infinity_are_null_in_json():
    value = {"a": math.nan, "b": [1.0, -math.inf, {"c": (math.inf, "NaN", 3, None, True)}]}
    text = json.dumps(_null_for_nan(value), allow_nan=False)
    assert json.loads(text) == {"a": None, "b": [1.0, None, {"c": [None, "NaN", 3, None, True]}]}


def test_runs_of_one_experiment_have_the_same_columns():
    config = yaml.safe_load("""
        {name: mine, seed: 0, precision: float32, task: {_target_: m.Task, width: 3},
         data: {_target_: m.Digits, root: /somewhere, batch_size: 8}, model: {_target_: m.Net, inner: {depth: 2}},
         optimizer: {_target_: torch.optim.SGD, lr: 0.1}, loop: {clip_norm: null, log_every: 50}}""")
    expected = {"seed": 0, "precision": "float32", "experiment": "mine"}
    expected |= {"data": "Digits", "model": "Net", "optimizer": "SGD", "loop.clip_norm": None}
    expected |= {"task.width": 3, "data.batch_size": 8, "model.inner.depth": 2, "optimizer.lr": 0.1}
    assert main_settings(config) == expected

    other = main_settings(config | {"loop": {"clip_norm": 1.0}, "model": None})
    assert other["loop.clip_norm"] == 1.0 and "model" not in other
