"""Samplers against the paper's own loop, each other, and the exact flow where the data is Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.nn.diffusion import GaussianDiffusion, Schedule, Variance
from experiments.nn.samplers import Draw, Noise, SamplerName, Spacing, sample, visits

F64 = torch.float64
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
VARIANCES: tuple[Variance, ...] = get_args(Variance)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def noises(steps: int, *shape: int) -> Draw:
    """Step → noise, the same whenever it is asked."""
    table = torch.randn(steps, *shape, dtype=F64)
    return lambda step: table[step]


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A model that is neither linear nor blind to t, and whose x̂_0 leaves [−1, 1] here and there."""
    return torch.tanh(x + t.view(-1, 1, 1, 1) / 300 - 1) * 0.8 + 0.3 * x


def ideal(diffusion: GaussianDiffusion, m: float, s: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[ε | x_t] where x_0 ~ N(m, s²): √(1−ᾱ) (x_t − √ᾱ m) / (ᾱ s² + 1 − ᾱ)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s**2 + 1 - a)

    return model


# ancestral sampling


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ancestral_sampling_is_algorithm_2(schedule: Schedule, variance: Variance) -> None:
    """x_{t−1} = μ + σ z, from the process's own mean (clipped before it) and β_t or β̃_t; z = 0 at the end."""
    diffusion, draw = GaussianDiffusion(80, schedule, variance), noises(80, 2, 1, 4, 4)
    x = noise = torch.randn(2, 1, 4, 4, dtype=F64)
    alpha_bar = [*diffusion.alphas_cumprod.tolist(), 1.0]
    for step, t in enumerate(range(79, -1, -1)):
        x = diffusion.p_mean_variance(curved, x, torch.full((2,), t)).mean
        sigma_2 = float(diffusion.betas[t])
        if variance == "fixed_small":
            sigma_2 *= (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        if t > 0:
            x = x + math.sqrt(sigma_2) * draw(step)
    assert torch.allclose(sample(diffusion, curved, noise, draw=draw), x, atol=1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
def test_ancestral_sampling_on_some_indices_is_that_of_the_process_between_them(variance: Variance) -> None:
    """β between two visits is 1 − ᾱ_t/ᾱ_s (Nichol & Dhariwal 2021, §4): a shorter process of its own."""
    diffusion = GaussianDiffusion(200, variance=variance)
    times = visits(diffusion, 25, "uniform")
    short = GaussianDiffusion(25, variance=variance)
    alpha_bar = diffusion.alphas_cumprod[times[::-1]]
    short.betas = 1 - alpha_bar / torch.cat((torch.ones(1, dtype=F64), alpha_bar[:-1]))
    short.alphas_cumprod = alpha_bar
    short.tables = short.make_tables()
    noise, draw = torch.randn(2, 1, 4, 4, dtype=F64), noises(25, 2, 1, 4, 4)

    def as_seen(x: Tensor, t: Tensor) -> Tensor:
        return curved(x, torch.tensor(times[::-1])[t])

    found = sample(diffusion, curved, noise, 25, draw=draw)
    assert torch.allclose(found, sample(short, as_seen, noise, draw=draw), atol=1e-10)


# DDIM


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_one_is_ancestral_sampling_with_the_small_variance(
    schedule: Schedule, clip: bool
) -> None:
    diffusion, draw = GaussianDiffusion(100, schedule, "fixed_small"), noises(100, 2, 1, 4, 4)
    noise = torch.randn(2, 1, 4, 4, dtype=F64)
    ancestral = sample(diffusion, curved, noise, draw=draw, clip=clip)
    found = sample(diffusion, curved, noise, sampler="ddim", eta=1.0, draw=draw, clip=clip)
    assert torch.allclose(found, ancestral, rtol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_ddim_is_its_equation_12(eta: float) -> None:
    """Step by step as written there, with the network's own ε; σ is eq. 16."""
    diffusion, draw = GaussianDiffusion(), noises(20, 2, 1, 4, 4)
    times = [int(i) for i in np.linspace(0, math.sqrt(800), 20) ** 2]  # the authors' code, "quad"
    x = noise = torch.randn(2, 1, 4, 4, dtype=F64)
    for step, (t, s) in enumerate(pairwise([*times[::-1], None])):
        a = float(diffusion.alphas_cumprod[t])
        before = 1.0 if s is None else float(diffusion.alphas_cumprod[s])
        eps = curved(x, torch.full((2,), t))
        sigma = eta * math.sqrt((1 - before) / (1 - a)) * math.sqrt(1 - a / before)
        x_0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(before) * x_0 + math.sqrt(1 - before - sigma**2) * eps + sigma * draw(step)
    found = sample(diffusion, curved, noise, 20, "ddim", draw if eta else None, eta=eta)
    assert torch.allclose(found, x, rtol=1e-9)


# the exact flow of Gaussian data


def flow_error(sampler: SamplerName, steps: int, spacing: Spacing) -> float:
    """How far an image lies from where the probability flow takes its noise: the same standard score."""
    m, s = 0.3, 0.25
    diffusion = GaussianDiffusion(20_000)
    last = diffusion.timesteps - 1
    a = float(diffusion.alphas_cumprod[last])
    x = torch.randn(1, 1, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(1))
    wanted = m + s * (x - math.sqrt(a) * m) / math.sqrt(a * s**2 + 1 - a)
    model = ideal(diffusion, m, s)
    found = sample(diffusion, model, x, steps, sampler, spacing=spacing, clip=False, start=last)
    return float((found - wanted).square().mean().sqrt())


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_converges_to_the_flow_in_first_order(spacing: Spacing) -> None:
    coarse, fine = (flow_error("ddim", steps, spacing) for steps in (50, 100))
    assert 1.7 < coarse / fine < 2.3
    assert flow_error("ddim", 400, spacing) < 0.01


def test_the_multistep_solver_converges_to_the_flow_in_second_order() -> None:
    errors = [flow_error("dpm++", steps, "logsnr") for steps in (20, 40, 80)]
    assert all(3.3 < coarse / fine < 4.7 for coarse, fine in pairwise(errors))
    assert errors[0] < flow_error("ddim", 20, "logsnr") / 4


@pytest.mark.parametrize(
    ("sampler", "steps", "eta"), [("ddpm", 400, 0), ("ddim", 100, 0.5), ("dpm++", 20, 0)]
)
def test_samples_of_gaussian_data_are_gaussian(sampler: SamplerName, steps: int, eta: float) -> None:
    """Mean and standard deviation of 16,384 pixels, and the fourth moment that a normal distribution has."""
    diffusion = GaussianDiffusion(
        400
    )  # its large variance is nearly right here, the small one would narrow them
    x = torch.randn(1, 1, 128, 128, dtype=F64)
    draw = (lambda step: torch.randn_like(x)) if sampler != "dpm++" else None
    found = sample(diffusion, ideal(diffusion, 0.2, 0.25), x, steps, sampler, draw, eta=eta)
    assert float(found.mean()) == pytest.approx(0.2, abs=0.008)
    assert float(found.std()) == pytest.approx(0.25, rel=0.03)
    score = (found - found.mean()) / found.std()
    assert float((score**4).mean()) == pytest.approx(3, abs=0.2)


# which indices are visited


def test_visits_are_those_of_the_ddim_authors() -> None:
    diffusion = GaussianDiffusion()
    for steps in (10, 20):
        assert visits(diffusion, steps, "uniform")[::-1] == list(range(0, 1000, 1000 // steps))
        quad = [int(i) for i in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
        assert visits(diffusion, steps, "quadratic")[::-1] == quad


def test_visits_even_in_lambda() -> None:
    """No index lies nearer to where the formula wants it."""
    diffusion = GaussianDiffusion()
    a = diffusion.alphas_cumprod
    snr = ((a / (1 - a)).log() / 2).numpy()
    wanted = np.linspace(snr[0], snr[-1], 10)
    nearest = [int(np.abs(snr - value).argmin()) for value in wanted]
    assert visits(diffusion, 10, "logsnr")[::-1] == nearest


@pytest.mark.parametrize("start", [None, 0, 1, 37, 99])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_visits_are_as_many_as_asked_and_all_different(spacing: Spacing, start: int | None) -> None:
    diffusion = GaussianDiffusion(100)
    top = 99 if start is None else start
    for steps in range(1, top + 2):
        found = visits(diffusion, steps, spacing, start)
        assert (
            len(found) == steps
            and all(t > s for t, s in pairwise(found))
            and 0 <= found[-1] <= found[0] <= top
        )
        assert steps == 1 or found[-1] == 0
        assert start is None or found[0] == start
    everything = visits(diffusion, None, spacing, start)
    assert everything == list(range(top, -1, -1))


# what a caller counts on


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_the_same_whatever_batch_it_is_in(sampler: SamplerName) -> None:
    diffusion = GaussianDiffusion(50)
    noise, table = torch.randn(3, 1, 4, 4, dtype=F64), torch.randn(10, 3, 1, 4, 4, dtype=F64)
    together = sample(diffusion, curved, noise, 10, sampler, lambda step: table[step])
    for b in range(3):
        one = slice(b, b + 1)
        alone = sample(diffusion, curved, noise[one], 10, sampler, lambda step, one=one: table[step, one])  # type: ignore[misc]
        assert torch.allclose(alone, together[one], atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_told(sampler: SamplerName) -> None:
    """Its number, its index, what it starts from and x̂_0; the last x̂_0 is the image."""
    diffusion, noise = GaussianDiffusion(50), torch.randn(2, 1, 4, 4, dtype=F64)
    told: list[tuple[int, int, Tensor, Tensor]] = []
    found = sample(
        diffusion,
        curved,
        noise,
        10,
        sampler,
        noises(10, 2, 1, 4, 4),
        on_step=lambda *step: told.append(step),
    )
    spacing: Spacing = {"ddpm": "uniform", "ddim": "quadratic", "dpm++": "logsnr"}[sampler]  # type: ignore[assignment]
    assert [(number, t) for number, t, _, _ in told] == list(enumerate(visits(diffusion, 10, spacing)))
    assert torch.equal(told[0][2], noise) and torch.allclose(told[-1][3], found, atol=1e-12)
    for _, t, x_t, x_0 in told:
        times = torch.full((2,), t)
        wanted = diffusion.predict_x_0(x_t, times, curved(x_t, times))
        assert torch.equal(x_0, wanted if sampler == "ddim" else wanted.clamp(-1, 1))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_clip_is_as_asked(sampler: SamplerName, clip: bool) -> None:
    diffusion, noise, extremes = GaussianDiffusion(50), 3 * torch.randn(2, 1, 4, 4, dtype=F64), [0.0]
    draw = noises(10, 2, 1, 4, 4)

    def look(step: int, t: int, x: Tensor, x_0: Tensor) -> None:
        extremes[0] = max(extremes[0], float(x_0.abs().max()))

    sample(diffusion, curved, noise, 10, sampler, draw, clip=clip, on_step=look)
    assert (extremes[0] <= 1) == clip


def test_a_start_in_the_middle_goes_on_as_the_whole_way_does() -> None:
    diffusion, noise, draw = GaussianDiffusion(50), torch.randn(2, 1, 4, 4, dtype=F64), noises(50, 2, 1, 4, 4)
    passed: dict[int, Tensor] = {}
    whole = sample(diffusion, curved, noise, draw=draw, on_step=lambda n, t, x, x_0: passed.update({t: x}))
    for t in (49, 20, 0):
        rest = sample(diffusion, curved, passed[t], draw=lambda step, t=t: draw(49 - t + step), start=t)  # type: ignore[misc]
        assert torch.allclose(rest, whole, atol=1e-12)


def test_noise_is_asked_only_where_some_is_added() -> None:
    diffusion, noise, asked = GaussianDiffusion(50), torch.randn(2, 1, 4, 4, dtype=F64), []

    def draw(step: int) -> Tensor:
        asked.append(step)
        return torch.randn_like(noise)

    sample(diffusion, curved, noise, 10, "ddim", draw)
    sample(diffusion, curved, noise, 10, "dpm++", draw)
    assert asked == []
    sample(diffusion, curved, noise, 10, "ddpm", draw)
    sample(diffusion, curved, noise, 10, "ddim", draw, eta=0.5)
    assert asked == [*range(9), *range(9)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_carry_no_graph_and_float32_is_near_float64(sampler: SamplerName) -> None:
    diffusion = GaussianDiffusion(100)
    gain = nn.Parameter(torch.tensor(0.9))
    noise, draw = torch.randn(2, 1, 4, 4, dtype=F64), noises(20, 2, 1, 4, 4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return gain.to(x.dtype) * curved(x, t)

    exact = sample(diffusion, model, noise, 20, sampler, draw)
    found = sample(diffusion, model, noise.float(), 20, sampler, lambda step: draw(step).float())
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(found.double(), exact, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "euler"}, r"sampler must be ddpm, ddim or dpm\+\+, not euler"),
        ({"sampler": "ddim", "spacing": "cubic"}, "spacing must be uniform, quadratic or logsnr, not cubic"),
        ({"sampler": "ddim", "eta": 1.5}, r"eta must lie in \[0, 1\], not 1.5"),
        (
            {"sampler": "dpm++", "eta": 0.5},
            r"eta belongs to sampler ddim: with dpm\+\+ it must be 0, not 0.5",
        ),
        ({"sampler": "ddpm", "draw": None}, "draw must be given: sampler ddpm adds noise at every step"),
        ({"sampler": "ddim", "eta": 0.1, "draw": None}, "draw must be given: sampler ddim adds noise"),
        ({"steps": 0}, r"steps must lie in \[1, 50\], the time steps that the process has, not 0"),
        ({"steps": 51}, r"steps must lie in \[1, 50\], the time steps that the process has, not 51"),
        (
            {"steps": 12, "start": 10},
            r"steps must lie in \[1, 11\], the time steps that there are up to start=10, not 12",
        ),
        ({"start": 50}, r"start must lie in \[0, 50\), not 50"),
        ({"start": -1}, r"start must lie in \[0, 50\), not -1"),
    ],
    ids=str,
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    noise = torch.randn(1, 1, 4, 4)
    given = {"draw": lambda step: noise, **arguments}
    with pytest.raises(ValueError, match=f"^{message}"):
        sample(GaussianDiffusion(50), curved, noise, **given)


def test_noise_is_an_image_s_own_whatever_the_batch() -> None:
    def noise(numbers: list[int]) -> Noise:
        streams = [torch.Generator().manual_seed(number) for number in numbers]
        return Noise(streams, (1, 2, 2), torch.device("cpu"))

    whole, part = noise([0, 1, 2]), noise([1])
    for _ in range(3):
        assert torch.equal(whole()[1:2], part())
    assert not torch.equal(whole(), whole())
