"""A run that was killed, wherever, and resumed ends as one that was not: bit for bit."""

from __future__ import annotations

import os
import re
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.records.tracker import Tracker
from tests.conftest import TOYS
from tests.runner.engine import helpers
from tests.runner.engine.helpers import assert_equal, parts
from tests.runner.processes import opened

VARIANTS = ("experiment=toy_variants", "threads=1", "loop.save_every=5", "loop.epochs=2")
GENERATIVE = (
    *("experiment=toy_generative", *VARIANTS[1:], "loop.accumulate=2", "loop.eval_every=6"),
    *("optimizer=adam", "data.samples=480"),
)


def disturb(cut_at: str | None) -> None:
    """In the run's process: draw no curves, and end the second writing of a checkpoint in the middle, by SIGKILL."""
    Tracker.curves = lambda *_: None  # most of a small run's time
    written, true_save = [], torch.save

    def save(parts: Any, file: Any) -> None:
        true_save(parts, file)
        written.append(Path(file.name).name.split(".pt.")[0])
        if written.count(f".{cut_at}") == 2:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), 9)

    torch.save = save


def start(folder: Path, *overrides: str, signals: str = "", cut_at: str | None = None) -> int:
    """Run in a process of its own, which sends itself signals such as `SIGKILL@train:7`; return its exit status."""
    argv = ["--config-dir", str(TOYS), *overrides]
    with opened(folder, argv, before=partial(disturb, cut_at), TOY_SIGNALS=signals) as run:
        return run.end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the run that is not disturbed, made once per set of overrides."""

    @cache
    def find(overrides: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        assert start(folder, *overrides) == 0
        return only_run(folder)

    return find


@pytest.fixture
def disturbed(tmp_path):
    """`disturbed(VARIANTS, -9, signals="SIGKILL@train:7")`: the folder of a run that ended with that status."""

    def call(overrides: tuple[str, ...], status: int, **disturbance: str) -> Path:
        assert start(tmp_path, *overrides, **disturbance) == status
        return only_run(tmp_path)

    return call


def only_run(folder: Path) -> Path:
    (run,) = (path.parent for path in folder.glob("outputs/*/*/.hydra"))
    return run


def assert_resumes(run: Path, reference: Path, **differing: Any) -> None:
    """Resume a run and assert that it ends as the other: checkpoints, records and summary."""
    assert start(run.parents[2], f"resume={run}") == 0
    for name in ("last", "best"):
        both = [parts(folder, name) for folder in (run, reference)]
        for one in both:
            assert one["progress"].pop("seconds") > 0
            if differing:
                one.pop("config")  # the best may be older than the change
        assert_equal(*both)
    assert rows(run) == rows(reference)
    assert summary(run) == summary(reference) | differing
    assert not list(run.rglob(".*.tmp"))


def rows(run: Path) -> list[dict[str, str]]:
    """Return `metrics.csv` without the speed."""
    return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in helpers.rows(run)]


def summary(run: Path) -> dict[str, Any]:
    """Return `summary.json` without what two equal runs may differ in: time, memory and the code's commit."""
    content = helpers.summary(run)
    content["metrics"]["train"].pop("samples_per_second")
    dropped = ("seconds", "training_seconds", "samples_per_second", "peak_memory_bytes", "finished", "git")
    return {key: value for key, value in content.items() if key not in dropped}


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
CHECKPOINTS = (0, 5, 8, 10, 15, 16)  # the steps of save_every and of the evaluations

# the beginning, the middle, a step of an evaluation and the last; in an evaluation, with the best weights, and
# where the row of the test is written but the summary is not
QUICK = ("SIGTERM@train:7", "SIGKILL@train:12", "SIGINT@val:8", "SIGKILL@after:8")
SLOW = """
    SIGINT@train:2 SIGINT@train:8 SIGINT@train:13 SIGTERM@train:1 SIGTERM@train:15
    SIGKILL@train:0 SIGKILL@train:6 SIGKILL@train:15 SIGTERM@before:0 SIGKILL@val:8 SIGINT@val:16 SIGKILL@val:16
    SIGKILL@test:0 SIGKILL@test:8 SIGINT@test:8 SIGTERM@after:8
"""


@pytest.mark.parametrize("signals", [*QUICK, *(slow(case) for case in SLOW.split())])
def test_killed(whole, disturbed, signals):
    name, place, number = re.split("[@:]", signals)
    run = disturbed(VARIANTS, STATUS[name], signals=signals)
    step = parts(run)["step"] if place == "train" else None
    if step is not None:  # a kill loses the steps since the last checkpoint, the others end theirs and save
        last = max(saved for saved in CHECKPOINTS if saved <= int(number))
        assert step == (last if name == "SIGKILL" else int(number) + 1)
    assert_resumes(run, whole(VARIANTS))
    assert (run / "before.txt").read_text() == "called\n", "what was measured before training is kept"
    assert step is None or re.search(rf"resumed +at step {step}\b", (run / "run.log").read_text())


@pytest.mark.parametrize(("signals", "status"), [("SIGKILL@train:9", -9), slow("SIGINT@train:4", 130)])
def test_all_state_comes_back(whole, disturbed, signals, status):
    """Averaged weights, two batches per step, Adam's moments, dropout, and the task's own state."""
    saved = parts(whole(GENERATIVE))
    assert saved["ema"] and saved["task"]["batches_seen"] == 60 and saved["optimizer"][""]["state"]
    assert_resumes(disturbed(GENERATIVE, status, signals=signals), whole(GENERATIVE))


@pytest.mark.slow
def test_killed_again_and_again(whole, disturbed, tmp_path):
    run = disturbed(VARIANTS, -9, signals="SIGKILL@before:0")
    kills = ["SIGKILL@train:3", "SIGINT@train:3", "SIGKILL@train:4", "SIGINT@val:8", "SIGKILL@val:8"]
    kills += ["SIGTERM@train:11", "SIGKILL@after:8", "SIGKILL@test:8", "SIGINT@after:8"]
    for signals in kills:
        assert start(tmp_path, f"resume={run}", signals=signals) != 0
    assert_resumes(run, whole(VARIANTS))


@pytest.mark.parametrize("name", ["last", "best"])
def test_killed_in_the_middle_of_a_checkpoint(whole, disturbed, name):
    run = disturbed(VARIANTS, -9, cut_at=name)
    (unfinished,) = run.rglob(".*.tmp")
    assert unfinished.stat().st_size > 0
    parts(run, name)  # the one before is whole
    assert_resumes(run, whole(VARIANTS))


def test_a_cut_row_is_dropped(whole, disturbed):
    run = disturbed(VARIANTS, -9, signals="SIGKILL@train:12")
    os.truncate(run / "metrics.csv", (run / "metrics.csv").stat().st_size - 30)
    assert_resumes(run, whole(VARIANTS))


def test_second_interrupt_stops_at_once(cli, toys, last_run, monkeypatch):
    monkeypatch.setenv("TOY_SIGNALS", "SIGINT@train:6,SIGINT@train:6")
    done = cli(*VARIANTS, config_dir=toys)
    assert done.status == 130 and "Traceback" not in done.out + done.err
    assert helpers.summary(last_run())["status"] == "interrupted"
    assert parts(last_run())["step"] == 5, "step 6 was neither ended nor saved"


def test_finished_run_says_so(cli, toys, last_run):
    assert cli(*VARIANTS, config_dir=toys).status == 0
    before = {path: path.stat().st_mtime_ns for path in last_run().rglob("*")}
    again = cli(f"resume={last_run()}", config_dir=toys)
    assert again.status == 0 and "is finished" in again.out and "loop.epochs=" in again.out
    assert {path: path.stat().st_mtime_ns for path in last_run().rglob("*")} == before


@pytest.mark.slow
def test_longer_training_equals_training_longer(whole, disturbed, tmp_path):
    """With a constant learning rate and evaluations at the same steps; the new length is kept."""
    run = disturbed(VARIANTS, 0)
    assert start(tmp_path, f"resume={run}", "loop.epochs=4", signals="SIGKILL@train:21") == -9
    changes = ["threads=1 (null)", "loop.epochs=4 (2)", "loop.save_every=5 (null)"]
    assert_resumes(run, whole((*VARIANTS[:3], "loop.epochs=4")), changes=changes)


@pytest.mark.slow
def test_moved_run_resumes(whole, disturbed, tmp_path):
    moved = tmp_path / "far" / "away" / "from" / "there"
    moved.parent.mkdir(parents=True)
    shutil.move(disturbed(VARIANTS, 143, signals="SIGTERM@train:9"), moved)
    assert_resumes(moved, whole(VARIANTS))
