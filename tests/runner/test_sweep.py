"""Sweeps: one folder, every job a run as any other, failures beside successes, a leaderboard at the end."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runner.config import Call
from runner.job import Result
from runner.loop import Objective
from runner.sweep import Point, expand, leaderboard, ranked
from runner.tracker import Tracker
from tests.conftest import Outcome

GALLERY = Path(__file__).parent / "gallery"
Door = Callable[..., Outcome]
QUICK = ("-m", "experiment=gallery", "threads=1", "loop.epochs=0")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of every job, and not what is tested here."""
    monkeypatch.setattr(Tracker, "curves", lambda *_: None)
    monkeypatch.setattr(Tracker, "figure", lambda *_: None)


def the_sweep(home: Path) -> Path:
    [folder] = (home / "outputs").glob("**/sweeps/*")
    return folder


def board(folder: Path) -> list[dict[str, str]]:
    with (folder / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def jobs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"][""]


def test_two_by_two(door: Door, tmp_path: Path) -> None:
    arguments = ("-m", "experiment=gallery", "threads=1", "loop.epochs=1")
    done = door(*arguments, "optimizer.lr=0.0001,0.2", "seed=0,1", config_dir=GALLERY)
    assert (done.status, done.err) == (0, "")
    folder = the_sweep(tmp_path)
    assert folder.parent == tmp_path / "outputs" / "gallery" / "sweeps"
    assert jobs(folder) == [
        "0_optimizer.lr=0.0001,seed=0",
        "1_optimizer.lr=0.0001,seed=1",
        "2_optimizer.lr=0.2,seed=0",
        "3_optimizer.lr=0.2,seed=1",
    ]
    rows = board(folder)
    assert {row["folder"] for row in rows} == set(jobs(folder))
    assert [float(row["accuracy/val"]) for row in rows] == sorted(
        (summary(folder / name)["best"]["value"] for name in jobs(folder)), reverse=True
    )
    assert {row["optimizer.lr"] for row in rows[:2]} == {"0.2"}  # the learning rate that learns
    for row in rows:
        job = folder / row["folder"]
        assert row["status"] == summary(job)["status"] == "done" and row["error"] == ""
        for metric in ("loss", "accuracy", "precision", "recall", "f1"):
            assert float(row[f"{metric}/test"]) == summary(job)["metrics"]["test"][metric]
        assert row["folder"].startswith(f"{row['job']}_optimizer.lr={row['optimizer.lr']},seed={row['seed']}")
        assert (job / "run.log").stat().st_size and (job / "metrics.csv").stat().st_size
    shown = done.out[done.out.rindex("job  optimizer.lr") :].splitlines()
    assert [line.split()[0] for line in shown[2:6]] == [row["job"] for row in rows]
    watch = shlex.split(shown[-1].removeprefix("watch: "))
    assert Path(watch[0]).name == "tensorboard"
    assert watch[1:] == ["--logdir", str(folder.relative_to(tmp_path))]


def test_a_job_of_a_sweep_is_the_same_run_alone(door: Door, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    grid = (
        f"threads={min(2, cores)},1",
        "deterministic=true,false",
        "precision=bfloat16,float32",
        "seed=1,0",
    )
    common = ("experiment=gallery", "loop.epochs=1")
    swept = door("-m", *common, *grid, config_dir=GALLERY)
    assert swept.status == 0, swept.err
    assert door(*common, "threads=1", "outputs=alone", config_dir=GALLERY).status == 0
    [alone] = (tmp_path / "alone" / "gallery").iterdir()
    job = "threads=1,deterministic=false,precision=float32,seed"
    ours, theirs = weights(the_sweep(tmp_path) / f"15_{job}=0"), weights(alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = weights(the_sweep(tmp_path) / f"14_{job}=1")
    assert not any(torch.equal(ours[name], other[name]) for name in ours)


def test_failing_jobs_stop_no_other(door: Door, tmp_path: Path) -> None:
    done = door(*QUICK, "task.end=raises,exits,mistake,check,well", config_dir=GALLERY)
    assert done.status == 1 and done.err == ""
    folder = the_sweep(tmp_path)
    found = {row["task.end"]: row for row in board(folder)}
    assert {end: row["status"] for end, row in found.items()} == {
        "raises": "failed",
        "exits": "failed",
        "mistake": "failed",
        "check": "failed",
        "well": "done",
    }
    assert board(folder)[0]["task.end"] == "well"
    errors = {
        "raises": "RuntimeError: crashed on purpose",
        "exits": "SystemExit: 3",
        "mistake": "The data cannot be had: the disk is elsewhere.",
        "check": "Checks failed: finite.",
    }
    for end, error in errors.items():
        job = folder / found[end]["folder"]
        assert found[end]["error"] == summary(job)["error"] == error
        assert summary(job)["status"] == "failed"
        log = (job / "run.log").read_text(encoding="utf-8")
        assert error.rpartition(": ")[2] in log
        assert ("Traceback" in log) == (end in ("raises", "exits"))  # a traceback is for bugs only
        assert f"{found[end]['folder']}: {error}" in done.out[done.out.rindex("failed:\n") :]


def test_what_is_out_of_range_at_run_time_only_fails_its_job_alone(door: Door, tmp_path: Path) -> None:
    done = door(*QUICK, "objective=accuracy/val,nonsense/val", config_dir=GALLERY)
    assert done.status == 1
    found = {row["objective"]: row for row in board(the_sweep(tmp_path))}
    assert "nonsense/val is not measured" in found["nonsense/val"]["error"]
    assert found["accuracy/val"]["status"] == "done"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_sweep_with_its_leaderboard(name: str, door: Door, tmp_path: Path) -> None:
    arguments = ("-m", "experiment=gallery", "threads=1", "loop.epochs=1", f"task.signal_name={name}")
    done = door(*arguments, "task.signal_at=null,2,null", config_dir=GALLERY)
    assert done.status == 130
    folder = the_sweep(tmp_path)
    rows = {row["job"]: row["status"] for row in board(folder)}
    assert rows == {"0": "done", "1": "interrupted", "2": "not run"}
    assert jobs(folder) == ["0_task.signal_at=null", "1_task.signal_at=2"]
    assert summary(folder / "1_task.signal_at=2")["status"] == "interrupted"
    [line] = re.findall(r"go on with this job: (.*)", done.out)
    assert shlex.split(line)[:3] == ["python", "-m", "runner"]
    again = door(*shlex.split(line)[3:])
    assert again.status == 0, again.err
    assert summary(folder / "1_task.signal_at=2")["status"] == "done"
    ours, theirs = weights(folder / "1_task.signal_at=2"), weights(folder / "0_task.signal_at=null")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)  # stopped, resumed: the same bits


def test_a_job_of_a_sweep_is_looked_at_and_trained_longer(door: Door, tmp_path: Path) -> None:
    assert door(*QUICK, "seed=0,1", config_dir=GALLERY).status == 0
    job = next(the_sweep(tmp_path).glob("1_seed=1"))
    looked = door("mode=eval", f"checkpoint={job}/checkpoints/best.pt", config_dir=GALLERY)
    assert looked.status == 0, looked.err
    longer = door(f"resume={job}", "loop.epochs=1", config_dir=GALLERY)
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
    ],
)
def test_one_wrong_value_refuses_the_whole_sweep(
    override: str, told: str, door: Door, tmp_path: Path
) -> None:
    done = door(*QUICK, override, config_dir=GALLERY)
    assert done.status == 2 and told in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["resume=somewhere", "checkpoint=somewhere"])
def test_a_sweep_neither_goes_on_nor_looks_at_a_checkpoint(override: str, door: Door, tmp_path: Path) -> None:
    done = door(*QUICK, "seed=0,1", override, config_dir=GALLERY)
    assert done.status == 2 and "write it without -m" in done.err
    assert list(tmp_path.iterdir()) == []


def test_over_experiments(door: Door, tmp_path: Path, toys: Path) -> None:
    """Objectives that cannot be compared stand apart, each in its own direction."""
    names = "experiment=toy_variants,toy_generative,toy_checks"
    done = door("-m", names, "threads=1", "loop.epochs=0", "seed=0,1", config_dir=toys)
    assert done.status == 0, done.out
    folder = the_sweep(tmp_path)
    assert folder.parent == tmp_path / "outputs" / "sweeps"
    assert jobs(folder)[0] == "0_experiment=toy_variants,seed=0"
    rows = board(folder)
    assert [row["objective"] for row in rows[:4]] == ["accuracy.wide/val"] * 2 + ["loss/val"] * 2
    variants, generative = ([float(row["value"]) for row in rows[i : i + 2]] for i in (0, 2))
    assert variants == sorted(variants, reverse=True) and generative == sorted(generative)
    assert [row["value"] for row in rows[4:]] == ["", ""]


def test_over_options_ranges_and_choices(door: Door, tmp_path: Path) -> None:
    grid = ("optimizer=sgd,adam", "seed=range(0,3,2)", "data.batch_size=choice(4,6)")
    assert door(*QUICK, *grid, config_dir=GALLERY).status == 0
    folder = the_sweep(tmp_path)
    assert len(jobs(folder)) == 8
    assert jobs(folder)[7] == "7_optimizer=adam,seed=2,data.batch_size=6"
    config = (folder / jobs(folder)[7] / ".hydra" / "config.yaml").read_text()
    assert "torch.optim.Adam" in config and "seed: 2" in config and "batch_size: 6" in config


def test_folder_names_are_short_plain_and_unique(door: Door, tmp_path: Path) -> None:
    long = ",".join(["x" * 300 + "1", "x" * 300 + "2"])
    values = f"task.note=a/b,'日本 語','..',[1,2,3],'a b;$c',{long}"
    assert door(*QUICK, values, config_dir=GALLERY).status == 0
    folder = the_sweep(tmp_path)
    names = jobs(folder)
    assert len(names) == 7
    assert all(re.fullmatch(r"[A-Za-z0-9_.,=+-]{1,100}", name) for name in names)
    assert names[0] == "0_task.note=a-b" and names[3] == "3_task.note=-1,2,3-"
    assert all((folder / name / "summary.json").exists() for name in names)
    assert {row["folder"] for row in board(folder)} == set(names)


def test_one_job_without_a_swept_key(door: Door, tmp_path: Path) -> None:
    assert door(*QUICK, config_dir=GALLERY).status == 0
    assert jobs(the_sweep(tmp_path)) == ["0"]


def test_expand_varies_the_last_key_fastest() -> None:
    call = Call(["a=1,2", "b=fixed", "c=x,y"], multirun=True)
    assert expand(call) == [
        {"a": "1", "c": "x"},
        {"a": "1", "c": "y"},
        {"a": "2", "c": "x"},
        {"a": "2", "c": "y"},
    ]


def point(number: int, value: float | None, objective: Objective, status: str = "done") -> Point:
    """A job that came to `value`."""
    best = None if value is None else {"value": value}
    job: Any = SimpleNamespace(objective=objective, name="toy")
    result = Result(status, Path(), best=best)
    return Point(number, {"seed": str(number)}, job, status, result=result)


def test_ranking_follows_the_direction_and_puts_what_has_no_value_last() -> None:
    nan = float("nan")
    for direction, order in (("maximize", [2, 0, 1, 3, 4, 5]), ("minimize", [0, 2, 1, 3, 4, 5])):
        objective = Objective("accuracy/val", direction)
        values = [
            (0.5, "done"),
            (None, "done"),
            (0.75, "done"),
            (0.9, "failed"),
            (nan, "done"),
            (None, "failed"),
        ]
        points = [point(number, value, objective, status) for number, (value, status) in enumerate(values)]
        assert [found.number for found in ranked(points)] == order
    header, rows = leaderboard(points)
    assert header[:4] == ["job", "seed", "status", "accuracy/val"]
    assert [row[3] for row in rows] == [0.5, 0.75, None, None, None, None]
