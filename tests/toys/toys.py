"""Toy experiments that use the whole contract, and a data set for them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runner import figures
from runner.data import Batch, Data, Split
from runner.errors import UserError
from runner.spreadsheet import Sheet
from runner.streams import BatchRandom, generator, reseed, seed_of
from runner.task import Output, Run, Task


def send_signals(place: str, step: int) -> None:
    """Send this process the signals that TOY_SIGNALS has for this place: `SIGKILL@train:7`, several with commas.

    An environment variable, so that the config of a run that is killed equals that of one that is not.
    """
    for entry in filter(None, os.environ.get("TOY_SIGNALS", "").split(",")):
        name, _, where = entry.partition("@")
        if where == f"{place}:{step}":
            signal.raise_signal(signal.Signals[name])


def classify(logits: Tensor, batch: Batch) -> Output:
    assert batch.targets is not None
    return Output(nn.functional.cross_entropy(logits, batch.targets), logits, batch.targets)


class Blobs(Data):
    """Three Gaussian blobs in the plane; noise is added to training batches, from their own draws."""

    class_names = ("Ankle boot", "T-shirt/top", "裙子")

    def __init__(
        self, samples: int = 120, noise: float = 0.1, batch_size: int = 16, eval_batch_size: int = 50,
        lost: bool = False, splits: tuple[str, ...] = ("train", "val", "test"),
    ):  # fmt: skip
        super().__init__(batch_size, eval_batch_size)
        self.samples, self.noise, self.lost, self.splits = samples, noise, lost, splits

    def load(self, seed: int) -> dict[str, Split]:
        if self.lost:
            raise UserError("the blobs are lost")
        return {name: self._blobs(name) for name in self.splits}

    def _blobs(self, name: str) -> Split:
        targets = torch.arange(self.samples) % 3
        centres = torch.tensor([[0.0, 2.0], [2.0, 0.0], [-2.0, -2.0]])
        return Split(centres[targets] + torch.randn(self.samples, 2, generator=generator(7, name)), targets)

    def digest(self) -> str:
        return "blobs"

    def transform(self, inputs: Tensor, draws: BatchRandom | None) -> Tensor:
        return inputs if draws is None else inputs + self.noise * draws.normal(2)


class MLP(nn.Module):
    """One hidden layer, with dropout (so that the random stream of a step matters)."""

    def __init__(self, hidden: int = 8, outputs: int = 3, dropout: float = 0.2):
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, not {hidden}")
        self.layers = nn.Sequential(
            nn.Linear(2, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ChecksOnly(Task):
    """Trains nothing: two claims, one of which can be made to fail."""

    def __init__(self, size: int = 4, error: float = 0.0, crash: bool = False):
        self.size, self.error, self.crash = size, error, crash

    def before(self, run: Run) -> None:
        if self.crash:
            raise RuntimeError("crashed on purpose")
        matrix = torch.randn(self.size, self.size, generator=run.generator("matrix"), dtype=torch.float64)
        rotation, _ = torch.linalg.qr(matrix)
        norm = float(((rotation @ matrix).norm() - matrix.norm()).abs())
        run.check("norm", "‖Qx‖ = ‖x‖", norm + self.error, 1e-10)
        run.table("norm", ["size", "error"], [[self.size, norm]])


class Nothing(Task):
    """Does nothing: what a run costs by itself."""

    def __init__(self, size: int = 0):
        self.size = size


class Classifier(Task):
    """One network; `end` says how the run ends: well, or badly."""

    def __init__(self, model: Callable[..., nn.Module], data: Data, end: str = "well"):
        self.model, self.data, self.end = model, data, end

    def build(self, run: Run) -> nn.Module:
        self.network = self.model()
        return self.network

    def train(self, batch: Batch) -> Output:
        if torch.is_grad_enabled():
            self.misbehave(self.run.step)
        return classify(self.network(batch.inputs), batch)

    def misbehave(self, step: int) -> None:
        """Called before each step of the training."""


class Paced(Classifier):
    """Its steps take TOY_PAUSE seconds; an environment variable, so that the config is the same."""

    def train(self, batch: Batch) -> Output:
        self.run.tracker.curves = lambda title: None  # type: ignore[method-assign]  # slow, and not looked at
        return super().train(batch)

    def misbehave(self, step: int) -> None:
        """At step 4, end as `end` says: once (a file remembers it) or always."""
        time.sleep(float(os.environ.get("TOY_PAUSE", "0")))
        if step != 4 or self.end == "well":
            return
        with (self.run.folder / "misbehaved").open("a") as file:
            file.write("x")
        if self.end == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.end == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.00 TiB.")
        if self.end == "raises" or (self.run.folder / "misbehaved").stat().st_size == 1:
            raise RuntimeError("crashed on purpose")


class Gallery(Classifier):
    """Leaves one of everything to look at; at step `signal_at` it sends itself a signal."""

    def __init__(
        self, model: Callable[..., nn.Module], data: Data, end: str = "well",
        signal_at: int | None = None, signal_name: str = "SIGKILL", note: Any = None,
    ):  # fmt: skip
        super().__init__(model, data, end)
        self.signal_at, self.signal_name, self.note = signal_at, signal_name, note

    def build(self, run: Run) -> nn.Module:
        if self.end == "mistake" or (self.end == "late" and run.device.type != "meta"):
            raise UserError("The data could not be loaded: the disk is elsewhere.")
        return super().build(run)

    def misbehave(self, step: int) -> None:
        signalled = self.run.folder / "signalled"  # once, not after a resume too
        if step == self.signal_at and not signalled.exists():
            signalled.touch()
            os.kill(os.getpid(), signal.Signals[self.signal_name])

    def before(self, run: Run) -> None:
        if self.end == "raises":
            raise RuntimeError("crashed on purpose")
        if self.end == "exits":
            sys.exit(3)
        run.check("finite", "|x| < ∞", 1.0 if self.end == "check" else 0.0, 0.5)

    def after(self, run: Run) -> None:
        test = run.splits["test"]
        with run.inference("pictures"):
            found = torch.cat([self.network(batch.inputs).softmax(1) for batch in run.batches("test")])
        figure, grid = figures.new()
        grid[0, 0].scatter(*test.inputs.T.cpu(), c=found.argmax(1).cpu())
        grid[0, 0].set_title("预测 · predicted")
        run.figure("predictions", figure)
        run.animation("turning", figure, lambda i: grid[0, 0].set_xlabel(f"frame {i}"), frames=2)
        run.spreadsheet("counts", {"counts": Sheet([["class", "twice"]], [[1, "=2*A2"]])})
        counts = found.argmax(1).bincount(minlength=3).tolist()
        run.table("counts", ["class", "predicted"], [*zip(Blobs.class_names, counts, strict=True)])


class Variants(Task):
    """Two networks, or the one that is named, side by side on the same batches."""

    def __init__(
        self, model: Callable[..., nn.Module], data: Data, names: list[str], wide: int = 16,
        blow_up_at: int | None = None,
    ):  # fmt: skip
        self.model, self.data, self.names, self.wide, self.blow_up_at = model, data, names, wide, blow_up_at

    def build(self, run: Run) -> dict[str, nn.Module]:
        self.networks = {name: self.fresh(name, run) for name in self.names}
        return self.networks

    def fresh(self, name: str, run: Run) -> nn.Module:
        reseed(seed_of(run.seed, name), run.device)  # the same weights, whatever else is built
        return self.model(hidden=self.wide) if name == "wide" else self.model()

    def before(self, run: Run) -> None:
        send_signals("before", run.step)
        with (run.folder / "before.txt").open("a") as file:
            file.write("called\n")
        run.table("before", ["step"], [[run.step]])

    def train(self, batch: Batch) -> dict[str, Output]:
        if torch.is_grad_enabled():
            send_signals("train", self.run.step)
        return {name: self.output(network(batch.inputs), batch) for name, network in self.networks.items()}

    def output(self, logits: Tensor, batch: Batch) -> Output:
        output = classify(logits, batch)
        if torch.is_grad_enabled() and self.run.step == self.blow_up_at:
            output.loss = output.loss * torch.inf
        output.scalars["confidence"] = logits.softmax(1).amax(1).mean()
        return output

    def eval(self, split: str) -> dict[str, float]:
        send_signals(split, self.run.step)
        return super().eval(split)

    def after(self, run: Run) -> None:
        send_signals("after", run.step)


class Generative(Task):
    """Learns to predict noise that was added; has its own evaluation, a mode and a state of its own."""

    modes = ("sample",)
    without_data = ("sample",)

    def __init__(self, model: Callable[..., nn.Module], data: Data, n: int = 5):
        self.model, self.data, self.n = model, data, n
        self.mean_seen = torch.zeros(2)
        self.batches_seen = 0

    def build(self, run: Run) -> nn.Module:
        self.network = self.model(outputs=2)
        return self.network

    def train(self, batch: Batch) -> Output:
        noise = batch.draws.normal(2)
        if torch.is_grad_enabled():
            send_signals("train", self.run.step)
            self.batches_seen += 1
            self.mean_seen += (batch.inputs.mean(0).cpu() - self.mean_seen) / self.batches_seen
        loss = (self.network(batch.inputs + noise) - noise).square().mean()
        return Output(loss, scalars={"noise": noise.square().mean()})

    def eval(self, split: str) -> dict[str, float]:
        losses = [float(self.train(batch).loss) for batch in self.run.batches(split)]
        samples = self.network(torch.randn(64, 2, device=self.run.device))
        return {"loss": sum(losses) / len(losses), "spread": float(samples.std())}

    def sample(self, run: Run) -> None:
        with torch.no_grad():
            points = self.network(torch.randn(self.n, 2, generator=run.generator("sample")).to(run.device))
        run.table("samples", ["x", "y"], points.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"mean_seen": self.mean_seen, "batches_seen": self.batches_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean_seen, self.batches_seen = state["mean_seen"], state["batches_seen"]
