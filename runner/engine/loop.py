"""The one training loop. It counts in steps; epochs are sugar. It knows no experiment and no config."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from runner.data import Batch, train_batch
from runner.engine.monitor import Monitor, profiled
from runner.engine.state import LoopConfig, Objective, Schedule, TrainingState
from runner.errors import memory_for
from runner.streams import reseed, seed_of
from runner.task import Interrupted, Output, Run, Task, named


def fit(
    task: Task,
    run: Run,
    training: TrainingState,
    schedule: Schedule,
    settings: LoopConfig,
    objective: Objective,
    save: Callable[[str], None],
    judge: Callable[[int, float], bool] | None = None,
) -> None:
    """Train the task's networks until the settings say stop.

    `training` is where the run stands and is changed in place; `save(name)` writes it to a checkpoint.
    `judge`, where given, hears the number of each evaluation and its objective; True ends the run.

    Raises:
        Interrupted: the user asked to stop; the state is saved.
        Pruned: `judge` saw no use in going on; the state is saved.
        NonFinite: a loss, a gradient or a weight stopped being a number; the last good state stays.
        UserError: the memory does not hold a step; the last good state stays.
    """
    if not run.networks or run.data is None or "train" not in run.splits:
        return
    monitor = Monitor(task, run, training, settings, objective, save, judge)
    progress, steps, eval_every = training.progress, monitor.steps, monitor.eval_every
    save_every = settings.save_every or eval_every
    for network in run.networks.values():
        network.train()  # and so again after every look
    try:
        if progress.evaluated == progress.step:  # a kill may have come between an evaluation and its verdict
            monitor.hear(next((row for row in reversed(run.tracker.history) if row["split"] == "val"), {}))
        with profiled(settings.profile, run) as tick:
            while True:
                due = progress.step % eval_every == 0 or progress.step == steps
                if due and progress.evaluated < progress.step:  # a resume does not evaluate again
                    monitor.look()
                patient = settings.patience is None or progress.stale < settings.patience
                if progress.step >= steps or not patient:
                    return
                with memory_for("data.batch_size", run.data.batch_size):
                    step(task, run, training, schedule, settings, steps)
                monitor.bar.advance()
                tick()
                if progress.step % settings.log_every == 0:
                    monitor.report()
                if progress.step % save_every == 0 and progress.step % eval_every:
                    training.readings.require_finite()
                    save("last")
                if run.stop_requested:  # after the report: its row is due at this step, not after a resume
                    raise Interrupted
    except Interrupted:
        monitor.clock.read(progress)
        training.readings.require_finite()
        save("last")
        raise
    finally:
        monitor.bar.close()


def step(
    task: Task, run: Run, training: TrainingState, schedule: Schedule, settings: LoopConfig, steps: int
) -> None:
    """One optimiser step: learning rate, forward, backward, clip, step, average; no synchronisation.

    All of it is a function of the state and the step's number: the batch, the learning rate, and the global
    random stream (dropout), which is seeded here.
    """
    data, progress = run.data, training.progress
    assert data is not None
    number = progress.step
    factor = schedule(number, steps)
    for name, optimizer in training.optimizers.items():
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, training.learning_rates[name], strict=True):
            group["lr"] = rate * factor
    reseed(seed_of(run.seed, "step", number, run.rank), run.device)
    losses = dict.fromkeys(run.networks, torch.zeros((), device=run.device))
    for part in range(settings.accumulate):
        index = number * settings.accumulate + part
        if settings.repeat_batches is not None:
            index %= settings.repeat_batches
        batch = train_batch(data, run.splits["train"], run.seed, index, run.rank, run.world_size)
        with run.compute.autocast():
            outputs = outputs_of(task, run, batch)
        # the variants share no parameters, so one backward pass serves them all
        torch.autograd.backward([output.loss / settings.accumulate for output in outputs.values()])
        training.meters.update(outputs, len(batch.inputs))
        losses = {name: losses[name] + outputs[name].loss.detach() for name in losses}
    for name, network in run.networks.items():
        norm, clipped = clip(network.parameters(), settings.clip_norm)
        training.readings.update(name, number, losses[name], norm, clipped)
        training.optimizers[name].step()
        if name in training.emas:
            training.emas[name].update(number)
    training.readings.steps += 1
    progress.step = run.step = number + 1


def outputs_of(task: Task, run: Run, batch: Batch) -> dict[str, Output]:
    """What the task says of a training batch, one output per network."""
    outputs = named(task.train(batch), "train")
    if outputs.keys() != run.networks.keys():
        raise TypeError(
            f"build() gave the variants {list(run.networks)}, train() the outputs of {list(outputs)}"
        )
    return outputs


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> tuple[Tensor, Tensor]:
    """Scale the gradients so that their global 2-norm is at most `limit` (Pascanu et al. 2013, algorithm 1).

    Returns the norm before and after, scalars on the device.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if limit is None:
        return norm, norm
    nn.utils.clip_grads_with_norm_(with_gradient, limit, norm)
    return norm, norm.clamp(max=limit)
