"""Samplers against the paper's own loop, each other, and the exact flow where the data is Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, get_args
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.nn.diffusion import GaussianDiffusion, Schedule, Variance
from experiments.nn.samplers import Draw, SamplerName, Spacing, _visits, sample
from tests.experiments.nn.diffusion_models import SCHEDULES, VARIANCES, bent, ideal
from tests.experiments.nn.helpers import F64, near, randn, refused

SPACINGS = pytest.mark.parametrize("spacing", get_args(Spacing))
SAMPLERS = pytest.mark.parametrize("sampler", get_args(SamplerName))


def noises(steps: int) -> Draw:
    """Step → noise (2, 1, 4, 4), the same whenever it is asked."""
    table = randn(steps, 2, 1, 4, 4)
    return lambda step: table[step]


# each sampler as its paper has it


@SCHEDULES
@VARIANCES
@pytest.mark.parametrize("steps", [80, 25])
def test_ancestral_sampling_is_algorithm_2(schedule: Schedule, variance: Variance, steps: int) -> None:
    """x_{t−1} = μ + σ z, z = 0 at the end, in the process between the visits (Nichol & Dhariwal 2021, §4)."""
    diffusion, between = (GaussianDiffusion(80, schedule, variance) for _ in range(2))
    rising, draw = _visits(diffusion, steps, "uniform")[::-1], noises(steps)
    between.alphas_cumprod = alpha_bar = diffusion.alphas_cumprod[rising]
    between.betas = 1 - alpha_bar / torch.cat((torch.ones(1, dtype=F64), alpha_bar[:-1]))
    between.tables = between.make_tables()
    x = noise = randn(2, 1, 4, 4)
    for step, t in enumerate(reversed(range(steps))):
        p = between.p_mean_variance(lambda x, t: bent(x, torch.tensor(rising)[t]), x, torch.full((2,), t))
        x = p.mean + p.variance.sqrt() * draw(step) if t > 0 else p.mean
    near(sample(diffusion, bent, noise, steps, draw=draw), x, 1e-9)


@SCHEDULES
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_one_is_ancestral_sampling_with_the_small_variance(
    schedule: Schedule, clip: bool
) -> None:
    diffusion, draw = GaussianDiffusion(100, schedule, "fixed_small"), noises(100)
    noise = randn(2, 1, 4, 4)
    ancestral = sample(diffusion, bent, noise, draw=draw, clip=clip)
    near(sample(diffusion, bent, noise, None, "ddim", draw, eta=1.0, clip=clip), ancestral, 1e-8, rtol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_ddim_is_its_equation_12(eta: float) -> None:
    """Step by step as written there, with the network's own ε; σ is eq. 16."""
    diffusion, draw = GaussianDiffusion(), noises(20)
    times = [int(i) for i in np.linspace(0, math.sqrt(800), 20) ** 2]  # the authors' code, "quad"
    alpha_bar = [*diffusion.alphas_cumprod.tolist(), 1.0]
    x = noise = randn(2, 1, 4, 4)
    for step, (t, s) in enumerate(pairwise([*times[::-1], -1])):
        a, before, eps = alpha_bar[t], alpha_bar[s], bent(x, torch.full((2,), t))
        sigma = eta * math.sqrt((1 - before) / (1 - a)) * math.sqrt(1 - a / before)
        x_0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(before) * x_0 + math.sqrt(1 - before - sigma**2) * eps + sigma * draw(step)
    near(sample(diffusion, bent, noise, 20, "ddim", draw if eta else None, eta=eta), x, 1e-8, rtol=1e-9)


def test_the_multistep_solver_is_its_algorithm_2_on_uneven_steps() -> None:
    """Lu et al. 2022: D from x̂_0 and the one before, r the ratio of the steps in λ; the last goes to x̂_0."""
    diffusion, x = GaussianDiffusion(60), randn(2, 1, 4, 4)
    found = sample(diffusion, bent, x, 4, "dpm++", spacing="quadratic")
    a = diffusion.alphas_cumprod
    lambdas, previous = torch.logit(a) / 2, None
    for before, t, s in ((0, 48, 21), (48, 21, 5), (21, 5, 0)):  # 48 (i/3)²
        D = x_0 = ((x - (1 - a[t]).sqrt() * bent(x, torch.full((2,), t))) / a[t].sqrt()).clamp(-1, 1)
        h = lambdas[s] - lambdas[t]
        if previous is not None:
            r = (lambdas[t] - lambdas[before]) / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * previous
        x = ((1 - a[s]) / (1 - a[t])).sqrt() * x - a[s].sqrt() * ((-h).exp() - 1) * D
        previous = x_0
    zero = torch.zeros(2, dtype=torch.int64)
    near(found, diffusion.predict_x_0(x, zero, bent(x, zero)).clamp(-1, 1), 1e-9)


@pytest.mark.parametrize(
    ("sampler", "spacing", "order", "most"),
    [*(("ddim", spacing, 1, 0.03) for spacing in get_args(Spacing)), ("dpm++", "logsnr", 2, 0.0006)],
)
def test_solvers_converge_to_the_flow_of_gaussian_data_in_their_order(
    sampler: SamplerName, spacing: Spacing, order: int, most: float
) -> None:
    """Where the probability flow takes noise is known: to the image of the same standard score."""
    m, s, diffusion = 0.3, 0.25, GaussianDiffusion(20_000)
    a, x = float(diffusion.alphas_cumprod[-1]), torch.linspace(-2, 2, 9, dtype=F64).view(9, 1, 1, 1)
    ways = {"sampler": sampler, "spacing": spacing, "clip": False, "start": 19_999}
    found = [sample(diffusion, ideal(diffusion, s, m), x, steps, **ways) for steps in (40, 80)]
    expected = m + s * (x - math.sqrt(a) * m) / math.sqrt(a * s**2 + 1 - a)
    coarse, fine = (float((images - expected).norm() / 3) for images in found)
    assert 0.85 < coarse / fine / 2**order < 1.15 and fine < most


# which indices are visited


@pytest.mark.parametrize("steps", [10, 20])
def test_visits_are_those_of_the_ddim_authors_or_even_in_lambda(steps: int) -> None:
    diffusion = GaussianDiffusion()
    assert _visits(diffusion, steps, "uniform")[::-1] == list(range(0, 1000, 1000 // steps))
    quad = [int(i) for i in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    assert _visits(diffusion, steps, "quadratic")[::-1] == quad
    assert _visits(diffusion, 5, "uniform", 7) == [7, 5, 4, 2, 0]  # rounded to the nearest
    assert _visits(diffusion, 5, "quadratic", 7) == [7, 4, 2, 1, 0]
    snr = torch.logit(diffusion.alphas_cumprod) / 2
    for start in (None, 400):  # no index lies nearer to where the formula puts it
        grid = torch.linspace(float(snr[0]), float(snr[-1 if start is None else start]), steps, dtype=F64)
        nearest = [int((snr - value).abs().argmin()) for value in grid]
        assert _visits(diffusion, steps, "logsnr", start)[::-1] == nearest


@SPACINGS
@pytest.mark.parametrize("start", [None, 0, 1, 37, 99])
def test_visits_are_as_many_as_asked_and_all_different(spacing: Spacing, start: int | None) -> None:
    """From `start` or pure noise down to 0; a single one is the noisiest, T − 1."""
    diffusion, top = GaussianDiffusion(100), 99 if start is None else start
    assert _visits(diffusion, 1, spacing, start) == [top]
    for steps in range(2, top + 2):
        found = _visits(diffusion, steps, spacing, start)
        assert len(found) == steps and all(t > s for t, s in pairwise(found))
        assert found[-1] == 0 and (found[0] <= top if start is None else found[0] == start)
    assert _visits(diffusion, None, spacing, start) == list(range(top, -1, -1))


# what a caller counts on


@SAMPLERS
@pytest.mark.parametrize("clip", [None, True, False])
def test_every_step_is_reported_and_the_clip_is_as_asked(sampler: SamplerName, clip: bool | None) -> None:
    """Its number, its index, what it starts from and x̂_0, clipped for all but ddim; the last x̂_0 is the image."""
    diffusion, noise, told = GaussianDiffusion(50), 2 * randn(2, 1, 4, 4), []
    how = {"clip": clip, "on_step": lambda *step: told.append(step)}
    found = sample(diffusion, bent, noise, 10, sampler, noises(10), **how)
    spacing: Any = {"ddpm": "uniform", "ddim": "quadratic", "dpm++": "logsnr"}[sampler]
    assert [step[:2] for step in told] == list(enumerate(_visits(diffusion, 10, spacing)))
    assert torch.equal(told[0][2], noise)
    near(told[-1][3], found, 1e-12)
    clipped = sampler != "ddim" if clip is None else clip
    for _, t, x_t, x_0 in told:
        times = torch.full((2,), t)
        expected = diffusion.predict_x_0(x_t, times, bent(x_t, times))
        assert torch.equal(x_0, expected.clamp(-1, 1) if clipped else expected)
    assert clipped == all(bool((x_0.abs() <= 1).all()) for *_, x_0 in told)


def test_a_start_in_the_middle_goes_on_as_the_whole_way_does() -> None:
    diffusion, noise, draw, passed = GaussianDiffusion(50), randn(2, 1, 4, 4), noises(50), {}
    whole = sample(diffusion, bent, noise, draw=draw, on_step=lambda n, t, x, x_0: passed.update({t: x}))
    for t in (49, 20, 0):
        rest = sample(diffusion, bent, passed[t], draw=lambda step, t=t: draw(49 - t + step), start=t)
        near(rest, whole, 1e-12)


def test_noise_is_asked_only_where_some_is_added() -> None:
    noise = randn(2, 1, 4, 4)
    for sampler, eta, count in (("ddim", 0, 0), ("dpm++", 0, 0), ("ddpm", 0, 9), ("ddim", 0.5, 9)):
        draw = Mock(return_value=noise)
        sample(GaussianDiffusion(50), bent, noise, 10, sampler, draw, eta=eta)
        assert draw.call_args_list == [call(step) for step in range(count)]


@SAMPLERS
def test_samples_carry_no_graph_and_float32_is_near_float64(sampler: SamplerName) -> None:
    """And an image is the same whatever batch it is in."""
    diffusion, gain = GaussianDiffusion(100), nn.Parameter(torch.tensor(0.9))
    noise, draw = randn(2, 1, 4, 4), noises(20)

    def images(x: Tensor, part: slice = slice(2)) -> Tensor:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return gain.to(x.dtype) * bent(x, t)

        return sample(diffusion, model, x[part], 20, sampler, lambda step: draw(step)[part].to(x.dtype))

    exact, found = images(noise), images(noise.float())
    assert found.dtype == torch.float32 and not found.requires_grad
    near(found, exact, 1e-4 * float(exact.abs().max()))
    near(images(noise, slice(1, 2)), exact[1:], 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "euler"}, r"sampler.*ddpm.*ddim.*dpm\+\+.*euler"),
        ({"sampler": "ddim", "spacing": "cubic"}, "spacing.*uniform.*quadratic.*logsnr.*cubic"),
        ({"sampler": "ddim", "eta": 1.5}, "eta.*0.*1.*1.5"),
        ({"sampler": "dpm++", "eta": 0.5}, r"eta.*ddim.*dpm\+\+.*0.5"),
        ({"sampler": "ddpm", "draw": None}, "draw.*ddpm"),
        ({"sampler": "ddim", "eta": 0.1, "draw": None}, "draw.*ddim"),
        ({"steps": 0}, "steps.*1.*50.*0"),
        ({"steps": 51}, r"steps.*\[1, timesteps = 50\], got 51"),
        ({"steps": 12, "start": 10}, r"steps.*\[1, start \+ 1 = 11\], got 12"),
        ({"start": 50}, "start.*0.*50.*50"),
        ({"start": -1}, "start.*0.*50.*-1"),
    ],
    ids=str,
)
def test_a_way_that_cannot_be_gone_is_refused(arguments: dict[str, Any], message: str) -> None:
    noise = torch.randn(1, 1, 4, 4)
    with refused(message):
        sample(GaussianDiffusion(50), bent, noise, **{"draw": lambda step: noise, **arguments})
