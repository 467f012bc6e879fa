"""One run from its header to its summary: prepare, before, fit, test, after."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from typing import Any

from runner import figures
from runner.engine import checkpoint, report, signals
from runner.engine.folders import CONFIG_FILE, open_folder
from runner.engine.job import TRAIN, Job, Result
from runner.engine.loop import Trainer
from runner.engine.prepare import prepare
from runner.engine.state import NonFinite, Pruned, TrainingState
from runner.errors import UserError
from runner.records.console import log, logging_to
from runner.records.tracker import Tracker
from runner.task import Interrupted, Run


def execute(job: Job) -> Result:
    """Run a job from start to summary.

    Raises:
        UserError: something that the user can fix, found before the folder was made.
        Exception: a bug, in the task or here; the folder then says `failed` and holds the traceback.
    """
    with logging_to(None, screen=not job.quiet):
        run, state, parts = prepare(job)
    run.folder = open_folder(job)
    with logging_to(run.folder / "run.log", screen=not job.quiet):
        return _Session(job, run, state, parts).run_all()


class _Stop:
    """A signal handler: in the loop the first signal ends the run after its step, elsewhere at once."""

    def __init__(self) -> None:
        self.in_loop, self.requested, self.received = False, False, signal.SIGINT

    def __call__(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        if not self.in_loop or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(RuntimeError):  # the signal came while the log was being written
            log.info("\nStopping: this step ends and is saved. Again to stop at once.")


class _Session:
    """One run inside its folder."""

    def __init__(self, job: Job, run: Run, state: TrainingState, parts: dict[str, Any] | None):
        self.job, self.run, self.state, self.progress = job, run, state, state.progress
        self.checkpoints = run.folder / "checkpoints"
        self.resumed_at = None if parts is None or job.mode != TRAIN else state.progress.step
        self.test_metrics: dict[str, Any] = {}
        self.start = time.perf_counter()
        self.stop = _Stop()
        run.stop = job.stop or (lambda: self.stop.requested)

    def run_all(self) -> Result:
        """Run every phase, and write a summary however it ends."""
        job, run = self.job, self.run
        if job.resume is None:
            run.tracker = Tracker(run.folder, trains=job.mode == TRAIN)
        else:  # cut where the run continues: at its checkpoint, or all of it where there was none yet
            resumed_at = -1 if self.resumed_at is None else self.resumed_at
            run.tracker = Tracker(run.folder, resumed_at, self.progress.rows)

        result = Result("failed", run.folder, exit_status=1)
        try:
            handler = signals.handled_by(self.stop) if job.stop is None else contextlib.nullcontext()
            with handler, figures.style():
                log.info(report.header(job, run, self.resumed_at))
                self._train() if job.mode == TRAIN else self._run_mode()
            failed = [check.name for check in run.checks if not check.passed]
            if failed:
                result.error = f"Checks failed: {', '.join(failed)}."
            else:
                result.status, result.exit_status = "done", 0

        # ended early, on purpose
        except Pruned:
            result.status, result.exit_status = "pruned", 0
            run.tracker.hparams_end()
        except (Interrupted, KeyboardInterrupt):
            result.status, result.exit_status = "interrupted", 128 + self.stop.received

        # failed
        except (NonFinite, UserError) as error:
            result.error = str(error)
        except BaseException as bug:
            result.error = f"{type(bug).__name__}: {bug}"
            with (run.folder / "run.log").open("a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
            raise
        finally:
            self._close(result)
        return result

    def _train(self) -> None:
        job, run, state = self.job, self.run, self.state

        # records of what is run
        run.tracker.text("config", f"```yaml\n{job.files.get(CONFIG_FILE, '')}\n```")
        settings = report.main_settings(job.config)
        run.tracker.hparams_start({key: settings.get(key) for key in job.columns or settings})

        # before training: the test metrics and the task's own figures and checks
        if self.resumed_at is None:
            if run.networks and "test" in run.splits:
                self.progress.before = state.evaluate("test")
            with run.evaluation("before"):
                job.task.before(run)
            self._save("last")

        # training
        self.stop.in_loop = True
        Trainer(state, job.schedule, job.objective, self._save, job.should_prune).fit()
        self.stop.in_loop = False

        # after training, with the best weights on val if there is an objective, else the last
        if self.progress.best_step is not None:
            parts = checkpoint.load(self.checkpoints / "best.pt")
            state.load_weights(parts)
            run.step = parts["step"]
        state.apply_ema()
        if run.networks and "test" in run.splits:
            self.test_metrics["test"] = state.evaluate("test")
        with run.evaluation("after"):
            job.task.after(run)
        run.tracker.hparams_end()

    def _run_mode(self) -> None:
        """Run mode=eval or one of the task's own modes: no training."""
        job, run = self.job, self.run
        run.checks.clear()  # those of the training run, which reported them itself
        self.state.apply_ema()
        if job.mode != "eval":
            with run.evaluation("mode", job.mode):
                getattr(job.task, job.mode)(run)
            return

        for split in ("val", "test"):
            if run.networks and split in run.splits:
                self.test_metrics[split] = self.state.evaluate(split)
        with run.evaluation("after"):
            job.task.after(run)

    def _save(self, name: str) -> None:
        self.state.save(self.checkpoints / f"{name}.pt", self.job.config)

    def _close(self, result: Result) -> None:
        """Print the footer, and write the summary last of all."""
        run, job, progress = self.run, self.job, self.progress

        # the result
        result.checks, result.seconds = run.checks, time.perf_counter() - self.start
        result.model = run.networks.get("", run.networks or None)
        if progress.best_step is not None:
            result.best = {
                "metric": job.objective.name,
                "value": progress.best_value,
                "step": progress.best_step,
                "epoch": self.state.epoch(progress.best_step),
                "checkpoint": "checkpoints/best.pt",
            }
        result.metrics = report.collect_metrics(run.tracker.history, progress, self.test_metrics)

        # screen and records
        if run.checks:
            run.tracker.table("checks", report.CHECK_HEADER, report.check_rows(run.checks), run.step)
        log.info(report.footer(job, run, progress, result))
        run.tracker.close()
        report.write_summary(job, run, progress, result)
