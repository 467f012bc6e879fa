"""All that can fail before a run has a folder: device, data, networks, checkpoint."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from runner import device
from runner.data import Split
from runner.engine import checkpoint as checkpoints
from runner.engine.job import TRAIN, Job
from runner.engine.state import TrainingState, epoch_steps, total_steps
from runner.errors import UserError, did_you_mean, memory_for, nearest, room_for
from runner.streams import reseed
from runner.task import Meters, Run, Task, named


def prepare(job: Job) -> tuple[Run, TrainingState, dict[str, Any] | None]:
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


def start(job: Job, run: Run) -> TrainingState:
    """What training changes, as it is before the first step.

    Raises:
        UserError: the optimizer refuses its arguments; the memory does not hold the averaged weights.
    """
    try:
        with room_for("the averaged weights beside the network", less_state(job), weights_of(run)):
            return TrainingState(job.task, run, job.optimizer, job.settings)
    except ValueError as error:  # torch's optimisers check their own arguments
        raise UserError(f"optimizer: {error}") from None


def go_on_from(saved: Path, parts: dict[str, Any], job: Job, run: Run, training: TrainingState) -> None:
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


def dry_build(job: Job, splits: dict[str, Split] | None = None) -> dict[str, Split]:
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


def require_longer(job: Job, run: Run, training: TrainingState) -> None:
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
