"""Two spirals in the plane: from which of them is a point?"""

from collections.abc import Callable

import torch
from torch import nn

from runner.data import Batch, Data, Split
from runner.task import Output, Run, Task


class Spirals(Data):
    class_names = ("left", "right")

    def __init__(self, batch_size: int = 50, noise: float = 0.3):
        super().__init__(batch_size)
        self.noise = noise

    def load(self, seed: int) -> dict[str, Split]:
        return {name: self.points(number) for number, name in enumerate(("train", "val", "test"))}

    def points(self, number: int) -> Split:
        random = torch.Generator().manual_seed(number)
        targets = torch.arange(1000) % 2
        angle = 3 * torch.rand(1000, generator=random).sqrt() * torch.pi
        radius = angle + self.noise * torch.rand(1000, generator=random)
        return Split(torch.view_as_real(torch.polar(radius, angle + torch.pi * targets)) / 6, targets)


class Net(nn.Sequential):
    def __init__(self, hidden: int = 64):
        super().__init__(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2)
        )


class Classifier(Task):
    def __init__(self, model: Callable[[], Net], data: Spirals):
        self.model, self.data = model, data

    def build(self, run: Run) -> Net:
        self.network = self.model()
        return self.network

    def train(self, batch: Batch) -> Output:
        assert batch.targets is not None
        logits = self.network(batch.inputs)
        return Output(nn.functional.cross_entropy(logits, batch.targets), logits, batch.targets)
