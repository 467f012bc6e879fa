"""One run from its header to its summary: prepare, before, fit, test, after."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from typing import Any

from runner import figures
from runner.engine import checkpoint, classification, report, signals
from runner.engine.folders import CONFIG_FILE, open_folder
from runner.engine.job import TRAIN, Job, Result
from runner.engine.loop import Trainer
from runner.engine.prepare import prepare
from runner.engine.state import NonFinite, Pruned, TrainingState
from runner.errors import UserError
from runner.records import provenance
from runner.records.console import log, logging_to
from runner.records.provenance import Provenance
from runner.records.tracker import Tracker
from runner.task import Interrupted, Run, Task


def execute(job: Job) -> Result:
    """Run a job from start to summary.

    Raises:
        UserError: something that the user can fix, found before the folder was made.
        Exception: a bug, in the task or here; the folder then says `failed` and holds the traceback.
    """
    with job.around():
        with logging_to(None, screen=not job.quiet):
            run, state, parts = prepare(job)
        origin = provenance.collect(
            job.config_dir, job.trust, again=job.folder is None
        )  # a sweep's jobs: once

        run.folder = open_folder(job)
        sweep = None if job.folder is None else job.folder.parent
        provenance.keep(origin.files, run.folder, sweep, resumed=job.resume is not None)

        if job.chdir:
            run.folder = run.folder.absolute()
        with logging_to(run.folder / "run.log", screen=not job.quiet):
            return job.inside(run.folder, _Session(job, run, state, parts, origin).run_all)


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

    def __init__(
        self, job: Job, run: Run, state: TrainingState, parts: dict[str, Any] | None, origin: Provenance
    ):
        self.job, self.run, self.state, self.progress = job, run, state, state.progress
        self.origin = origin
        self.checkpoints = run.folder / "checkpoints"
        self.resumed_at = None if parts is None or job.mode != TRAIN else state.progress.step
        self.shown = "test"  # the split whose predictions `run` holds
        self.measured: dict[str, dict[str, float]] = {}  # by split, after training or in mode=eval
        self.start = time.perf_counter()
        self.stop = _Stop()
        run.stop = job.stop or (lambda: self.stop.requested)

    def run_all(self) -> Result:
        """Run every phase, and write a summary however it ends."""
        job, run = self.job, self.run
        if job.resume is None:
            run.tracker = Tracker(run.folder, trains=job.mode == TRAIN, draws=job.figures)
        else:  # cut where the run continues: at its checkpoint, or all of it where there was none yet
            resumed_at = -1 if self.resumed_at is None else self.resumed_at
            run.tracker = Tracker(run.folder, resumed_at, self.progress.rows, draws=job.figures)

        result = Result("failed", run.folder, exit_status=1)
        try:
            handler = signals.handled_by(self.stop) if job.stop is None else contextlib.nullcontext()
            with handler, figures.style():
                log.info(report.header(job, run, self.resumed_at, self.state.notes, self.origin))
                with contextlib.chdir(run.folder) if job.chdir else contextlib.nullcontext():
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
            self.progress.before = self._evaluate_test()
            self.progress.counts_before = classification.counts_to_keep(run)
            classification.draw_pr_curves(run, self.shown)
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
        if values := self._evaluate_test():
            self.measured["test"] = values
        self._show()
        run.tracker.hparams_end()

    def _evaluate_test(self) -> dict[str, float]:
        """Return the metrics of test and keep its predictions; without test keep those of val, and return none."""
        run = self.run
        if run.networks and "test" in run.splits:
            return self.state.evaluate("test", keep=True)
        if run.networks and "val" in run.splits and type(self.job.task).eval is Task.eval:
            self.shown = "val"
            self.state.evaluate("val", keep=True, record=False)  # the loop records them
        return {}

    def _show(self) -> None:
        """Draw and tabulate what the networks have learnt: what a classifier has in common, then the task's own."""
        classification.show(self.run, self.shown, self.progress.counts_before)
        with self.run.evaluation("after"):
            self.job.task.after(self.run)

    def _run_mode(self) -> None:
        """Run mode=eval or one of the task's own modes: no training."""
        job, run = self.job, self.run
        run.checks.clear()  # those of the training run, which reported them itself
        self.state.apply_ema()
        if job.mode != "eval":
            with run.evaluation("mode", job.mode):
                getattr(job.task, job.mode)(run)
            return

        # the splits that there are: what was not trained on, if possible; of the last the predictions are shown
        usual = [split for split in ("val", "test") if split in run.splits]
        others = [split for split in run.splits if split != "train"]
        for split in (usual or others or list(run.splits)) if run.networks else ():
            self.measured[split], self.shown = self.state.evaluate(split, keep=True), split
        self._show()
        if not any(self.measured.values()):
            log.info(report.why_no_metrics(run, job.task))

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
        result.metrics = report.collect_metrics(run.tracker.history, progress, self.measured)

        # screen and records
        if run.checks:
            run.tracker.table("checks", report.CHECK_HEADER, report.check_rows(run.checks), run.step)
        log.info(report.footer(job, run, progress, result))
        run.tracker.close()
        report.write_summary(job, run, progress, result, self.origin)
