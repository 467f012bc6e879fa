"""From noise to images: ancestral sampling, DDIM and DPM-Solver++ (2M), each on any subset of the time steps.

A sampler visits the indices τ_S > … > τ_1 of the process and then the clean image, where ᾱ = 1: S calls of the
model. With t the index that it is at, s the next one and z standard normal noise,

    x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t                                clipped to [−1, 1] where asked           (1)
    ancestral   x_s = √ᾱ_s β/(1−ᾱ_t) x̂_0 + √(1−β)(1−ᾱ_s)/(1−ᾱ_t) x_t + σz        β = 1 − ᾱ_t/ᾱ_s            (2)
    DDIM        x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s−σ²) ε̂ + σz               σ² = η² β (1−ᾱ_s)/(1−ᾱ_t)                 (3)
    2M          x_s = √((1−ᾱ_s)/(1−ᾱ_t)) x_t − √ᾱ_s (e^{−h} − 1) D          h = λ_s − λ_t                    (4)

with λ = ½ log ᾱ/(1−ᾱ). (2) is Ho et al. 2020, eqs. 6 and 7, for two indices any distance apart; (3) is Song et al.
2021, eqs. 12 and 16; (4) is Lu et al. 2022 (DPM-Solver++), algorithm 2. The noise z comes from the caller, so that it
can belong to an image whatever batch the image is in.

Letters in shapes: B batch, N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from experiments.nn.checks import one_of, within
from experiments.nn.diffusion import GaussianDiffusion, Model, predict_noise

SamplerName = Literal["ddpm", "ddim", "dpm++"]
Spacing = Literal["uniform", "quadratic", "logsnr"]
Draw = Callable[[int], Tensor]  # step → noise like x, (B, C, H, W)
OnStep = Callable[[int, int, Tensor, Tensor], None]  # step, t, x_t, x̂_0


class Sampler(ABC):
    """One rule for a step."""

    spacing: Spacing  # what it visits unless something else is asked for
    clip: bool  # whether x̂_0 is clipped unless something else is asked for

    def __init__(self, diffusion: GaussianDiffusion, eta: float):
        self.diffusion, self.eta = diffusion, eta

    @abstractmethod
    def step(self, x: Tensor, x_0: Tensor, t: int, s: int) -> tuple[Tensor, float]:
        """x_t and x̂_0 (B, C, H, W) → x_s without its noise, and σ."""


class Ancestral(Sampler):
    """Equation (2), with σ² = β ("fixed_large") or β (1−ᾱ_s)/(1−ᾱ_t) ("fixed_small")."""

    spacing: Spacing = "uniform"
    clip = True

    def step(self, x: Tensor, x_0: Tensor, t: int, s: int) -> tuple[Tensor, float]:
        a_t, a_s = self.diffusion.alpha_bar(t), self.diffusion.alpha_bar(s)
        beta, ratio = 1 - a_t / a_s, (1 - a_s) / (1 - a_t)
        mean = math.sqrt(a_s) * beta / (1 - a_t) * x_0 + math.sqrt(1 - beta) * ratio * x
        if s < 0:  # the last step ends at its mean (algorithm 2, line 3)
            return mean, 0.0
        return mean, math.sqrt(beta if self.diffusion.variance == "fixed_large" else beta * ratio)


class DDIM(Sampler):
    """Equation (3); ε̂ belongs to x̂_0, so that a clipped x̂_0 comes with the noise that leads to it."""

    spacing: Spacing = "quadratic"  # the authors' for CIFAR-10
    clip = False  # as the authors have it

    def step(self, x: Tensor, x_0: Tensor, t: int, s: int) -> tuple[Tensor, float]:
        a_t, a_s = self.diffusion.alpha_bar(t), self.diffusion.alpha_bar(s)
        variance = self.eta**2 * (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
        eps = (x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        mean = math.sqrt(a_s) * x_0 + math.sqrt(max(1 - a_s - variance, 0.0)) * eps
        return mean, math.sqrt(variance)


class Multistep(Sampler):
    """Equation (4): D is x̂_0 carried half a step further along the line through this one and the one before.

    The first step has none before it, and the last goes to λ = ∞, where x_s = x̂_0.
    """

    spacing: Spacing = "logsnr"  # the authors' for small images
    clip = True
    before: tuple[Tensor, float] | None = None  # x̂_0 and λ of the step before

    def step(self, x: Tensor, x_0: Tensor, t: int, s: int) -> tuple[Tensor, float]:
        if s < 0:
            return x_0, 0.0
        a_t, a_s = self.diffusion.alpha_bar(t), self.diffusion.alpha_bar(s)
        lambda_t, lambda_s = ((math.log(a) - math.log1p(-a)) / 2 for a in (a_t, a_s))
        estimate = x_0
        if self.before is not None:
            x_0_before, lambda_before = self.before
            ratio = (lambda_s - lambda_t) / (lambda_t - lambda_before)
            estimate = x_0 + ratio / 2 * (x_0 - x_0_before)
        self.before = x_0, lambda_t
        scale = math.sqrt((1 - a_s) / (1 - a_t))
        return scale * x - math.sqrt(a_s) * math.expm1(lambda_t - lambda_s) * estimate, 0.0


RULES: dict[SamplerName, type[Sampler]] = {"ddpm": Ancestral, "ddim": DDIM, "dpm++": Multistep}


@torch.no_grad()
def sample(
    diffusion: GaussianDiffusion,  # the process that the model was trained for
    model: Model,  # (x_t, t) → ε
    x: Tensor,  # x_T, standard normal noise (B, C, H, W); or, with `start`, an x_t of that index
    steps: int | None = None,  # S, how often the model is called; None: every index is visited
    sampler: SamplerName = "ddpm",  # ddpm is (2), ddim (3), dpm++ (4)
    draw: Draw | None = None,  # z of step 0, …, S − 1, like x; asked only where σ is above zero
    eta: float = 0.0,  # DDIM's η: 0 adds no noise, 1 as much as ancestral sampling with "fixed_small"
    spacing: Spacing | None = None,  # which indices are visited, see `_visits`; None: the sampler's own
    clip: bool | None = None,  # whether x̂_0 is clipped; None: the sampler's own
    start: int | None = None,  # the index that x is at, where it is not pure noise
    on_step: OnStep | None = None,  # called with the number of the step, its index t, x_t before it and x̂_0
) -> Tensor:
    """Return images (B, C, H, W) made from noise, or from the middle of the way.

    Raises:
        ValueError: an unknown `sampler` or `spacing`, `steps` or `start` outside the process, `eta` outside [0, 1]
            or for another sampler than ddim, no `draw` where noise is needed.
    """
    # the rule
    one_of(RULES, sampler=sampler)
    within(0, 1, closed=True, eta=eta)
    if eta > 0 and sampler != "ddim":
        raise ValueError(f"eta belongs to sampler ddim: with {sampler} it must be 0, got {eta}")
    if draw is None and (sampler == "ddpm" or eta > 0):
        raise ValueError(f"draw must be given: sampler {sampler} adds noise at every step")
    rule = RULES[sampler](diffusion, eta)
    clip = rule.clip if clip is None else clip
    times = _visits(diffusion, steps, spacing or rule.spacing, start)

    # its steps
    for step, (t, s) in enumerate(pairwise([*times, -1])):
        index = torch.full((len(x),), t, device=x.device)
        x_0 = diffusion.predict_x_0(x, index, predict_noise(model, x, index))
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        if on_step is not None:
            on_step(step, t, x, x_0)
        x, sigma = rule.step(x, x_0, t, s)
        if sigma > 0 and draw is not None:
            x = x + sigma * draw(step)
    return x


def _visits(
    diffusion: GaussianDiffusion, steps: int | None, spacing: Spacing, start: int | None = None
) -> list[int]:
    """Return the S indices that a sampler visits, from the noisiest down; exactly S, all different.

    From pure noise: uniform ⌊i T/S⌋ and quadratic ⌊(i √(0.8 T) / (S−1))²⌋ as in the DDIM authors' code, logsnr in
    equal steps of λ from its value at T − 1 to that at 0. From `start`, each of them between 0 and it, both
    included. What would fall on one index moves up to the next free one.
    """
    one_of(get_args(Spacing), spacing=spacing)
    T = diffusion.timesteps
    if start is not None:
        within(0, T, term="timesteps", start=start)
    indices = T if start is None else start + 1
    steps = indices if steps is None else steps
    term = "timesteps" if start is None else "start + 1"
    within(1, indices, closed=True, term=term, steps=steps)
    if steps == 1:
        return [T - 1 if start is None else start]
    return _make_distinct(_spaced(diffusion, steps, spacing, start), indices)


def _spaced(diffusion: GaussianDiffusion, steps: int, spacing: Spacing, start: int | None) -> list[int]:
    """Rising indices as their formula gives them, repetitions included."""
    T, last = diffusion.timesteps, steps - 1
    if spacing == "uniform":
        return [i * T // steps if start is None else round(i * start / last) for i in range(steps)]
    top = 0.8 * T if start is None else start
    if spacing == "quadratic":
        squares = [top * (i / last) ** 2 for i in range(steps)]
        return [int(square + 1e-9) if start is None else round(square) for square in squares]
    top = T - 1 if start is None else start
    snr = torch.logit(diffusion.alphas_cumprod) / 2  # (T,): λ, falling
    grid = torch.linspace(float(snr[0]), float(snr[top]), steps, dtype=torch.float64)
    return (grid[:, None] - snr).abs().argmin(1).tolist()


def _make_distinct(rising: list[int], indices: int) -> list[int]:
    """Return numbers within [0, `indices`) as near as can be, all different, from the largest down."""
    distinct: list[int] = []
    for number, index in enumerate(rising):
        free = distinct[-1] + 1 if distinct else 0
        room = indices - (len(rising) - number)  # what is left above must hold the rest
        distinct.append(min(max(index, free), room))
    return distinct[::-1]


class Noise:
    """Standard normal noise, an image's own from its own stream, whatever other images are in the batch."""

    def __init__(self, streams: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device):
        self.streams, self.shape, self.device = streams, shape, device

    def __call__(self, step: int = 0) -> Tensor:
        """Draw the next noise of each image, (N, C, H, W) on the device; `step` is for samplers, which count."""
        noise = torch.empty(len(self.streams), *self.shape)
        for row, stream in zip(noise, self.streams, strict=True):
            torch.randn(self.shape, generator=stream, out=row)
        return noise.to(self.device)
