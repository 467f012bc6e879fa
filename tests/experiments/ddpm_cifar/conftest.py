"""A tiny diffusion task on drawn images, outside a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments.data.image_folder.dataset import ImageFolder
from experiments.ddpm_cifar.task import DDPM
from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.unet import UNet
from runner.device import select
from runner.task import Run
from tests.experiments.conftest import IMAGE_SIZE, T

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


def built(
    root: Path, seed: int = 0, channels: Any = 3, noisy: bool = False, **changed: Any
) -> tuple[DDPM, RecordedRun]:
    """Return a task with its network outside the engine; `noisy` networks do not predict zero."""
    data = ImageFolder(str(root), IMAGE_SIZE, channels, batch_size=8, eval_batch_size=8)
    sizes = {"base_channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1, "attention_resolutions": (4,)}
    arguments = {"model": partial(UNet, **sizes, dropout=0.0), "data": data, "features": "pixels"}
    task = DDPM(diffusion=GaussianDiffusion(T), **arguments | {"samples": 8, "steps": 5} | changed)
    run = RecordedRun("test", seed, select("cpu", "float32", 1, False), data, data.load(0))
    torch.manual_seed(0)
    task.run = run
    run.networks = {"": task.build(run)}
    if noisy:
        torch.nn.init.normal_(task.network.conv_out.weight, std=0.1)
    return task, run
