"""All that can fail before a run has a folder: device, data, networks, checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner import device
from runner.data import Data, Split, train_batch
from runner.engine import checkpoint as checkpoints
from runner.engine.job import TRAIN, Job
from runner.engine.state import TrainingState
from runner.engine.weights import freeze, start_from
from runner.errors import UserError, lacks_memory, memory_for, out_of_memory_hint, unknown
from runner.outputs import FORGOTTEN_INIT, by_variant, hook_error, outputs_of
from runner.streams import reseed
from runner.task import Run, Task

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
        run.networks = _build(job, run)
        notes = _start(job, run.networks, fresh=parts is None)
        for network in run.networks.values():
            network.to(run.device)
        _try_train(job, run)
        for network in run.networks.values() if job.compile else ():
            network.compile(mode=None if job.compile is True else job.compile)
        try:
            state = TrainingState(job.task, run, job.optimizer, job.loop, notes)
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
            _start(job, _build(job, run), fresh=True)
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
    _require_splits(job.data, splits)
    if "train" in splits and job.data.batch_size > len(splits["train"]):
        raise UserError(
            f"data.batch_size={job.data.batch_size} is more than the {len(splits['train'])} training samples"
        )
    return splits


def _require_splits(data: Data, splits: Any) -> None:
    """Raise UserError unless `load` returned splits by name, of tensors that go together."""
    if not isinstance(splits, dict):
        raise hook_error(data.load, 'a dict of splits, {"train": Split(inputs, targets), ...}', splits)
    for name, split in splits.items():
        if not isinstance(split, Split):
            raise hook_error(data.load, f"a Split(inputs, targets) as {name}", split)
        for part, value in (("inputs", split.inputs), ("targets", split.targets)):
            if not isinstance(value, Tensor) and not (part == "targets" and value is None):
                raise hook_error(data.load, f"a tensor as the {part} of {name}", value)
        if split.targets is not None and len(split.targets) != len(split.inputs):
            lengths = f"{len(split.targets)} for {len(split.inputs)} inputs"
            raise hook_error(data.load, f"as many targets of {name} as inputs", lengths)


def _build(job: Job, run: Run) -> dict[str, nn.Module]:
    """Return the networks that the task builds, by variant; none where it has nothing to train."""
    task = job.task
    try:
        built = task.build(run)
    except AttributeError as error:
        if FORGOTTEN_INIT not in str(error):
            raise
        raise hook_error(
            task.build, "networks whose constructors begin with super().__init__()", str(error)
        ) from None
    if built is None and type(task).train is Task.train:
        return {}
    networks = by_variant(task.build, built, nn.Module, "the network that train uses")
    for network in networks.values():
        if "_modules" not in vars(network):
            raise hook_error(type(network).__init__, "super().__init__() first", "a network without it")
    return networks


def _start(job: Job, networks: dict[str, nn.Module], fresh: bool) -> dict[str, str]:
    """Set what training starts from, unless a checkpoint holds it, and what it leaves alone; say so for the header."""
    notes = {}
    if job.mode == TRAIN and job.init is not None and fresh:
        notes["init"] = start_from(job.init, networks)
    if job.mode == TRAIN and job.freeze:
        notes["frozen"] = freeze(job.freeze, networks)
    return notes


def _try_train(job: Job, run: Run) -> None:
    """Call `train` on a batch before there is a folder: a hook that returns the wrong thing shows."""
    if job.mode != TRAIN or not run.networks or job.data is None:
        return
    if "train" not in run.splits:
        raise hook_error(job.data.load, "a split called train", ", ".join(run.splits) or "none")
    with memory_for("data.batch_size", job.data.batch_size), run.inference("trial"):
        outputs_of(job.task.train, train_batch(job.data, run.splits["train"], run.seed, 0))


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
