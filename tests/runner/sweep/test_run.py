"""Sweeps: one folder, every job a run as any other, failures beside successes, a leaderboard at the end."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.records.tracker import Tracker
from tests.conftest import Outcome

GALLERY = Path(__file__).parent.parent / "gallery"
Cli = Callable[..., Outcome]
QUICK = ("-m", "experiment=gallery", "threads=1", "loop.epochs=0")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of every job, and not what is tested here."""
    monkeypatch.setattr(Tracker, "curves", lambda *_: None)
    monkeypatch.setattr(Tracker, "figure", lambda *_: None)
    monkeypatch.setattr(Tracker, "animation", lambda *_: None)
    monkeypatch.setattr("runner.sweep.run.draw", lambda *_: [])


def the_sweep(home: Path) -> Path:
    [folder] = (home / "outputs").glob("**/sweeps/*")
    return folder


def runs(folder: Path) -> list[dict[str, str]]:
    return table(folder / "runs.csv")


def board(folder: Path) -> list[dict[str, str]]:
    return table(folder / "leaderboard.csv")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def jobs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0].isdigit())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"][""]


def test_two_by_two(cli: Cli, tmp_path: Path) -> None:
    arguments = ("-m", "experiment=gallery", "threads=1", "loop.epochs=1")
    done = cli(*arguments, "optimizer.lr=0.0001,0.2", "seed=0,1", config_dir=GALLERY)
    assert (done.status, done.err) == (0, "")
    folder = the_sweep(tmp_path)
    assert folder.parent == tmp_path / "outputs" / "gallery" / "sweeps"
    names = ["0_lr-0.0001_seed-0", "1_lr-0.0001_seed-1", "2_lr-0.2_seed-0", "3_lr-0.2_seed-1"]
    assert jobs(folder) == names
    found = {name: summary(folder / name) for name in names}
    rows = runs(folder)
    assert [row["folder"] for row in rows] == names
    for row in rows:
        job = found[row["folder"]]
        assert row["status"] == job["status"] == "done" and row["error"] == ""
        assert float(row["accuracy/val"]) == job["best"]["value"]
        assert float(row["seconds"]) == job["seconds"]
        for metric in ("loss", "accuracy", "precision", "recall", "f1"):
            assert float(row[f"{metric}/test"]) == job["metrics"]["test"][metric]
        assert row["folder"] == f"{row['job']}_lr-{row['optimizer.lr']}_seed-{row['seed']}"
        log = (folder / row["folder"] / "run.log").read_text(encoding="utf-8")
        assert "go on" not in log.lower() and (folder / row["folder"] / "metrics.csv").stat().st_size
    folded = board(folder)
    assert [(row["optimizer.lr"], row["jobs"]) for row in folded] == [("0.2", "2 3"), ("0.0001", "0 1")]
    best = [found[name]["best"]["value"] for name in names[2:]]
    assert float(folded[0]["accuracy/val"]) == pytest.approx(sum(best) / 2)
    assert float(folded[0]["accuracy/val std"]) == pytest.approx(abs(best[0] - best[1]) / 2**0.5)


def test_what_the_screen_says(cli: Cli, tmp_path: Path) -> None:
    done = cli(*QUICK, "task.end=well,check", "seed=3", config_dir=GALLERY)
    folder = the_sweep(tmp_path)
    lines = done.out.splitlines()
    assert lines[0] == "2 jobs"
    assert [line.split() for line in lines[1:5]][::3] == [["job", "task.end"], ["1", "check"]]
    assert f"Sweep in {folder.relative_to(tmp_path)}" in lines
    [well] = [line for line in lines if line.startswith("[1/2")]
    value = summary(folder / "0_end-well")["best"]["value"]
    assert f"ok: 0_end-well  accuracy/val {value:.4f}" in well
    place = next(n for n, line in enumerate(lines) if line.startswith("[2/2"))
    assert lines[place] == "[2/2] FAILED: 1_end-check: Checks failed: finite."
    log = folder.relative_to(tmp_path) / "1_end-check" / "run.log"
    assert lines[place + 1].split() == ["see", str(log)]
    [watch] = [line for line in lines if line.startswith("tensorboard: ")]
    words = shlex.split(watch.removeprefix("tensorboard: "))
    assert Path(words[0]).name == "tensorboard"
    assert words[1:] == ["--logdir", str(folder.relative_to(tmp_path))]
    assert f"1 ok, 1 failed: {folder.relative_to(tmp_path) / 'leaderboard.md'}" in lines


def test_a_job_of_a_sweep_is_the_same_run_alone(cli: Cli, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    grid = (
        f"threads={min(2, cores)},1",
        "deterministic=true,false",
        "precision=bfloat16,float32",
        "seed=1,0",
    )
    common = ("experiment=gallery", "loop.epochs=1")
    swept = cli("-m", *common, *grid, config_dir=GALLERY)
    assert swept.status == 0, swept.err
    assert cli(*common, "threads=1", "outputs=alone", config_dir=GALLERY).status == 0
    [alone] = (tmp_path / "alone" / "gallery").iterdir()
    names = {row["job"]: row["folder"] for row in runs(the_sweep(tmp_path))}
    ours, theirs = weights(the_sweep(tmp_path) / names["15"]), weights(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = weights(the_sweep(tmp_path) / names["14"])
    assert not any(torch.equal(ours[name], other[name]) for name in ours)


def test_failing_jobs_stop_no_other(cli: Cli, tmp_path: Path) -> None:
    done = cli(*QUICK, "task.end=raises,exits,late,memory,check,well", config_dir=GALLERY)
    assert done.status == 1 and done.err == ""
    folder = the_sweep(tmp_path)
    found = {row["task.end"]: row for row in runs(folder)}
    assert {end for end, row in found.items() if row["status"] == "done"} == {"well"}
    assert board(folder)[0]["task.end"] == "well"
    errors = {
        "raises": "RuntimeError: crashed on purpose",
        "exits": "SystemExit: 3",
        "late": "The data cannot be had: the disk is elsewhere.",
        "memory": "RuntimeError: [enforce fail at alloc_cpu.cpp",
        "check": "Checks failed: finite.",
    }
    for end, error in errors.items():
        job = folder / found[end]["folder"]
        assert found[end]["error"].startswith(error)
        assert summary(job)["error"].startswith(error) and summary(job)["status"] == "failed"
        log = (job / "run.log").read_text(encoding="utf-8")
        assert error.rpartition(": ")[2] in log
        assert ("Traceback" in log) == (end in ("raises", "exits", "memory"))  # it is for bugs only
        assert f"FAILED: {found[end]['folder']}: {error}" in done.out
        assert f"{found[end]['folder']}: {error}" in done.out[done.out.rindex("failed:\n") :]
    assert found["memory"]["job"] == "3" and found["well"]["job"] == "5"  # it came after all of them


def test_what_is_out_of_range_at_run_time_only_fails_its_job_alone(cli: Cli, tmp_path: Path) -> None:
    done = cli(*QUICK, "objective=accuracy/val,nonsense/val", config_dir=GALLERY)
    assert done.status == 1
    rows = runs(the_sweep(tmp_path))
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "nonsense/val is not measured" in rows[1]["error"]


@pytest.mark.parametrize(
    ("name", "launcher"), [("SIGINT", "basic"), ("SIGTERM", "basic"), ("SIGINT", "joblib")]
)
def test_a_signal_ends_the_sweep_with_its_leaderboard(
    name: str, launcher: str, cli: Cli, tmp_path: Path
) -> None:
    arguments = ["-m", "experiment=gallery", "threads=1", "loop.epochs=1", f"task.signal_name={name}"]
    if launcher == "joblib":  # which runs the jobs in this process where it is to have only one
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        arguments += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    done = cli(*arguments, "task.signal_at=null,2,99", config_dir=GALLERY)
    assert done.status == 130
    folder = the_sweep(tmp_path)
    assert [row["status"] for row in runs(folder)] == ["done", "interrupted", "not run"]
    assert jobs(folder) == ["0_signal_at-null", "1_signal_at-2"]
    assert summary(folder / "1_signal_at-2")["status"] == "interrupted"
    [line] = re.findall(r"go on with what is left: (.*)", done.out)
    assert shlex.split(line)[:3] == ["python", "-m", "runner"]
    again = cli(*shlex.split(line)[3:])
    assert again.status == 0, again.err
    assert [row["status"] for row in runs(folder)] == ["done"] * 3
    assert "at step 3" in (folder / "1_signal_at-2" / "run.log").read_text(encoding="utf-8")
    ours, theirs = weights(folder / "1_signal_at-2"), weights(folder / "0_signal_at-null")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)  # stopped, resumed: the same bits


def test_a_job_of_a_sweep_is_looked_at_and_trained_longer(cli: Cli, tmp_path: Path) -> None:
    assert cli(*QUICK, "seed=0,1", config_dir=GALLERY).status == 0
    job = next(the_sweep(tmp_path).glob("1_seed-1"))
    looked = cli("mode=eval", f"checkpoint={job}/checkpoints/best.pt", config_dir=GALLERY)
    assert looked.status == 0, looked.err
    longer = cli(f"resume={job}", "loop.epochs=1", config_dir=GALLERY)
    assert longer.status == 0, longer.err
    assert summary(job)["steps"] == 5 and summary(job)["seed"] == 1


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=0.1,fast", "fast"),
        ("data.batch_size=4,0", "batch_size"),
        ("optimizer=sgd,adan", "adam"),
        ("model.dropuot=0,1", "model.dropout"),
        ("seed=interval(0,1)", "range(start,stop,step)"),
        ("task.end=well,mistake", "job 1 (task.end=mistake): The data cannot be had"),  # of its build
        ("data.batch_size=4,400", "data.batch_size=400 is more than the 60 training samples"),
    ],
)
def test_one_wrong_value_refuses_the_whole_sweep(override: str, told: str, cli: Cli, tmp_path: Path) -> None:
    done = cli(*QUICK, override, config_dir=GALLERY)
    assert done.status == 2 and told in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["mode=eval", "checkpoint=somewhere"])
def test_a_sweep_looks_at_no_checkpoint(override: str, cli: Cli, tmp_path: Path) -> None:
    done = cli(*QUICK, "seed=0,1", override, config_dir=GALLERY)
    assert done.status == 2 and "write it without -m" in done.err
    assert list(tmp_path.iterdir()) == []


def test_over_experiments(cli: Cli, tmp_path: Path, toys: Path) -> None:
    """Objectives that cannot be compared stand apart, each in its own direction."""
    names = "experiment=toy_variants,toy_generative,toy_checks"
    done = cli("-m", names, "threads=1", "loop.epochs=0", "seed=0,1", config_dir=toys)
    assert done.status == 0, done.out
    folder = the_sweep(tmp_path)
    assert folder.parent == tmp_path / "outputs" / "sweeps"
    assert jobs(folder)[0] == "0_experiment-toy_variants_seed-0"
    rows = board(folder)
    assert [row["experiment"] for row in rows] == ["toy_variants", "toy_generative", "toy_checks"]
    assert [row["objective"] for row in rows] == ["accuracy.wide/val", "loss/val", ""]
    assert [row["value"] != "" for row in rows] == [True, True, False]


def test_over_options_ranges_and_choices(cli: Cli, tmp_path: Path) -> None:
    grid = ("optimizer=sgd,adam", "seed=range(0,3,2)", "data.batch_size=choice(4,6)")
    assert cli(*QUICK, *grid, config_dir=GALLERY).status == 0
    folder = the_sweep(tmp_path)
    assert len(jobs(folder)) == 8
    assert jobs(folder)[7] == "7_optimizer-adam_seed-2_batch_size-6"
    config = (folder / jobs(folder)[7] / ".hydra" / "config.yaml").read_text()
    assert "torch.optim.Adam" in config and "seed: 2" in config and "batch_size: 6" in config


def test_folder_names_are_short_plain_and_unique(cli: Cli, tmp_path: Path) -> None:
    long = ",".join(["x" * 300 + "1", "x" * 300 + "2"])
    values = f"task.note=a/b,'日本 語','..',[1,2,3],'a b;$c',{long}"
    assert cli(*QUICK, values, config_dir=GALLERY).status == 0
    folder = the_sweep(tmp_path)
    names = jobs(folder)
    assert len(names) == 7
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]{1,60}", name) for name in names)
    assert names[0] == "0_note-a-b" and names[3] == "3_note-1-2-3"
    assert all((folder / name / "summary.json").exists() for name in names)
    assert [row["folder"] for row in runs(folder)] == names


def test_one_job_without_a_swept_key(cli: Cli, tmp_path: Path) -> None:
    assert cli(*QUICK, config_dir=GALLERY).status == 0
    assert jobs(the_sweep(tmp_path)) == ["0"]


def test_a_value_given_twice_is_one_job(cli: Cli, tmp_path: Path) -> None:
    assert cli(*QUICK, "seed=0,1,0", "optimizer.lr=0.1,1e-1", config_dir=GALLERY).status == 0
    assert jobs(the_sweep(tmp_path)) == ["0_seed-0_lr-0.1", "1_seed-1_lr-0.1"]


def test_dry_run_checks_and_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    done = cli(*QUICK, "seed=0,1", "dry_run=true", config_dir=GALLERY)
    assert (done.status, done.err) == (0, "") and done.out.startswith("2 jobs\n")
    assert cli(*QUICK, "task.end=mistake,well", "dry_run=true", config_dir=GALLERY).status == 2
    assert "dry_run takes true or false" in cli(*QUICK, "seed=0,1", "dry_run=1", config_dir=GALLERY).err
    assert list(tmp_path.iterdir()) == []
