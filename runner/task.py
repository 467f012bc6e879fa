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
from runner.outputs import Meters, Output, Predictions, metric_name, outputs_of
from runner.records.tracker import Tracker
from runner.streams import generator, reseed, seed_of

__all__ = ["Check", "Interrupted", "Meters", "Output", "Run", "Task"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from runner.spreadsheet import Sheet


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
    # of the classifiers, by variant, on test (where there is none: val): for `before` and `after`
    predictions: dict[str, Predictions] = field(default_factory=dict)
    keeps_predictions: bool = False  # whether an evaluation is to fill `predictions`
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

    @property
    def draws(self) -> bool:
        """Return whether figures are kept; with figures=false, what takes long may be left out."""
        return self.tracker.draws

    def class_names(self, count: int) -> list[str]:
        """Return the names of so many classes: the data's, or numbers where it has other ones."""
        names = () if self.data is None else self.data.class_names
        return list(names) if len(names) == count else [str(number) for number in range(count)]

    def pr_curves(self, split: str, targets: Tensor, probabilities: Tensor, variant: str = "") -> None:
        """Draw a precision-recall curve per class in TensorBoard: targets (N,), probabilities (N, classes)."""
        names = [metric_name(name, variant) for name in self.class_names(probabilities.shape[1])]
        self.tracker.pr_curves(split, targets, probabilities, names, self.step)

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
        """Return the metrics of a split, under `run.inference`; by default from summed counts over all batches.

        The figures of a classifier come from here: an `eval` of one's own that is to have them calls this one.
        """
        assert self.run.data is not None, "an experiment without data has no batches"
        meters = Meters(self.run.keeps_predictions)
        with memory_for("data.eval_batch_size", self.run.data.eval_batch_size):
            for batch in self.run.batches(split):
                meters.update(outputs_of(self.train, batch), len(batch.inputs))
        if self.run.keeps_predictions:
            self.run.predictions = meters.predictions
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
