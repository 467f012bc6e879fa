"""The one training loop. It counts in steps; epochs are sugar. It knows no experiment and no config."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner import checkpoint
from runner.data import Batch, train_batch
from runner.errors import UserError, did_you_mean, memory_for, nearest, room_for
from runner.streams import reseed, seed_of
from runner.task import Check, Interrupted, Meters, Output, Run, Task, named, with_variant
from runner.tracker import Bar, format_cell, metric_order

log = logging.getLogger("runner")
Schedule = Callable[[int, int], float]


class NonFinite(Exception):
    """A loss, a gradient or a weight stopped being a number; the text says where and what may help."""


@dataclass(frozen=True)
class Settings:
    """The `loop` node of the YAML."""

    epochs: float = 10  # passes over the training data; `steps` has the last word
    steps: int | None = None  # optimiser steps
    eval_every: int | None = None  # steps; null: once per epoch
    save_every: int | None = None  # steps; null: at every evaluation
    log_every: int = 50  # steps
    eval_batches: int | None = None  # batches per evaluation; null: all
    repeat_batches: int | None = None  # train on the first so many batches again and again; null: on all
    clip_norm: float | None = 1.0  # limit of the gradient's global 2-norm; null: no clipping
    accumulate: int = 1  # batches per optimiser step
    ema: float | None = None  # decay of the averaged weights that are evaluated; null: none
    ema_warmup: bool = True  # decay min(ema, (1 + n) / (10 + n)) at step n
    patience: int | None = None  # evaluations without improvement before stopping; null: never
    profile: bool = False  # write a trace of steps 5 to 15

    def __post_init__(self) -> None:
        counts = (
            "eval_every",
            "save_every",
            "log_every",
            "eval_batches",
            "repeat_batches",
            "accumulate",
            "patience",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, or null for no clipping, not {self.clip_norm}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), or be null for none, not {self.ema}")


@dataclass
class Progress:
    """Where a training run stands, beside its tensors."""

    step: int = 0
    evaluated: int = -1  # the step of the last evaluation
    best_value: float | None = None
    best_step: int | None = None
    stale: int = 0  # evaluations since the best
    seconds: float = 0.0  # spent in training steps
    rows: int = 0  # of metrics.csv: what a killed run wrote after its checkpoint is cut
    before: dict[str, float] = field(default_factory=dict)  # the test metrics before training
    checks: list[dict[str, Any]] = field(default_factory=list)


class Ema:
    """Exponential moving average of a network's parameters: θ̄ ← d θ̄ + (1 − d) θ after every step."""

    def __init__(self, network: nn.Module, decay: float, warmup: bool):
        self.decay, self.warmup = decay, warmup
        self.parameters = list(network.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def decay_at(self, step: int) -> float:
        """The decay at step number `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step number `step`."""
        share = 1 - self.decay_at(step)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the trained parameters."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            trained = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(trained)

    def state_dict(self) -> list[Tensor]:
        return self.average

    def load_state_dict(self, state: list[Tensor]) -> None:
        for average, saved in zip(self.average, state, strict=True):
            average.copy_(saved)


class Training:
    """All that changes while a run trains: what a checkpoint holds."""

    def __init__(
        self,
        task: Task,
        run: Run,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        settings: Settings,
    ):
        self.task, self.run = task, run
        self.optimizers = {name: optimizer(network.parameters()) for name, network in run.networks.items()}
        self.learning_rates = {
            name: [group["lr"] for group in opt.param_groups] for name, opt in self.optimizers.items()
        }
        decay, warmup = settings.ema, settings.ema_warmup
        self.emas = {} if decay is None else {n: Ema(net, decay, warmup) for n, net in run.networks.items()}
        self.meters = Meters()
        self.readings = Readings(run.networks, run.device)
        self.progress = Progress()

    def state_dict(self) -> dict[str, Any]:
        """The parts of a checkpoint, `config` apart. There is no random state: every step is seeded anew."""
        self.progress.checks = [asdict(check) for check in self.run.checks]
        self.progress.rows = len(self.run.tracker.history)
        return {
            "model": {name: network.state_dict() for name, network in self.run.networks.items()},
            "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "ema": {name: ema.state_dict() for name, ema in self.emas.items()},
            "step": self.progress.step,
            "progress": asdict(self.progress)
            | {"meters": self.meters.state_dict(), "readings": self.readings.state_dict()},
            "task": self.task.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a checkpoint was saved."""
        self.load_networks(state)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizer"][name])
        for name, ema in self.emas.items():
            ema.load_state_dict(state["ema"][name])
        progress = dict(state["progress"])
        self.meters.load_state_dict(progress.pop("meters"), self.run.device)
        self.readings.load_state_dict(progress.pop("readings"))
        self.progress = Progress(**progress)
        self.run.checks[:] = [Check(**check) for check in self.progress.checks]
        self.run.step = self.progress.step
        self.task.load_state_dict(state["task"])

    def load_networks(self, state: dict[str, Any]) -> None:
        """Take the weights of a checkpoint."""
        for name, network in self.run.networks.items():
            network.load_state_dict(state["model"][name])

    def settle(self) -> None:
        """Training is over: the weights that are evaluated become the networks' own."""
        for ema in self.emas.values():
            ema.swap()
        self.emas = {}

    def measured(self) -> dict[str, float]:
        """What the device has summed over the steps since the last call, which starts anew, and the step's settings."""
        values = self.meters.compute() | self.readings.compute()
        values["learning_rate"] = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        for ema in islice(self.emas.values(), 1):  # one setting for all
            values["ema_decay"] = ema.decay_at(self.progress.step - 1)
        self.meters.reset()
        self.readings.reset()
        return values

    @contextlib.contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """The networks with the weights that are evaluated: the averaged ones where there are any."""
        for ema in self.emas.values():
            ema.swap()
        try:
            yield
        finally:
            for ema in self.emas.values():
                ema.swap()

    def save(self, path: Path, config: dict[str, Any]) -> None:
        """Write a checkpoint, unless it would hold a number that is none.

        Raises:
            NonFinite: a weight, or a number of the optimiser's, is not finite; nothing is written.
            TypeError: the task's state holds what a checkpoint cannot.
        """
        parts = self.state_dict()
        networks = self.run.networks.items()
        trained = {
            "model": {name: dict(network.named_parameters()) for name, network in networks},
            "optimizer": parts["optimizer"],
            "ema": parts["ema"],
        }
        buffers = {"model": {name: dict(network.named_buffers()) for name, network in networks}}
        # an infinite buffer is no accident: attention masks are made of -inf
        found = checkpoint.first_with(lambda t: ~torch.isfinite(t), trained) or checkpoint.first_with(
            torch.isnan, buffers
        )
        if found is not None:
            raise NonFinite(f"{found} is no longer finite after step {self.progress.step}.")
        foreign = checkpoint.first_foreign(parts["task"])
        if foreign is not None:
            raise TypeError(
                f"{type(self.task).__name__}.state_dict() {foreign}, which cannot be loaded again"
            )
        checkpoint.save(path, parts | {"config": config})


class Pruned(Exception):
    """Whoever compares runs has seen enough of this one."""


class Readings:
    """Gradient norms and the first bad step, summed on the device and read with the loss."""

    def __init__(self, variants: Iterable[str], device: torch.device):
        self.norms = {name: torch.zeros(2, device=device) for name in variants}  # before, after clipping
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.steps = 0

    def update(self, variant: str, step: int, loss: Tensor, norm: Tensor, clipped: Tensor) -> None:
        """Add one step's gradient norm before and after clipping, and remember the first that is no number."""
        self.norms[variant] += torch.stack((norm, clipped))
        bad = ~torch.isfinite(loss.detach() + norm) & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, step)

    def compute(self) -> dict[str, float]:
        """The mean norms since the last reset."""
        values: dict[str, float] = {}
        for variant, sums in self.norms.items():
            before, after = (sums / max(1, self.steps)).tolist()
            values |= {with_variant("grad_norm", variant): before}
            values |= {with_variant("grad_norm_clipped", variant): after}
        return values

    def reset(self) -> None:
        self.steps = 0
        for sums in self.norms.values():
            sums.zero_()

    def require_finite(self) -> None:
        """Wait for the device and raise where a loss or a gradient stopped being a number."""
        step = int(self.first_bad)
        if step >= 0:
            raise NonFinite(
                # counted as the records count: the first step is step 1, and its row says so
                f"The loss or its gradient stopped being a finite number at step {step + 1}. "
                "A smaller optimizer.lr, a loop.clip_norm, or a schedule with warm-up usually helps."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name, sums in self.norms.items():
            sums.copy_(state["norms"][name])


def total_steps(settings: Settings, steps_per_epoch: int) -> int:
    """How many optimiser steps a run takes."""
    return round(settings.epochs * steps_per_epoch) if settings.steps is None else settings.steps


def epoch_steps(batch_size: int, samples: int, settings: Settings) -> int:
    """Optimiser steps in one pass over the training data, at least 1."""
    return max(1, round(samples / (batch_size * settings.accumulate)))


def evaluate(task: Task, run: Run, training: Training, split: str) -> dict[str, float]:
    """The task's metrics of a split, with the weights that are evaluated."""
    with training.evaluated_weights(), run.inference("eval", split):
        # plain floats, whatever the task computed them with: a checkpoint and a JSON file hold nothing else
        return {name: float(value) for name, value in task.eval(split).items()}


def fit(
    task: Task,
    run: Run,
    training: Training,
    schedule: Schedule,
    settings: Settings,
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


class Monitor:
    """What is read, measured, kept and told of a run while it trains."""

    def __init__(
        self,
        task: Task,
        run: Run,
        training: Training,
        settings: Settings,
        objective: Objective,
        save: Callable[[str], None],
        judge: Callable[[int, float], bool] | None,
    ):
        assert run.data is not None
        self.task, self.run, self.training, self.progress = task, run, training, training.progress
        self.objective, self.save, self.judge = objective, save, judge
        self.steps_per_epoch = epoch_steps(run.data.batch_size, len(run.splits["train"]), settings)
        self.steps = total_steps(settings, self.steps_per_epoch)
        self.eval_every = settings.eval_every or self.steps_per_epoch
        self.samples_per_step = run.data.batch_size * settings.accumulate
        # FLOP/s of all processes, for a task that says what a sample costs
        known = task.flops_per_sample is not None
        with room_for(
            "the matrices of the ceiling of utilisation", "a smaller model or data.batch_size leaves more"
        ):
            self.ceiling = run.compute.matmul_rate() * run.world_size if known else math.nan
        self.clock, self.bar = Clock(run), Bar(self.steps, self.progress.step)

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self.progress.step / self.steps_per_epoch

    def report(self) -> None:
        """Read what the device has summed, into the records."""
        self.training.readings.require_finite()
        if self.training.readings.steps == 0:
            return
        values = self.training.measured()
        values["samples_per_second"] = self.clock.read(self.progress) * self.samples_per_step
        if self.task.flops_per_sample is not None:
            values["utilisation"] = values["samples_per_second"] * self.task.flops_per_sample / self.ceiling
        self.run.tracker.metrics("train", self.progress.step, self.epoch, values)
        shown = ("loss", "accuracy", "learning_rate", "samples_per_second")
        self.bar.show({name: value for name, value in values.items() if name.split(".")[0] in shown})

    def look(self) -> None:
        """Evaluate, keep the best, and draw the curves so far."""
        run, progress = self.run, self.progress
        self.report()
        self.clock.read(progress)
        values = evaluate(self.task, run, self.training, "val") if "val" in run.splits else {}
        if values:
            run.tracker.metrics("val", progress.step, self.epoch, values)
            log.info(line(run, progress, self.steps, self.steps_per_epoch, values, self.objective))
        if values or progress.step:  # without val there are curves as soon as there are steps
            run.tracker.curves(f"{run.name}, seed {run.seed}")
        progress.evaluated = progress.step
        if self.objective.improved(values, progress):
            self.save("best")
        self.save("last")
        self.clock.restart()
        self.hear(values)

    def hear(self, values: dict[str, float]) -> None:
        """Tell the judge of an evaluation, which counts from 1, and end where it sees no use in going on."""
        step = self.progress.step
        if self.judge is None or self.objective.name is None or step == 0:
            return
        if self.judge(math.ceil(step / self.eval_every), self.objective.value(values)) and step < self.steps:
            raise Pruned


def step(
    task: Task, run: Run, training: Training, schedule: Schedule, settings: Settings, steps: int
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


@dataclass(frozen=True)
class Objective:
    """What "best" means: a metric of a split, such as `accuracy/val`, and its direction."""

    name: str | None = None
    direction: str = "maximize"

    def value(self, values: dict[str, float]) -> float:
        """The objective among the metrics of val.

        Raises:
            UserError: it is not measured.
        """
        assert self.name is not None
        measured = [f"{name}/val" for name in sorted(values, key=metric_order)]
        if self.name not in measured:
            close = nearest(self.name, measured)
            raise UserError(
                f"objective={self.name} is not measured.{did_you_mean(close)} "
                f"Measured: {', '.join(measured)}.",
                f"objective={self.name}",
                f"objective={close}" if close else None,
            )
        return values[self.name.removesuffix("/val")]

    def improved(self, values: dict[str, float], progress: Progress) -> bool:
        """Whether these val metrics are the best so far; keeps count in `progress`."""
        if self.name is None:
            return False
        value, best = self.value(values), progress.best_value
        better = best is None or (value > best if self.direction == "maximize" else value < best)
        better = better and not math.isnan(value)
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best_value, progress.best_step = value, progress.step
        return better


class Clock:
    """Seconds spent in training steps; evaluation and saving do not count."""

    def __init__(self, run: Run):
        self.run = run
        self.restart()

    def restart(self) -> None:
        self.start, self.first = time.perf_counter(), self.run.step

    def read(self, progress: Progress) -> float:
        """Add the time since the last reading to `progress` and return the steps per second in it."""
        self.run.compute.synchronize()
        elapsed, steps = time.perf_counter() - self.start, progress.step - self.first
        progress.seconds += elapsed
        self.restart()
        return steps / elapsed if elapsed > 0 else 0.0


def line(
    run: Run,
    progress: Progress,
    steps: int,
    steps_per_epoch: int,
    values: dict[str, float],
    objective: Objective,
) -> str:
    """The permanent line of one evaluation: loss, accuracy and the objective's metric.

    Several variants leave room for val alone, more than two for one metric each.
    """
    chosen = (objective.name or "loss").removesuffix("/val").split(".")[0]
    metrics = dict.fromkeys(("loss", "accuracy", chosen))
    at = [f"epoch {progress.step / steps_per_epoch:.3g}", f"step {progress.step}/{steps}"]
    if len(run.networks) < 2:
        rows = [row for row in run.tracker.history if row["split"] == "train"]
        shown = [f"train {found}" for row in rows[-1:] if (found := listed(row, metrics))]
        shown.append(f"val {listed(values, metrics)}")
    elif len(run.networks) == 2:
        shown = ["val", *(f"{name} {listed(values, metrics, name)}" for name in run.networks)]
    else:
        cells = {name: format_cell(values.get(with_variant(chosen, name))) for name in run.networks}
        shown = [f"val {chosen}", *(f"{name} {cell}" for name, cell in cells.items())]
    return " | ".join([*at, *shown, f"{progress.seconds:.1f} s"])


def listed(values: dict[str, Any], metrics: Iterable[str], variant: str = "") -> str:
    """The metrics that there are, by name: `loss 0.4100, accuracy 0.9250`."""
    names = {metric: with_variant(metric, variant) for metric in metrics}
    return ", ".join(f"{m} {format_cell(values[name])}" for m, name in names.items() if name in values)


@contextlib.contextmanager
def profiled(wanted: bool, run: Run) -> Iterator[Callable[[], None]]:
    """Where wanted, a trace of steps 5 to 15 as `trace.json`, for chrome://tracing or Perfetto."""
    if not wanted:
        yield lambda: None
        return
    path = run.folder / "trace.json"
    window = torch.profiler.schedule(wait=4, warmup=1, active=10, repeat=1)
    on_ready: Callable[[torch.profiler.profile], None] = lambda p: p.export_chrome_trace(str(path))  # noqa: E731
    with torch.profiler.profile(schedule=window, on_trace_ready=on_ready) as profiler:
        yield profiler.step
    log.info(f"Trace: {path} (open it in chrome://tracing or ui.perfetto.dev)")
    log.info(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
