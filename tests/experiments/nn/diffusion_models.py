"""Models of noise for the tests of diffusion and of its samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from experiments.nn.diffusion import GaussianDiffusion, Schedule, Variance

SCHEDULES = pytest.mark.parametrize("schedule", get_args(Schedule))
VARIANCES = pytest.mark.parametrize("variance", get_args(Variance))


def bent(x: Tensor, t: Tensor) -> Tensor:
    """Neither linear nor blind to t; its x̂_0 leaves [−1, 1] here and there."""
    return torch.tanh(x + t.view(-1, 1, 1, 1) / 100 - 1) * 0.8 + 0.3 * x


def ideal(diffusion: GaussianDiffusion, s: float, m: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """E[ε | x_t] where x_0 ~ N(m, s²): √(1−ᾱ) (x_t − √ᾱ m) / (ᾱ s² + 1 − ᾱ)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1).to(x.dtype)
        return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s**2 + 1 - a)

    return model
