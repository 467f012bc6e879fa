"""The contract between the engine and an experiment: `Task` and its hooks, and `Run`, which a task is given.

The runner owns *when*, the task owns *what*. A task never calls `backward`, `optimizer.step`, a summary
writer or `torch.save`, and moves nothing to a device: batches and networks come to it on theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from runner.data import Batch, Data, Split, eval_batches
from runner.device import Compute
from runner.errors import UserError, memory_for
from runner.metrics import Classification
from runner.records.tracker import Tracker
from runner.streams import generator, reseed, seed_of

__all__ = ["Check", "Interrupted", "Meters", "Output", "Run", "Task", "by_variant", "metric_name"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from runner.spreadsheet import Sheet


@dataclass
class Output:
    """Model outputs and loss for one batch."""

    loss: Tensor  # scalar: the mean over the batch; with a graph when training
    logits: Tensor | None = None  # (batch, classes): where the experiment classifies
    targets: Tensor | None = None  # (batch,)
    scalars: dict[str, Tensor] = field(default_factory=dict)  # the task's own, each a mean over the batch


@dataclass(frozen=True)
class Check:
    """A claim and its measurement: passed if `measured` is at most `tolerance`, or at least, with `at_least`."""

    name: str
    claim: str
    measured: float
    tolerance: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        # False for a NaN, either way
        return self.measured >= self.tolerance if self.at_least else self.measured <= self.tolerance


class Interrupted(Exception):
    """Raised when the user asks the run to stop."""


@dataclass
class Run:
    """What a task is given: where it runs, its random streams, its data, its folder and its tracker.

    `networks` holds what `build` returned, by variant ("" if there is one). `folder` and `tracker` can be
    used from `before` on, not yet in `build`.
    """

    name: str
    seed: int
    compute: Compute
    data: Data | None
    splits: dict[str, Split]
    rank: int = 0
    world_size: int = 1
    networks: dict[str, nn.Module] = field(default_factory=dict)
    folder: Path = Path()
    tracker: Tracker = field(default_factory=Tracker)
    step: int = 0  # of training; 0 before it
    eval_limit: int | None = None  # batches per evaluation; None: all
    checks: list[Check] = field(default_factory=list)
    stop: Callable[[], bool] = bool  # whether the user asked the run to stop; `bool` says no

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def stop_requested(self) -> bool:
        """Return whether the run is to save and end; whatever takes long asks this and raises `Interrupted`."""
        return self.stop()

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return a new random stream on the CPU, a function of the run's seed and the purpose alone."""
        return generator(self.seed, *purpose)

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield the batches of a split in their order, for evaluation and figures.

        Raises:
            Interrupted: the user asked to stop.
        """
        assert self.data is not None, "an experiment without data has no batches"
        for batch in eval_batches(self.data, self.splits[split], self.seed, split, self.eval_limit):
            if self.stop_requested:
                raise Interrupted
            yield batch

    @contextlib.contextmanager
    def evaluation(self, *purpose: str | int) -> Iterator[None]:
        """Set the networks to evaluation mode and use a random stream of its own: it never changes the run.

        Only the modes are restored, because the loop seeds every step by its number.
        """
        modes = {network: network.training for network in self.networks.values()}
        for network in modes:
            network.eval()
        # "look" stays: published numbers depend on the name
        reseed(seed_of(self.seed, "look", *purpose), self.device)
        try:
            yield
        finally:
            for network, training in modes.items():
                network.train(training)

    @contextlib.contextmanager
    def inference(self, *purpose: str | int) -> Iterator[None]:
        """Do as `evaluation`, without gradients and in the run's precision."""
        with self.evaluation(*purpose), torch.no_grad(), self.compute.autocast():
            yield

    def check(self, name: str, claim: str, measured: float, tolerance: float, at_least: bool = False) -> bool:
        """Check that `measured` is at most `tolerance`, or at least, with `at_least`; return whether it is.

        A run with a failed check ends as failed, with exit status 1.
        """
        check = Check(name, claim, float(measured), float(tolerance), at_least)
        self.checks.append(check)
        return check.passed

    def pr_curves(self, split: str, targets: Tensor, probabilities: Tensor) -> None:
        """Draw a precision-recall curve per class in TensorBoard: targets (N,), probabilities (N, classes)."""
        assert self.data is not None, "an experiment without data has no classes"
        self.tracker.pr_curves(split, targets, probabilities, self.data.class_names, self.step)

    def figure(self, name: str, figure: Figure) -> None:
        """Save a figure as `figures/NAME.png` and as an image in TensorBoard."""
        self.tracker.figure(name, figure, self.step)

    def animation(
        self, name: str, figure: Figure, draw: Callable[[int], object], frames: int, fps: int = 12
    ) -> None:
        """Save an animation as `figures/NAME.gif` and as an image in TensorBoard.

        `draw(i)` changes the figure to frame i = 0 … frames − 1; `fps` are frames per second.
        """
        self.tracker.animation(name, figure, draw, frames, fps, self.step)

    def table(self, name: str, header: list[str], rows: list[list[Any]]) -> None:
        """Save a table as `tables/NAME.csv` and as text in TensorBoard."""
        self.tracker.table(name, header, rows, self.step)

    def spreadsheet(self, name: str, sheets: dict[str, Sheet]) -> None:
        """Save sheets, by their names, as `tables/NAME.xlsx`: large tables, and numbers beside their formulas."""
        self.tracker.spreadsheet(name, sheets)


class Task:
    """One experiment. Subclasses take typed arguments (the schema of their YAML) and define the hooks.

    A constructor that names `model` is given a factory: each call returns a new network, with the arguments of
    the YAML's model node and those of the call. One that names `data` is given the data set.
    """

    # mode=NAME calls the method of that name with the run; n=8 may stand for task.n=8 there
    modes: ClassVar[tuple[str, ...]] = ()
    without_data: ClassVar[tuple[str, ...]] = ()  # the modes that read no data: `run.splits` is empty
    run: Run  # set by the engine before `build`
    data: Data | None = None
    # floating-point operations of a training sample, forward and backward; if `build` sets it, `utilisation` is
    # recorded: the share of what the device's matrix products reach
    flops_per_sample: float | None = None

    def build(self, run: Run) -> nn.Module | dict[str, nn.Module] | None:
        """Return the network, one per variant, or None if there is nothing to train."""
        return None

    def train(self, batch: Batch) -> Output | dict[str, Output]:
        """Return the loss of one batch, per variant if there are several; evaluation calls it without a graph.

        Raises:
            UserError: the task builds a network and does not define it. One that only checks needs none.
        """
        name = type(self).__name__
        raise UserError(f"{name} builds a network: expected a method train(batch), got none")

    def eval(self, split: str) -> dict[str, float]:
        """Return the metrics of a split, under `run.inference`; by default from summed counts over all batches."""
        assert self.run.data is not None, "an experiment without data has no batches"
        meters = Meters()
        with memory_for("data.eval_batch_size", self.run.data.eval_batch_size):
            for batch in self.run.batches(split):
                meters.update(by_variant(self.train(batch), "train"), len(batch.inputs))
        return meters.compute()

    def before(self, run: Run) -> None:
        """Make figures, tables and checks of the untrained network."""

    def after(self, run: Run) -> None:
        """Make figures, tables and checks of the trained network; mode=eval calls it too."""

    def state_dict(self) -> dict[str, Any]:
        """Return what else a resume needs: tensors, numbers, strings, lists and dicts of these, none of NumPy's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def by_variant(result: Any, hook: str) -> dict[str, Any]:
    """Return a hook's result by variant; a single one has the name ""."""
    if result is None:
        return {}
    if not isinstance(result, dict):
        return {"": result}
    bad = [name for name in result if not (isinstance(name, str) and name.isidentifier())]
    if bad:
        raise TypeError(f"{hook}(): expected identifiers as the names of variants, such as rotary, got {bad}")
    return result


def metric_name(metric: str, variant: str) -> str:
    """Return a metric's name on screen and on disk: `accuracy`, or `accuracy.rotary` for a variant."""
    return f"{metric}.{variant}" if variant else metric


class Meters:
    """The metrics of many batches, summed on their device without waiting for it."""

    def __init__(self) -> None:
        self.classified: dict[str, Classification] = {}  # by variant
        self.sums: dict[str, Tensor] = {}  # over samples, by metric name with its variant
        self.counts: dict[str, int] = {}  # of the samples in `sums`

    def update(self, outputs: dict[str, Output], count: int) -> None:
        """Add one batch of `count` samples."""
        for variant, output in outputs.items():
            scalars = dict(output.scalars)
            if output.logits is not None and output.targets is not None:
                meter = self._classification(variant, output.logits.shape[1], output.logits.device)
                meter.update(output.logits.detach(), output.targets, output.loss.detach())
            else:
                scalars["loss"] = output.loss

            # torchmetrics' MeanMetric copies the count to the device at each call, which waits for it
            for key, value in scalars.items():
                name = metric_name(key, variant)
                if name not in self.sums:
                    # MPS has no float64
                    dtype = torch.float32 if value.device.type == "mps" else torch.float64
                    self.sums[name], self.counts[name] = value.new_zeros((), dtype=dtype), 0
                self.sums[name].add_(value.detach(), alpha=count)
                self.counts[name] += count

    def _classification(self, variant: str, num_classes: int, device: torch.device) -> Classification:
        if variant not in self.classified:
            self.classified[variant] = Classification(num_classes).to(device)
        return self.classified[variant]

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; this waits for the device."""
        values: dict[str, float] = {}
        for variant, meter in self.classified.items():
            values |= {metric_name(name, variant): float(value) for name, value in meter.compute().items()}
        return values | {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def reset(self) -> None:
        for meter in self.classified.values():
            meter.reset()
        self.sums, self.counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "classified": {name: dict(meter.state_dict()) for name, meter in self.classified.items()},
            "sums": self.sums,
            "counts": self.counts,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        for variant, sums in state["classified"].items():
            self._classification(variant, len(sums["confusion"]), device).load_state_dict(sums)
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.counts = dict(state["counts"])
