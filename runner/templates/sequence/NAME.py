"""Sequences of digits: the network says, after each digit, the sum so far modulo `modulus`.

It has to remember the sum for as long as it reads: the test set shows for how long it can.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from runner import figures
from runner.data import Batch, Data, Split
from runner.task import Output, Run, Task


class Sums(Data):
    """Digits (N, T) and their sums so far (N, T), modulo `modulus`; the test set's are `longer` times as long."""

    def __init__(self, batch_size: int = 50, modulus: int = 10, length: int = 10, longer: int = 5):
        super().__init__(batch_size)
        self.modulus, self.length, self.longer = modulus, length, longer
        self.class_names = tuple(map(str, range(modulus)))

    def load(self, seed: int) -> dict[str, Split]:
        lengths = {"train": self.length, "val": self.length, "test": self.longer * self.length}
        return {name: self.sums(number, *size) for number, (name, *size) in enumerate(lengths.items())}

    def sums(self, number: int, length: int) -> Split:
        random = torch.Generator().manual_seed(number)
        digits = torch.randint(self.modulus, (1000, length), generator=random)
        return Split(digits, digits.cumsum(1) % self.modulus)


class Reader(nn.Module):
    """A GRU that reads the digits, and a linear layer on its state after each: (B, T) → (B, T, classes)."""

    def __init__(self, classes: int, hidden: int = 64):
        super().__init__()
        self.embed = nn.Embedding(classes, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.output = nn.Linear(hidden, classes)

    def forward(self, digits: Tensor) -> Tensor:
        states, _ = self.gru(self.embed(digits))  # (B, T, hidden)
        logits: Tensor = self.output(states)
        return logits


class Tagger(Task):
    """Classify every step of a sequence; `sequences` is the share of those that are right from end to end."""

    def __init__(self, model: Callable[..., Reader], data: Sums):
        self.model, self.data = model, data
        self.classes = data.modulus

    def build(self, run: Run) -> Reader:
        self.network = self.model(classes=self.classes)
        return self.network

    def train(self, batch: Batch) -> Output:
        assert batch.targets is not None
        logits = self.network(batch.inputs)  # (B, T, C)
        whole = (logits.argmax(2) == batch.targets).all(1)  # (B,)

        # every step counts: cross_entropy takes (B T, C) and (B T,)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        return Output(loss, logits, batch.targets, scalars={"sequences": whole.float().mean()})

    def after(self, run: Run) -> None:
        """Draw the accuracy at each step of the test set, also where no training sequence reaches."""
        right = []
        with run.inference("steps"):
            for batch in run.batches("test"):
                right.append(self.network(batch.inputs).argmax(2) == batch.targets)
        accuracy = torch.cat(right).float().mean(0).cpu()  # (T,)

        figure, [[axes]] = figures.new(size=(6.4, 3))
        axes.plot(torch.arange(len(accuracy)) + 1, accuracy)
        axes.axvline(run.splits["train"].inputs.shape[1], color=figures.GREY, linestyle="--")
        axes.set(xlabel="step (dashed: the end of the training sequences)", ylabel="accuracy", ylim=(0, 1.05))
        run.figure("steps", figure)
