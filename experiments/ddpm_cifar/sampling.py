"""Images from a network, each a function of the run's seed and its own number, whatever batch it is in.

Letters in shapes: B batch, N images, C channels, H height, W width, T time steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data.images import ImageData
from experiments.ddpm_cifar.mosaics import to_bytes
from experiments.ddpm_cifar.progress import Timing
from experiments.nn import samplers
from experiments.nn.diffusion import GaussianDiffusion
from experiments.nn.samplers import Noise, OnStep
from runner.task import Run


class Sampling:
    """Samples of the network as it is at the run's present step."""

    def __init__(
        self,
        run: Run,
        network: nn.Module,  # (x_t, t) → ε
        diffusion: GaussianDiffusion,
        data: ImageData,  # whose shape the samples have
        how: dict[str, Any],  # sampler, steps, eta, spacing and clip of `samplers.sample`
        batch: int,  # images that are sampled at once
    ):
        self.network, self.diffusion, self.data, self.batch = network, diffusion, data, batch
        self.T, self.sampler = diffusion.timesteps, how["sampler"]
        self.progress = Timing(run, network, data.shape)
        self._run, self._how = run, how
        # the run's step, and the images sampled at it
        self._samples = -1, torch.empty(0, *data.shape, dtype=torch.uint8)

    def noise(self, numbers: Sequence[int], *purpose: str | int) -> Noise:
        """Return the noise of the images of these numbers, for a purpose."""
        streams = [self._run.generator(*purpose, number) for number in numbers]
        return Noise(streams, self.data.shape, self._run.device)

    def samples(self, count: int) -> Tensor:
        """Return images 0 … count − 1, uint8 (N, C, H, W) on the CPU, each sampled once per training step."""
        step, images = self._samples
        if step != self._run.step:
            images = images[:0]
        if len(images) < count:
            images = torch.cat((images, self.generate(range(len(images), count))))
            self._samples = self._run.step, images
        return images[:count]

    def generate(self, numbers: range, steps: int | None = None) -> Tensor:
        """Sample the images of these numbers, uint8 (N, C, H, W) on the CPU, in the usual or other steps."""
        steps = steps or self._how["steps"] or self.T
        label = f"{len(numbers):,} samples by {self.describe(steps)}"
        return self._sample(label, numbers, "sample", **self._how | {"steps": steps})

    def denoise(
        self,
        all_steps: int,  # of a process that starts at T − 1
        t: int,  # index that x is at
        numbers: Sequence[int],  # of the images, which with `purpose` decide their noise
        *purpose: str | int,
        x: Tensor | None = None,  # (N, C, H, W); None: noise
        on_step: OnStep = lambda *_: None,  # called with step, t, x_t and x̂_0 of each batch
    ) -> Tensor:
        """Run the reverse process of the figures from index t, in its share of `all_steps` for all T.

        Return uint8 (N, C, H, W) on the CPU.

        It is the paper's where all T are visited, else the one with the smaller variance: over few steps the
        larger leaves noise in the images (Song et al. 2021, Table 1, σ̂).
        """
        how: dict[str, Any] = {"sampler": "ddpm"}
        if all_steps != self.T:
            how = {"sampler": "ddim", "eta": 1.0, "spacing": "uniform", "clip": True}

        # without `start`, the first of few steps would lie below T
        steps = max(1, round(all_steps * (t + 1) / self.T))
        label = f"the reverse process from t = {t + 1:,}"
        return self._sample(label, numbers, *purpose, x=x, on_step=on_step, steps=steps, start=t, **how)

    def _sample(
        self,
        label: str,
        numbers: Sequence[int],
        *purpose: str | int,
        x: Tensor | None = None,
        on_step: OnStep = lambda *_: None,
        **how: Any,
    ) -> Tensor:
        """Run a sampler from noise or from x, `batch` images at once: uint8 (N, C, H, W) on the CPU."""
        batch = min(self.batch, len(numbers))
        calls = how["steps"] * math.ceil(len(numbers) / batch)
        parts = []

        # each batch from its images' own noise
        with self.progress.network_calls(label, calls, batch) as tick:

            def after_step(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
                on_step(step, t, x_t, x_0)
                tick()

            for first in range(0, len(numbers), batch):
                noise = self.noise(numbers[first : first + batch], *purpose)
                how["x"] = noise() if x is None else x[first : first + batch]
                images = samplers.sample(self.diffusion, self.network, draw=noise, on_step=after_step, **how)
                parts.append(to_bytes(images).cpu())
        return torch.cat(parts)

    def describe(self, steps: int | None = None) -> str:
        """Return the sampler in words."""
        eta = f", η = {self._how['eta']:g}" if self._how["eta"] else ""
        return f"{self.sampler} in {steps or self._how['steps'] or self.T:,} steps{eta}"
