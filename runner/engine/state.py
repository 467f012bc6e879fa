"""What a checkpoint holds of a training run, and the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.engine import checkpoint
from runner.errors import at_least, unknown, within
from runner.outputs import Meters, hook_error, metric_name
from runner.records.console import metric_order
from runner.task import Check, Run, Task

Schedule = Callable[[int, int], float]  # (step, steps) → factor on the learning rate
PruneCallback = Callable[[int, float], bool]  # (number of an evaluation, from 1, its objective) → end the run


class NonFinite(Exception):
    """A loss, a gradient or a weight is no longer finite; the text says where and what may help."""


class Pruned(Exception):
    """Raised when the pruner stops this run."""


@dataclass(frozen=True)
class LoopConfig:
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
        at_least(0, epochs=self.epochs, steps=self.steps)
        at_least(1, eval_every=self.eval_every, save_every=self.save_every, log_every=self.log_every)
        at_least(1, eval_batches=self.eval_batches, repeat_batches=self.repeat_batches)
        at_least(1, accumulate=self.accumulate, patience=self.patience)
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, or null for no clipping, got {self.clip_norm}")
        within(0, 1, ema=self.ema or 0)  # null: none

    def steps_per_epoch(self, batch_size: int, samples: int) -> int:
        """Return the optimiser steps of one pass over the training data, at least 1."""
        return max(1, round(samples / (batch_size * self.accumulate)))

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimiser steps of the whole run."""
        return round(self.epochs * steps_per_epoch) if self.steps is None else self.steps


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
    counts_before: dict[str, Tensor] = field(default_factory=dict)  # and confusion matrices, by variant
    checks: list[dict[str, Any]] = field(default_factory=list)


class Ema:
    """Exponential moving average of a network's parameters: θ̄ ← d θ̄ + (1 − d) θ after every step."""

    def __init__(self, network: nn.Module, decay: float, warmup: bool):
        self.decay, self.warmup = decay, warmup
        self.parameters = list(network.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def decay_at(self, step: int) -> float:
        """Return the decay at step number `step`, counted from 0."""
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


class GradientStats:
    """Gradient norms and the first non-finite step, summed on the device and read with the loss."""

    def __init__(self, variants: Iterable[str], device: torch.device):
        self.norms = {name: torch.zeros(2, device=device) for name in variants}  # before, after clipping
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.steps = 0

    def update(self, variant: str, step: int, loss: Tensor, norm: Tensor, clipped: Tensor) -> None:
        """Add one step's gradient norm before and after clipping, and remember the first that is not finite."""
        self.norms[variant] += torch.stack((norm, clipped))
        bad = ~torch.isfinite(loss.detach() + norm) & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, step)

    def compute(self) -> dict[str, float]:
        """Return the mean norms since the last reset."""
        values: dict[str, float] = {}
        for variant, sums in self.norms.items():
            before, after = (sums / max(1, self.steps)).tolist()
            values |= {metric_name("grad_norm", variant): before}
            values |= {metric_name("grad_norm_clipped", variant): after}
        return values

    def reset(self) -> None:
        self.steps = 0
        for sums in self.norms.values():
            sums.zero_()

    def require_finite(self) -> None:
        """Wait for the device and raise NonFinite if a loss or a gradient was not finite."""
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


class TrainingState:
    """All that changes while a run trains: what a checkpoint holds."""

    def __init__(
        self,
        task: Task,
        run: Run,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        config: LoopConfig,
        notes: dict[str, str] | None = None,  # what the networks start from, for the header
    ):
        self.task, self.run, self.config, self.notes = task, run, config, notes or {}
        self.steps_per_epoch = 0  # where there is nothing to train on
        if run.data is not None and "train" in run.splits:
            self.steps_per_epoch = config.steps_per_epoch(run.data.batch_size, len(run.splits["train"]))

        # what training keeps beside the networks
        self.optimizers = {name: optimizer(network.parameters()) for name, network in run.networks.items()}
        self.learning_rates = {
            name: [group["lr"] for group in opt.param_groups] for name, opt in self.optimizers.items()
        }
        self.emas: dict[str, Ema] = {}
        if config.ema is not None:
            self.emas = {n: Ema(net, config.ema, config.ema_warmup) for n, net in run.networks.items()}
        self.meters = Meters()
        self.gradients = GradientStats(run.networks, run.device)
        self.progress = Progress()

    def state_dict(self) -> dict[str, Any]:
        """Return the parts of a checkpoint, `config` apart. There is no random state: every step is seeded anew."""
        self.progress.checks = [asdict(check) for check in self.run.checks]
        self.progress.rows = len(self.run.tracker.history)
        return {
            "model": {name: network.state_dict() for name, network in self.run.networks.items()},
            "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "ema": {name: ema.state_dict() for name, ema in self.emas.items()},
            "step": self.progress.step,
            "progress": asdict(self.progress)
            | {"meters": self.meters.state_dict(), "readings": self.gradients.state_dict()},
            "task": self.task.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        # tensors
        self.load_weights(state)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizer"][name])

        # progress
        progress = dict(state["progress"])
        self.meters.load_state_dict(progress.pop("meters"), self.run.device)
        self.gradients.load_state_dict(progress.pop("readings"))
        self.progress = Progress(**progress)
        self.run.checks[:] = [Check(**check) for check in self.progress.checks]
        self.run.step = self.progress.step

        self.task.load_state_dict(state["task"])

    def load_weights(self, state: dict[str, Any]) -> None:
        """Load the weights of a checkpoint, and the averaged ones where they are kept."""
        for name, network in self.run.networks.items():
            network.load_state_dict(state["model"][name])
        for name, ema in self.emas.items():
            ema.load_state_dict(state["ema"][name])

    def apply_ema(self) -> None:
        """Make the averaged weights, where there are any, the networks' own: training is over."""
        for ema in self.emas.values():
            ema.swap()
        self.emas = {}

    def collect(self) -> dict[str, float]:
        """Return the metrics, norms and settings of the steps since the last call; start new sums."""
        values = self.meters.compute() | self.gradients.compute()
        values["learning_rate"] = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        for ema in islice(self.emas.values(), 1):  # all have the same
            values["ema_decay"] = ema.decay_at(self.progress.step - 1)
        self.meters.reset()
        self.gradients.reset()
        return values

    def evaluate(self, split: str, keep: bool = False, record: bool = True) -> dict[str, float]:
        """Return and record the task's metrics of a split, with the averaged weights where there are any.

        With `keep` the run keeps the predictions.

        Raises:
            UserError: the task's `eval` returns something else than numbers by name.
        """
        self.run.keeps_predictions = keep
        values = self._measure(split)
        self.run.keeps_predictions = False
        if values and record:
            self.record(split, values)
        return values

    def _measure(self, split: str) -> dict[str, float]:
        for ema in self.emas.values():
            ema.swap()
        try:
            with self.run.inference("eval", split):
                values = self.task.eval(split)
                if not isinstance(values, dict):
                    raise hook_error(self.task.eval, "a dict of numbers by metric", values)
                # plain floats, whatever the task computed them with: checkpoints and JSON hold nothing else
                return {name: self._number(name, value) for name, value in values.items()}
        finally:
            for ema in self.emas.values():
                ema.swap()

    def _number(self, name: str, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise hook_error(self.task.eval, f"a number as {name}", value) from None

    def record(self, split: str, values: dict[str, float]) -> None:
        """Write metrics of a split at the run's step to the records."""
        self.run.tracker.metrics(split, self.run.step, self.epoch(self.run.step), values)

    def epoch(self, step: int) -> float:
        """Return the passes over the training data in so many steps."""
        return step / self.steps_per_epoch if self.steps_per_epoch else 0.0

    def save(self, path: Path, config: dict[str, Any]) -> None:
        """Write a checkpoint, unless it would hold a number that is not finite.

        Raises:
            NonFinite: a loss, a gradient, a weight or a number of the optimiser's is not finite.
            TypeError: the task's state holds what a checkpoint cannot.
        """
        self.gradients.require_finite()
        parts = self.state_dict()

        # an infinite buffer is no accident: attention masks are made of -inf
        networks = self.run.networks.items()
        parameters = {name: dict(network.named_parameters()) for name, network in networks}
        buffers = {name: dict(network.named_buffers()) for name, network in networks}
        trained = {"model": parameters, "optimizer": parts["optimizer"], "ema": parts["ema"]}
        bad = checkpoint.find_tensor(lambda t: ~torch.isfinite(t), trained)
        bad = bad or checkpoint.find_tensor(torch.isnan, {"model": buffers})
        if bad is not None:
            raise NonFinite(f"{bad} is no longer finite after step {self.progress.step}.")

        unsafe = checkpoint.find_unsafe(parts["task"])
        if unsafe is not None:
            raise TypeError(f"{type(self.task).__name__}.state_dict() {unsafe}, which cannot be loaded again")

        checkpoint.save(path, parts | {"config": config})


@dataclass(frozen=True)
class Objective:
    """What "best" means: a metric of a split, such as `accuracy/val`, and its direction."""

    name: str | None = None
    direction: str = "maximize"

    def value(self, values: dict[str, float]) -> float:
        """Return the objective among the metrics of val.

        Raises:
            UserError: it is not measured.
        """
        assert self.name is not None
        measured = [f"{name}/val" for name in sorted(values, key=metric_order)]
        if self.name not in measured:
            raise unknown("objective", self.name, measured, f"objective={self.name}")
        return values[self.name.removesuffix("/val")]

    def improved(self, values: dict[str, float], progress: Progress) -> bool:
        """Return whether these val metrics are the best so far, and count in `progress`."""
        if self.name is None:
            return False
        value, best = self.value(values), progress.best_value
        better = best is None or (value > best if self.direction == "maximize" else value < best)
        better = better and not math.isnan(value)
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best_value, progress.best_step = value, progress.step
        return better
