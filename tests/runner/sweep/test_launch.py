"""How jobs end under each launcher: tried again, stopped at, interrupted, killed."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.sweep import launch
from runner.sweep.work import StopRequest, Work
from tests.conftest import Outcome
from tests.runner.processes import opened
from tests.runner.sweep.helpers import FLAGS, JOBLIB, done, statuses, summary, table

PACED = [*FLAGS, "experiment=toy_paced", "loop.steps=6", "sweep.dir=sweep"]
RESUME = [*FLAGS, "resume=sweep"]
Command = Callable[..., Outcome]


def test_on_error_stop(cli: Command, sweep: Path) -> None:
    ended = cli(*PACED, "task.end=well,raises,memory", "on_error=stop")
    assert ended.status == 1 and "1 ok, 1 failed, 1 not run" in ended.out
    assert statuses(sweep) == ["done", "failed", "not run"]
    assert cli(*RESUME, "on_error=continue").status == 1  # what failed is tried, and fails, again
    assert statuses(sweep) == ["done", "failed", "failed"]
    assert "data.batch_size=16" in table(sweep / "runs.csv")[2]["error"]  # out of memory
    assert (sweep / "1_end-raises" / "misbehaved").read_text() == "xx"


def test_on_error_retry_continues_from_the_checkpoint(cli: Command, sweep: Path) -> None:
    ended = cli(*PACED, "task.end=once,raises,well", "on_error=retry:2")
    assert ended.status == 1 and statuses(sweep) == ["done", "failed", "done"]
    tries = [(sweep / name / "misbehaved").read_text() for name in ("0_end-once", "1_end-raises")]
    assert tries == ["xx", "xxx"]  # of the first all went well at its second
    log = (sweep / "1_end-raises" / "run.log").read_text(encoding="utf-8")
    assert len(re.findall(r"resumed +at step 3", log)) == 2 and log.count("Traceback") == 3
    assert re.search("failed: 1_end-raises: RuntimeError: crashed on purpose; .* 2 more times", ended.out)
    assert "failed: 0_end-once" in ended.out and "FAILED: 0_end-once" not in ended.out


def test_job_that_failed_before_it_had_a_folder_is_completed(cli: Command, sweep: Path) -> None:
    """A failed preparation leaves a log and a summary alone; the next attempt makes the rest."""
    assert cli(*PACED, "seed=0,1").status == 0
    job = sweep / "0_seed-0"
    whole = {path for path in job.rglob("*") if "tfevents" not in path.name}
    shutil.rmtree(job)
    job.mkdir()
    (job / "run.log").write_text("No data.\n")
    (job / "summary.json").write_text('{"status": "failed", "error": "No data."}')
    again = cli(*RESUME)
    assert again.status == 0, again.out + again.err
    assert whole <= set(job.rglob("*"))
    assert (job / "run.log").read_text().startswith("No data.\n")
    assert done(sweep) == {"0_seed-0", "1_seed-1"}


def test_outcome_is_that_of_the_last_attempt(cli: Command, sweep: Path) -> None:
    assert cli(*PACED, "task.end=raises,well").status == 1
    job = sweep / "0_end-raises"
    (job / "checkpoints" / "last.pt").write_bytes(b"no checkpoint")
    for earlier in ('"failed"', '"interrupted"'):
        text = (job / "summary.json").read_text()
        (job / "summary.json").write_text(text.replace('"failed"', earlier, 1))
        assert cli(*RESUME).status == 1
        [error] = [row["error"] for row in table(sweep / "runs.csv") if row["status"] == "failed"]
        assert "last.pt" in error and error in (job / "run.log").read_text()


def test_jobs_run_under_a_launcher(joblib: None, cli: Command, sweep: Path) -> None:
    """With one process joblib works in this one; the slow tests have more."""
    ended = cli(*PACED, "task.end=well,raises", JOBLIB[0], "hydra.launcher.n_jobs=1")
    assert ended.status == 1, ended.out + ended.err
    assert statuses(sweep) == ["done", "failed"]
    assert ended.out.count("] FAILED: 1_end-raises") == ended.out.count("] ok: 0_end-well") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c(launcher: str, whole_group: bool, cli: Command, tmp_path: Path, sweep: Path) -> None:
    """As from a terminal, or from `kill` to the sweep's process alone: the jobs save, and the rest goes on later."""
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [*PACED, "loop.steps=10", "seed=0,1,2,3,4,5", *JOBLIB * (launcher == "joblib")]
    with opened(tmp_path, command, TOY_PAUSE="1") as other:  # ten seconds of pauses a job
        first = sweep / "0_seed-0" / "checkpoints" / "last.pt"
        assert other.wait_until(first.exists), other.screen()
        other.send(signal.SIGINT, whole_group)
        assert other.end() == 130, other.screen()
        screen = other.screen()
    assert len(table(sweep / "leaderboard.csv")) == 1 and "not run" in statuses(sweep)
    ended = {folder.name: summary(folder)["status"] for folder in sweep.glob("[0-9]*")}  # all of them
    assert ended["0_seed-0"] == "interrupted" and set(ended.values()) <= {"interrupted", "done"}, screen
    assert "Traceback" not in screen
    [line] = re.findall(r"go on with what is left: .*(--config-dir .*)", screen)
    again = cli(*shlex.split(line))
    assert again.status == 0, again.out + again.err
    assert statuses(sweep) == ["done"] * 6
    assert re.search(r"resumed +at step \d", (sweep / "0_seed-0" / "run.log").read_text())


both = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("receivers", ["sweep", "worker", both("worker sweep"), both("sweep worker")])
def test_signal_reaches_the_sweep_or_its_workers(
    joblib: None, receivers: str, cli: Command, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch_here(work: Work, items: list[Any], launcher: launch.Launcher) -> str:
        """Run the jobs as workers do, and send the signals while one runs."""
        checks = itertools.count()
        for record, callback in items:
            stop = StopRequest(work.interrupt_file)

            def asked(stop: StopRequest = stop) -> bool:
                if next(checks) == 7:  # after the test and the first evaluation, in the second step
                    for receiver in receivers.split():
                        stop.handle_signal(15, None) if receiver == "worker" else signal.raise_signal(15)
                return stop()

            work(record, callback, stop=asked)
        return ""

    monkeypatch.setattr(launch, "_launch_with_hydra", launch_here)
    monkeypatch.setattr("runner.sweep.work.POLL", 0.0)
    ended = cli(*PACED, "seed=0,1", *JOBLIB)
    assert ended.status == 130 and ("Again to stop at once" in ended.out) == ("sweep" in receivers)
    assert statuses(sweep) == ["interrupted", "not run"]
    assert cli(*RESUME, "hydra/launcher=basic").status == 0
    assert statuses(sweep) == ["done", "done"]
    assert re.search(r"resumed +at step [1-5]", (sweep / "0_seed-0" / "run.log").read_text())


def test_second_signal_ends_a_launch_at_once() -> None:
    """Also where the launcher turns the exception into one of its own."""
    interrupted: list[bool] = []
    work: Any = SimpleNamespace(interrupt=lambda: interrupted.append(True))
    with pytest.raises(KeyboardInterrupt), launch._graceful_stop(work):
        signal.raise_signal(signal.SIGINT)
        assert interrupted == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_process_that_dies_fails_its_job_alone(joblib: None, tmp_path: Path, sweep: Path) -> None:
    # the other one takes longer: it is there whenever the process beside it dies, and is killed with it
    command = [*PACED, "loop.steps=30", "task.end=dies,well", *JOBLIB]
    with opened(tmp_path, command, TOY_PAUSE="0.1") as other:
        assert other.end() == 1, other.screen()
        screen = other.screen()
    [dead, well] = table(sweep / "runs.csv")
    assert (dead["status"], well["status"]) == ("failed", "done"), screen
    assert "died 3 times" in dead["error"]
    assert (sweep / dead["folder"] / "misbehaved").read_text() == "xxx"
    assert screen.count("] FAILED: ") == screen.count("] ok: ") == 1
