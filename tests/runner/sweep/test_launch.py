"""How jobs end under each launcher: tried again, stopped at, interrupted, killed; told, and written at once."""

from __future__ import annotations

import itertools
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.records.tracker import Tracker
from runner.sweep import launch
from runner.sweep.work import StopRequest, Work
from tests.conftest import Outcome
from tests.runner.sweep.processes import opened
from tests.runner.sweep.test_resume import FLAGS, done, summaries, table

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
PACED = [*FLAGS, "experiment=toy_paced", "loop.steps=6", "sweep.dir=sweep"]
Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and are not what is tested here."""
    monkeypatch.setattr(Tracker, "curves", lambda *_: None)
    monkeypatch.setattr("runner.sweep.run.draw", lambda *_: [])


def statuses(sweep: Path) -> list[str]:
    """How each job ended, by number."""
    return [row["status"] for row in table(sweep / "runs.csv")]


def test_on_error_stop_ends_the_sweep_at_the_first_failure(cli: Command, tmp_path: Path) -> None:
    ended = cli(*PACED, "task.end=well,raises,memory", "on_error=stop")
    assert ended.status == 1
    assert statuses(tmp_path / "sweep") == ["done", "failed", "not run"]
    assert "1 ok, 1 failed, 1 not run" in ended.out
    again = cli(*FLAGS, "resume=sweep", "on_error=continue")
    assert again.status == 1  # what failed is tried, and fails, again
    assert statuses(tmp_path / "sweep") == ["done", "failed", "failed"]
    rows = table(tmp_path / "sweep" / "runs.csv")
    assert rows[2]["error"].startswith("out of memory at data.batch_size=16")
    assert (tmp_path / "sweep" / "1_end-raises" / "misbehaved").read_text() == "xx"


def test_on_error_retry_tries_a_job_again_from_its_checkpoint(cli: Command, tmp_path: Path) -> None:
    ended = cli(*PACED, "task.end=once,raises,well", "on_error=retry:2")
    assert ended.status == 1
    sweep = tmp_path / "sweep"
    assert statuses(sweep) == ["done", "failed", "done"]
    assert (sweep / "0_end-once" / "misbehaved").read_text() == "xx"  # at its second try all went well
    assert (sweep / "1_end-raises" / "misbehaved").read_text() == "xxx"
    log = (sweep / "1_end-raises" / "run.log").read_text(encoding="utf-8")
    assert len(re.findall(r"resumed +at step 3", log)) == 2 and log.count("Traceback") == 3
    assert "failed: 1_end-raises: RuntimeError: crashed on purpose; it is tried 2 more times" in ended.out
    assert "failed: 0_end-once" in ended.out and "FAILED: 0_end-once" not in ended.out


def test_a_job_that_fails_before_it_has_a_folder_is_mended(cli: Command, tmp_path: Path) -> None:
    """What failed in its preparation has left a log and a summary alone; the next try makes the rest."""
    assert cli(*PACED, "seed=0,1").status == 0
    sweep, job = tmp_path / "sweep", tmp_path / "sweep" / "0_seed-0"
    whole = {path.relative_to(job) for path in job.rglob("*") if "tfevents" not in path.name}
    for path in sorted(job.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (job / "run.log").write_text("The data cannot be had.\n")
    (job / "summary.json").write_text('{"status": "failed", "error": "The data cannot be had."}')
    again = cli(*FLAGS, "resume=sweep")
    assert again.status == 0, again.out + again.err
    assert whole <= {path.relative_to(job) for path in job.rglob("*")}
    assert (job / "run.log").read_text().startswith("The data cannot be had.\n")
    assert done(sweep) == {"0_seed-0", "1_seed-1"}


def test_a_try_that_fails_before_it_begins_is_what_the_job_came_to(cli: Command, tmp_path: Path) -> None:
    """Not what an earlier try had left: neither its error, nor that it was interrupted."""
    assert cli(*PACED, "task.end=raises,well").status == 1
    sweep, job = tmp_path / "sweep", tmp_path / "sweep" / "0_end-raises"
    (job / "checkpoints" / "last.pt").write_bytes(b"no checkpoint")
    for earlier in ('"failed"', '"interrupted"'):
        text = (job / "summary.json").read_text()
        (job / "summary.json").write_text(text.replace('"failed"', earlier, 1))
        again = cli(*FLAGS, "resume=sweep")
        assert again.status == 1, again.out + again.err
        [error] = [row["error"] for row in table(sweep / "runs.csv") if row["status"] == "failed"]
        assert "last.pt" in error and error in (job / "run.log").read_text()


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
@pytest.mark.parametrize("whole_group", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c(launcher: str, whole_group: bool, cli: Command, tmp_path: Path) -> None:
    """As from a terminal, or from `kill` to the sweep's process alone: the jobs save, and the rest goes on later."""
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = tmp_path / "sweep"
    more = JOBLIB if launcher == "joblib" else []
    command = [*FLAGS, "experiment=toy_paced", "sweep.dir=sweep", "seed=0,1,2,3,4,5", *more]
    with opened(tmp_path, command, TOY_PAUSE="1") as other:  # a job takes 16 s, on any machine
        first = sweep / "0_seed-0" / "checkpoints" / "last.pt"
        assert other.wait_until(first.exists), other.screen()
        other.send(signal.SIGINT, whole_group)
        assert other.end() == 130, other.screen()
        screen = other.screen()
    assert len(table(sweep / "leaderboard.csv")) == 1 and "not run" in statuses(sweep)
    ended = {path.name: summaries(sweep)[path.name]["status"] for path in sweep.glob("[0-9]*")}  # all of them
    assert ended["0_seed-0"] == "interrupted" and set(ended.values()) <= {"interrupted", "done"}, screen
    assert "Traceback" not in screen
    [line] = re.findall(r"go on with what is left: (.*)", screen)
    words = shlex.split(line)
    again = cli(*words[words.index("--config-dir") :])
    assert again.status == 0, again.out + again.err
    assert statuses(sweep) == ["done"] * 6
    assert re.search(r"resumed +at step \d", (sweep / "0_seed-0" / "run.log").read_text())


@pytest.mark.parametrize("receivers", [("sweep",), ("worker",), ("worker", "sweep"), ("sweep", "worker")])
def test_a_signal_reaches_the_sweep_or_its_workers(
    receivers: tuple[str, ...], cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")

    def launch_here(work: Work, jobs: list[Any], launcher: launch.Launcher) -> str:
        """Run the jobs as workers do, and send the signals while one runs."""
        looks = itertools.count()
        for record, callback in jobs:
            stop = StopRequest(work.interrupt_file)

            def asked(stop: StopRequest = stop) -> bool:
                if next(looks) == 7:  # after the test and the first evaluation, in the second step
                    for receiver in receivers:
                        stop.signal(15, None) if receiver == "worker" else signal.raise_signal(signal.SIGTERM)
                return stop()

            work(record, callback, stop=asked)
        return ""

    monkeypatch.setattr(launch, "launch_with_hydra", launch_here)
    monkeypatch.setattr("runner.sweep.work.POLL", 0.0)
    ended = cli(*PACED, "seed=0,1", *JOBLIB)
    assert ended.status == 130 and ("Again to stop at once" in ended.out) == ("sweep" in receivers)
    assert statuses(tmp_path / "sweep") == ["interrupted", "not run"]
    assert cli(*FLAGS, "resume=sweep", "hydra/launcher=basic").status == 0
    assert statuses(tmp_path / "sweep") == ["done", "done"]
    assert re.search(r"resumed +at step [1-5]", (tmp_path / "sweep" / "0_seed-0" / "run.log").read_text())


def test_the_second_signal_ends_a_launch_at_once(tmp_path: Path) -> None:
    """Also where the launcher turns the exception into one of its own."""
    interrupted: list[bool] = []
    work = SimpleNamespace(interrupt=lambda: interrupted.append(True))
    with pytest.raises(KeyboardInterrupt), launch.graceful_stop(work):
        signal.raise_signal(signal.SIGINT)
        assert interrupted == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_process_that_dies_takes_its_job_alone(cli: Command, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = tmp_path / "sweep"
    # the other one takes longer: it is there whenever the process beside it dies, and is killed with it
    command = [*PACED, "loop.steps=30", "task.end=dies,well", *JOBLIB]
    with opened(tmp_path, command, TOY_PAUSE="0.1") as other:
        assert other.end() == 1, other.screen()
        screen = other.screen()
    [dead, well] = table(sweep / "runs.csv")
    assert (dead["status"], well["status"]) == ("failed", "done"), screen
    assert dead["error"].startswith("its process died 3 times without a word")
    assert (sweep / dead["folder"] / "misbehaved").read_text() == "xxx"
    assert screen.count("] FAILED: ") == screen.count("] ok: ") == 1
