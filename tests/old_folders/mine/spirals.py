import torch
from torch import nn

from runner.data import Data, Split
from runner.task import Output, Task


class Spirals(Data):
    """Two spirals in the plane, wound around each other."""

    class_names = ("left", "right")

    def load(self, seed):
        return {name: self.points(number) for number, name in enumerate(("train", "val", "test"))}

    def points(self, number):
        random = torch.Generator().manual_seed(number)
        targets = torch.arange(1000) % 2
        angle = 3 * torch.rand(1000, generator=random).sqrt() * torch.pi
        radius = angle + 0.3 * torch.rand(1000, generator=random)
        turned = angle + torch.pi * targets
        return Split(torch.stack((radius * turned.cos(), radius * turned.sin()), dim=1) / 6, targets)


class Net(nn.Sequential):
    def __init__(self, hidden: int = 64):
        super().__init__(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2)
        )


class TwoSpirals(Task):
    def __init__(self, model, data):
        self.model, self.data = model, data

    def build(self, run):
        self.network = self.model()
        return self.network

    def train(self, batch):
        logits = self.network(batch.inputs)
        return Output(nn.functional.cross_entropy(logits, batch.targets), logits, batch.targets)
