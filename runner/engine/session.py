"""One run from its first line on the screen to its summary: prepare, before, fit, test, after.

It takes plain typed values; what came from YAML and the command line was turned into a `Job` before.
"""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from runner import figures
from runner.engine import checkpoint as checkpoints
from runner.engine import signals
from runner.engine.folders import CONFIG_FILE, open_folder
from runner.engine.job import TRAIN, Job, Result
from runner.engine.loop import fit
from runner.engine.prepare import prepare
from runner.engine.report import (
    CHECK_HEADER,
    check_rows,
    collect_metrics,
    footer,
    header,
    main_settings,
    write_summary,
)
from runner.engine.state import NonFinite, Pruned, TrainingState, epoch_steps, evaluate
from runner.errors import UserError
from runner.records.console import log, logging_to
from runner.records.tracker import Tracker
from runner.task import Interrupted, Run


def execute(job: Job) -> Result:
    """Run a job from start to summary.

    Raises:
        UserError: something that the user can mend, found before the folder was made.
        Exception: a bug, in the task or here; the folder then says `failed` and holds the traceback.
    """
    with logging_to(None, screen=not job.quiet):
        run, training, parts = prepare(job)
    run.folder = open_folder(job)
    with logging_to(run.folder / "run.log", screen=not job.quiet):
        return Session(job, run, training, parts).run_all()


class Stop:
    """Signals as the run wants them: inside the loop the first one ends the step, else it ends the run."""

    def __init__(self) -> None:
        self.in_loop, self.requested, self.received = False, False, signal.SIGINT

    def __call__(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        if not self.in_loop or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(RuntimeError):  # the signal came while the log was being written
            log.info("\nStopping: this step ends and is saved. Again to stop at once.")


class Session:
    """One run inside its folder."""

    def __init__(self, job: Job, run: Run, training: TrainingState, parts: dict[str, Any] | None):
        self.job, self.run, self.training, self.progress = job, run, training, training.progress
        self.resumed_at = None if parts is None or job.mode != TRAIN else training.progress.step
        self.metrics: dict[str, Any] = {}
        self.start = time.perf_counter()
        self.stop = Stop()
        run.stop = job.stop or (lambda: self.stop.requested)

    def run_all(self) -> Result:
        """Every phase, and a summary however it ends."""
        job, run = self.job, self.run
        run.tracker = self.tracker()
        result = Result("failed", run.folder, exit_status=1)
        try:
            taken = signals.taken(self.stop) if job.stop is None else contextlib.nullcontext()
            with taken, figures.style():
                log.info(header(job, run, self.resumed_at))
                self.train() if job.mode == TRAIN else self.look()
            failed = [check.name for check in run.checks if not check.passed]
            if failed:
                result.error = f"Checks failed: {', '.join(failed)}."
            else:
                result.status, result.exit_status = "done", 0
        except Pruned:
            result.status, result.exit_status = "pruned", 0
            run.tracker.hparams_end()
        except (Interrupted, KeyboardInterrupt):
            result.status, result.exit_status = "interrupted", 128 + self.stop.received
        except (NonFinite, UserError) as problem:
            result.error = str(problem)
        except BaseException as bug:
            result.error = f"{type(bug).__name__}: {bug}"
            with (run.folder / "run.log").open("a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
            raise
        finally:
            self.close(result)
        return result

    def tracker(self) -> Tracker:
        """The records, cut where the run goes on: at its checkpoint, or all of them where it had none yet."""
        if self.job.resume is None:
            return Tracker(self.run.folder, trains=self.job.mode == TRAIN)
        resumed_at = -1 if self.resumed_at is None else self.resumed_at
        return Tracker(self.run.folder, resumed_at, self.progress.rows)

    def train(self) -> None:
        """Before, the loop, after."""
        job, run = self.job, self.run
        run.tracker.text("config", f"```yaml\n{job.files.get(CONFIG_FILE, '')}\n```")
        settings = main_settings(job.config)
        run.tracker.hparams_start({key: settings.get(key) for key in job.columns or settings})
        if self.resumed_at is None:
            if run.networks and "test" in run.splits:
                self.progress.before = self.evaluate("test")
            with run.looking("before"):
                job.task.before(run)
            self.save("last")
        self.stop.in_loop = True
        fit(job.task, run, self.training, job.schedule, job.settings, job.objective, self.save, job.judge)
        self.stop.in_loop = False
        self.load_best()
        if run.networks and "test" in run.splits:
            self.metrics["test"] = self.evaluate("test")
        with run.looking("after"):
            job.task.after(run)
        run.tracker.hparams_end()

    def look(self) -> None:
        """mode=eval and the task's own modes: no training."""
        job, run = self.job, self.run
        run.checks.clear()  # those of the training run, which said so itself
        self.training.settle()
        if job.mode != "eval":
            with run.looking("mode", job.mode):
                getattr(job.task, job.mode)(run)
            return
        for split in ("val", "test"):
            if run.networks and split in run.splits:
                self.metrics[split] = self.evaluate(split)
        with run.looking("after"):
            job.task.after(run)

    def evaluate(self, split: str) -> dict[str, float]:
        """The metrics of a split at the present step, into the records."""
        values = evaluate(self.job.task, self.run, self.training, split)
        self.run.tracker.metrics(split, self.run.step, self.epoch(self.run.step), values)
        return values

    def epoch(self, step: int) -> float:
        data, split = self.job.data, self.run.splits.get("train")
        if data is None or split is None:
            return 0.0
        return step / epoch_steps(data.batch_size, len(split), self.job.settings)

    def save(self, name: str) -> None:
        self.training.save(self.checkpoint(name), self.job.config)

    def checkpoint(self, name: str) -> Path:
        return self.run.folder / "checkpoints" / f"{name}.pt"

    def load_best(self) -> None:
        """The weights that the test set judges: the best on val where there is an objective, else the last."""
        if self.progress.best_step is not None:
            parts = checkpoints.load(self.checkpoint("best"))
            self.training.load_networks(parts)
            for name, ema in self.training.emas.items():
                ema.load_state_dict(parts["ema"][name])
            self.run.step = parts["step"]
        self.training.settle()

    def close(self, result: Result) -> None:
        """Say how it ended, and write the summary last of all."""
        run, job, progress = self.run, self.job, self.progress
        result.checks, result.seconds = run.checks, time.perf_counter() - self.start
        result.model = run.networks.get("", run.networks or None)
        if progress.best_step is not None:
            result.best = {
                "metric": job.objective.name,
                "value": progress.best_value,
                "step": progress.best_step,
                "epoch": self.epoch(progress.best_step),
                "checkpoint": "checkpoints/best.pt",
            }
        result.metrics = collect_metrics(run.tracker.history, progress, self.metrics)
        if run.checks:
            run.tracker.table("checks", CHECK_HEADER, check_rows(run.checks), run.step)
        log.info(footer(job, run, progress, result))
        run.tracker.close()
        write_summary(job, run, progress, result)
