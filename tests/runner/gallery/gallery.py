"""A toy that leaves one of everything a run can leave to look at, and can be made to fail in each way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runner import figures
from runner.data import Batch, Data, Split
from runner.errors import UserError
from runner.spreadsheet import Sheet
from runner.streams import BatchRandom, generator
from runner.task import Output, Run, Task


class Corners(Data):
    """Three corners of a square, the training points shaken by their batch's own draws."""

    class_names = ("Ankle boot", "T-shirt/top", "裙子")

    def __init__(self, samples: int = 60, batch_size: int = 12, eval_batch_size: int = 25):
        super().__init__(batch_size, eval_batch_size)
        self.samples = samples

    def load(self, seed: int) -> dict[str, Split]:
        targets = torch.arange(self.samples) % 3
        corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])[targets]
        noise = {
            n: torch.randn(self.samples, 2, generator=generator(seed, n)) for n in ("train", "val", "test")
        }
        return {name: Split(corners + 0.7 * noise[name], targets) for name in noise}

    def transform(self, inputs: Tensor, draws: BatchRandom | None) -> Tensor:
        return inputs if draws is None else inputs + 0.1 * draws.normal(2)


class Net(nn.Module):
    """Dropout and one layer, so that the weights and every step draw random numbers."""

    def __init__(self, dropout: float = 0.1, outputs: int = 3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Gallery(Task):
    """A classifier. `end` says how it ends: well, or badly; at step `signal_at` it sends itself a signal."""

    def __init__(
        self, model: Callable[..., nn.Module], data: Data, end: str = "well",
        signal_at: int | None = None, signal_name: str = "SIGKILL", note: Any = None,
    ):  # fmt: skip
        self.model, self.data, self.end, self.note = model, data, end, note
        self.signal_at, self.signal_name = signal_at, signal_name

    def build(self, run: Run) -> nn.Module:
        if self.end == "mistake" or (self.end == "late" and run.device.type != "meta"):
            raise UserError("The data cannot be had: the disk is elsewhere.")
        self.network = self.model()
        return self.network

    def train(self, batch: Batch) -> Output:
        signalled = self.run.folder / "signalled"  # once, not after a resume too
        if torch.is_grad_enabled() and self.run.step == self.signal_at and not signalled.exists():
            signalled.touch()
            os.kill(os.getpid(), signal.Signals[self.signal_name])
        logits = self.network(batch.inputs)
        assert batch.targets is not None
        return Output(nn.functional.cross_entropy(logits, batch.targets), logits, batch.targets)

    def before(self, run: Run) -> None:
        if self.end == "raises":
            raise RuntimeError("crashed on purpose")
        if self.end == "exits":
            sys.exit(3)
        if self.end == "memory":
            torch.empty(2**53, dtype=torch.uint8)
        run.check("finite", "|x| < ∞", 1.0 if self.end == "check" else 0.0, 0.5)

    def after(self, run: Run) -> None:
        test = run.splits["test"]
        with run.inference("pictures"):
            found = torch.cat([self.network(batch.inputs).softmax(1) for batch in run.batches("test")])
        run.pr_curves("test", test.targets, found)
        figure, grid = figures.new()
        grid[0, 0].scatter(*test.inputs.T.cpu(), c=found.argmax(1).cpu())
        grid[0, 0].set_title("预测 · predicted")
        run.figure("predictions", figure)
        run.animation("turning", figure, lambda i: grid[0, 0].set_xlabel(f"frame {i}"), frames=2)
        run.spreadsheet("counts", {"counts": Sheet([["class", "twice"]], [[1, "=2*A2"]])})
        counts = found.argmax(1).bincount(minlength=3).tolist()
        rows = [[name, count] for name, count in zip(Corners.class_names, counts, strict=True)]
        run.table("counts", ["class", "predicted"], rows)
