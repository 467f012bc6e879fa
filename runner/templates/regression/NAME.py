"""A curve through noisy points: a network learns y = f(x) from samples of f(x) + noise."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from runner import figures
from runner.data import Batch, Data, Split
from runner.task import Output, Run, Task


def curve(x: Tensor) -> Tensor:
    """Return the f(x) that is to be learnt."""
    return torch.sin(2 * torch.pi * x) * x.exp()


class Points(Data):
    """Pairs of x, uniform in [-1, 1), and f(x) with Gaussian noise: both (N, 1)."""

    def __init__(self, batch_size: int = 50, noise: float = 0.1):
        super().__init__(batch_size)
        self.noise = noise

    def load(self, seed: int) -> dict[str, Split]:
        return {name: self.points(number) for number, name in enumerate(("train", "val", "test"))}

    def points(self, number: int) -> Split:
        random = torch.Generator().manual_seed(number)
        x = 2 * torch.rand(1000, 1, generator=random) - 1
        return Split(x, curve(x) + self.noise * torch.randn(1000, 1, generator=random))


class Net(nn.Sequential):
    """Two hidden layers."""

    def __init__(self, hidden: int = 64):
        super().__init__(
            nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )


class Regression(Task):
    """Minimise the mean squared error; report the mean absolute error and the share of variance explained."""

    def __init__(self, model: Callable[[], Net], data: Points):
        self.model, self.data = model, data

    def build(self, run: Run) -> Net:
        self.network = self.model()
        return self.network

    def train(self, batch: Batch) -> Output:
        assert batch.targets is not None
        error = self.network(batch.inputs) - batch.targets  # (B, 1)
        return Output(error.square().mean(), scalars={"mae": error.abs().mean()})

    def eval(self, split: str) -> dict[str, float]:
        targets = self.run.splits[split].targets
        assert targets is not None
        metrics = super().eval(split)  # loss and mae, over the whole split
        return metrics | {"r2": 1 - metrics["loss"] / targets.var().item()}

    def after(self, run: Run) -> None:
        """Draw the curve, the network's, and the training points."""
        x = torch.linspace(-1, 1, 200)[:, None]
        with run.inference("curve"):
            y = self.network(x.to(run.device)).float().cpu()

        train = run.splits["train"].to(torch.device("cpu"))
        figure, [[axes]] = figures.new()
        axes.scatter(train.inputs, train.targets, s=5, color=figures.GREY, label="training points")
        axes.plot(x, curve(x), color=figures.INK, label="f(x)")
        axes.plot(x, y, color=figures.VERMILION, label="network")
        axes.legend()
        run.figure("curve", figure)
