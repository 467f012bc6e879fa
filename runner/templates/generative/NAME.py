"""New points like given ones, by flow matching (Lipman et al. 2023, arXiv 2210.02747) in the plane.

On the straight way x_t = (1 - t) x_0 + t x_1 from noise x_0 to a point x_1 the velocity is x_1 - x_0. A network
learns its mean v(x_t, t); who follows v from t = 0 to 1 arrives at a new point.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from runner import figures
from runner.data import Batch, Data, Split
from runner.task import Output, Run, Task


class Moons(Data):
    """Points (N, 2) on two half circles that interlock, with Gaussian noise."""

    def __init__(self, batch_size: int = 200, noise: float = 0.2):
        super().__init__(batch_size)
        self.noise = noise

    def load(self, seed: int) -> dict[str, Split]:
        return {name: self.points(number) for number, name in enumerate(("train", "val", "test"))}

    def points(self, number: int) -> Split:
        random = torch.Generator().manual_seed(number)
        upper = torch.arange(2000) % 2 * 2 - 1.0  # 1 for the upper moon, -1 for the lower
        angle = torch.pi * torch.rand(2000, generator=random)
        moons = torch.stack((2 * angle.cos() - upper, upper * (2 * angle.sin() - 0.5)), dim=1)
        return Split(moons + self.noise * torch.randn(2000, 2, generator=random))


class Velocity(nn.Module):
    """v(x, t): points (B, 2) and times (B, 1) to velocities (B, 2)."""

    def __init__(self, hidden: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(3, hidden), nn.SiLU()),
            *(nn.Linear(hidden, hidden), nn.SiLU()),
            *(nn.Linear(hidden, hidden), nn.SiLU()),
            nn.Linear(hidden, 2),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = self.layers(torch.cat((x, t), dim=1))
        return velocity


class FlowMatching(Task):
    """Learn the velocity; report the `energy` distance from new points to those of a split."""

    modes = ("sample",)
    without_data = ("sample",)

    def __init__(self, model: Callable[[], Velocity], data: Moons, steps: int = 50, n: int = 1000):
        self.model, self.data, self.steps, self.n = model, data, steps, n

    def build(self, run: Run) -> Velocity:
        self.network = self.model()
        return self.network

    def train(self, batch: Batch) -> Output:
        noise, t = batch.draws.normal(2), batch.draws.uniform(1)
        velocity = self.network((1 - t) * noise + t * batch.inputs, t)
        return Output(nn.functional.mse_loss(velocity, batch.inputs - noise))

    def eval(self, split: str) -> dict[str, float]:
        distance = energy_distance(self.new_points(self.run), self.run.splits[split].inputs)
        return super().eval(split) | {"energy": distance}

    def after(self, run: Run) -> None:
        """Draw the test set beside new points."""
        panels = {"test set": run.splits["test"].inputs, "new points": self.new_points(run)}
        figure, [row] = figures.new(1, 2, (7, 3), sharex=True, sharey=True)
        for axes, (title, points) in zip(row, panels.items(), strict=True):
            axes.scatter(*points[: self.n].cpu().T, s=3)
            axes.set(title=title, aspect="equal")
        run.figure("points", figure)

    def sample(self, run: Run) -> None:
        """Write `n` new points to tables/samples.csv: `runner mode=sample checkpoint=FILE n=100`."""
        run.table("samples", ["x", "y"], self.new_points(run).tolist())

    def new_points(self, run: Run) -> Tensor:
        """Follow the velocity from noise, in `steps` steps; return `n` points (n, 2)."""
        x = torch.randn(self.n, 2, generator=run.generator("points")).to(run.device)
        with run.inference("points"):
            for number in range(self.steps):
                t = torch.full((self.n, 1), number / self.steps, device=run.device)
                x = x + self.network(x, t).float() / self.steps
        return x


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|, which is 0 for equal distributions alone (Székely 2003)."""
    between, within_x, within_y = (torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y)))
    return (2 * between - within_x - within_y).item()
