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
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

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
from tests.benchmarks.common import Row, make_parser, ratio, show_table, start, take_turns, wall_and_cpu

BATCH, PIXELS, CLASSES = 256, 28, 10
CLIP = 1.0
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Epoch = Callable[[], None]
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # images (B, 28, 28) and targets (B,) of an epoch


def load_whole(data: Data, part: float) -> dict[str, Split]:
    """All 60,000 training images to train on, the 10,000 test images to evaluate: a benchmark chooses nothing."""
    train, val, test = data.load(0).values()
    images, targets = torch.cat([train.inputs, val.inputs]), torch.cat([train.targets, val.targets])
    n, m = round(len(images) * part), round(len(test) * part)
    return {"train": Split(images[:n], targets[:n]), "val": Split(test.inputs[:m], test.targets[:m])}


class TutorialRNN(nn.Module):
    """Two Linear calls per time step, as tutorials write it."""

    def __init__(self, hidden: int):
        super().__init__()
        self.i2h, self.h2h = nn.Linear(PIXELS, hidden), nn.Linear(hidden, hidden)
        self.h2o = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.h2h.in_features)
        for t in range(x.shape[1]):
            h = torch.tanh(self.i2h(x[:, t]) + self.h2h(h))
        return self.h2o(h)


def torch_rnn(hidden: int) -> nn.Module:
    """torch.nn.RNN and a linear layer on the last state."""
    rnn = nn.RNN(PIXELS, hidden, batch_first=True)
    rnn.register_forward_hook(lambda _, __, result: result[1][0])
    return nn.Sequential(rnn, nn.Linear(hidden, CLASSES))


def plain_epoch(network: nn.Module, optimizer: Any, train: Pairs, test: Pairs, note: Callable) -> None:
    """A plain loop that writes nothing; `note` is given the logits, targets and loss of each batch."""
    loss_function = nn.CrossEntropyLoss()
    network.train()
    for images, targets in train():
        optimizer.zero_grad()
        logits = network(images)
        loss = loss_function(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        note(logits.detach(), targets, loss.detach())
    network.eval()
    with torch.no_grad():
        for images, targets in test():
            logits = network(images)
            note(logits, targets, loss_function(logits, targets))


def tutorial_epoch(network: nn.Module, loaders: list[DataLoader]) -> Epoch:
    """The tutorial's data path, and `.item()` after each batch."""

    def note(logits: Tensor, targets: Tensor, loss: Tensor) -> tuple[float, float]:
        return loss.item(), (logits.argmax(1) == targets).sum().item()

    train, test = (lambda loader=loader: ((x.squeeze(1), y) for x, y in loader) for loader in loaders)
    return partial(plain_epoch, network, SGD(network.parameters()), train, test, note)


def memory_epoch(network: nn.Module, data: Data, splits: dict[str, Split]) -> Epoch:
    """Our data path and our metrics."""
    optimizer, meter = SGD(network.parameters()), Classification(CLASSES)

    def train() -> Iterable[tuple[Tensor, Tensor]]:
        for step in range(len(splits["train"]) // BATCH):
            batch = train_batch(data, splits["train"], 0, step)
            yield batch.inputs, batch.targets

    def test() -> Iterable[tuple[Tensor, Tensor]]:
        return ((batch.inputs, batch.targets) for batch in eval_batches(data, splits["val"], 0, "val"))

    def epoch() -> None:
        plain_epoch(network, optimizer, train, test, meter.update)
        meter.compute()

    return epoch


def our_epoch(hidden: int, data: Data, splits: dict[str, Split], threads: int, folder: Path) -> Epoch:
    """One epoch of the runner's own loop, with all that it writes: curves, TensorBoard, checkpoints."""
    task = RNNFashion(partial(RNN, hidden_size=hidden, readout="last"), data, CrossEntropy())
    run = Run("benchmark", 0, select("cpu", "float32", threads, False), data, splits)
    run.folder, run.tracker, task.run = folder, Tracker(folder), run
    run.networks = {"": task.build(run)}
    config = LoopConfig(epochs=1, clip_norm=CLIP)
    state = TrainingState(task, run, SGD, config)

    def save(name: str) -> None:
        state.save(folder / "checkpoints" / f"{name}.pt", {})

    trainer = Trainer(state, Constant(), Objective("accuracy/val"), save)

    def epoch() -> None:
        state.progress.step = run.step = state.progress.evaluated = 0
        trainer.fit()

    return epoch


def lightning_epoch(hidden: int, loaders: list[DataLoader]) -> Epoch:
    """PyTorch Lightning's Trainer with torchmetrics, on the tutorial's network and data path."""
    import lightning
    import torchmetrics

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = TutorialRNN(hidden)
            how = {"task": "multiclass", "num_classes": CLASSES, "average": "macro"}
            names = ("Accuracy", "Precision", "Recall", "F1Score")
            one = torchmetrics.MetricCollection({name: getattr(torchmetrics, name)(**how) for name in names})
            self.metrics = nn.ModuleDict({"on_train": one, "on_val": one.clone()})

        def training_step(self, batch: list[Tensor], index: int, split: str = "train") -> Tensor:
            logits = self.network(batch[0].squeeze(1))
            loss = nn.functional.cross_entropy(logits, batch[1])
            self.metrics[f"on_{split}"].update(logits, batch[1])
            self.log(f"loss/{split}", loss, on_epoch=True, on_step=False)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.training_step(batch, index, "val")

        def on_validation_epoch_end(self) -> None:
            self.metrics["on_val"].compute()
            self.metrics["on_val"].reset()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD(self.parameters())

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    module, silent = Module(), ("checkpointing", "progress_bar", "model_summary")
    settings = {"max_epochs": 1, "accelerator": "cpu", "gradient_clip_val": CLIP, "logger": False}
    settings |= {"num_sanity_val_steps": 0} | {f"enable_{name}": False for name in silent}
    return lambda: lightning.Trainer(**settings).fit(module, *loaders)


def limit_epoch(hidden: int, train_size: int, test_size: int) -> Epoch:
    """The matrix products and tanh alone, at the shapes of an epoch: what no implementation can beat here.

    Forward: the projection of all inputs in one product, T products with W_hh, T tanh. Backward: T products
    with W_hh, one product each for ∂W_hh and ∂W_xh, T tanh derivatives. The output layer is left out.
    """
    T, B, H = PIXELS, BATCH, hidden  # a row of pixels per step
    inputs, states = torch.randn(T * B, PIXELS), torch.randn(T, B, H)
    w_xh, w_hh = torch.randn(PIXELS, H), torch.randn(H, H) / H**0.5
    projected, gradient = torch.empty(T * B, H), torch.randn(T, B, H)
    out, d_hh, d_xh = torch.empty(B, H), torch.empty(H, H), torch.empty(PIXELS, H)

    @torch.no_grad()
    def epoch() -> None:
        for number in range(train_size // B + round(test_size / B)):
            # forward
            torch.mm(inputs, w_xh, out=projected)
            for h in states:
                torch.mm(h, w_hh, out=out)
                torch.tanh(out, out=out)
            if number >= train_size // B:  # evaluation
                continue

            # backward
            for h, g in zip(states, gradient, strict=True):
                torch.mm(g, w_hh, out=out)
                torch.ops.aten.tanh_backward.grad_input(out, h, grad_input=out)
            torch.mm(states.view(-1, H).t(), gradient.view(-1, H), out=d_hh)
            torch.mm(inputs.t(), gradient.view(-1, H), out=d_xh)

    return epoch


def time_epoch(epoch: Epoch) -> Row:
    """Seconds by the clock and of the CPU."""
    gc.collect()
    gc.freeze()  # the objects of all other ways: collecting garbage is not to go through them
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        return wall_and_cpu(epoch)


def measure(hidden: int, arguments: argparse.Namespace) -> dict[str, list[Row]]:
    """Every way's seconds per epoch."""
    data, root, loaders = FashionMNIST(arguments.root, BATCH), Path(arguments.root).expanduser(), []
    splits = load_whole(data, arguments.part)
    for train in (True, False):
        images = datasets.FashionMNIST(root, train=train, transform=transforms.ToTensor())
        subset = Subset(images, range(round(len(images) * arguments.part)))
        loaders.append(DataLoader(subset, BATCH, shuffle=train, drop_last=train))

    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "tutorial": tutorial_epoch(TutorialRNN(hidden), loaders),
            "nn.RNN, tutorial's data path": tutorial_epoch(torch_rnn(hidden), loaders),
            "Lightning with torchmetrics": lightning_epoch(hidden, loaders),
            "nn.RNN, our data path": memory_epoch(torch_rnn(hidden), data, splits),
            "our RNN, our data path": memory_epoch(RNN(PIXELS, hidden, readout="last"), data, splits),
            "ours": our_epoch(hidden, data, splits, arguments.threads, Path(folder)),
            "limit": limit_epoch(hidden, len(splits["train"]), len(splits["val"])),
        }
        return take_turns({name: partial(time_epoch, way) for name, way in ways.items()}, arguments.rounds)


def report(hidden: int, times: dict[str, list[Row]]) -> None:
    """The table in docs/benchmarks.md: medians, and ratios of the seconds by the clock."""
    (ours, _), (limit, _) = times["ours"], times["limit"]
    print(f"\nhidden {hidden}")
    rows = []
    for name, (wall, cpu) in times.items():
        cells = f"{median(wall):.2f}", f"{median(cpu):.2f}", f"{ratio(wall, ours):.2f}×"
        rows.append([name, *cells, f"{ratio(limit, wall):.0%}"])
    show_table(["way", "seconds", "CPU seconds", "ours is faster by", "share of the limit"], rows)


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256], help="hidden sizes")
    parser.add_argument("--part", type=float, default=1.0, help="the share of an epoch that is run")
    parser.add_argument("--root", default="~/.cache/formula-runner", help="where the data is")
    arguments = parser.parse_args()
    start(arguments)
    for hidden in arguments.hidden:
        report(hidden, measure(hidden, arguments))


if __name__ == "__main__":
    main()
