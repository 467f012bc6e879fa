"""A tiny diffusion experiment on drawn images: a task outside a run, and one trained run for all tests."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from experiments.data.image_folder.dataset import ImageFolder
from experiments.ddpm_cifar.task import DDPM
from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.unet import UNet
from runner import run
from runner.device import select
from runner.engine.job import Result
from runner.task import Run

SIZE, T, COUNTS = 8, 25, {"train": 40, "val": 8, "test": 12}
MEASURES = {"accuracy", "precision", "recall", "f1", "density", "coverage", "fd_pixels", "kd_pixels"}


@dataclass
class RecordedRun(Run):
    """A run outside the engine that keeps figures and tables instead of writing them."""

    figures: dict[str, Figure] = field(default_factory=dict)
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)

    def figure(self, name: str, figure: Figure) -> None:
        self.figures[name] = figure

    def animation(
        self, name: str, figure: Figure, draw: Callable[[int], object], frames: int, fps: int = 12
    ) -> None:
        draw(frames - 1)
        self.frames[name] = frames

    def table(self, name: str, header: list[str], rows: list[list[Any]]) -> None:
        self.tables[name] = header, rows


def draw_images(folder: Path, counts: dict[str, int] = COUNTS, mode: str = "RGB") -> Path:
    """Write images of a bright square on a dark ground, coloured by class."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            pixels = np.full((SIZE, SIZE, 3), 20, np.uint8)
            row, column = random.integers(0, SIZE - 3, 2)
            pixels[row : row + 3, column : column + 3, number % 3] = 200 + random.integers(0, 50)
            path = folder / split / f"class_{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).save(path)
    return folder


def small(root: Path, *overrides: str) -> tuple[str, ...]:
    """Return a command that trains a tiny network for 8 steps."""
    return (
        *("experiment=ddpm_cifar", "threads=1"),
        *("data=image_folder", f"data.root={root}", f"data.size={SIZE}"),
        *("data.batch_size=8", "data.eval_batch_size=8"),
        *("model.base_channels=32", "model.channel_mult=[1,1]", "model.num_res_blocks=1"),
        *("model.attention_resolutions=[4]", f"task.diffusion.timesteps={T}", "task.features=pixels"),
        *("task.samples=8", "task.steps=5", "task.sample_batch=5", "task.picture_steps=3"),
        *("task.bits_images=2", "task.final_bits_images=3", "optimizer.lr=0.001", "schedule.warmup=2"),
        *("loop.steps=8", "loop.eval_every=4", "loop.log_every=2", "loop.ema=0.9"),
        *overrides,
    )


def built(
    root: Path, seed: int = 0, channels: Any = 3, noisy: bool = False, **changed: Any
) -> tuple[DDPM, RecordedRun]:
    """Return a task with its network outside the engine; `noisy` networks do not predict zero."""
    data = ImageFolder(str(root), SIZE, channels, batch_size=8, eval_batch_size=8)

    def model(**sizes: Any) -> UNet:
        return UNet(
            base_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(4,),
            dropout=0.0,
            **sizes,
        )

    task = DDPM(
        model, data, GaussianDiffusion(T), **{"features": "pixels", "samples": 8, "steps": 5} | changed
    )
    run = RecordedRun("test", seed, select("cpu", "float32", 1, False), data, data.load(0))
    torch.manual_seed(0)
    task.run = run
    run.networks = {"": task.build(run)}
    if noisy:
        torch.nn.init.normal_(task.network.conv_out.weight, std=0.1)
    return task, run


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def metrics_of(result: Result, split: str) -> list[dict[str, float]]:
    """Return the rows of a split in `metrics.csv`."""
    with (result.folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("split") == split]
    return [{name: float(text) for name, text in row.items() if text} for row in rows]


def checkpoint(result: Result) -> str:
    return f"checkpoint={result.folder}/checkpoints/best.pt"


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of 8 steps with everything that it draws but its curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.records.tracker.Tracker.curves", lambda *_: None)
        return run(*small(root), f"outputs={tmp_path_factory.mktemp('finished')}")


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, for runs that are not about figures."""
    monkeypatch.setattr(DDPM, "before", lambda *_: None)
    monkeypatch.setattr(DDPM, "after", lambda *_: None)
    monkeypatch.setattr("runner.records.tracker.Tracker.figure", lambda *_: None)
