"""Seconds per epoch of a vanilla RNN on Fashion-MNIST: ours, the usual ways, and the arithmetic's limit.

    python -m tests.benchmarks.rnn                 # hidden 128 and 256, whole epochs, three rounds
    python -m tests.benchmarks.rnn --part 0.25     # a quarter of each epoch

Every way trains on the same 60,000 images in batches of 256 and evaluates the same 10,000, in one process,
the ways taking turns. Printed are medians over the rounds, and the ratios in the table in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from experiments.data.fashion_mnist import FashionMNIST
from experiments.nn.losses import CrossEntropy
from experiments.nn.rnn import RNN
from experiments.rnn_fashion.task import RNNFashion
from runner.data import Data, Split, eval_batches, train_batch
from runner.device import select
from runner.engine.loop import Trainer
from runner.engine.state import LoopConfig, Objective, TrainingState
from runner.metrics import Classification
from runner.records.tracker import Tracker
from runner.schedule import Constant
from runner.task import Run

BATCH, PIXELS, CLASSES, STEPS = 256, 28, 10, 28
LR, MOMENTUM, CLIP = 0.05, 0.9, 1.0


class Whole(FashionMNIST):
    """All 60,000 training images to train on, the 10,000 test images to evaluate: a benchmark chooses nothing."""

    part = 1.0

    def load(self, seed: int) -> dict[str, Split]:
        splits = super().load(seed)
        train = [splits["train"], splits["val"]]
        images = torch.cat([split.inputs for split in train])
        targets = torch.cat([split.targets for split in train if split.targets is not None])
        test = splits["test"]
        assert test.targets is not None
        n, m = round(len(images) * self.part), round(len(test) * self.part)
        return {"train": Split(images[:n], targets[:n]), "val": Split(test.inputs[:m], test.targets[:m])}


class TutorialRNN(nn.Module):
    """Two Linear calls per time step, as tutorials write it."""

    def __init__(self, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.i2h, self.h2h = nn.Linear(PIXELS, hidden), nn.Linear(hidden, hidden)
        self.h2o = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden)
        for t in range(x.shape[1]):
            h = torch.tanh(self.i2h(x[:, t]) + self.h2h(h))
        return self.h2o(h)


class TorchRNN(nn.Module):
    """torch.nn.RNN and a linear layer on the last state."""

    def __init__(self, hidden: int):
        super().__init__()
        self.rnn = nn.RNN(PIXELS, hidden, batch_first=True)
        self.h2o = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.h2o(self.rnn(x)[1][0])


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)


def loaders(root: str, part: float) -> tuple[DataLoader, DataLoader]:
    """The tutorial's data path: torchvision, ToTensor, DataLoader."""
    found = []
    for train in (True, False):
        data = datasets.FashionMNIST(root, train=train, transform=transforms.ToTensor())
        subset = Subset(data, range(round(len(data) * part)))
        found.append(DataLoader(subset, BATCH, shuffle=train, drop_last=train))
    return found[0], found[1]


def tutorial_epoch(network: nn.Module, train: DataLoader, test: DataLoader) -> Callable[[], None]:
    """An epoch with `.item()` after each batch, as tutorials have it."""
    optimizer, loss_function = optimizer_of(network), nn.CrossEntropyLoss()

    def epoch() -> None:
        network.train()
        total, right = 0.0, 0
        for images, targets in train:
            optimizer.zero_grad()
            logits = network(images.squeeze(1))
            loss = loss_function(logits, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            total += loss.item()
            right += (logits.argmax(1) == targets).sum().item()
        network.eval()
        with torch.no_grad():
            for images, targets in test:
                logits = network(images.squeeze(1))
                total += loss_function(logits, targets).item()
                right += (logits.argmax(1) == targets).sum().item()

    return epoch


def memory_epoch(network: nn.Module, data: Data, splits: dict[str, Split]) -> Callable[[], None]:
    """A network with our data path and our metrics, in a plain loop that writes nothing."""
    optimizer, loss_function = optimizer_of(network), nn.CrossEntropyLoss()
    steps = len(splits["train"]) // BATCH

    def epoch() -> None:
        network.train()
        meter = Classification(CLASSES)
        for step in range(steps):
            batch = train_batch(data, splits["train"], 0, step)
            logits = network(batch.inputs)
            loss = loss_function(logits, batch.targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            meter.update(logits.detach(), batch.targets, loss.detach())
        network.eval()
        with torch.no_grad():
            for batch in eval_batches(data, splits["val"], 0, "val"):
                logits = network(batch.inputs)
                meter.update(logits, batch.targets, loss_function(logits, batch.targets))
        meter.compute()

    return epoch


def our_epoch(
    hidden: int, data: Data, splits: dict[str, Split], threads: int, folder: Path
) -> Callable[[], None]:
    """One epoch of the runner's own loop, with all that it writes: curves, TensorBoard, checkpoints."""
    model = partial(RNN, hidden_size=hidden, readout="last")
    task = RNNFashion(model, data, CrossEntropy())
    run = Run("benchmark", 0, select("cpu", "float32", threads, False), data, splits)
    run.folder, run.tracker, task.run = folder, Tracker(folder), run
    network = task.build(run)
    run.networks = {"": network}
    config = LoopConfig(epochs=1, clip_norm=CLIP)
    state = TrainingState(task, run, partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM), config)

    def save(name: str) -> None:
        state.save(folder / "checkpoints" / f"{name}.pt", {})

    trainer = Trainer(task, run, state, Constant(), config, Objective("accuracy/val"), save)

    def epoch() -> None:
        state.progress.step = run.step = state.progress.evaluated = 0
        trainer.fit()

    return epoch


def lightning_epoch(hidden: int, train: DataLoader, test: DataLoader) -> Callable[[], None]:
    """PyTorch Lightning's Trainer with torchmetrics, on the tutorial's network and data path."""
    import lightning
    import torchmetrics

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = TutorialRNN(hidden)
            names = ("Accuracy", "Precision", "Recall", "F1Score")
            make = {
                n: getattr(torchmetrics, n)("multiclass", num_classes=CLASSES, average="macro") for n in names
            }
            self.train_metrics = torchmetrics.MetricCollection(make)
            self.val_metrics = self.train_metrics.clone()

        def step(self, batch: list[Tensor], metrics: torchmetrics.MetricCollection, name: str) -> Tensor:
            logits = self.network(batch[0].squeeze(1))
            loss = nn.functional.cross_entropy(logits, batch[1])
            metrics.update(logits, batch[1])
            self.log(f"loss/{name}", loss, on_epoch=True, on_step=False)
            return loss

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.step(batch, self.train_metrics, "train")

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.step(batch, self.val_metrics, "val")

        def on_validation_epoch_end(self) -> None:
            self.val_metrics.compute()
            self.val_metrics.reset()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    module = Module()

    def epoch() -> None:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            gradient_clip_val=CLIP,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, train, test)

    return epoch


def limit_epoch(hidden: int, train_size: int, test_size: int) -> Callable[[], None]:
    """The matrix products and tanh alone, at the shapes of an epoch: what no implementation can beat here.

    Forward: the projection of all inputs in one product, T products with W_hh, T tanh. Backward: T products
    with W_hh, one product each for ∂W_hh and ∂W_xh, T tanh derivatives. The output layer is left out.
    """
    T, B, H = STEPS, BATCH, hidden
    inputs, states = torch.randn(T * B, PIXELS), torch.randn(T, B, H)
    w_xh, w_hh = torch.randn(PIXELS, H), torch.randn(H, H) / H**0.5
    projected, gradient = torch.empty(T * B, H), torch.randn(T, B, H)
    out, d_hh, d_xh = torch.empty(B, H), torch.empty(H, H), torch.empty(PIXELS, H)

    def forward() -> None:
        torch.mm(inputs, w_xh, out=projected)
        for t in range(T):
            torch.mm(states[t], w_hh, out=out)
            torch.tanh(out, out=out)

    def backward() -> None:
        for t in range(T):
            torch.mm(gradient[t], w_hh, out=out)
            torch.ops.aten.tanh_backward.grad_input(out, states[t], grad_input=out)
        torch.mm(states.view(-1, H).t(), gradient.view(-1, H), out=d_hh)
        torch.mm(inputs.t(), gradient.view(-1, H), out=d_xh)

    def epoch() -> None:
        with torch.no_grad():
            for _ in range(train_size // BATCH):
                forward()
                backward()
            for _ in range(round(test_size / BATCH)):
                forward()

    return epoch


@dataclass
class Times:
    """The seconds of one way, a number per round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, epoch: Callable[[], None]) -> None:
        gc.collect()
        gc.freeze()  # the objects of all other ways: collecting garbage is not to go through them
        wall, cpu = time.perf_counter(), time.process_time()
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            epoch()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def measure(hidden: int, root: str, part: float, rounds: int, threads: int) -> dict[str, Times]:
    """Every way's seconds per epoch, the ways taking turns; one round before the first is not counted."""
    data = Whole(root=root, batch_size=BATCH)
    data.part = part
    splits = data.load(0)
    train, test = loaders(str(Path(root).expanduser()), part)
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "tutorial": tutorial_epoch(TutorialRNN(hidden), train, test),
            "nn.RNN, tutorial's data path": tutorial_epoch(TorchRNN(hidden), train, test),
            "Lightning with torchmetrics": lightning_epoch(hidden, train, test),
            "nn.RNN, our data path": memory_epoch(TorchRNN(hidden), data, splits),
            "our RNN, our data path": memory_epoch(RNN(PIXELS, hidden, readout="last"), data, splits),
            "ours": our_epoch(hidden, data, splits, threads, Path(folder)),
            "limit": limit_epoch(hidden, len(splits["train"]), len(splits["val"])),
        }
        times = {name: Times() for name in ways}
        for number in range(rounds + 1):
            for name, epoch in ways.items():
                (times[name] if number else Times()).add(epoch)
    return times


def report(hidden: int, times: dict[str, Times]) -> None:
    """The table in docs/benchmarks.md: medians, and ratios of the seconds by the clock."""
    ours, limit = times["ours"], times["limit"]
    header = ["way", "seconds", "CPU seconds", "ours is faster by", "share of the limit"]
    print(f"\nhidden {hidden}\n| {' | '.join(header)} |\n{'| --- ' * len(header)}|")
    for name, t in times.items():
        wall, cpu = statistics.median(t.wall), statistics.median(t.cpu)
        ratio = statistics.median(a / b for a, b in zip(t.wall, ours.wall, strict=True))
        share = statistics.median(a / b for a, b in zip(limit.wall, t.wall, strict=True))
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {ratio:.2f}× | {share:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256], help="hidden sizes")
    parser.add_argument("--part", type=float, default=1.0, help="the share of an epoch that is run")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of every way")
    parser.add_argument("--root", default="~/.cache/formula-runner", help="where the data is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, load {os.getloadavg()[0]:.2f} at the start"
    )
    for hidden in arguments.hidden:
        report(hidden, measure(hidden, arguments.root, arguments.part, arguments.rounds, arguments.threads))


if __name__ == "__main__":
    main()
