"""One run from its first line on the screen to its summary: prepare, before, fit, test, after.

It takes plain typed values; what came from YAML and the command line was turned into a `Job` before.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from runner import checkpoint as checkpoints
from runner import device, figures, files, report
from runner.data import Split
from runner.errors import UserError, did_you_mean, memory_for, nearest, room_for
from runner.job import TRAIN, Job, Result
from runner.loop import NonFinite, Pruned, Training, epoch_steps, evaluate, fit, total_steps
from runner.streams import reseed
from runner.task import Interrupted, Meters, Run, Task, named
from runner.tracker import Tracker, log, logging_to

CONFIG_FILE = ".hydra/config.yaml"
CHANGES_FILE = ".hydra/changes.txt"


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


def prepare(job: Job) -> tuple[Run, Training, dict[str, Any] | None]:
    """Everything that can go wrong before a folder exists: device, data, networks, checkpoint."""
    require_mode(job)
    compute = device.select(job.device, job.precision, job.threads, job.deterministic)
    saved = stored_checkpoint(job)
    parts = checkpoints.load(saved) if saved else None
    splits = load_splits(job)
    elsewhere = "" if compute.device.type == "cpu" else ", device=cpu leaves the data where they are"
    with room_for("the data", less(job, "data") + elsewhere, size_of([*map(vars, splits.values())])):
        splits = {name: split.to(compute.device) for name, split in splits.items()}
    run = Run(job.name, job.seed, compute, job.data, splits, eval_limit=job.settings.eval_batches)
    build(job, run)
    training = start(job, run)
    if saved is not None and parts is not None:
        go_on_from(saved, parts, job, run, training)
    require_measured(job, run)
    return run, training, parts


def build(job: Job, run: Run) -> None:
    """The task's networks, on the run's device.

    Raises:
        UserError: the memory does not hold them.
    """
    job.task.run = run
    reseed(job.seed, run.device)
    with room_for("the network", less(job, "model")):
        run.networks = named(job.task.build(run), "build")
    with room_for("the network", less(job, "model"), weights_of(run)):
        for network in run.networks.values():
            network.to(run.device)
    for network in run.networks.values():
        if job.compile:
            network.compile(mode=None if job.compile is True else job.compile)


def start(job: Job, run: Run) -> Training:
    """What training changes, as it is before the first step.

    Raises:
        UserError: the optimizer refuses its arguments; the memory does not hold the averaged weights.
    """
    try:
        with room_for("the averaged weights beside the network", less_state(job), weights_of(run)):
            return Training(job.task, run, job.optimizer, job.settings)
    except ValueError as error:  # torch's optimisers check their own arguments
        raise UserError(f"optimizer: {error}") from None


def go_on_from(saved: Path, parts: dict[str, Any], job: Job, run: Run, training: Training) -> None:
    """Stand where a checkpoint was saved.

    Raises:
        UserError: it is another network's, or stands beyond the steps that are asked for; the memory does not hold
            what it has beside the weights.
    """
    state = {name: parts[name] for name in ("optimizer", "ema")}
    try:
        with room_for("the optimizer's numbers and the averaged weights", less_state(job), size_of(state)):
            training.load_state_dict(parts)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{saved} does not fit this network: {reason}") from None
    require_longer(job, run, training)


def less(job: Job, node: str) -> str:
    """What takes less memory than the model or the data: a smaller one, by those of the node's keys that are sizes."""
    sizes = [
        f"{node}.{key}"
        for key, value in (job.config.get(node) or {}).items()
        if not key.endswith("_size")
        and all(type(n) is int for n in (value if isinstance(value, list) else [value]))
    ]
    what = "a smaller network takes" if node == "model" else "fewer or smaller samples take"
    return f"{what} less" + (f" ({', '.join(sizes)})" if sizes else "")


def less_state(job: Job) -> str:
    """What takes less memory than what training keeps beside the weights."""
    average = "" if job.settings.ema is None else ", loop.ema=null does without averaged weights"
    return f"{less(job, 'model')}{average}, optimizer=sgd keeps fewer numbers"


def weights_of(run: Run) -> int:
    """Bytes of all networks."""
    return size_of([dict(network.state_dict()) for network in run.networks.values()])


def size_of(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    return sum(tensor.nbytes for _, tensor in checkpoints.tensors(state))


def rehearse(job: Job, splits: dict[str, Split] | None = None) -> dict[str, Split]:
    """Find what is wrong with a job before others run: mode, device, data, and its networks' shapes.

    The networks are built on the meta device, without weights. Returns the data's splits, which the next
    rehearsal with the same data may be given.

    Raises:
        UserError: what the user can mend.
    """
    require_mode(job)
    compute = device.select(job.device, job.precision, job.threads, job.deterministic)
    splits = load_splits(job, splits)
    meta = replace(compute, device=torch.device("meta"))
    run = Run(job.name, job.seed, meta, job.data, splits, eval_limit=job.settings.eval_batches)
    job.task.run = run
    try:
        with torch.device("meta"):
            named(job.task.build(run), "build")
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():  # else a task that needs numbers to build: its own run will tell
            raise
    return splits


def load_splits(job: Job, splits: dict[str, Split] | None = None) -> dict[str, Split]:
    """The data's splits, large enough for a batch; none where the mode wants none."""
    if job.data is None or job.mode in job.task.without_data:
        return {}
    if splits is None:
        with room_for("the data", less(job, "data")):
            splits = job.data.load(job.seed)
    if "train" in splits and job.data.batch_size > len(splits["train"]):
        samples = len(splits["train"])
        raise UserError(f"data.batch_size={job.data.batch_size} is more than the {samples} training samples.")
    return splits


def require_mode(job: Job) -> None:
    """Refuse a mode that the task has not, and patience without an objective."""
    modes = (TRAIN, "eval", *job.task.modes)
    if job.mode not in modes:
        close = nearest(job.mode, modes)
        hint = did_you_mean(close and f"mode={close}")
        raise UserError(
            f"mode={job.mode} is not a mode of {job.name}.{hint} It has: {', '.join(modes)}.",
            f"mode={job.mode}",
            f"mode={close}" if close else None,
        )
    if job.settings.patience is not None and job.objective.name is None:
        raise UserError("loop.patience waits for a better objective: set objective=METRIC/val too.")


def require_longer(job: Job, run: Run, training: Training) -> None:
    """Refuse to resume towards fewer steps than were done."""
    if job.resume is None or job.data is None or "train" not in run.splits:
        return
    done = training.progress.step
    per_epoch = epoch_steps(job.data.batch_size, len(run.splits["train"]), job.settings)
    steps = total_steps(job.settings, per_epoch)
    if steps < done:
        raise UserError(
            f"resume={job.resume} stands at step {done} (epoch {done / per_epoch:.3g}), "
            f"which is beyond the {steps} steps that are asked for."
        )


def require_measured(job: Job, run: Run) -> None:
    """Refuse an objective that evaluation does not measure; a task's own `eval` is known after its first call."""
    if job.mode != TRAIN or job.objective.name is None or not run.networks:
        return
    if "val" not in run.splits:
        raise UserError(
            f"objective={job.objective.name} cannot be measured, for there is no val split: "
            "objective=null keeps the last step instead of the best.",
            f"objective={job.objective.name}",
            "objective=null",
        )
    if type(job.task).eval is not Task.eval:
        return
    assert run.data is not None, "an experiment without data has no batches"
    meters = Meters()
    with run.inference("objective"), memory_for("data.eval_batch_size", run.data.eval_batch_size):
        for batch in islice(run.batches("val"), 1):
            meters.update(named(job.task.train(batch), "train"), len(batch.inputs))
    job.objective.value(meters.compute())


def stored_checkpoint(job: Job) -> Path | None:
    """The checkpoint that the job starts from, if any; a run that was killed before its first has none."""
    if job.resume is not None:
        last = job.resume / "checkpoints" / "last.pt"
        return last if last.exists() else None
    if job.mode != TRAIN and job.checkpoint is None:
        raise UserError(
            f"mode={job.mode} needs a trained network: add checkpoint=RUN_DIR/checkpoints/best.pt."
        )
    return job.checkpoint


def open_folder(job: Job) -> Path:
    """Make the run's folder, without a race, and put the job's files in it."""
    if job.resume is not None:
        return reopen_folder(job, job.resume)
    if job.folder is not None:
        folder = job.folder
        folder.mkdir(parents=True, exist_ok=False)
    elif job.checkpoint is not None:
        folder = claim(eval_home(job.checkpoint, job.outputs / job.name))
    else:
        folder = claim(job.outputs / job.name)
    for name, text in (job.files | {CHANGES_FILE: "\n".join(job.changes)}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def reopen_folder(job: Job, folder: Path) -> Path:
    """Take up the folder of a run that was stopped; what this resume changes, such as loop.epochs, stays."""
    files.sweep(folder)
    (folder / "summary.json").unlink(missing_ok=True)  # it may say `done`, which is no longer so
    stored = folder / CHANGES_FILE
    changes = stored.read_text(encoding="utf-8").splitlines() if stored.exists() else []
    job.changes = list({change.partition("=")[0]: change for change in (*changes, *job.changes)}.values())
    for name, text in (job.files | {CHANGES_FILE: "\n".join(job.changes)}).items():
        path = folder / name
        if name in (CONFIG_FILE, CHANGES_FILE) or not path.exists():  # it may have failed before it had them
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_file(path, text.encode())
    return folder


def eval_home(saved: Path, otherwise: Path) -> Path:
    """Where looks at a checkpoint go: `eval/` of its run, or of the experiment where it lies alone."""
    return (saved.parent.parent if saved.parent.name == "checkpoints" else otherwise) / "eval"


def claim(parent: Path) -> Path:
    """A new folder named by the time; two that ask in the same second get two.

    Raises:
        UserError: the folder cannot be made there.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(exist_ok=False)
                return folder
    except OSError as error:
        raise UserError(f"No folder can be made in {parent}: {error.strerror}.") from None
    raise AssertionError("count() does not end")


class Stop:
    """Signals as the run wants them: inside the loop the first one ends the step, else it ends the run."""

    def __init__(self, run: Run):
        self.run, self.in_loop, self.received = run, False, signal.SIGINT

    def __call__(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        if not self.in_loop or self.run.stop_requested:
            raise KeyboardInterrupt
        self.run.stop_requested = True
        with contextlib.suppress(RuntimeError):  # the signal came while the log was being written
            log.info("\nStopping: this step ends and is saved. Again to stop at once.")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM, in the main thread (no other may), and give them back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Session:
    """One run inside its folder."""

    def __init__(self, job: Job, run: Run, training: Training, parts: dict[str, Any] | None):
        self.job, self.run, self.training, self.progress = job, run, training, training.progress
        self.resumed_at = None if parts is None or job.mode != TRAIN else training.progress.step
        self.metrics: dict[str, Any] = {}
        self.start = time.perf_counter()
        self.stop = Stop(run)

    def run_all(self) -> Result:
        """Every phase, and a summary however it ends."""
        job, run = self.job, self.run
        run.tracker = self.tracker()
        result = Result("failed", run.folder, exit_status=1)
        try:
            with self.stop.installed(), figures.style():
                log.info(report.greeting(job, run, self.resumed_at))
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
        settings = report.main_settings(job.config)
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
        result.metrics = report.collect_metrics(run.tracker.history, progress, self.metrics)
        if run.checks:
            run.tracker.table("checks", report.CHECK_HEADER, report.check_rows(run.checks), run.step)
        log.info(report.farewell(job, run, progress, result))
        run.tracker.close()
        report.write_summary(job, run, progress, result)
