"""Sweeps: one folder, every job a run as any other, failures beside successes, a leaderboard at the end."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import CORES, Outcome
from tests.runner.sweep.helpers import FLAGS, JOBLIB, TOYS, cases, jobs, missing, statuses, summary, table

Cli = Callable[..., Outcome]
GALLERY_SWEEP = (*FLAGS, "experiment=gallery", "threads=1")
QUICK = (*GALLERY_SWEEP, "loop.epochs=0", "sweep.dir=sweep")


def weights(folder: Path) -> list[torch.Tensor]:
    return list(torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"][""].values())


def are_equal(ours: Path, theirs: Path) -> bool:
    """Return whether two runs have the same bits."""
    return all(map(torch.equal, weights(ours), weights(theirs)))


def test_two_by_two(cli: Cli, tmp_path: Path) -> None:
    done = cli(*GALLERY_SWEEP, "loop.epochs=1", "optimizer.lr=0.0001,0.2", "seed=0,1")
    assert (done.status, done.err) == (0, "")
    [sweep] = (tmp_path / "outputs" / "gallery" / "sweeps").iterdir()
    names = ["0_lr-0.0001_seed-0", "1_lr-0.0001_seed-1", "2_lr-0.2_seed-0", "3_lr-0.2_seed-1"]
    rows, summaries = table(sweep / "runs.csv"), [summary(sweep / name) for name in names]
    assert jobs(sweep) == [row["folder"] for row in rows] == names
    for row, job in zip(rows, summaries, strict=True):
        assert row["status"] == job["status"] == "done" and row["error"] == ""
        test = job["metrics"]["test"]
        measured = {"accuracy/val": job["best"]["value"], "seconds": job["seconds"]}
        measured |= {f"{name}/test": test[name] for name in ("loss", "accuracy", "precision", "recall", "f1")}
        assert {name: float(row[name]) for name in measured} == measured
        assert row["folder"] == f"{row['job']}_lr-{row['optimizer.lr']}_seed-{row['seed']}"
        log = (sweep / row["folder"] / "run.log").read_text(encoding="utf-8")
        assert "go on" not in log.lower() and (sweep / row["folder"] / "metrics.csv").stat().st_size

    # the best first, seeds folded
    board = table(sweep / "leaderboard.csv")
    assert [(row["optimizer.lr"], row["jobs"]) for row in board] == [("0.2", "2 3"), ("0.0001", "0 1")]
    a, b = (job["best"]["value"] for job in summaries[2:])
    folded = [float(board[0]["accuracy/val"]), float(board[0]["accuracy/val std"])]
    assert folded == pytest.approx([(a + b) / 2, abs(a - b) / 2**0.5])


@pytest.mark.parametrize(
    "values",
    [
        ["deterministic=true"],
        pytest.param([f"threads={min(2, CORES)}", "precision=bfloat16"], marks=pytest.mark.slow),
    ],
)
def test_job_of_a_sweep_is_the_same_run_alone(
    values: list[str], cli: Cli, tmp_path: Path, sweep: Path
) -> None:
    """Whatever the jobs before it have changed in the process; the last one has the defaults."""
    defaults = {"deterministic": "false", "threads": "1", "precision": "float32"}
    grid = [f"{value},{defaults[value.partition('=')[0]]}" for value in values]
    common = ("experiment=gallery", "loop.epochs=1")
    swept = cli("-m", *common, *grid, "seed=1,0", "sweep.dir=sweep", config_dir=TOYS)
    assert swept.status == 0, swept.err
    assert cli(*common, "threads=1", "outputs=alone", config_dir=TOYS).status == 0
    [alone] = (tmp_path / "alone" / "gallery").iterdir()
    *_, other, last = (sweep / row["folder"] for row in table(sweep / "runs.csv"))
    assert are_equal(last, alone) and not are_equal(last, other)


def test_failing_jobs_stop_no_other(cli: Cli, sweep: Path) -> None:
    done = cli(*QUICK, "task.end=raises,exits,late,check,well")
    assert done.status == 1 and done.err == ""

    # the screen: preview, a line per job, where everything is
    lines = done.out.splitlines()
    assert [lines[0], lines[1].split(), lines[7].split()] == ["5 jobs", ["job", "task.end"], ["4", "well"]]
    value = summary(sweep / "4_end-well")["best"]["value"]
    for pattern in (
        r"\nSweep in sweep\n",
        r"\n\[4/5.*\] FAILED: 3_end-check: .*\n +see sweep/3_end-check/run.log\n\[5/5\] ok: 4_end-well"
        rf"  accuracy/val {value:.4f}",
        r"--logdir sweep\n",
        r"\n4 failed, 1 ok: sweep/leaderboard.md\n",
    ):
        assert re.search(pattern, done.out), pattern

    # the files
    rows = {row["task.end"]: row for row in table(sweep / "runs.csv")}
    assert statuses(sweep) == ["failed"] * 4 + ["done"] and list(rows)[1::2] == ["exits", "check"]
    assert table(sweep / "leaderboard.csv")[0]["task.end"] == "well"
    errors = {
        "raises": "RuntimeError: crashed on purpose",
        "exits": "SystemExit: 3",
        "late": "The data could not be loaded: the disk is elsewhere.",  # of the toy
        "check": "Checks failed: finite.",
    }
    for end, error in errors.items():
        name = rows[end]["folder"]
        job, log = summary(sweep / name), (sweep / name / "run.log").read_text(encoding="utf-8")
        assert job["status"] == "failed"
        assert rows[end]["error"].startswith(error) and job["error"].startswith(error)
        assert error.rpartition(": ")[2] in log
        assert ("Traceback" in log) == (end in ("raises", "exits"))  # it is for bugs only
        _, *listed = done.out.split(f"{name}: {error}")
        assert f"FAILED: {name}: {error}" in done.out and len(listed) == 2  # also at the end


def test_objective_that_is_not_measured_fails_its_job_alone(cli: Cli, sweep: Path) -> None:
    assert cli(*QUICK, "objective=accuracy/val,nonsense/val").status == 1
    assert statuses(sweep) == ["done", "failed"]
    assert "nonsense/val" in table(sweep / "runs.csv")[1]["error"]


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("SIGINT", "basic"),
        pytest.param("SIGTERM", "basic", marks=pytest.mark.slow),
        pytest.param("SIGINT", "joblib", marks=pytest.mark.slow),
    ],
)
def test_signal_ends_the_sweep_with_its_leaderboard(name: str, launcher: str, cli: Cli, sweep: Path) -> None:
    settings = ["loop.epochs=1", f"task.signal_name={name}", "task.signal_at=null,2,99", "sweep.dir=sweep"]
    if launcher == "joblib":  # which runs the jobs in this process where it is to have only one
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        settings += [JOBLIB[0], "hydra.launcher.n_jobs=1"]
    done = cli(*GALLERY_SWEEP, *settings)
    assert done.status == 130
    assert statuses(sweep) == ["done", "interrupted", "not run"]
    assert jobs(sweep) == ["0_signal_at-null", "1_signal_at-2"]
    [line] = re.findall(r"go on with what is left: python -m runner (.*)", done.out)
    again = cli(*shlex.split(line))
    assert again.status == 0, again.err
    assert statuses(sweep) == ["done"] * 3
    undisturbed, resumed = (sweep / name for name in jobs(sweep)[:2])
    assert "at step 3" in (resumed / "run.log").read_text(encoding="utf-8")
    assert are_equal(resumed, undisturbed)


def test_job_of_a_sweep_is_evaluated_and_trained_longer(cli: Cli, sweep: Path) -> None:
    assert cli(*QUICK, "seed=range(1,2)").status == 0
    job = sweep / "0_seed-1"
    for command in (
        ["mode=eval", f"checkpoint={job}/checkpoints/best.pt"],
        [f"resume={job}", "loop.epochs=1"],
    ):
        done = cli(*command, config_dir=TOYS)
        assert done.status == 0, done.err
    assert summary(job)["steps"] == 5 and summary(job)["seed"] == 1


@cases("sweep", "typed", "names")
def test_one_wrong_value_refuses_the_whole_sweep(typed: str, names: str, cli: Cli, tmp_path: Path) -> None:
    """More of them are in the tests of mistakes."""
    done = cli(*QUICK, *typed.split())
    assert done.status == 2 and missing(names, done.err) == [], done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_over_experiments(cli: Cli, tmp_path: Path, toys: Path) -> None:
    """Objectives that cannot be compared stand apart, each in its own direction."""
    names = "experiment=toy_variants,toy_generative,toy_checks"
    done = cli("-m", names, "threads=1", "loop.epochs=0", config_dir=toys)
    assert done.status == 0, done.out
    [sweep] = (tmp_path / "outputs" / "sweeps").iterdir()
    assert jobs(sweep)[0] == "0_experiment-toy_variants"
    rows = [(r["experiment"], r["objective"], r["value"] != "") for r in table(sweep / "leaderboard.csv")]
    assert rows[0] == ("toy_variants", "accuracy.wide/val", True)
    assert rows[1:] == [("toy_generative", "loss/val", True), ("toy_checks", "", False)]


def test_over_options_ranges_and_choices_of_any_text(cli: Cli, sweep: Path) -> None:
    note = f"task.note=choice('日本 ;$c/d',{'x' * 300})"
    assert cli(*QUICK, "optimizer=sgd,adam", "seed=range(2,3)", note).status == 0
    names = ["0_optimizer-sgd_seed-2_note-c-d", "1_optimizer-sgd_seed-2"]
    assert jobs(sweep) == [*names, "2_optimizer-adam_seed-2_note-c-d", "3_optimizer-adam_seed-2"]
    assert statuses(sweep) == ["done"] * 4
    assert [row["folder"] for row in table(sweep / "runs.csv")] == jobs(sweep)
    config = (sweep / jobs(sweep)[3] / ".hydra" / "config.yaml").read_text()
    assert "torch.optim.Adam" in config and "seed: 2" in config and "x" * 300 in config


def test_dry_run_checks_and_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    for swept, count in (((), 1), (("seed=0,1,0", "optimizer.lr=0.1,1e-1"), 2)):  # equal jobs are one
        done = cli(*QUICK, *swept, "dry_run=true")
        assert (done.status, done.err) == (0, "") and done.out.startswith(f"{count} jobs\n")
    assert cli(*QUICK, "task.end=mistake,well", "dry_run=true").status == 2
    assert list(tmp_path.iterdir()) == []
