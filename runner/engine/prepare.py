"""All that can fail before a run has a folder: device, data, networks, checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from runner import device
from runner.data import Split
from runner.engine import checkpoint as checkpoints
from runner.engine.job import TRAIN, Job
from runner.engine.state import TrainingState
from runner.errors import UserError, lacks_memory, out_of_memory_hint, unknown
from runner.streams import reseed
from runner.task import Run, Task, by_variant

_LESS_DATA = "fewer or smaller samples (see data), or device=cpu"


def prepare(job: Job) -> tuple[Run, TrainingState, dict[str, Any] | None]:
    """Return the run, its state, and the parts of the checkpoint that it starts from, if any.

    Raises:
        UserError: the device, the data, the network, the checkpoint or the objective cannot be used.
    """
    _require_mode(job)
    compute = device.select(job.device, job.precision, job.threads, job.deterministic)

    # checkpoint: a run that was killed before its first has none
    path = job.checkpoint
    if job.resume is not None:
        last = job.resume / "checkpoints" / "last.pt"
        path = last if last.exists() else None
    elif job.mode != TRAIN and path is None:
        raise UserError(f"mode={job.mode} needs a checkpoint: checkpoint=RUN_DIR/checkpoints/best.pt")
    parts = checkpoints.load(path) if path else None

    # data
    with out_of_memory_hint("loading the data", _LESS_DATA):
        splits = {name: split.to(compute.device) for name, split in _load_splits(job).items()}
    run = Run(job.name, job.seed, compute, job.data, splits, eval_limit=job.loop.eval_batches)

    # networks and what training keeps beside them
    with out_of_memory_hint("building the network", "a smaller model, optimizer=sgd or loop.ema=null"):
        job.task.run = run
        reseed(job.seed, run.device)
        run.networks = by_variant(job.task.build(run), "build")
        for network in run.networks.values():
            network.to(run.device)
            if job.compile:
                network.compile(mode=None if job.compile is True else job.compile)
        try:
            state = TrainingState(job.task, run, job.optimizer, job.loop)
        except ValueError as error:  # such as a network without parameters
            raise UserError(f"optimizer: {error}") from None
        if path is not None and parts is not None:
            _restore(path, parts, job, state)

    _require_objective(job, run)
    return run, state, parts


def dry_build(job: Job, splits: dict[str, Split] | None = None) -> dict[str, Split]:
    """Check a job before others run: mode, device, data, and its networks on the meta device, without weights.

    Returns the splits of the data, which the next job with the same data may be given.

    Raises:
        UserError: something is wrong with the job.
    """
    _require_mode(job)
    compute = device.select(job.device, job.precision, job.threads, job.deterministic)
    with out_of_memory_hint("loading the data", _LESS_DATA):
        splits = _load_splits(job, splits)

    # networks
    meta = replace(compute, device=torch.device("meta"))
    run = Run(job.name, job.seed, meta, job.data, splits, eval_limit=job.loop.eval_batches)
    job.task.run = run
    try:
        with torch.device("meta"):
            by_variant(job.task.build(run), "build")
    except RuntimeError as error:  # of the meta device, also what it does not implement
        # a task may need numbers to build: its own run will show whether it does
        if "meta" not in str(error).lower():
            raise
    return splits


def _require_mode(job: Job) -> None:
    modes = (TRAIN, "eval", *job.task.modes)
    if job.mode not in modes:
        raise unknown(f"mode of {job.name}", job.mode, modes, f"mode={job.mode}")
    if job.loop.patience is not None and job.objective.name is None:
        raise UserError("loop.patience needs an objective: set objective=METRIC/val")


def _load_splits(job: Job, splits: dict[str, Split] | None = None) -> dict[str, Split]:
    if job.data is None or job.mode in job.task.without_data:
        return {}
    splits = job.data.load(job.seed) if splits is None else splits
    if "train" in splits and job.data.batch_size > len(splits["train"]):
        raise UserError(
            f"data.batch_size={job.data.batch_size} is more than the {len(splits['train'])} training samples"
        )
    return splits


def _restore(path: Path, parts: dict[str, Any], job: Job, state: TrainingState) -> None:
    try:
        state.load_state_dict(parts)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if lacks_memory(error):
            raise
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit this network: {reason}") from None

    # a resume may shorten the run, but not below what is done
    step, steps = state.progress.step, job.loop.total_steps(state.steps_per_epoch)
    if job.resume is not None and state.steps_per_epoch and steps < step:
        raise UserError(
            f"resume={job.resume}: the checkpoint is at step {step} (epoch {state.epoch(step):.3g}), "
            f"past the requested {steps} steps"
        )


def _require_objective(job: Job, run: Run) -> None:
    if job.mode != TRAIN or job.objective.name is None or not run.networks:
        return
    if "val" not in run.splits:
        raise UserError(
            f"objective={job.objective.name} needs a val split, which the data lacks; "
            "objective=null keeps the last step instead of the best",
            f"objective={job.objective.name}",
            "objective=null",
        )

    # one batch shows the metrics, except those of a task's own evaluation
    if type(job.task).eval is not Task.eval:
        return
    limit, run.eval_limit = run.eval_limit, 1
    with run.inference("objective"):
        job.objective.value(job.task.eval("val"))
    run.eval_limit = limit
